"""Modules that are trained whole: embeddings, norms, the head.

::

    master, float32, trained ──rounded to the run's format──▶ what the module computes with, as the base did

At the start the master is what the run holds of the base, so that rounding changes nothing. A tied module gets a master
of its own and leaves the other as it was, as PEFT's ``modules_to_save`` do.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor as Array
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from mens_core.hf.whole import whole_shapes
from mens_core.plan import ExecutionPlan
from mens_torch._pages import MappedFiles

__all__ = ["train_whole"]


def train_whole(network: Any, plan: ExecutionPlan) -> dict[str, Array]:
    """Put a master in the place of every tensor that the contract's ``modules_to_save`` name.

    Args:
        network: transformers' model in the run's format, on its device.
        plan: names the modules.

    Returns:
        Name of the base's tensor → master, float32, which asks for its gradient.
    """
    masters: dict[str, Array] = {}
    files = MappedFiles(plan.model_dir)
    for name in whole_shapes(plan.layout, plan.contract.adapter.modules_to_save):
        path, _, part = name.rpartition(".")
        module = network.get_submodule(path)
        if type(module) is nn.Embedding:
            module = _Embedding(module)
            network.set_submodule(path, module)
            masters[name] = module.weight
        else:
            masters[name] = _rounded(module, part)
        files.was_read(masters[name].nbytes)
    return masters


class _Embedding(nn.Embedding):
    """Rows of the master, rounded once they are read: the slopes of a token's many places are summed in float32."""

    def __init__(self, table: nn.Embedding) -> None:
        master = table.weight.detach().to(torch.float32, copy=True)
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=master)
        self.format = table.weight.dtype

    def forward(self, index: Array) -> Array:
        """(…) to (…, D)."""
        return functional.embedding(index, self.weight, self.padding_idx).to(self.format)


class _Rounding(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Array) -> Array:
        return master.to(self.dtype)


def _rounded(module: Any, part: str) -> Array:
    """Let a module read a tensor as its master, rounded each time."""
    tensor = getattr(module, part)
    setattr(module, part, nn.Parameter(tensor.detach().to(torch.float32, copy=True)))
    # Not safe, in PyTorch's words: what is read is of another format than the master.
    parametrize.register_parametrization(module, part, _Rounding(tensor.dtype), unsafe=True)
    return cast("Array", module.parametrizations[part].original)
