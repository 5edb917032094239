"""Turns → messages, in the form in which transformers' users hand them to a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import attrs

from mens_core.corpus.row import ToolCall, Turn

__all__ = ["CallForm", "Message", "messages"]

#: A turn as templates read it: role, content, tool_calls, …
Message = dict[str, Any]


@attrs.frozen
class CallForm:
    """In which of the forms that are in use a template reads calls of functions.

    Attributes:
        json_text: whether the arguments are one JSON text, as OpenAI sends them, instead of an object.
        silence: the content of a turn that only calls; None where a template takes any text for an answer.
    """

    json_text: bool = False
    silence: str | None = ""


def messages(turns: Sequence[Turn], form: CallForm) -> list[Message]:
    """The turns as messages; what a turn has not is no key."""
    return [_message(turn, form) for turn in turns]


def _message(turn: Turn, form: CallForm) -> Message:
    message: Message = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        # The two names under which templates know it, as transformers gives them both.
        message |= {"reasoning_content": turn.reasoning, "thinking": turn.reasoning}
    if turn.tool_calls:
        message["content"] = turn.content or form.silence
        message["tool_calls"] = [_call(call, form) for call in turn.tool_calls]
    if turn.name:
        message["name"] = turn.name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _call(call: ToolCall, form: CallForm) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False) if form.json_text else call.arguments
    told = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"type": "function", "id": call.id, **told} if call.id else told
