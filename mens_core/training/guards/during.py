"""While a run goes on: is every step a step?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mens_core.training.guards.verdict import Judge, Verdict
from mens_core.training.progress import Progress

__all__ = ["StepGuards", "finite_steps", "loss_spike", "zero_gradient"]

# Of the run's windows, and in a row: more skipped ones end it.
_SKIPPED_SHARE, _SKIPPED_IN_A_ROW = 0.1, 10
# A spike is a loss above so many times the median of so many before it.
_SPIKE, _BEFORE_A_SPIKE = 3.0, 20
# A gradient of zero in every one of the first steps ends a run.
_FIRST_STEPS = 3


class StepGuards:
    """Judges every step when its numbers have been read.

    Args:
        progress: of the run, which is asked for what was skipped before.
        policy: the contract's ``on_non_finite``.
        total: windows of the whole run.
        judge: hears of a step that ends the run, and of the whole at the end.
    """

    def __init__(self, progress: Progress, policy: str, total: int, judge: Judge) -> None:
        self._progress, self._policy, self._total, self._judge = progress, policy, total, judge
        self._begins = True

    def skips(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the window counts as skipped, for its loss or gradient is not finite; the adapter is as it was.

        Raises:
            TrainingError: if the policy is to stop, or too many windows have been skipped.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return False
        verdict = finite_steps([*self._progress.losses, math.nan], self._total, self._policy, (step, loss, grad_norm))
        if not verdict.passed:
            self._judge.record(verdict)
        return True

    def told(self) -> None:
        """Judge what is known once a step has been added to the progress.

        Raises:
            TrainingError: if no gradient has been anything but zero.
        """
        if not self._begins or self._progress.steps_taken < min(_FIRST_STEPS, self._total):
            return
        self._begins = False
        verdict = zero_gradient(self._progress.zero_gradients, self._progress.steps_taken)
        if not verdict.passed:
            self._judge.record(verdict)

    def close(self) -> None:
        """Write the verdicts of the whole run down.

        Raises:
            TrainingError: if one of them failed.
        """
        losses, taken = self._progress.losses, self._progress.steps_taken
        self._judge.record(
            finite_steps(losses, self._total, self._policy),
            zero_gradient(self._progress.zero_gradients, taken),
            loss_spike(losses),
        )


def finite_steps(
    losses: Sequence[float], total: int, policy: str, last: tuple[int, float, float] | None = None
) -> Verdict:
    """Every loss and gradient is finite, or by ``skip-window`` few windows are not.

    Args:
        losses: of every window so far, NaN where it was skipped.
        total: windows of the whole run.
        policy: ``stop`` or ``skip-window``.
        last: step, loss and gradient norm of the one that was just found.
    """
    skipped = [math.isnan(loss) for loss in losses]
    count, row = sum(skipped), 0
    for skip in reversed(skipped):
        if not skip:
            break
        row += 1
    lenient = policy == "skip-window" and count <= _SKIPPED_SHARE * total and row < _SKIPPED_IN_A_ROW
    place = "" if last is None else f"step {last[0]} gave loss {last[1]} and gradient norm {last[2]}"
    if not count:
        message = "every loss and gradient was finite"
    else:
        books = f"{count} of {total} windows were skipped, {row} of them just now in a row"
        message = books if not place else f"{place}; {books}" if policy == "skip-window" else place
    return Verdict(
        code="finite_steps",
        passed=not count or lenient,
        message=message,
        numbers={"windows": len(losses), "windows_skipped": count, "in_a_row": row},
        fix="" if not count or lenient else "lower --lr, or train with --dtype float32",
    )


def zero_gradient(zeros: int, steps: int) -> Verdict:
    """The gradient was not exactly zero in each of the first steps, nor in all of a shorter run; single ones are told.

    Args:
        zeros: steps with a gradient of zero.
        steps: taken so far.
    """
    passed = not zeros or zeros < steps
    return Verdict(
        code="zero_gradient",
        passed=passed,
        message=f"the gradient was exactly zero in {zeros} of {steps} steps",
        numbers={"steps": steps, "zero": zeros},
        fix="" if passed else "nothing reaches the adapter: check --targets, --alpha and the base",
    )


def loss_spike(losses: Sequence[float]) -> Verdict:
    """No loss is above three times the median of the twenty finite ones before it; a warning.

    Args:
        losses: of every window, NaN where it was skipped.
    """
    known = [(step, loss) for step, loss in enumerate(losses, 1) if not math.isnan(loss)]
    spikes: list[tuple[float, int, float]] = []
    for place in range(_BEFORE_A_SPIKE, len(known)):
        usual = statistics.median(loss for _, loss in known[place - _BEFORE_A_SPIKE : place])
        step, loss = known[place]
        if loss > _SPIKE * usual:
            spikes.append((loss / usual if usual else math.inf, step, loss))
    worst = max(spikes, default=None)
    told = "" if worst is None else f"; the worst is step {worst[1]} with {worst[2]:.3f}"
    return Verdict(
        code="loss_spike",
        passed=not spikes,
        message=f"{len(spikes)} losses are above {_SPIKE:g} times the median of the {_BEFORE_A_SPIKE} before{told}",
        numbers={
            "spikes": len(spikes),
            "worst_step": None if worst is None else worst[1],
            "worst_loss": None if worst is None else worst[2],
        },
        fix="look at the rows of that step, or lower --lr" if spikes else "",
        severity="warning",
    )
