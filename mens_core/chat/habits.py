"""What a chat template does in every conversation, learnt from a few made-up ones when a model is opened.

Nothing is known by a model's name. How an answer is opened, by which tokens it is ended, in which form calls are read:
each is read off the texts that the template makes of conversations whose words are single characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import attrs
from tokenizers import Tokenizer

from mens_core.chat.messages import CallForm, messages
from mens_core.chat.template import Template
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import ToolCall, Turn

__all__ = ["Habits", "learn"]

# Words of the made-up conversations, which no template holds.
_ASKED, _SAID, _AGAIN, _CALLED = "\ue000\ue001\ue002\ue003"
# This one is letters, since some templates write arguments as JSON in ASCII.
_TOLD = "told00001"
# Mistral's templates want nine letters or digits.
_CALL_ID = "call00001"
_OFFERED = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}, "required": []},
    },
}
_FORMS = (CallForm(), CallForm(silence=None), CallForm(json_text=True), CallForm(json_text=True, silence=None))


@attrs.frozen
class Habits:
    """A template's habits.

    Attributes:
        opening: what a generation prompt adds to a conversation that ends with a question; empty for a template that
            knows no generation prompts, or needs none since every question ends with a mark.
        cuts: lengths to which the opening may be cut where an answer is opened otherwise: the ends of its lines and the
            ends and beginnings of its added tokens, the longest first.
        heading: what such a template writes itself before an answer, although no prompt ends with it.
        end_tags: texts of the tokens that end an assistant's turn.
        stops: texts of the tokens at which the model stops by itself: no turn goes on behind one.
        control: texts of the tokens beside the special ones that open or end a turn.
        calls: the form in which it reads calls; None if it writes none.
        keeps_reasoning: whether the reasoning before a last answer is written.
    """

    opening: str
    cuts: tuple[int, ...]
    heading: str
    end_tags: tuple[str, ...]
    stops: frozenset[str]
    control: frozenset[str]
    calls: CallForm | None
    keeps_reasoning: bool


def learn(template: Template, tokenizer: Tokenizer, ends: frozenset[str]) -> Habits:
    """Learn a template's habits.

    Args:
        template: which may refuse any of the conversations; what they would have shown is then taken not to be.
        tokenizer: of the model.
        ends: texts of the tokens that end a text, as the model's configuration says.
    """
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.content.strip()]
    tokens = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")
    trial = _Trial(template)
    question, answer = Turn("user", _ASKED), Turn("assistant", _SAID)
    asked, opened = trial.text([question]), trial.text([question], opened=True)
    short, long = trial.text([question, answer]), trial.text([question, answer, Turn("user", _AGAIN), answer])
    parting = _parting(asked, opened, tokens)
    opening = opened[parting:] if _ASKED in opened[:parting] else ""
    heading = short[len(opened) : short.find(_SAID)] if not opening and short.startswith(opened) else ""
    before = tokens.findall(asked.partition(_ASKED)[0])
    openers = {*tokens.findall(opening)[:1], *tokens.findall(heading)[:1], *before[-1:]}
    calls = trial.call_form()
    behind = tokens.search(long.partition(_SAID)[2])
    closed = {behind[0] if behind else "", _last(short, tokens), _call_end(trial, calls, tokens)}
    end_tags = (ends | closed) - openers - {*tokens.findall(opening), ""}
    return Habits(
        opening=opening,
        cuts=_cuts(opening, tokens),
        heading=heading if heading.strip() else "",
        end_tags=tuple(sorted(end_tags, key=lambda tag: (-len(tag), tag))),
        stops=ends,
        control=frozenset(openers | (end_tags & set(added))),
        calls=calls,
        keeps_reasoning=_TOLD in trial.text([question, attrs.evolve(answer, reasoning=_TOLD)]),
    )


def _parting(one: str, other: str, tokens: re.Pattern[str]) -> int:
    """Where two texts part; before a token that it would be inside of."""
    pairs = enumerate(zip(one, other, strict=False))
    place = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    return next((match.start() for match in tokens.finditer(other) if match.start() < place < match.end()), place)


def _last(text: str, tokens: re.Pattern[str]) -> str:
    """The token with which a text closes; empty without one."""
    found = [match for match in tokens.finditer(text.rstrip()) if match.end() == len(text.rstrip())]
    return found[0][0] if found else ""


def _call_end(trial: _Trial, form: CallForm | None, tokens: re.Pattern[str]) -> str:
    """The token that ends a turn of one call, unless it is the call that it ends."""
    if form is None:
        return ""
    one, two = (_last(trial.calling(form, calls), tokens) for calls in (1, 2))
    return one if one == two or trial.calling(form, 2).count(_CALLED) < 2 else ""


def _cuts(opening: str, tokens: re.Pattern[str]) -> tuple[int, ...]:
    ends = {end for match in tokens.finditer(opening) for end in match.span()}
    lines = {place + 1 for place, letter in enumerate(opening) if letter == "\n"}
    return tuple(sorted((ends | lines | {len(opening)}) - {0}, reverse=True)) or (0,)


class _Trial:
    """Made-up conversations, as the template writes them; empty where it refuses one."""

    def __init__(self, template: Template) -> None:
        self._template = template

    def text(
        self, turns: Sequence[Turn], form: CallForm = _FORMS[0], tools: Sequence[Any] = (), *, opened: bool = False
    ) -> str:
        try:
            return self._template.render(messages(turns, form), tools, opened=opened)
        except Fault:
            return ""

    def calling(self, form: CallForm, calls: int = 1) -> str:
        """A conversation that ends with calls."""
        call = ToolCall(name=_CALLED, arguments={"a": _TOLD}, id=_CALL_ID)
        turns = [Turn("user", _ASKED), Turn("assistant", "", tool_calls=(call,) * calls)]
        return self.text(turns, form, [_OFFERED])

    def call_form(self) -> CallForm | None:
        """The first form in which the template writes both the name and the arguments of a call."""
        for form in _FORMS:
            _, asked, called = self.calling(form).partition(_ASKED)
            if asked and _CALLED in called and _TOLD in called:
                return form
        return None
