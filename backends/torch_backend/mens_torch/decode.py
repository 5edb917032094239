"""Greedy decoding with transformers' own generate and key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor as Array
from torch import nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mens_core.errors import DataError
from mens_core.exchange import GenerateSettings
from mens_torch._products import linear
from mens_torch.model import Model
from mens_torch.step import Session

__all__ = ["generate"]


def generate(
    session: Session,
    prompt: Sequence[int],
    settings: GenerateSettings,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue a prompt with the likeliest token, again and again.

    Args:
        session: from ``open_session``.
        prompt: at least one token id.
        settings: length and stop tokens.
        on_token: called with each new token as soon as it is known.

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
    listener = None if on_token is None else _Listener(on_token)
    with _answering(session.model):
        found = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain, streamer=listener)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


@contextmanager
def _answering(model: Model) -> Iterator[None]:
    """The network with its own attention, and its plain linears, the head above all, by the adapters' products."""
    network = model.network
    training = network.config._attn_implementation  # noqa: SLF001 (it has no public reader)
    plain: list[Any] = [module for module in network.modules() if type(module) is nn.Linear]
    network.set_attn_implementation(model.own_attention)
    for module in plain:
        module.forward = partial(linear, weight=module.weight, bias=module.bias)
    try:
        yield
    finally:
        for module in plain:
            del module.forward
        network.set_attn_implementation(training)


class _Listener(BaseStreamer):  # type: ignore[misc]
    """Passes on what transformers tells a streamer: the prompt first, which is nothing new, then token by token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._prompt_was_told = False

    def put(self, value: Array) -> None:
        if self._prompt_was_told:
            self._on_token(int(value))
        self._prompt_was_told = True

    def end(self) -> None:
        pass
