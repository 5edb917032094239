"""Small model folders for a certificate: one of each family, and a copy of any with logits of a hundredfold size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mens_core.artifacts.tensors import open_tensors, write_tensors
from mens_core.hf.keymap import canonical_name
from mens_core.hf.layout import read_layout
from mens_core.random_model import Size, write_random_weights

__all__ = ["write_family", "write_with_huge_logits"]

# Odd sizes on purpose: 2400 weights are no whole number of blocks of 64, and heads may be wider than width / heads.
_SIZE = Size(width=48, layers=2, heads=4, kv_heads=2, head_dim=12, inner=50, positions=64)
_VOCABULARY = 320  # the lab tokenizer's 259 ids fit
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 16}},
    "qwen3": {"head_dim": 20},
}
_HUGE = np.float32(100)


def write_family(folder: Path, family: str) -> None:
    """Write config.json and weights of a tiny model whose logits reach about ten.

    Args:
        folder: exists and is empty.
        family: one of ``mens_core.hf.layout.GRAPHS``.
    """
    write_random_weights(
        folder,
        arch=family,
        size=_SIZE,
        vocab_size=_VOCABULARY,
        seed=11,
        like_trained=True,
        config=_CHANGES.get(family),
    )


def write_with_huge_logits(source: Path, folder: Path) -> None:
    """Copy a small model with its last norm a hundred times as large, and with it every logit.

    Args:
        source: config.json and safetensors.
        folder: exists and is empty.
    """
    layout = read_layout(source)
    last = "transformer.ln_f." if layout.family == "gpt2" else "model.norm."
    tensors = {name: np.asarray(tensor) for name, tensor in open_tensors(source).items()}
    for name, tensor in tensors.items():
        if canonical_name(layout, name).startswith(last):
            tensors[name] = (tensor.astype(np.float32) * _HUGE).astype(tensor.dtype)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    for companion in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / companion).is_file():
            shutil.copy(source / companion, folder / companion)
