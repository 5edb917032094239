"""The frozen base out of safetensors: one folder, every tensor accounted for, layers stacked.

::

    model.layers.0.mlp.up_proj.weight (F, D) ┐
    model.layers.1.mlp.up_proj.weight (F, D) ├──▶  model.layers.mlp.up_proj.weight (layers, F, D)
    …                                        ┘      dense in the plan's format, or NF4 layer by layer

Names and orientation are the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import ml_dtypes
import numpy as np
from jax import Array
from numpy.typing import NDArray

from mens_core.artifacts.tensors import TensorFolder, open_tensors
from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec
from mens_core.hf.fit import HEAD, misfits
from mens_core.hf.keymap import canonical_name, linear_shapes, tensor_shapes
from mens_core.hf.whole import TABLES, whole_shapes
from mens_core.plan import ExecutionPlan
from mens_jax._arrays import device_named, to_hand_over
from mens_jax._names import stacked_name
from mens_jax.quant import NF4Weight, quantize

__all__ = ["load_base"]

Base: TypeAlias = "dict[str, Array | NF4Weight]"

# Numbers looked at together, so that what is found about them stays small.
_PIECE = 1 << 20


def load_base(plan: ExecutionPlan) -> Base:
    """Read the weights onto the plan's device.

    For method qlora the linears become NF4 from the files' own values, one tensor at a time.

    Args:
        plan: names the folder, the method, the device and the number format.

    Returns:
        Stacked name → array in the plan's format, or NF4 weight; see the picture above. What the plan has whole has
        taken its place; a head that was tied is there where it, or the embedding, is no longer the other or is trained.

    Raises:
        ModelError: if the folder cannot be read, or tensors are missing, left over, wrongly shaped or not finite.
    """
    if (plan.model_dir / "adapter_config.json").exists():
        raise ModelError(
            "the model folder holds an adapter, not a base",
            where=plan.model_dir / "adapter_config.json",
            fix="merge the adapter into its base first, or point --model at the base",
        )
    reader = _Reader(open_tensors(plan.model_dir), plan)
    _raise_problems(reader.misfits(), plan)
    stacks: dict[str, list[str]] = {}
    for name in tensor_shapes(plan.layout):
        stacks.setdefault(stacked_name(name)[0], []).append(name)
    with jax.default_device(device_named(plan.device)):
        base = {stacked: reader.read(names) for stacked, names in stacks.items()}
        apart = {*plan.whole, *whole_shapes(plan.layout, plan.contract.adapter.modules_to_save)}
        if plan.layout.tied and apart & {HEAD, *TABLES}:
            base[HEAD] = reader.head_of_its_own()
    _raise_problems(reader.problems, plan)
    return base


class _Reader:
    """Reads tensors under their canonical names and remembers which of them are not finite."""

    def __init__(self, folder: TensorFolder, plan: ExecutionPlan) -> None:
        self.folder, self.plan, self.dtype = folder, plan, np.dtype(plan.dtype)
        self.stored = {canonical_name(plan.layout, name): name for name in folder}
        self.linears = {f"{path}.weight" for path in linear_shapes(plan.layout)}
        self.problems: list[str] = []

    def misfits(self) -> list[str]:
        """What the headers alone show to be wrong, and a head that is tied to the embedding but differs from it."""
        problems = [text for texts in misfits(self.plan.layout, self.folder.headers).values() for text in texts]
        differs = self.plan.layout.tied and HEAD in self.stored and not self._repeats_embedding()
        return [*problems, f"{HEAD} is left over"] if differs else problems

    def read(self, names: Sequence[str]) -> Array | NF4Weight:
        """One tensor, or the tensors of all layers stacked."""
        _, layer = stacked_name(names[0])
        if self.plan.contract.adapter.method == "qlora" and names[0] in self.linears:
            return _stacked((self._quantize(name) for name in names), len(names))
        shape = self.folder[self.stored[names[0]]].shape
        target = to_hand_over(shape if layer is None else (len(names), *shape), self.dtype)
        for place, name in enumerate(names):
            view = target if layer is None else target[place]
            self._read_into(name, view)
            self._check(name, view)
        stacked: Array = jax.device_put(target)
        return stacked

    def _read_into(self, name: str, out: NDArray[Any]) -> None:
        tensor = self._tensor(name)
        if tensor.dtype == out.dtype and name not in self.plan.whole:
            self.folder.read_into(self.stored[name], out)
        else:
            with np.errstate(over="ignore"):
                out[...] = tensor

    def _quantize(self, name: str) -> NF4Weight:
        weight = self._tensor(name)
        weight = weight if self._check(name, weight) else np.zeros_like(weight)
        spec = self.plan.contract.quant
        weight = weight.T if self.plan.layout.family == "gpt2" else weight
        return quantize(weight, NF4Spec(block_size=spec.block_size, double_quant=spec.double_quant))

    def _check(self, name: str, tensor: NDArray[Any]) -> bool:
        """Whether all numbers are finite; if not, the problem is noted. The file's pages may go, they were read."""
        bits, most = _bits(tensor).reshape(-1), _bits(np.asarray(ml_dtypes.finfo(tensor.dtype).max, tensor.dtype))
        unsigned = np.iinfo(bits.dtype).max >> 1
        # As integers, floats without their sign are in the order of their values; infinity and NaN come last.
        finite = all((bits[start : start + _PIECE] & unsigned).max() <= most for start in range(0, bits.size, _PIECE))
        if not finite:
            self.problems.append(f"{name} is not finite")
        self.folder.forget()
        return finite

    def head_of_its_own(self) -> Array:
        """The head of a base that ties it to the embedding: the plan's, or what the embedding was."""
        table = next(self.stored[name] for name in TABLES if name in self.stored)
        return jax.numpy.asarray(np.asarray(self.plan.whole.get(HEAD, self.folder[table])).astype(self.dtype))

    def _tensor(self, name: str) -> NDArray[Any]:
        """What the plan has whole, or what the files have."""
        found = self.plan.whole.get(name)
        return self.folder[self.stored[name]] if found is None else found

    def _repeats_embedding(self) -> bool:
        """Whether a head that the config ties to the embedding was saved all the same."""
        head = self.folder[self.stored[HEAD]]
        tables = [self.folder[self.stored[name]] for name in TABLES if name in self.stored]
        return any(table.shape == head.shape and np.array_equal(table, head) for table in tables)


def _bits(tensor: NDArray[Any]) -> NDArray[Any]:
    return tensor.view(f"u{tensor.dtype.itemsize}")


def _stacked(weights: Iterable[NF4Weight], layers: int) -> NF4Weight:
    """One weight whose arrays have the layers in front; each layer's own are let go of as they are written."""
    stacks: list[NDArray[Any]] = []
    for layer, weight in enumerate(weights):
        leaves, structure = jax.tree.flatten(weight)
        stacks = stacks or [to_hand_over((layers, *leaf.shape), leaf.dtype) for leaf in leaves]
        for stack, leaf in zip(stacks, leaves, strict=True):
            stack[layer] = leaf
    found: NF4Weight = jax.tree.unflatten(structure, map(jax.device_put, stacks))
    return found


def _raise_problems(problems: Sequence[str], plan: ExecutionPlan) -> None:
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ModelError(f"the weights do not fit config.json, {count}:\n{listing}", where=plan.model_dir)
