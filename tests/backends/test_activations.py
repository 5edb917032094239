"""torch's activation functions on a CPU: GELU exact to float32's rounding, in bfloat16 PyTorch's bits from tables."""

import attrs
import numpy as np
import pytest
import tiny
import tolerances
import torch
from mens_torch import _activations
from mens_torch._activations import GELU, SiLU
from torch.nn import functional

from mens_core import compiled
from mens_core.exchange import TrainingState
from mens_core.plugins import load_backend

ATEN = torch.ops.aten
EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@pytest.fixture
def _however_few(monkeypatch):
    """Let loops take what tests can afford."""
    monkeypatch.setattr(_activations, "MANY", 1)


def _ready(activation, dtype):
    activation.make_ready(torch.zeros(1, dtype=dtype).expand(compiled.MANY))
    return activation


def _both(function, x, grad):
    """Values and slopes."""
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(grad)
    return y.detach(), x.grad


def _pytorchs(x, grad):
    return functional.gelu(x, approximate="tanh"), ATEN.gelu_backward(grad, x, approximate="tanh")


def _near(found, exact):
    """Within ``tolerances.GELU`` of a result in float64, both of values and of slopes."""
    return [
        float(((ours.double() - truth).abs() / truth.abs().clamp(min=1)).max()) <= tolerances.GELU
        for ours, truth in zip(found, exact, strict=True)
    ]


def _same_bits(found, expected):
    """Of numbers; what is none may have others."""
    numbers = ~expected.isnan()
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.usefixtures("_however_few")
def test_gelu_in_float32_is_exact_to_its_rounding():
    x, drawn = torch.linspace(-12, 12, 200_001), torch.Generator().manual_seed(0)
    x, ones = torch.cat([x, torch.randn(100_000, generator=drawn)]), torch.ones(300_001)
    assert _near(_both(_ready(GELU(), torch.float32), x, ones), _pytorchs(x.double(), ones.double())) == [True, True]


def test_a_series_of_fewer_terms_would_be_seen(monkeypatch):
    monkeypatch.setattr(_activations, "_SERIES", (*_activations._SERIES[:6], np.float32(0), np.float32(0)))
    x, ones = torch.linspace(-12, 12, 2001), torch.ones(2001)
    values, slopes = torch.empty(2001), torch.empty(2001)
    _activations._gelu(x.numpy(), None, values.numpy())
    _activations._gelu(x.numpy(), ones.numpy(), slopes.numpy())
    assert _near((values, slopes), _pytorchs(x.double(), ones.double())) == [False, False]


@pytest.mark.usefixtures("_however_few")
def test_gelu_of_numbers_without_bounds_and_of_what_is_no_number():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e-40, -0.0])
    gelu = _ready(GELU(), torch.float32)
    values, slopes = _both(gelu, x, torch.ones(7))
    assert values[0].isnan()
    assert slopes[0].isnan()
    assert values[[1, 3, 5, 6]].tolist() == [torch.inf, x[3], pytest.approx(5e-41, rel=1e-4), 0]
    assert slopes[[1, 3, 5, 6]].tolist() == [1, 1, 0.5, 0.5]
    assert values[[2, 4]].abs().max() < 1e-27
    assert slopes[[2, 4]].abs().max() < 1e-26
    _, slopes = _both(gelu, torch.ones(3), torch.tensor([torch.nan, torch.inf, -torch.inf]))
    assert slopes[0].isnan()
    assert slopes[1:].tolist() == [torch.inf, -torch.inf]


@pytest.mark.usefixtures("_however_few")
def test_in_bfloat16_every_bit_of_gelu_is_pytorchs():
    drawn = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for grad in (drawn, EVERY, EVERY.flip(0)):
        for found, expected in zip(
            _both(_ready(GELU(), torch.bfloat16), EVERY, grad), _pytorchs(EVERY, grad), strict=True
        ):
            _same_bits(found, expected)


def test_in_bfloat16_every_bit_of_silu_is_pytorchs_and_its_slopes_are_rounded_once(monkeypatch):
    drawn = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, silu = functional.silu(EVERY), _ready(SiLU(), torch.bfloat16)
    wide = ATEN.silu_backward(torch.ones(1 << 16), EVERY.float())
    assert not silu.has_loop(EVERY[:1])
    monkeypatch.setattr(_activations, "MANY", 1)
    assert silu.has_loop(EVERY[:1])
    found = _both(silu, EVERY, drawn)
    _same_bits(found[0], expected)
    _same_bits(found[1], (wide * drawn.float()).bfloat16())


@pytest.mark.usefixtures("_however_few")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_threads_and_other_layouts_give_the_same_bits(monkeypatch, dtype):
    drawn = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    (x, grad), gelu = drawn, _ready(GELU(), dtype)
    expected = _both(gelu, x, grad)
    monkeypatch.setattr(compiled, "_SHARE", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    apart = torch.zeros(50, 60, dtype=dtype).t()[::2]
    for layout in (x, apart.copy_(x)):
        for slope in (grad, torch.zeros(50, 30, dtype=dtype).t().copy_(grad)):
            assert all(map(torch.equal, _both(gelu, layout, slope), expected))
    ones = _both(gelu, x, torch.ones_like(x))
    x = x.clone().requires_grad_()
    gelu(x).sum().backward()
    assert torch.equal(x.grad, ones[1]), "one number, expanded"


def test_pytorch_takes_few_numbers_other_formats_and_what_many_threads_share(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    many = torch.zeros(1).expand(compiled.MANY)

    def taken(kind, x):
        activation = kind()
        activation.make_ready(x)
        return activation.has_loop(x)

    assert taken(GELU, many)
    assert taken(GELU, many.bfloat16())
    assert taken(SiLU, many.bfloat16())
    assert not taken(SiLU, many)
    assert not any(taken(GELU, other) for other in (many[1:], many.half(), many.double(), many.to("meta")))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    assert not taken(GELU, many), "each of which would take less than one of ours"
    assert taken(GELU, torch.zeros(1).expand(32, 1 << 20))
    assert not GELU().has_loop(torch.zeros(1).expand(32, 1 << 20)), "nobody made it ready"


@pytest.mark.parametrize(("named", "dtype"), [("gpt2", "float32"), ("gpt2", "bfloat16"), ("llama", "bfloat16")])
def test_a_step_with_loops_is_a_step_with_pytorchs_kernels(folders, monkeypatch, named, dtype):
    backend = load_backend("torch")

    def moments():
        session = backend.open(tiny.plan_for(backend, folders[named], dtype=dtype), tiny.SHAPE)
        adapter = tiny.random_adapter(backend.state(session).adapter)
        session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
        backend.step(session, [tiny.batch_of(9, 5), tiny.batch_of(12, 3, 4, seed=2)], 0.0)
        return backend.state(session).optimizer

    expected, loops = moments(), []
    monkeypatch.setattr(_activations, "MANY", 1)
    written = _activations._written
    monkeypatch.setattr(_activations, "_written", lambda loop, *rest: loops.append(loop) or written(loop, *rest))
    found = moments()
    assert set(loops) == {_activations._gelu if dtype == "float32" else _activations._look_up}
    bound = {"gpt2": tolerances.GRADIENT, "llama": tolerances.BFLOAT16_GRADIENT}[named]
    for name, array in found.items():
        if (named, dtype) == ("gpt2", "bfloat16"):
            assert array.tobytes() == expected[name].tobytes()
        else:
            assert np.linalg.norm(array - expected[name]) <= bound * np.linalg.norm(expected[name])


@pytest.mark.parametrize(
    ("named", "dtype", "loop"),
    [("gpt2", "float32", "_gelu"), ("gpt2", "bfloat16", "_look_up"), ("llama", "bfloat16", "_look_up")],
)
def test_loops_are_compiled_while_a_model_opens_whose_batches_are_large(folders, monkeypatch, named, dtype, loop):
    backend, made = load_backend("torch"), []
    monkeypatch.setattr(_activations, "_written", lambda loop, x, grad, *_: made.append((loop, grad is None)) or x)
    large = attrs.evolve(tiny.SHAPE, tokens=1 << 20)
    backend.open(tiny.plan_for(backend, folders[named], dtype=dtype), tiny.SHAPE)
    backend.open(tiny.plan_for(backend, folders[named], dtype=dtype), attrs.evolve(large, supervised=1))
    backend.open(tiny.plan_for(backend, folders["llama"]), large)
    assert not made, "of few tokens, of a prompt, of a function without a loop"
    backend.open(tiny.plan_for(backend, folders[named], dtype=dtype), large)
    loop = getattr(_activations, loop)
    assert set(made) == {(loop, True), (loop, False)}
