"""What planning asks and answers: the machine, the base, the workload, offers, gates, and the plan itself.

Plain frozen records; those that a backend is given or answers with stand beside ``mens_core.exchange``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from mens_core.contract import FineTuneContract
    from mens_core.exchange import BatchShape
    from mens_core.hf.inventory import Coverage
    from mens_core.hf.layout import Layout

__all__ = [
    "MEMORY_PARTS",
    "BaseWeights",
    "ExecutionPlan",
    "GateVerdict",
    "KernelOffer",
    "Machine",
    "Speed",
    "Workload",
]

MEMORY_PARTS = (
    "framework",
    "base",
    "quantised_base",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "loading",
    "rows",
    "states",
)
"""What an offer's memory may consist of. ``rows`` is the data, held as tokens; ``loading`` is what loading needs beyond
what training then holds; ``states`` are the core's copies of what is trained whole."""


@attrs.frozen(kw_only=True)
class Speed:
    """How fast one kernel ran on this machine, see ``mens_core.costs``.

    Attributes:
        seconds: name of a cost → seconds per unit of it.
        source: when and how it was measured, for people.
    """

    seconds: Mapping[str, float]
    source: str


@attrs.frozen(kw_only=True)
class Machine:
    """What can be learned of this machine without a tensor library.

    Attributes:
        platform: operating system and architecture.
        processor: the CPU's name.
        python: version of the interpreter.
        cpu_count: processors this process may use.
        memory_bytes: memory this process may use: the machine's, or its control group's if that is less.
        accelerators: drivers of accelerators that the system shows, such as ``nvidia``; with none of them a backend
            need not load its framework to know that it runs on the CPU.
        speeds: ``<kernel> <device> <dtype>`` → speed, as far as it was measured here.
    """

    platform: str
    processor: str
    python: str
    cpu_count: int
    memory_bytes: int
    accelerators: tuple[str, ...] = ()
    speeds: Mapping[str, Speed] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class BaseWeights:
    """What the headers of the base's files say.

    Attributes:
        parameters: numbers in all tensors.
        stored_bytes: what they take on disk.
        linears: module path → (out, in) of every linear layer of the decoder; the head is not one.
    """

    parameters: int
    stored_bytes: int
    linears: Mapping[str, tuple[int, int]]


@attrs.frozen(kw_only=True)
class Workload:
    """What a run will ask of a backend; exact, or estimated from a sample of the rows.

    Attributes:
        shape: the largest batch, which decides memory.
        batches: batches of an optimizer step, on average.
        tokens: tokens of an optimizer step, on average.
        supervised: supervised tokens of an optimizer step, on average.
        pairs: sum of the squared row lengths of an optimizer step, on average.
        rows: rows that are trained on.
        row_tokens: tokens of a row, on average.
        steps: optimizer steps of the run.
        source: where the numbers come from, for people.
    """

    shape: BatchShape
    batches: float
    tokens: float
    supervised: float
    pairs: float
    rows: int
    row_tokens: float
    steps: int
    source: str


@attrs.frozen(kw_only=True)
class KernelOffer:
    """A backend's answer to "can you run this, and how?".

    Attributes:
        kernel: ``<backend>_<method>``.
        feasible: whether the backend can do the run on this machine.
        reason: why not, one sentence with what would change it; None if feasible.
        device: the device it would use, such as ``cpu`` or ``cuda:0``; empty if not feasible.
        dtype: ``float32`` or ``bfloat16``; empty if not feasible.
        capacity_bytes: memory of the device; 0 if not feasible.
        memory: part, out of ``MEMORY_PARTS``, → bytes; the sum is the highest demand on the device (on a CPU, of the
            whole process). Empty if the backend does not estimate it.
        seconds_per_step: of an optimizer step once it runs evenly; None if the backend does not estimate it.
        seconds_source: where that number comes from.
        patterns: whether layers get ranks and scales of their own where the contract has patterns of them; a run with
            patterns is refused otherwise.
        whole: whether the tensors of a plan's ``whole`` take the base's places; such an adapter is refused otherwise.
        modules_to_save: whether embeddings, the head and norms are trained whole where the contract names them; a run
            with such modules is refused otherwise.
    """

    kernel: str
    feasible: bool
    reason: str | None = None
    device: str = ""
    dtype: str = ""
    capacity_bytes: int = 0
    memory: Mapping[str, int] = attrs.field(factory=dict)
    seconds_per_step: float | None = None
    seconds_source: str = ""
    patterns: bool = False
    whole: bool = False
    modules_to_save: bool = False

    @property
    def peak_bytes(self) -> int | None:
        """Highest demand on the device; None if it was not estimated."""
        return sum(self.memory.values()) if self.memory else None


@attrs.frozen(kw_only=True)
class GateVerdict:
    """One check the planner made.

    Attributes:
        code: a word that never changes.
        passed: whether it holds.
        message: what was to hold, in words that are true of a check that passed and named in an error otherwise.
        fix: the one command or change that mends it.
    """

    code: str
    passed: bool
    message: str
    fix: str = ""


@attrs.frozen(kw_only=True)
class ExecutionPlan:
    """What will be done, decided before anything is spent.

    Invariants: the chosen kernel's offer is among the offers, feasible, and within the limit; every gate passed.

    Attributes:
        execution_kernel: ``<backend>_<method>``; it names what runs.
        runbook_kernel: the acceptance runbook's label, ``burn_lora`` or ``candle_qlora``.
        candle_compat_mode: true exactly for method qlora.
        contract_digest: sha256 over the contract and the contents it leads to.
        model_name: what the user called the base.
        model_dir: the folder on disk that holds it.
        tokenizer: ``hf`` or ``lab``.
        chat: how conversations are written, ``chatml`` or by the model's own ``template``.
        tokenizer_file: the tokenizer.json of ``hf``.
        train_file: the rows to train on; None where nothing is trained.
        eval_file: the held-out rows; None if there are none.
        contents: name → sha256 of what the plan read.
        weights: what the headers of the base's files say.
        coverage: of the attention output projections, see ``Coverage``.
        workload: how much there is to train on; None where nothing is trained.
        lengths: what the length of the rows costs by ``LengthLedger``, of the rows that were looked at; None where
            nothing is trained.
        limit_bytes: most memory the run may need.
        offers: every backend's answer that was asked for.
        not_taken: every other kernel that is installed → why it was not taken.
        gates: what was checked, in order.
        decided: field of the contract → the value that the planner gave it, where ``auto`` or nothing was asked for.
        preflight: what must hold before training starts; a run is refused if one did not pass, a plan is not.
        warnings: what the user should know although nothing is wrong.
        whole: name of a tensor of the base → what takes its place, of an adapter that is used and not trained. Where
            the head is tied to the embedding, either may be named and leaves the other as it is.
    """

    contract: FineTuneContract
    layout: Layout
    backend: str
    execution_kernel: str
    runbook_kernel: str
    candle_compat_mode: bool
    contract_digest: str
    model_name: str
    model_dir: Path
    tokenizer: str
    device: str
    dtype: str
    contents: Mapping[str, str]
    weights: BaseWeights
    offers: tuple[KernelOffer, ...]
    limit_bytes: int
    coverage: Coverage
    workload: Workload | None = None
    lengths: Mapping[str, Any] | None = None
    chat: str = "chatml"
    tokenizer_file: Path | None = None
    train_file: Path | None = None
    eval_file: Path | None = None
    not_taken: Mapping[str, str] = attrs.field(factory=dict)
    decided: Mapping[str, Any] = attrs.field(factory=dict)
    gates: tuple[GateVerdict, ...] = ()
    preflight: tuple[GateVerdict, ...] = ()
    warnings: tuple[str, ...] = ()
    whole: Mapping[str, NDArray[Any]] = attrs.field(factory=dict, repr=False, eq=False)

    @property
    def offer(self) -> KernelOffer:
        """The chosen kernel's offer."""
        return next(offer for offer in self.offers if offer.kernel == self.execution_kernel)

    def as_dict(self) -> dict[str, Any]:
        """The plan as the manifest keeps it, ready for JSON."""
        return {
            "execution_kernel": self.execution_kernel,
            "runbook_kernel": self.runbook_kernel,
            "backend": self.backend,
            "method": self.contract.adapter.method,
            "candle_compat_mode": self.candle_compat_mode,
            **{f"candle_proxy_stack_{name}": value for name, value in attrs.asdict(self.coverage).items()},
            "device": self.device,
            "dtype": self.dtype,
            "model": self.model_name,
            "model_type": self.layout.model_type,
            "parameters": self.weights.parameters,
            "stored_bytes": self.weights.stored_bytes,
            "tokenizer": self.tokenizer,
            "chat": self.chat,
            "contract": self.contract.as_fields(),
            "decided": dict(self.decided),
            "origins": self.origins(),
            "contract_digest": self.contract_digest,
            "contents": dict(self.contents),
            "workload": attrs.asdict(self.workload) if self.workload else None,
            "lengths": self.lengths,
            "estimate": self.estimate(),
            "limit_bytes": self.limit_bytes,
            "offers": [attrs.asdict(offer) for offer in self.offers],
            "not_taken": dict(self.not_taken),
            "gates": [attrs.asdict(gate) for gate in self.gates],
            "preflight": [attrs.asdict(verdict) for verdict in self.preflight],
            "warnings": list(self.warnings),
        }

    def origins(self) -> dict[str, str]:
        """Every field of the contract → where the value it has in this run comes from."""
        given = dict.fromkeys(self.contract.as_fields(), "default") | dict(self.contract.origins)
        return given | dict.fromkeys(self.decided, "planner")

    def estimate(self) -> dict[str, float | None]:
        """What the run is expected to need: peak memory in bytes, seconds a step, tokens a second, seconds in all."""
        seconds, work = self.offer.seconds_per_step, self.workload
        timed = seconds is not None and work is not None
        return {
            "peak_memory_bytes": self.offer.peak_bytes,
            "seconds_per_step": seconds,
            "tokens_per_sec": work.tokens / seconds if timed else None,  # type: ignore[union-attr, operator]
            "train_seconds": work.steps * seconds if timed else None,  # type: ignore[union-attr, operator]
        }
