"""Making a corpus: nothing is lost without being counted, nothing held out is given away."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mens_core.corpus.collector import EQUAL
from mens_core.corpus.pairs import write_pairs
from mens_core.corpus.rows import read_rows
from mens_core.errors import DataError

#: Without rows that a share of the functions gets, so that rows can be counted.
PLAIN: dict[str, Any] = {"negatives": 0, "multi_turn": 0}
STDLIB = Path(sysconfig.get_path("stdlib"))
LIBRARY_PARTS = [STDLIB / name for name in ("json", "asyncio", "importlib", "argparse.py", "textwrap.py")]


def tree(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def functions_text(count: int, salt: str = "") -> str:
    """Python with ``count`` functions that share neither a prompt nor a response."""
    return "\n\n".join(
        f"def work{salt}{number}(value):\n"
        f'    """Add {number}{salt} to the value that is given."""\n'
        f'    return value + {number} + len("{salt}")'
        for number in range(count)
    )


def test_rows_of_markdown_ask_in_both_directions_and_book_what_they_cannot_use(tmp_path: Path) -> None:
    code = "print('a long enough example')"
    lone, empty = f"```\n{code} # 2\n```\n", "# T\n\n```\n\n```\n"
    text = f"# How to print\n\nUse the function for that.\n\n```python\n{code}\n```\n\n```open\n{code} # 3\n"
    sources = tree(tmp_path / "docs", good_DOT_md=text, lone_DOT_md=lone, empty_DOT_markdown=empty)
    report = write_pairs([sources], tmp_path / "out", eval_fraction=0)
    example, explanation = rows_of(tmp_path / "out" / "train.jsonl")
    assert example["prompt"].endswith("How to print\n\nUse the function for that.")
    assert (example["response"], example["response_mode"]) == (code, "code_only")
    assert explanation["prompt"].endswith(code)
    assert (explanation["response"], explanation["lane"]) == ("Use the function for that.", "vox_docs_qa")
    assert example["source"] == explanation["source"] == "docs/good.md:5"
    booked = {reason: tally.examples for reason, tally in report.rows_dropped.items()}
    assert booked == {
        "code block that is never closed": ("docs/good.md:9",),
        "code block with neither text nor heading above it": ("docs/lone.md:1",),
        "code block without code": ("docs/empty.markdown:3",),
    }


def test_the_rows_of_a_corpus_are_rows_that_training_reads(tmp_path: Path) -> None:
    report = write_pairs(LIBRARY_PARTS, tmp_path)
    train, held_out = read_rows(tmp_path / "train.jsonl"), read_rows(tmp_path / "eval.jsonl")
    assert (len(train), len(held_out)) == (report.rows["train"], report.rows["eval"])
    assert len(train) > 1000
    assert 0.01 < len(held_out) / (len(train) + len(held_out)) < 0.12
    categories = {"docstring_to_implementation", "signature_to_body", "implementation_to_docstring"}
    categories |= {"error_correction", "multi_turn"}
    assert {row.metadata["category"] for row in train} == {row.metadata["category"] for row in held_out} == categories
    told = {"category", "difficulty", "constructs", "rating", "source", "lane", "task_family"}
    for row in rows_of(tmp_path / "eval.jsonl"):
        said = {"turns"} if row["category"] == "multi_turn" else {"prompt", "response", "response_mode"}
        assert set(row) - {"defect"} == told | said
        assert row["rating"] == (4 if "defect" in row else 5)
        assert row["category"] != "error_correction" or "defect" in row
        assert row["difficulty"] in range(1, 11)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["negative_pairs"] == sum(report.rows_by_category["error_correction"].values()) > 50
    assert sum(metadata["rows_by_difficulty"].values()) == metadata["total_pairs"]
    for name, digest in metadata["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert metadata["total_pairs"] == len(train) + len(held_out)


def asked_and_answered(row: dict[str, Any]) -> tuple[str, list[str]]:
    """The first prompt and every response of a row; a later prompt is the same in all conversations."""
    said = [turn["content"] for turn in row["turns"]] if "turns" in row else [row["prompt"], row["response"]]
    return said[0], said[1::2]


def test_no_prompt_no_response_and_no_function_is_in_both_parts(tmp_path: Path) -> None:
    write_pairs(LIBRARY_PARTS, tmp_path, eval_fraction=0.4, negatives=0.5, multi_turn=0.5)
    train, held_out = rows_of(tmp_path / "train.jsonl"), rows_of(tmp_path / "eval.jsonl")
    assert min(len(train), len(held_out)) > 500
    assert {row["source"] for row in train}.isdisjoint(row["source"] for row in held_out)
    assert {asked_and_answered(row)[0] for row in train}.isdisjoint(asked_and_answered(row)[0] for row in held_out)
    learnt = {answer for row in train for answer in asked_and_answered(row)[1]}
    assert learnt.isdisjoint(answer for row in held_out for answer in asked_and_answered(row)[1])


def test_the_same_input_gives_the_same_bytes_wherever_it_stands_and_another_seed_another_split(
    tmp_path: Path,
) -> None:
    for place in ("a", "b"):
        tree(tmp_path / place / "src", m_DOT_py=functions_text(60), n_DOT_py=functions_text(9, "n"))
        write_pairs([tmp_path / place / "src"], tmp_path / place / "out")
    write_pairs([tmp_path / "a" / "src"], tmp_path / "seeded", seed=1)
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("a/out", "b/out", "seeded")
    }
    assert sorted(files["a/out"]) == ["eval.jsonl", "metadata.json", "train.jsonl"]
    assert files["a/out"] == files["b/out"]
    assert files["a/out"]["eval.jsonl"] != files["seeded"]["eval.jsonl"]
    assert b"/out" not in files["a/out"]["metadata.json"]


def test_the_bytes_do_not_depend_on_how_python_hashes(tmp_path: Path) -> None:
    sources = tree(tmp_path / "src", m_DOT_py=functions_text(30), n_DOT_py=Path(textwrap.__file__).read_bytes())
    rows = [{"code": f"fn f{n}()\n  {n}", "constructs": ["b", "a", "loop"], "source": "x.vox"} for n in range(20)]
    (sources / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpora = []
    for hash_seed in ("1", "2"):
        output = tmp_path / hash_seed
        flags = ["--output", str(output), "--negatives=1", "--multi-turn=1", "--curriculum"]
        words = [
            sys.executable,
            "-m",
            "mens_core",
            "corpus",
            "pairs",
            str(sources),
            str(sources / "rows.jsonl"),
            *flags,
        ]
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        corpora.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert corpora[0] == corpora[1]
    assert len(corpora[0]["train.jsonl"]) > 10_000


def test_a_curriculum_is_the_same_rows_from_easy_to_difficult(tmp_path: Path) -> None:
    for name, curriculum in (("plain", False), ("ordered", True)):
        write_pairs(LIBRARY_PARTS[:2], tmp_path / name, curriculum=curriculum)
        assert json.loads((tmp_path / name / "metadata.json").read_text())["curriculum_ordered"] is curriculum
    plain, ordered = (rows_of(tmp_path / name / "train.jsonl") for name in ("plain", "ordered"))
    assert ordered == sorted(plain, key=lambda row: row["difficulty"])
    assert plain != ordered


def test_shares_of_none_and_all_functions_are_kept_to(tmp_path: Path) -> None:
    sources = tree(tmp_path / "src", m_DOT_py=functions_text(40))
    shares = {"none": PLAIN, "all": {"negatives": 1, "multi_turn": 1}, "few": {"negatives": 0.25, "multi_turn": 0}}
    counts = {
        name: {kind: sum(parts.values()) for kind, parts in report.rows_by_category.items()}
        for name, share in shares.items()
        for report in [write_pairs([sources], tmp_path / name, **share)]
    }
    assert set(counts["none"].values()) == {40}
    assert counts["all"] == {**counts["none"], "error_correction": 40, "multi_turn": 40}
    assert 3 <= counts["few"]["error_correction"] <= 18


def test_duplicates_are_dropped_once_and_counted(tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    tree(once, m_DOT_py=functions_text(5))
    tree(twice, m_DOT_py=functions_text(5), n_DOT_py=functions_text(5))
    single = write_pairs([once], tmp_path / "1", eval_fraction=0, **PLAIN)
    double = write_pairs([twice], tmp_path / "2", eval_fraction=0, **PLAIN)
    assert (single.rows["train"], single.duplicates_dropped) == (15, {})
    assert (double.rows["train"], double.duplicates_dropped[EQUAL].count) == (15, 15)


def test_rows_out_of_the_length_range_are_dropped_with_the_reason(tmp_path: Path) -> None:
    long = "def long(x):\n    return [\n" + "        x,\n" * 300 + "    ]\n"
    sources = tree(tmp_path / "src", m_DOT_py=f"{functions_text(2)}\n\ndef tiny(): x\n\n{long}")
    report = write_pairs([sources], tmp_path / "out", eval_fraction=0, min_chars=10, max_chars=500, **PLAIN)
    counts = {reason: tally.count for reason, tally in report.rows_dropped.items()}
    assert counts == {"response shorter than 10 characters": 1, "row longer than 500 characters": 1}
    lengths = [len(row["prompt"] + row["response"]) for row in rows_of(tmp_path / "out" / "train.jsonl")]
    assert len(lengths) == 6
    assert max(lengths) <= 500


def test_files_that_cannot_be_used_are_booked_by_reason_and_never_stop_the_run(tmp_path: Path) -> None:
    sources = tree(
        tmp_path / "src",
        good_DOT_py=b"\xef\xbb\xbf" + functions_text(3).replace("\n", "\r\n").encode(),
        latin_DOT_py="# é".encode("latin-1"),
        broken_DOT_py="x = 1\ndef f(:\n",
        null_DOT_py=b"x = 1\0",
        deep_DOT_py="x = " + "-" * 100_000 + "1",
        surrogate_DOT_py='def f(x):\n    "A docstring with half a pair: \\ud800"\n    return x * 1000000000\n',
        escape_DOT_py="def g(x):\n    return x + '\\d is no escape'\n",
        notes_DOT_txt="text",
        node_modules__x_DOT_py=functions_text(1, "a"),
        _DOT_git__x_DOT_py=functions_text(1, "b"),
        env__pyvenv_DOT_cfg="",
        env__x_DOT_py=functions_text(1, "c"),
    )
    (sources / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    report = write_pairs([sources, sources / "good.py"], tmp_path / "out", eval_fraction=0, **PLAIN)
    assert report.files_read == 3
    skipped = {reason: tally.examples for reason, tally in report.files_skipped.items()}
    unparsable = [reason for reason in skipped if reason.startswith("not parsable")]
    assert {example for reason in unparsable for example in skipped.pop(reason)} == {
        "src/null.py",
        "src/deep.py",
    }
    assert skipped == {
        "cannot be read": ("src/dangling.py (No such file or directory)",),
        "folder left out": ("src/.git", "src/env", "src/node_modules"),
        "neither Python nor Markdown": ("src/notes.txt",),
        "not Python of this version": ("src/broken.py:2",),
        "not UTF-8": ("src/latin.py (byte 2)",),
        "reached a second time, by another source or a link": ("good.py",),
    }
    assert {reason: tally.count for reason, tally in report.rows_dropped.items()} == {"text that UTF-8 cannot write": 2}
    assert report.rows["train"] == 9 + 1 + 1
    assert all(reason in report.text() for reason in report.files_skipped)


def test_a_missing_source_and_one_of_another_kind_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    tree(tmp_path, notes_DOT_txt="x", m_DOT_py=functions_text(2))
    with pytest.raises(DataError, match=r"does not exist\n.*nowhere"):
        write_pairs([tmp_path / "m.py", tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(DataError, match=r"nor a file of rows\n.*notes\.txt"):
        write_pairs([tmp_path / "notes.txt"], tmp_path / "out")
    with pytest.raises(DataError, match="no source"):
        write_pairs([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_without_a_usable_row_are_an_error_that_tells_why_and_writes_nothing(tmp_path: Path) -> None:
    sources = tree(tmp_path / "src", m_DOT_py="def f(): ...\n", broken_DOT_py="def (")
    with pytest.raises(DataError) as caught:
        write_pairs([sources], tmp_path / "out")
    assert "function body that does nothing" in str(caught.value)
    assert "src/broken.py:1" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_corpus_is_replaced_only_on_request_and_then_as_a_whole(tmp_path: Path) -> None:
    first, second = (
        tree(tmp_path / "1", m_DOT_py=functions_text(40)),
        tree(tmp_path / "2", m_DOT_py=functions_text(2, "z")),
    )
    write_pairs([first], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="--overwrite"):
        write_pairs([second], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    write_pairs([second], tmp_path / "out", eval_fraction=0, overwrite=True, **PLAIN)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metadata.json", "train.jsonl"]
    assert len(rows_of(tmp_path / "out" / "train.jsonl")) == 6


def test_a_failure_while_writing_leaves_the_earlier_corpus_and_no_scraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tree(tmp_path / "src", m_DOT_py=functions_text(40))
    write_pairs([sources], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_pairs([sources], tmp_path / "out", seed=5, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "setting",
    [
        {"eval_fraction": 1.0},
        {"eval_fraction": -0.1},
        {"eval_fraction": float("nan")},
        {"min_chars": 0},
        {"max_chars": 20},
        {"exclude": ["a/b"]},
        {"negatives": 1.1},
        {"multi_turn": -0.1},
        {"near_duplicates": 0.3},
        {"near_duplicates": float("nan")},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(setting))):
        write_pairs([tmp_path], tmp_path / "out", **setting)


def test_two_functions_are_enough_for_two_parts_and_one_is_all_trained_on(tmp_path: Path) -> None:
    two = write_pairs([tree(tmp_path / "2", m_DOT_py=functions_text(2))], tmp_path / "out2", **PLAIN)
    assert two.rows == {"train": 3, "eval": 3}
    one = write_pairs([tree(tmp_path / "1", m_DOT_py=functions_text(1))], tmp_path / "out1", **PLAIN)
    assert one.rows == {"train": 3, "eval": 0}
    assert not (tmp_path / "out1" / "eval.jsonl").exists()


def test_two_sources_of_one_name_stay_apart(tmp_path: Path) -> None:
    for side in "ab":
        tree(tmp_path / side / "src", m_DOT_py=functions_text(1, side))
    write_pairs([tmp_path / "a" / "src", tmp_path / "b" / "src"], tmp_path / "out", eval_fraction=0)
    assert {row["source"] for row in rows_of(tmp_path / "out" / "train.jsonl")} == {
        "src/m.py:1",
        "src-2/m.py:1",
    }


def test_the_command_writes_the_corpus_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb = pytest.importorskip("mens_core.cli.corpus")
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    sources = tree(tmp_path / "src", m_DOT_py=functions_text(4), skip__n_DOT_py=functions_text(1, "n"))
    flags = [
        "--output",
        str(tmp_path / "out"),
        "--eval-fraction",
        "0.5",
        "--exclude",
        "skip",
        "--negatives=0",
        "--multi-turn=0",
    ]
    assert verb.run(parser.parse_args(["pairs", str(sources), *flags])) == 0
    counts = [len(rows_of(tmp_path / "out" / f"{part}.jsonl")) for part in ("train", "eval")]
    assert sum(counts) == 12
    assert f"{counts[0]} rows to train on, {counts[1]} held out" in capsys.readouterr().out
