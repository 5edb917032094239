"""How a model's conversations are written: by its own chat template, in ChatML where it has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
from tokenizers import Tokenizer

from mens_core.corpus.row import Turn
from mens_core.text.chatml import TURN_END, TURN_START, ChatML
from mens_core.text.rendered import Chat, Rendered
from mens_core.text.template_chat import TemplateChat
from mens_core.text.template_files import read_templates

__all__ = ["TURN_END", "TURN_START", "Chat", "ChatML", "Rendered", "Segment", "open_chat", "opening", "segments"]


def open_chat(folder: Path, tokenizer: Tokenizer) -> Chat:
    """The way in which a model's conversations are written.

    Args:
        folder: of the model.
        tokenizer: of the model.

    Raises:
        ModelError: if a chat template, or the file that holds it, is malformed.
    """
    files = read_templates(folder, tokenizer)
    return ChatML(tokenizer) if files is None else TemplateChat(files, tokenizer)


@attrs.frozen
class Segment:
    """A piece of rendered text.

    Attributes:
        text: the piece.
        tag: whether it is a role tag, to become one control token where the tokenizer has it.
        supervised: whether its tokens are trained on.
    """

    text: str
    tag: bool = False
    supervised: bool = False


def segments(turns: Sequence[Turn]) -> list[Segment]:
    """Render a whole conversation; its text starts with ``opening`` of all turns but a last assistant turn."""
    return list(_rendered(turns))


def opening(turns: Sequence[Turn]) -> list[Segment]:
    """Render a prompt: the turns, a newline, and the opened assistant turn that a model is to fill."""
    return [*_rendered(turns), Segment("\n"), Segment(TURN_START, tag=True), Segment("assistant\n")]


def _rendered(turns: Sequence[Turn]) -> Iterator[Segment]:
    for place, turn in enumerate(turns):
        answer = turn.role == "assistant"
        if place:
            yield Segment("\n")
        yield Segment(TURN_START, tag=True)
        yield Segment(f"{turn.role}\n")
        if turn.content:
            yield Segment(turn.content, supervised=answer)
        yield Segment(TURN_END, tag=True, supervised=answer)
