"""Tiny models as transformers writes them, with logits of an honest size; the rest is what plugin authors get, too.

The weights are drawn so that logits reach about 10, as a trained model's do: on logits near zero every mistake
is small, and a tolerance would prove nothing.
"""

import math

import torch
import transformers

from mens_core.artifacts.tensors import open_tensors
from mens_core.hf.keymap import linear_shapes
from mens_core.hf.layout import read_layout
from mens_core.plan import BaseWeights
from mens_core.testing.tiny import (
    MACHINE,
    SHAPE,
    VOCABULARY,
    batch_of,
    nf4_spec,
    packed,
    plan_for,
    random_adapter,
    rows_of,
    with_tokens,
)

__all__ = [
    "CONFIGS",
    "MACHINE",
    "SHAPE",
    "VOCABULARY",
    "WEIGHTS",
    "batch_of",
    "nf4_spec",
    "packed",
    "plan_for",
    "random_adapter",
    "rows_of",
    "weights_of",
    "with_tokens",
    "write_model",
]

WEIGHTS = BaseWeights(parameters=1, stored_bytes=4, linears={})

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 50,  # 2400 weights: no whole number of blocks of 64
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    # Conv1D, learned positions, tied head, biases everywhere
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # grouped queries, a head of its own, scaled rotary frequencies
    "llama": _COMMON
    | {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": _LLAMA3_ROPE,
        "tie_word_embeddings": False,
    },
    # biases on q, k and v, tied head
    "qwen2": _COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    # norms on q and k, heads wider than width / heads
    "qwen3": _COMMON
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "tie_word_embeddings": True},
}


def weights_of(folder):
    """What a backend is told of a folder's weights."""
    headers = open_tensors(folder).headers
    return BaseWeights(
        parameters=sum(math.prod(info.shape) for info in headers.values()),
        stored_bytes=sum(info.stop - info.start for info in headers.values()),
        linears=linear_shapes(read_layout(folder)),
    )


def write_model(folder, model_type, config, seed=0):
    """Save a seeded random model as transformers saves any model."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[model_type](**config))
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter is head or parameter is model.get_input_embeddings().weight:
                parameter.copy_(0.5 * drawn)
            elif parameter.ndim > 1:
                parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_((1 if "norm" in name or "ln_" in name else 0) * (not name.endswith("bias")) + drawn / 8)
    model.save_pretrained(folder)
