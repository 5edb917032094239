"""Modules that are trained whole: PEFT's gradients, PEFT's training, PEFT's files, and the same on every backend."""

import json

import attrs
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from peft import PeftModel

from mens_core.artifacts.adapter import V3_MANIFEST, initial_state, write_adapter
from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.tensors import read_tensors
from mens_core.errors import ModelError
from mens_core.exchange import GenerateSettings, TrainingState
from mens_core.hf.keymap import canonical_name
from mens_core.hf.layout import read_layout
from mens_core.hf.whole import TABLES, whole_shapes
from mens_core.inference import with_whole
from mens_core.plugins import load_backend

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")

BATCH = tiny.batch_of(9, 5, 12)
WINDOW = [tiny.batch_of(9, 5, seed=1), tiny.batch_of(12, 3, 4, seed=2, supervised=0.9)]
RATE = 1e-2
# The padding token of three families, whose row of the embedding transformers never trains.
WITH_PADDING = [
    attrs.evolve(WINDOW[0], input_ids=np.where(WINDOW[0].input_ids % 5 == 0, 0, WINDOW[0].input_ids).astype(np.int32)),
    WINDOW[1],
]

# Tied heads in every way, an untied one, every norm, and one norm of a stack of them.
SAVED = {
    "gpt2, head": ("gpt2", ("lm_head",)),
    "gpt2, embeddings and norms": ("gpt2", ("wte", "wpe", "ln_1", "ln_f")),
    "llama, all": ("llama", ("lm_head", "embed_tokens", "norm", "input_layernorm", "post_attention_layernorm")),
    "qwen2, head": ("qwen2", ("lm_head",)),
    "qwen2, embedding": ("qwen2", ("embed_tokens",)),
    "qwen2, both": ("qwen2", ("lm_head", "embed_tokens")),
    "qwen3, norms": ("qwen3", ("q_norm", "k_norm", "model.layers.1.input_layernorm", "norm")),
}


@pytest.fixture(params=SAVED)
def saved(request):
    """Family and names of modules, each in turn."""
    return SAVED[request.param]


def _fields(names):
    """The same for all tests, so that a session is opened, and its step compiled, once."""
    return {"modules_to_save": names, "weight_decay": 0.1, "max_grad_norm": 1.0}


def _trained_by_peft(folder, adapter, windows, rates, *, frozen=(), change=None):
    """Norms, first moments and parameters after steps of PEFT's model with torch's clipping and AdamW."""
    model = references.open_model(folder)
    model = references.with_weights(model, change) if change else model
    model, parameters = references.with_adapter(model, adapter, rank=4, alpha=8.0)
    trained = {name: parameter for name, parameter in parameters.items() if name not in frozen}
    norms, optimizer = references.train(model, trained, windows, rates=rates, max_grad_norm=1.0, weight_decay=0.1)
    moments = {name: optimizer.state[parameter]["exp_avg"].numpy() for name, parameter in trained.items()}
    return norms, moments, {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def _relative(found, expected):
    """Largest relative difference of one tensor, in the Frobenius norm."""
    assert set(found) == set(expected)
    return max(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected)


def _distance(found, expected, start):
    """Relative to the distance moved."""
    assert set(found) == set(expected)
    apart = sum(np.square(found[name] - expected[name], dtype=np.float64).sum() for name in found)
    moved = sum(np.square(expected[name] - start[name], dtype=np.float64).sum() for name in found)
    return np.sqrt(apart / moved)


def _base_of(folder):
    """The base by its names, the head beside the embedding even where the two are tied."""
    layout = read_layout(folder)
    base = {canonical_name(layout, name): tensor for name, tensor in read_tensors(folder / "model.safetensors").items()}
    table = next(base[name] for name in TABLES if name in base)
    return {"lm_head.weight": table} | base


def test_a_session_opens_with_what_the_base_has(backend, session_of, folders, saved):
    family, names = saved
    session = session_of(family, **_fields(names))
    state, base = backend.state(session).adapter, _base_of(folders[family])
    whole = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    assert {name: tensor.shape for name, tensor in whole.items()} == whole_shapes(read_layout(folders[family]), names)
    assert all(np.array_equal(tensor, base[name]) for name, tensor in whole.items())
    # Which is no other model than the base, to the last bit, and what a run starts with.
    assert np.array_equal(backend.forward(session, BATCH), backend.forward(session_of(family), BATCH))
    start = initial_state(state, seed=0).adapter
    assert all(np.array_equal(start[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("window", [WINDOW, WITH_PADDING], ids=["rows", "rows with the padding token"])
def test_gradients_are_those_of_peft(backend, adapted, folders, saved, window):
    family, names = saved
    session, adapter = adapted(family, **_fields(names))
    metrics = backend.step(session, window, 0.0)
    norms, moments, _ = _trained_by_peft(folders[family], adapter, [window], [0.0])
    assert float(metrics.grad_norm) == pytest.approx(norms[0], rel=tolerances.GRADIENT)
    found = {
        name.removesuffix(".exp_avg"): moment
        for name, moment in backend.state(session).optimizer.items()
        if name.endswith(".exp_avg")
    }
    assert _relative(found, moments) <= tolerances.GRADIENT
    # Other numbers in one of them, by a ten thousandth, would show.
    name = next(name for name in adapter if ".lora_" not in name)
    nudged = adapter | {name: adapter[name] * np.float32(1 + 1e-4)}
    _, moments, _ = _trained_by_peft(folders[family], nudged, [window], [0.0])
    assert _relative(found, moments) > tolerances.GRADIENT


def test_steps_are_those_of_peft(backend, adapted, folders, saved):
    family, names = saved
    session, adapter = adapted(family, **_fields(names))
    rates = [RATE, RATE / 3, RATE, RATE / 2]
    metrics = [backend.step(session, WINDOW, rate) for rate in rates]
    norms, _, expected = _trained_by_peft(folders[family], adapter, [WINDOW] * 4, rates)
    assert [float(metric.grad_norm) for metric in metrics] == pytest.approx(norms, rel=tolerances.TRAJECTORY)
    found = backend.state(session).adapter
    assert _distance(found, expected, adapter) <= tolerances.TRAJECTORY
    # With one of them frozen it is another training.
    frozen = next(name for name in adapter if ".lora_" not in name)
    _, _, other = _trained_by_peft(folders[family], adapter, [WINDOW] * 4, rates, frozen=(frozen,))
    assert _distance(found, other, adapter) > 100 * tolerances.TRAJECTORY
    other = found | {frozen: adapter[frozen]}
    assert _distance(other, expected, adapter) > 100 * tolerances.TRAJECTORY


def test_qlora_gradients_are_those_of_peft_on_the_dequantised_base(backend, adapted, folders):
    names, spec = ("lm_head", "embed_tokens", "norm", "input_layernorm"), tiny.nf4_spec()
    session, adapter = adapted("qwen2", method="qlora", **_fields(names))
    metrics = backend.step(session, WINDOW, 0.0)
    norms, moments, _ = _trained_by_peft(
        folders["qwen2"],
        adapter,
        [WINDOW],
        [0.0],
        change=lambda _, weight: backend.dequantize(backend.quantize(weight, spec)),
    )
    assert float(metrics.grad_norm) == pytest.approx(norms[0], rel=tolerances.GRADIENT)
    optimizer = backend.state(session).optimizer
    assert _relative({name: optimizer[f"{name}.exp_avg"] for name in moments}, moments) <= tolerances.GRADIENT


@pytest.mark.parametrize("again", [False, True], ids=["layers kept", "layers computed again"])
def test_layers_that_are_computed_again_have_the_same_gradients(backend, adapted, again):
    norms = []
    for checkpointed in (False, again):
        session, _ = adapted("qwen3", modules_to_save=SAVED["qwen3, norms"][1], gradient_checkpointing=checkpointed)
        norms.append(float(backend.step(session, WINDOW, 0.0).grad_norm))
    assert norms[0] == pytest.approx(norms[1], rel=tolerances.ACCUMULATION)


def test_chunks_do_not_change_the_gradient_of_the_head(part, array, backend):
    generator = np.random.default_rng(3)
    hidden, head = generator.standard_normal((17, 8), np.float32), 3 * generator.standard_normal((31, 8), np.float32)
    targets = generator.integers(0, 31, 17)
    wide = torch.tensor(head).double().requires_grad_()
    scores = torch.tensor(hidden).double() @ wide.T
    torch.nn.functional.cross_entropy(scores, torch.tensor(targets), reduction="sum").backward()
    expected, loss = wide.grad.numpy(), part("loss").supervised_loss
    for chunk in (1, 5, 16, 17, 256):
        if backend.name == "torch":
            master = torch.tensor(head, requires_grad=True)
            loss(array(hidden), master, array(targets), chunk=chunk, trained=True).backward()
            found = master.grad.numpy()
        else:
            import jax

            found = np.array(jax.grad(loss, 1)(array(hidden), array(head), array(targets), chunk, trained=True))
        assert np.linalg.norm(found - expected) <= tolerances.GRADIENT * np.linalg.norm(expected)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_in_bfloat16_masters_and_their_gradients_stay_in_float32(backend, adapted, method):
    names = ("lm_head", "embed_tokens", "norm", "input_layernorm")
    gradients = []
    for dtype in ("float32", "bfloat16"):
        session, adapter = adapted("qwen2", method=method, dtype=dtype, **_fields(names))
        backend.step(session, WINDOW, 0.0)
        state = backend.state(session)
        assert all(np.array_equal(state.adapter[name], adapter[name]) for name in adapter)
        gradients.append({name: state.optimizer[f"{name}.exp_avg"] for name in adapter if ".lora_" not in name})
    far = _relative(gradients[1], gradients[0])
    assert tolerances.GRADIENT < far <= tolerances.BFLOAT16_GRADIENT
    # Steps far below bfloat16's own spacing are not lost.
    before = backend.state(session).adapter["lm_head.weight"]
    backend.step(session, WINDOW, 1e-6)
    moved = np.abs(backend.state(session).adapter["lm_head.weight"] - before)
    assert 0 < moved.max() <= 2e-6


def test_a_restored_session_goes_on_bit_for_bit(adapted, session_of, goes_on, saved):
    family, names = saved
    session, _ = adapted(family, **_fields(names))
    goes_on(session, lambda: session_of(family, **_fields(names)), WINDOW)


def test_a_state_without_them_is_refused_by_name_and_changes_nothing(backend, adapted):
    session, adapter = adapted("llama", modules_to_save=("norm", "lm_head"))
    before = backend.forward(session, BATCH)
    pairs = {name: tensor for name, tensor in adapter.items() if ".lora_" in name}
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        backend.restore(session, TrainingState(adapter=pairs, optimizer={}, step=0))
    wrong = adapter | {"model.norm.weight": adapter["model.norm.weight"][1:]}
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(47,\), expected \(48,\)"):
        backend.restore(session, TrainingState(adapter=wrong, optimizer={}, step=0))
    assert np.array_equal(backend.forward(session, BATCH), before)


def test_peft_opens_what_is_written_and_gives_the_same_logits(backend, adapted, folders, saved, tmp_path):
    family, names = saved
    session, adapter = adapted(family, **_fields(names))
    plan = tiny.plan_for(backend, folders[family], modules_to_save=names)
    write_adapter(tmp_path, adapter, plan)
    model = PeftModel.from_pretrained(references.open_model(folders[family]), tmp_path).eval()
    with torch.no_grad():
        expected = references.logits_of(model, BATCH).numpy()
    found = backend.forward(session, BATCH)
    far = np.abs(found - expected).max() / np.abs(expected).max()
    assert far <= tolerances.PEFTS_LOGITS
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == sorted({name.rpartition(".")[0] for name in adapter if ".lora_" not in name})
    # Pairs of one rank and one alpha are all that it could say.
    assert not (tmp_path / V3_MANIFEST).exists()
    # Read again it is what was written, and opened for use as any adapter of PEFT's.
    read = open_adapter(tmp_path)
    assert all(np.array_equal(tensor, adapter[name]) for name, tensor in read.trained().items())
    used = backend.open(with_whole(tiny.plan_for(backend, folders[family]), read), tiny.SHAPE)
    used = backend.restore(used, TrainingState(adapter=read.tensors(), optimizer={}, step=0))
    assert np.abs(backend.forward(used, BATCH) - found).max() / np.abs(found).max() <= tolerances.PEFTS_LOGITS
    # Without what is whole it is another model.
    plain = backend.open(tiny.plan_for(backend, folders[family]), tiny.SHAPE)
    plain = backend.restore(plain, TrainingState(adapter=read.tensors(), optimizer={}, step=0))
    assert np.abs(backend.forward(plain, BATCH) - found).max() / np.abs(found).max() > 100 * tolerances.PEFTS_LOGITS


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_likeliest_tokens_are_those_of_the_logits(backend, adapted, method):
    session, _ = adapted("qwen3", method=method, modules_to_save=("lm_head", "embed_tokens", "norm"))
    prompt = BATCH.input_ids[:5].tolist()
    answer = backend.generate(session, prompt, GenerateSettings(max_new_tokens=4, stop_tokens=()))
    ids = np.array([*prompt, *answer], np.int32)
    rows = tiny.packed([attrs.evolve(tiny.batch_of(len(ids)), input_ids=ids)])
    likeliest = backend.forward(session, rows).argmax(axis=1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == answer


COMMON = tiny.CONFIGS["qwen2"] | {"head_dim": 12}
# Embeddings that are scaled, logits that are capped, four norms a layer of 1 + weight; layers with joined linears.
TORCH_ALONE = {
    "mistral": (COMMON | {"sliding_window": 4}, ("lm_head", "embed_tokens", "norm")),
    "gemma2": (COMMON | {"sliding_window": 4}, ("lm_head", "embed_tokens", "norm", "pre_feedforward_layernorm")),
    "gemma3_text": (COMMON | {"sliding_window": 4}, ("embed_tokens", "q_norm", "input_layernorm")),
    "phi3": (COMMON, ("lm_head", "post_attention_layernorm")),
}


@pytest.mark.parametrize("model_type", TORCH_ALONE)
def test_graphs_that_torch_alone_builds_have_pefts_gradients(model_type, tmp_path):
    config, names = TORCH_ALONE[model_type]
    backend = load_backend("torch")
    tiny.write_model(tmp_path / "base", model_type, config)
    session = backend.open(tiny.plan_for(backend, tmp_path / "base", modules_to_save=names), tiny.SHAPE)
    adapter = tiny.random_adapter(backend.state(session).adapter)
    session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
    metrics = backend.step(session, WITH_PADDING, 0.0)
    norms, moments, _ = _trained_by_peft(tmp_path / "base", adapter, [WITH_PADDING], [0.0])
    assert float(metrics.grad_norm) == pytest.approx(norms[0], rel=tolerances.GRADIENT)
    optimizer = backend.state(session).optimizer
    assert _relative({name: optimizer[f"{name}.exp_avg"] for name in moments}, moments) <= tolerances.GRADIENT
