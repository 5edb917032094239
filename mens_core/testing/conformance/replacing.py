"""``mens_open`` of a plan that has whole tensors: they take the base's places, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

from mens_core.artifacts.tensors import read_tensors, write_tensors
from mens_core.hf.fit import HEAD
from mens_core.hf.keymap import canonical_name, linear_shapes
from mens_core.hf.layout import Layout
from mens_core.testing import tiny
from mens_core.testing.conformance import tolerances
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.reference import Reference
from mens_core.testing.conformance.workbench import Workbench

__all__ = ["test_what_a_plan_has_whole_takes_the_places_of_the_base"]

_TABLES = ("wte.weight", "embed_tokens.weight")
_FILE = "model.safetensors"


@pytest.mark.parametrize("what", ["head and last norm", "table and a linear layer"])
def test_what_a_plan_has_whole_takes_the_places_of_the_base(
    workbench: Workbench, family: str, what: str, tmp_path: Path
) -> None:
    workbench.needs("whole")
    plan = workbench.plan(family)
    base = _apart(plan.layout, dict(read_tensors(plan.model_dir / _FILE)))
    linear, norms = next(iter(linear_shapes(plan.layout))), ("model.norm.weight", "transformer.ln_f.weight")
    chosen = (HEAD, *norms) if what == "head and last norm" else (*_TABLES, f"{linear}.weight")
    draw = np.random.default_rng(0)
    whole = {
        name: (array + 0.1 * draw.standard_normal(array.shape)).astype(np.float32)
        for name, array in base.items()
        if name.endswith(chosen)
    }
    config = json.loads((plan.model_dir / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / _FILE, base | whole, {"format": "pt"})
    batch = tiny.batch_of(9, 5, seed=1)
    expected = Reference(tiny.plan_for(workbench.backend, tmp_path, device=plan.device, dtype="float32"))
    session = workbench.backend.open(attrs.evolve(plan, whole=whole), tiny.SHAPE)
    far = float(np.abs(workbench.backend.forward(session, batch) - expected.logits({}, batch)).max())
    problem = f"{family}, {', '.join(whole)}: logits {far:.3g} from the specification's"
    promise(far <= tolerances.LOGITS, "mens_open", "take the places of the base's", problem)


def _apart(layout: Layout, tensors: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """The base by its canonical names, the head beside the table of tokens even where the two are tied."""
    base = {canonical_name(layout, name): np.array(tensor, np.float32) for name, tensor in tensors.items()}
    table = next(array for name, array in base.items() if name.endswith(_TABLES))
    return {HEAD: table, **base}
