"""Chat templates that are broken or odd: refused with the reason, or still right; never a wrong mask."""

import json

import pytest
from chat_conversations import CALLS, MULTI, WEATHER, assistant, call, told, user
from chat_families import FAMILIES

from mens_core.chat.habits import learn
from mens_core.chat.open_chat import ChatML, open_chat
from mens_core.chat.template import Template
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import ToolCall, Turn
from mens_core.errors import ModelError

SMOLLM = FAMILIES["smollm2-1.7b-instruct"]
TURN = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
WHOLE = "{% for message in messages %}" + TURN + "{% endfor %}" + OPENING


@pytest.fixture
def chat(tmp_path):
    """Opens ChatML's tokenizer with a given template."""

    def opened(template):
        return open_chat(tmp_path, SMOLLM.write(tmp_path, template))

    return opened


def supervised(rendered):
    """What an assistant has to write, turn by turn."""
    return [rendered.text[start:end] for start, end in rendered.supervised]


RIGHT = ["Hello.<|im_end|>", "Sure.<|im_end|>"]
BROKEN = {
    "no end tag": (WHOLE.replace("<|im_end|>", ""), "no end of turn"),
    "no end tag behind the last turn": (
        WHOLE.replace("'<|im_end|>\n'", "('' if loop.last and message.role == 'assistant' else '<|im_end|>\n')"),
        "no end of turn",
    ),
    "no end tag but behind the last turn": (
        WHOLE.replace("'<|im_end|>\n'", "('<|im_end|>\n' if loop.last else '\n')"),
        "no end of turn",
    ),
    "turns shuffled": (WHOLE.replace("in messages", "in messages | reverse"), "opens otherwise"),
    "turns sorted by role": (WHOLE.replace("in messages", "in messages | sort(attribute='role')"), "no end of turn"),
    "capitals": (WHOLE.replace("message.content", "message.content | upper"), "changes or looks into"),
    "the first letters": (WHOLE.replace("message.content", "message.content[:3]"), "changes or looks into"),
    "a memory of one turn": (WHOLE.replace("in messages", "in messages[-1:]"), LEFT := "leaves out"),
    "answers without words": (
        WHOLE.replace("message.content", "message.content if message.role == 'user' else ''"),
        LEFT,
    ),
    "another context for the last answer": (
        "{% if add_generation_prompt %}{{ 'Be brief.\n' }}{% endif %}" + WHOLE,
        "when its last answer is still to come",
    ),
    "endless": ("{% for a in range(200000) %}x{% endfor %}" + WHOLE, "refuses: Range too big"),
    "endless nesting": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses: maximum recursion depth"),
    "a look outside": ("{{ messages.__class__.__mro__ }}" + WHOLE, "refuses: access to attribute '__class__'"),
    "a change of what it is given": ("{{ messages.append(1) }}" + WHOLE, "refuses: "),
    "division by zero": ("{{ 1 / 0 }}" + WHOLE, "refuses: division by zero"),
    "its own words": ("{{ raise_exception('Only on\nMondays.') }}", "refuses: Only on Mondays."),
    "nothing": ("", LEFT),
}


@pytest.mark.parametrize("twin", BROKEN)
def test_training_text_of_a_broken_template_is_refused(chat, twin):
    template, why = BROKEN[twin]
    with pytest.raises(Fault, match=why):
        chat(template).render(MULTI)


ODD = {
    "no prompt for an answer": WHOLE.replace(OPENING, ""),
    "a prompt whether asked for or not": WHOLE.replace(OPENING, "{{ '<|im_start|>assistant\n' }}"),
    "text behind the last turn": WHOLE + "{% if not add_generation_prompt %}{{ 'The end.' }}{% endif %}",
    "a system turn of its own": "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + WHOLE,
    "a reminder between turns": WHOLE.replace(
        TURN,
        "{% if message.role == 'user' %}{{ '<|im_start|>system\nThink.<|im_end|>\n' }}{% endif %}" + TURN,
    ),
    "trimmed": WHOLE.replace("message.content", "message.content | trim"),
    "marked": WHOLE.replace(TURN, "{% generation %}" + TURN + "{% endgeneration %}"),
}


@pytest.mark.parametrize("twin", ODD)
def test_training_text_of_an_odd_template_is_supervised_in_the_answers_all_the_same(chat, twin):
    opened = chat(ODD[twin])
    rendered = opened.render(MULTI)
    assert supervised(rendered) == RIGHT
    assert rendered.text.startswith(opened.prompt(MULTI[:-1]).text)


def test_training_text_whose_prompt_opens_a_thought_is_cut_back_to_what_both_have(chat):
    opened = chat(WHOLE.replace(OPENING, OPENING.replace("assistant\n", "assistant\n<think>\n")))
    assert supervised(opened.render(MULTI)) == RIGHT
    thinking = (user("Hi?"), assistant("<think>\nA greeting.\n</think>\nHello."))
    assert supervised(opened.render(thinking)) == ["A greeting.\n</think>\nHello.<|im_end|>"]


def test_the_words_of_a_row_cannot_imitate_what_the_skeleton_holds(chat):
    opened = chat(WHOLE)
    for words in ("\U00100000", "\U00100001\U00100002", "\U0010f000", "\ue000", "<think>", "</think>", " "):
        turns = (user(words or "?"), assistant(f"{words}."), user(f".{words}"), assistant(f"{words}x{words}"))
        assert supervised(opened.render(turns)) == [f"{words}.<|im_end|>", f"{words}x{words}<|im_end|>"]


def test_arguments_that_look_like_stand_ins_are_refused(tmp_path):
    opened = open_chat(tmp_path, FAMILIES["qwen2.5-7b-instruct"].write(tmp_path))
    turns = (user("?"), assistant("", tool_calls=(ToolCall(name="f", arguments={"a": "\U00100009"}),)))
    with pytest.raises(Fault, match="private-use character"):
        opened.render(turns, [WEATHER])
    near = (user("?"), assistant("", tool_calls=(ToolCall(name="f", arguments={"a": "\U00100000"}),)))
    with pytest.raises(Fault, match="mixes"):
        opened.render(near, [WEATHER])


def test_a_quoted_control_token_that_a_template_escapes_is_refused(tmp_path):
    family = FAMILIES["qwen2.5-7b-instruct"]
    escaping = family.template.replace("arguments | tojson", "arguments | tojson(ensure_ascii=True)")
    opened = open_chat(tmp_path, family.write(tmp_path, escaping))
    turns = (user("?"), assistant("", tool_calls=(ToolCall(name="f", arguments={"a": "<|im_end|>"}),)))
    with pytest.raises(Fault, match="that the chat template escapes"):
        opened.render(turns, [WEATHER])


def test_training_text_that_goes_on_where_the_model_stops_is_refused(chat):
    calling = "{{ message.tool_calls | tojson }}"
    twice = f"{{% if message.tool_calls %}}{calling}{{{{ '<|im_end|>\n' }}}}{{% endif %}}"
    turns = (user("Rain?"), assistant("I look.", tool_calls=(call(),)))
    with pytest.raises(Fault, match="mixes"):
        chat(WHOLE.replace(TURN, "{{ '<|im_start|>' + message.role + '\n' }}" + twice + TURN)).render(turns)


def test_calls_are_told_in_the_form_that_the_template_reads(tmp_path):
    for name, json_text, silence in (("deepseek-v3", True, ""), ("deepseek-r1-distill", True, None)):
        family = FAMILIES[name]
        form = learn(Template(family.template, family.tokens), family.tokenizer(), frozenset()).calls
        assert (form.json_text, form.silence) == (json_text, silence)
    chat = open_chat(tmp_path, FAMILIES["deepseek-r1-distill"].write(tmp_path))
    turns = (user("Rain?"), assistant("", tool_calls=(call(1), call(2))), told("blue"), assistant("No."))
    first, _ = supervised(chat.render(turns))
    assert first.startswith("<｜tool▁calls▁begin｜>")
    assert first.endswith("<｜tool▁calls▁end｜><｜end▁of▁sentence｜>")


def test_rows_of_one_shape_share_a_skeleton_and_others_do_not(chat):
    opened = chat(WHOLE)
    for number in range(5):
        opened.render((user(f"{number * ' '}{number}"), assistant("a")))
    assert len(opened._plain._frames) == 1
    opened.render((user("a <think>"), assistant("a")))
    assert len(opened._plain._frames) == 2
    opened.render(MULTI, last_only=True)
    opened.render(MULTI)
    assert len(opened._plain._frames) == 4


def write(folder, name, value):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def named(name):
    return WHOLE.replace("message.role", f"message.role + ' {name}'")


def bare_folder(tmp_path):
    tokenizer = SMOLLM.write(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    return tokenizer


def test_a_folder_without_a_template_writes_chatml(tmp_path):
    assert isinstance(open_chat(tmp_path, bare_folder(tmp_path)), ChatML)
    assert isinstance(open_chat(tmp_path / "nothing", SMOLLM.tokenizer()), ChatML)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_a_template_is_found_in_its_configuration(tmp_path, file):
    tokenizer = bare_folder(tmp_path)
    write(tmp_path, file, {"chat_template": named("x")})
    assert open_chat(tmp_path, tokenizer).render(MULTI).text.startswith("<|im_start|>user x\nHi?")


def test_the_file_of_its_own_goes_before_the_configuration(tmp_path):
    tokenizer = bare_folder(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"chat_template": named("old")})
    write(tmp_path, "chat_template.jinja", named("new"))
    assert "user new" in open_chat(tmp_path, tokenizer).render(MULTI).text


def test_rows_with_functions_have_the_template_for_them(tmp_path):
    tokenizer = bare_folder(tmp_path)
    listing = named("tools") + "{# tools #}{% if tools %}{% endif %}"
    both = [{"name": "default", "template": named("x")}, {"name": "tool_use", "template": listing}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": both})
    chat = open_chat(tmp_path, tokenizer)
    assert "user x" in chat.render(MULTI).text
    assert "user tools" in chat.render(MULTI, [WEATHER]).text
    write(tmp_path, "chat_template.jinja", named("y"))
    write(tmp_path, "additional_chat_templates/tool_use.jinja", listing)
    chat = open_chat(tmp_path, tokenizer)
    assert ("user y" in chat.render(MULTI).text, "user tools" in chat.render(MULTI, [WEATHER]).text) == (True, True)


def test_tokens_are_read_as_texts_and_as_objects(tmp_path):
    tokenizer = bare_folder(tmp_path)
    write(tmp_path, "chat_template.jinja", "{{ bos_token }}" + WHOLE.replace("'<|im_end|>", "eos_token + '"))
    write(tmp_path, "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}, "add_bos_token": True})
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<|endoftext|>"})
    rendered = open_chat(tmp_path, tokenizer).render(MULTI)
    assert rendered.text.startswith("<|endoftext|><|im_start|>user")
    assert supervised(rendered) == RIGHT


MALFORMED = {
    "no Jinja": ("chat_template.jinja", "{% for %}", "line 1: "),
    "an unknown tag": ("chat_template.jinja", "{% include 'x' %}{% nonsense %}", "nonsense"),
    "too deep": ("chat_template.jinja", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "no valid Jinja"),
    "too long": ("chat_template.jinja", " " * 1_000_001, "1000001 characters"),
    "a number": ("tokenizer_config.json", {"chat_template": 3}, "chat_template is malformed|template is malformed"),
    "half an entry": ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "malformed"),
    "no default": ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "x"}]}, "called rag"),
    "a list": ("tokenizer_config.json", [], "not an object"),
    "no JSON": ("tokenizer_config.json", "{", "cannot be read"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_template_or_configuration_is_an_error_of_the_model(tmp_path, case):
    tokenizer = bare_folder(tmp_path)
    file, value, why = MALFORMED[case]
    write(tmp_path, file, value)
    with pytest.raises(ModelError, match=why):
        open_chat(tmp_path, tokenizer)


def test_the_digest_tells_templates_and_tokens_apart(chat):
    digests = {chat(template).digest for template in (WHOLE, WHOLE + " ", named("x"), WHOLE)}
    assert len(digests) == 3
    assert chat(WHOLE).digest == chat(WHOLE).digest


def test_what_only_some_turns_have_is_told_under_the_names_that_transformers_uses(chat):
    described = chat("{{ messages | tojson }}" + WHOLE)
    text = described.prompt((Turn("user", "Hi?"), assistant("Hello.", reasoning="A greeting."))).text
    assert '"reasoning_content": "A greeting.", "thinking": "A greeting."' in text
    assert "tool_calls" not in text
    assert described.prompt(CALLS[:1]).text.startswith('[{"role": "user", "content": "Rain?"}]')
