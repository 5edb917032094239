"""Answer a prompt, or one turn of a conversation after the other, with a base, or with a base and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mens_core.artifacts.adapters import open_adapter
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import Turn
from mens_core.errors import ModelError
from mens_core.exchange import BatchShape, GenerateSettings
from mens_core.inference import open_model

__all__ = ["Conversation", "generate"]


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
        adapter: a run directory, or any other adapter's folder; None for the base alone.
        max_new_tokens: longest answer.
        **fields: further fields of the contract, such as ``backend`` or ``device``.

    Returns:
        The assistant's turn, without its end tag.

    Raises:
        MensError: if base, adapter or backend cannot be used, or the prompt leaves no room for an answer.
    """
    return Conversation(model=model, adapter=adapter, max_new_tokens=max_new_tokens, **fields).answer(prompt)


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

    def answer(self, prompt: str) -> str:
        """Answer the user's next turn; a turn that cannot be answered is no part of the conversation.

        Args:
            prompt: the user's turn.

        Returns:
            The assistant's turn, without its end tag.

        Raises:
            MensError: if the weights cannot be read, or the turns leave no room for an answer.
        """
        asked = (*self._turns, Turn(role="user", content=prompt))
        ids = self._ids(asked)
        text = self._text(ids)
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

    def _text(self, ids: list[int]) -> str:
        opened, encoder = self._opened, self._opened.encoder
        if self._session is None:
            shape = BatchShape(rows=1, tokens=len(ids), longest_row=len(ids), supervised=1, batches=1)
            self._session = opened.session(shape)
        most = min(self._max_new_tokens, opened.plan.layout.max_positions - len(ids))
        settings = GenerateSettings(max_new_tokens=most, stop_tokens=encoder.stop_tokens())
        answer = opened.backend.generate(self._session, ids, settings)
        if answer and answer[-1] in settings.stop_tokens:
            answer = answer[:-1]
        text = encoder.tokenizer.decode(answer, skip_special_tokens=False)
        # A tokenizer without the template's tags spells an end tag in several tokens, which stop no decoding.
        return min((text.partition(tag)[0] for tag in encoder.chat.end_tags), key=len, default=text)
