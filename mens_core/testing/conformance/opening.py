"""``mens_open``: a model folder is read completely or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mens_core.artifacts.tensors import read_tensors, write_tensors
from mens_core.errors import ModelError
from mens_core.testing import tiny
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.workbench import Workbench

__all__ = [
    "test_files_in_bfloat16_are_read_exactly",
    "test_weights_that_do_not_fit_are_refused_by_name",
]

_FILE = "model.safetensors"

Tensors = dict[str, Any]


def _changed(workbench: Workbench, folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """The first open family's model with other weights."""
    source = workbench.folder(workbench.any_family)
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors: Tensors = dict(read_tensors(source / _FILE))
    change(tensors)
    write_tensors(folder / _FILE, tensors, {"format": "pt"})
    return folder


def _inner(tensors: Tensors) -> str:
    """A linear weight of the first block."""
    return next(name for name in sorted(tensors) if ".0." in name and tensors[name].ndim == 2)


def _without(tensors: Tensors) -> None:
    del tensors[_inner(tensors)]


def _with_stray(tensors: Tensors) -> None:
    tensors["stray"] = np.ones(3, np.float32)


def _cut(tensors: Tensors) -> None:
    name = _inner(tensors)
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])


def _spoil(value: float) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        name = _inner(tensors)
        tensors[name] = tensors[name].copy()
        tensors[name][1, 2] = value

    return spoil


_FAULTS: dict[str, Callable[[Tensors], None]] = {
    "missing": _without,
    "left over": _with_stray,
    "wrongly shaped": _cut,
    "not a number": _spoil(np.nan),
    "infinite": _spoil(np.inf),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_weights_that_do_not_fit_are_refused_by_name(workbench: Workbench, tmp_path: Path, fault: str) -> None:
    folder = _changed(workbench, tmp_path / "model", _FAULTS[fault])
    name = (
        "stray" if fault == "left over" else _inner(dict(read_tensors(workbench.folder(workbench.any_family) / _FILE)))
    )
    plan = tiny.plan_for(workbench.backend, folder, device=workbench.capabilities.device, dtype="float32")
    said = "missing, left over, wrongly shaped or not finite"
    try:
        workbench.backend.open(plan, tiny.SHAPE)
    except ModelError as error:
        promise(name in str(error), "mens_open", said, f"a tensor is {fault}: the error does not name {name}")
    else:
        promise(kept=False, hook="mens_open", phrase=said, broken=f"{name} is {fault}, and the model was opened")


def test_files_in_bfloat16_are_read_exactly(workbench: Workbench, tmp_path: Path) -> None:
    def shorten(tensors: Tensors) -> None:
        tensors |= {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}

    def widen(tensors: Tensors) -> None:
        shorten(tensors)
        tensors |= {name: tensor.astype(np.float32) for name, tensor in tensors.items()}

    found = []
    for name, change in (("short", shorten), ("long", widen)):
        folder = _changed(workbench, tmp_path / name, change)
        plan = tiny.plan_for(workbench.backend, folder, device=workbench.capabilities.device, dtype="float32")
        found.append(workbench.backend.forward(workbench.backend.open(plan, tiny.SHAPE), tiny.batch_of(5, 9)))
    same = np.array_equal(found[0], found[1])
    promise(same, "mens_open", "Load the base", "the same weights stored in bfloat16 and in float32 differ")
