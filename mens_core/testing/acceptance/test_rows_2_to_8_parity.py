"""Rows 2 and 5 to 8: torch against JAX on the runbook's own numbers, and both against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

from mens_core.backend import Backend
from mens_core.exchange import IGNORE, NF4Spec
from mens_core.hf.layout import GRAPHS
from mens_core.random_model import Size, write_random_weights
from mens_core.testing import oracle, tiny
from mens_core.testing.acceptance.materials import ramp
from mens_core.testing.conformance.tolerances import LOGITS

NAMES = ("torch", "jax")
FRAMEWORKS = {"torch": "torch", "jax": "jax.numpy"}
# Width 16, two heads, one layer, a vocabulary of 24.
SMOKE = Size(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, inner=24, positions=8)

Record = Callable[[str, object], None]


def _part(name: str, module: str) -> Any:
    return importlib.import_module(f"mens_{name}.{module}")


def _array(name: str, values: Any) -> Any:
    return importlib.import_module(FRAMEWORKS[name]).asarray(np.array(values))


def _linear(name: str, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[Any]:
    """One biased linear layer of a backend, out of its decoder."""
    layer = _part(name, "lora").LoraLinear(_array(name, weight), _array(name, bias), 0, 1.0)
    return np.asarray(layer(_array(name, x)))


def _distance(left: Any, right: Any) -> float:
    return float(np.abs(np.asarray(left, np.float64) - right).max())


def _agree(found: Mapping[str, Any], expected: Any, tolerance: float, record: Record) -> None:
    """Torch with JAX, and both with float64."""
    distances = {"torch to jax": _distance(found["torch"], found["jax"])}
    distances |= {f"{name} to float64": _distance(found[name], expected) for name in NAMES}
    for what, distance in distances.items():
        record(what, distance)
    assert max(distances.values()) < tolerance


@pytest.mark.parametrize("family", GRAPHS)
def test_full_graph_smoke(backends: dict[str, Backend], tmp_path: Path, family: str, record_property: Record) -> None:
    write_random_weights(tmp_path, arch=family, size=SMOKE, vocab_size=24, like_trained=True)
    # All five tokens of the runbook's test in one row.
    ids = np.array([1, 2, 3, 4, 5], np.int32)
    row = attrs.evolve(tiny.batch_of(5), input_ids=ids, targets=np.full_like(ids, IGNORE))
    found = {}
    for name, backend in backends.items():
        session = backend.open(tiny.plan_for(backend, tmp_path), tiny.SHAPE)
        logits = backend.forward(session, row)
        assert logits.shape == (5, 24)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
        np.testing.assert_array_equal(backend.forward(session, row), logits)
        other = ids.copy()
        other[3] = 9
        later = backend.forward(session, attrs.evolve(row, input_ids=other))
        np.testing.assert_array_equal(later[:3], logits[:3])
        assert _distance(later[3:], logits[3:]) > LOGITS
        found[name] = logits
    _agree(found, oracle.Oracle.open(tmp_path, scale=2.0).logits({}, row), LOGITS, record_property)


def _product(backend: Backend, left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """The product of two matrices through a hook: merging into zero."""
    return backend.merge(np.zeros((left.shape[0], right.shape[1]), np.float32), right, left, 1.0)


def test_f32_matmul_parity(backends: dict[str, Backend], record_property: Record) -> None:
    (left,), (right,) = ramp(0.1, 0.03, (5, 7)), ramp(-0.2, 0.02, (7, 4))
    expected = left.astype(np.float64) @ right
    found = {name: _product(backend, left, right) for name, backend in backends.items()}
    _agree(found, expected, 1e-5, record_property)
    # A product of numbers rounded to ten bits, as TF32 rounds them, would not pass.
    short = (left.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    assert _distance(_product(backends["torch"], short, right), expected) > 1e-5


def test_f32_linear_lm_logits_parity(record_property: Record) -> None:
    x, weight, bias = ramp(0.11, 0.037, (5, 8), (8, 13), (13,))
    weight = np.ascontiguousarray(weight.T)  # the runbook's is (in, out)
    expected = oracle.linear(x.astype(np.float64), weight, bias, None, None, 1.0)
    assert 48 < expected.max() < 50  # else the tolerance, two roundings of the largest, would mean something else
    _agree({name: _linear(name, x, weight, bias) for name in NAMES}, expected, 1e-5, record_property)
    for mistake in ((x, weight, 0 * bias), (x, weight.reshape(8, 13).T, bias), (x, weight, bias[::-1])):
        for name in NAMES:
            assert _distance(_linear(name, *mistake), expected) > 1e-5


def test_cross_entropy_parity(record_property: Record) -> None:
    (logits,), targets = ramp(0.05, 0.071, (4, 11)), np.array([0, 5, 2, 9])
    head = np.eye(11, dtype=np.float32)  # the head that hands its input on

    def mean(name: str, scores: Any, chosen: Any) -> float:
        return float(_part(name, "loss").supervised_loss(*(_array(name, a) for a in (scores, head, chosen)))) / 4

    torch = importlib.import_module("torch")
    scores = torch.tensor(logits).double()
    expected = float(torch.nn.functional.cross_entropy(scores, torch.tensor(targets)))
    assert oracle.cross_entropy(logits.astype(np.float64), targets) / 4 == pytest.approx(expected, rel=1e-14)
    _agree({name: mean(name, logits, targets) for name in NAMES}, expected, 5e-5, record_property)
    for name in NAMES:
        assert abs(mean(name, logits, targets + 1) - expected) > 5e-5
        assert abs(mean(name, logits[:, ::-1], targets) - expected) > 5e-5


def test_nf4_dequant_lm_reference_parity(backends: dict[str, Backend], record_property: Record) -> None:
    x, weight, bias = ramp(0.11, 0.037, (5, 8), (13, 8), (13,))
    block = NF4Spec(block_size=8, double_quant=False)
    expected = oracle.dequantize(oracle.quantize(weight, block))
    stored = {name: backend.quantize(weight, block) for name, backend in backends.items()}
    assert stored["torch"].codes.tobytes() == stored["jax"].codes.tobytes()
    assert stored["torch"].absmax.tobytes() == stored["jax"].absmax.tobytes()
    back = {name: backend.dequantize(stored[name]) for name, backend in backends.items()}
    for name in NAMES:
        np.testing.assert_array_equal(back[name], expected)
    # Half the widest gap of the codebook, of each row's largest weight.
    assert (np.abs(expected - weight) <= 0.1520 * np.abs(weight).max(axis=1, keepdims=True)).all()
    reference = oracle.linear(x.astype(np.float64), expected, bias, None, None, 1.0)
    _agree({name: _linear(name, x, back[name], bias) for name in NAMES}, reference, 1e-5, record_property)
    # One neighbouring code shows.
    codes = stored["torch"].codes.copy()
    codes[0] -= 0x10
    wrong = backends["torch"].dequantize(attrs.evolve(stored["torch"], codes=codes))
    assert _distance(_linear("torch", x, wrong, bias), reference) > 1e-5
