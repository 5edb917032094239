"""How far two answers may be apart, each bound with the reason for it.

A bound is for a decoder of two blocks. Each further block adds roundings of its own, which fall either way, so that the
bound of a deeper one is as much larger as the root of its depth. float32 has eps = 2^-23 = 1.2e-7.
"""

from __future__ import annotations

import math

import attrs

__all__ = [
    "ACCUMULATION",
    "ADAMW",
    "CURVE",
    "EXACT",
    "GRADIENT",
    "LOGITS",
    "LOSS",
    "MEAN",
    "MERGE",
    "MOMENTS",
    "SCHEDULE",
    "TRAJECTORY",
    "Bound",
]


@attrs.frozen(kw_only=True)
class Bound:
    """A largest error.

    Attributes:
        value: the bound, in ``unit``.
        unit: what errors are divided by, for people.
        reason: where the value comes from, one sentence.
    """

    value: float
    unit: str
    reason: str

    def for_depth(self, layers: int) -> Bound:
        """The bound for a decoder of this many blocks."""
        if layers <= 2:
            return self
        return attrs.evolve(
            self,
            value=self.value * math.sqrt(layers / 2),
            reason=f"{self.reason}; times √({layers}/2) for {layers} blocks instead of two",
        )


EXACT = Bound(value=0.0, unit="differing numbers", reason="the bytes are defined, so none may differ")

LOGITS = Bound(
    value=3.4e-6,
    unit="the largest logit",
    reason="twenty-eight roundings of the largest logit: two float32 graphs of two blocks with a strong adapter were "
    "seen up to fifteen apart",
)
LOSS = Bound(
    value=2e-6,
    unit="the sum",
    reason="the logits' error on terms of about the logits' size, which a sum of many of them does not enlarge",
)
GRADIENT = Bound(
    value=1e-5,
    unit="the tensor's Frobenius norm",
    reason="two blocks forward and backward, each product a sum of some fifty terms: a few tens of eps",
)
ACCUMULATION = Bound(
    value=5e-6,
    unit="the tensor's Frobenius norm",
    reason="the same gradients summed in another order, by matrix products of other sizes: some tens of eps",
)
ADAMW = Bound(
    value=2e-5,
    unit="the learning rate",
    reason="parameters up to 0.5 are rounded to 3e-8, which is 3e-6 of a rate of 1e-2, on each side, and the moments' "
    "and the gradient's roundings come on top",
)
MOMENTS = Bound(
    value=1e-5,
    unit="the tensor's Frobenius norm",
    reason="the gradient's bound; what the moments hold from before is the same on both sides",
)
CURVE = Bound(
    value=2e-5,
    unit="the step's loss",
    reason="the loss's bound at the first step, grown by the adapters' drift from step to step",
)
TRAJECTORY = Bound(
    value=2e-4,
    unit="the distance moved",
    reason="Adam divides by the gradient's size, so that an entry whose gradient is nearly zero magnifies its rounding",
)
MERGE = Bound(
    value=1e-6,
    unit="the largest entry",
    reason="a sum of rank + 1 terms, rounded each time: at most 8 eps for rank 8",
)
MEAN = Bound(
    value=1e-6,
    unit="the mean",
    reason="the mean of positive float32 numbers, summed in another order: a few eps",
)
SCHEDULE = Bound(
    value=1e-12,
    unit="the peak rate",
    reason="the same formula in float64, written in two ways: a few roundings of 2.2e-16",
)
