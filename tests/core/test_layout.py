"""Layouts and key maps: the names and shapes of a family are those of transformers' own model."""

import json

import pytest

from mens_core.errors import ModelError
from mens_core.hf.keymap import canonical_name, linear_shapes, tensor_shapes
from mens_core.hf.layout import FAMILIES, read_layout

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 50}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}
VARIANTS = [
    ("gpt2", {}),
    ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 24}),
    ("qwen3", {"attention_bias": True, "head_dim": 8}),
]


def _reference(model_type, changes):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **((GPT2 if model_type == "gpt2" else LLAMA) | changes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_tensor_names_and_shapes_are_those_of_transformers(model_type, changes, tmp_path):
    model = _reference(model_type, changes)
    model.config.to_json_file(tmp_path / "config.json", use_diff=False)
    layout = read_layout(tmp_path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if layout.tied:
        del expected["lm_head.weight"]
    assert tensor_shapes(layout) == expected


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_linear_layers_are_those_of_transformers_less_the_head(model_type, changes, tmp_path):
    import torch
    from transformers.pytorch_utils import Conv1D

    model = _reference(model_type, changes)
    model.config.to_json_file(tmp_path / "config.json", use_diff=False)
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            shapes[name] = tuple(module.weight.shape[::-1])
        elif isinstance(module, torch.nn.Linear) and name != "lm_head":
            shapes[name] = tuple(module.weight.shape)
    assert linear_shapes(read_layout(tmp_path)) == shapes


def _write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_gpt2_names_without_their_prefix_get_it_back(tmp_path):
    layout = read_layout(_write(tmp_path, {"model_type": "gpt2", **GPT2}))
    assert canonical_name(layout, "h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"
    assert canonical_name(layout, "transformer.wte.weight") == "transformer.wte.weight"
    assert canonical_name(layout, "lm_head.weight") == "lm_head.weight"


def test_an_unknown_model_type_has_no_family_and_no_key_map(tmp_path):
    layout = read_layout(_write(tmp_path, {"model_type": "mamba7", **LLAMA}))
    assert layout.family is None
    with pytest.raises(ModelError, match="mamba7"):
        tensor_shapes(layout)


@pytest.mark.parametrize("model_type", ["bloom", "mamba", "gptj", "opt", "falcon", "gpt_neox"])
def test_models_the_core_does_not_know_are_read_far_enough_to_ask_a_backend(model_type, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    layout = read_layout(tmp_path)
    assert layout.family is None
    assert (layout.hidden_size, layout.num_layers) == (config.hidden_size, config.num_hidden_layers)
    assert layout.vocab_size == config.vocab_size


def test_both_spellings_of_the_rotary_parameters_mean_the_same(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0}
    older = {"model_type": "llama", **LLAMA, "rope_theta": 5e5, "rope_scaling": scaling}
    newer = {"model_type": "llama", **LLAMA, "rope_parameters": {"rope_theta": 5e5, **scaling}}
    oldest = {"model_type": "llama", **LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    found = [read_layout(_write(tmp_path, config)).rope for config in (older, newer, oldest)]
    assert found[0] == found[1] == found[2] == {"rope_theta": 5e5, **scaling}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", **LLAMA, "hidden_size": 0}, "no usable hidden_size"),
        ({"model_type": "llama", **LLAMA, "vocab_size": "many"}, "no usable vocab_size"),
        ({"model_type": "llama", **LLAMA, "num_key_value_heads": 3}, "do not divide"),
        ({"model_type": "gpt2", **GPT2, "n_head": 5}, "not a multiple"),
        ({"model_type": "gpt2"}, "no usable n_embd"),
        ({"hidden_size": 3}, "does not name a model_type"),
        ([1, 2], "does not name a model_type"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_key(config, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        read_layout(_write(tmp_path, config))


def test_a_missing_or_malformed_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json.*architecture cannot be validated"):
        read_layout(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_layout(tmp_path)


def test_every_family_is_tried():
    assert {model_type for model_type, _ in VARIANTS} == set(FAMILIES)
