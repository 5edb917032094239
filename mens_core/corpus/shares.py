"""How many rows each source gives to a mix, so that its weight is its share of the output.

    share of a source = its weight / the sum of the weights of all sources that have rows

Without a size asked for, the source with the most rows for its weight gives each of its rows once, and that fixes the
size; no row is lost, and the others repeat theirs. With a size, rows are apportioned by largest remainders; a source
with more rows than its part is sampled.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import attrs

__all__ = ["Part", "draw", "parts"]


@attrs.frozen(kw_only=True)
class Part:
    """What one source gives.

    Attributes:
        available: rows that it has.
        share: of the output that its weight asks for, from 0 to 1.
        rows: that it gives.
    """

    available: int
    share: float
    rows: int

    @property
    def repeats(self) -> float:
        """How often each of its rows is given, on average; below 1 it is sampled."""
        return self.rows / self.available if self.available else 0.0


def parts(available: Sequence[int], weights: Sequence[float], total: int | None = None) -> list[Part]:
    """Apportion the output.

    Args:
        available: rows of each source; one without rows gives nothing, and its weight counts for nothing.
        weights: one for each source, above 0.
        total: rows of the output; None for the smallest size at which no row is lost.
    """
    counted = [weight if rows else 0.0 for rows, weight in zip(available, weights, strict=True)]
    whole = sum(counted)
    shares = [weight / whole if whole else 0.0 for weight in counted]
    if total is None:
        each = max((rows / weight for rows, weight in zip(available, weights, strict=True)), default=0.0)
        given = [round(weight * each) for weight in counted]
    else:
        given = _apportioned(shares, total)
    return [Part(available=rows, share=share, rows=n) for rows, share, n in zip(available, shares, given, strict=True)]


def _apportioned(shares: Sequence[float], total: int) -> list[int]:
    quotas = [share * total for share in shares]
    given = [math.floor(quota) for quota in quotas]
    left = sorted(range(len(shares)), key=lambda source: (given[source] - quotas[source], source))
    for source in left[: total - sum(given)] if any(shares) else []:
        given[source] += 1
    return given


def draw(part: Part, rng: random.Random) -> list[int]:
    """Places, from 0, of the rows that a source gives: each equally often, and a sample of them once more."""
    if not part.available:
        return []
    whole, rest = divmod(part.rows, part.available)
    return [*(list(range(part.available)) * whole), *rng.sample(range(part.available), rest)]
