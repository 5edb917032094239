"""torch's products of one row: within float32's rounding of the exact ones, and an answer's tokens stay the same."""

import attrs
import pytest
import tiny
import torch
from mens_torch import _one_row, _products
from mens_torch._one_row import is_one_row, row_product
from mens_torch.quant import quantize
from torch import nn
from torch.nn import functional

from mens_core import compiled
from mens_core.exchange import GenerateSettings, NF4Spec, TrainingState
from mens_core.plugins import load_backend


def _drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _near(found, x, weight, bias):
    """Within what sums of float32 may lose: k · 2⁻²⁴ of the sum of the absolute values (Higham 2002, section 3.1).

    In bfloat16 what they come to is rounded to 2⁻⁸.
    """
    assert found.dtype == x.dtype
    rounding = 0.0 if found.dtype == torch.float32 else 2**-8
    x, weight, bias = x.double(), weight.double(), bias.double()
    exact = x @ weight.t() + bias
    lost = (x.shape[-1] + 2) * 2**-24 * (x.abs() @ weight.abs().t() + bias.abs())
    return bool(((found.double() - exact).abs() <= lost + rounding * (exact.abs() + lost)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (21, 34), (64, 32), (130, 67)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_one_row_is_exact_to_the_sums_of_float32(monkeypatch, size, threads, transposed, dtype):
    monkeypatch.setattr(compiled, "_SHARE", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    out, into = size
    weight = _drawn(into, out, seed=1).to(dtype).t() if transposed else _drawn(out, into, seed=1).to(dtype)
    x, bias = _drawn(1, 1, into).to(dtype), _drawn(out, seed=2).to(dtype)
    found = row_product(x, weight, bias)
    assert found.shape == (1, 1, out)
    assert _near(found, x, weight, bias)
    assert _near(row_product(x, weight, None), x, weight, torch.zeros(out))
    coarser = 2**-8 if dtype == torch.float32 else 2**-4
    assert not _near(row_product(x * (1 + coarser), weight, bias), x, weight, bias), "the twin: rounded to fewer bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_so(dtype):
    weight = _drawn(8, 16).to(dtype)
    weight[1, 3], weight[6, 0] = float("inf"), float("nan")
    for held in (weight, weight.t().contiguous().t()):
        found = row_product(torch.ones(1, 16, dtype=dtype), held, None)[0]
        assert found[1] == float("inf")
        assert torch.isnan(found).tolist() == [False] * 6 + [True, False]


def test_only_one_row_and_a_large_weight_of_one_piece_are_taken(monkeypatch):
    monkeypatch.setattr(_one_row, "_MANY", 8 * 16)
    row, weight = torch.ones(1, 1, 16), torch.ones(8, 16)
    assert is_one_row(row, weight)
    assert is_one_row(row, torch.ones(16, 8).t())
    assert not is_one_row(torch.ones(2, 16), weight)
    assert not is_one_row(row, weight[1:])
    assert not is_one_row(row, torch.ones(8, 32)[:, :16])
    assert is_one_row(row.bfloat16(), weight.bfloat16())
    assert not is_one_row(row, weight.bfloat16())
    assert not is_one_row(row.half(), weight.half())


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_row_of_a_weight_in_nf4_is_exact_to_float32(monkeypatch, double, block, threads):
    monkeypatch.setattr(compiled, "_SHARE", 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    stored = quantize(_drawn(37, 384, seed=1), NF4Spec(block_size=block, double_quant=double))
    dense, x, nothing = stored.write(torch.empty(37 * 384)), _drawn(1, 1, 384), torch.zeros(37)
    assert stored.is_one_row(x)
    found = stored.row_product(x)
    assert found.shape == (1, 1, 37)
    assert _near(found, x, dense, nothing)
    other = quantize(_drawn(37, 384, seed=1) * (1 + 2**-8), NF4Spec(block_size=block, double_quant=double))
    assert not _near(other.row_product(x), x, dense, nothing), "the twin: scales as good as bfloat16's"


def test_nf4_is_multiplied_by_the_very_numbers_that_are_brought_back():
    stored = quantize(_drawn(16, 256), NF4Spec())
    dense = stored.write(torch.empty(16 * 256))
    for place in range(256):
        only = functional.one_hot(torch.tensor([place]), 256).float()
        assert torch.equal(stored.row_product(only)[0], dense[:, place])


def test_endless_scales_of_nf4_stay_so():
    stored = quantize(torch.eye(8, 64), NF4Spec(double_quant=False))
    stored = attrs.evolve(stored, absmax=torch.tensor([torch.inf, torch.nan] + 6 * [1.0]))
    found = stored.row_product(torch.ones(1, 64))[0]
    assert not torch.isfinite(found[:2]).any()
    assert found[2:].tolist() == [1.0] * 6


def test_one_row_of_bfloat16_and_a_weight_in_nf4_is_rounded_once():
    stored = quantize(_drawn(37, 384, seed=1), NF4Spec())
    dense, x = stored.write(torch.empty(37 * 384)), _drawn(1, 384).bfloat16()
    found = stored.row_product(x)
    assert found.dtype == torch.bfloat16
    assert _near(found, x, dense, torch.zeros(37))
    assert not _near((x @ dense.bfloat16().t()), x, dense, torch.zeros(37)), "the twin: of rounded weights"


def test_only_one_row_of_whole_blocks_of_nf4_is_taken():
    stored = quantize(_drawn(4, 128), NF4Spec())
    assert stored.is_one_row(torch.ones(128))
    assert not stored.is_one_row(torch.ones(2, 128))
    assert stored.is_one_row(torch.ones(128).bfloat16())
    assert not stored.is_one_row(torch.ones(128).half())
    assert not quantize(_drawn(4, 96), NF4Spec()).is_one_row(torch.ones(96))
    assert not quantize(_drawn(4, 128), NF4Spec(block_size=32)).is_one_row(torch.ones(128))


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("named", ["gpt2", "llama", "qwen3"])
def test_an_answer_made_by_it_has_the_same_tokens(folders, monkeypatch, named, method):
    """The head and linears without an adapter are among its products, and afterwards as they were."""
    backend, settings = load_backend("torch"), GenerateSettings(max_new_tokens=20, stop_tokens=())
    targets = ("c_attn",) if named == "gpt2" else ("q_proj",)
    session = backend.open(tiny.plan_for(backend, folders[named], method=method, targets=targets), tiny.SHAPE)
    adapter = tiny.random_adapter(backend.state(session).adapter)
    session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
    monkeypatch.setattr(_products, "is_amd", lambda: False)
    expected = backend.generate(session, [5, 17, 80, 3, 42], settings)
    monkeypatch.setattr(_products, "is_amd", lambda: True)
    monkeypatch.setattr(_one_row, "_MANY", 1)
    used = []
    monkeypatch.setattr(
        _products, "row_product", lambda x, weight, bias: used.append(weight) or row_product(x, weight, bias)
    )
    assert backend.generate(session, [5, 17, 80, 3, 42], settings) == expected
    network = session.model.network
    linears = [module for module in network.modules() if type(module) is nn.Linear]
    held = {weight.data_ptr() for weight in used}
    assert all(linear.weight.data_ptr() in held for linear in linears)
    assert network.get_output_embeddings() in linears
    assert not any("forward" in vars(linear) for linear in linears)
