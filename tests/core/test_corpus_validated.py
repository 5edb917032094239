"""Validated rows: Python is cut, other code is asked for by construct, and a faulty row is booked with its line."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mens_core.corpus.pairs import PairsReport, write_pairs
from mens_core.corpus.rows import read_rows
from mens_core.errors import DataError

PYTHON = 'def double(value):\n    """Give twice the value."""\n    return value * 2 + len("x")\n'
VOX = "fn add(first: int, second: int) -> int {\n  first + second\n}"


def corpus(tmp_path: Path, *rows: Any, **settings: Any) -> tuple[PairsReport, list[dict[str, Any]]]:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"eval_fraction": 0, "negatives": 0, "multi_turn": 0, **settings}
    report = write_pairs([tmp_path / "rows.jsonl"], tmp_path / "out", **settings)
    read_rows(tmp_path / "out" / "train.jsonl")
    return report, [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]


def test_python_code_is_cut_into_functions_and_keeps_its_source(tmp_path: Path) -> None:
    row = {"code": PYTHON, "source": "checked/double.py", "constructs": ["function"], "ast_hash": "0", "difficulty": 9}
    _, rows = corpus(tmp_path, row, {"code": PYTHON.replace("double", "twice").replace("2", "3")})
    assert [row["category"] for row in rows[:3]] == [
        "docstring_to_implementation",
        "signature_to_body",
        "implementation_to_docstring",
    ]
    assert [row["source"] for row in rows] == ["checked/double.py"] * 3 + ["rows.jsonl:2"] * 3
    assert rows[0]["response"].startswith("def double(value):")
    assert rows[0]["difficulty"] < 9


def test_python_code_is_broken_and_talked_about_too(tmp_path: Path) -> None:
    _, rows = corpus(tmp_path, {"code": PYTHON}, negatives=1, multi_turn=1)
    assert {"error_correction", "multi_turn"} < {row["category"] for row in rows}


def test_other_code_is_asked_for_once_by_each_construct(tmp_path: Path) -> None:
    row = {"code": VOX, "source": "lib/add.vox", "constructs": ["function", "type_hints", "function"], "difficulty": 3}
    _, rows = corpus(tmp_path, row)
    assert [row["response"] for row in rows] == [VOX, VOX]
    assert {row["category"] for row in rows} == {"construct_to_code"}
    assert all("Vox code" in row["prompt"] and VOX.partition("\n")[0] in row["prompt"] for row in rows)
    assert sum("a function" in row["prompt"] for row in rows) == 1
    assert sum("the construct `type_hints`" in row["prompt"] for row in rows) == 1
    assert {(row["source"], row["difficulty"], row["rating"]) for row in rows} == {("lib/add.vox", 3, 5)}
    assert rows[0]["constructs"] == ["function", "type_hints"]


def test_instructions_vary_and_never_join_all_rows_of_a_construct_into_one_part(tmp_path: Path) -> None:
    rows = [{"code": VOX.replace("add", f"add{n}"), "constructs": ["loop"], "language": "vox"} for n in range(60)]
    spread = [{**row, "code": f"{row['code']}\n// {n} " + f"{n * 7919} " * 40} for n, row in enumerate(rows)]
    report, written = corpus(tmp_path, *spread, eval_fraction=0.3)
    assert len({row["prompt"].partition(".")[0] for row in written}) == 4
    assert min(report.rows.values()) > 5


def test_python_without_functions_is_asked_for_by_the_constructs_of_its_tree(tmp_path: Path) -> None:
    _, rows = corpus(tmp_path, {"code": "total = 0\nfor number in range(10):\n    total += number\n"})
    (row,) = rows
    assert (row["constructs"], row["category"]) == (["loop"], "construct_to_code")


def test_a_language_that_is_named_is_not_taken_for_python(tmp_path: Path) -> None:
    _, rows = corpus(tmp_path, {"code": PYTHON, "language": "Starlark", "constructs": ["function"]})
    (row,) = rows
    assert "Starlark code" in row["prompt"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("", "a blank line"),
        ("{}", "no 'code', or a blank one"),
        ('{"code": "  "}', "no 'code', or a blank one"),
        ('{"code": 1}', "'code' is not a text"),
        ('{"code": "x", "source": 1}', "'source' is not a text"),
        ('{"code": "x", "constructs": "loop"}', "'constructs' is not a list of names"),
        ('{"code": "x", "constructs": ["loop", 1]}', "'constructs' is not a list of names"),
        ('{"code": "x", "difficulty": 11}', "'difficulty' is not a whole number from 1 to 10"),
        ('{"code": "x", "difficulty": true}', "'difficulty' is not a whole number from 1 to 10"),
        ("[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_a_row_that_cannot_be_used_is_booked_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    report, rows = corpus(tmp_path, {"code": PYTHON}, line, {"code": "x = 1"})
    booked = {reason: tally.examples for reason, tally in report.rows_dropped.items()}
    assert booked == {
        f"validated row that cannot be used: {reason}": ("rows.jsonl:2",),
        "validated row without functions that can be cut, and without a construct to ask for": ("rows.jsonl:3",),
    }
    assert len(rows) == 3


def test_half_a_surrogate_pair_in_code_is_booked(tmp_path: Path) -> None:
    report, _ = corpus(
        tmp_path, {"code": PYTHON}, '{"code": "print(\'\\ud800\') # a long line", "constructs": ["loop"]}'
    )
    assert report.rows_dropped["text that UTF-8 cannot write"].count == 1


def test_a_packed_file_is_read_and_a_damaged_one_is_booked_where_it_ends(tmp_path: Path) -> None:
    chance = random.Random(1)  # noqa: S311 (a seeded test)
    codes = [PYTHON.replace("2", str(chance.getrandbits(400))) for _ in range(200)]
    rows = "".join(json.dumps({"code": code}) + "\n" for code in codes).encode()
    whole, cut = tmp_path / "whole.jsonl.gz", tmp_path / "cut.jsonl.gz"
    whole.write_bytes(gzip.compress(rows))
    cut.write_bytes(gzip.compress(rows)[:-3000])
    assert write_pairs([whole], tmp_path / "1").files_skipped == {}
    (tally,) = write_pairs([cut], tmp_path / "2").files_skipped.values()
    assert tally.examples[0].startswith("cut.jsonl.gz, after line ")


def test_rows_in_a_folder_are_read_only_when_their_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "m.py").write_text(PYTHON)
    (tmp_path / "src" / "rows.jsonl").write_text("not for this")
    report = write_pairs([tmp_path / "src"], tmp_path / "out")
    (reason,) = report.files_skipped
    assert "read only where it is named itself" in reason


def test_a_file_without_a_usable_row_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no 'code', or a blank one \(first: rows.jsonl:1\)"):
        corpus(tmp_path, {"prompt": "a row to train on", "response": "is no validated row"})
