"""Layers with ranks and scales of their own, by the contract's ``rank_pattern`` and ``alpha_pattern``."""

from __future__ import annotations

from typing import Any

import numpy as np

from mens_core.hf.keymap import linear_shapes
from mens_core.testing import tiny
from mens_core.testing.conformance import tolerances
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.reference import Reference
from mens_core.testing.conformance.workbench import Workbench

__all__ = [
    "test_layers_have_ranks_of_their_own",
    "test_layers_have_scales_of_their_own",
]


def _patterns(workbench: Workbench, family: str) -> dict[str, Any]:
    """By a name in all layers, and by a path in one: a stack of layers has both."""
    first, *_, last = linear_shapes(workbench.plan(family).layout)
    name = first.rpartition(".")[2]
    return {"rank_pattern": ((name, 2), (last, 7)), "alpha_pattern": ((first, 3.0), (last, 5.0))}


def test_layers_have_ranks_of_their_own(workbench: Workbench, family: str) -> None:
    workbench.needs("patterns")
    fields = _patterns(workbench, family)
    plan, session = workbench.plan(family, **fields), workbench.session(family, **fields)
    expected: dict[str, tuple[int, int]] = {}
    for path, (out, into) in linear_shapes(plan.layout).items():
        rank = plan.contract.adapter.rank_of(path)
        expected |= {f"{path}.lora_A.weight": (rank, into), f"{path}.lora_B.weight": (out, rank)}
    found = {name: array.shape for name, array in workbench.backend.state(session).adapter.items()}
    wrong = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
    problem = f"{family}: {', '.join(f'{name} is {found.get(name)}, not {expected.get(name)}' for name in wrong[:2])}"
    promise(not wrong, "mens_state", "under the names all backends share", problem)


def test_layers_have_scales_of_their_own(workbench: Workbench, family: str) -> None:
    workbench.needs("patterns")
    fields, batch = _patterns(workbench, family), tiny.batch_of(9, 5, seed=1)
    session, adapter = workbench.adapted(family, **fields)
    expected = Reference(workbench.plan(family, **fields)).logits(adapter, batch)
    far = float(np.abs(workbench.backend.forward(session, batch) - expected).max())
    problem = f"{family} under {fields}: {far:.3g} from the specification's, {tolerances.LOGITS:g} is allowed"
    promise(far <= tolerances.LOGITS, "mens_forward", "logits", problem)
