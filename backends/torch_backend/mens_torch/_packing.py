"""Packed attention under the interface transformers gives to attention functions.

Nothing that a model asks for may be ignored. While a model is tried out (``PROVING``) every argument is looked
at, and transformers is let build its masks, of which only the kind matters: none, a sliding window, or something
else. Afterwards (``PACKED``) no mask is built, and nothing waits for the device to look for packed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as Array
from transformers import AttentionInterface, AttentionMaskInterface

from mens_torch._formats import rounded
from mens_torch._widened import wide
from mens_torch.attention import packed_attention

__all__ = ["PACKED", "PROVING", "RefusedError", "register"]

PROVING, PACKED = "mens_packed_proving", "mens_packed"

# Arguments that are read here, and those that do not change what attention computes.
_READ = {"rows", "scaling", "sliding_window", "softcap", "s_aux", "is_causal"}
_IDLE = {"position_ids", "position_embeddings", "cache_position"}


class RefusedError(Exception):
    """A model asks for something that packed attention does not do; it never leaves this package."""


def register() -> None:
    """Make both names known to transformers; again does no harm."""
    AttentionInterface.register(PROVING, _checked_attention)
    AttentionMaskInterface.register(PROVING, _window_only)
    AttentionInterface.register(PACKED, _attention)


def _checked_attention(module: Any, query: Array, key: Array, value: Array, mask: Array | None, **given: Any) -> Any:
    """``_attention``, refusing what it would ignore."""
    name = type(module).__name__
    if given.get("rows") is None:
        raise RefusedError(f"{name} is not told where rows end")
    unknown = [argument for argument in given if argument not in _READ | _IDLE and _matters(given[argument])]
    if unknown or not given.get("is_causal", True) or not getattr(module, "is_causal", True):
        raise RefusedError(f"{name} asks for another attention: {', '.join(unknown) or 'one that is not causal'}")
    if (None if mask is None else int(mask)) != given.get("sliding_window"):
        raise RefusedError(f"{name} masks more than a sliding window")
    return _attention(module, query, key, value, None, **given)


def _matters(value: object) -> bool:
    return not (value is None or (isinstance(value, bool | int | float) and not value))


def _window_only(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> Array | None:
    """Stands in for a mask: the window's width as one number, None for plain causality."""
    if use_vmap:
        raise RefusedError("the model adds a mask of its own")
    return None if local_size is None else torch.tensor(local_size)


def _attention(module: Any, query: Array, key: Array, value: Array, mask: Array | None, **given: Any) -> Any:
    """(1, H, T, E) in, (1, T, H, E) out; the second answer stands for attention weights, kept by nobody."""
    del module, mask
    scale = given.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows: tuple[int, ...] = given["rows"]
    window, softcap, sinks = (given.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    if softcap is None and sinks is None:
        return packed_attention(query, key, value, rows, scale, window), None
    # Where an axis is chosen instead of squeezed, the backward pass fills zeros and copies.
    query, key, value = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    split = zip(*(torch.split(part, list(rows)) for part in (query, key, value)), strict=True)
    outputs = [_spelled_out(*row, scale=scale, window=window, softcap=softcap, sinks=sinks) for row in split]
    return torch.cat(outputs)[None], None


def _spelled_out(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Array | None,
) -> Array:
    """One row's attention by the formula, for scores that are capped (Gemma 2) or share with a sink (gpt-oss).

    Args:
        query: (L, H, E).
        key: (L, K, E).
        value: (L, K, E).
        scale: factor on the scores.
        window: how many tokens a query sees; None for all.
        softcap: c in c · tanh(score / c); None for no cap.
        sinks: (H,), a score that every query also weighs and that has no value; None for none.

    Returns:
        (L, H, E).
    """
    group, length = query.shape[1] // key.shape[1], query.shape[0]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    dtype, query, key, value = value.dtype, wide(query), wide(key), wide(value)
    scores = torch.einsum("qhe,khe->hqk", query, key).float() * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    seen = seen if window is None else seen.triu(1 - window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, length, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :length].to(value.dtype)
    return rounded(torch.einsum("hqk,khe->qhe", weights, value), dtype)
