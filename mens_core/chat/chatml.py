r"""ChatML, for models whose folder holds no chat template.

    <|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>

No newline follows the last turn. Supervised is what follows ``assistant\n``, up to its end tag; nothing else.
Functions are listed in the system turn and called in the assistant's content, as Hermes and Qwen2.5 write them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from mens_core.chat.quoting import Quoting, special_tokens
from mens_core.chat.rendered import Rendered, Span
from mens_core.corpus.row import ToolCall, Turn

__all__ = ["TURN_END", "TURN_START", "ChatML"]

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

# To be raised with every change of the text.
_VERSION = "chatml 1"

# The tags are those of Hermes and Qwen2.5.
_TOOLS = """\
# Tools

These functions can be called; beside each stands the schema of its arguments:
<tools>
{schemas}
</tools>

A call is written as JSON with the function's name and its arguments:
<tool_call>
{{"name": <name>, "arguments": <object>}}
</tool_call>"""


class ChatML:
    """Writes ChatML.

    Args:
        tokenizer: that of the model. What it calls special, and ChatML's tags where they are tokens, are control
            tokens, which a content can only quote.
    """

    name = "chatml"
    adds_bos = True
    end_tags = (TURN_END,)
    notes = ()
    keeps_reasoning = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        tags = {tag for tag in (TURN_START, TURN_END) if tokenizer.token_to_id(tag) is not None}
        self._quoting = Quoting(special_tokens(tokenizer) | tags)
        self.digest = hashlib.sha256("\0".join((_VERSION, *self._quoting.tokens)).encode()).hexdigest()

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), *, last_only: bool = False
    ) -> Rendered:
        """Write a whole conversation; see ``Chat``."""
        if self._quoting.concerns(turns, tools):
            turns, tools, words = self._quoting.hidden(turns, tools)
            return self._quoting.shown(*_written(turns, tools, last_only=last_only), words)
        return Rendered(*_written(turns, tools, last_only=last_only))

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Rendered:
        """Write a prompt; see ``Chat``. It is the start of any conversation that goes on from these turns."""
        turns, tools, words = self._quoting.hidden(turns, tools)
        text, _ = _written(turns, tools)
        return self._quoting.shown(f"{text}\n{TURN_START}assistant\n", (), words)


def _written(
    turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], *, last_only: bool = False
) -> tuple[str, tuple[Span, ...]]:
    if tools:
        turns = _with_tools(turns, tools)
    parts: list[str] = []
    spans: list[Span] = []
    length = 0
    for turn in turns:
        head = f"{TURN_START}{turn.role}\n" if not length else f"\n{TURN_START}{turn.role}\n"
        body = turn.content + TURN_END
        length += len(head) + len(body)
        if turn.role == "assistant":
            if turn.tool_calls or turn.reasoning:
                length -= len(body)
                body = _said(turn)
                length += len(body)
            spans.append((length - len(body), length))
        parts += (head, body)
    return "".join(parts), tuple(spans[-1:] if last_only else spans)


def _with_tools(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The turns, with the functions listed at the end of the system turn."""
    listed = _TOOLS.format(schemas="\n".join(map(_json, tools)))
    if turns and turns[0].role == "system":
        return [Turn("system", f"{turns[0].content}\n\n{listed}"), *turns[1:]]
    return [Turn("system", listed), *turns]


def _said(turn: Turn) -> str:
    """What an assistant writes when it thinks or calls, with its end tag."""
    thought = f"<think>\n{turn.reasoning}\n</think>\n\n" if turn.reasoning else ""
    return thought + "\n".join([*filter(None, [turn.content]), *map(_call, turn.tool_calls)]) + TURN_END


def _call(call: ToolCall) -> str:
    return f"<tool_call>\n{_json({'name': call.name, 'arguments': call.arguments})}\n</tool_call>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
