"""The adapter: its names, its targets, and merging it away."""

import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st

from mens_core.errors import ContractError, ModelError
from mens_core.hf.keymap import linear_shapes
from mens_core.hf.layout import read_layout

SIZES = st.integers(1, 24)


def _drawn(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _expected(weight, lora_a, lora_b, scale):
    return weight.astype(np.float64) + scale * lora_b.astype(np.float64) @ lora_a.astype(np.float64)


@given(out=SIZES, into=SIZES, rank=SIZES, scale=st.sampled_from([0.25, 2.0, 5.657]), seed=st.integers(0, 1000))
def test_merging_is_w_plus_s_b_a(backend, out, into, rank, scale, seed):
    parts = _drawn((out, into), seed), _drawn((rank, into), seed + 1), _drawn((out, rank), seed + 2)
    copies = [part.copy() for part in parts]
    merged = backend.merge(*parts, scale)
    expected = _expected(*parts, scale)
    assert np.abs(merged - expected).max() <= tolerances.MERGE * max(1, np.abs(expected).max())
    for part, copy in zip(parts, copies, strict=True):
        np.testing.assert_array_equal(part, copy)


def test_a_slightly_wrong_scale_would_show(backend):
    parts = _drawn((16, 24), 0), _drawn((4, 24), 1), _drawn((16, 4), 2)
    expected = _expected(*parts, 2.0)
    distance = np.abs(backend.merge(*parts, 2.00001) - expected).max()
    assert distance > tolerances.MERGE * np.abs(expected).max()


@pytest.mark.parametrize(
    "shapes",
    [
        ((6, 4), (2, 6), (4, 2)),  # transposed
        ((6, 4), (2, 4), (6, 3)),  # two ranks
        ((6, 4), (1, 4), (1, 1)),  # would broadcast
        ((6, 4), (2, 1), (6, 2)),  # would broadcast
        ((24,), (2, 4), (6, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(backend, shapes):
    with pytest.raises(ModelError, match="does not fit"):
        backend.merge(*(np.ones(shape, np.float32) for shape in shapes), 1.0)


def test_a_merged_model_computes_what_the_adapted_one_does(backend, adapted, folders, family):
    session, adapter = adapted(family)
    batch = tiny.batch_of(9, 5, 12)

    def merged(path, weight):
        return backend.merge(weight, adapter[f"{path}.lora_A.weight"], adapter[f"{path}.lora_B.weight"], 2.0)

    model = references.with_weights(references.open_model(folders[family]), merged)
    with torch.no_grad():
        expected = references.logits_of(model, batch).numpy()
    assert np.abs(backend.forward(session, batch) - expected).max() <= tolerances.LOGITS


def test_the_adapter_is_named_and_shaped_as_peft_does(backend, session_of, folders, family):
    adapter = backend.state(session_of(family, rank=3)).adapter
    expected = {}
    for path, (out, into) in linear_shapes(read_layout(folders[family])).items():
        expected |= {f"{path}.lora_A.weight": (3, into), f"{path}.lora_B.weight": (out, 3)}
    assert {name: array.shape for name, array in adapter.items()} == expected
    assert set(references.linears(references.open_model(folders[family]))) == {
        name.rsplit(".lora_", 1)[0] for name in adapter
    }


def test_a_session_opens_with_a_zero_adapter(backend, folders, family):
    session = backend.open(tiny.plan_for(backend, folders[family]), tiny.SHAPE)
    state = backend.state(session)
    assert not any(array.any() for array in state.adapter.values())
    assert state.step == 0
    assert state.optimizer == {}


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("family", "targets", "suffixes"),
    [
        ("gpt2", ("c_attn",), ["attn.c_attn"]),
        ("gpt2", ("c_proj",), ["attn.c_proj", "mlp.c_proj"]),
        ("llama", ("q_proj", "v_proj"), ["self_attn.q_proj", "self_attn.v_proj"]),
        ("llama", ("mlp.up_proj",), ["mlp.up_proj"]),
    ],
)
def test_only_the_targets_are_adapted(backend, folders, family, targets, suffixes, method):
    session = backend.open(tiny.plan_for(backend, folders[family], targets=targets, method=method), tiny.SHAPE)
    stem = "transformer.h" if family == "gpt2" else "model.layers"
    expected = {f"{stem}.{layer}.{suffix}" for layer in range(2) for suffix in suffixes}
    assert {name.rsplit(".lora_", 1)[0] for name in backend.state(session).adapter} == expected
    assert np.isfinite(float(backend.step(session, [tiny.batch_of(5, 4)], 1e-3).loss_sum))


def test_one_layer_may_be_named_in_full(part):
    paths = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"]
    assert part("lora").select_targets(paths, ("model.layers.1.mlp.up_proj",)) == (paths[1],)
    assert part("lora").select_targets(paths, ("all-linear",)) == tuple(paths)


def test_an_unknown_target_is_refused_with_the_nearest_name(backend, folders):
    plan = tiny.plan_for(backend, folders["llama"], targets=("q_proj", "v_porj"))
    with pytest.raises(ContractError, match="did you mean 'v_proj'") as caught:
        backend.open(plan, tiny.SHAPE)
    assert "gate_proj" in caught.value.expected


@pytest.mark.parametrize("target", ["lm_head", "roj", "embed_tokens"])
def test_neither_the_head_nor_half_a_name_is_a_target(backend, folders, target):
    with pytest.raises(ContractError, match=f"no linear layer is called '{target}'"):
        backend.open(tiny.plan_for(backend, folders["llama"], targets=(target,)), tiny.SHAPE)
