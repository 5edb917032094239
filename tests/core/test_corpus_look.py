"""Looking at rows: counts that add up, every fault told, rows printed as they are and harmless to a terminal."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.cli import main
from mens_core.corpus.row import Row, Turn
from mens_core.corpus.stats import RowStats
from mens_core.corpus.validate import find_faults

GOOD = {"prompt": "ask", "response": "answer", "category": "x", "source": "src/a.py:3", "rating": 4}
CALLS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Read it."},
        {"role": "assistant", "thinking": "Hm.", "tool_calls": [{"id": "c1", "name": "read", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "x = 1", "tool_call_id": "c1", "name": "read"},
        {"role": "assistant", "content": "\x1b[31mDone."},
    ],
    "category": "tools",
    "tools": [{"function": {"name": "read"}}],
}


@pytest.fixture
def file(tmp_path):
    def put(*records):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return put


def said(capsys, *words):
    code = main(["corpus", *words])
    output = capsys.readouterr()
    return code, output.out + output.err


@given(
    contents=st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=20),
    category=st.none() | st.sampled_from(["a", "b"]),
)
def test_counts_of_every_kind_add_up_to_the_rows(contents, category):
    stats = RowStats()
    for line, content in enumerate(contents, start=1):
        stats.add(Row((Turn("user", "q"), Turn("assistant", content)), f"s/{line}", line, {"category": category}))
    for counts in (*stats.counts.values(), stats.turns, stats.lengths):
        assert sum(counts.values()) == len(contents)
    assert stats.characters == sum(len(content) + 1 for content in contents)
    assert stats.supervised == sum(map(len, contents))
    assert stats.duplicates == len(contents) - len({" ".join(content.split()) for content in contents})
    assert all(power & (power - 1) == 0 for power in stats.lengths)


def test_stats_of_several_files_are_of_all_rows(file, capsys):
    path = file(GOOD, GOOD, CALLS, {"prompt": "x"})
    code, text = said(capsys, "stats", path, path)
    assert code == 0
    assert "6, of which 4 say what an earlier one says" in text
    assert "unusable    2 lines more" in text
    assert "assistant system tool user  2     33.3%" in text
    assert "src     4     66.7%" in text
    assert "█" in text


def test_stats_show_the_most_frequent_values_and_sum_up_the_rest(file, capsys):
    _, text = said(capsys, "stats", file(*({**GOOD, "category": f"c{n % 30:02}", "prompt": str(n)} for n in range(60))))
    assert "c09       2     3.3%" in text
    assert "c10" not in text
    assert "20 more   40    66.7%" in text


def test_validate_tells_every_fault_and_ends_with_2(file, capsys):
    path = file(GOOD, CALLS)
    assert said(capsys, "validate", path) == (0, f"{path}: 2 rows, all usable\n")
    bad = [{**GOOD, "rating": 7}, {**GOOD, "rating": "5"}, {**GOOD, "difficulty": 0}, {**GOOD, "lane": []}, {}]
    code, text = said(capsys, "validate", file(GOOD, *bad))
    assert code == 2
    assert "5 of 6 lines cannot be used" in text
    for kind in (
        "'rating' is out of range",
        "'rating' is a JSON string",
        "'difficulty' is out of range",
        "'lane' is a",
    ):
        assert kind in text
    assert "no 'prompt' (line 6)" in text


def test_validate_writes_json_and_a_file_that_cannot_be_read_hides_no_other(file, capsys, tmp_path):
    path = file(GOOD, {})
    code, text = said(capsys, "validate", "--json", str(tmp_path / "none.jsonl"), path)
    missing, faulty = json.loads(text)["files"]
    assert code == 2
    assert missing == {
        "path": str(tmp_path / "none.jsonl"),
        "usable": False,
        "error": "the file of rows does not exist",
    }
    assert (faulty["lines"], faulty["faulty"], faulty["kinds"][0]["first_lines"]) == (2, 1, [2])


def test_validate_knows_the_formats_of_a_mix(file, capsys):
    trace = {"task_prompt": "t", "tool_name": "f", "arguments_json": "{}", "result_json": "1", "success": True}
    path = file(trace)
    assert said(capsys, "validate", path)[0] == 2
    assert said(capsys, "validate", "--record-format", "tool_trace", path)[0] == 0
    assert find_faults(Path(path), "asr_refine").count == 1


def test_show_marks_roles_calls_and_thoughts_and_leaves_the_terminal_alone(file, capsys):
    code, text = said(capsys, "show", file(GOOD, CALLS), "--row", "2")
    assert code == 0
    for piece in (
        "── line 2",
        "[system]\nBe brief.",
        "(thinks) Hm.",
        '(calls c1) read{"a": 1}',
        "[tool read (answers c1)]",
    ):
        assert piece in text
    assert "\\x1b[31mDone." in text
    assert "\x1b" not in text
    assert "ask" not in text


def test_show_takes_the_first_rows_of_a_category(file, capsys):
    path = file(*({**GOOD, "prompt": f"ask {n}", "category": "even" if n % 2 == 0 else "odd"} for n in range(10)))
    _, text = said(capsys, "show", path, "--category", "odd", "--first", "2")
    assert [line for line in text.splitlines() if line.startswith("ask")] == ["ask 1", "ask 3"]
    _, text = said(capsys, "show", path)
    assert text.count("── line") == 3


def test_show_of_a_row_that_is_not_there_or_is_faulty_says_so(file, capsys):
    path = file(GOOD, {})
    code, text = said(capsys, "show", path, "--row", "9")
    assert (code, "no such row" in text) == (2, True)
    code, text = said(capsys, "show", path, "--row", "2")
    assert (code, "no 'prompt' (line 2)" in text) == (2, True)
    with pytest.raises(SystemExit):
        main(["corpus", "show", path, "--row", "0"])
