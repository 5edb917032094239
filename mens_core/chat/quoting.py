"""Control tokens that a content merely quotes: hidden while a conversation is rendered, put back marked.

A corpus about language models holds ``<|im_end|>`` as a word like any other. Whoever renders sees a stand-in for it;
in the finished text the word returns, with its place, so that the encoder spells it instead of ending a turn.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from mens_core.chat.rendered import Rendered, Span
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import ToolCall, Turn

__all__ = ["FIRST_STAND_IN", "Quoting", "special_tokens"]

#: The stand-ins are characters of Unicode's last plane, which is for private use and the least used of all.
FIRST_STAND_IN = 0x10F000
_STAND_INS = re.compile(f"[{chr(FIRST_STAND_IN)}-\U0010ffff]")
_MOST = 0xFFE
# How JSON writes one in ASCII.
_ESCAPED = re.compile(r"\\udbf[c-f]\\ud", re.IGNORECASE)

# More searches than this for a token's first letters take longer than the one that looks for the tokens.
_MOST_HINTS = 4


def special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """Texts of the tokens that a tokenizer calls special."""
    return frozenset(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)


class Quoting:
    """Finds, hides and shows quoted control tokens.

    Args:
        tokens: texts of the control tokens.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        #: In the order in which they are looked for, so that a token wins over those it contains.
        self.tokens = tuple(sorted(set(tokens) - {""}, key=lambda text: (-len(text), text)))
        self._any = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        hints = {text[:2] for text in self.tokens}
        if len(hints) > _MOST_HINTS:
            hints = {text[:1] for text in self.tokens}
        self._hints = tuple(sorted(hints)) if len(hints) <= _MOST_HINTS else ("",)

    def found(self, text: str) -> bool:
        """Whether a text quotes a control token."""
        for hint in self._hints:
            if hint in text:
                return self._any.search(text) is not None
        return False

    def concerns(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a conversation quotes one anywhere: a content, reasoning, a call, a schema."""
        found = self.found
        for turn in turns:
            if found(turn.content) or (turn.reasoning and found(turn.reasoning)):
                return True
            if (turn.tool_calls or turn.name or turn.tool_call_id) and any(map(found, _spoken(turn))):
                return True
        return bool(tools) and any(map(found, _texts(tools)))

    def hidden(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Turn], list[Mapping[str, Any]], tuple[str, ...]]:
        """The conversation with stand-ins, and the control tokens they stand for.

        Raises:
            Fault: if it holds a stand-in already, or more kinds of control tokens than there are stand-ins.
        """
        words: dict[str, str] = {}

        def stand_in(match: re.Match[str]) -> str:
            return words.setdefault(match[0], chr(FIRST_STAND_IN + len(words)))

        def hide(text: str) -> str:
            if _STAND_INS.search(text):
                raise Fault("a private-use character (U+10F000 …) beside a quoted control token", "a text without it")
            return self._any.sub(stand_in, text)

        spoken = [_mapped_turn(turn, hide) for turn in turns]
        offered = [_mapped(tool, hide) for tool in tools]
        if len(words) > _MOST:
            raise Fault("thousands of different control tokens quoted in one row", "a shorter row")
        return spoken, offered, tuple(words)

    @staticmethod
    def shown(text: str, supervised: Sequence[Span], words: Sequence[str]) -> Rendered:
        """Put the control tokens back for their stand-ins; the spans move with the text.

        Raises:
            Fault: if a chat template has written a stand-in as JSON's escape, which is no stand-in any more.
        """
        if _ESCAPED.search(text):
            raise Fault("a quoted control token that the chat template escapes", "a row without it")
        parts: list[str] = []
        quoted: list[Span] = []
        # Where a stand-in ends, and by how much the text behind it moves.
        ends, moves = [0], [0]
        at = length = 0
        for match in _STAND_INS.finditer(text):
            word = words[ord(match[0]) - FIRST_STAND_IN]
            parts += (text[at : match.start()], word)
            length += match.start() - at + len(word)
            quoted.append((length - len(word), length))
            at = match.end()
            ends.append(at)
            moves.append(length - at)
        parts.append(text[at:])

        def moved(place: int) -> int:
            return place + moves[bisect_right(ends, place) - 1]

        return Rendered("".join(parts), tuple((moved(start), moved(end)) for start, end in supervised), tuple(quoted))


def _spoken(turn: Turn) -> Iterator[str]:
    """A turn's texts beside its content and reasoning."""
    yield from (turn.name, turn.tool_call_id)
    for call in turn.tool_calls:
        yield from (call.name, call.id)
        yield from _texts(call.arguments)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The JSON value with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_mapped(item, change) for item in value]
    return value


def _mapped_turn(turn: Turn, change: Callable[[str], str]) -> Turn:
    calls = tuple(
        ToolCall(name=change(call.name), arguments=_mapped(call.arguments, change), id=change(call.id))
        for call in turn.tool_calls
    )
    return Turn(
        turn.role,
        change(turn.content),
        reasoning=change(turn.reasoning),
        tool_calls=calls,
        name=change(turn.name),
        tool_call_id=change(turn.tool_call_id),
    )
