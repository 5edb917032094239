"""Templates that only fill their text with words are proved to; those that look at a word never are."""

import pytest
from chat_conversations import CONVERSATIONS, MULTI, assistant, user
from chat_families import FAMILIES
from hypothesis import assume, given
from hypothesis import strategies as st

from mens_core.chat.open_chat import open_chat
from mens_core.chat.sealed import Looked, Sealed
from mens_core.chat.template import Template
from mens_core.corpus.faults import Fault
from mens_core.corpus.row import Turn

SMOLLM = FAMILIES["smollm2-1.7b-instruct"]
# What a message's content may be made of in a template that only writes it.
FILLING = {
    "as it is": "{{ message.content }}",
    "trimmed": "{{ message.content | trim }}{{ message.content.strip() }}{{ message.content.rstrip('\n ') }}",
    "added": "{{ 'a' + message.content + 'b' }}",
    "a default": "{{ message.content or 'nothing' }}{{ message.content | default('nothing') }}",
    "a kind": "{% if message.content is string and message.content is not mapping %}{{ message.content }}{% endif %}",
    "a row of letters": (
        "{% if message.content is iterable and message.content is sequence %}{{ message.content }}{% endif %}"
    ),
    "nothing": "{% if message.content != '' and message.content is not none %}{{ message.content }}{% endif %}",
    "a mark": "{% if '</think>' in message.content %}{{ 1 / 0 }}{% endif %}{{ message.content.split('</think>')[-1] }}",
    "a mark at an end": "{% if message.content.startswith('<think>') %}x{% endif %}{{ message.content }}",
    "a mark replaced": "{{ message.content.replace('<think>', '') }}",
    "a block": "{% set block %} {{ message.content }} {% endset %}{{ block | trim }}",
    "a macro": "{% macro m(text) %}({{ text }}){% endmacro %}{{ m(message.content) + '!' }}",
    "a namespace": "{% set ns = namespace(text='') %}{% set ns.text = ns.text + message.content %}{{ ns.text }}",
}
# One that asks for what words of one shape do not share.
LOOKING = {
    "capitals": "{{ message.content | upper }}",
    "capitals of its own": "{{ message.content.upper() }}",
    "a length": "{{ message.content | length }}",
    "a size in a test": "{% if message.content | length > 5 %}x{% endif %}{{ message.content }}",
    "a word": "{% if message.content == 'Hello.' %}x{% endif %}{{ message.content }}",
    "a word among others": "{% if message.content in ['Hello.', 'Hi?'] %}x{% endif %}{{ message.content }}",
    "a word the other way round": "{% if 'Hello.' == message.content %}x{% endif %}{{ message.content }}",
    "a word in a text": "{% if message.content in 'Hello. Hi?' %}x{% endif %}{{ message.content }}",
    "a part": "{% if 'Hello' in message.content %}x{% endif %}{{ message.content }}",
    "a beginning": "{% if message.content.startswith('He') %}x{% endif %}{{ message.content }}",
    "an end": "{% if message.content[-1] == '.' %}x{% endif %}{{ message.content }}",
    "first letters": "{{ message.content[:3] }}",
    "letters one by one": "{% for letter in message.content %}{{ letter }} {% endfor %}",
    "the first letter": "{{ message.content | first }}{{ message.content }}",
    "letters turned round": "{{ message.content | reverse }}{{ message.content }}",
    "a list of letters": "{{ message.content | list | length }}{{ message.content }}",
    "lines": "{{ message.content.splitlines() | length }}{{ message.content }}",
    "words": "{{ message.content.split() | length }}{{ message.content }}",
    "a word replaced": "{{ message.content | replace('Hello', 'Bye') }}",
    "a word taken out": "{{ message.content.replace('Hello', '') }}",
    "letters trimmed": "{{ message.content.strip('H.') }}",
    "letters trimmed by a filter": "{{ message.content | trim('H.') }}",
    "a number": "{{ message.content | int }}{{ message.content }}",
    "a fraction": "{{ message.content | float }}{{ message.content }}",
    "JSON": "{{ message.content | tojson }}",
    "JSON of the whole": "{{ message | tojson }}",
    "a list as it is shown": "{{ [message.content] }}",
    "a format": "{{ '%s' | format(message.content) }}",
    "an old format": "{{ '%s' % message.content }}",
    "a format of its own": "{{ message.content % () }}",
    "a new format": "{{ '{}'.format(message.content) }}",
    "a list joined": "{{ [message.content, '!'] | join }}",
    "a join of its own": "{{ ', '.join([message.content]) }}",
    "a text that joins": "{{ message.content.join(['a', 'b']) }}",
    "parts put together": "{{ message.content ~ '!' }}",
    "twice": "{{ message.content * 2 }}",
    "an escape": "{{ message.content | escape }}",
    "escapes everywhere": "{% autoescape true %}{{ message.content }}{% endautoescape %}",
    "an order": "{{ [message.content, 'b'] | sort | first }}{{ message.content }}",
    "the greater": "{% if message.content > 'I' %}x{% endif %}{{ message.content }}",
    "a key": "{{ {message.content: 1} | length }}{{ message.content }}",
    "a key that is looked for": "{{ {'Hello.': 'x'}.get(message.content) }}{{ message.content }}",
    "an item's name": "{{ {'Hello.': 'x'}[message.content] }}{{ message.content }}",
    "a letter's place": "{{ 'Hello.'[message.content] }}{{ message.content }}",
    "lower case": "{% if message.content is lower %}x{% endif %}{{ message.content }}",
    "equal contents": "{% if messages[0].content == messages[-1].content %}x{% endif %}{{ message.content }}",
    "a change": "{% if loop.changed(message.content) %}x{% endif %}{{ message.content }}",
    "a chosen turn": "{{ messages | selectattr('content', 'equalto', 'Hello.') | list | length }}{{ message.content }}",
    "groups": "{{ messages | groupby('content') | list | length }}{{ message.content }}",
    "a macro's length": "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(message.content) | length }}{{ message.content }}",
    "a block's length": "{% set block %}{{ message.content }}{% endset %}{{ block | length }}{{ message.content }}",
    "a block in capitals": "{% filter upper %}{{ message.content }}{% endfilter %}",
    "a mark in its own text": "{% if '<think>' in '<thi' + message.content %}x{% endif %}{{ message.content }}",
}


# Blanks round the words, which are no secret.
BEFORE, BEHIND = "\n ", " \n"


def template_of(content):
    turn = "<|im_start|>{{ message.role }}\n" + content + "<|im_end|>\n"
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return "{% for message in messages %}" + turn + "{% endfor %}" + opening


def filled(template, *, trimmed=True):
    """What a template that writes contents so makes of a sealed conversation."""
    stand_ins = [f"{BEFORE}{chr(0x100000 + place)}{BEHIND}" for place in range(len(MULTI))]
    contents = [Sealed(text, lambda text: "think>" in text, trimmed=trimmed) for text in stand_ins]
    messages = [{"role": turn.role, "content": content} for turn, content in zip(MULTI, contents, strict=True)]
    return Template(template_of(template), {}).filled(messages)


@pytest.mark.parametrize("case", FILLING)
def test_a_template_that_only_writes_words_is_proved_to_fill(case):
    text = filled(FILLING[case])
    for place, turn in enumerate(MULTI):
        text = text.replace(chr(0x100000 + place), turn.content)
    told = [{"role": turn.role, "content": f"{BEFORE}{turn.content}{BEHIND}"} for turn in MULTI]
    assert text == Template(template_of(FILLING[case]), {}).render(told, ())


@pytest.mark.parametrize("case", LOOKING)
def test_a_template_that_looks_at_words_is_never_proved_to_fill(case):
    assert filled(LOOKING[case]) is None


def test_a_trim_looks_at_words_whose_blanks_are_not_known():
    for case, content in FILLING.items():
        assert (filled(content, trimmed=False) is None) == (case in {"trimmed", "a block"})


def test_a_look_is_not_kept_by_whoever_keeps_exceptions():
    with pytest.raises(Looked):
        len(Sealed("x"))
    assert not issubclass(Looked, Exception)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Opens a family's chat, once each."""
    found = {}

    def chat_of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("model")
            found[name] = open_chat(folder, FAMILIES[name].write(folder))
        return found[name]

    return chat_of


PLAIN = ("single", "multi", "foreign", "one letter", "blanks")
BLANKS = st.sampled_from(["", "", " ", "\n", "\t \n\n", "    "])
WORDS = st.text(min_size=1, max_size=20).filter(str.strip)
SAID = st.builds("{}{}{}".format, BLANKS, WORDS, BLANKS)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_templates_are_proved_to_fill_plain_conversations(chats, name):
    for conversation in PLAIN:
        assert chats(name)._plain.filled(CONVERSATIONS[conversation][0], last_only=False) is not None


@pytest.mark.parametrize("name", FAMILIES)
@given(said=st.lists(SAID, min_size=4, max_size=4), last_only=st.booleans())
def test_a_filled_text_is_the_rendered_one_with_the_same_spans(chats, name, said, last_only):
    writer = chats(name)._plain
    assume(not any(map(writer._marked, said)))
    turns = [Turn(turn.role, text) for turn, text in zip(MULTI, said, strict=True)]
    assert writer.filled(turns, last_only=last_only) == writer.write(turns, (), last_only=last_only)


@pytest.mark.parametrize(
    "turns",
    [
        (user("Hi?"), assistant("")),
        (user(" "), assistant("Hello.")),
        (user("Hi?"), assistant("Hello.", reasoning="A greeting.")),
        (user("Hi <|im_end|>"), assistant("Hello.")),
        (user("Hi?"), assistant("<think>\nA greeting.\n</think>\n\nHello.")),
    ],
)
def test_rows_with_more_than_words_are_not_filled(chats, turns):
    assert chats("qwen3-0.6b")._plain.filled(turns, last_only=False) is None


def test_a_template_that_looks_is_rendered_for_each_row(tmp_path):
    looking = template_of("{{ '!' if message.content | length > 6 }}{{ message.content }}")
    chat = open_chat(tmp_path, SMOLLM.write(tmp_path, looking))
    assert "\nHello.<|im_end|>" in chat.render([user("Hi?"), assistant("Hello.")]).text
    with pytest.raises(Fault, match="looks into"):
        chat.render([user("Hi?"), assistant("Hello there.")])
