"""The specification in NumPy is transformers, PEFT, torch and bitsandbytes, in float64 where they have it."""

import attrs
import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mens_core.errors import ModelError
from mens_core.exchange import IGNORE, NF4Spec
from mens_core.hf.keymap import linear_shapes
from mens_core.testing import oracle
from mens_core.testing.oracle.nf4 import CODEBOOKS, dynamic_map

SPECS = st.builds(
    NF4Spec,
    block_size=st.sampled_from([32, 64, 1024]),
    double_quant=st.booleans(),
    codebook=st.sampled_from(["nf4", "fp4"]),
)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 70))


@pytest.fixture
def batch():
    return tiny.batch_of(9, 5, 12, 5)


def _adapter(layout, rank=4):
    shapes = {}
    for path, (out, into) in linear_shapes(layout).items():
        shapes |= {f"{path}.lora_A.weight": np.empty((rank, into)), f"{path}.lora_B.weight": np.empty((out, rank))}
    return tiny.random_adapter(shapes)


def _double(folder):
    return references.open_model(folder).double()


def _tolerance(family):
    # transformers keeps the angles of rotary positions in float32 in a model of any format; GPT-2 has none.
    return tolerances.ORACLE if family == "gpt2" else tolerances.ORACLE_ROTARY


def test_its_logits_are_those_of_transformers_in_float64(folders, family, batch):
    with torch.no_grad():
        expected = references.logits_of(_double(folders[family]), batch).numpy()
    found = oracle.Oracle.open(folders[family], scale=2.0).logits({}, batch)
    assert found.dtype == np.float64
    assert np.abs(found - expected).max() <= _tolerance(family)


def test_its_adapter_is_pefts(folders, family, batch):
    specification = oracle.Oracle.open(folders[family], scale=2.0)
    adapter = _adapter(specification.layout)
    model, _ = references.with_adapter(_double(folders[family]), adapter, rank=4, alpha=8.0)
    with torch.no_grad():
        expected = references.logits_of(model, batch).numpy()
    assert np.abs(specification.logits(adapter, batch) - expected).max() <= _tolerance(family)
    other = attrs.evolve(specification, scale=2.0 * (1 + 1e-5))
    assert np.abs(other.logits(adapter, batch) - expected).max() > _tolerance(family)


def test_its_derivatives_are_the_gradients_of_peft(folders, family, batch):
    specification = oracle.Oracle.open(folders[family], scale=2.0)
    adapter = _adapter(specification.layout)
    model, parameters = references.with_adapter(_double(folders[family]), adapter, rank=4, alpha=8.0)
    references.loss_sum(model, batch).backward()
    generator = np.random.default_rng(3)
    for name, array in adapter.items():
        gradient, direction = parameters[name].grad.double().numpy(), generator.standard_normal(array.shape)
        found = oracle.directional_derivative(lambda at: specification.loss(at, batch), adapter, {name: direction})
        error = abs(found - (gradient * direction).sum()) / np.linalg.norm(gradient)
        assert error <= _tolerance(family)


def test_the_full_gradient_is_made_of_directional_ones_and_agrees_with_differences():
    generator = np.random.default_rng(0)
    x, weight, targets = generator.standard_normal((6, 4)), generator.standard_normal((5, 4)), np.arange(6) % 5
    point = {"a": generator.standard_normal((2, 4)), "b": generator.standard_normal((5, 2))}

    def loss(at):
        return oracle.cross_entropy(oracle.linear(x, weight, None, at["a"], at["b"], 0.5), targets)

    gradient = oracle.full_gradient(loss, point)
    for name, array in point.items():
        direction = generator.standard_normal(array.shape)
        along = (gradient[name] * direction).sum()
        assert oracle.directional_derivative(loss, point, {name: direction}) == pytest.approx(along, rel=1e-13)
        # central differences lose half the digits
        steps = [loss(point | {name: array + sign * 1e-6 * direction}) for sign in (1, -1)]
        assert (steps[0] - steps[1]) / 2e-6 == pytest.approx(along, rel=1e-7)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_its_activations_and_their_slopes_are_transformers(activation):
    from transformers.activations import ACT2FN

    from mens_core.testing.oracle.layers import ACTIVATIONS

    x = torch.linspace(-9, 9, 200, dtype=torch.float64, requires_grad=True)
    expected = ACT2FN[activation](x)
    expected.sum().backward()
    stepped = ACTIVATIONS[activation](x.detach().numpy() + 1e-20j)
    np.testing.assert_allclose(stepped.real, expected.detach().numpy(), atol=1e-14)
    np.testing.assert_allclose(stepped.imag * 1e20, x.grad.numpy(), atol=1e-14)


@given(seed=st.integers(0, 1000), size=st.sampled_from([1.0, 1e3]))
def test_its_loss_is_torchs_cross_entropy(seed, size):
    generator = np.random.default_rng(seed)
    logits = size * generator.standard_normal((7, 11))
    targets = np.where(generator.random(7) < 0.5, generator.integers(0, 11, 7), IGNORE)
    expected = functional.cross_entropy(
        torch.tensor(logits), torch.tensor(targets), ignore_index=IGNORE, reduction="sum"
    )
    assert oracle.cross_entropy(logits, targets) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_its_update_is_torchs_adamw_after_torchs_clipping(max_norm):
    generator = np.random.default_rng(1)
    start = {"a": generator.standard_normal((3, 4)), "b": generator.standard_normal((5, 3))}
    parameters = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    moments = oracle.Moments({n: 0 * a for n, a in start.items()}, {n: 0 * a for n, a in start.items()}, 0)
    ours = start
    for _ in range(3):
        gradient = {name: generator.standard_normal(array.shape) for name, array in start.items()}
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
        optimizer.step()
        ours, moments = oracle.adamw(
            ours, oracle.clipped(gradient, max_norm), moments, learning_rate=1e-2, weight_decay=0.1
        )
    for name, parameter in parameters.items():
        # torch adds 1e-6 to the norm it divides by
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), atol=1e-8)


@given(shape=SHAPES, spec=SPECS, seed=st.integers(0, 1000), size=st.sampled_from([0, 0.02, 1e9]))
def test_its_four_bits_are_bitsandbytes_byte_for_byte(shape, spec, seed, size):
    weight = (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
    codes, state = bitsandbytes.quantize_4bit(
        torch.tensor(weight),
        blocksize=spec.block_size,
        compress_statistics=spec.double_quant,
        quant_type=spec.codebook,
    )
    found = oracle.quantize(weight, spec, offset=float(state.offset) if spec.double_quant else None)
    np.testing.assert_array_equal(found.codes, codes.flatten().numpy())
    np.testing.assert_array_equal(found.absmax, state.absmax.numpy())
    if spec.double_quant:
        np.testing.assert_array_equal(found.nested_absmax, state.state2.absmax.numpy())
        exact = oracle.quantize(weight, spec).offset
        assert exact == pytest.approx(found.offset, rel=tolerances.MEAN)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_its_codebooks_are_bitsandbytes(name):
    expected = bitsandbytes.get_4bit_type(name, device="cpu").numpy()
    assert CODEBOOKS[name].tobytes() == expected.tobytes()  # two zeros, neither with a sign


@pytest.mark.parametrize("double_quant", [True, False])
def test_it_reads_back_the_codebooks_value_times_the_blocks_absmax(double_quant):
    weight = np.random.default_rng(0).standard_normal((13, 33)).astype(np.float32)
    found = oracle.quantize(weight, NF4Spec(double_quant=double_quant))
    absmax = found.absmax
    if double_quant:
        absmax = dynamic_map()[found.absmax] * found.nested_absmax[0] + np.float32(found.offset)
    nibbles = np.stack([found.codes >> 4, found.codes & 15], axis=1).reshape(-1)[: weight.size]
    expected = CODEBOOKS["nf4"][nibbles] * absmax[np.arange(weight.size) // 64]
    np.testing.assert_array_equal(oracle.dequantize(found).reshape(-1), expected)


def test_its_map_of_scales_is_bitsandbytes():
    np.testing.assert_array_equal(dynamic_map(), bitsandbytes.create_dynamic_map().numpy())


def test_a_family_without_a_graph_is_refused_by_name(tmp_path, folders):
    config = (folders["llama"] / "config.json").read_text(encoding="utf-8").replace('"llama"', '"mistral"')
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ModelError, match="mistral"):
        oracle.Oracle.open(tmp_path, scale=1.0)
