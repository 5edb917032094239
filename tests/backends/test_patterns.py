"""Layers with ranks and scales of their own: PEFT's logits, PEFT's training, PEFT's files."""

import json

import attrs
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from peft import PeftModel
from peft_adapters import peft_adapter

from mens_core.artifacts.adapter import V3_MANIFEST, write_adapter
from mens_core.artifacts.adapters import open_adapter
from mens_core.contract import FineTuneContract
from mens_core.errors import ModelError
from mens_core.exchange import GenerateSettings, TrainingState

BATCH = tiny.batch_of(9, 5, 12)
WINDOW = [tiny.batch_of(9, 5, seed=1), tiny.batch_of(12, 3, 4, seed=2, supervised=0.9)]
RATE = 1e-2

# One name for all layers, one layer alone with a larger rank than its neighbour, and a scale that is another in one
# layer than in the other.
LLAMA = {
    "rank_pattern": (("q_proj", 2), (r"layers\.1\.mlp\.down_proj", 7)),
    "alpha_pattern": (("v_proj", 3.0), ("layers.0.mlp.up_proj", 5.0), ("down_proj", 6.0)),
}
GPT2 = {
    "rank_pattern": (("attn.c_attn", 2), (r"h\.1\.mlp\.c_fc", 7)),
    "alpha_pattern": (("attn.c_proj", 3.0), ("h.0.mlp.c_proj", 5.0), ("c_fc", 6.0)),
}
# Scale alpha / √rank; the others alpha / rank.
RANK_STABILISED = ("llama", "qwen3")


def _patterns(family):
    return GPT2 if family == "gpt2" else LLAMA


def _fields(family):
    return {**_patterns(family), "rslora": family in RANK_STABILISED}


def _pefts(family):
    """The same in PEFT's words."""
    patterns = {name: dict(pairs) for name, pairs in _patterns(family).items()}
    return {**patterns, "use_rslora": family in RANK_STABILISED}


def _with(backend, session, adapter):
    return backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))


def _far(found, expected):
    """Largest difference, relative to the largest logit: random updates are as large as the weights."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def made_by_peft(folders, tmp_path_factory):
    """Family → an adapter with patterns that PEFT made, and PEFT's logits."""
    made = {}

    def make(family):
        if family not in made:
            folder = peft_adapter(folders[family], tmp_path_factory.mktemp(family) / "peft", **_pefts(family))
            model = PeftModel.from_pretrained(references.open_model(folders[family]), folder).eval()
            with torch.no_grad():
                made[family] = folder, references.logits_of(model, BATCH).numpy()
        return made[family]

    return make


def test_an_adapter_of_pefts_with_patterns_gives_its_logits(backend, made_by_peft, folders, family):
    folder, expected = made_by_peft(family)
    adapter = open_adapter(folder)
    plan = tiny.plan_for(backend, folders[family], **adapter.settings())
    session = _with(backend, backend.open(plan, tiny.SHAPE), adapter.tensors())
    assert _far(backend.forward(session, BATCH), expected) <= tolerances.LOGITS
    # One layer's scale of another layer shows.
    tensors, ends = adapter.tensors(), ("0.mlp.up_proj.lora_B.weight", "0.mlp.c_proj.lora_B.weight")
    (name,) = [name for name in tensors if name.endswith(ends)]
    session = _with(backend, session, tensors | {name: tensors[name] * np.float32(12 / 5)})
    assert _far(backend.forward(session, BATCH), expected) > 100 * tolerances.LOGITS


def test_layers_are_named_one_by_one_where_pefts_words_no_longer_say_what_the_pairs_are(made_by_peft):
    adapter = open_adapter(made_by_peft("qwen2")[0])
    assert adapter.settings()["rank_pattern"] == dict(LLAMA["rank_pattern"])
    pairs = dict(zip(adapter.modules, adapter.pairs.values(), strict=True))
    changed = attrs.evolve(adapter, config=adapter.config | {"alpha_pattern": {}}).settings()
    assert changed["rank_pattern"] == {path: pair.rank for path, pair in pairs.items() if pair.rank != 4}
    held = FineTuneContract.from_fields(trains=False, **changed).adapter
    assert all((held.rank_of(path), held.scale_of(path)) == (pair.rank, pair.scale) for path, pair in pairs.items())


def test_states_have_the_shapes_of_pefts_tensors(backend, session_of, made_by_peft, family):
    state = backend.state(session_of(family, **_fields(family)))
    expected = {name: tensor.shape for name, tensor in open_adapter(made_by_peft(family)[0]).tensors().items()}
    assert {name: array.shape for name, array in state.adapter.items()} == expected
    assert len({shape[0] for name, shape in expected.items() if "lora_A" in name}) == 3


def test_a_state_of_one_rank_is_refused(backend, session_of):
    session = session_of("llama", **_fields("llama"))
    usual = backend.state(session_of("llama")).adapter
    with pytest.raises(ModelError, match=r"q_proj\.lora_A\.weight has shape \(4, 48\), expected \(2, 48\)"):
        _with(backend, session, usual)


def test_peft_opens_what_is_written_and_gives_the_same_logits(backend, adapted, folders, family, tmp_path):
    session, adapter = adapted(family, **_fields(family))
    write_adapter(tmp_path, adapter, tiny.plan_for(backend, folders[family], **_fields(family)))
    model = PeftModel.from_pretrained(references.open_model(folders[family]), tmp_path).eval()
    with torch.no_grad():
        expected = references.logits_of(model, BATCH).numpy()
    assert np.abs(backend.forward(session, BATCH) - expected).max() <= tolerances.LOGITS
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: config[name] for name in _pefts(family)} == _pefts(family)
    # One rank and one alpha are all that it could say.
    assert not (tmp_path / V3_MANIFEST).exists()


def _trained_by_peft(folder, adapter, **settings):
    model = references.open_model(folder)
    model, parameters = references.with_adapter(model, adapter, rank=4, alpha=8.0, **settings)
    rates = [RATE, RATE / 3, RATE]
    norms, optimizer = references.train(
        model, parameters, [WINDOW] * len(rates), rates=rates, max_grad_norm=1.0, weight_decay=0.1
    )
    first = {name: optimizer.state[parameter]["exp_avg"].numpy() for name, parameter in parameters.items()}
    return norms, first, {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def _distance(found, expected, start):
    """Relative to the distance moved."""
    assert set(found) == set(expected)
    apart = sum(np.square(found[name] - expected[name], dtype=np.float64).sum() for name in found)
    moved = sum(np.square(expected[name] - start[name], dtype=np.float64).sum() for name in found)
    return np.sqrt(apart / moved)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_steps_with_patterns_are_those_of_peft(backend, adapted, folders, family):
    session, adapter = adapted(family, max_grad_norm=1.0, weight_decay=0.1, **_fields(family))
    norms = [float(backend.step(session, WINDOW, rate).grad_norm) for rate in (RATE, RATE / 3, RATE)]
    found = backend.state(session)
    expected_norms, moments, expected = _trained_by_peft(folders[family], adapter, **_pefts(family))
    assert norms == pytest.approx(expected_norms, rel=tolerances.TRAJECTORY)
    assert _distance(found.adapter, expected, adapter) <= tolerances.TRAJECTORY
    for name, moment in moments.items():
        assert found.optimizer[f"{name}.exp_avg"].shape == moment.shape
    # Without the alphas of their own it is another training.
    without = {**_pefts(family), "alpha_pattern": {}}
    _, _, other = _trained_by_peft(folders[family], adapter, **without)
    assert _distance(found.adapter, other, adapter) > 100 * tolerances.TRAJECTORY


def test_a_restored_session_goes_on_bit_for_bit(adapted, session_of, goes_on):
    fields = {"weight_decay": 0.1, **_fields("qwen2")}
    session, _ = adapted("qwen2", **fields)
    goes_on(session, lambda: session_of("qwen2", **fields), WINDOW)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_likeliest_tokens_of_a_session_with_patterns_are_those_of_its_logits(backend, adapted, method):
    session, _ = adapted("qwen3", method=method, **_fields("qwen3"))
    prompt = BATCH.input_ids[:5].tolist()
    answer = backend.generate(session, prompt, GenerateSettings(max_new_tokens=4, stop_tokens=()))
    ids = np.array([*prompt, *answer], np.int32)
    rows = tiny.packed([attrs.evolve(tiny.batch_of(len(ids)), input_ids=ids)])
    likeliest = backend.forward(session, rows).argmax(axis=1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == answer


def test_dropout_scales_every_layer_by_its_own(backend, adapted):
    fields = _fields("llama")
    session, adapter = adapted("llama", dropout=0.3, **fields)
    found = float(backend.step(session, WINDOW, 0.0).loss_sum)
    # Another alpha in the one layer that has its own is as another B there, under the same masks.
    alphas = (*fields["alpha_pattern"][:1], ("layers.0.mlp.up_proj", 10.0), *fields["alpha_pattern"][2:])
    session, _ = adapted("llama", dropout=0.3, **fields | {"alpha_pattern": alphas})
    name = "model.layers.0.mlp.up_proj.lora_B.weight"
    session = _with(backend, session, adapter | {name: adapter[name] / 2})
    assert float(backend.step(session, WINDOW, 0.0).loss_sum) == pytest.approx(found, rel=tolerances.LOSS)
    session = _with(backend, session, adapter)
    assert float(backend.step(session, WINDOW, 0.0).loss_sum) != pytest.approx(found, rel=100 * tolerances.LOSS)


def test_in_bfloat16_layers_keep_their_scales(backend, adapted):
    losses = []
    for dtype in ("float32", "bfloat16"):
        session, _ = adapted("llama", dtype=dtype, **_fields("llama"))
        losses.append(backend.loss(session, BATCH)[0])
    without = _fields("llama") | {"alpha_pattern": ()}
    session, _ = adapted("llama", dtype="float32", **without)
    assert losses[1] == pytest.approx(losses[0], rel=tolerances.BFLOAT16_LOSS)
    assert losses[1] != pytest.approx(backend.loss(session, BATCH)[0], rel=tolerances.BFLOAT16_LOSS)
