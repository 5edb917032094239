"""Reading train.jsonl: what is accepted comes back whole, what is faulty is refused all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.row import Row, Turn
from mens_core.corpus.rows import read_rows
from mens_core.errors import DataError

contents = st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip)
dialogues = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), contents), max_size=4)


def written(folder: Path, *records: Any) -> Path:
    path = folder / "train.jsonl"
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def one(folder: Path, record: Any) -> Row:
    rows = read_rows(written(folder, record))
    assert len(rows) == 1
    return rows[0]


def refused(folder: Path, *records: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(written(folder, *records))
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(before=dialogues, last=contents, system=st.none() | contents, key=st.sampled_from(["turns", "messages"]))
def test_any_conversation_comes_back_unchanged(
    folder: Path, before: list[tuple[str, str]], last: str, system: str | None, key: str
) -> None:
    spoken = [*([("system", system)] if system else []), *before, ("assistant", last)]
    row = one(folder, {key: [{"role": role, "content": content} for role, content in spoken]})
    assert row.turns == tuple(Turn(role, content) for role, content in spoken)


@given(prompt=contents, response=contents, system=st.none() | contents)
def test_prompt_and_response_are_a_user_and_an_assistant_turn(
    folder: Path, prompt: str, response: str, system: str | None
) -> None:
    expected: tuple[Turn, ...] = (Turn("user", prompt), Turn("assistant", response))
    if system:
        expected = (Turn("system", system), *expected)
    for record in (
        {"prompt": prompt, "response": response},
        {"instruction": prompt, "output": response},
        {"prompt": prompt, "instruction": prompt, "response": response, "output": response},
    ):
        assert one(folder, {**record, "system": system}).turns == expected


def test_other_keys_are_kept_as_metadata_and_lines_are_counted_from_one(tmp_path: Path) -> None:
    plain = {"prompt": "a", "response": "b"}
    path = written(tmp_path, plain, {**plain, "source": "x.py:3", "rating": 4, "lane": "vox_codegen"})
    first, second = read_rows(path)
    assert (first.line, first.source, first.metadata) == (1, "", {})
    assert (second.line, second.source, second.metadata) == (
        2,
        "x.py:3",
        {"rating": 4, "lane": "vox_codegen"},
    )


def test_a_byte_order_mark_windows_line_ends_and_a_missing_last_newline_are_accepted(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a\u2028b", "response": "é"}, ensure_ascii=False).encode()
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + row)
    assert [row.turns[0].content for row in read_rows(tmp_path / "train.jsonl")] == ["a\u2028b"] * 2


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (b"", "a blank line"),
        (b"  \t", "a blank line"),
        (b"{'prompt': 1}", "not JSON: Expecting property name"),
        (b'{"prompt": "a", "response": "b"} x', "not JSON: Extra data"),
        (b'{"prompt": "\xff", "response": "b"}', "not UTF-8"),
        (b'{"prompt": "a", "response": "b", "rating": NaN}', "not JSON: NaN"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "a", "prompt": "c", "response": "b"}', "the key 'prompt' given twice"),
        (["a", "b"], "a JSON array instead of an object"),
        (None, "a JSON null instead of an object"),
        ({}, "no 'prompt'"),
        ({"prompt": "a"}, "no 'response'"),
        ({"prompt": "a", "response": None}, "no 'response'"),
        ({"promt": "a", "response": "b"}, "no 'prompt' (found 'promt': did you mean 'prompt'?)"),
        ({"prompt": "a", "outptu": "b"}, "no 'response' (found 'outptu'"),
        ({"prompt": "a", "response": 3}, "'response' is a JSON number"),
        ({"prompt": "a", "response": " \n"}, "'response' is empty"),
        ({"prompt": "a", "response": "\ud800"}, "'response' holds half of a surrogate pair"),
        ({"prompt": "a", "response": "b", "system": ""}, "'system' is empty"),
        ({"prompt": "a", "instruction": "A", "response": "b"}, "'prompt' and 'instruction' that differ"),
        ({"prompt": "a", "response": "b", "output": "B"}, "'response' and 'output' that differ"),
        ({"instruction": "a", "input": "x", "output": "b"}, "an 'input' beside the prompt"),
        (
            {"prompt": "a", "turns": [{"role": "assistant", "content": "b"}]},
            "both turns and prompt or response",
        ),
        ({"turns": "a"}, "'turns' is a JSON string"),
        ({"turns": []}, "'turns' is empty"),
        ({"turns": ["a"]}, "a turn is a JSON string"),
        ({"turns": [{"role": "user", "content": "a"}]}, "the last turn is the user's"),
        ({"turns": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"turns": [{"rol": "user", "content": "a"}]}, "a turn has no 'role' (found 'rol'"),
        ({"turns": [{"role": "assistant", "content": ""}]}, "the content of the assistant's turn is empty"),
        (
            {"turns": [{"role": "assistant", "content": "a", "weight": 0}]},
            "the key 'weight', which would be lost",
        ),
        (
            {"turns": [{"role": "user", "content": "a"}, {"role": "system", "content": "s"}]},
            "a system turn after the first turn",
        ),
        (
            {
                "turns": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}],
                "system": "c",
            },
            "a system key and a system turn that differ",
        ),
    ],
)
def test_a_faulty_row_is_refused_with_its_kind_and_its_line(tmp_path: Path, record: Any, fault: str) -> None:
    good = {"prompt": "a", "response": "b"}
    message = refused(tmp_path, good, record, good)
    assert "1 of 3 lines cannot be used" in message
    assert fault in message
    assert "(line 2)" in message
    assert "expected:" in message


def test_all_faults_of_a_file_come_in_one_error_with_counts_and_first_lines(tmp_path: Path) -> None:
    good, bad = {"prompt": "a", "response": "b"}, {"prompt": "a"}
    message = refused(tmp_path, bad, good, bad, *[bad] * 5, b"", {"turns": []})
    assert "9 of 10 lines cannot be used" in message
    assert "7 rows: no 'response' (line 1, 3, 4, 5, 6, …)" in message
    assert "1 row: a blank line (line 9)" in message
    assert "1 row: 'turns' is empty (line 10)" in message


def test_a_thousand_kinds_of_fault_still_fit_on_a_page(tmp_path: Path) -> None:
    rows = [{"turns": [{"role": f"role-{number}" * 50, "content": "a"}]} for number in range(1000)]
    message = refused(tmp_path, *rows)
    assert len(message.splitlines()) < 60
    assert all(len(line) < 300 for line in message.splitlines())
    assert "980 rows with 980 more kinds of fault" in message


def test_a_missing_file_a_folder_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist\n.*nowhere\.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        read_rows(tmp_path / "train.jsonl")
