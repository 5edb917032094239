"""config.json → Layout: what a config means, and that one which cannot be is refused by file, key and value."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mens_core.errors import ModelError
from mens_core.hf.layout import FAMILIES, LinearAttention, read_layout

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 50}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}
LLAMA = {"model_type": "llama", **SIZES}
QWEN3_5 = {"model_type": "qwen3_5", "text_config": SIZES}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- what a config means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("layers", [2, 13])
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type, layers, tmp_path):
    from transformers import AutoConfig

    # The heads are so many because Qwen's default is 32 of keys and values.
    required = {"hidden_size": 64, "num_attention_heads": 32, "num_hidden_layers": layers, "vocab_size": 50}
    spelled = {"gpt2": {"n_embd": 64, "n_head": 32, "n_layer": layers, "vocab_size": 50}}.get(model_type, required)
    given_ = {"text_config": spelled} if model_type == "qwen3_5" else spelled
    layout = read_layout(write(tmp_path, {"model_type": model_type, **given_}))
    config = AutoConfig.for_model(model_type, **given_).get_text_config()
    keys = "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "tie_word_embeddings"
    ours = layout.num_kv_heads, layout.head_dim, layout.intermediate_size, layout.max_positions, layout.tied
    for key, number in zip(keys, ours, strict=True):
        # None stands for a rule that is the same in every family.
        if getattr(config, key, None) is not None:
            assert (key, number) == (key, getattr(config, key))
    assert layout.norm_eps == (config.layer_norm_epsilon if model_type == "gpt2" else config.rms_norm_eps)
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    assert layout.layer_types == tuple(types)
    if model_type.startswith("qwen3_5"):
        keys = "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim"
        numbers = [getattr(config, f"linear_{key}") for key in keys]
        assert layout.linear == LinearAttention(
            key_heads=numbers[0],
            value_heads=numbers[1],
            key_head_dim=numbers[2],
            value_head_dim=numbers[3],
            conv_kernel=numbers[4],
        )
    else:
        assert layout.linear is None


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True}),
        ("gemma3_text", {"sliding_window_pattern": 2}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}),
        ("qwen3_5_text", {"full_attention_interval": 2}),
    ],
)
def test_layer_types_follow_the_familys_own_rule(model_type, changes, tmp_path):
    from transformers import AutoConfig

    layout = read_layout(write(tmp_path, {"model_type": model_type, **SIZES, **changes}))
    assert list(layout.layer_types) == AutoConfig.for_model(model_type, **SIZES, **changes).layer_types


@pytest.mark.parametrize("model_type", ["bloom", "mamba", "gptj", "opt", "falcon", "gpt_neox"])
def test_models_the_core_does_not_know_are_read_far_enough_to_ask_a_backend(model_type, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    layout = read_layout(tmp_path)
    assert layout.family is None
    assert (layout.hidden_size, layout.num_layers) == (config.hidden_size, config.num_hidden_layers)
    assert layout.vocab_size == config.vocab_size


def test_the_decoder_of_a_multimodal_model_is_read_from_its_part_of_the_config(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    layout = read_layout(write(tmp_path, {"model_type": "gemma3", "architectures": ["G"], "text_config": text}))
    assert (layout.model_type, layout.family, layout.architectures) == ("gemma3", None, ("G",))
    assert (layout.hidden_size, layout.num_layers, layout.vocab_size) == (2560, 34, 262208)
    assert layout.rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_whether_a_nested_decoder_is_tied_is_said_inside_as_in_transformers(outside, inside, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {**SIZES, "tie_word_embeddings": inside}
    config = {"model_type": "qwen3_5", "tie_word_embeddings": outside, "text_config": text}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert read_layout(write(tmp_path, config)).tied == (model.lm_head.weight is model.model.embed_tokens.weight)


def test_both_spellings_of_the_rotary_parameters_mean_the_same(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0}
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling}
    newer = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, **scaling}}
    oldest = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    nested = {**QWEN3_5, "text_config": SIZES | {"rope_parameters": {"rope_theta": 5e5, **scaling}}}
    found = [read_layout(write(tmp_path, config)).rope for config in (older, newer, oldest, nested)]
    assert found == [{"rope_theta": 5e5, **scaling}] * 4


def test_heads_of_odd_width_that_follow_from_other_numbers_are_read(tmp_path):
    """The runbook's strict preflight has such a model; a backend that rotates pairs says no by itself."""
    config = {"model_type": "qwen2", "hidden_size": 7, "num_attention_heads": 1, "num_key_value_heads": 1}
    assert read_layout(write(tmp_path, {**config, "num_hidden_layers": 2, "vocab_size": 5})).head_dim == 7


# --- configs that cannot be -------------------------------------------------------------------------------------

WRONG = {
    "zero": (LLAMA | {"hidden_size": 0}, "no usable hidden_size: 0"),
    "negative": (LLAMA | {"num_hidden_layers": -1}, "no usable num_hidden_layers: -1"),
    "a truth value": (LLAMA | {"vocab_size": True}, "no usable vocab_size: True"),
    "a text": (LLAMA | {"vocab_size": "many"}, "no usable vocab_size: 'many'"),
    "a float": (LLAMA | {"intermediate_size": 48.0}, r"no usable intermediate_size: 48\.0"),
    "NaN": (LLAMA | {"num_attention_heads": float("nan")}, "no usable num_attention_heads: nan"),
    "huge": (LLAMA | {"head_dim": 10**40}, "no usable head_dim: 1000"),
    "a million layers": (LLAMA | {"num_hidden_layers": 10**6}, "no usable num_hidden_layers: 1000000"),
    "missing": ({"model_type": "llama"}, "(?s)hidden_size: None.*num_attention_heads: None.*vocab_size: None"),
    "missing in GPT-2's spelling": ({"model_type": "gpt2"}, "no usable n_embd"),
    "contradicting spellings": (GPT2 | {"hidden_size": 64}, "n_embd and hidden_size contradict each other"),
    "epsilon of NaN": (LLAMA | {"rms_norm_eps": float("nan")}, "no usable rms_norm_eps: nan"),
    "epsilon as text": (LLAMA | {"rms_norm_eps": "1e-5"}, "no usable rms_norm_eps"),
    "a flag as text": (LLAMA | {"tie_word_embeddings": "false"}, "no usable tie_word_embeddings: 'false'"),
    "heads that do not divide": (LLAMA | {"num_key_value_heads": 3}, "do not divide into num_key_value_heads 3"),
    "a width that does not divide": (LLAMA | {"hidden_size": 34}, "hidden_size 34 is not a multiple"),
    "the same of GPT-2": (GPT2 | {"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
    "odd heads": (LLAMA | {"head_dim": 7}, "no usable head_dim: 7"),
    "rope that is a list": (LLAMA | {"rope_scaling": [1]}, "no usable rope_scaling"),
    "rope of infinite period": (LLAMA | {"rope_theta": float("inf")}, "no usable rope_theta: inf"),
    "rope of a type by number": (LLAMA | {"rope_parameters": {"rope_type": 3}}, "no usable rope_type: 3"),
    "architectures by number": (LLAMA | {"architectures": [1]}, r"no usable architectures: \[1\]"),
    "too few layer types": (LLAMA | {"layer_types": ["full_attention"]}, "layer_types has 1 entries, .* is 2"),
    "no text_config": ({"model_type": "qwen3_5", **SIZES}, "no usable text_config: None"),
    "text_config as list": ({"model_type": "qwen3_5", "text_config": [SIZES]}, "no usable text_config"),
    "a strange layer": (
        {"model_type": "qwen3_5_text", **SIZES, "layer_types": ["full_attention", "conv"]},
        r"no usable layer_types: \['conv', 'full_attention'\]",
    ),
    "linear attention in another family": (LLAMA | {"layer_types": ["linear_attention"] * 2}, "no linear_attention in"),
    "linear heads that do not divide": (
        {"model_type": "qwen3_5_text", **SIZES, "linear_num_value_heads": 20},
        "linear_num_value_heads 20 do not divide",
    ),
    "no model_type": ({"hidden_size": 3}, "does not name a model_type"),
    "a list as model_type": (LLAMA | {"model_type": ["llama"]}, "does not name a model_type"),
    "no object": ([1, 2], "does not name a model_type"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_cannot_be_is_refused_by_file_key_and_value(case, tmp_path):
    config, message = WRONG[case]
    with pytest.raises(ModelError, match=message) as caught:
        read_layout(write(tmp_path, config))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_all_problems_of_a_config_are_told_together(tmp_path):
    config = LLAMA | {"hidden_size": 0, "vocab_size": -3, "rope_theta": "high", "mlp_bias": 1}
    with pytest.raises(ModelError, match="4 problems") as caught:
        read_layout(write(tmp_path, config))
    assert all(key in str(caught.value) for key in ("hidden_size", "vocab_size", "rope_theta", "mlp_bias"))


UNREADABLE = {
    "cut short": (b"{", "cannot be read"),
    "not UTF-8": (b'{"model_type": "\xff"}', "utf-8"),
    "UTF-16": ('{"model_type": "llama"}'.encode("utf-16"), "utf-8"),
    "empty": (b"", "cannot be read"),
    "nested without end": (b'{"model_type": "llama", "a": ' + b"[" * 100_000, "nests too deep"),
    "nested deeper than tools walk": (b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}", "nests too deep"),
    "a key twice": (b'{"model_type": "llama", "model_type": "gpt2"}', "a key occurs twice"),
    "a number of many digits": (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "digits"),
    "millions of parts": (b"[" + b"1," * 2_000_001 + b"1]", "too many parts"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_config_is_refused_by_name(case, tmp_path):
    raw, message = UNREADABLE[case]
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ModelError, match=message) as caught:
        read_layout(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json.*architecture cannot be validated"):
        read_layout(tmp_path)


def test_a_folder_or_a_pipe_in_place_of_the_config_is_refused_at_once(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match="not a regular file"):
        read_layout(tmp_path)
    (tmp_path / "config.json").rmdir()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match="not a regular file"):
        read_layout(tmp_path)


def test_a_config_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    write(tmp_path, LLAMA)

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", forbidden)
    with pytest.raises(ModelError, match="Permission denied"):
        read_layout(tmp_path)


# --- any config -------------------------------------------------------------------------------------------------

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 9) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OWN_KEYS = [
    "model_type",
    "architectures",
    "text_config",
    "layer_types",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "full_attention_interval",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "n_embd",
    "n_inner",
    "n_head",
]
ROPE = st.dictionaries(st.sampled_from(["type", "rope_type", "rope_theta", "factor", "full_attention"]), ANY_JSON)
TYPES = st.lists(st.sampled_from(["full_attention", "sliding_attention", "linear_attention", "conv"]), max_size=3)
CHANGES = st.dictionaries(st.sampled_from([*OWN_KEYS, *SIZES]), ANY_JSON | ROPE | TYPES, max_size=4)


def read_whatever(folder, config):
    """The layout with its invariants checked, or None for a ModelError; anything else is let through."""
    try:
        layout = read_layout(write(folder, config))
    except ModelError as error:
        assert "config.json" in str(error)  # noqa: PT017
        return None
    counts = [
        layout.hidden_size,
        layout.num_layers,
        layout.num_heads,
        layout.num_kv_heads,
        layout.head_dim,
        layout.intermediate_size,
        layout.vocab_size,
        layout.max_positions,
    ]
    assert all(type(count) is int and count > 0 for count in counts)
    assert layout.num_heads % layout.num_kv_heads == 0
    assert len(layout.layer_types) == layout.num_layers
    assert 0 < layout.norm_eps < 1
    assert {type(flag) for flag in (layout.tied, layout.attention_bias, layout.output_bias, layout.mlp_bias)} == {bool}
    assert layout.linear is None or layout.linear.value_heads % layout.linear.key_heads == 0
    assert isinstance(layout.rope, dict)
    return layout


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, model_type=st.sampled_from([*FAMILIES, "gemma3", "mamba7"]), nested=st.booleans())
def test_any_values_give_a_layout_that_holds_or_a_model_error(tmp_path, changes, model_type, nested):
    from mens_core.hf.blocks import ordered_full_block_weight_keys
    from mens_core.hf.keymap import tensor_shapes

    sizes = (GPT2 if model_type == "gpt2" else SIZES) | changes
    config = {"model_type": model_type, "text_config": sizes} if nested else {"model_type": model_type, **sizes}
    layout = read_whatever(tmp_path, config)
    if layout is not None and layout.family is not None and layout.num_layers < 100:
        assert all(length > 0 for shape in tensor_shapes(layout).values() for length in shape)
        assert ordered_full_block_weight_keys(layout)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=64) | ANY_JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_no_config_or_a_layout(tmp_path, raw):
    (tmp_path / "config.json").write_bytes(raw)
    try:
        read_layout(tmp_path)
    except ModelError as error:
        assert "config.json" in str(error)  # noqa: PT017
