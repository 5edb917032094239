"""The runbook's parity rows: torch against JAX on the runbook's own numbers, and both against float64.

Data are ramps in row-major order, made by adding the step again and again in float32, as the runbook's tests make them:
that differs from ``start + step * place`` in the last digits.
"""

import importlib

import attrs
import numpy as np
import pytest
import tiny
import tolerances
import torch
from torch.nn import functional

from mens_core.exchange import IGNORE, NF4Spec
from mens_core.plugins import load_backend
from mens_core.testing import oracle

NAMES = ("torch", "jax")
FRAMEWORKS = {"torch": "torch", "jax": "jax.numpy"}
SMOKE = {
    "gpt2": {"vocab_size": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "llama": {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 8},
}
SMOKE |= {"qwen2": SMOKE["llama"], "qwen3": SMOKE["llama"] | {"head_dim": 8}}


@pytest.fixture(scope="module")
def backends():
    return {name: load_backend(name) for name in NAMES}


@pytest.fixture(scope="module")
def row():
    """All five tokens of the runbook's smoke test in one row."""
    ids = np.array([1, 2, 3, 4, 5], np.int32)
    return attrs.evolve(tiny.batch_of(5), input_ids=ids, targets=np.full_like(ids, IGNORE))


def _ramp(start, step, *shapes):
    """Arrays that continue one ramp."""
    value, numbers = np.float32(start), []
    for _ in range(sum(int(np.prod(shape)) for shape in shapes)):
        numbers.append(value)
        value = np.float32(value + np.float32(step))
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = np.split(np.array(numbers, np.float32), cuts)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _part(name, module):
    return importlib.import_module(f"mens_{name}.{module}")


def _array(name, values):
    return importlib.import_module(FRAMEWORKS[name]).asarray(np.array(values))


def _linear(name, x, weight, bias):
    """One biased linear layer of a backend, out of its decoder."""
    layer = _part(name, "lora").LoraLinear(_array(name, weight), _array(name, bias), 0, 1.0)
    return np.asarray(layer(_array(name, x)))


def _distance(left, right):
    return np.abs(np.asarray(left, np.float64) - right).max()


def _agree(found, expected, tolerance):
    """Torch with JAX, and both with float64."""
    assert _distance(found["torch"], found["jax"]) < tolerance
    for name in NAMES:
        assert _distance(found[name], expected) < tolerance


@pytest.fixture(scope="module")
def smoke_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("smoke")
    for family, config in SMOKE.items():
        tiny.write_model(root / family, family, config)
    return root


@pytest.mark.parametrize("smoke_family", SMOKE)
def test_full_graph_smoke(backends, smoke_folders, row, smoke_family):
    folder, found = smoke_folders / smoke_family, {}
    for name, backend in backends.items():
        session = backend.open(tiny.plan_for(backend, folder), tiny.SHAPE)
        logits = backend.forward(session, row)
        assert logits.shape == (5, 24)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
        np.testing.assert_array_equal(backend.forward(session, row), logits)
        other = row.input_ids.copy()
        other[3] = 9
        later = backend.forward(session, attrs.evolve(row, input_ids=other))
        np.testing.assert_array_equal(later[:3], logits[:3])
        assert _distance(later[3:], logits[3:]) > tolerances.LOGITS
        found[name] = logits
    _agree(found, oracle.Oracle.open(folder, scale=2.0).logits({}, row), tolerances.LOGITS)


def _product(backend, left, right):
    """The product of two matrices through a hook: merging into zero."""
    return backend.merge(np.zeros((left.shape[0], right.shape[1]), np.float32), right, left, 1.0)


def test_f32_matmul_parity(backends):
    (left,), (right,) = _ramp(0.1, 0.03, (5, 7)), _ramp(-0.2, 0.02, (7, 4))
    expected = left.astype(np.float64) @ right
    _agree({name: _product(backend, left, right) for name, backend in backends.items()}, expected, 1e-5)
    # A product of numbers rounded to ten bits, as TF32 rounds them, would not pass.
    short = (left.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    assert _distance(_product(backends["torch"], short, right), expected) > 1e-5


def test_f32_linear_lm_logits_parity():
    x, weight, bias = _ramp(0.11, 0.037, (5, 8), (8, 13), (13,))
    weight = np.ascontiguousarray(weight.T)  # the runbook's is (in, out)
    expected = oracle.linear(x.astype(np.float64), weight, bias, None, None, 1.0)
    assert 48 < expected.max() < 50  # else the tolerance, two roundings of the largest, would mean something else
    _agree({name: _linear(name, x, weight, bias) for name in NAMES}, expected, 1e-5)
    for mistake in ((x, weight, 0 * bias), (x, weight.reshape(8, 13).T, bias), (x, weight, bias[::-1])):
        for name in NAMES:
            assert _distance(_linear(name, *mistake), expected) > 1e-5


def test_cross_entropy_parity():
    (logits,), targets = _ramp(0.05, 0.071, (4, 11)), np.array([0, 5, 2, 9])
    head = np.eye(11, dtype=np.float32)  # the head that hands its input on

    def mean(name, scores, chosen):
        return float(_part(name, "loss").supervised_loss(*(_array(name, a) for a in (scores, head, chosen)))) / 4

    expected = float(functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(targets)))
    assert oracle.cross_entropy(logits.astype(np.float64), targets) / 4 == pytest.approx(expected, rel=1e-14)
    _agree({name: mean(name, logits, targets) for name in NAMES}, expected, 5e-5)
    for name in NAMES:
        assert abs(mean(name, logits, targets + 1) - expected) > 5e-5
        assert abs(mean(name, logits[:, ::-1], targets) - expected) > 5e-5


def test_nf4_dequant_lm_reference_parity(backends):
    x, weight, bias = _ramp(0.11, 0.037, (5, 8), (13, 8), (13,))
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
    _agree({name: _linear(name, x, back[name], bias) for name in NAMES}, reference, 1e-5)
    # One neighbouring code shows.
    codes = stored["torch"].codes.copy()
    codes[0] -= 0x10
    wrong = backends["torch"].dequantize(attrs.evolve(stored["torch"], codes=codes))
    assert _distance(_linear("torch", x, wrong, bias), reference) > 1e-5
