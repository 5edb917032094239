"""Modules that are trained whole, by the contract's ``modules_to_save``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.tensors import read_tensors
from mens_core.errors import ModelError
from mens_core.exchange import TrainingState
from mens_core.hf.fit import HEAD
from mens_core.hf.keymap import canonical_name
from mens_core.hf.whole import TABLES, whole_shapes
from mens_core.testing import tiny
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.step import gradients_match
from mens_core.testing.conformance.workbench import Workbench, random_state, same_state

__all__ = [
    "test_gradients_of_modules_trained_whole_are_those_of_the_specification",
    "test_modules_trained_whole_come_out_and_go_in_bit_for_bit",
    "test_modules_trained_whole_start_as_the_base_has_them",
]

# The head, tied or not, the embedding and the last norm of every family, and one norm of a stack of them.
_NAMES = ("lm_head", "wte", "embed_tokens", "norm", "ln_f", "0.ln_1", "1.input_layernorm")


def _base(workbench: Workbench, family: str) -> dict[str, NDArray[Any]]:
    """The base by its canonical names, the head beside the embedding even where the two are tied."""
    layout, folder = workbench.plan(family).layout, workbench.folder(family)
    stored = read_tensors(folder / "model.safetensors")
    base = {canonical_name(layout, name): tensor for name, tensor in stored.items()}
    return {HEAD: next(base[name] for name in TABLES if name in base), **base}


def test_modules_trained_whole_start_as_the_base_has_them(workbench: Workbench, family: str) -> None:
    workbench.needs("modules_to_save")
    base, backend = _base(workbench, family), workbench.backend
    session = workbench.session(family, modules_to_save=_NAMES)
    found = {name: array for name, array in backend.state(session).adapter.items() if ".lora_" not in name}
    expected = whole_shapes(workbench.plan(family).layout, _NAMES)
    wrong = sorted({*found} ^ {*expected}) or [name for name in found if not np.array_equal(found[name], base[name])]
    problem = f"{family}: {', '.join(wrong[:3])} is missing, left over, or not what the base has"
    promise(not wrong, "mens_open", "start as what the session holds of the base", problem)
    batch = tiny.batch_of(9, 5, seed=1)
    plain = backend.forward(workbench.session(family), batch)
    same = np.array_equal(backend.forward(session, batch), plain)
    promise(same, "mens_open", "start as what the session holds of the base", f"{family}: the base has other logits")


def test_gradients_of_modules_trained_whole_are_those_of_the_specification(workbench: Workbench, family: str) -> None:
    workbench.needs("modules_to_save")
    gradients_match(workbench, family, modules_to_save=_NAMES)


def test_modules_trained_whole_come_out_and_go_in_bit_for_bit(workbench: Workbench, family: str) -> None:
    workbench.needs("modules_to_save")
    backend, session = workbench.backend, workbench.session(family, modules_to_save=_NAMES)
    given = random_state(backend.state(session).adapter)
    session = backend.restore(session, given)
    promise(same_state(backend.state(session), given), "mens_restore", "bit for bit", f"{family}: another came out")
    pairs = {name: array for name, array in given.adapter.items() if ".lora_" in name}
    try:
        backend.restore(session, TrainingState(adapter=pairs, optimizer={}, step=0))
    except ModelError:
        unchanged = same_state(backend.state(session), given)
        promise(unchanged, "mens_restore", "unchanged", f"{family}: a state was refused, but not unchanged")
    else:
        promise(False, "mens_restore", "is missing", f"{family}: a state without them was taken")
