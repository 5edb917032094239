"""Conversations in the field's spellings: OpenAI's messages with tools, Alpaca, ShareGPT."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.faults import Fault
from mens_core.corpus.row import ToolCall, Turn
from mens_core.corpus.rows import row_of

ARGUMENTS = {"path": "a.py", "lines": [1, 2], "deep": {"x": None}}
FUNCTION = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}
ASK, DONE = {"role": "user", "content": "Read it."}, {"role": "assistant", "content": "Done."}
ANSWER = {"role": "tool", "content": "x = 1", "tool_call_id": "c1", "name": "read"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def calling(arguments=ARGUMENTS, **more):
    call = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **more}


def turns(**record):
    return row_of(record, 1).turns


def fault(**record):
    with pytest.raises(Fault) as caught:
        row_of(record, 1)
    return f"{caught.value} | {caught.value.expected}"


def with_nulls(value):
    """What a table of columns makes of a row: every key anywhere, null where it was absent."""
    if isinstance(value, dict):
        extra = dict.fromkeys(["tool_calls", "tool_call_id", "name", "id", "weight", "arguments", "content"])
        return extra | {key: with_nulls(member) for key, member in value.items()}
    return [with_nulls(member) for member in value] if isinstance(value, list) else value


def test_calls_answers_and_reasoning_come_back_whole():
    row = row_of({"messages": [ASK, calling(reasoning_content="I need it."), ANSWER, DONE], "tools": [FUNCTION]}, 1)
    call = ToolCall(name="read", arguments=ARGUMENTS, id="c1")
    assert row.turns == (
        Turn("user", "Read it."),
        Turn("assistant", "", reasoning="I need it.", tool_calls=(call,)),
        Turn("tool", "x = 1", name="read", tool_call_id="c1"),
        Turn("assistant", "Done."),
    )
    assert row.tools == (FUNCTION,)
    assert row_of({"messages": [ASK, DONE], "tools": json.dumps([FUNCTION])}, 1).tools == (FUNCTION,)


@given(arguments=st.dictionaries(st.text(), json_values))
def test_arguments_are_decoded_once_whether_they_are_text_or_an_object(arguments):
    for given_as in (arguments, json.dumps(arguments)):
        (turn,) = turns(messages=[calling(given_as)])
        assert turn.tool_calls[0].arguments == arguments
    assert "JSON string" in fault(messages=[calling(json.dumps(json.dumps(arguments)))])


def test_null_keys_everywhere_change_nothing():
    messages = [ASK, calling(json.dumps(ARGUMENTS)), ANSWER, DONE]
    assert turns(messages=with_nulls(messages)) == turns(messages=messages)
    assert turns(
        **with_nulls({"instruction": "a", "output": "b"}), prompt=None, turns=None, input=None, conversations=None
    )


def test_a_call_without_its_envelope_and_without_arguments_is_a_call():
    bare = {"role": "assistant", "tool_calls": [{"name": "now", "arguments": ""}]}
    assert turns(turns=[ASK, bare])[-1].tool_calls == (ToolCall(name="now", arguments={}),)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b", "image_url": None}]
    assert turns(messages=[{"role": "user", "content": parts}, DONE])[0] == Turn("user", "a b")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_spellings(key):
    assert turns(messages=[ASK, {**DONE, key: "Hm."}])[-1] == Turn("assistant", "Done.", reasoning="Hm.")


def test_a_tool_may_have_nothing_to_say_but_an_assistant_must():
    assert turns(messages=[calling(), {"role": "tool", "content": ""}, DONE])[1] == Turn("tool", "")
    assert "is empty" in fault(messages=[{"role": "assistant", "content": ""}])
    assert "no 'content'" in fault(messages=[{"role": "assistant", "content": None, "thinking": "Hm."}])
    assert "no 'content'" in fault(messages=[{"role": "assistant", "content": None, "tool_calls": []}])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([ASK, ANSWER, DONE], "a tool turn that answers no call"),
        ([calling(), ANSWER, ANSWER, DONE], "a tool turn that answers no call"),
        ([calling(), ASK, ANSWER, DONE], "a tool turn that answers no call"),
        ([calling(), {**ANSWER, "tool_call_id": "c2"}, DONE], "'tool_call_id' is no call's"),
        ([calling(), ANSWER], "the last turn is the tool's"),
        ([{**ASK, "tool_calls": []}, DONE], "the key 'tool_calls', which would be lost"),
        ([{**DONE, "tool_call_id": "c1"}], "the key 'tool_call_id', which would be lost"),
        ([calling(json.dumps([1]))], "the arguments of a tool call are a JSON array"),
        ([calling("{'path': 1}")], "the arguments of a tool call: not JSON"),
        ([calling('{"a": 1, "a": 2}')], "the arguments of a tool call: the key 'a' given twice"),
        ([calling('1, "more": 2')], "the arguments of a tool call: not JSON: Extra data"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool calls are a JSON string"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "a tool call is a JSON string"),
        ([{"role": "assistant", "tool_calls": [{"function": "x"}]}], "the function of a tool call is a JSON string"),
        ([{"role": "assistant", "tool_calls": [{"nmae": "x"}]}], "a tool call has no 'name'"),
        ([{"role": "assistant", "tool_calls": [{"function": {"nam": "x"}}]}], "(found 'nam': did you mean 'name'?)"),
        ([{"role": "assistant", "tool_calls": [{"name": "x", "index": 0}]}], "the key 'index', which would be lost"),
        ([{"role": "assistant", "tool_calls": [{"name": "x", "type": "custom"}]}], "a tool call has the type 'custom'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, DONE], "content is 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}, DONE], "a text part of a turn's content"),
        ([{**DONE, "reasoning": "a", "thinking": "b"}], "'reasoning' and 'thinking' that differ"),
        ([{"role": ["user"], "content": "a"}, DONE], "a turn has the role ['user']"),
    ],
)
def test_a_conversation_that_makes_no_sense_is_a_fault(messages, expected):
    assert expected in fault(messages=messages)


@pytest.mark.parametrize("tools", [3, "x", "[3]", [{"function": {}}], {"name": "x"}])
def test_tools_without_a_name_are_a_fault(tools):
    assert "tools" in fault(messages=[ASK, DONE], tools=tools)


def test_alpacas_input_follows_its_instruction_after_a_blank_line():
    assert turns(instruction="Add.", input="1 2", output="3")[0] == Turn("user", "Add.\n\n1 2")
    assert turns(instruction="Add.", input=" ", output="3")[0] == Turn("user", "Add.")
    assert "'input' is a JSON number" in fault(instruction="Add.", input=3, output="3")


def test_sharegpts_speakers_are_ours():
    spoken = [
        ("system", "Be brief."),
        ("human", "Read it."),
        ("function_call", json.dumps({"name": "read", "arguments": ARGUMENTS})),
        ("observation", "x = 1"),
        ("gpt", "Done."),
    ]
    conversation = [{"from": speaker, "value": value, "weight": None} for speaker, value in spoken]
    call = Turn("assistant", "", tool_calls=(ToolCall(name="read", arguments=ARGUMENTS),))
    expected = (Turn("user", "Read it."), call, Turn("tool", "x = 1"), Turn("assistant", "Done."))
    assert turns(conversations=conversation) == (Turn("system", "Be brief."), *expected)
    assert turns(conversations=conversation[1:], system="Be brief.") == (Turn("system", "Be brief."), *expected)
    assert turns(conversations=[ASK, DONE]) == turns(messages=[ASK, DONE])


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ("x", "'conversations' is a JSON string"),
        ([], "'conversations' is empty"),
        ([{"from": "humna", "value": "a"}], "did you mean 'human'?"),
        ([{"form": "human", "value": "a"}], "(found 'form': did you mean 'from'?)"),
        ([{"from": "human", "value": "a", "weight": 1}], "the key 'weight', which would be lost"),
        ([{"from": "function_call", "value": "read(a)"}], "the value of the function call: not JSON"),
        ([{"from": "human", "value": "a"}], "the last turn is the user's"),
    ],
)
def test_a_shared_conversation_that_makes_no_sense_is_a_fault(conversation, expected):
    assert expected in fault(conversations=conversation)


def test_two_forms_in_one_row_are_a_fault():
    both = {"messages": [DONE], "conversations": [{"from": "gpt", "value": "a"}]}
    assert "both turns and conversations" in fault(**both)
    assert "both conversations and prompt or response" in fault(conversations=both["conversations"], output="a")
