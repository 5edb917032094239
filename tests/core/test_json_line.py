"""The fast reader of a line says what the exact one says, value by value and fault by fault."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mens_core.corpus import json_line
from mens_core.corpus.faults import Fault
from mens_core.corpus.json_line import read_object

# Texts made of what could be taken for a key, and keys made of what could be taken for a text's end.
pieces = st.sampled_from(
    ['"', ":", '":', '\\":', "\\", ' ":', '" :', "  :", "{", "}", ",", "a", "é", "\n", "\t", "\u2028"]
)
texts = st.lists(pieces, max_size=6).map("".join) | st.text(max_size=5)
numbers = st.integers() | st.integers(2**62, 2**66) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
blanks = st.text(" \t\r", max_size=2)


@st.composite
def written(draw, value):
    """JSON of a value, with any blanks between its tokens; objects are lists of pairs, so a key may come twice."""
    if isinstance(value, dict):
        pairs = list(value.items())
        if pairs and draw(st.integers(0, 9)) == 0:
            pairs.append((draw(st.sampled_from(list(value))), draw(values)))
        members = [f"{draw(written(key))}{draw(blanks)}:{draw(blanks)}{draw(written(member))}" for key, member in pairs]
        return "{" + ",".join(members) + draw(blanks) + "}"
    if isinstance(value, list):
        return "[" + ",".join(draw(written(member)) for member in value) + draw(blanks) + "]"
    return draw(blanks) + json.dumps(value, ensure_ascii=draw(st.booleans()))


def outcome(read, line):
    """What a reader says: the value with the types of its numbers and the order of its keys, or the fault."""
    try:
        return repr(read(line, "a form"))
    except Fault as fault:
        return str(fault), fault.expected


@settings(max_examples=500)
@given(line=st.dictionaries(texts, values, max_size=4).flatmap(written))
@example(line='{"a\\\\": 1, "a\\\\": 2}')
@example(line='{"t": "x\\":", "a": 1, "a": 2}')
@example(line='{"a" : 1, "a"\t: 2}')
@example(line='{"a": {"b": 1, "b": 1}}')
@example(line='{"a": [[{"b": 18446744073709551616}]]}')
def test_every_line_reads_as_the_exact_reader_reads_it(line):
    assert outcome(read_object, line.encode()) == outcome(json_line._exactly, line.encode())


@given(line=st.binary(max_size=30) | st.text('{}[]":,\\u0d8 19eE.-+nNtful', max_size=30).map(str.encode))
def test_what_is_no_json_fails_alike(line):
    assert outcome(read_object, line) == outcome(json_line._exactly, line)


def test_a_count_that_misses_keys_would_be_noticed(monkeypatch):
    line = b'{"a": 1, "a": 2}'
    with pytest.raises(Fault, match="twice"):
        read_object(line, "")
    monkeypatch.setattr(json_line, "_COLON_OF_KEY", re.compile(b"{"))
    assert read_object(line, "") == {"a": 2}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": 'def f(x: int) -> str:\n    return {"a": [1:2]}'}]},
        {"prompt": 'Say "yes": or "no".', "arguments": json.dumps({"path": "a", "lines": [1, 2]})},
        {"prompt": "a" * 1000, "rating": 4, "score": 0.25},
    ],
)
@pytest.mark.parametrize(
    "style", [{}, {"separators": (",", ":")}, {"ensure_ascii": False}, {"separators": (",", " :")}]
)
def test_usual_rows_take_the_fast_way(row, style, monkeypatch):
    monkeypatch.setattr(json_line, "_exactly", lambda *_: pytest.fail("the exact reader was asked"))
    assert read_object(json.dumps(row, **style).encode(), "") == row


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"a": 1e400}', "a number beyond every float"),
        (b'{"a": [-Infinity]}', "not JSON: -Infinity"),
        (b'{"a": {"\\udc00": 1}}', "'a' holds half of a surrogate pair"),
        (b'{"\\udc00": 1}', "holds half of a surrogate pair"),
    ],
)
def test_what_no_reader_behind_us_could_take_is_a_fault(line, kind):
    with pytest.raises(Fault, match=kind):
        read_object(line, "")
