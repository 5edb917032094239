"""NF4: byte for byte what bitsandbytes stores, and what it reads back."""

import attrs
import bitsandbytes.functional as reference
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mens_core.errors import ModelError
from mens_core.exchange import NF4Spec

SPECS = st.builds(NF4Spec, block_size=st.sampled_from([32, 64, 128, 1024, 2048, 4096]), double_quant=st.booleans())
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 70))


def _expected(weight, spec):
    """Codes and state of bitsandbytes."""
    codes, state = reference.quantize_4bit(
        torch.tensor(weight),
        blocksize=spec.block_size,
        compress_statistics=spec.double_quant,
        quant_type="nf4",
    )
    return codes.flatten().numpy(), state


def _read_back(stored):
    """The definition, in NumPy: codebook value times absmax, itself a map's value times its absmax plus the offset."""
    absmax = stored.absmax
    if stored.spec.double_quant:
        scales = stored.nested_absmax[np.arange(len(absmax)) // 256]
        absmax = reference.create_dynamic_map().numpy()[absmax] * scales + np.float32(stored.offset)
    size = int(np.prod(stored.shape))
    nibbles = np.stack([stored.codes >> 4, stored.codes & 15], axis=1).reshape(-1)[:size]
    codebook = reference.get_4bit_type("nf4", device="cpu").numpy()
    return (codebook[nibbles] * absmax[np.arange(size) // stored.spec.block_size]).reshape(stored.shape)


def _check(backend, weight, spec):
    found = backend.quantize(weight, spec)
    codes, state = _expected(weight, spec)
    np.testing.assert_array_equal(found.codes, codes)
    assert (found.shape, found.spec) == (weight.shape, spec)
    if not spec.double_quant:
        np.testing.assert_array_equal(found.absmax, state.absmax.numpy())
        assert (found.nested_absmax, found.offset) == (None, 0.0)
    elif found.offset == float(state.offset):
        np.testing.assert_array_equal(found.absmax, state.absmax.numpy())
        np.testing.assert_array_equal(found.nested_absmax, state.state2.absmax.numpy())
    else:
        # The offset is a mean, which torch sums in an order that depends on the processor; what follows from it is
        # then the same up to that rounding, and a scale halfway between two steps may take the other one.
        slack = tolerances.MEAN * float(state.offset)
        assert found.offset == pytest.approx(float(state.offset), abs=slack)
        np.testing.assert_allclose(found.nested_absmax, state.state2.absmax.numpy(), rtol=0, atol=2 * slack)
        assert np.abs(found.absmax.astype(int) - state.absmax.numpy().astype(int)).max() <= 1
    np.testing.assert_array_equal(backend.dequantize(found), _read_back(found))


@given(shape=SHAPES, spec=SPECS, seed=st.integers(0, 1000), size=st.sampled_from([1e-30, 0.02, 1.0, 1e30]))
def test_normal_weights_are_stored_as_bitsandbytes_stores_them(backend, shape, spec, seed, size):
    weight = (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
    _check(backend, weight, spec)


@given(
    weight=arrays.arrays(
        np.float32, SHAPES, elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False) | st.sampled_from([0, 1, -1])
    ),
    spec=SPECS,
)
def test_any_finite_weight_is_stored_as_bitsandbytes_stores_it(backend, weight, spec):
    _check(backend, weight, spec)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 64), (4, 64), (7, 33), (5, 50)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_zeros_stay_zeros(backend, shape, double_quant):
    weight = np.zeros(shape, np.float32)
    spec = NF4Spec(block_size=64, double_quant=double_quant)
    _check(backend, weight, spec)
    np.testing.assert_array_equal(backend.dequantize(backend.quantize(weight, spec)), weight)


def test_halfway_values_go_where_bitsandbytes_puts_them(backend):
    codebook = reference.get_4bit_type("nf4", device="cpu").numpy()
    middles = (codebook[1:] + codebook[:-1]) / 2
    around = np.concatenate([middles, np.nextafter(middles, 2), np.nextafter(middles, -2), codebook, [-1]])
    weight = around.astype(np.float32).reshape(1, -1)[:, :62]
    weight = np.concatenate([weight, [[1.0, -1.0]]], axis=1).astype(np.float32)
    _check(backend, weight, NF4Spec(block_size=64, double_quant=False))


def test_one_other_byte_is_another_weight(backend):
    weight = np.random.default_rng(0).standard_normal((8, 48)).astype(np.float32)
    found = backend.quantize(weight, NF4Spec())
    codes = found.codes.copy()
    codes[17] ^= 0x10
    differs = backend.dequantize(attrs.evolve(found, codes=codes)) != backend.dequantize(found)
    assert np.flatnonzero(differs).tolist() == [34]


@given(shape=SHAPES, block_size=st.sampled_from([32, 64, 4096]), seed=st.integers(0, 1000))
def test_the_error_is_within_half_the_widest_step(backend, shape, block_size, seed):
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    back = backend.dequantize(backend.quantize(weight, NF4Spec(block_size=block_size, double_quant=False)))
    blocks = np.arange(weight.size) // block_size
    absmax = np.array([np.abs(weight.reshape(-1)[blocks == block]).max() for block in range(blocks[-1] + 1)])
    codebook = reference.get_4bit_type("nf4", device="cpu").numpy()
    # half the widest gap of the codebook, with room for the roundings of the division and the product
    bound = (np.diff(codebook).max() / 2 + 1e-6) * absmax[blocks]
    assert (np.abs(weight - back).reshape(-1) <= bound).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(backend, bad):
    weight = np.ones((4, 64), np.float32)
    weight[2, 3] = bad
    with pytest.raises(ModelError, match="not finite"):
        backend.quantize(weight, NF4Spec())


@pytest.mark.parametrize("double_quant", [True, False])
def test_storage_per_weight_is_what_the_paper_says(backend, double_quant):
    found = backend.quantize(np.ones((256, 1024), np.float32), NF4Spec(block_size=64, double_quant=double_quant))
    arrays_ = [found.codes, found.absmax, *([found.nested_absmax] if double_quant else [])]
    bits = 8 * sum(array.nbytes for array in arrays_) / (256 * 1024)
    # Dettmers et al. 2023, section 3: 4 + 32/64, or 4 + 8/64 + 32/(64 * 256)
    assert bits == pytest.approx(4.127 if double_quant else 4.5, abs=5e-4)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "c_attn")])
def test_every_linear_layer_of_the_base_is_quantised_targeted_or_not(backend, session_of, folders, family, targets):
    batch = tiny.batch_of(9, 5, 12)
    spec = tiny.nf4_spec()
    model = references.with_weights(
        references.open_model(folders[family]), lambda _, weight: backend.dequantize(backend.quantize(weight, spec))
    )
    with torch.no_grad():
        expected = references.logits_of(model, batch).numpy()
        unquantised = references.logits_of(references.open_model(folders[family]), batch).numpy()
    known = targets if targets == ("all-linear",) else (targets[family == "gpt2"],)
    found = backend.forward(session_of(family, method="qlora", targets=known), batch)
    assert np.abs(found - expected).max() <= tolerances.LOGITS
    assert np.abs(found - unquantised).max() > tolerances.LOGITS
