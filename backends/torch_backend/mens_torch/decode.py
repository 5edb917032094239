"""Greedy decoding with transformers' own generate and key/value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from mens_core.errors import DataError
from mens_core.exchange import GenerateSettings
from mens_torch.step import Session

__all__ = ["generate"]


def generate(session: Session, prompt: Sequence[int], settings: GenerateSettings) -> list[int]:
    """Continue a prompt with the likeliest token, again and again.

    Args:
        session: from ``open_session``.
        prompt: at least one token id.
        settings: length and stop tokens.

    Returns:
        The new tokens only; a stop token ends them and is included.

    Raises:
        DataError: if the prompt is empty.
    """
    if not prompt:
        raise DataError("the prompt is empty", expected="at least one token")
    network = session.model.network
    ids = torch.tensor([list(prompt)], dtype=torch.int64, device=session.model.device)
    stops = list(settings.stop_tokens)
    plain = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else None,
        use_cache=True,
    )
    training = network.config._attn_implementation  # noqa: SLF001 (it has no public reader)
    network.set_attn_implementation(session.model.own_attention)
    try:
        found = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    finally:
        network.set_attn_implementation(training)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens
