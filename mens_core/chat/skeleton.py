"""Conversations with a stand-in for everything that somebody said: what remains is the template's own text.

A template's text is that of the conversation's skeleton with the words put back in. Where that holds to the letter,
each character's origin is known, and spans found in the skeleton are spans of the text. It holds for every template
that looks at words only to trim them or to cut them at tags such as ``</think>``; those stay in the skeleton.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import attrs

from mens_core.chat.quoting import FIRST_STAND_IN
from mens_core.chat.rendered import Span
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import ToolCall, Turn

__all__ = ["SLOT", "Frame", "Skeleton", "skeleton", "slot_of"]

# One character of Unicode's last plane, below those that stand for quoted control tokens, for each text.
_FIRST = 0x100000
_MOST = FIRST_STAND_IN - _FIRST
#: Matches the stand-in of one text.
SLOT = re.compile(f"[{chr(_FIRST)}-{chr(FIRST_STAND_IN - 1)}]")

# What an assistant's content holds before it was written as reasoning in the content, which templates may leave out.
_THOUGHT_END = "</think>"


@attrs.define
class Skeleton:
    """A conversation without its words.

    Attributes:
        whole: the turns as they were.
        bare: their contents, reasoning and calls as they are without words.
        words: what each slot stands for, by its number.
        owners: the turn to which each slot belongs.
        thoughts: the slots that a template may leave out.
        calls: the slots that are names in calls.
        plain: whether the turns have roles, contents and reasoning and nothing else.
    """

    whole: Sequence[Turn]
    bare: list[tuple[str, str, tuple[ToolCall, ...]]] = attrs.field(factory=list)
    words: list[str] = attrs.field(factory=list)
    owners: list[int] = attrs.field(factory=list)
    thoughts: set[int] = attrs.field(factory=set)
    calls: set[int] = attrs.field(factory=set)
    plain: bool = True

    @property
    def key(self) -> tuple[tuple[str, str, str], ...] | None:
        """The same for conversations whose skeletons are the same; None for those that are too seldom alike."""
        if not self.plain:
            return None
        return tuple([(turn.role, bare[0], bare[1]) for turn, bare in zip(self.whole, self.bare, strict=True)])

    def turns(self) -> list[Turn]:
        """The turns without their words."""
        return [
            attrs.evolve(turn, content=content, reasoning=reasoning, tool_calls=calls)
            for turn, (content, reasoning, calls) in zip(self.whole, self.bare, strict=True)
        ]

    def needed(self, place: int) -> set[str]:
        """The stand-ins of a turn that have to be in the text of the conversation."""
        return set(self.slots(place)) - {slot_of(number) for number in self.thoughts}

    def slots(self, place: int) -> list[str]:
        """The stand-ins of a turn."""
        return [slot_of(number) for number, owner in enumerate(self.owners) if owner == place]


def slot_of(number: int) -> str:
    """The stand-in of a text."""
    return chr(_FIRST + number)


def skeleton(turns: Sequence[Turn], tags: re.Pattern[str]) -> Skeleton:
    """Take the words out of a conversation.

    Args:
        turns: whose words are not to be read.
        tags: matches what a template may look for in a content; it stays, as do the blanks round all words.

    Raises:
        Fault: if there are more texts than stand-ins.
    """
    made = Skeleton(turns)
    for place, turn in enumerate(turns):
        before = len(made.words)
        content = _bare(turn.content, tags, made.words)
        reasoning, calls = "", turn.tool_calls
        if turn.reasoning or turn.tool_calls:
            first = len(made.words)
            reasoning = _bare(turn.reasoning, tags, made.words)
            made.thoughts.update(range(first, len(made.words)))
            first = len(made.words)
            calls = tuple(attrs.evolve(call, name=_slot(call.name, made.words)) for call in turn.tool_calls)
            made.calls.update(range(first, len(made.words)))
        if turn.role == "assistant" and _THOUGHT_END in content:
            thought = content.rpartition(_THOUGHT_END)[0]
            made.thoughts.update(ord(slot) - _FIRST for slot in SLOT.findall(thought))
        if turn.tool_calls or turn.name or turn.tool_call_id:
            made.plain = False
        made.owners += [place] * (len(made.words) - before)
        made.bare.append((content, reasoning, calls))
    if len(made.words) > _MOST:
        raise Fault("a conversation of more than 61 000 texts", "a shorter one")
    return made


def _bare(text: str, tags: re.Pattern[str], words: list[str]) -> str:
    """The text with a slot for all words between tags and blanks; the words are appended."""
    if not tags.search(text):
        return _slot(text, words)
    parts = tags.split(text)
    # split gives what was found between what was not.
    return "".join(part if odd % 2 else _slot(part, words) for odd, part in enumerate(parts))


def _slot(text: str, words: list[str]) -> str:
    core = text.strip()
    if not core:
        return text
    slot = slot_of(len(words))
    words.append(core)
    if len(core) == len(text):
        return slot
    start = len(text) - len(text.lstrip())
    return text[:start] + slot + text[start + len(core) :]


class Frame:
    """A skeleton's text, ready to be filled.

    Args:
        text: what the template makes of a skeleton.
        supervised: spans of it.
    """

    def __init__(self, text: str, supervised: Sequence[Span]) -> None:
        self._pieces = SLOT.split(text)
        places = [match.start() for match in SLOT.finditer(text)]
        self._order = [ord(text[place]) - _FIRST for place in places]
        # How many slots stand before each end of a span.
        self._supervised = [[(end, bisect_left(places, end)) for end in span] for span in supervised]

    def spans(self, text: str, words: Sequence[str]) -> tuple[Span, ...]:
        """The supervised spans of a conversation's text.

        Args:
            text: what the template made of the conversation.
            words: those of its skeleton.

        Raises:
            Fault: if the text is not this frame filled with the words, as they are or as JSON writes them.
        """
        inserted = [words[number] for number in self._order]
        if self._filled(inserted) != text:
            inserted = list(self._read(text, inserted))
        return self._moved(inserted)

    def filled(self, words: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
        """The text of a conversation whose words stand in it as they are, and its supervised spans."""
        inserted = [words[number] for number in self._order]
        return self._filled(inserted), self._moved(inserted)

    def _moved(self, inserted: Sequence[str]) -> tuple[Span, ...]:
        # A slot is one character of the frame's own text.
        grown = [0]
        for word in inserted:
            grown.append(grown[-1] + len(word) - 1)
        return tuple((start + grown[before], end + grown[last]) for (start, before), (end, last) in self._supervised)

    def _filled(self, inserted: Sequence[str]) -> str:
        parts = [""] * (2 * len(inserted) + 1)
        parts[::2] = self._pieces
        parts[1::2] = inserted
        return "".join(parts)

    def _read(self, text: str, words: Sequence[str]) -> Iterator[str]:
        """Each word as the text has it."""
        place = len(self._pieces[0])
        right = text.startswith(self._pieces[0])
        for number, word in enumerate(words, start=1):
            piece = self._pieces[number]
            for written in (word, json.dumps(word, ensure_ascii=False)[1:-1]):
                behind = place + len(written)
                if text.startswith(written, place) and text.startswith(piece, behind):
                    place = behind + len(piece)
                    yield written
                    break
            else:
                right = False
                break
        if not right or place != len(text):
            raise Fault(
                "a conversation whose words the chat template changes or looks into",
                "words that the template writes as they are: without them, what it writes cannot be told from them",
            )
