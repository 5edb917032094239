"""The key map: tensors are those of transformers' own models, and the inventory's names are the runbook's."""

import json

import attrs
import pytest

from mens_core.errors import ModelError
from mens_core.hf.blocks import (
    filter_keys_in_shard,
    inventory_names,
    layer_attention_weight_keys,
    layer_mlp_weight_keys,
    layer_norm_weight_keys,
    layer_rope_weight_keys,
    middle_block_projection_key,
    missing_middle_keys_report,
    ordered_full_block_weight_keys,
    ordered_full_block_weight_keys_strict_preflight,
    ordered_middle_projection_keys,
    sample_present_keys_sorted_from_present,
)
from mens_core.hf.inventory import Coverage, middle_coverage
from mens_core.hf.keymap import canonical_name, linear_shapes, tensor_shapes
from mens_core.hf.layout import FAMILIES, GRAPHS, read_layout

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 50}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
VARIANTS = [
    ("gpt2", {}),
    ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    ("mistral", {}),
    ("mistral", {"tie_word_embeddings": True, "head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "mlp_bias": True}),
    ("qwen3", {"head_dim": 24}),
    ("qwen3", {"attention_bias": True, "head_dim": 8, "tie_word_embeddings": True}),
    ("gemma2", {"head_dim": 12}),
    ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
    ("gemma3_text", {"head_dim": 12}),
    ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}),
    ("phi3", {"pad_token_id": 0}),
    ("phi3", {"pad_token_id": 0, "head_dim": 10, "tie_word_embeddings": True}),
    ("qwen3_5_text", LINEAR),
    ("qwen3_5_text", LINEAR | {"layer_types": ["full_attention", "linear_attention"] * 2, "attention_bias": True}),
    ("qwen3_5", LINEAR),
    ("qwen3_5", LINEAR | {"tie_word_embeddings": True}),
]
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def config_of(model_type, changes):
    """A config as transformers itself makes it."""
    from transformers import AutoConfig

    values = (GPT2 if model_type == "gpt2" else LLAMA) | changes
    if model_type == "qwen3_5":
        values = {"text_config": values, "vision_config": VISION}
    return AutoConfig.for_model(model_type, **values)


def model_of(model_type, changes):
    """The causal language model of transformers, without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(model_type, changes))


def layout_of(folder, config):
    """The layout of a config, given as a dict or as transformers' object."""
    if isinstance(config, dict):
        (folder / "config.json").write_text(json.dumps(config))
    else:
        config.to_json_file(folder / "config.json", use_diff=False)
    return read_layout(folder)


# --- against transformers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: f"{variant[0]}-{'-'.join(variant[1])}"[:60])
def known(request, tmp_path_factory):
    """A layout, and the model that transformers builds from the same config."""
    model_type, changes = request.param
    layout = layout_of(tmp_path_factory.mktemp("config"), config_of(model_type, changes))
    return layout, model_of(model_type, changes)


def test_every_family_is_tried_with_tied_and_untied_heads():
    assert {model_type for model_type, _ in VARIANTS} == set(FAMILIES)
    assert set(GRAPHS) <= set(FAMILIES)


def test_tensor_names_and_shapes_are_those_of_transformers(known):
    layout, model = known
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert layout.tied == model.config.tie_word_embeddings
    if layout.tied:
        del expected["lm_head.weight"]
    assert tensor_shapes(layout) == expected


def test_linear_layers_are_those_of_transformers_less_the_head(known):
    import torch
    from transformers.pytorch_utils import Conv1D

    layout, model = known
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            shapes[name] = tuple(module.weight.shape[::-1])
        elif isinstance(module, torch.nn.Linear) and name != "lm_head":
            shapes[name] = tuple(module.weight.shape)
    assert linear_shapes(layout) == shapes


def test_the_strict_inventory_is_what_transformers_keeps_in_its_blocks_less_biases_and_head_norms(known):
    layout, model = known
    stored = inventory_names(layout, model.state_dict())
    blocks = {name for name in stored if name.startswith(f"{layout.namespace_prefix}.")}
    norm_biases = {key for n in range(layout.num_layers) for key in layer_norm_weight_keys(layout, n)}
    uncounted = {name for name in blocks if name.endswith((".bias", "q_norm.weight", "k_norm.weight"))} - norm_biases
    assert set(ordered_full_block_weight_keys_strict_preflight(layout)) == blocks - uncounted


def test_a_name_as_transformers_has_it_stays_as_it_is(known):
    layout, model = known
    assert all(canonical_name(layout, name) == name for name in model.state_dict())


def test_the_base_models_names_of_gpt2_are_canonical_names_without_their_prefix(tmp_path):
    from transformers import GPT2Model

    config = config_of("gpt2", {})
    layout = layout_of(tmp_path, config)
    names = list(GPT2Model(config).state_dict())
    assert {canonical_name(layout, name) for name in names} == set(tensor_shapes(layout))
    assert canonical_name(layout, "lm_head.weight") == "lm_head.weight"
    assert middle_coverage(layout, names, "qlora") == Coverage(True, True, 2, 2)
    with_prefix = [f"transformer.{name}" for name in names]
    assert middle_coverage(layout, with_prefix, "qlora") == Coverage(True, True, 2, 2)


def test_a_multimodal_folder_of_qwen3_5_covers_the_decoder_whichever_namespace_it_uses(tmp_path):
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    config = config_of("qwen3_5", LINEAR)
    layout = layout_of(tmp_path, config)
    with torch.device("meta"):
        names = list(Qwen3_5ForConditionalGeneration(config).state_dict())
    assert "model.language_model.layers.3.self_attn.o_proj.weight" in names
    assert set(tensor_shapes(layout)) <= {canonical_name(layout, name) for name in names}
    for stored in (names, tensor_shapes(layout)):
        assert middle_coverage(layout, stored, "qlora") == Coverage(True, True, 4, 4)
        assert set(ordered_full_block_weight_keys_strict_preflight(layout)) <= inventory_names(layout, stored)


# --- the runbook's names ----------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path):
    return layout_of(tmp_path, {"model_type": "gpt2", "n_embd": 64, "n_head": 2, "n_layer": 1, "vocab_size": 100})


@pytest.fixture
def qwen2(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    return layout_of(tmp_path, {"model_type": "qwen2", "num_hidden_layers": 2, **sizes})


@pytest.fixture
def qwen3_5(tmp_path):
    text = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    text |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    return layout_of(tmp_path, {"model_type": "qwen3_5", "text_config": text})


def test_the_middle_key_of_gpt2_is_its_output_projection(gpt2):
    assert middle_block_projection_key(gpt2, 0) == "h.0.attn.c_proj.weight"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_the_middle_key_of_families_like_llama_is_o_proj(model_type, tmp_path):
    layout = layout_of(tmp_path, {"model_type": model_type, **LLAMA})
    assert middle_block_projection_key(layout, 1) == "model.layers.1.self_attn.o_proj.weight"


def test_the_middle_keys_of_two_layers_come_in_their_order(qwen2):
    assert ordered_middle_projection_keys(qwen2) == (
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    )


def test_the_middle_key_of_qwen3_5_follows_the_layers_type(qwen3_5):
    assert ordered_middle_projection_keys(qwen3_5) == (
        "model.language_model.layers.0.linear_attn.out_proj.weight",
        "model.language_model.layers.1.self_attn.o_proj.weight",
    )


def test_a_text_only_qwen3_5_has_the_shorter_namespace(tmp_path):
    layout = layout_of(tmp_path, {"model_type": "qwen3_5_text", **LLAMA})
    assert middle_block_projection_key(layout, 1) == "model.layers.1.linear_attn.out_proj.weight"


def test_the_full_block_of_gpt2_has_its_four_linears_and_its_norms_with_bias(gpt2):
    assert ordered_full_block_weight_keys(gpt2) == (
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.weight",
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
        "h.0.ln_1.weight",
        "h.0.ln_1.bias",
        "h.0.ln_2.weight",
        "h.0.ln_2.bias",
    )
    assert ordered_full_block_weight_keys_strict_preflight(gpt2) == ordered_full_block_weight_keys(gpt2)


def test_the_full_block_of_qwen2_has_attention_feed_forward_rotary_table_and_norms(qwen2):
    block = [key.removeprefix("model.layers.0.") for key in ordered_full_block_weight_keys(qwen2)[:10]]
    assert block == [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "self_attn.rotary_emb.inv_freq",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]


def test_the_groups_of_a_linear_attention_layer_are_the_runbooks(qwen3_5):
    prefix = "model.language_model.layers.0"
    names = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "conv1d"]
    assert layer_attention_weight_keys(qwen3_5, 0) == (
        *(f"{prefix}.linear_attn.{name}.weight" for name in names),
        f"{prefix}.linear_attn.dt_bias",
        f"{prefix}.linear_attn.A_log",
        f"{prefix}.linear_attn.norm.weight",
    )
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert layer_mlp_weight_keys(qwen3_5, 0) == tuple(f"{prefix}.mlp.{name}.weight" for name in mlp)
    assert layer_rope_weight_keys(qwen3_5, 0) == (f"{prefix}.linear_attn.rotary_emb.inv_freq",)
    norms = ("input_layernorm", "post_attention_layernorm")
    assert layer_norm_weight_keys(qwen3_5, 0) == tuple(f"{prefix}.{name}.weight" for name in norms)


def test_the_strict_list_leaves_out_the_rotary_table_of_every_layer_in_every_family(qwen2, qwen3_5):
    for layout in (qwen2, qwen3_5):
        full, strict = ordered_full_block_weight_keys(layout), ordered_full_block_weight_keys_strict_preflight(layout)
        assert len(full) - len(strict) == 2
        assert not any("inv_freq" in key for key in strict)


def test_the_report_of_missing_keys_keeps_the_layers_order_and_its_length_but_tells_at_least_one(qwen2):
    first, second = ordered_middle_projection_keys(qwen2)
    assert missing_middle_keys_report(qwen2, [], 32) == (first, second)
    assert missing_middle_keys_report(qwen2, [], 1) == missing_middle_keys_report(qwen2, [], 0) == (first,)
    assert missing_middle_keys_report(qwen2, [first]) == (second,)
    assert missing_middle_keys_report(qwen2, [second, first]) == ()


def test_keys_of_a_shard_keep_their_order_and_samples_are_sorted(qwen2):
    first, second = ordered_middle_projection_keys(qwen2)
    assert filter_keys_in_shard([second, first, "other"], {first, second}) == (second, first)
    assert sample_present_keys_sorted_from_present({"c", "a", "b"}, 2) == ("a", "b")
    assert len(sample_present_keys_sorted_from_present(map(str, range(99)))) == 24


def test_coverage_counts_all_some_and_none(qwen2):
    first, second = ordered_middle_projection_keys(qwen2)
    assert middle_coverage(qwen2, [first, second, "x"], "qlora") == Coverage(True, True, 2, 2)
    assert middle_coverage(qwen2, [second], "qlora") == Coverage(True, False, 1, 2)
    assert middle_coverage(qwen2, ["model.embed_tokens.weight"], "qlora") == Coverage(True, False, 0, 2)
    assert middle_coverage(attrs.evolve(qwen2, num_layers=0), [], "qlora") == Coverage(True, None, 0, 0)
    assert middle_coverage(qwen2, [first, second], "lora") == Coverage(False, None, None, None)


def test_an_unknown_family_is_never_taken_for_gpt2(tmp_path):
    layout = layout_of(tmp_path, {"model_type": "mamba7", "architectures": ["GPT2LMHeadModel"], **GPT2})
    assert (layout.family, layout.namespace_prefix) == (None, None)
    assert middle_coverage(layout, ["h.0.attn.c_proj.weight"], "qlora") == Coverage(False, None, None, None)
    answers = [
        linear_shapes,
        tensor_shapes,
        ordered_full_block_weight_keys,
        ordered_full_block_weight_keys_strict_preflight,
        ordered_middle_projection_keys,
        lambda layout: middle_block_projection_key(layout, 0),
        lambda layout: layer_attention_weight_keys(layout, 0),
        lambda layout: layer_mlp_weight_keys(layout, 0),
        lambda layout: layer_rope_weight_keys(layout, 0),
        lambda layout: layer_norm_weight_keys(layout, 0),
        lambda layout: inventory_names(layout, []),
        lambda layout: missing_middle_keys_report(layout, []),
    ]
    for answer in answers:
        with pytest.raises(ModelError, match="mamba7") as caught:
            answer(layout)
        assert "qwen3_5_text" in str(caught.value)
        assert "AutoModelForCausalLM" in str(caught.value)
