"""How large updates are, and how far apart: Frobenius norms of low-rank products that are never formed.

With B = Qb Rb and Aᵀ = Qa Ra, the columns of both Q orthonormal, ‖B A‖ = ‖Rb Raᵀ‖, whose matrices have the rank for
their sides. A difference of two products is one product of the factors beside each other. Gram matrices would give the
same, but squared: of two adapters that agree to eight digits they would leave nothing (Golub and Van Loan, Matrix
Computations, 4th edition, section 5.3, on normal equations against QR).
"""

from __future__ import annotations

import attrs
import numpy as np
from numpy.typing import NDArray

from mens_core.artifacts.lora import LoraPair

__all__ = ["Distance", "distance", "update_norm"]


@attrs.frozen(kw_only=True)
class Distance:
    """Two updates of one weight beside each other.

    Attributes:
        left: ‖s₁ B₁ A₁‖, 0 where there is none.
        right: ‖s₂ B₂ A₂‖, 0 where there is none.
        difference: ‖s₁ B₁ A₁ - s₂ B₂ A₂‖.
    """

    left: float
    right: float
    difference: float

    @property
    def relative(self) -> float:
        """The difference as a share of the larger norm, 0 to 2; 0 where both are zero."""
        larger = max(self.left, self.right)
        return self.difference / larger if larger else 0.0


def update_norm(pair: LoraPair) -> float:
    """‖s B A‖, the Frobenius norm, in float64."""
    return _norm_of_product(pair.scale * pair.b.astype(np.float64), pair.a.astype(np.float64))


def distance(left: LoraPair, right: LoraPair) -> Distance:
    """How far two updates are apart, in float64; exactly 0 for equal factors and scales."""
    equal = left.scale == right.scale and np.array_equal(left.a, right.a) and np.array_equal(left.b, right.b)
    b = np.concatenate([left.scale * left.b.astype(np.float64), -right.scale * right.b.astype(np.float64)], axis=1)
    a = np.concatenate([left.a, right.a]).astype(np.float64)
    return Distance(
        left=update_norm(left),
        right=update_norm(right),
        difference=0.0 if equal else _norm_of_product(b, a),
    )


def _norm_of_product(b: NDArray[np.float64], a: NDArray[np.float64]) -> float:
    """‖b a‖ of (out, R) and (R, in)."""
    left, right = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (b, a.T))
    return float(np.linalg.norm(left @ right.T))
