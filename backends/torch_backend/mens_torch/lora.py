"""A linear layer with a low-rank update (Hu et al. 2021, LoRA, section 4.1); ``_adapted`` holds its mathematics."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor as Array
from torch import nn

from mens_core.errors import ContractError, ModelError
from mens_torch._adapted import Adapted, adapted, adapted_alone
from mens_torch._siblings import Siblings
from mens_torch.dropout import Dropout
from mens_torch.quant import NF4Weight

__all__ = ["LoraLinear", "merge", "select_targets"]

# Numbers whose merge takes a millisecond at most: threads that wait for each other take longer.
_FEW = 1 << 20


class LoraLinear(nn.Module):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, computed in the format of x.

    Opens as the identity on the base: A and B are zero. Of rank 0 it is the frozen layer alone. Entries of A's input
    are dropped while ``dropout`` is set, which a training step does for one batch. Layers that were found to read one
    tensor share ``siblings``; a mask of each one's own sets them apart.

    Invariants: weight and bias never change; A and B are float32 whatever the base's format.

    Args:
        weight: (out, in), frozen. GPT-2's Conv1D holds the transpose: pass a transposed view.
        bias: (out,), frozen, or None.
        rank: R.
        scale: s, dimensionless.
    """

    def __init__(self, weight: Array | NF4Weight, bias: Array | None, rank: int, scale: float) -> None:
        super().__init__()
        out, self.in_features = weight.shape
        device = weight.codes.device if isinstance(weight, NF4Weight) else weight.device
        self.frozen, self.bias, self.rank, self.scale = weight, bias, rank, scale
        if rank == 0 and isinstance(weight, Array):
            # Beside an adapter there is none to be seen: code that reads it past forward would lose the adapter.
            self.weight = weight
        self.dropout: Dropout | None = None
        self.siblings: Siblings | None = None
        self.lora_a = nn.Parameter(torch.zeros(rank, self.in_features, device=device), requires_grad=rank > 0)
        self.lora_b = nn.Parameter(torch.zeros(out, rank, device=device), requires_grad=rank > 0)

    def forward(self, x: Array) -> Array:
        """Map (..., in) to (..., out)."""
        dropout = self.dropout
        if dropout is not None:
            # A layer that is called again for the same batch, as for rows that run one at a time, draws another mask.
            self.dropout = dropout.fold("again")
        elif not torch.is_grad_enabled():
            return adapted_alone(x, self.parts(), self.scale)
        elif self.siblings is not None:
            return self.siblings.output(self, x)
        return adapted(x, [self.parts()], self.scale, dropout)[0]

    def parts(self) -> Adapted:
        """What it computes with."""
        return Adapted(self.frozen, self.bias, self.lora_a, self.lora_b)


def merge(weight: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """W + s · B A, computed in float32 (Hu et al. 2021, section 4.1).

    Args:
        weight: (out, in).
        lora_a: (R, in).
        lora_b: (out, R).
        scale: s, dimensionless.

    Returns:
        (out, in) float32, newly allocated.

    Raises:
        ModelError: if the shapes do not fit; nothing is broadcast.
    """
    shapes = [tuple(array.shape) for array in (weight, lora_a, lora_b)]
    if any(len(shape) != 2 for shape in shapes) or (
        shapes[0] != (shapes[2][0], shapes[1][1]) or shapes[1][0] != shapes[2][1]
    ):
        raise ModelError(
            "an adapter does not fit its weight",
            where=f"weight {shapes[0]}, lora_A {shapes[1]}, lora_B {shapes[2]}",
            expected="weight (out, in), lora_A (rank, in), lora_B (out, rank)",
        )
    with _alone() if weight.numel() <= _FEW else nullcontext():
        # In PEFT's order of roundings, so that a merge by either gives the same bits.
        return (lora_b.float() @ lora_a.float()).mul_(scale).add_(weight)


@contextmanager
def _alone() -> Iterator[None]:
    """In the calling thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def select_targets(paths: Sequence[str], targets: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the linear layers to adapt.

    Args:
        paths: module paths of every linear layer inside the decoder.
        targets: ``("all-linear",)``, or names; a path is chosen if it equals a name or ends with ``.<name>``.

    Returns:
        The chosen paths, in the order of ``paths``.

    Raises:
        ModelError: if there is no linear layer at all.
        ContractError: if a name matches no path.
    """
    if not paths:
        raise ModelError("the decoder has no linear layer that could be adapted")
    if targets == ("all-linear",):
        return tuple(paths)
    known = sorted({path.rpartition(".")[2] for path in paths})
    for name in targets:
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            close = difflib.get_close_matches(name, [*known, *paths], n=1)
            raise ContractError(
                f"no linear layer is called {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
                where=f"targets = {', '.join(targets)}",
                expected=f"all-linear, or names out of {', '.join(known)}",
            )
    return tuple(path for path in paths if any(f".{path}".endswith(f".{name}") for name in targets))
