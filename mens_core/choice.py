"""Which kernel does the run: every backend is asked in order, and the first that can is taken.

auto     torch, jax, then the others by name; the first whose offer is feasible and fits the memory
named    that backend alone; it is never replaced by another
compare  every backend with every method is asked, the choice is the same
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs

from mens_core.backend import Backend
from mens_core.contract import METHODS, FineTuneContract
from mens_core.errors import DataError, GateError, PluginError
from mens_core.hf.layout import FAMILIES, Layout
from mens_core.plan import BaseWeights, GateVerdict, KernelOffer, Machine, Workload
from mens_core.plugins import backend_names, load_offers
from mens_core.sizes import written_size

__all__ = ["Choice", "Question", "choice_gates", "choose"]

_WAYS_SHOWN = 3
_SMALL_RANK, _SHORTEST = 8, 64


@attrs.frozen(kw_only=True)
class Question:
    """What a backend is asked, for this contract or a changed one.

    Attributes:
        work: the workload of a contract; None where nothing is trained.
    """

    contract: FineTuneContract
    layout: Layout
    machine: Machine
    weights: BaseWeights
    work: Callable[[FineTuneContract], Workload | None]

    def ask(self, backend: Backend, contract: FineTuneContract | None = None) -> KernelOffer:
        """One backend's offer."""
        contract = contract or self.contract
        return backend.plan(contract, self.layout, self.machine, self.weights, self.work(contract))

    def limit(self, offer: KernelOffer) -> int:
        """Most memory that a run by this offer may need, in bytes."""
        asked = self.contract.compute
        share = int(offer.capacity_bytes * asked.max_vram_fraction)
        return min(share, asked.max_memory) if asked.max_memory else share


@attrs.frozen(kw_only=True)
class Choice:
    """Who does the run, and why nobody else.

    Attributes:
        backend: the chosen backend, as far as it was loaded to be asked.
        offer: its offer.
        limit_bytes: most memory the run may need.
        offers: all that were asked for.
        not_taken: every other kernel that is installed → why not.
    """

    backend: Backend
    offer: KernelOffer
    limit_bytes: int
    offers: tuple[KernelOffer, ...]
    not_taken: Mapping[str, str]


def choose(question: Question, *, compare: bool = False) -> Choice:
    """Ask, and decide.

    Args:
        question: what is asked.
        compare: whether those are asked as well whose answer changes nothing, with every method.

    Raises:
        PluginError: the backend that was named cannot be used.
        GateError: nobody can do the run, or it does not fit the memory, with what would make it fit.
    """
    answers: list[_Answer] = []
    chosen = None
    for name in _names(question):
        if chosen is None or compare:
            answers.append(_answer(question, name))
            chosen = chosen or (answers[-1] if answers[-1].obstacle is None else None)
    if chosen is None or chosen.backend is None or chosen.offer is None:
        raise _refusal(question, answers)
    others = [offer for answer in answers if compare and answer.backend for offer in _others(question, answer.backend)]
    return Choice(
        backend=chosen.backend,
        offer=chosen.offer,
        limit_bytes=question.limit(chosen.offer),
        offers=(*(answer.offer for answer in answers if answer.offer), *others),
        not_taken=_not_taken(question, chosen, answers),
    )


def choice_gates(choice: Choice) -> tuple[GateVerdict, ...]:
    """What had to hold for the choice, as the plan keeps it; a run for which it did not was refused before."""
    peak = choice.offer.peak_bytes
    needed = "no estimate of the memory" if peak is None else f"{written_size(peak)} of memory"
    return (
        GateVerdict(code="backend_available", passed=True, message=f"{choice.offer.kernel} can do the run"),
        GateVerdict(code="fits_memory", passed=True, message=f"{needed} within {written_size(choice.limit_bytes)}"),
    )


@attrs.frozen(kw_only=True)
class _Answer:
    """What came of asking one backend; ``obstacle`` says why it cannot do the run, None if it can."""

    kernel: str
    backend: Backend | None = None
    offer: KernelOffer | None = None
    obstacle: str | None = None


def _names(question: Question) -> list[str]:
    wanted = question.contract.compute.backend
    return list(backend_names()) if wanted == "auto" else [wanted]


def _answer(question: Question, name: str) -> _Answer:
    kernel = f"{name}_{question.contract.adapter.method}"
    try:
        backend = load_offers(name)
        offer = question.ask(backend)
    except PluginError as error:
        if question.contract.compute.backend != "auto":
            raise
        # One broken plugin must not stop the others; what is wrong with it stays on the plan.
        return _Answer(kernel=kernel, obstacle=error.what + (f": {error.fix}" if error.fix else ""))
    obstacle = offer.reason if not offer.feasible else _too_much(question, offer)
    return _Answer(kernel=kernel, backend=backend, offer=offer, obstacle=obstacle)


def _others(question: Question, backend: Backend) -> Iterator[KernelOffer]:
    """A backend's offers for the methods that are not asked for."""
    for method in METHODS:
        if method != question.contract.adapter.method:
            changed = question.contract.changed("compare", method=method, kernel=None, base_quant="auto")
            yield question.ask(backend, changed)


def _not_taken(question: Question, chosen: _Answer, answers: Sequence[_Answer]) -> dict[str, str]:
    wanted, method = question.contract.compute.backend, question.contract.adapter.method
    obstacles = {answer.kernel: answer.obstacle for answer in answers if answer.obstacle is not None}
    first = f"{chosen.kernel} comes first and can do the run" if wanted == "auto" else f"backend {wanted} is asked for"
    return {
        kernel: obstacles.get(kernel, first if way == method else f"method {method} is asked for")
        for name in backend_names()
        for way in METHODS
        if (kernel := f"{name}_{way}") != chosen.kernel
    }


def _too_much(question: Question, offer: KernelOffer) -> str | None:
    """Why an offer's memory is too much; None if it is not, or is not known."""
    limit = question.limit(offer)
    if offer.peak_bytes is None or offer.peak_bytes <= limit:
        return None
    return f"needs {written_size(offer.peak_bytes)} of memory, {written_size(limit)} may be used"


def _refusal(question: Question, answers: Sequence[_Answer]) -> GateError:
    """Too large for the first that could, or nobody can."""
    for answer in answers:
        if answer.backend and answer.offer and answer.offer.feasible:
            return _does_not_fit(question, answer.backend, answer.offer)
    lines = [f"  - {answer.kernel}: {answer.obstacle}" for answer in answers] or ["  - no backend is installed"]
    return GateError(
        f"no backend can train model_type {question.layout.model_type!r} as asked:\n" + "\n".join(lines),
        expected=f"{', '.join(FAMILIES)} by name; torch also takes what transformers' AutoModelForCausalLM knows",
        fix="python -m mens_core doctor",
        codes=("backend_available",),
    )


def _does_not_fit(question: Question, backend: Backend, offer: KernelOffer) -> GateError:
    parts = ", ".join(f"{name} {written_size(size)}" for name, size in offer.memory.items() if size)
    ways = list(itertools.islice(_ways_to_fit(question, backend, offer), _WAYS_SHOWN))
    listing = "".join(f"\n      {flags}  ({written_size(peak)})" for flags, peak in ways)
    return GateError(
        f"the run does not fit the memory:\n  - [fits_memory] {offer.kernel} {_too_much(question, offer)}",
        where=parts,
        fix=f"one of{listing}" if ways else "a smaller model, or a machine with more memory",
        codes=("fits_memory",),
    )


def _ways_to_fit(question: Question, backend: Backend, offer: KernelOffer) -> Iterator[tuple[str, int]]:
    """Changes that make the run fit, the fewest and least intrusive first: (flags, bytes it then needs).

    A way that only adds to another one is left out, and so is a change that saves nothing: NF4 brings libraries that
    take more than it saves of a small base.
    """
    changes = {
        flags: fields
        for flags, fields in _changes(question.contract, backend.name).items()
        if (changed := _changed_offer(question, backend, fields))
        and (changed.peak_bytes or 0) < (offer.peak_bytes or 0)
    }
    everything = {name: value for fields in changes.values() for name, value in fields.items()}
    if _peak_if_it_fits(question, backend, everything) is None:
        return
    found: list[set[str]] = []
    for count in range(1, len(changes) + 1):
        for flags in itertools.combinations(changes, count):
            fields = {name: value for flag in flags for name, value in changes[flag].items()}
            apart = len(fields) == sum(len(changes[flag]) for flag in flags)
            if apart and not any(way <= set(flags) for way in found):
                peak = _peak_if_it_fits(question, backend, fields)
                if peak is not None:
                    found.append(set(flags))
                    yield " ".join(flags), peak


def _peak_if_it_fits(question: Question, backend: Backend, fields: Mapping[str, object]) -> int | None:
    offer = _changed_offer(question, backend, fields)
    return offer.peak_bytes if offer and _too_much(question, offer) is None else None


def _changed_offer(question: Question, backend: Backend, fields: Mapping[str, object]) -> KernelOffer | None:
    """What the backend offers after a change; None if it offers nothing."""
    try:
        offer = question.ask(backend, question.contract.changed("advice", **fields))
    except DataError:  # rows so short that nothing of them is left to train on are no way to fit
        return None
    return offer if offer.feasible else None


def _changes(contract: FineTuneContract, backend: str) -> dict[str, dict[str, object]]:
    """Flags that save memory, the least intrusive first → the fields they set."""
    training, length = contract.training, contract.data.seq_len
    changes = _smaller_batches(contract, 2)
    if not training.gradient_checkpointing:
        changes["--gradient-checkpointing"] = {"gradient_checkpointing": True}
    changes |= _smaller_batches(contract, 4, training.batch_size)
    if contract.adapter.method == "lora":
        changes[f"--backend {backend}_qlora"] = {"method": "qlora", "kernel": None, "base_quant": "auto"}
    if contract.compute.dtype != "bfloat16":
        changes["--dtype bfloat16"] = {"dtype": "bfloat16"}
    if contract.adapter.rank > _SMALL_RANK:
        changes[f"--rank {_SMALL_RANK}"] = {"rank": _SMALL_RANK}
    for shorter in (length // 2, length // 4):
        if shorter >= _SHORTEST:
            truncated = {"seq_len": shorter, "on_overlong": "truncate"}
            changes[f"--seq-len {shorter} --on-overlong truncate"] = truncated
    return changes


def _smaller_batches(contract: FineTuneContract, *ways: int) -> dict[str, dict[str, object]]:
    """The same rows a step, a batch of them split into so many: flags → the fields they set."""
    size, accum = contract.training.batch_size, contract.training.grad_accum
    return {
        f"--batch-size {size // parts} --grad-accum {accum * parts}": {
            "batch_size": size // parts,
            "grad_accum": accum * parts,
        }
        for parts in ways
        if parts > 1 and size % parts == 0
    }
