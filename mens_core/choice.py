"""Which kernel does the run: every backend is asked in order, and the first that can is taken.

    auto     torch, jax, then the others by name; the first whose offer is feasible and fits the memory
    named    that backend alone; it is never replaced by another
    compare  every backend with every method is asked, the choice is the same
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import attrs

from mens_core.backend import Backend
from mens_core.contract import METHODS, FineTuneContract
from mens_core.errors import GateError, PluginError
from mens_core.exchange import BaseWeights, GateVerdict, KernelOffer, Machine, Workload
from mens_core.hf.layout import FAMILIES, Layout
from mens_core.plugins import BackendInfo, installed_backends, load_offers

__all__ = ["Choice", "Question", "choose"]

_WAYS_SHOWN = 3


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
        backend: the chosen backend's name.
        offer: its offer.
        limit_bytes: most memory the run may need.
        offers: all that were asked for.
        not_taken: every other kernel → why not.
        backend_gates: asks the plugins' own gates, see ``Backend.gates``.
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
        compare: whether those are asked as well whose answer changes nothing.

    Raises:
        PluginError: the backend that was named cannot be used.
        GateError: nobody can do the run, or it does not fit the memory, with what would make it fit.
    """
    wanted, method = question.contract.compute.backend, question.contract.adapter.method
    offers: dict[str, KernelOffer] = {}
    not_taken: dict[str, str] = {}
    chosen: tuple[Backend, KernelOffer] | None = None
    too_large: list[tuple[Backend, KernelOffer]] = []
    for info in _asked(wanted):
        kernel = f"{info.name}_{method}"
        if chosen is not None and not compare:
            not_taken[kernel] = f"{chosen[1].kernel} comes first and can do the run"
            continue
        backend = _loaded(info, wanted, not_taken, kernel)
        if backend is None:
            continue
        offer = offers[kernel] = question.ask(backend)
        if not offer.feasible:
            not_taken[kernel] = str(offer.reason)
        elif _exceeds(question, offer):
            too_large.append((backend, offer))
            not_taken[kernel] = _too_much(question, offer)
        elif chosen is None:
            chosen = backend, offer
        else:
            not_taken[kernel] = f"{chosen[1].kernel} comes first and can do the run"
        if compare:
            offers |= {other.kernel: other for other in _other_methods(question, backend)}
    if chosen is None:
        raise _does_not_fit(question, *too_large[0]) if too_large else _nobody(not_taken, question.layout)
    named = {f"{info.name}_{way}": (info, way) for info in installed_backends() for way in METHODS}
    for kernel, (info, way) in named.items():
        reason = f"method {method} is asked for" if way != method else f"backend {wanted} is asked for"
        if kernel != chosen[1].kernel and (info.name, way) != (chosen[0].name, method):
            not_taken.setdefault(kernel, reason)
    return Choice(
        backend=chosen[0],
        offer=chosen[1],
        limit_bytes=question.limit(chosen[1]),
        offers=tuple(offers.values()),
        not_taken=not_taken,
    )


def fits_memory(choice: Choice) -> GateVerdict:
    """The gate on memory, as the plan keeps it; what does not fit was refused before."""
    peak = choice.offer.peak_bytes
    needed = "no estimate of the memory" if peak is None else f"{_gib(peak)} of memory"
    return GateVerdict(code="fits_memory", passed=True, message=f"{needed} within {_gib(choice.limit_bytes)}")


def _asked(wanted: str) -> tuple[BackendInfo, ...]:
    installed = installed_backends()
    return installed if wanted == "auto" else tuple(info for info in installed if info.name == wanted)[:1] or (
        # Nobody offers that name; loading it says so, and which are near.
        BackendInfo(name=wanted, distribution="", version="", target="", missing=(), install=""),
    )


def _loaded(info: BackendInfo, wanted: str, not_taken: dict[str, str], kernel: str) -> Backend | None:
    if wanted != "auto":
        return load_offers(info.name)
    if info.missing:
        not_taken[kernel] = f"needs {', '.join(info.missing)}: {info.install}"
        return None
    try:
        return load_offers(info.name)
    except PluginError as error:
        # One broken plugin must not stop the others; what is wrong with it stays on the plan.
        not_taken[kernel] = error.what
        return None


def _other_methods(question: Question, backend: Backend) -> Iterator[KernelOffer]:
    for method in METHODS:
        if method != question.contract.adapter.method:
            fields = {"method": method, "kernel": None, "base_quant": "auto"}
            yield question.ask(backend, question.contract.changed("compare", **fields))


def _exceeds(question: Question, offer: KernelOffer) -> bool:
    return offer.peak_bytes is not None and offer.peak_bytes > question.limit(offer)


def _too_much(question: Question, offer: KernelOffer) -> str:
    return f"needs {_gib(offer.peak_bytes or 0)} of memory, {_gib(question.limit(offer))} may be used"


def _does_not_fit(question: Question, backend: Backend, offer: KernelOffer) -> GateError:
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in offer.memory.items() if size)
    ways = list(_ways_to_fit(question, backend))[:_WAYS_SHOWN]
    listing = "".join(f"\n      {flags}  ({_gib(peak)})" for flags, peak in ways)
    return GateError(
        f"the run does not fit the memory:\n  - [fits_memory] {offer.kernel} {_too_much(question, offer)}",
        where=parts,
        fix=f"one of{listing}" if ways else "a smaller model, or a machine with more memory",
        codes=("fits_memory",),
    )


def _ways_to_fit(question: Question, backend: Backend) -> Iterator[tuple[str, int]]:
    """Changes that make the run fit, the least intrusive first: (flags, bytes it then needs)."""
    contract = question.contract
    training, adapter, data = contract.training, contract.adapter, contract.data
    single: dict[str, dict[str, object]] = {}
    if training.batch_size > 1:
        window = training.batch_size * training.grad_accum
        single[f"--batch-size 1 --grad-accum {window}"] = {"batch_size": 1, "grad_accum": window}
    if adapter.method == "lora":
        single["--backend qlora"] = {"method": "qlora", "kernel": None, "base_quant": "auto"}
    if contract.compute.dtype != "bfloat16":
        single["--dtype bfloat16"] = {"dtype": "bfloat16"}
    for seq_len in (data.seq_len // 2, data.seq_len // 4):
        single[f"--seq-len {seq_len} --on-overlong truncate"] = {"seq_len": max(8, seq_len), "on_overlong": "truncate"}
    if adapter.rank > 8:
        single["--rank 8"] = {"rank": 8}
    together: dict[str, object] = {}
    flags: list[str] = []
    both = {}
    for flag, change in list(single.items()):
        flags, together = [*flags, flag], together | change
        both[" ".join(flags)] = dict(together)
    for flag, change in (single | both).items():
        offer = question.ask(backend, contract.changed("advice", **change))
        if offer.feasible and offer.peak_bytes is not None and not _exceeds(question, offer):
            yield flag, offer.peak_bytes


def _nobody(not_taken: Mapping[str, str], layout: Layout) -> GateError:
    lines = [f"  - {kernel}: {reason}" for kernel, reason in not_taken.items()] or ["  - no backend is installed"]
    return GateError(
        f"no backend can train model_type {layout.model_type!r} as asked:\n" + "\n".join(lines),
        expected=f"{', '.join(FAMILIES)} by name; torch also takes what transformers' AutoModelForCausalLM knows",
        fix="python -m mens_core doctor",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
