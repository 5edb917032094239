"""The turns of a conversation, as OpenAI's ``messages`` spell them and as ShareGPT does.

    {"role": "user", "content": "…"}                        content may be a list of {"type": "text", "text": "…"}
    {"role": "assistant", "content": "…" or null, "tool_calls": [{"id": …, "function": {"name": …, "arguments": …}}]}
    {"role": "tool", "content": "…", "tool_call_id": …}
    {"from": "human", "value": "…"}

A key whose value is null counts as absent: tools that store rows in columns add such keys to every row. A key that
would be lost is a fault.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from mens_core.corpus.faults import Fault, kind_of, nearest, shortened, text_of
from mens_core.corpus.row import ROLES, Turn
from mens_core.corpus.tool_calls import decoded, read_calls

__all__ = ["check_order", "read_message", "read_shared"]

_FORM = '{"role": "user", "content": "…"}'
_SHARED_FORM = '{"from": "human", "value": "…"}'
_ROLES = frozenset(ROLES)
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Which keys say something in which role's turn.
_SAYS = {
    "system": frozenset({"role", "content", "name"}),
    "user": frozenset({"role", "content", "name"}),
    "assistant": frozenset({"role", "content", "name", "tool_calls", *_REASONING}),
    "tool": frozenset({"role", "content", "name", "tool_call_id"}),
}
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def read_message(message: Any) -> Turn:
    """One turn of ``messages``.

    Raises:
        Fault: if it is malformed, or has a key that would be lost.
    """
    if type(message) is dict and len(message) == 2:
        # Nearly all turns of most files; the way below says the same.
        role, content = message.get("role"), message.get("content")
        if type(content) is str and content and not content.isspace() and type(role) is str and role in _ROLES:
            return Turn(role, content)
    return _message(message)


def _message(message: Any) -> Turn:
    if not isinstance(message, dict):
        raise Fault(f"a turn is a JSON {kind_of(message)}", _FORM)
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given:
        raise Fault(f"a turn has no 'role'{nearest('role', given)}", _FORM)
    role = given["role"]
    if not isinstance(role, str) or role not in _ROLES:
        close = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise Fault(f"a turn has the role {shortened(role)}", f"one of {', '.join(ROLES)}{hint}")
    calls = read_calls(given.get("tool_calls")) if role == "assistant" else ()
    if "content" not in given and not calls:
        raise Fault(f"a turn has no 'content'{nearest('content', given)}", _FORM)
    lost = [key for key in given if key not in _SAYS[role]]
    if lost:
        keys = ", ".join(sorted(_SAYS[role]))
        raise Fault(f"a turn has the key {shortened(lost[0])}, which would be lost", f"nothing beyond {keys} ({role})")
    what = f"the content of the {role}'s turn"
    return Turn(
        role,
        text_of(_joined(given.get("content", "")), what, blank=bool(calls) or role == "tool"),
        reasoning=_reasoning(given),
        tool_calls=calls,
        name=_word(given, "name"),
        tool_call_id=_word(given, "tool_call_id"),
    )


def read_shared(message: Any) -> Turn:
    """One turn of ShareGPT's ``conversations``; some files have turns with role and content there.

    Raises:
        Fault: if it is malformed, or has a key that would be lost.
    """
    if not isinstance(message, dict) or ("from" not in message and "role" in message):
        return read_message(message)
    given = {key: value for key, value in message.items() if value is not None}
    for key in ("from", "value"):
        if key not in given:
            raise Fault(f"a turn has no {key!r}{nearest(key, given)}", _SHARED_FORM)
    lost = [key for key in given if key not in {"from", "value"}]
    if lost:
        raise Fault(f"a turn has the key {shortened(lost[0])}, which would be lost", f"nothing beyond {_SHARED_FORM}")
    speaker, value = given["from"], given["value"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        close = difflib.get_close_matches(str(speaker).lower(), _SPEAKERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise Fault(f"a turn is from {shortened(speaker)}", f"one of {', '.join(_SPEAKERS)}{hint}")
    role = _SPEAKERS[speaker]
    if speaker == "function_call":
        what = "the value of the function call"
        return Turn(role, "", tool_calls=read_calls(decoded(text_of(value, what), what)))
    return Turn(role, text_of(value, f"the value of the {speaker}'s turn", blank=role == "tool"))


def check_order(turns: Sequence[Turn]) -> None:
    """Check who speaks after whom.

    Raises:
        Fault: if a system turn does not stand first, the last turn is not the assistant's, or a tool answers
            without having been called.
    """
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise Fault("a system turn after the first turn", "the system turn first, or none")
    if roles[-1] != "assistant":
        raise Fault(f"the last turn is the {roles[-1]}'s", "an assistant turn last: it is what is learnt")
    if "tool" in roles:
        _check_answers(turns)


def _check_answers(turns: Sequence[Turn]) -> None:
    # Answers that the last calls still wait for, and the ids of all calls so far.
    awaited, ids = 0, set[str]()
    for turn in turns:
        if turn.role == "assistant":
            awaited = len(turn.tool_calls)
            ids.update(call.id for call in turn.tool_calls)
        elif turn.role == "tool":
            if not awaited:
                raise Fault("a tool turn that answers no call", "as many tool turns as calls, right after them")
            if turn.tool_call_id and turn.tool_call_id not in ids:
                raise Fault("a tool turn's 'tool_call_id' is no call's", "the 'id' of a call before it")
            awaited -= 1
        else:
            awaited = 0


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    form = '{"type": "text", "text": "…"}'
    texts = []
    for part in content:
        given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if given.get("type") != "text":
            kind = given.get("type", kind_of(part))
            raise Fault(f"a part of a turn's content is {shortened(kind)}", f"parts such as {form}")
        if set(given) != {"type", "text"} or not isinstance(given["text"], str):
            raise Fault("a text part of a turn's content is malformed", form)
        texts.append(given["text"])
    return "".join(texts)


def _reasoning(given: Mapping[str, Any]) -> str:
    spelt = [key for key in _REASONING if key in given]
    if len({str(given[key]) for key in spelt}) > 1:
        raise Fault(f"{spelt[0]!r} and {spelt[1]!r} that differ", "one of the two, or both alike")
    return text_of(given[spelt[0]], repr(spelt[0]), blank=True) if spelt else ""


def _word(given: Mapping[str, Any], key: str) -> str:
    return text_of(given[key], f"the {key!r} of a turn") if key in given else ""
