"""A conversation as text: what is tokenised, which part of it is learnt, which only quotes a control token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

from mens_core.corpus.row import Turn

__all__ = ["Chat", "Rendered", "Span"]

#: Characters [start, end) of a text.
Span = tuple[int, int]


@attrs.frozen
class Rendered:
    """One conversation.

    Attributes:
        text: the whole of it, exactly what is tokenised: special tokens are parsed, no post-processor is applied.
        supervised: what an assistant has to write, from the end of the generation prompt to the end of its
            end-of-turn token; ascending and disjoint.
        quoted: where a content quotes a control token's text: to be encoded as plain text, never as the token.
    """

    text: str
    supervised: tuple[Span, ...]
    quoted: tuple[Span, ...] = ()


class Chat(Protocol):
    """A model's way to write conversations."""

    @property
    def name(self) -> str:
        """``chatml`` or ``template``."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own start of a sequence belongs before the text; a template writes it itself."""

    @property
    def end_tags(self) -> tuple[str, ...]:
        """Texts of the tokens that end an assistant's turn."""

    @property
    def digest(self) -> str:
        """Sha256 over all that decides the text."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What somebody who trains with it should know, one sentence each."""

    @property
    def keeps_reasoning(self) -> bool:
        """Whether an answer's reasoning is written, at least before the last answer; otherwise it is not learnt."""

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), *, last_only: bool = False
    ) -> Rendered:
        """Write a whole conversation.

        Args:
            turns: the last of them an assistant's.
            tools: JSON schemas of the functions the assistant may call.
            last_only: supervise the last assistant turn alone, instead of all of them.

        Raises:
            Fault: if it cannot be written, or it cannot be proved which part of it is the assistant's.
        """

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Rendered:
        """Write a prompt, which ends with the opened turn that a model is to fill; nothing is supervised.

        Raises:
            Fault: if it cannot be written.
        """
