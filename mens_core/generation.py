"""Answer a prompt with a base, or with a base and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mens_core.artifacts.adapters import open_adapter
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import Turn
from mens_core.errors import ModelError
from mens_core.exchange import BatchShape, GenerateSettings
from mens_core.inference import open_model

__all__ = ["generate"]


def generate(
    prompt: str,
    *,
    model: str | None = None,
    adapter: str | Path | None = None,
    max_new_tokens: int = 128,
    **fields: Any,
) -> str:
    """Answer one prompt, greedily.

    Args:
        prompt: the user's turn.
        model: folder or hub id of the base; None for the one the adapter was trained on, or the lab base.
        adapter: a run directory, or any folder in PEFT's format; None for the base alone.
        max_new_tokens: longest answer.
        **fields: further fields of the contract, such as ``backend`` or ``device``.

    Returns:
        The assistant's turn, without its end tag.

    Raises:
        MensError: if base, adapter or backend cannot be used, or the prompt leaves no room for an answer.
    """
    opened = open_model(model, open_adapter(Path(adapter)) if adapter is not None else None, **fields)
    encoder, positions = opened.encoder, opened.plan.layout.max_positions
    try:
        ids = encoder.prompt(encoder.chat.prompt([Turn(role="user", content=prompt)]))
    except Fault as fault:
        raise ModelError(f"the prompt cannot be written: {fault.kind}", expected=fault.expected) from fault
    room = positions - len(ids)
    if room < 1:
        raise ModelError(f"the prompt has {len(ids)} tokens", expected=f"fewer than {positions}")
    session = opened.session(BatchShape(rows=1, tokens=len(ids), longest_row=len(ids), supervised=1, batches=1))
    settings = GenerateSettings(max_new_tokens=min(max_new_tokens, room), stop_tokens=encoder.stop_tokens())
    answer = opened.backend.generate(session, ids, settings)
    if answer and answer[-1] in settings.stop_tokens:
        answer = answer[:-1]
    text = encoder.tokenizer.decode(answer, skip_special_tokens=False)
    # A tokenizer without the template's tags spells an end tag in several tokens, which stop no decoding.
    return min((text.partition(tag)[0] for tag in encoder.chat.end_tags), key=len, default=text)
