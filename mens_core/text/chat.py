r"""Turns → ChatML text in segments, each marked as tag or content, supervised or not.

    <|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>

No newline follows the last turn. Supervised are the assistant's contents, each with its end tag; nothing else.
Cutting the text at the tags before it is tokenised makes the mask exact, and lets the content be encoded with
special tokens off, so that a role tag quoted inside a content never becomes a control token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from mens_core.corpus.row import Turn

__all__ = ["TURN_END", "TURN_START", "Segment", "opening", "segments"]

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


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
