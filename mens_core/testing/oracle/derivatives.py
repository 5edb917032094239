"""Derivatives without differentiation: one complex step through the forward functions.

For an analytic f and a real h, f(x + ih) = f(x) + ih f'(x) - h² f''(x) / 2 …, so that Im f(x + ih) / h is f'(x) up to
h². Nothing is subtracted, so h may be as small as 1e-20 and the result is as exact as f itself (Squire & Trapp 1998,
SIAM Review 40:1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["directional_derivative", "full_gradient"]

Arrays = Mapping[str, NDArray[Any]]

_STEP = 1e-20


def directional_derivative(function: Callable[[Arrays], Any], point: Arrays, direction: Arrays) -> float:
    """⟨gradient of ``function`` at ``point``, ``direction``⟩.

    Args:
        function: of arrays by name, giving a scalar; analytic, as every function of this package is.
        point: where, real.
        direction: names out of ``point`` → arrays of the same shapes, real; the others are held.
    """
    moved = dict(point)
    for name, along in direction.items():
        moved[name] = point[name].astype(complex) + 1j * _STEP * along
    return float(np.imag(function(moved)) / _STEP)


def full_gradient(function: Callable[[Arrays], Any], point: Arrays) -> dict[str, NDArray[np.float64]]:
    """The gradient, entry by entry: as many evaluations as there are numbers, so for tiny shapes only.

    Args:
        function: as for ``directional_derivative``.
        point: where, real.

    Returns:
        Arrays of the names and shapes of ``point``, float64.
    """
    gradient = {}
    for name, array in point.items():
        found = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            unit = np.zeros(array.shape)
            unit[place] = 1.0
            found[place] = directional_derivative(function, point, {name: unit})
        gradient[name] = found
    return gradient
