"""What the modules of an adapter are called: by transformers, inside their block, and in MLX."""

from __future__ import annotations

__all__ = ["from_mlx", "full_name", "in_mlx", "within_block"]

# GPT-2's blocks, as its original files, transformers and MLX call them.
_SHORT, _FULL, _MLX = "h.", "transformer.h.", "model.h."
# Blocks, and the head, that transformers and MLX call the same.
_SAME = ("model.layers.", "lm_head")


def full_name(module: str) -> str:
    """The path in transformers' graph; GPT-2's original files leave out its first part."""
    return f"transformer.{module}" if module.startswith(_SHORT) else module


def within_block(module: str) -> str:
    """The path behind the number of the block, such as ``self_attn.q_proj``; of a module in no block the whole one."""
    parts = module.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return module if number is None else ".".join(parts[number + 1 :])


def in_mlx(module: str) -> str | None:
    """The path in mlx-lm's graph; None where it is not known to have a linear layer of that name.

    Source: github.com/ml-explore/mlx-lm, ``models/gpt2.py`` for GPT-2's, ``models/llama.py`` for the others.
    """
    full = full_name(module)
    if full.startswith(_FULL):
        return f"{_MLX}{full.removeprefix(_FULL)}"
    return full if full.startswith(_SAME) else None


def from_mlx(path: str) -> str | None:
    """The inverse of ``in_mlx``: transformers' path of a module of mlx-lm's."""
    if path.startswith(_MLX):
        return f"{_FULL}{path.removeprefix(_MLX)}"
    return path if path.startswith(_SAME) else None
