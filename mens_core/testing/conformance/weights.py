"""``mens_quantize``, ``mens_dequantize`` and ``mens_merge``: hooks that need no session."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec
from mens_core.testing.conformance import tolerances
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.reference import dequantize, merged, quantize
from mens_core.testing.conformance.workbench import Workbench, untouched

__all__ = [
    "test_a_merge_is_that_of_the_specification",
    "test_a_merge_of_what_does_not_fit_is_refused",
    "test_a_weight_that_is_not_finite_is_not_quantised",
    "test_nf4_comes_back_as_the_specification_says",
    "test_nf4_is_byte_for_byte_that_of_the_specification",
]

_SHAPES = ((8, 64), (51, 48), (7, 9), (300, 64))  # whole blocks, a short one, an odd number, two nested blocks


def _weight(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("spec", [NF4Spec(), NF4Spec(double_quant=False)], ids=["nested", "plain"])
def test_nf4_is_byte_for_byte_that_of_the_specification(
    workbench: Workbench, shape: tuple[int, int], spec: NF4Spec
) -> None:
    workbench.needs("qlora")
    weight = _weight(*shape)
    with untouched(weight) as unchanged:
        found = workbench.backend.quantize(weight, spec)
    expected = quantize(weight, spec, found.offset if spec.double_quant else None)
    for part in ("codes", "absmax", "nested_absmax"):
        one, other = getattr(found, part), getattr(expected, part)
        same = one is other if other is None else one is not None and np.array_equal(one, other)
        promise(same, "mens_quantize", "byte for byte", f"{part} of a weight {shape} are not the specification's")
    mean = quantize(weight, spec, None).offset
    close = abs(found.offset - mean) <= tolerances.NF4 * abs(mean)
    promise(close, "mens_quantize", "byte for byte", f"offset {found.offset}, the mean of the scales is {mean}")
    promise(unchanged[0], "mens_quantize", "Store a weight", "the weight it was given was changed")


@pytest.mark.parametrize("shape", _SHAPES)
def test_nf4_comes_back_as_the_specification_says(workbench: Workbench, shape: tuple[int, int]) -> None:
    workbench.needs("qlora")
    quantized = quantize(_weight(*shape), NF4Spec(), None)
    found, expected = workbench.backend.dequantize(quantized), dequantize(quantized)
    far = float(np.abs(found - expected).max() / np.abs(expected).max())
    promise(far <= tolerances.NF4, "mens_dequantize", "codebook value times the block's absmax", f"{far:.3g} off")


def test_a_weight_that_is_not_finite_is_not_quantised(workbench: Workbench) -> None:
    workbench.needs("qlora")
    weight = _weight(8, 64)
    weight[3, 5] = np.nan
    try:
        workbench.backend.quantize(weight, NF4Spec())
    except ModelError:
        return
    promise(kept=False, hook="mens_quantize", phrase="if a value is not finite", broken="a NaN was quantised")


def test_a_merge_is_that_of_the_specification(workbench: Workbench) -> None:
    workbench.needs("merge")
    weight, lora_a, lora_b = _weight(33, 20), _weight(4, 20), _weight(33, 4)
    with untouched(weight, lora_a, lora_b) as unchanged:
        found = workbench.backend.merge(weight, lora_a, lora_b, 0.5)
    expected = merged(weight, lora_a, lora_b, 0.5)
    far = float(np.abs(found - expected).max() / np.abs(expected).max())
    promise(far <= tolerances.MERGE, "mens_merge", "W + scale", f"it is {far:.3g} of the largest entry off")
    promise(unchanged[0], "mens_merge", "the arguments are not changed", "an argument was changed")
    own = not any(np.shares_memory(found, array) for array in (weight, lora_a, lora_b))
    promise(own, "mens_merge", "the arguments are not changed", "the answer is one of the arguments' memory")


@pytest.mark.parametrize(
    "shapes",
    [
        ((6, 4), (2, 1), (6, 2)),
        ((6, 4), (2, 4), (1, 2)),
        ((1, 4), (2, 4), (6, 2)),
        ((6, 4), (3, 4), (6, 2)),
        ((4,), (2, 4), (6, 2)),
    ],
    ids=["one column of A", "one row of B", "one row of W", "another rank", "a vector"],
)
def test_a_merge_of_what_does_not_fit_is_refused(workbench: Workbench, shapes: tuple[tuple[int, ...], ...]) -> None:
    workbench.needs("merge")
    weight, lora_a, lora_b = (_weight(*shape) for shape in shapes)
    try:
        workbench.backend.merge(weight, lora_a, lora_b, 1.0)
    except ModelError:
        return
    promise(kept=False, hook="mens_merge", phrase="nothing is broadcast", broken=f"shapes {shapes} were merged")
