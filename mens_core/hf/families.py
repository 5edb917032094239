"""How the decoders of the known model types differ from each other, as a table keyed by the exact ``model_type``.

Source of every row: transformers' configuration and modeling files of that model type, version 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

__all__ = ["LINEAR_ATTENTION", "REGISTRY", "UNKNOWN", "Family"]

LINEAR_ATTENTION = (
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.in_proj_a",
    "linear_attn.in_proj_b",
    "linear_attn.out_proj",
)
"""Linear layers of a layer of type ``linear_attention``; the last is the output projection."""

_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_NO_BIAS = {"attention_bias": False, "output_bias": False, "mlp_bias": False}


@attrs.frozen(kw_only=True)
class Family:
    """One row of the table; what is left out is as in Llama.

    Attributes:
        defaults: config key → what transformers takes where config.json does not have the key.
        biases: ``attention_bias``, ``output_bias`` and ``mlp_bias`` as far as config.json has no say in them.
        spellings: config key → the names this family gives it, its own first; none if it has no such key.
        nested: whether config.json keeps the decoder's values in ``text_config``.
        stem: of the blocks' names in transformers' ``state_dict``.
        namespace: of the blocks' names in the inventory.
        conv1d: whether linears are stored (in, out).
        rotary: whether positions are rotations of pairs of head dimensions.
        attention: linears of an attention layer, the output projection last.
        gated_query: whether ``q_proj`` makes a gate beside the query, which doubles its rows.
        head_norms: whether query and key heads are normalised.
        mlp: linears of the feed-forward part.
        norms: norms of a block, each over the width D.
        norm_bias: whether norms have a bias.
        other_layers: type of the layers that are not full attention, where config.json does not list them.
        period: every so many layers one is full attention, where config.json does not list them.
        period_key: the config key that says another period.
        windowed: whether layers from ``max_window_layers`` on slide where ``use_sliding_window`` says so.
    """

    defaults: Mapping[str, Any]
    biases: Mapping[str, bool] = attrs.field(factory=dict)
    spellings: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    nested: bool = False
    stem: str = "model.layers"
    namespace: str = "model.layers"
    conv1d: bool = False
    rotary: bool = True
    attention: tuple[str, ...] = _SEPARATE
    gated_query: bool = False
    head_norms: bool = False
    mlp: tuple[str, ...] = _GATED_MLP
    norms: tuple[str, ...] = _TWO_NORMS
    norm_bias: bool = False
    other_layers: str = "full_attention"
    period: int = 1
    period_key: str | None = None
    windowed: bool = False

    @property
    def hybrid(self) -> bool:
        """Whether layers may be ``linear_attention``."""
        return self.other_layers == "linear_attention"


_GPT2 = Family(
    defaults={"max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    biases={"attention_bias": True, "output_bias": True, "mlp_bias": True},
    spellings={
        "hidden_size": ("n_embd", "hidden_size"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "intermediate_size": ("n_inner",),
        "max_position_embeddings": ("n_positions", "max_position_embeddings"),
        "rms_norm_eps": ("layer_norm_epsilon",),
        "num_key_value_heads": (),
        "head_dim": (),
    },
    stem="transformer.h",
    namespace="h",
    conv1d=True,
    rotary=False,
    attention=("attn.c_attn", "attn.c_proj"),
    mlp=("mlp.c_fc", "mlp.c_proj"),
    norms=("ln_1", "ln_2"),
    norm_bias=True,
)
_QWEN = {"intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
_GEMMA = {"intermediate_size": 9216, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_QWEN3_5 = Family(
    defaults={
        "intermediate_size": 12288,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    biases={"mlp_bias": False},
    gated_query=True,
    head_norms=True,
    other_layers="linear_attention",
    period=4,
    period_key="full_attention_interval",
)

REGISTRY: Mapping[str, Family] = {
    "gpt2": _GPT2,
    "llama": Family(defaults={"intermediate_size": 11008, "max_position_embeddings": 2048}),
    "mistral": Family(
        defaults={"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        biases=_NO_BIAS,
    ),
    # The biases on q, k and v are there by definition; config.json does not say so.
    "qwen2": Family(
        defaults=_QWEN,
        biases={"attention_bias": True, "output_bias": False, "mlp_bias": False},
        windowed=True,
    ),
    "qwen3": Family(defaults=_QWEN | {"head_dim": 128}, biases={"mlp_bias": False}, head_norms=True, windowed=True),
    "gemma2": Family(
        defaults=_GEMMA | {"max_position_embeddings": 8192},
        biases={"mlp_bias": False},
        norms=_FOUR_NORMS,
        other_layers="sliding_attention",
        period=2,
    ),
    # The published text_configs of Gemma 3 leave out even the vocabulary and the heads.
    "gemma3_text": Family(
        defaults=_GEMMA | {"max_position_embeddings": 131072, "vocab_size": 262208, "num_attention_heads": 8},
        biases={"mlp_bias": False},
        head_norms=True,
        norms=_FOUR_NORMS,
        other_layers="sliding_attention",
        period=6,
        period_key="sliding_window_pattern",
    ),
    "phi3": Family(
        defaults={"intermediate_size": 8192, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        biases=_NO_BIAS,
        attention=("self_attn.qkv_proj", "self_attn.o_proj"),
        mlp=("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "qwen3_5": attrs.evolve(_QWEN3_5, nested=True, namespace="model.language_model.layers"),
    "qwen3_5_text": _QWEN3_5,
}

UNKNOWN = Family(
    defaults={"num_attention_heads": 1, "max_position_embeddings": 2048},
    spellings={
        "hidden_size": ("hidden_size", "n_embd", "d_model"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
        "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim"),
        "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    },
)
"""Common spellings, for a model type without a row: a backend that knows it by other means can then be asked."""
