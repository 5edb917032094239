"""Inputs of torch's linears that are made again in the backward pass: the same bits as of those that are kept."""

import sys

import numpy as np
import pytest
import tiny
import torch
from mens_torch import _adapted, _heap, _remade, _widened
from mens_torch._activations import GELU

from mens_core.exchange import TrainingState
from mens_core.plugins import load_backend

CASES = {
    "as it is": {},
    "bfloat16": {"dtype": "bfloat16"},
    "dropout": {"dropout": 0.3},
    "a norm that is trained": {"modules_to_save": ("ln_2",)},
    "NF4": {"method": "qlora"},
    "layers computed again": {"gradient_checkpointing": True},
}


@pytest.fixture(autouse=True)
def _however_few(monkeypatch):
    """Nothing of tiny models would be made again, nor attention by blocks, which is that of widened bfloat16."""
    monkeypatch.setattr(_remade, "_MANY", 1)
    monkeypatch.setattr(_widened, "_has_bfloat16", lambda: True)


def _moments(folder, fields):
    """AdamW's moments after a step on rows of several lengths."""
    backend = load_backend("torch")
    session = backend.open(tiny.plan_for(backend, folder, **fields), tiny.SHAPE)
    adapter = tiny.random_adapter(backend.state(session).adapter)
    session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
    backend.step(session, [tiny.batch_of(9, 5), tiny.batch_of(12, 3, 4, seed=2)], 0.0)
    return backend.state(session).optimizer


@pytest.mark.parametrize("case", CASES)
def test_gradients_have_the_bits_of_those_from_kept_inputs(folders, monkeypatch, case):
    fields, made = CASES[case], set()

    def told(tensor):
        origin = _remade.origin_of(tensor)
        if origin is not None:
            made.add(type(getattr(origin.make, "__self__", None)).__name__)
        return origin

    with monkeypatch.context() as context:
        context.setattr(_adapted, "origin_of", told)
        again = _moments(folders["gpt2"], fields)
    norm = "ParametrizedLayerNorm" if "modules_to_save" in fields else "LayerNorm"
    assert made >= {norm, "NoneType"}, "norms and attention are made again"
    assert ("GELU" in made) == (fields.get("dtype") != "bfloat16")
    monkeypatch.setattr(_adapted, "origin_of", lambda _tensor: None)
    kept = _moments(folders["gpt2"], fields)
    assert set(again) == set(kept)
    assert all(array.tobytes() == kept[name].tobytes() for name, array in again.items())


def test_what_is_made_again_is_what_the_slopes_come_from(folders, monkeypatch):
    right = _moments(folders["gpt2"], {})
    monkeypatch.setattr(
        _remade, "_remember_output", lambda _module, given, made: _remade.remember(made, _remade.Origin(_zeros, given))
    )
    wrong = _moments(folders["gpt2"], {})
    of_a = [name for name in right if name.endswith("c_fc.lora_A.weight.exp_avg")]
    assert of_a
    assert not any(np.any(wrong[name]) for name in of_a)
    assert all(np.any(right[name]) for name in of_a)


def _zeros(x):
    return torch.zeros_like(x)


def test_an_input_that_is_handed_over_by_name_is_kept():
    norm, x = torch.nn.LayerNorm(4), torch.ones(2, 4, requires_grad=True)
    _remade.remember_outputs(norm, torch.float32)
    assert _remade.origin_of(norm(x)) == (norm.forward, (x,))
    assert _remade.origin_of(norm(input=x)) is None


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.GELU, GELU])
def test_what_is_cheap_to_make_again_says_what_it_was_made_from(kind):
    module, x = kind(4) if kind is torch.nn.LayerNorm else kind(), torch.ones(2, 4, requires_grad=True)
    assert _remade.origin_of(module(x)) is None
    _remade.remember_outputs(module, torch.bfloat16)
    assert (_remade.origin_of(module(x)) is not None) == (kind is torch.nn.LayerNorm)
    _remade.remember_outputs(module, torch.float32)
    assert _remade.origin_of(module(x)) == (module.forward, (x,))


def test_only_the_whole_of_a_tensor_has_its_origin():
    made = torch.ones(2, 3, 4, requires_grad=True) * 2
    origin = _remade.Origin(_zeros, (made,))
    _remade.remember(made, origin)
    assert _remade.origin_of(made) is _remade.origin_of(made.reshape(6, 4)) is origin
    assert _remade.origin_of(made[None].flatten(1)) is origin
    assert [_remade.origin_of(part) for part in (made[:1], made.transpose(0, 1), made + 1)] == [None] * 3
    made.mul_(2)
    assert _remade.origin_of(made) is None, "it is another tensor now"
    with torch.no_grad():
        constant = torch.ones(2)
        _remade.remember(constant, origin)
    assert _remade.origin_of(constant) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_heap_s_holes_are_given_back():
    if not hasattr(_heap.ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("another C library than glibc")
    # Once a larger piece was freed, smaller ones lie in the heap and no longer in mappings of their own.
    torch.ones(1 << 20)
    pieces = [torch.ones(1 << 18) for _ in range(128)]
    # Every other one, so that what is free does not lie at the heap's end.
    del pieces[::2]
    before = _resident()
    _heap.give_back_holes()
    assert before - _resident() > 32 << 20
    assert all(piece.sum() == 1 << 18 for piece in pieces)


def _resident():
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096
