"""Which part of a skeleton's text an assistant has to write: found by rendering prefixes, and proved.

A turn of the assistant's starts where the prompt for it ends. That prompt is rendered from the turns before it; where
it is the start of the text, nothing is left to doubt. Some templates rewrite earlier turns when later ones follow, and
some open an answer with a thought that the text of a finished conversation lacks: there, the prompt's own end is looked
for behind the last words that came before, and cut back to the last token or line on which both agree.

It ends with the first end tag behind its last words. Since all words are stand-ins, no content can imitate a tag.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from mens_core.chat.habits import Habits
from mens_core.chat.rendered import Span
from mens_core.chat.skeleton import SLOT, Skeleton, slot_of
from mens_core.corpus.faults import Fault

__all__ = ["Prompts", "assistant_spans"]

#: The text of the prompt for a turn, with or without the thoughts of the turns before it; None if there is none.
Prompts = Callable[[int, bool], str | None]


def assistant_spans(
    text: str, bare: Skeleton, habits: Habits, prompts: Prompts, *, last_only: bool
) -> tuple[Span, ...]:
    """Find what the assistant has to write.

    Args:
        text: what the template makes of the skeleton.
        bare: the skeleton.
        habits: of the template.
        prompts: renders the skeleton's turns before a given one, with the assistant's turn opened.
        last_only: only in the last turn.

    Returns:
        Spans of the text, ascending and disjoint, one for each turn.

    Raises:
        Fault: if the template leaves out what somebody said, or a span cannot be found or proved.
    """
    _check_complete(text, bare)
    answers = [place for place, turn in enumerate(bare.whole) if turn.role == "assistant"]
    search = _Search(text, bare, habits, prompts)
    spans: list[Span] = []
    for place in answers[-1:] if last_only else answers:
        behind = spans[-1][1] if spans else 0
        start = search.start(place, behind)
        if place == answers[-1]:
            search.check_prompt(place, start)
        closing, end = search.end(place, start)
        search.check(place, start, closing)
        spans.append((start, end))
    return tuple(spans)


def _check_complete(text: str, bare: Skeleton) -> None:
    if not set(SLOT.findall(text)) <= {slot_of(number) for number in range(len(bare.words))}:
        raise Fault("a private-use character (U+100000 …) in a call, or a function's description", "a row without it")
    for number, owner in enumerate(bare.owners):
        if number not in bare.thoughts and slot_of(number) not in text:
            role = bare.whole[owner].role
            part = "a call" if number in bare.calls else f"a turn of the role {role}"
            hint = "; the text of a system turn can stand at the head of the first question" if role == "system" else ""
            raise Fault(
                f"{part} that the chat template leaves out", f"a conversation that the template writes in full{hint}"
            )


class _Search:
    """The search in one text; see ``assistant_spans``."""

    def __init__(self, text: str, bare: Skeleton, habits: Habits, prompts: Prompts) -> None:
        self._text, self._bare, self._habits, self._prompts = text, bare, habits, prompts
        self._slots = [bare.slots(place) for place in range(len(bare.whole))]

    def start(self, place: int, behind: int) -> int:
        """Where a turn starts, if not before ``behind``, where the span before it ends."""
        prompt = self._prompts(place, True)
        start = self._behind_last_words(prompt) if prompt is not None else None
        if prompt is not None and self._text.startswith(prompt):
            start = len(prompt)
        elif start is None:
            start = self._behind_opening(place, behind)
        if start is None or start < behind:
            raise Fault(
                "an answer that the chat template opens otherwise than the prompt for it",
                "a conversation whose answers begin where its prompts end",
            )
        heading = self._habits.heading
        return start + len(heading) if heading and self._text.startswith(heading, start) else start

    def _behind_last_words(self, prompt: str) -> int | None:
        """Behind the prompt's end, or the longest part of it, where it follows the words that it follows there."""
        slots = SLOT.findall(prompt)
        if not slots:
            return None
        at, tail = 0, prompt[prompt.rindex(slots[-1]) + 1 :]
        for _ in range(slots.count(slots[-1])):
            at = self._text.find(slots[-1], at) + 1
            if not at:
                return None
        cuts = self._habits.cuts if tail.endswith(self._habits.opening) else (len(self._habits.opening),)
        closed = len(tail) - len(self._habits.opening)
        return next((at + closed + cut for cut in cuts if self._text.startswith(tail[: closed + cut], at)), None)

    def _behind_opening(self, place: int, behind: int) -> int | None:
        """Behind the opening of an answer, where it follows all words that came before."""
        habits, before = self._habits, max([behind, *self._found(range(place))])
        openings = [habits.opening[:cut] for cut in habits.cuts if cut] or [habits.heading]
        found = ((self._text.find(opening, before), len(opening)) for opening in openings if opening)
        return next((at + length for at, length in found if at >= 0), None)

    def check_prompt(self, place: int, start: int) -> None:
        """Prove that what precedes the last answer is what a model is given to answer, or the start of it."""
        given = (self._prompts(place, thoughts) for thoughts in (True, False))
        before = self._text[:start]
        if not any(prompt is None or f"{prompt}{self._habits.heading}".startswith(before) for prompt in given):
            raise Fault(
                "a conversation that the chat template writes otherwise when its last answer is still to come",
                "turns that the template writes alike with the answer and without it",
            )

    def end(self, place: int, start: int) -> tuple[int, int]:
        """Where a turn's first end tag stands behind its words; behind it, and those that follow it."""
        limit = min(self._found(range(place + 1, len(self._slots)), start), default=len(self._text))
        own = [found for found in self._found([place], start) if found < limit]
        closing, end = self._tag(max(own, default=start))
        if end > limit:
            raise Fault(
                "a turn of the assistant's behind which the chat template writes no end of turn",
                f"one of {', '.join(self._habits.end_tags) or 'the end tags that the model names'} behind every turn",
            )
        while self._tag(end)[0] == end:
            _, end = self._tag(end)
        return closing, end

    def _tag(self, place: int) -> tuple[int, int]:
        """The first end tag from a place on, or one behind the end."""
        tags = ((self._text.find(tag, place), len(tag)) for tag in self._habits.end_tags)
        return min(((found, found + length) for found, length in tags if found >= 0), default=_NOWHERE)

    def check(self, place: int, start: int, closing: int) -> None:
        """Prove that a turn holds what it needs, nothing of another turn, and no end of turn before its own."""
        inside = set(SLOT.findall(self._text, start, closing))
        first = next((match.start() for match in SLOT.finditer(self._text, start, closing)), start)
        stops = (self._text.find(stop, start, closing) for stop in self._habits.stops)
        ended = self._tag(start)[0] < first or max(stops, default=-1) >= 0
        if ended or not self._bare.needed(place) <= inside or not inside <= set(self._slots[place]):
            raise Fault(
                "a turn of the assistant's that the chat template mixes with other turns",
                "turns that the template writes one behind the other",
            )

    def _found(self, places: Iterable[int], start: int = 0) -> list[int]:
        """Where the slots of some turns are first found from a place on."""
        found = (self._text.find(slot, start) for place in places for slot in self._slots[place])
        return [at for at in found if at >= 0]


# Behind every text.
_NOWHERE = (sys.maxsize, sys.maxsize)
