"""What a row is for, where it does not say so itself: lane, response mode, task family, origin.

A mix chooses rows by their lane, so that prose does not dilute what is learnt of code. What a row says of itself is
never changed.
"""

from __future__ import annotations

import re
from typing import Any

import attrs

from mens_core.corpus.faults import Fault, kind_of
from mens_core.corpus.pair import CODE_LANE, DOCS_LANE
from mens_core.corpus.row import Row

__all__ = ["in_lane"]

TOOL_LANE, SPEECH_LANE = "vox_tooling", "vox_speech"

# The first word that a category contains decides: lane, response mode, task family.
_BY_CATEGORY = {
    "tool_trace": (TOOL_LANE, "json_only", "tool_trace"),
    "asr_refine": (SPEECH_LANE, "prose_only", "speech_to_code"),
    "speech": (SPEECH_LANE, "code_only", "speech_to_code"),
    "documentation": (DOCS_LANE, "prose_only", "docs_qa"),
}
_OTHERWISE = (CODE_LANE, "code_only", "vox_codegen")
_HUMAN_SOURCE = re.compile(r"crates/|\.(rs|vox|py|md|markdown)(:\d+)?$")


def in_lane(row: Row) -> Row:
    """The row with lane, response_mode, task_family and origin in its metadata.

    Raises:
        Fault: if its lane or category is no text.
    """
    for key in ("lane", "category"):
        value = row.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise Fault(f"{key!r} is a JSON {kind_of(value)}", f"{key!r} as a text")
    category = (row.metadata.get("category") or "").lower()
    otherwise = _BY_CATEGORY["documentation"] if row.metadata.get("lane") == DOCS_LANE else _OTHERWISE
    lane, mode, family = next((said for word, said in _BY_CATEGORY.items() if word in category), otherwise)
    told: dict[str, Any] = {"lane": lane, "response_mode": mode, "task_family": family}
    told["origin"] = _origin(row.source, category)
    said = {key: value for key, value in row.metadata.items() if value is not None}
    return attrs.evolve(row, metadata={**said, **{key: value for key, value in told.items() if key not in said}})


def _origin(source: str, category: str) -> str:
    if _HUMAN_SOURCE.search(source):
        return "human"
    if source.startswith(("tool_trace:", "agent:")) or category in {"tool_trace", "speech_to_code"}:
        return "agent"
    return "synthetic"
