"""The calls that an assistant makes, with their arguments decoded once.

{"id": "…", "type": "function", "function": {"name": "…", "arguments": {…} or their JSON text}}
{"name": "…", "arguments": …, "id": "…"}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mens_core.corpus.faults import Fault, kind_of, nearest, shortened, text_of
from mens_core.corpus.json_line import read_object
from mens_core.corpus.row import ToolCall

__all__ = ["decoded", "read_calls", "read_tools"]

_CALL_FORM = '{"function": {"name": "…", "arguments": {…}}}'
_TOOL_FORM = '[{"type": "function", "function": {"name": "…", "parameters": {…}}}, …]'


def decoded(text: str, what: str) -> Any:
    """The value of a JSON text, read as strictly as a line of rows is.

    Raises:
        Fault: naming it by ``what``.
    """
    try:
        record = read_object(b'{"value": %s}' % text.encode("utf-8", "surrogatepass"), "one JSON value")
    except Fault as fault:
        raise Fault(f"{what}: {fault}", fault.expected) from fault
    if len(record) > 1:
        raise Fault(f"{what}: not JSON: Extra data", "one JSON value")
    return record["value"]


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The functions that a row's assistant may call: a list or its JSON text.

    Raises:
        Fault: if there is one without a name.
    """
    tools = decoded(value, "'tools'") if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise Fault(f"'tools' is a JSON {kind_of(tools)}", _TOOL_FORM)
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault("one of the 'tools' has no name", _TOOL_FORM)
    return tuple(tools)


def read_calls(value: Any) -> tuple[ToolCall, ...]:
    """The calls of an assistant's turn: a list, one call, or None.

    Raises:
        Fault: if a call is malformed, or has a key that would be lost.
    """
    if value is None:
        return ()
    calls = value if isinstance(value, list) else [value] if isinstance(value, dict) else None
    if calls is None:
        raise Fault(f"tool calls are a JSON {kind_of(value)}", f"[{_CALL_FORM}, …]")
    return tuple(map(_call, calls))


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict):
        raise Fault(f"a tool call is a JSON {kind_of(value)}", _CALL_FORM)
    given = {key: entry for key, entry in value.items() if entry is not None}
    if given.get("type", "function") != "function":
        raise Fault(f"a tool call has the type {shortened(given['type'])}", "function")
    inner = given.get("function", {key: given[key] for key in ("name", "arguments") if key in given})
    if not isinstance(inner, dict):
        raise Fault(f"the function of a tool call is a JSON {kind_of(inner)}", _CALL_FORM)
    if inner.get("name") is None:
        raise Fault(f"a tool call has no 'name'{nearest('name', inner)}", _CALL_FORM)
    known = {"id", "type", "function"} if "function" in given else {"id", "type", "name", "arguments"}
    lost = [key for key in given if key not in known]
    lost += [key for key, entry in inner.items() if entry is not None and key not in {"name", "arguments"}]
    if lost:
        raise Fault(f"a tool call has the key {shortened(lost[0])}, which would be lost", _CALL_FORM)
    name = text_of(inner["name"], "the name of a tool call")
    call_id = text_of(given["id"], "the id of a tool call") if "id" in given else ""
    return ToolCall(name=name, arguments=_arguments(inner.get("arguments")), id=call_id)


def _arguments(value: Any) -> Mapping[str, Any]:
    what = "the arguments of a tool call"
    # A call without arguments is written as null or as an empty text.
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    arguments = decoded(value, what) if isinstance(value, str) else value
    if not isinstance(arguments, dict):
        raise Fault(f"{what} are a JSON {kind_of(arguments)}", "an object, or its JSON text, encoded once")
    return arguments
