"""Answer a prompt, or one turn of a conversation after the other, with a base, or with a base and its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mens_core.artifacts.adapters import open_adapter
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import Turn
from mens_core.errors import ModelError
from mens_core.exchange import BatchShape, GenerateSettings
from mens_core.inference import open_model
from mens_core.text.encode import Encoder

__all__ = ["Conversation", "generate"]


def generate(
    prompt: str,
    *,
    model: str | None = None,
    adapter: str | Path | None = None,
    max_new_tokens: int = 128,
    on_text: Callable[[str], None] | None = None,
    **fields: Any,
) -> str:
    """Answer one prompt, greedily.

    Args:
        prompt: the user's turn.
        model: folder or hub id of the base; None for the one the adapter was trained on, or the lab base.
        adapter: a run directory, or any other adapter's folder; None for the base alone.
        max_new_tokens: longest answer.
        on_text: called with the answer piece by piece while it grows; the pieces together are what is returned.
        **fields: further fields of the contract, such as ``backend`` or ``device``.

    Returns:
        The assistant's turn, without its end tag.

    Raises:
        MensError: if base, adapter or backend cannot be used, or the prompt leaves no room for an answer.
    """
    return Conversation(model=model, adapter=adapter, max_new_tokens=max_new_tokens, **fields).answer(prompt, on_text)


class Conversation:
    """Turns of a user, each answered greedily with all turns before it in mind.

    Args:
        model: as for ``generate``.
        adapter: as for ``generate``.
        max_new_tokens: longest answer.
        **fields: further fields of the contract, such as ``backend`` or ``device``.

    Raises:
        MensError: if base, adapter or backend cannot be used.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        adapter: str | Path | None = None,
        max_new_tokens: int = 128,
        **fields: Any,
    ) -> None:
        self._opened = open_model(model, open_adapter(Path(adapter)) if adapter is not None else None, **fields)
        self._max_new_tokens = max_new_tokens
        self._turns: tuple[Turn, ...] = ()
        self._session: Any = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said so far, the user and the assistant in turn."""
        return self._turns

    def answer(self, prompt: str, on_text: Callable[[str], None] | None = None) -> str:
        """Answer the user's next turn; a turn that cannot be answered is no part of the conversation.

        Args:
            prompt: the user's turn.
            on_text: called with the answer piece by piece while it grows; the pieces together are what is returned.

        Returns:
            The assistant's turn, without its end tag.

        Raises:
            MensError: if the weights cannot be read, or the turns leave no room for an answer.
        """
        asked = (*self._turns, Turn(role="user", content=prompt))
        ids = self._ids(asked)
        text = self._text(ids, on_text)
        self._turns = (*asked, Turn(role="assistant", content=text))
        return text

    def forget(self) -> None:
        """Begin anew with the same model, which stays open."""
        self._turns = ()

    def _ids(self, turns: tuple[Turn, ...]) -> list[int]:
        encoder, positions = self._opened.encoder, self._opened.plan.layout.max_positions
        try:
            ids = encoder.prompt(encoder.chat.prompt(turns))
        except Fault as fault:
            raise ModelError(f"the prompt cannot be written: {fault.kind}", expected=fault.expected) from fault
        if len(ids) >= positions:
            spoken = "prompt has" if len(turns) == 1 else "conversation has grown to"
            raise ModelError(f"the {spoken} {len(ids)} tokens", expected=f"fewer than {positions}")
        return ids

    def _text(self, ids: list[int], on_text: Callable[[str], None] | None) -> str:
        opened, encoder = self._opened, self._opened.encoder
        if self._session is None:
            shape = BatchShape(rows=1, tokens=len(ids), longest_row=len(ids), supervised=1, batches=1)
            self._session = opened.session(shape)
        most = min(self._max_new_tokens, opened.plan.layout.max_positions - len(ids))
        settings = GenerateSettings(max_new_tokens=most, stop_tokens=encoder.stop_tokens())
        speech = None if on_text is None else _Speech(encoder, on_text)
        answer = opened.backend.generate(self._session, ids, settings, None if speech is None else speech.hear)
        text = _turn(encoder, answer)
        if speech is not None:
            speech.finish(text)
        return text


def _turn(encoder: Encoder, tokens: Sequence[int]) -> str:
    """The text of an answer, without its end tag."""
    if tokens and tokens[-1] in encoder.stop_tokens():
        tokens = tokens[:-1]
    text: str = encoder.tokenizer.decode(tokens, skip_special_tokens=False)
    # A tokenizer without the template's tags spells an end tag in several tokens, which stop no decoding.
    return min((text.partition(tag)[0] for tag in encoder.chat.end_tags), key=len, default=text)


class _Speech:
    """Passes an answer on while it grows, as far as the tokens to come cannot change it."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], None]) -> None:
        self._encoder, self._on_text = encoder, on_text
        self._tokens: list[int] = []
        self._said = ""

    def hear(self, token: int) -> None:
        """Take the next token."""
        self._tokens.append(token)
        text = _turn(self._encoder, self._tokens)
        # A character of several tokens shows as one that cannot be read until the last of them is there.
        sure = text.rstrip("\ufffd")
        begun = max((_overlap(sure, tag) for tag in self._encoder.chat.end_tags), default=0)
        self._say(sure[: len(sure) - begun])

    def finish(self, text: str) -> None:
        """Pass the rest on; the whole once more, on a line of its own, if a tokenizer took its first words back."""
        self._say(text)
        if self._said != text:
            self._on_text(f"\n{text}")

    def _say(self, text: str) -> None:
        if len(text) > len(self._said) and text.startswith(self._said):
            self._on_text(text[len(self._said) :])
            self._said = text


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of the text with which the tag begins."""
    return next((size for size in range(min(len(tag), len(text)), 0, -1) if text.endswith(tag[:size])), 0)
