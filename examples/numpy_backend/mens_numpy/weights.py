"""The frozen base: safetensors → float32 arrays under transformers' names, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mens_core import ExecutionPlan
from mens_core.artifacts.tensors import open_tensors
from mens_core.errors import ModelError
from mens_core.hf.fit import HEAD, misfits
from mens_core.hf.keymap import canonical_name, linear_shapes, tensor_shapes

__all__ = ["Array", "read_base"]

Array: TypeAlias = NDArray[Any]
"""float32 throughout, which NumPy's types cannot follow through products with Python's floats."""


def read_base(plan: ExecutionPlan) -> dict[str, Array]:
    """Read the plan's model.

    Returns:
        Name → array, the plan's whole ones in the places of the files'; linear weights as (out, in), although GPT-2
        stores them as (in, out). The head is there under its own name even if it is the embedding.

    Raises:
        ModelError: naming every tensor that is missing, left over, wrongly shaped or not finite.
    """
    layout, folder = plan.layout, open_tensors(plan.model_dir)
    _refuse([text for texts in misfits(layout, folder.headers).values() for text in texts], plan)
    stored = {canonical_name(layout, name): name for name in folder}
    base = {name: np.array(folder[stored[name]], np.float32) for name in tensor_shapes(layout)}
    _refuse([f"{name} is not finite" for name, array in base.items() if not np.isfinite(array).all()], plan)
    if layout.tied:
        embedding = next(base[name] for name in base if name.endswith(("wte.weight", "embed_tokens.weight")))
        if HEAD in stored and not np.array_equal(folder[stored[HEAD]], embedding):
            _refuse([f"{HEAD} is left over: config.json ties the head to the embedding"], plan)
        base[HEAD] = embedding
    base |= {name: np.array(array, np.float32) for name, array in plan.whole.items()}
    if layout.family == "gpt2":
        base |= {f"{path}.weight": base[f"{path}.weight"].T for path in linear_shapes(layout)}
    return base


def _refuse(problems: Sequence[str], plan: ExecutionPlan) -> None:
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ModelError(f"the weights do not fit config.json:\n{listing}", where=plan.model_dir)
