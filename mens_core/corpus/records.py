"""Records of other kinds → rows: what a tool did, what speech recognition heard, what was dictated.

A mix names the format of a source; each format here takes a parsed line and gives the record of a row. Keys that a
format does not use are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mens_core.corpus.faults import Fault, kind_of, nearest, text_of
from mens_core.corpus.row import Row
from mens_core.corpus.rows import row_of
from mens_core.corpus.tool_calls import decoded

__all__ = ["RECORD_FORMATS", "row_of_record"]

_Record = Mapping[str, Any]

#: First line of a prompt that was made from a tool trace; readers of older corpora look for it.
TOOL_TAG = "[vox_tool_supervision]"
_ASK_CALL = (
    "Which tool call does this task need, and what does it give? Answer with one JSON object: tool_name (string), "
    "arguments (object), result (any value), success (boolean)."
)
_ASK_FOLLOWUP = "The tool has answered:\n{call}\n\nSay what this means for the task."
_ASK_CORRECTION = "Correct this transcript of speech. Keep its meaning; answer with the corrected text only."
_ASK_CODE = "Write the code that was dictated. Answer with code only."


def row_of_record(record_format: str | None, record: _Record, line: int) -> Row:
    """The row that a parsed line of a source stands for.

    Args:
        record_format: one of ``RECORD_FORMATS``; None for rows in any form of ``corpus.rows``.
        record: from ``read_object``.
        line: its number, from 1.

    Raises:
        Fault: if the record is not of that format, or its row cannot be used.
    """
    return row_of(RECORD_FORMATS[record_format](record) if record_format else record, line)


def _tool_trace(record: _Record) -> dict[str, Any]:
    """What a tool was asked and answered; with a follow-up, what an assistant made of it."""
    form = "task_prompt, tool_name, arguments_json, result_json, success"
    task, tool = (_required(record, key, form) for key in ("task_prompt", "tool_name"))
    success = _given(record, "success", form)
    if not isinstance(success, bool):
        raise Fault(f"'success' is a JSON {kind_of(success)}", "true or false")
    call = {
        "tool_name": tool,
        "arguments": _value(_given(record, "arguments_json", form)),
        "result": _value(_given(record, "result_json", form)),
        "success": success,
    }
    answer = json.dumps(call, ensure_ascii=False, separators=(",", ":"))
    followup = _optional(record, "followup_text")
    ask = _ASK_FOLLOWUP.format(call=answer) if followup else _ASK_CALL
    session = _optional(record, "session_id")
    source = {"source": f"tool_trace:{session}"} if session else {}
    mode = {"response_mode": "prose_only" if followup else "json_only"}
    used = {"task_prompt", "tool_name", "arguments_json", "result_json", "success", "followup_text", "session_id"}
    return {
        "category": "tool_trace",
        **mode,
        **source,
        **_others(record, used),
        "prompt": f"{TOOL_TAG}\nTask:\n{task.strip()}\n\n{ask}\n",
        "response": followup or answer,
    }


def _asr_refine(record: _Record) -> dict[str, Any]:
    """What speech recognition heard, and what had been said."""
    if _is_pair(record):
        return {"category": "asr_refine", **_others(record, set())}
    form = "noisy_text, corrected_text"
    return {
        "category": "asr_refine",
        **_others(record, {"noisy_text", "corrected_text"}),
        "prompt": f"{_ASK_CORRECTION}\n\n{_required(record, 'noisy_text', form).strip()}",
        "response": _required(record, "corrected_text", form),
    }


def _speech_to_code(record: _Record) -> dict[str, Any]:
    """What was dictated, and the code that was meant."""
    if _is_pair(record):
        return {"category": "speech_to_code", **_others(record, set())}
    form = "refined_transcript (or transcript), vox_code (or code)"
    transcript, code = ("refined_transcript", "transcript"), ("vox_code", "code")
    heard, meant = _first_given(record, transcript), _first_given(record, code)
    alternatives = record.get("transcript_alternatives") or []
    if not isinstance(alternatives, list):
        raise Fault(f"'transcript_alternatives' is a JSON {kind_of(alternatives)}", "a list of texts")
    others = [text_of(text, "one of the 'transcript_alternatives'").strip() for text in alternatives]
    heading = ["", "Alternatives:", *(f"- {text}" for text in others)] if others else []
    return {
        "category": "speech_to_code",
        **_others(record, {*transcript, *code, "transcript_alternatives"}),
        "prompt": "\n".join([_ASK_CODE, "", _required(record, heard, form).strip(), *heading]),
        "response": _required(record, meant, form),
    }


def _with_keys(*groups: tuple[str, ...]) -> Callable[[_Record], dict[str, Any]]:
    """A format of ``corpus.rows`` that a row must have, told by one key of each group."""

    def check(record: _Record) -> dict[str, Any]:
        for keys in groups:
            if all(record.get(key) is None for key in keys):
                raise Fault(f"no {keys[0]!r}{nearest(keys[0], record)}", " and ".join(" or ".join(k) for k in groups))
        return dict(record)

    return check


#: Name in a mix → parsed line to the record of a row.
RECORD_FORMATS: Mapping[str, Callable[[_Record], dict[str, Any]]] = {
    "tool_trace": _tool_trace,
    "asr_refine": _asr_refine,
    "speech_to_code": _speech_to_code,
    "messages": _with_keys(("messages", "turns")),
    "alpaca": _with_keys(("instruction",), ("output",)),
    "sharegpt": _with_keys(("conversations",)),
}


def _is_pair(record: _Record) -> bool:
    return record.get("prompt") is not None and record.get("response") is not None


def _given(record: _Record, key: str, form: str) -> Any:
    if record.get(key) is None:
        raise Fault(f"no {key!r}{nearest(key, record)}", form)
    return record[key]


def _first_given(record: _Record, spellings: tuple[str, str]) -> str:
    return next((key for key in spellings if record.get(key) is not None), spellings[0])


def _required(record: _Record, key: str, form: str) -> str:
    return text_of(_given(record, key, form), repr(key))


def _optional(record: _Record, key: str) -> str:
    return text_of(record[key], repr(key), blank=True).strip() if record.get(key) is not None else ""


def _others(record: _Record, used: set[str]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in used and value is not None}


def _value(given: Any) -> Any:
    """A JSON text decoded once; a text that is no JSON stays what it is."""
    if not isinstance(given, str):
        return given
    try:
        return decoded(given, "the value")
    except Fault:
        return given
