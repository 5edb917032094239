"""What must hold before the first byte is trained, beyond the planner's gates: the base's tensors, the rows.

A plan is made whatever is found here, so that it can show everything at once; a run is refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.lora import LoraAdapter, Targets
from mens_core.artifacts.peft import saved_whole
from mens_core.artifacts.tensors import TensorFolder
from mens_core.contract import FineTuneContract
from mens_core.errors import ModelError
from mens_core.hf.blocks import inventory_names, missing_middle_keys_report, ordered_middle_projection_keys
from mens_core.hf.families import REGISTRY
from mens_core.hf.fit import MISFITS, misfits
from mens_core.hf.inventory import Coverage, Inventory, middle_coverage
from mens_core.hf.layout import FAMILIES, Layout
from mens_core.hf.whole import names_module, whole_modules, whole_shapes
from mens_core.patterns import matches
from mens_core.plan import GateVerdict
from mens_core.sections import AdapterSpec
from mens_core.training.data import RowSample

__all__ = [
    "coverage_warning",
    "existing_targets",
    "finite_weights",
    "fitting_tensors",
    "matching_patterns",
    "readable_rows",
    "rotary_pairs",
    "start_fields",
    "start_fits",
    "strict_proxy_stack",
    "whole_modules_exist",
]

_NAMES_SHOWN = 32
_SCALING = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern")
_NUMBERS_AT_A_TIME = 1 << 22
_WRONG = {
    "missing": ("tensors_present", "every tensor that config.json asks for"),
    "left_over": ("tensors_known", "no tensor beyond those that config.json asks for"),
    "shape": ("tensor_shapes", "every tensor in the shape that config.json asks for"),
    "dtype": ("tensor_dtypes", "every tensor in a floating-point format"),
}


def strict_proxy_stack(layout: Layout, inventory: Inventory) -> GateVerdict:
    """The gate of ``qlora_require_full_proxy_stack``: every layer's attention output projection is there."""
    coverage = middle_coverage(layout, inventory.tensors, "qlora")
    counts = f"{coverage.keys_matched} of {coverage.keys_expected} attention output projections"
    complete = coverage.complete is True
    return GateVerdict(
        code="strict_proxy_stack",
        passed=complete,
        message=f"strict proxy stack: {counts}" + ("" if complete else f"; {_missing(layout, inventory)}"),
        fix="a complete checkpoint, or drop --qlora-require-full-proxy-stack to see the plan all the same",
    )


def coverage_warning(layout: Layout, inventory: Inventory, coverage: Coverage) -> tuple[str, ...]:
    """A partial proxy stack in words, naming what is missing; nothing where it is complete or was not counted."""
    if coverage.complete is not False:
        return ()
    counts = f"{coverage.keys_matched} of {coverage.keys_expected} attention output projections are there"
    return (f"partial proxy stack: {counts}; {_missing(layout, inventory)}",)


def fitting_tensors(layout: Layout, inventory: Inventory) -> tuple[GateVerdict, ...]:
    """Names, shapes and formats of all tensors against config.json; nothing where the core does not know the family."""
    if layout.family is None:
        return ()
    found = misfits(layout, inventory.tensors)
    verdicts = []
    for kind in MISFITS:
        code, wanted = _WRONG[kind]
        texts = found[kind]
        more = [f"and {len(texts) - _NAMES_SHOWN} more"] if len(texts) > _NAMES_SHOWN else []
        listing = "; ".join([*texts[:_NAMES_SHOWN], *more])
        verdicts.append(
            GateVerdict(
                code=code,
                passed=not texts,
                message=wanted + (f" ({len(texts)} are not so: {listing})" if texts else ""),
                fix="download the model again, or mend its config.json",
            )
        )
    return tuple(verdicts)


def existing_targets(targets: Sequence[str], linears: Iterable[str]) -> GateVerdict:
    """Whether every target names a linear layer of the decoder."""
    paths = list(linears)
    known = sorted({path.rpartition(".")[2] for path in paths})
    absent = [name for name in targets if not any(f".{path}".endswith(f".{name}") for path in paths)]
    absent = [] if tuple(targets) == ("all-linear",) else absent
    near = {name: difflib.get_close_matches(name, known, n=1) for name in absent}
    shown = ", ".join(name + (f" (did you mean {near[name][0]}?)" if near[name] else "") for name in absent)
    return GateVerdict(
        code="targets_exist",
        passed=not absent,
        message=f"targets are linear layers out of {', '.join(known)}" + (f"; there is no {shown}" if absent else ""),
        fix="--targets all-linear, or names out of these",
    )


def whole_modules_exist(names: Sequence[str], layout: Layout, linears: Iterable[str]) -> GateVerdict:
    """Whether every name of ``modules_to_save`` is an embedding, the head or a norm."""
    known, paths = whole_modules(layout), tuple(linears)
    ends = sorted({path.rpartition(".")[2] for path in known})
    problems = []
    for name in names:
        if any(names_module(name, path) for path in known):
            continue
        near = difflib.get_close_matches(name, ends, n=1)
        problems.append(
            f"{name} is a linear layer, which is trained by a low-rank update"
            if any(names_module(name, path) for path in paths)
            else f"{name} has more than one module in it"
            if any(f".{name}." in f".{path}" for path in (*known, *paths))
            else f"there is no {name}" + (f" (did you mean {near[0]}?)" if near else "")
        )
    if not known:
        problems = [f"of model_type {layout.model_type!r} the core does not know these, only of {', '.join(FAMILIES)}"]
    return GateVerdict(
        code="whole_modules_exist",
        passed=not problems,
        message=f"modules that are trained whole are embeddings, norms or the head, out of {', '.join(ends)}"
        + (f"; {'; '.join(problems)}" if problems else ""),
        fix="names out of these in --modules-to-save, and linear layers in --targets; an adapter of other tools that "
        "holds other modules whole is merged first, by merge-adapter, and a new one trained on the result",
    )


def start_fits(spec: AdapterSpec, layout: Layout, linears: Iterable[str]) -> GateVerdict:
    """Whether the adapter to go on from is what the contract asks for, tensor for tensor.

    Raises:
        ModelError: if it cannot be read, see ``open_adapter``.
    """
    assert spec.start_from is not None, "asked of a run that goes on from an adapter"
    adapter = open_adapter(spec.start_from)
    asked = Targets(names="all-linear" if spec.targets == ("all-linear",) else spec.targets).of(linears)
    pairs = dict(zip(adapter.modules, adapter.pairs.values(), strict=True))
    ranks = {path: (pair.rank, spec.rank_of(path)) for path, pair in pairs.items()}
    scales = {path: (pair.scale, spec.scale_of(path)) for path, pair in pairs.items()}
    apart = {path: both for path, both in scales.items() if not math.isclose(*both, rel_tol=1e-6)}
    whole = {name: tensor.shape for name, tensor in adapter.whole.items()}
    wanted = whole_shapes(layout, spec.modules_to_save)
    others = [name for name in sorted({**whole, **wanted}) if whole.get(name) != wanted.get(name)]
    shown = [f"{name} {whole.get(name, 'not at all')} instead of {wanted.get(name, 'not at all')}" for name in others]
    problems = [
        *_differing("rank", {path: both for path, both in ranks.items() if both[0] != both[1]}, len(pairs)),
        *_differing("scale", apart, len(pairs)),
        *([f"it adapts {len(pairs)} layers, not {len(asked)}"] if set(pairs) != asked else []),
        *([f"whole it has {', '.join(shown[:3])}"] if shown else []),
    ]
    return GateVerdict(
        code="start_fits",
        passed=not problems,
        message=f"the run goes on from {spec.start_from}" + (f": {'; '.join(problems)}" if problems else ""),
        fix=f"leave {', '.join((*_SCALING, 'targets', 'modules_to_save'))} out, and the adapter's own are taken",
    )


def start_fields(contract: FineTuneContract, linears: Iterable[str]) -> dict[str, Any]:
    """What the contract leaves to the adapter that it goes on from: ranks and scales, targets, modules trained whole.

    Raises:
        ModelError: if it cannot be read, see ``open_adapter``, or holds tensors whole that were not trained so.
    """
    start, paths = contract.adapter.start_from, tuple(linears)
    if start is None:
        return {}
    adapter = open_adapter(start)
    _refuse_untrained(adapter)
    fields: dict[str, Any] = {}
    if not contract.origins.keys() & set(_SCALING):
        fields |= adapter.settings()
    if "targets" not in contract.origins:
        modules = set(adapter.modules)
        names = tuple(sorted({path.rpartition(".")[2] for path in modules}))
        short = Targets(names=names).of(paths) == modules
        fields["targets"] = "all-linear" if modules == set(paths) else names if short else adapter.modules
    if "modules_to_save" not in contract.origins and adapter.whole:
        fields["modules_to_save"] = tuple(sorted({name.rpartition(".")[0] for name in adapter.whole}))
    return fields


def _refuse_untrained(adapter: LoraAdapter) -> None:
    """PEFT saves an embedding that was given new rows though it is frozen, and may train two modules as one."""
    frozen = [name for name in adapter.whole if not saved_whole(name, adapter.config)]
    problem = (
        "trains head and embedding as one (ensure_weight_tying), which here are two"
        if adapter.whole and adapter.config.get("ensure_weight_tying")
        else f"holds {', '.join(frozen[:3])}, which it does not say were trained"
        if frozen
        else None
    )
    if problem is not None:
        raise ModelError(
            f"the adapter {problem}",
            where=adapter.source,
            expected="low-rank updates, and modules that were trained whole each by itself, in modules_to_save",
            fix=f"python -m mens_core merge-adapter --adapter {adapter.source} --output merged, and train a new one "
            "with --model merged; generate, chat and eval take this one as it is",
        )


def matching_patterns(spec: AdapterSpec, linears: Iterable[str]) -> GateVerdict:
    """Whether every pattern of a rank or an alpha matches a layer that is adapted."""
    adapted = Targets(names="all-linear" if spec.targets == ("all-linear",) else spec.targets).of(linears)
    patterns = [pattern for pattern, _ in (*spec.rank_pattern, *spec.alpha_pattern)]
    idle = [pattern for pattern in patterns if not any(matches(pattern, path) for path in adapted)]
    return GateVerdict(
        code="patterns_match",
        passed=not idle,
        message="every pattern of a rank or an alpha matches a layer that is adapted"
        + (f"; {', '.join(idle)} match none" if idle else ""),
        fix="mend or remove these in --rank-pattern and --alpha-pattern",
    )


def _differing(what: str, found: Mapping[str, tuple[float, float]], layers: int) -> list[str]:
    """One sentence about the layers whose number is another than asked for; none if there is no such layer."""
    if not found:
        return []
    numbers = {*found.values()}
    if len(numbers) == 1 and len(found) == layers:
        ours, asked = numbers.pop()
        return [f"its {what} is {ours:g}, not {asked:g}"]
    path, (ours, asked) = next(iter(found.items()))
    return [f"its {what} differs in {len(found)} layers, such as {path}: {ours:g}, not {asked:g}"]


def rotary_pairs(layout: Layout) -> GateVerdict:
    """Whether the rotated part of a head is made of whole pairs, as rotations need."""
    share = layout.rope.get("partial_rotary_factor", layout.config.get("partial_rotary_factor", 1.0))
    rotates = layout.family is not None and REGISTRY[layout.family].rotary
    return GateVerdict(
        code="rotary_pairs",
        passed=not rotates or int(share * layout.head_dim) % 2 == 0,
        message=f"heads of {layout.head_dim} dimensions can be rotated in pairs" if rotates else "nothing is rotated",
        fix="config.json of a model that was trained with these heads",
    )


def readable_rows(rows: RowSample) -> GateVerdict:
    """Whether the rows of a sample can be used; all are checked when a run reads them."""
    which = "all" if rows.whole else "a sample of"
    return GateVerdict(
        code="rows_readable",
        passed=not rows.faulty,
        message=f"{which} {rows.sampled} rows can be used" + (f" ({rows.faulty} cannot)" if rows.faulty else ""),
        fix="python -m mens_core corpus validate lists every faulty row of a file; --on-bad-row skip leaves them out",
    )


def finite_weights(folder: TensorFolder) -> GateVerdict:
    """Read every weight once, a few million at a time, and look for NaN and infinity."""
    broken = [name for name, tensor in folder.items() if not _finite(tensor)]
    shown = f" ({len(broken)} hold others: {', '.join(broken[:_NAMES_SHOWN])})" if broken else ""
    return GateVerdict(
        code="weights_finite",
        passed=not broken,
        message=f"finite numbers in all {len(folder)} tensors{shown}",
        fix="download the model again",
    )


def _finite(tensor: NDArray[Any]) -> bool:
    if tensor.dtype.kind in "iub":
        return True
    flat = tensor.reshape(-1)
    pieces = range(0, flat.size, _NUMBERS_AT_A_TIME)
    return all(np.isfinite(flat[start : start + _NUMBERS_AT_A_TIME]).all() for start in pieces)


def _missing(layout: Layout, inventory: Inventory) -> str:
    present = inventory_names(layout, inventory.tensors)
    names = missing_middle_keys_report(layout, present, _NAMES_SHOWN)
    more = len(set(ordered_middle_projection_keys(layout)) - present) - len(names)
    return f"missing: {', '.join(names)}" + (f" and {more} more" if more > 0 else "")
