"""What crosses the hooks: plain frozen records, with NumPy arrays where there are numbers.

A backend receives and answers with these and nothing else, so the core never meets a tensor of a library it
does not know. Shape letters used throughout: T tokens of a packed batch, N rows in it, V vocabulary, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsFloat

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from mens_core.contract import FineTuneContract
    from mens_core.hf.layout import Layout

__all__ = [
    "IGNORE",
    "Batch",
    "BatchShape",
    "ExecutionPlan",
    "GateVerdict",
    "GenerateSettings",
    "KernelOffer",
    "Machine",
    "NF4Spec",
    "QuantizedWeight",
    "StepMetrics",
    "TrainingState",
]

IGNORE = -100
"""Target of a position that is not supervised, as in torch's cross-entropy."""


@attrs.frozen(kw_only=True)
class Machine:
    """What can be learned of this machine without a tensor library."""

    platform: str
    python: str
    cpu_count: int
    memory_bytes: int


@attrs.frozen(kw_only=True)
class KernelOffer:
    """A backend's answer to "can you run this, and how?".

    Attributes:
        kernel: ``<backend>_<method>``.
        feasible: whether the backend can do the run on this machine.
        reason: why not, one sentence with what would change it; None if feasible.
        device: the device it would use, such as ``cpu`` or ``cuda:0``; empty if not feasible.
        dtype: ``float32`` or ``bfloat16``; empty if not feasible.
    """

    kernel: str
    feasible: bool
    reason: str | None = None
    device: str = ""
    dtype: str = ""


@attrs.frozen(kw_only=True)
class GateVerdict:
    """One check the planner made, with a code that never changes."""

    code: str
    passed: bool
    message: str


@attrs.frozen(kw_only=True)
class ExecutionPlan:
    """What will be done, decided before anything is spent.

    Invariants: the chosen kernel's offer is feasible; every gate passed.

    Attributes:
        execution_kernel: ``<backend>_<method>``; it names what runs.
        runbook_kernel: the acceptance runbook's label, ``burn_lora`` or ``candle_qlora``.
        candle_compat_mode: true exactly for method qlora.
        contract_digest: sha256 over the contract and the contents it leads to.
        model_name: what the user called the base.
        model_dir: the folder on disk that holds it.
        tokenizer: ``hf`` or ``lab``.
        warnings: what the user should know although nothing is wrong.
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
    offers: tuple[KernelOffer, ...]
    gates: tuple[GateVerdict, ...]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The plan as the manifest keeps it, ready for JSON."""
        return {
            "execution_kernel": self.execution_kernel,
            "runbook_kernel": self.runbook_kernel,
            "backend": self.backend,
            "method": self.contract.adapter.method,
            "candle_compat_mode": self.candle_compat_mode,
            "device": self.device,
            "dtype": self.dtype,
            "model": self.model_name,
            "model_type": self.layout.model_type,
            "tokenizer": self.tokenizer,
            "contract": self.contract.as_fields(),
            "contract_digest": self.contract_digest,
            "contents": dict(self.contents),
            "offers": [attrs.asdict(offer) for offer in self.offers],
            "gates": [attrs.asdict(gate) for gate in self.gates],
            "warnings": list(self.warnings),
        }


@attrs.frozen(kw_only=True)
class BatchShape:
    """The largest batch of a run, so that a compiling backend can choose its shapes once.

    Attributes:
        rows: most rows in one batch.
        tokens: most tokens in one batch.
        longest_row: longest row, in tokens.
        supervised: most supervised tokens in one batch.
        batches: most batches in one accumulation window.
    """

    rows: int
    tokens: int
    longest_row: int
    supervised: int
    batches: int


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """Rows packed end to end; attention never crosses from one row into another.

    Attributes:
        input_ids: (T,) int32, the rows' tokens.
        positions: (T,) int32, 0, 1, 2 … restarting with each row.
        targets: (T,) int32, the token that follows in the same row, or ``IGNORE`` where it is not supervised;
            a row's last token never has a target.
        row_lengths: (N,) int32, summing to T.
    """

    input_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    row_lengths: NDArray[np.int32]

    @property
    def supervised_tokens(self) -> int:
        """Positions that have a target."""
        return int((self.targets != IGNORE).sum())


@attrs.frozen(kw_only=True, eq=False)
class StepMetrics:
    """What one optimizer step measured; the two numbers may still live on the device until ``float()`` reads them.

    Attributes:
        loss_sum: sum of the supervised tokens' cross-entropies over the window, in nats.
        grad_norm: global norm of the mean gradient before clipping.
        supervised_tokens: number of supervised tokens in the window.
    """

    loss_sum: SupportsFloat
    grad_norm: SupportsFloat
    supervised_tokens: int


@attrs.frozen(kw_only=True, eq=False)
class TrainingState:
    """Everything that changes during training, under names that every backend shares.

    Attributes:
        adapter: ``<module path>.lora_A.weight`` (R, in) and ``<module path>.lora_B.weight`` (out, R), float32.
        optimizer: the adapter's names with ``.exp_avg`` and ``.exp_avg_sq`` appended, same shapes, float32;
            empty before the first step.
        step: optimizer steps taken.
    """

    adapter: Mapping[str, NDArray[np.float32]]
    optimizer: Mapping[str, NDArray[np.float32]]
    step: int


@attrs.frozen(kw_only=True)
class GenerateSettings:
    """Greedy decoding: at most ``max_new_tokens`` tokens, ending with the first that is in ``stop_tokens``."""

    max_new_tokens: int
    stop_tokens: tuple[int, ...]


@attrs.frozen(kw_only=True)
class NF4Spec:
    """4-bit NormalFloat storage (Dettmers et al. 2023, section 3), as bitsandbytes stores it.

    Attributes:
        block_size: weights that share one absmax.
        double_quant: whether the absmax values, less their mean, are stored in 8 bits, in blocks of 256.
    """

    block_size: int = 64
    double_quant: bool = True


@attrs.frozen(kw_only=True, eq=False)
class QuantizedWeight:
    """A weight in NF4, byte for byte as bitsandbytes holds it.

    Attributes:
        codes: (ceil(numel / 2),) uint8; two codes a byte, the earlier one in the high nibble, row-major order.
        absmax: one value per block: float32, or uint8 indices into bitsandbytes' signed dynamic map.
        nested_absmax: (ceil(blocks / 256),) float32 with double quantization, else None.
        offset: the mean subtracted from the absmax values; 0.0 without double quantization.
        shape: of the weight, (out, in).
    """

    codes: NDArray[np.uint8]
    absmax: NDArray[np.float32] | NDArray[np.uint8]
    nested_absmax: NDArray[np.float32] | None
    offset: float
    shape: tuple[int, ...]
    spec: NF4Spec
