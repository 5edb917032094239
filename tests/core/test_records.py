"""Records of other kinds: what becomes of them, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.faults import Fault
from mens_core.corpus.lanes import in_lane
from mens_core.corpus.records import RECORD_FORMATS, row_of_record
from mens_core.corpus.row import Row, ToolCall, Turn
from mens_core.corpus.rows import row_of

TRACE = {
    "task_prompt": "  Which files are there?\n",
    "tool_name": "list_files",
    "arguments_json": '{"path": "tests"}',
    "result_json": '["a.py"]',
    "success": True,
}
CALL = {"tool_name": "list_files", "arguments": {"path": "tests"}, "result": ["a.py"], "success": True}

texts = st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip)
arguments = st.dictionaries(st.text(), st.none() | st.integers() | st.text())
calls = st.builds(ToolCall, name=texts, arguments=arguments, id=st.just("c"))
turns = st.builds(Turn, st.just("user"), texts, name=st.just("") | texts) | st.builds(
    Turn, st.just("assistant"), st.just(""), reasoning=st.text(), tool_calls=st.tuples(calls)
)


def fault(record_format, record):
    with pytest.raises(Fault) as caught:
        row_of_record(record_format, record, 1)
    return str(caught.value)


def test_tool_trace_becomes_a_prompt_with_the_task_and_a_json_answer():
    row = row_of_record("tool_trace", {**TRACE, "session_id": "s1"}, 7)
    user, assistant = row.turns
    assert user.content.startswith("[vox_tool_supervision]\n")
    assert "\nWhich files are there?\n\n" in user.content
    assert all(key in user.content for key in CALL)
    assert user.content.endswith("\n")
    assert json.loads(assistant.content) == CALL
    assert assistant.content == json.dumps(CALL, separators=(",", ":"))
    assert (row.line, row.source) == (7, "tool_trace:s1")
    assert row.metadata == {"category": "tool_trace", "response_mode": "json_only"}


def test_tool_trace_uses_the_followup_when_there_is_one():
    row = row_of_record("tool_trace", {**TRACE, "followup_text": " One file.\n"}, 1)
    assert row.turns[1].content == "One file."
    assert json.dumps(CALL, separators=(",", ":")) in row.turns[0].content
    assert row.metadata["response_mode"] == "prose_only"
    without = row_of_record("tool_trace", {**TRACE, "followup_text": " "}, 1)
    assert json.loads(without.turns[1].content) == CALL


@pytest.mark.parametrize("text", ["{path: tests}", "", '{"a": 1, "a": 2}', "NaN", '1, "b": 2', "not json"])
def test_tool_trace_keeps_what_is_no_json_as_text(text):
    row = row_of_record("tool_trace", {**TRACE, "arguments_json": text, "result_json": text}, 1)
    answer = json.loads(row.turns[1].content)
    assert (answer["arguments"], answer["result"]) == (text, text)


def test_tool_trace_decodes_once():
    twice = json.dumps(json.dumps({"path": "tests"}))
    row = row_of_record("tool_trace", {**TRACE, "arguments_json": twice}, 1)
    assert json.loads(row.turns[1].content)["arguments"] == '{"path": "tests"}'


@pytest.mark.parametrize("key", TRACE)
def test_tool_trace_without_one_of_its_keys_is_a_fault(key):
    assert f"no {key!r}" in fault("tool_trace", {name: value for name, value in TRACE.items() if name != key})
    assert f"found 'x{key}': did you mean {key!r}?" in fault(
        "tool_trace", {f"x{name}" if name == key else name: value for name, value in TRACE.items()}
    )


def test_tool_trace_with_a_success_that_is_no_boolean_is_a_fault():
    assert "'success' is a JSON number" in fault("tool_trace", {**TRACE, "success": 1})


def test_speech_that_was_refined_is_corrected_text():
    row = row_of_record("asr_refine", {"noisy_text": "helo wrld", "corrected_text": "Hello, world.", "rating": 4}, 1)
    assert "helo wrld" in row.turns[0].content
    assert row.turns[1].content == "Hello, world."
    assert row.metadata == {"category": "asr_refine", "rating": 4}


def test_dictated_code_lists_the_alternatives_and_keeps_the_diagnostics():
    record = {"transcript": "print one", "code": "print(1)", "transcript_alternatives": ["sprint one"]}
    row = row_of_record("speech_to_code", {**record, "diagnostics_snapshot": ["ok"], "category": "speech_mine"}, 1)
    assert row.turns[0].content.endswith("print one\n\nAlternatives:\n- sprint one")
    assert row.turns[1].content == "print(1)"
    assert row.metadata == {"category": "speech_mine", "diagnostics_snapshot": ["ok"]}
    preferred = row_of_record("speech_to_code", {**record, "refined_transcript": "Print 1.", "vox_code": "p"}, 1)
    assert "Print 1." in preferred.turns[0].content
    assert preferred.turns[1].content == "p"


@pytest.mark.parametrize("record_format", ["asr_refine", "speech_to_code"])
def test_rows_that_are_pairs_already_pass_and_get_their_category(record_format):
    row = row_of_record(record_format, {"prompt": "a", "response": "b"}, 1)
    assert [turn.content for turn in row.turns] == ["a", "b"]
    assert row.metadata == {"category": record_format}


@pytest.mark.parametrize(
    ("record_format", "good"),
    [
        ("messages", {"messages": [{"role": "assistant", "content": "a"}]}),
        ("alpaca", {"instruction": "a", "input": "", "output": "b"}),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a"}]}),
    ],
)
def test_a_form_of_rows_takes_its_own_rows_and_no_others(record_format, good):
    assert row_of_record(record_format, good, 1) == row_of(good, 1)
    assert "no '" in fault(record_format, {"prompt": "a", "response": "b"})


def test_every_format_has_a_test_here():
    assert set(RECORD_FORMATS) == {"tool_trace", "asr_refine", "speech_to_code", "messages", "alpaca", "sharegpt"}


@given(before=st.lists(turns, max_size=3), last=texts, system=st.none() | texts, source=st.text(max_size=5))
def test_a_row_that_is_written_reads_as_the_same_row(before, last, system, source):
    said = (*([Turn("system", system)] if system else []), *before, Turn("assistant", last))
    row = Row(said, source, 3, {"rating": 4}, ({"name": "f"},))
    assert row_of(json.loads(json.dumps(row.record())), 3) == row


@pytest.mark.parametrize(
    ("metadata", "source", "expected"),
    [
        ({"category": "My_Tool_Trace"}, "", ("vox_tooling", "json_only", "tool_trace", "synthetic")),
        (
            {"category": "tool_trace", "response_mode": "prose_only"},
            "",
            ("vox_tooling", "prose_only", "tool_trace", "agent"),
        ),
        ({"category": "asr_refine"}, "", ("vox_speech", "prose_only", "speech_to_code", "synthetic")),
        ({"category": "speech_to_code"}, "", ("vox_speech", "code_only", "speech_to_code", "agent")),
        ({"category": "documentation"}, "a/b.md:3", ("vox_docs_qa", "prose_only", "docs_qa", "human")),
        ({"lane": "vox_docs_qa"}, "", ("vox_docs_qa", "prose_only", "docs_qa", "synthetic")),
        ({"lane": "mine", "origin": "human"}, "agent:x", ("mine", "code_only", "vox_codegen", "human")),
        ({}, "crates/x", ("vox_codegen", "code_only", "vox_codegen", "human")),
        ({"lane": None}, "tool_trace:s", ("vox_codegen", "code_only", "vox_codegen", "agent")),
    ],
)
def test_a_row_is_put_in_a_lane_and_keeps_what_it_says_itself(metadata, source, expected):
    row = in_lane(Row((Turn("assistant", "a"),), source, 1, metadata))
    told = tuple(row.metadata[key] for key in ("lane", "response_mode", "task_family", "origin"))
    assert told == expected


def test_a_lane_that_is_no_text_is_a_fault():
    with pytest.raises(Fault, match="'lane' is a JSON number"):
        in_lane(Row((Turn("assistant", "a"),), "", 1, {"lane": 3}))
