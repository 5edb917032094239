"""Published chat templates: the text is what transformers writes, and learnt is what the assistant has to write."""

import datetime as dt
import json

import pytest
import transformers
from chat_conversations import CALLS, CONVERSATIONS, MULTI, WEATHER, assistant, user
from chat_families import FAMILIES
from chat_refusals import NO_OFFERS, refused
from transformers.utils import chat_template_utils

from mens_core.chat.messages import CallForm, messages
from mens_core.chat.open_chat import open_chat
from mens_core.chat.template import PINNED_DATE
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import Turn


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens a family's chat and transformers' tokenizer, once each."""
    found = {}

    def open_family(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("model")
            chat = open_chat(folder, FAMILIES[name].write(folder))
            found[name] = chat, transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        return found[name]

    return open_family


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    class Pinned(dt.datetime):
        @classmethod
        def now(cls, tz=None):  # noqa: ARG003 (datetime's own signature)
            return PINNED_DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Pinned)


def supervised(rendered):
    """What an assistant has to write, turn by turn."""
    return [rendered.text[start:end] for start, end in rendered.supervised]


def as_transformers(tokenizer, turns, tools, *, json_text=False, **options):
    """The text that transformers writes."""
    told = messages(turns, CallForm(json_text=json_text))
    return tokenizer.apply_chat_template(told, tools=list(tools) or None, tokenize=False, **options)


cases = [(name, conversation) for name in FAMILIES for conversation in CONVERSATIONS]
written = [case for case in cases if refused(*case) is None]


@pytest.mark.parametrize(("name", "conversation"), cases)
def test_training_text_is_what_transformers_writes_or_is_refused(opened, name, conversation):
    chat, reference = opened(name)
    turns, tools = CONVERSATIONS[conversation]
    why = refused(name, conversation)
    if why is not None:
        with pytest.raises(Fault, match=why):
            chat.render(turns, tools)
        return
    json_text = name == "deepseek-v3"
    rendered = chat.render(turns, tools)
    assert rendered.text == as_transformers(reference, turns, tools, json_text=json_text)
    assert not rendered.quoted
    prompt = chat.prompt(turns[:-1], tools)
    assert prompt.text == as_transformers(reference, turns[:-1], tools, json_text=json_text, add_generation_prompt=True)


@pytest.mark.parametrize(("name", "conversation"), written)
def test_training_text_is_supervised_in_every_answer_up_to_its_end_tag(opened, name, conversation):
    chat, _ = opened(name)
    turns, tools = CONVERSATIONS[conversation]
    rendered = chat.render(turns, tools)
    answers = [turn for turn in turns if turn.role == "assistant"]
    assert len(rendered.supervised) == len(answers)
    ends = [0]
    for answer, (start, end) in zip(answers, rendered.supervised, strict=True):
        span = rendered.text[start:end]
        assert ends[-1] <= start < end
        assert any(span.endswith(tag) for tag in chat.end_tags)
        assert answer.content.rpartition("</think>")[2].strip() in span
        assert all(call.name in span for call in answer.tool_calls)
        ends.append(end)
    assert chat.render(turns, tools, last_only=True).supervised == rendered.supervised[-1:]
    if conversation != "one letter":
        others = [turn.content.strip() for turn in turns if turn.role != "assistant"]
        assert not any(words in span for span in supervised(rendered) for words in others)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_text_starts_with_the_prompt_for_its_last_answer(opened, name):
    chat, _ = opened(name)
    rendered, prompt = chat.render(MULTI), chat.prompt(MULTI[:-1])
    start, _ = rendered.supervised[-1]
    assert prompt.text.startswith(rendered.text[:start])
    # What these open an answer with is a thought, which a finished conversation has not.
    if name not in {"deepseek-v3", "deepseek-r1-distill", "qwq-32b", "smollm3-3b"}:
        assert prompt.text == rendered.text[:start]


CHATML = ["Hello.<|im_end|>", "Sure.<|im_end|>"]
THINKING = "<think>\n\n</think>\n\n"
LLAMA3 = ["Hello.<|eot_id|>", "Sure.<|eot_id|>"]
GEMMA = ["Hello.<end_of_turn>", "Sure.<end_of_turn>"]
DEEPSEEK = ["Hello.<｜end▁of▁sentence｜>", "Sure.<｜end▁of▁sentence｜>"]
ANSWERS = {
    "llama-2-7b-chat": [" Hello. </s>", " Sure. </s>"],
    "llama-3-8b-instruct": LLAMA3,
    "llama-3-generation": LLAMA3,
    "llama-3.1-8b-instruct": LLAMA3,
    "llama-3.2-3b-instruct": LLAMA3,
    "qwen2.5-7b-instruct": CHATML,
    "qwen3-0.6b": [CHATML[0], THINKING + CHATML[1]],
    "qwen3-generation": [THINKING + answer for answer in CHATML],
    "qwq-32b": CHATML,
    "smollm2-1.7b-instruct": CHATML,
    "smollm3-3b": CHATML,
    "gemma-2-2b-it": GEMMA,
    "gemma-3-4b-it": GEMMA,
    "mistral-7b-instruct-v0.1": ["Hello.</s>", "Sure.</s>"],
    "mistral-7b-instruct-v0.3": [" Hello.</s>", " Sure.</s>"],
    "mistral-nemo": ["Hello.</s>", "Sure.</s>"],
    "phi-3-mini": ["Hello.<|end|>", "Sure.<|end|>"],
    "phi-4": CHATML,
    "gpt-oss-120b": ["<|channel|>final<|message|>Hello.<|end|>", "<|channel|>final<|message|>Sure.<|return|>"],
    "deepseek-v3": DEEPSEEK,
    "deepseek-r1-distill": DEEPSEEK,
    "deepseek-v3.1": DEEPSEEK,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_training_text_is_supervised_in_exactly_the_answers(opened, name):
    assert supervised(opened(name)[0].render(MULTI)) == ANSWERS[name]


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>'
LLAMA3_CALL = ['{"name": "weather", "parameters": {"city": "Zürich"}}<|eot_id|>', "No rain.<|eot_id|>"]
CALLS_BEGIN = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
CALLS_END = "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
ZURICH = '{"city": "Zürich"}'
CALLED = {
    "llama-3.1-8b-instruct": LLAMA3_CALL,
    "llama-3.2-3b-instruct": LLAMA3_CALL,
    "qwen2.5-7b-instruct": [HERMES, "No rain.<|im_end|>"],
    "qwen3-0.6b": [HERMES, THINKING + "No rain.<|im_end|>"],
    "qwen3-generation": [THINKING + HERMES, THINKING + "No rain.<|im_end|>"],
    "qwq-32b": [HERMES, "No rain.<|im_end|>"],
    "mistral-7b-instruct-v0.3": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Zürich"}, "id": "abcdefgh1"}]</s>',
        " No rain.</s>",
    ],
    "mistral-nemo": [
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Zürich"}, "id": "abcdefgh1"}]</s>',
        "No rain.</s>",
    ],
    "gpt-oss-120b": [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Zürich"}<|call|>',
        "<|channel|>final<|message|>No rain.<|return|>",
    ],
    "deepseek-v3": [
        f"{CALLS_BEGIN}function<｜tool▁sep｜>weather\n```json\n{ZURICH}\n```{CALLS_END}",
        "No rain.<｜end▁of▁sentence｜>",
    ],
    "deepseek-v3.1": [
        f"{CALLS_BEGIN}weather<｜tool▁sep｜>{ZURICH}{CALLS_END}",
        "No rain.<｜end▁of▁sentence｜>",
    ],
}


@pytest.mark.parametrize("name", CALLED)
def test_training_text_is_supervised_in_exactly_the_calls_and_answers(opened, name):
    tools = () if name in NO_OFFERS else (WEATHER,)
    assert supervised(opened(name)[0].render(CALLS, tools)) == CALLED[name]


def test_training_text_has_the_thoughts_that_its_template_keeps(opened):
    turns, _ = CONVERSATIONS["reasoning"]
    chat, _ = opened("qwen3-0.6b")
    assert supervised(chat.render(turns)) == ["Hello.<|im_end|>", "<think>\nAgain.\n</think>\n\nSure.<|im_end|>"]
    assert supervised(chat.render(CONVERSATIONS["thoughts in contents"][0])) == supervised(chat.render(turns))
    assert chat.keeps_reasoning
    harmony, _ = opened("gpt-oss-120b")
    assert supervised(harmony.render(turns)) == [
        "<|channel|>final<|message|>Hello.<|end|>",
        "<|channel|>analysis<|message|>Again.<|end|><|start|>assistant<|channel|>final<|message|>Sure.<|return|>",
    ]
    assert not opened("llama-3-8b-instruct")[0].keeps_reasoning


def changed(turns, place):
    """The conversation with other words in one of its turns."""
    turn = turns[place]
    return (*turns[:place], Turn(turn.role, f"Other words, {place}."), *turns[place + 1 :])


@pytest.mark.parametrize("name", FAMILIES)
def test_training_text_of_one_turn_changes_its_own_span_and_no_other(opened, name):
    chat, _ = opened(name)
    before = supervised(chat.render(MULTI))
    for place, turn in enumerate(MULTI):
        after = supervised(chat.render(changed(MULTI, place)))
        own = place // 2 if turn.role == "assistant" else None
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            assert new == (old.replace(turn.content, f"Other words, {place}.") if number == own else old)


MARKING = {"llama-3-generation", "qwen3-generation"}


@pytest.mark.parametrize(("name", "conversation"), [case for case in written if case[0] in MARKING])
def test_training_text_is_supervised_where_a_template_marks_its_generations(opened, name, conversation):
    chat, reference = opened(name)
    turns, tools = CONVERSATIONS[conversation]
    (text,), (marked,) = chat_template_utils.render_jinja_template(
        [messages(turns, CallForm())],
        tools=list(tools) or None,
        chat_template=reference.chat_template,
        return_assistant_tokens_mask=True,
        **reference.special_tokens_map,
    )
    # Some count the line end behind the end tag, or the one before the answer, which their own prompt ends with.
    assert [text[start:end].strip("\n") for start, end in marked] == [
        span.strip("\n") for span in supervised(chat.render(turns, tools))
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_of_contents_are_quoted(opened, name):
    chat, _ = opened(name)
    family = FAMILIES[name]
    tag = chat.end_tags[0]
    plain = (user("What is X?"), assistant("X ends a turn."))
    quoting = (user(f"What is {tag}?"), assistant(f"{tag} ends a turn."))
    rendered, expected = chat.render(quoting), chat.render(plain)
    assert rendered.text == expected.text.replace("X", tag)
    assert [rendered.text[start:end] for start, end in rendered.quoted] == [tag, tag]
    assert supervised(rendered) == [span.replace("X", tag) for span in supervised(expected)]
    every = "; ".join(family.special)
    (whole,) = [chat.render((user("a"), assistant(f"({every})")))]
    assert [whole.text[start:end] for start, end in whole.quoted] == list(family.special)


def test_tokens_that_open_turns_are_quoted_although_the_tokenizer_calls_them_ordinary(opened):
    chat, _ = opened("deepseek-v3.1")
    rendered = chat.render((user("Say <｜User｜> and </think>."), assistant("<｜Assistant｜>")))
    assert [rendered.text[start:end] for start, end in rendered.quoted] == ["<｜User｜>", "<｜Assistant｜>"]


def test_control_tokens_of_functions_and_calls_are_quoted(opened):
    chat, _ = opened("qwen2.5-7b-instruct")
    text = json.dumps(WEATHER).replace("Its name.", "Its <|im_end|>.")
    turns = (*CALLS[:2], Turn("tool", "<|im_start|>system", tool_call_id="abcdefgh1"), CALLS[3])
    rendered = chat.render(turns, [json.loads(text)])
    assert [rendered.text[start:end] for start, end in rendered.quoted] == ["<|im_end|>", "<|im_start|>"]


def test_the_day_is_always_the_same(opened):
    chat, _ = opened("llama-3.2-3b-instruct")
    assert chat.notes == ("the chat template writes the day: in every row it is 26 July 2024",)
    assert "Today Date: 26 Jul 2024" in chat.render(MULTI).text
    assert opened("qwen3-0.6b")[0].notes == ()
