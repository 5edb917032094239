"""Modules that PEFT saved whole take the base's places when a model is opened for use."""

import attrs
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from peft import PeftModel
from peft_adapters import peft_adapter

from mens_core.artifacts.adapters import open_adapter
from mens_core.errors import GateError, ModelError
from mens_core.exchange import TrainingState
from mens_core.inference import with_whole

BATCH = tiny.batch_of(9, 5, 12)

# What is saved whole beside updates of other layers: tied heads in every way, an untied one, norms, a linear layer.
SAVED = {
    "gpt2, head": ("gpt2", ["lm_head"]),
    "gpt2, embeddings": ("gpt2", ["wte", "wpe"]),
    "gpt2, norm and a linear layer": ("gpt2", ["ln_f", "h.1.mlp.c_fc"]),
    "llama, both": ("llama", ["embed_tokens", "lm_head"]),
    "qwen2, head": ("qwen2", ["lm_head"]),
    "qwen2, embedding": ("qwen2", ["embed_tokens"]),
    "qwen2, both": ("qwen2", ["embed_tokens", "lm_head"]),
    "qwen3, every norm and a linear layer": ("qwen3", ["norm", "layers.0.self_attn.k_proj"]),
}


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """What is saved → the base's folder, the adapter's, and PEFT's logits."""
    found = {}

    def make(which):
        if which not in found:
            family, modules = SAVED[which]
            targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
            folder = tmp_path_factory.mktemp("made") / "adapter"
            peft_adapter(folders[family], folder, target_modules=targets, modules_to_save=modules)
            model = PeftModel.from_pretrained(references.open_model(folders[family]), folder).eval()
            with torch.no_grad():
                found[which] = folders[family], folder, references.logits_of(model, BATCH).numpy()
        return found[which]

    return make


@pytest.fixture
def logits(backend):
    """Of a model that is opened with an adapter."""

    def opened(base, adapter, **fields):
        plan = tiny.plan_for(backend, base, **adapter.settings(), targets=adapter.modules, **fields)
        session = backend.open(with_whole(plan, adapter), tiny.SHAPE)
        session = backend.restore(session, TrainingState(adapter=adapter.tensors(), optimizer={}, step=0))
        return backend.forward(session, BATCH)

    return opened


def _far(found, expected):
    """Largest difference, relative to the largest logit: random updates are as large as the weights."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("which", SAVED)
def test_what_peft_saved_whole_gives_its_logits(logits, made, which):
    base, folder, expected = made(which)
    adapter = open_adapter(folder)
    assert _far(logits(base, adapter), expected) <= tolerances.LOGITS
    # The updates alone, and what is whole in the place of one tensor less, are other models.
    for left_out in (*adapter.whole, None):
        whole = {name: tensor for name, tensor in adapter.whole.items() if left_out not in {name, None}}
        assert _far(logits(base, attrs.evolve(adapter, whole=whole)), expected) > 100 * tolerances.LOGITS


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda whole: {"model.norm.bias": whole["model.norm.weight"]}, "norm.bias, .* has no counterpart"),
        (lambda whole: {"model.norm.weight": whole["model.norm.weight"][1:]}, r"has shape \(47,\)"),
        (lambda whole: {"model.norm.weight": whole["model.norm.weight"] * np.nan}, "not finite"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_by_name(logits, made, change, problem):
    base, folder, _ = made("qwen3, every norm and a linear layer")
    adapter = open_adapter(folder)
    with pytest.raises(ModelError, match=problem):
        logits(base, attrs.evolve(adapter, whole=change(adapter.whole)))


def test_a_linear_layer_is_not_quantised_in_silence(logits, made):
    base, folder, _ = made("qwen3, every norm and a linear layer")
    with pytest.raises(ModelError, match=r"k_proj.*takes the place of a layer that is stored in NF4; --method lora"):
        logits(base, open_adapter(folder), method="qlora")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_on_an_nf4_base_they_are_as_exact_as_the_format_of_the_run(logits, made, dtype):
    base, folder, _ = made("qwen2, both")
    adapter = open_adapter(folder)
    found = logits(base, adapter, method="qlora", dtype=dtype)
    other = logits(base, attrs.evolve(adapter, whole={}), method="qlora", dtype=dtype)
    # A table of zeros in the head's place gives zeros whatever the base is.
    whole = adapter.whole | {"lm_head.weight": 0 * adapter.whole["lm_head.weight"]}
    assert not logits(base, attrs.evolve(adapter, whole=whole), method="qlora", dtype=dtype).any()
    assert _far(other, found) > 0.01


def test_a_backend_that_does_not_say_that_it_puts_them_in_is_not_given_them(backend, made):
    base, folder, _ = made("qwen3, every norm and a linear layer")
    adapter, plan = open_adapter(folder), tiny.plan_for(backend, base)
    silent = attrs.evolve(plan, offers=(attrs.evolve(plan.offer, whole=False),))
    with pytest.raises(GateError, match="does not say that it takes tensors trained whole, and the adapter holds 10"):
        with_whole(silent, adapter)
    assert with_whole(silent, attrs.evolve(adapter, whole={})) is silent
