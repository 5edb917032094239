"""torch's own attention on a CPU: the formula in float64, forward and backward, whatever the blocks."""

import numpy as np
import pytest
import tiny
import torch
from mens_torch import _blockwise, attention
from mens_torch._blockwise import blockwise_attention, is_faster

from mens_core.exchange import TrainingState
from mens_core.plugins import load_backend

ROWS = [(130,), (1, 63, 64, 65), (5, 5)]
# Relative distance (Frobenius). Float32: sums of 130 numbers, 1e-7 to 4e-7 seen. Bfloat16: half its last place is
# 2e-3 of a number, rounded once in weights or slopes and once at the end; 2e-3 to 5e-3 seen.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
SCALE = 0.3


def _drawn(rows, heads=4, kv_heads=4, dtype=torch.float32):
    """(1, heads, T, E) query, key and value that ask for slopes, and the (1, T, heads, E) slope of attention."""
    generator, total = torch.Generator().manual_seed(0), sum(rows)
    shapes = [(1, heads, total, 8), (1, kv_heads, total, 8), (1, kv_heads, total, 8), (1, total, heads, 8)]
    query, key, value, slope = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [part.requires_grad_() for part in (query, key, value)], slope


def _formula(query, key, value, rows):
    """Attention in float64, by one mask over all positions."""
    row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    place, group = torch.arange(sum(rows)), query.shape[1] // key.shape[1]
    query, key, value = (part.double() for part in (query, key, value))
    scores = torch.einsum("nhqe,nhke->nhqk", query, key.repeat_interleave(group, 1)) * SCALE
    seen = (row[:, None] == row) & (place[:, None] >= place)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("nhqk,nhke->nqhe", weights, value.repeat_interleave(group, 1))


def _distances(rows, kv_heads=4, dtype=torch.float32):
    """Of the attention and of three slopes, each to the formula's."""
    parts, slope = _drawn(rows, kv_heads=kv_heads, dtype=dtype)
    found, expected = blockwise_attention(*parts, rows, SCALE), _formula(*parts, rows)
    found_slopes, expected_slopes = (
        torch.autograd.grad(made, parts, slope.to(made.dtype)) for made in (found, expected)
    )
    pairs = zip((found, *found_slopes), (expected, *expected_slopes), strict=True)
    return [float((one.double() - other).norm().detach() / other.norm().detach()) for one, other in pairs]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_it_is_the_formula_and_its_slopes(dtype, rows, kv_heads):
    assert max(_distances(rows, kv_heads, dtype)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_heads_in_parts_change_nothing(monkeypatch, dtype):
    monkeypatch.setattr(_blockwise, "_IN_CACHE", 1)
    assert max(_distances((130, 7), 2, dtype)) < BOUNDS[dtype]


def test_a_query_that_sees_one_key_more_is_found_out(monkeypatch):
    """The twin, in each format."""
    right = torch.Tensor.triu_
    monkeypatch.setattr(torch.Tensor, "triu_", lambda tensor, above: right(tensor, above + 1))
    assert min(_distances(ROWS[0])) > BOUNDS[torch.float32]
    assert min(_distances(ROWS[0], dtype=torch.bfloat16)) > BOUNDS[torch.bfloat16]


def test_a_row_is_the_same_alone_and_among_others():
    parts, _ = _drawn((70, 130, 9))
    among = blockwise_attention(*parts, (70, 130, 9), SCALE)[:, 70:200]
    assert torch.equal(among, blockwise_attention(*(part[:, :, 70:200] for part in parts), (130,), SCALE))


def test_nothing_but_query_key_and_value_is_kept():
    parts, _ = _drawn((130,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        blockwise_attention(*parts, (130,), SCALE)
    assert [id(tensor) for tensor in kept] == [id(part) for part in parts]


def test_it_is_taken_where_it_was_measured_to_be_faster(monkeypatch):
    query = torch.empty(1, 12, 0, 64)
    assert is_faster(query, (118, 414))
    assert is_faster(query, (1024,))
    assert not is_faster(query, (8, 16)), "calling takes longer than computing"
    assert not is_faster(query, (1025, 4)), "PyTorch's own is as fast"
    assert not is_faster(query.to("meta"), (414,)), "a device has kernels of its own"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert not is_faster(query, (414,)), "too little for so many threads"


@pytest.mark.parametrize("window", [None, 4, 100])
def test_a_window_is_kept(monkeypatch, window):
    """The one that is narrower than a row goes PyTorch's own way."""
    parts, _ = _drawn((9, 70))
    own = attention.packed_attention(*parts, (9, 70), SCALE, window)
    monkeypatch.setattr(attention, "is_faster", lambda _query, _rows: True)
    torch.testing.assert_close(attention.packed_attention(*parts, (9, 70), SCALE, window), own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_step_has_the_slopes_of_pytorchs_own(folders, monkeypatch, family, checkpointed):
    def moments(own):
        monkeypatch.setattr(attention, "is_faster", lambda _query, _rows: not own)
        backend = load_backend("torch")
        session = backend.open(tiny.plan_for(backend, folders[family], gradient_checkpointing=checkpointed), tiny.SHAPE)
        adapter = tiny.random_adapter(backend.state(session).adapter)
        session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
        backend.step(session, [tiny.batch_of(9, 5), tiny.batch_of(12, 3, 4, seed=2)], 0.0)
        return backend.state(session).optimizer

    monkeypatch.setattr(_blockwise, "_BLOCK", 4)
    own, found = moments(own=True), moments(own=False)
    for name, expected in own.items():
        # Slopes of a step that is clipped and divided, summed in another order: 2e-6 of the largest was seen.
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=name)
