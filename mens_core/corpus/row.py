"""What a row is, once it has been read: one conversation to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

__all__ = ["ROLES", "Row", "ToolCall", "Turn"]

#: Who may speak. A system turn stands first, an assistant turn last, a tool turn after a call.
ROLES = ("system", "user", "assistant", "tool")


@attrs.frozen(kw_only=True)
class ToolCall:
    """A tool that the assistant asks for.

    Attributes:
        name: of the tool.
        arguments: as JSON values, decoded once.
        id: by which the tool's answer refers to the call; empty without one.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@attrs.frozen
class Turn:
    """One message of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: the text exactly as it stands in the file; blank only where the turn has tool calls.
        reasoning: what an assistant thought before it answered; empty without such a part.
        tool_calls: an assistant's calls, in order.
        name: of the tool that a tool turn answers for, or of the speaker; empty without one.
        tool_call_id: the call that a tool turn answers; empty without one.
    """

    role: str
    content: str
    reasoning: str = attrs.field(default="", kw_only=True)
    tool_calls: tuple[ToolCall, ...] = attrs.field(default=(), kw_only=True)
    name: str = attrs.field(default="", kw_only=True)
    tool_call_id: str = attrs.field(default="", kw_only=True)


@attrs.frozen
class Row:
    """One conversation to learn from.

    Attributes:
        turns: one or more; a system turn can only be the first, the last is the assistant's.
        source: where the text came from, by the row's own ``source`` key; empty when it has none.
        line: line number in the file, from 1.
        metadata: all other keys of the row, such as category, lane or rating, as parsed.
        tools: JSON schemas of the functions that the assistant may call, as OpenAI's ``tools`` lists them.
    """

    turns: tuple[Turn, ...]
    source: str
    line: int
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
