"""NF4: byte for byte what bitsandbytes stores, and what it reads back."""

import platform

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

from mens_core import nf4
from mens_core.errors import ContractError, ModelError
from mens_core.exchange import NF4Spec

SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SPECS = st.builds(
    NF4Spec,
    block_size=st.sampled_from(SIZES),
    double_quant=st.booleans(),
    codebook=st.sampled_from(["nf4", "fp4"]),
)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 70))


def _expected(weight, spec):
    """Codes and state of bitsandbytes."""
    codes, state = reference.quantize_4bit(
        torch.tensor(weight),
        blocksize=spec.block_size,
        compress_statistics=spec.double_quant,
        quant_type=spec.codebook,
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
    codebook = reference.get_4bit_type(stored.spec.codebook, device="cpu").numpy()
    return (codebook[nibbles] * absmax[np.arange(size) // stored.spec.block_size]).reshape(stored.shape)


def _check_bytes(found, weight, spec):
    codes, state = _expected(weight, spec)
    np.testing.assert_array_equal(found.codes, codes)
    assert (found.shape, found.spec) == (weight.shape, spec)
    if not spec.double_quant:
        np.testing.assert_array_equal(found.absmax, state.absmax.numpy())
        assert (found.nested_absmax, found.offset) == (None, 0.0)
    elif platform.machine() in {"x86_64", "AMD64"}:
        assert found.offset == float(state.offset)
        np.testing.assert_array_equal(found.absmax, state.absmax.numpy())
        np.testing.assert_array_equal(found.nested_absmax, state.state2.absmax.numpy())
    else:
        # The offset is a mean, which torch sums in another order on other processors; what follows from it is then
        # the same up to that rounding, and a scale halfway between two steps may take the other one.
        slack = tolerances.MEAN * float(state.offset)
        assert found.offset == pytest.approx(float(state.offset), abs=slack)
        np.testing.assert_allclose(found.nested_absmax, state.state2.absmax.numpy(), rtol=0, atol=2 * slack)
        assert np.abs(found.absmax.astype(int) - state.absmax.numpy().astype(int)).max() <= 1


def _check(backend, weight, spec):
    found = backend.quantize(weight, spec)
    _check_bytes(found, weight, spec)
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


@given(
    weight=arrays.arrays(
        np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
    ),
    spec=SPECS,
)
def test_subnormal_and_huge_weights_are_stored_in_bitsandbytes_bytes(backend, weight, spec):
    # Without double quantization: the mean of huge scales is infinite, and bitsandbytes' indices are then undefined.
    spec = attrs.evolve(spec, double_quant=False)
    _check_bytes(backend.quantize(weight, spec), weight, spec)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2048, 1536), (1733, 2001)])
def test_large_weights_are_stored_alike_by_any_number_of_threads(shape, threads):
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    _check_bytes(nf4.quantize(weight, tiny.nf4_spec(), threads), weight, tiny.nf4_spec())


def test_where_no_folder_can_be_written_the_loop_is_compiled_without_one(monkeypatch):
    import numba

    asked, compile_ = [], numba.njit

    def refuse(*functions, **options):
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("no locator available")
        return compile_(*functions, **options)

    monkeypatch.setattr(numba, "njit", refuse)
    monkeypatch.setattr(nf4, "compiled", nf4.compiled.__wrapped__)
    weight = np.random.default_rng(0).standard_normal((3, 70), np.float32)
    _check_bytes(nf4.quantize(weight, tiny.nf4_spec(), 1), weight, tiny.nf4_spec())
    assert [options.get("cache") for options in asked][:2] == [True, None]


@given(count=st.integers(1, 3_000_000), seed=st.integers(0, 1000))
def test_the_mean_of_the_scales_is_torch_s_own_on_one_thread(count, seed):
    from mens_core.nf4_scales import _sum

    values = np.random.default_rng(seed).random(count, np.float32)
    assert float(_sum(values)) == pytest.approx(float(torch.tensor(values).sum()), rel=tolerances.MEAN)
    if platform.machine() in {"x86_64", "AMD64"}:
        assert float(_sum(values)) == float(torch.tensor(values).sum())


def test_weights_in_sixteen_bits_are_stored_from_their_float32_values(part, array):
    exact = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float16).astype(np.float32)
    rounded = np.asarray(torch.tensor(exact).bfloat16().float())
    quant = part("quant")
    for values, name in ((exact, "float16"), (rounded, "bfloat16")):
        weight = array(values)
        held = weight.astype(name) if hasattr(weight, "astype") else weight.to(getattr(torch, name))
        stored = quant.export_weight(quant.quantize(held, tiny.nf4_spec()))
        _check_bytes(stored, values, tiny.nf4_spec())


def test_a_spec_that_nothing_can_be_stored_by_is_refused():
    for fields in ({"block_size": 0}, {"block_size": 33}, {"codebook": "nf5"}):
        with pytest.raises(ContractError, match=str(next(iter(fields.values())))):
            NF4Spec(**fields)


# Mean and spread of the error on N(0, 1), absolute and relative, over 200 draws of a million numbers (bitsandbytes,
# tests/test_functional.py, TestQuantize4BitFunctional.test_4bit_quant, which accepts the mean and seven spreads).
_ERRORS = {
    ("nf4", 64): ((0.072798, 0.000074), (0.203339, 0.000340)),
    ("nf4", 4096): ((0.092547, 0.000360), (0.262473, 0.000999)),
    ("fp4", 64): ((0.096543, 0.000111), (0.260125, 0.000379)),
    ("fp4", 4096): ((0.129536, 0.000612), (0.337169, 0.001239)),
}


def _errors(backend, weight, spec):
    error = np.abs(weight - backend.dequantize(backend.quantize(weight, spec)))
    return error.mean(dtype=np.float64), (error / (np.abs(weight) + 1e-8)).mean(dtype=np.float64)


@pytest.mark.parametrize(("codebook", "block_size"), _ERRORS)
def test_the_error_on_normal_weights_is_the_one_bitsandbytes_publishes(backend, codebook, block_size):
    weight = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    spec = NF4Spec(block_size=block_size, double_quant=False, codebook=codebook)
    for found, (mean, spread) in zip(_errors(backend, weight, spec), _ERRORS[codebook, block_size], strict=True):
        assert abs(found - mean) <= 7 * spread
    # The twin: blocks four times as large are outside of it.
    wider = attrs.evolve(spec, block_size=4 * block_size)
    mean, spread = _ERRORS[codebook, block_size][0]
    assert abs(_errors(backend, weight, wider)[0] - mean) > 7 * spread


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
