"""Conversations written by a model's own chat template, with the part that an assistant has to write.

The text is the template's, letter by letter. Its skeleton, which rows of the same shape share, is where spans are found
and proved (``spans``); a row's own text has only to be that skeleton with the row's words in it (``skeleton``).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import attrs
from tokenizers import Tokenizer

from mens_core.chat.habits import learn
from mens_core.chat.messages import CallForm, Message, messages
from mens_core.chat.quoting import Quoting, special_tokens
from mens_core.chat.rendered import Rendered, Span
from mens_core.chat.sealed import Sealed
from mens_core.chat.skeleton import Frame, Skeleton, skeleton, slot_of
from mens_core.chat.spans import assistant_spans
from mens_core.chat.template import PINNED_DATE, Template
from mens_core.chat.template_files import TemplateFiles
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import Turn

__all__ = ["TemplateChat"]

# To be raised with every change of how texts are written or spans are found.
_VERSION = "template 1"

# Frames are kept for the shapes of rows that come again: a few hundred at most, unless every row has blanks of its own.
_MOST_FRAMES = 4096

_ALWAYS_TAGS = ("<think>", "</think>")


class TemplateChat:
    """Writes with one chat template, or two: many models have another one for conversations with functions.

    Args:
        files: what the model's folder says.
        tokenizer: that of the model.

    Raises:
        ModelError: if a template is no valid Jinja.
    """

    name = "template"
    adds_bos = False

    def __init__(self, files: TemplateFiles, tokenizer: Tokenizer) -> None:
        self._plain = _Writer(files.default, files, tokenizer)
        same = files.tool_use == files.default
        self._with_tools = self._plain if same else _Writer(files.tool_use, files, tokenizer)
        parts = (_VERSION, str(PINNED_DATE), files.default, files.tool_use, str(sorted(files.tokens.items())))
        control = (*self._plain.quoting.tokens, "", *self._with_tools.quoting.tokens, "", *self.end_tags)
        self.digest = hashlib.sha256("\0".join((*parts, *control)).encode()).hexdigest()

    @property
    def end_tags(self) -> tuple[str, ...]:
        """Texts of the tokens that end an assistant's turn."""
        return tuple(dict.fromkeys((*self._plain.habits.end_tags, *self._with_tools.habits.end_tags)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What somebody who trains with it should know: that a date is written, which is never today's."""
        if not (self._plain.uses_date or self._with_tools.uses_date):
            return ()
        return (f"the chat template writes the day: in every row it is {PINNED_DATE.day} {PINNED_DATE:%B %Y}",)

    @property
    def keeps_reasoning(self) -> bool:
        """Whether reasoning is written, at least before a last answer."""
        return self._plain.habits.keeps_reasoning and self._with_tools.habits.keeps_reasoning

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), *, last_only: bool = False
    ) -> Rendered:
        """Write a whole conversation; see ``Chat``."""
        writer = self._with_tools if tools else self._plain
        if not tools and (filled := writer.filled(turns, last_only=last_only)):
            return Rendered(*filled)
        if writer.quoting.concerns(turns, tools):
            turns, tools, words = writer.quoting.hidden(turns, tools)
            return writer.quoting.shown(*writer.write(turns, tools, last_only=last_only), words)
        return Rendered(*writer.write(turns, tools, last_only=last_only))

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Rendered:
        """Write a prompt; see ``Chat``."""
        writer = self._with_tools if tools else self._plain
        turns, tools, words = writer.quoting.hidden(turns, tools)
        return writer.quoting.shown(writer.prompt(turns, tools), (), words)


class _Shape(NamedTuple):
    """What conversations of words and nothing else have in common.

    Attributes:
        last_only: whether the last answer alone is learnt.
        roles: of the turns.
        blanks: before and behind the words of each turn; None if these are any.
    """

    last_only: bool
    roles: tuple[str, ...]
    blanks: tuple[tuple[str, ...], ...] | None = None

    def turns(self) -> list[Turn]:
        """One such conversation."""
        blanks = self.blanks or (("", ""),) * len(self.roles)
        return [Turn(role, f"{before}x{behind}") for role, (before, behind) in zip(self.roles, blanks, strict=True)]


class _Writer:
    """One template, what was learnt of it, and the frames of the shapes it has met."""

    def __init__(self, source: str, files: TemplateFiles, tokenizer: Tokenizer) -> None:
        self._template = Template(source, files.tokens)
        self.habits = learn(self._template, tokenizer, files.ends)
        self.uses_date = self._template.uses_date
        control = special_tokens(tokenizer) | self.habits.control
        self.quoting = Quoting(control)
        tags = sorted({*_ALWAYS_TAGS, *self._template.marks} - control, key=len, reverse=True)
        self._tags = re.compile(f"({'|'.join(map(re.escape, tags))})")
        self._marked = Quoting({*control, *tags}).found
        self._frames: dict[tuple[bool, tuple[tuple[str, str, str], ...]], Frame] = {}
        self._forms: dict[_Shape, Frame | None] = {}

    def filled(self, turns: Sequence[Turn], *, last_only: bool) -> tuple[str, tuple[Span, ...]] | None:
        """As ``write``, without rendering: the text that the template puts round any such words, and these.

        None if there is more to the turns than words, or the template looks at them.
        """
        for turn in turns:
            if turn.reasoning or turn.tool_calls or turn.name or turn.tool_call_id:
                return None
            if not turn.content or turn.content.isspace() or self._marked(turn.content):
                return None
        said = [turn.content for turn in turns]
        roles = tuple([turn.role for turn in turns])
        form = self._form(_Shape(last_only, roles))
        if form is not None:
            return form.filled(said)
        # It may look at the blanks round the words all the same.
        cores = [text.strip() for text in said]
        blanks = tuple([tuple(text.split(core, 1)) for text, core in zip(said, cores, strict=True)])
        form = self._form(_Shape(last_only, roles, blanks))
        return None if form is None else form.filled(cores)

    def _form(self, shape: _Shape) -> Frame | None:
        if shape not in self._forms:
            if len(self._forms) >= _MOST_FRAMES:
                self._forms.clear()
            self._forms[shape] = self._made_form(shape)
        return self._forms[shape]

    def _made_form(self, shape: _Shape) -> Frame | None:
        bare = skeleton(shape.turns(), self._tags)
        told = self._messages(bare.turns(), ())
        for message in told:
            message["content"] = Sealed(message["content"], self._marked, trimmed=shape.blanks is not None)
        text = self._template.filled(told)
        if text is None:
            return None
        frame = self._frame(bare, (), last_only=shape.last_only)
        stand_ins = [slot_of(number) for number in range(len(bare.words))]
        return frame if frame.filled(stand_ins)[0] == text else None

    def write(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], *, last_only: bool
    ) -> tuple[str, tuple[Span, ...]]:
        """The text of a conversation, and what an assistant has to write of it."""
        text = self._template.render(self._messages(turns, tools), tools)
        bare = skeleton(turns, self._tags)
        return text, self._frame(bare, tools, last_only=last_only).spans(text, bare.words)

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> str:
        """The text of a prompt."""
        return self._template.render(self._messages(turns, tools), tools, opened=True) + self.habits.heading

    def _messages(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        form = self.habits.calls
        if tools and not self._template.uses_tools:
            raise Fault(
                "functions that the chat template has no place for",
                "a row without tools; what the model should know of them as text in a turn",
            )
        if form is None:
            if any(turn.tool_calls for turn in turns):
                raise Fault("a call that the chat template has no place for", "answers in words")
            form = CallForm()
        return messages(turns, form)

    def _frame(self, bare: Skeleton, tools: Sequence[Mapping[str, Any]], *, last_only: bool) -> Frame:
        shape = None if tools else bare.key
        if shape is None:
            return self._made_frame(bare, tools, last_only=last_only)
        key = last_only, shape
        frame = self._frames.get(key)
        if frame is None:
            frame = self._made_frame(bare, tools, last_only=last_only)
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            self._frames[key] = frame
        return frame

    def _made_frame(self, bare: Skeleton, tools: Sequence[Mapping[str, Any]], *, last_only: bool) -> Frame:
        render = self._template.render
        turns = bare.turns()
        text = render(self._messages(turns, tools), tools)

        @functools.cache
        def prompt(place: int, thoughts: bool) -> str | None:
            before = turns[:place]
            if not thoughts:
                before = [attrs.evolve(turn, reasoning="") for turn in before]
            try:
                return render(self._messages(before, tools), tools, opened=True)
            except Fault:
                return None

        return Frame(text, assistant_spans(text, bare, self.habits, prompt, last_only=last_only))
