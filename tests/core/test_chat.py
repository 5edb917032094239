"""ChatML to the letter, and control tokens that a content merely quotes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from mens_core.chat.open_chat import TURN_END, TURN_START, ChatML
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import ToolCall, Turn
from mens_core.text.lab import lab_tokenizer

CHATML = ChatML(lab_tokenizer())

# Any text a file can hold, role tags among it; private use has a test of its own.
contents = st.text(st.characters(codec="utf-8", exclude_categories=["Co"]), min_size=1, max_size=30) | st.sampled_from(
    [TURN_END, f"{TURN_START}system\n", f"a {TURN_END} b {TURN_END}"]
)
conversations = st.lists(st.tuples(contents, contents), min_size=1, max_size=3).map(
    lambda pairs: tuple(turn for said, answered in pairs for turn in (Turn("user", said), Turn("assistant", answered)))
)

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def supervised(rendered):
    """What an assistant has to write, turn by turn."""
    return [rendered.text[start:end] for start, end in rendered.supervised]


def test_training_text_is_chatml_to_the_letter():
    turns = (Turn("system", "be brief"), Turn("user", "hi"), Turn("assistant", "hello"))
    rendered = CHATML.render(turns)
    assert rendered.text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    )
    assert supervised(rendered) == ["hello<|im_end|>"]
    assert rendered.quoted == ()


@given(conversations)
def test_training_text_starts_with_its_prompt_and_ends_with_the_answer(turns):
    whole, prompt = CHATML.render(turns), CHATML.prompt(turns[:-1])
    assert whole.text == prompt.text + turns[-1].content + TURN_END
    assert prompt.supervised == ()


@given(conversations)
def test_training_text_is_supervised_in_the_assistants_turns_or_in_the_last_of_them(turns):
    answers = [turn.content + TURN_END for turn in turns if turn.role == "assistant"]
    assert supervised(CHATML.render(turns)) == answers
    assert supervised(CHATML.render(turns, last_only=True)) == answers[-1:]


@given(conversations)
def test_every_control_token_in_a_content_is_quoted_and_no_other(turns):
    rendered = CHATML.render(turns)
    quoted = {place for start, end in rendered.quoted for place in range(start, end)}
    tags = rendered.text.count(TURN_START) + rendered.text.count(TURN_END)
    assert tags - len(rendered.quoted) == 2 * len(turns)
    assert all(rendered.text[start:end] in {TURN_START, TURN_END} for start, end in rendered.quoted)
    heads = [place for place in range(len(rendered.text)) if rendered.text.startswith(TURN_START, place)]
    assert sum(place not in quoted for place in heads) == len(turns)


def test_thoughts_calls_and_answers_of_functions_are_written_as_hermes_does():
    call = ToolCall(name="weather", arguments={"city": "Zürich"}, id="c1")
    turns = (
        Turn("user", "Rain?"),
        Turn("assistant", "I look.", reasoning="A call.", tool_calls=(call, call)),
        Turn("tool", "sunny", tool_call_id="c1"),
        Turn("assistant", "No."),
    )
    rendered = CHATML.render(turns, [WEATHER])
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert supervised(rendered) == [
        f"<think>\nA call.\n</think>\n\nI look.\n{called}\n{called}<|im_end|>",
        "No.<|im_end|>",
    ]
    assert "<|im_start|>system\n# Tools\n" in rendered.text
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in rendered.text
    assert "<|im_start|>tool\nsunny<|im_end|>" in rendered.text
    assert CHATML.render((Turn("system", "Be kind."), *turns), [WEATHER]).text.startswith(
        "<|im_start|>system\nBe kind.\n\n# Tools\n"
    )


def test_a_call_without_words_is_the_call_alone():
    turns = (Turn("user", "Rain?"), Turn("assistant", "", tool_calls=(ToolCall(name="weather", arguments={}),)))
    assert supervised(CHATML.render(turns)) == [
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'
    ]


def test_control_tokens_are_quoted_wherever_somebody_may_write_them():
    call = ToolCall(name="a", arguments={"b": [TURN_END]})
    schema = {"type": "function", "function": {"name": "a", "description": TURN_START, "parameters": {TURN_END: 1}}}
    turns = (Turn("user", "x"), Turn("assistant", "", reasoning=TURN_START, tool_calls=(call,)))
    rendered = CHATML.render(turns, [schema])
    assert [rendered.text[start:end] for start, end in rendered.quoted] == [TURN_START, TURN_END, TURN_START, TURN_END]
    assert supervised(rendered)[0].startswith(f"<think>\n{TURN_START}\n</think>")
    assert supervised(rendered)[0].endswith(f'["{TURN_END}"]}}}}\n</tool_call>{TURN_END}')


def test_a_stand_in_of_a_content_is_refused_only_beside_a_quoted_control_token():
    stand_in = "\U0010f000"
    assert stand_in in CHATML.render((Turn("user", stand_in), Turn("assistant", "a"))).text
    with pytest.raises(Fault, match="private-use character"):
        CHATML.render((Turn("user", stand_in + TURN_END), Turn("assistant", "a")))


def test_a_tokenizer_without_chatmls_tags_has_nothing_to_quote():
    turns = (Turn("user", f"What is {TURN_END}?"), Turn("assistant", "a <special>"))
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    assert ChatML(tokenizer).render(turns).quoted == ()
    tokenizer.add_special_tokens(["<special>"])
    tokenizer.add_tokens([AddedToken("What", special=False)])
    rendered = ChatML(tokenizer).render(turns)
    assert [rendered.text[start:end] for start, end in rendered.quoted] == ["<special>"]


def test_the_digest_tells_which_texts_are_control_tokens():
    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    assert ChatML(plain).digest != CHATML.digest == ChatML(lab_tokenizer()).digest
