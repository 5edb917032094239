"""After the last step: did training change the adapter, only the adapter, and is what was written what was trained?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mens_core.exchange import TrainingState
from mens_core.training.guards.verdict import Verdict

__all__ = [
    "adapter_changed",
    "base_unchanged",
    "differs_from_base",
    "eval_loss_not_worse",
    "reload_gives_the_same",
]


def adapter_changed(before: TrainingState, after: TrainingState) -> Verdict:
    """Some tensor is not what it was at the start, and all are finite."""
    moved = sum(not np.array_equal(before.adapter[name], tensor) for name, tensor in after.adapter.items())
    finite = all(np.isfinite(tensor).all() for tensor in after.adapter.values())
    if not finite:
        message, fix = "the trained adapter holds values that are not finite", "lower --lr"
    elif not moved:
        message = "training changed nothing: the adapter is what it was at the start"
        fix = "check the learning rate and the data"
    else:
        message, fix = f"training changed {moved} of the adapter's {len(after.adapter)} tensors", ""
    numbers = {"tensors": len(after.adapter), "changed": moved}
    return Verdict(code="adapter_changed", passed=finite and moved > 0, message=message, numbers=numbers, fix=fix)


def base_unchanged(before: float, now: float) -> Verdict:
    """The base in memory gives the loss that it gave before the first step, to the last bit.

    Args:
        before: of the first batch, with an adapter that is the identity, in nats.
        now: the same after the last step.
    """
    same = before == now
    return Verdict(
        code="base_unchanged",
        passed=same,
        message=f"without the adapter, the first batch's loss is {now!r}"
        + (", as before the first step" if same else f"; before the first step it was {before!r}"),
        numbers={"loss_before": before, "loss_now": now},
        fix="" if same else "report it to the backend's authors: the frozen base has changed, or sums in another order",
    )


def differs_from_base(base: float, adapted: float) -> Verdict:
    """The model with the adapter is another than the base.

    Args:
        base: loss of the first batch without the adapter, in nats.
        adapted: the same with it.
    """
    differs = base != adapted
    words = f"changes the first batch's loss from {base!r} to {adapted!r}" if differs else "leaves the loss as it was"
    return Verdict(
        code="differs_from_base",
        passed=differs,
        message=f"the adapter {words}",
        numbers={"loss_of_base": base, "loss": adapted},
        fix="" if differs else "train longer, or raise --lr",
    )


def eval_loss_not_worse(before: float | None, after: float | None) -> Verdict:
    """The held-out loss is not above the base's; a warning, and nothing where no rows are held out."""
    if before is None or after is None:
        passed, message = True, "no rows are held out"
    else:
        passed, message = after <= before, f"the held-out loss went from {before:.4f} to {after:.4f}"
    return Verdict(
        code="eval_loss_not_worse",
        passed=passed,
        message=message,
        numbers={"before": before, "after": after},
        fix="" if passed else "lower --lr, train for fewer epochs, or stop early by --early-stopping-patience",
        severity="warning",
    )


def reload_gives_the_same(
    trained: Mapping[str, NDArray[np.float32]],
    read: Mapping[str, NDArray[np.float32]],
    before: float,
    after: float,
) -> Verdict:
    """The adapter on the disk is the one that was trained, and gives its loss, to the last bit.

    Args:
        trained: the adapter in memory.
        read: the one on the disk.
        before: loss of the first batch with the first, in nats.
        after: the same with the second.
    """
    kept = {name for name, tensor in trained.items() if np.array_equal(tensor, read.get(name, ()))}
    other = len({*trained, *read} - kept)
    passed = not other and before == after
    return Verdict(
        code="reload_gives_the_same",
        passed=passed,
        message=f"read from the disk, {other} tensors differ, and the first batch's loss is {after!r}"
        + ("" if before == after else f" instead of {before!r}"),
        numbers={"tensors_that_differ": other, "loss_before": before, "loss_read": after},
        fix="" if passed else "check the disk, and go on from the last checkpoint with --resume auto",
    )
