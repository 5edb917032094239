"""Layers that are computed again in the backward pass: the same numbers, under the same masks, in less memory."""

import attrs
import numpy as np
import pytest
import tiny
import tolerances
import torch

from mens_core.contract import FineTuneContract
from mens_core.errors import ModelError
from mens_core.exchange import TrainingState
from mens_core.hf.layout import read_layout
from mens_core.plugins import load_backend

DROPPING = {"dropout": 0.3, "max_grad_norm": 1e9}
HALF = {"method": "qlora", "dtype": "bfloat16"} | DROPPING
AGAIN = {"gradient_checkpointing": True}
LAYERS = 6


@pytest.fixture
def window():
    """Two batches of rows, so that gradients are summed and layers run twice before an update."""
    return [tiny.batch_of(9, 5, seed=1), tiny.batch_of(12, 3, 4, seed=2, supervised=0.9)]


def _step(backend, session, window):
    """Loss sum, gradient norm and AdamW's moments after one step from random numbers and zero moments."""
    adapter = tiny.random_adapter(backend.state(session).adapter)
    session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
    metrics = backend.step(session, window, 0.0)
    return float(metrics.loss_sum), float(metrics.grad_norm), backend.state(session).optimizer


def _error(found, expected):
    """The largest relative error of a gradient, of which the first moment is a tenth."""
    names = [name for name in expected if name.endswith(".exp_avg")]
    assert names
    assert set(found) == set(expected)
    return max(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]) for name in names)


def _same(backend, one, other):
    """Torch repeats the very operations; XLA compiles them anew, and may round otherwise."""
    if backend.name == "torch":
        assert one[:2] == other[:2]
        assert all(array.tobytes() == other[2][name].tobytes() for name, array in one[2].items())
    assert one[0] == pytest.approx(other[0], rel=tolerances.LOSS)
    assert _error(one[2], other[2]) <= tolerances.GRADIENT


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_loss_and_every_gradient_are_those_without(backend, session_of, window, family):
    plain, again = (_step(backend, session_of(family, **DROPPING, **fields), window) for fields in ({}, AGAIN))
    _same(backend, again, plain)


@pytest.mark.parametrize("fields", [{}, {"targets": ("down_proj",)}, HALF])
def test_so_they_are_in_any_kernel_and_with_any_targets(folders, window, fields):
    plain, again = (_torch(folders["llama"], window, **fields, **more)[1] for more in ({}, AGAIN))
    _same(load_backend("torch"), again, plain)


def test_other_masks_would_show(backend, session_of, window):
    plain = _step(backend, session_of("llama", **DROPPING), window)
    other = _step(backend, session_of("llama", seed=7, **DROPPING), window)
    assert _error(other[2], plain[2]) > 100 * tolerances.GRADIENT


# --- torch ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Family → a folder like ``folders`` has it, of more layers; falcon's rows run one at a time."""
    root, folders = tmp_path_factory.mktemp("deep"), {}
    for family, config in tiny.CONFIGS.items():
        layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": LAYERS}
        tiny.write_model(root / family, family, config | layers)
        folders[family] = root / family
    falcon = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
    tiny.write_model(root / "falcon", "falcon", falcon)
    return folders | {"falcon": root / "falcon"}


def _torch(folder, window, **fields):
    backend = load_backend("torch")
    session = backend.open(tiny.plan_for(backend, folder, **fields), tiny.SHAPE)
    return session, _step(backend, session, window)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_layer_that_runs_for_every_row_sees_each_row_s_masks_again(deep, window, family):
    (session, again), (_, plain) = (_torch(deep[family], window, **DROPPING, **more) for more in (AGAIN, {}))
    assert session.packed == (family == "llama")
    _same(load_backend("torch"), again, plain)
    assert all(layer.dropout is None for layer in session.model.adapters.values())


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_masks_that_the_second_computation_does_not_know_would_show(deep, window, family, monkeypatch):
    from mens_torch import _checkpointing

    plain = _torch(deep[family], window, **DROPPING)[1]
    own = _checkpointing._dropping
    monkeypatch.setattr(
        _checkpointing, "_dropping", lambda then: own([(layer, drawn.fold("another")) for layer, drawn in then])
    )
    wrong = _torch(deep[family], window, **DROPPING, **AGAIN)[1]
    assert wrong[0] == plain[0]
    assert _error(wrong[2], plain[2]) > 100 * tolerances.GRADIENT


def _peak(session, batch):
    """The most bytes that a batch's forward and backward pass hold at a time, by the allocator's own account."""
    from mens_torch.step import _loss_sum

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _loss_sum(session, batch).backward()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"]).max())


def _waiting(session, batch):
    """Bytes that wait for the backward pass after the forward pass, the base's own left out."""
    from mens_torch.step import _loss_sum

    own = {tensor.untyped_storage().data_ptr() for tensor in session.model.network.state_dict().values()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = _loss_sum(session, batch)
    assert float(total.detach()) > 0
    return sum(kept.values())


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_the_torch_backend_holds_what_it_says_and_a_fraction_of_what_it_held(deep, monkeypatch, family):
    from mens_torch import _remade, memory

    monkeypatch.setattr(_remade, "_MANY", 1)
    backend, batch, tokens = load_backend("torch"), tiny.batch_of(24, 24), 48
    weights, peaks = tiny.weights_of(deep[family]), {}
    for again in (False, True):
        plan = tiny.plan_for(backend, deep[family], gradient_checkpointing=again)
        session = backend.open(plan, tiny.SHAPE)
        said = tokens * memory._kept(plan.contract, plan.layout, weights, "float32")
        short = memory._SHORT_LIVED[family == "gpt2"] * tokens * plan.layout.intermediate_size * 4
        logits = 3 * 4 * batch.supervised_tokens * plan.layout.vocab_size
        peaks[again] = _peak(session, batch)
        assert said <= peaks[again] <= said + short + logits
        if again:
            inputs = 4 * tokens * LAYERS * plan.layout.hidden_size
            # Besides: the rotary tables, the last norm and the loss.
            assert inputs <= _waiting(session, batch) <= inputs + 4 * tokens * 4 * plan.layout.hidden_size
    assert peaks[True] < 0.4 * peaks[False]


def test_an_answer_and_a_loss_are_those_without(deep):
    backend, answers = load_backend("torch"), []
    for fields in ({}, AGAIN):
        session = _torch(deep["qwen2"], [tiny.batch_of(9)], **fields)[0]
        answers.append((backend.loss(session, tiny.batch_of(8)), backend.forward(session, tiny.batch_of(8)).tobytes()))
    assert answers[0] == answers[1]


def _gpt(tmp_path):
    config = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64}
    tiny.write_model(tmp_path / "gpt", "openai-gpt", config)
    return tmp_path / "gpt"


def test_a_model_whose_layers_cannot_be_computed_again_is_refused_before_anything_is_spent(tmp_path):
    backend, folder = load_backend("torch"), _gpt(tmp_path)
    for again in (False, True):
        contract = FineTuneContract.from_fields(trains=False, model=str(folder), gradient_checkpointing=again)
        offer = backend.plan(contract, read_layout(folder), tiny.MACHINE, tiny.WEIGHTS, None)
        assert offer.feasible != again
    assert "OpenAIGPTLMHeadModel" in offer.reason
    assert "gradient_checkpointing" in offer.reason
    layout = attrs.evolve(read_layout(folder), model_type="opt", family=None)
    assert backend.plan(contract, layout, tiny.MACHINE, tiny.WEIGHTS, None).feasible


def test_and_where_it_is_opened_all_the_same(tmp_path):
    backend, folder = load_backend("torch"), _gpt(tmp_path)
    plan = tiny.plan_for(backend, folder)
    plan = attrs.evolve(plan, contract=plan.contract.changed("a test", **AGAIN))
    with pytest.raises(ModelError, match="no layers that could be computed again") as caught:
        backend.open(plan, tiny.SHAPE)
    assert "gradient_checkpointing: false" in caught.value.fix


# --- JAX --------------------------------------------------------------------------------------------------------


def test_xla_holds_less_by_what_the_jax_backend_says(deep):
    import jax
    from mens_jax import memory, step
    from mens_jax._packing import fill

    backend, batch, held, said = load_backend("jax"), tiny.batch_of(32, 32), [], []
    for again in (False, True):
        plan = tiny.plan_for(backend, deep["llama"], gradient_checkpointing=again)
        session = backend.open(plan, attrs.evolve(tiny.SHAPE, tokens=64))
        packed = fill(batch, session.buckets.fit([batch]))
        rest = session.structure, session.frozen, packed
        gradient = jax.jit(lambda adapter, rest=rest: jax.grad(step._loss_sum)(adapter, *rest))
        held.append(gradient.lower(session.trained.adapter).compile().memory_analysis().temp_size_in_bytes)
        said.append(4 * memory._kept(plan.layout, tiny.weights_of(deep["llama"]), 64, again=again))
    assert said[1] < said[0] / 3
    assert held[0] - held[1] == pytest.approx(said[0] - said[1], rel=0.1), (held, said)
