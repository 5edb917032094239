"""torch's products of bfloat16 on a CPU that has no instructions for it: sums in float32, rounded once."""

import numpy as np
import pytest
import tiny
import torch
from mens_torch import _widened, attention
from mens_torch._packing import _spelled_out
from mens_torch._products import linear, products
from mens_torch._widened import is_widened, wide

from mens_core.exchange import TrainingState
from mens_core.plugins import load_backend

# Weights, (out, in): either side longer, one as wide as it is high, and none at all.
SIZES = [(20, 33), (33, 20), (12, 12), (0, 12)]
SCALE = 0.3
COARSE = torch.float8_e4m3fn


@pytest.fixture
def lacking(monkeypatch):
    """A processor without products of bfloat16; weights by pieces of five."""
    monkeypatch.setattr(_widened, "_has_bfloat16", lambda: False)
    monkeypatch.setattr(_widened, "_PIECE", 5)


def _drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _weight(size, transposed):
    return _drawn(*size[::-1], seed=1).t() if transposed else _drawn(*size, seed=1)


def _near(found, left, right, beside=0.0, scale=1.0):
    """Within one rounding to bfloat16, 2⁻⁸ of a number, of beside + s · left right in float64.

    Sums of float32 lose k · 2⁻²⁴ of the sum of the absolute values before it (Higham 2002, section 3.1).
    """
    left, right = left.double(), right.double()
    exact = beside + scale * (left @ right)
    lost = (left.shape[-1] + 3) * 2**-24 * (abs(scale) * (left.abs() @ right.abs()) + abs(beside))
    bound = lost + (0.0 if found.dtype == torch.float32 else 2**-8 * (exact.abs() + lost))
    return bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.usefixtures("lacking")
def test_products_are_rounded_once(rows, size, transposed):
    x, weight, bias = _drawn(rows, size[1]), _weight(size, transposed), _drawn(size[0], seed=2)
    room, by = _drawn(rows, size[0], seed=3), products(x)
    assert _near(by.linear(x, weight), x, weight.t())
    assert _near(by.linear_into(room.clone(), x, weight), x, weight.t())
    assert _near(by.product(x, weight.t()), x, weight.t())
    assert _near(by.product(x, weight.t(), room.clone()), x, weight.t(), room.double())
    assert _near(by.slope(room, x, SCALE), room.t(), x, scale=SCALE)
    added = room.clone()
    by.add_update(added, x, weight.t(), SCALE)
    assert _near(added, x, weight.t(), room.double(), SCALE)
    if rows > 1:  # PyTorch's own rounds before it adds a bias
        assert _near(linear(x, weight, bias), x, weight.t(), bias.double())
        twice = linear(x, weight) + bias
        assert not size[0] or not _near(twice, x, weight.t(), bias.double()), "the twin: rounded twice"


@pytest.mark.usefixtures("lacking")
def test_leading_axes_are_kept():
    x, weight = _drawn(2, 5, 12), _drawn(20, 12, seed=1)
    assert torch.equal(linear(x, weight), linear(x.view(10, 12), weight).view(2, 5, 20))


def test_the_processor_and_the_format_decide(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(_widened, "_has_bfloat16", lambda has=has: has)
        assert is_widened(_drawn(1)) is not has
        assert not is_widened(_drawn(1).float())
        assert not is_widened(_drawn(1).half())
        assert not is_widened(_drawn(1).to("meta"))
    assert wide(_drawn(1)).dtype == torch.float32
    monkeypatch.undo()
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert _widened._has_bfloat16.__wrapped__() is False
    own = _drawn(1).float()
    assert wide(own) is own


@pytest.mark.parametrize("window", [None, 4, 7], ids=str)
@pytest.mark.parametrize(("softcap", "bound"), [(None, 4e-3), (5.0, 8e-3)], ids=str)
@pytest.mark.usefixtures("lacking")
def test_attention_and_its_slopes_are_those_of_float32(window, softcap, bound):
    """By blocks, by PyTorch's own under a window, and spelled out for a cap."""
    parts = [_drawn(1, heads, 11, 8, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    rows, given = (11,), {"scale": SCALE, "window": window}

    def attended(query, key, value):
        if softcap is None:
            return attention.packed_attention(query, key, value, rows, **given)
        row = (part[0].transpose(0, 1) for part in (query, key, value))
        return _spelled_out(*row, softcap=softcap, sinks=None, **given)[None]

    found = attended(*parts)
    assert found.dtype == torch.bfloat16
    single = [part.detach().float().requires_grad_() for part in parts]
    expected = attended(*single)
    towards = _drawn(1, 11, 4, 8, seed=9)
    slopes = zip(
        torch.autograd.grad(found, parts, towards),
        torch.autograd.grad(expected, single, towards.float()),
        strict=True,
    )
    for one, other in [(found, expected), *slopes]:
        # Relative distance (Frobenius): half the last place of bfloat16 at the end and, for a cap, of the weights.
        assert float((one.float() - other).norm().detach() / other.norm().detach()) < bound


@pytest.mark.parametrize("fields", [{}, {"dropout": 0.3}, {"method": "qlora"}], ids=["lora", "dropout", "qlora"])
@pytest.mark.parametrize("named", ["gpt2", "llama", "qwen3"])
def test_slopes_of_a_step_are_as_near_to_those_of_float32_as_by_pytorchs_own_products(
    folders, monkeypatch, named, fields
):
    backend = load_backend("torch")

    def slopes(dtype, has):
        monkeypatch.setattr(_widened, "_has_bfloat16", lambda: has)
        session = backend.open(tiny.plan_for(backend, folders[named], dtype=dtype, **fields), tiny.SHAPE)
        adapter = tiny.random_adapter(backend.state(session).adapter)
        session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
        backend.step(session, [tiny.batch_of(9, 5), tiny.batch_of(12, 3, 4, seed=2)], 0.0)
        found = backend.state(session).optimizer
        return np.concatenate([found[name].ravel() for name in sorted(found) if name.endswith("exp_avg")])

    exact = slopes("float32", has=True)

    def distance(has):
        return np.linalg.norm(slopes("bfloat16", has) - exact) / np.linalg.norm(exact)

    # Numbers are rounded at other places on the way; 0.85 to 1.12 times was seen, of 0.013 to 0.026.
    assert 0 < distance(has=False) < 1.3 * distance(has=True)
    put = _widened._put
    monkeypatch.setattr(_widened, "_put", lambda place, made, *rest: put(place, made.to(COARSE).float(), *rest))
    assert distance(has=False) > 1.3 * distance(has=True), "the twin: rounded to half as many bits"
