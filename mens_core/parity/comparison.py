"""One comparison: two answers, how far they are apart, and whether that is little enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.parity.bounds import EXACT, Bound

__all__ = ["Comparison", "apart", "bytes_apart", "relative_norm", "tensors_apart"]

Array = NDArray[Any]
Arrays = Mapping[str, Array]


@attrs.frozen(kw_only=True)
class Comparison:
    """What was compared and what came of it.

    Attributes:
        what: the quantity, for people.
        left: who answered; ``right`` is who it is held to.
        right: another backend, another way to do the same, or ``oracle``.
        shape: of the numbers compared, for people.
        bound: how far they may be apart.
        max_error: largest error, in the bound's unit.
        mean_error: mean error, in the same.
        ulps: largest error in roundings of the largest number in float32; None where bytes or norms are compared.
    """

    what: str
    left: str
    right: str
    shape: str
    bound: Bound
    max_error: float
    mean_error: float
    ulps: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the largest error is within the bound; an error that is no number is not."""
        return self.max_error <= self.bound.value

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, which has no NaN: an error that is no number is null."""
        return {
            "what": self.what,
            "left": self.left,
            "right": self.right,
            "shape": self.shape,
            "tolerance": self.bound.value,
            "unit": self.bound.unit,
            "source": self.bound.reason,
            "max_error": _finite(self.max_error),
            "mean_error": _finite(self.mean_error),
            "ulps": _finite(self.ulps),
            "passed": self.passed,
        }


def apart(what: str, left: tuple[str, Any], right: tuple[str, Any], bound: Bound, unit: float) -> Comparison:
    """Compare two arrays, or two numbers, entry by entry.

    Args:
        what: the quantity.
        left: name and answer.
        right: name and answer of the same shape.
        bound: in multiples of ``unit``.
        unit: positive.
    """
    found, expected = np.asarray(left[1], np.float64), np.asarray(right[1], np.float64)
    if found.shape != expected.shape:
        raise ValueError(f"{what} of shapes {found.shape} and {expected.shape}")
    error = np.abs(found - expected)
    return Comparison(
        what=what,
        left=left[0],
        right=right[0],
        shape="×".join(map(str, found.shape)) or "1",
        bound=bound,
        max_error=float(error.max() / unit),
        mean_error=float(error.mean() / unit),
        ulps=float(error.max() / np.spacing(np.abs(expected).max().astype(np.float32))),
    )


def tensors_apart(
    what: str, left: tuple[str, Arrays], right: tuple[str, Arrays], bound: Bound, unit: float | None = None
) -> Comparison:
    """Compare tensors by name.

    Args:
        what: the quantity.
        left: name and answer.
        right: name and answer, of the same names and shapes.
        bound: in multiples of ``unit``.
        unit: what every entry's error is divided by; None for the Frobenius norm of each tensor's error, divided by
            that of the tensor.
    """
    found, expected = left[1], right[1]
    if set(found) != set(expected):
        raise ValueError(f"{what} of different names: {sorted(set(found) ^ set(expected))}")
    errors = {name: np.asarray(found[name], np.float64) - expected[name] for name in expected}
    if unit is None:
        values = np.array([relative_norm(error, expected[name]) for name, error in errors.items()])
    else:
        values = np.concatenate([np.abs(error).reshape(-1) / unit for error in errors.values()])
    return Comparison(
        what=what,
        left=left[0],
        right=right[0],
        shape=f"{len(expected)} tensors, {sum(array.size for array in expected.values()):,} numbers",
        bound=bound,
        max_error=float(values.max()),
        mean_error=float(values.mean()),
    )


def relative_norm(error: Array | float, expected: Array) -> float:
    """The Frobenius norm of an error, in multiples of the tensor's."""
    # A tensor of zeros has no size of its own; an error in it must not vanish.
    return float(np.linalg.norm(error)) / max(float(np.linalg.norm(expected)), float(np.finfo(np.float32).tiny))


def bytes_apart(what: str, left: tuple[str, list[Array]], right: tuple[str, list[Array]]) -> Comparison:
    """Count the numbers that are not the same bit for bit."""
    same = [
        found.shape == expected.shape and found.dtype == expected.dtype
        for found, expected in zip(left[1], right[1], strict=True)
    ]
    total = sum(array.size for array in right[1])
    differing = float(total)
    if all(same):
        pairs = zip(left[1], right[1], strict=True)
        differing = float(sum((_bits(found) != _bits(expected)).sum() for found, expected in pairs))
    return Comparison(
        what=what,
        left=left[0],
        right=right[0],
        shape=f"{len(right[1])} arrays, {total:,} numbers",
        bound=EXACT,
        max_error=differing,
        mean_error=differing / max(1, total),
    )


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
