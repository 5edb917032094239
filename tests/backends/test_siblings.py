"""torch's linears that read one tensor: one node of the graph, and the numbers of each by itself."""

import gc
import weakref

import pytest
import tiny
import torch
from mens_torch._siblings import joined
from mens_torch.lora import LoraLinear

from mens_core.plugins import load_backend

# Their order of summation differs alone: sums of at most a few hundred terms of float32 (Higham 2002, section 3.1).
NEAR = 1e-5


def _drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _layer(out, seed, rank=3, scale=2.0):
    layer = LoraLinear(_drawn(out, 24, seed=seed), _drawn(out, seed=seed + 1), rank, scale)
    with torch.no_grad():
        layer.lora_a.copy_(_drawn(rank, 24, seed=seed + 2))
        layer.lora_b.copy_(_drawn(out, rank, seed=seed + 3))
    return layer


@pytest.fixture
def layers():
    """Three of several sizes; the last carries no adapter."""
    return [_layer(24, 0), _layer(8, 10, rank=5), _layer(9, 20, rank=0)]


def _join(layers):
    with joined(layers), torch.no_grad():
        x = _drawn(2, 24)
        for layer in layers:
            layer(x)


def _found(layers, call):
    """Outputs of ``call`` in a list, and the slopes of x and of all A and B."""
    x = _drawn(7, 24, seed=5).requires_grad_()
    outputs = call(layers, x * 1)
    factors = [factor for layer in layers if layer.rank for factor in (layer.lora_a, layer.lora_b)]
    loss = sum((output * _drawn(*output.shape, seed=9 + place)).sum() for place, output in enumerate(outputs))
    slopes = torch.autograd.grad(loss, [x, *factors], materialize_grads=True)
    return [output.detach() for output in outputs], slopes


def _in_turn(layers, x):
    return [layer(x) for layer in layers]


def _backwards(layers, x):
    return [layer(x) for layer in reversed(layers)]


def _one_left_out(layers, x):
    return [layers[0](x), layers[2](x)]


def _one_twice(layers, x):
    return [layers[0](x), layers[0](x), layers[1](x), layers[2](x)]


def _two_tensors_in_turns(layers, x):
    other = x * 2
    return [layer(part) for layer in layers for part in (x, other)]


def _written_into_between(layers, x):
    first = layers[0](x)
    return [first * 1, *(layer(x.mul_(2)) for layer in layers[1:])]


@pytest.mark.parametrize(
    "call", [_in_turn, _backwards, _one_left_out, _one_twice, _two_tensors_in_turns, _written_into_between]
)
def test_siblings_give_what_each_gives_by_itself(layers, call):
    if call is _written_into_between:
        # What was read is gone then for a layer that keeps it; without A nothing is kept.
        layers = [_layer(out, 30 + out, rank=0) for out in (24, 8, 9)]
    expected = _found(layers, call)
    _join(layers)
    assert {layer.siblings for layer in layers} == {layers[0].siblings}
    for _ in range(2):  # the second finds nothing of the first
        outputs, slopes = _found(layers, call)
        assert all(torch.equal(output, right) for output, right in zip(outputs, expected[0], strict=True))
        for slope, right in zip(slopes, expected[1], strict=True):
            assert (slope - right).norm() <= NEAR * right.norm()
    layers[0].frozen[0, 0] += 0.1
    twin = _found(layers, call)[1][0]
    assert (twin - expected[1][0]).norm() > NEAR * expected[1][0].norm()


def test_siblings_are_one_node(layers):
    _join(layers)
    x = _drawn(7, 24).requires_grad_()
    assert len({layer(x).grad_fn for layer in layers}) == 1
    for layer in layers:
        layer.siblings = None
    assert len({layer(x).grad_fn for layer in layers}) == 3


def test_nothing_is_held_once_all_were_called(layers):
    _join(layers)
    siblings = layers[0].siblings
    x = _drawn(7, 24).requires_grad_()
    outputs = _in_turn(layers[:2], x)
    assert siblings._given[0] is x
    outputs += _in_turn(layers[2:], x)
    assert (siblings._given, siblings._ready) == (None, {})


def test_a_call_that_fails_leaves_nothing_for_the_next(layers):
    _join(layers)
    old, x = _drawn(7, 24, seed=1).requires_grad_(), _drawn(7, 24).requires_grad_()
    layers[0](old)
    bias, layers[2].bias = layers[2].bias, torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError):
        layers[0](x)
    layers[2].bias = bias
    with torch.no_grad():
        expected = layers[1](x)
    assert torch.equal(layers[1](x), expected)


def test_a_model_that_is_let_go_is_freed_at_once(layers):
    _join(layers)
    _in_turn(layers, _drawn(7, 24).requires_grad_())
    gone = weakref.ref(layers[0])
    gc.disable()
    try:
        del layers[0]
        assert gone() is None
    finally:
        gc.enable()


def test_only_layers_called_once_and_in_turn_with_one_tensor_are_joined(layers):
    first, second, third = layers
    x, other = _drawn(2, 24), _drawn(2, 24)
    for calls in (
        [(first, x), (second, other)],
        [(first, x), (second, other), (third, x)],
        [(first, x), (second, x), (first, x)],
        [(first, x), (second, x), (second, other)],
    ):
        with joined(layers), torch.no_grad():
            for layer, given in calls:
                layer(given)
        assert [layer.siblings for layer in layers] == [None] * 3, calls
    scaled = _layer(24, 0, scale=1.0)
    with joined([first, scaled]), torch.no_grad():
        first(x), scaled(x)
    assert first.siblings is scaled.siblings is None


FOUND = {
    "gpt2": set(),
    "llama": {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")},
}


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_trial_finds_who_reads_what(folders, family, method):
    backend = load_backend("torch")
    session = backend.open(tiny.plan_for(backend, folders[family], method=method, targets=("all-linear",)), tiny.SHAPE)
    names = {layer: path.rpartition(".")[2] for path, layer in session.model.adapters.items()}
    groups = {layer.siblings for layer in names} - {None}
    assert {tuple(names[layer] for layer in siblings.layers) for siblings in groups} == FOUND[family]
    assert len(groups) == len(FOUND[family]) * 2, "of each of the two layers its own"
