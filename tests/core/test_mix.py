"""Mixing: shares that hold, parts that are apart, the same bytes again, and errors that tell all at once."""

import gzip
import hashlib
import itertools
import json
import tracemalloc
from collections import Counter

import pytest
import yaml

from mens_core.cli import main
from mens_core.corpus import mix as mixing
from mens_core.corpus.marks import answers, questions
from mens_core.corpus.mix import mix
from mens_core.corpus.mix_config import DEFAULT_MIX
from mens_core.corpus.rows import read_rows
from mens_core.errors import DataError

TRACE = {"task_prompt": "t", "tool_name": "f", "arguments_json": "{}", "result_json": "1", "success": True}


def pairs(name, count, **more):
    return [
        {"prompt": f"{name} asks {n}", "response": f"{name} answers number {n} at length", **more} for n in range(count)
    ]


def put(path, records):
    text = "".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


def configured(folder, sources, **keys):
    """A mix of sources given by file name, their records written beside it."""
    listed = []
    for name, (records, settings) in sources.items():
        if records is not None:
            put(folder / name, records)
        listed.append({"path": name, **settings})
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump({"sources": listed, "output": "out/train.jsonl", **keys}))
    return path


def refused(path, **settings):
    with pytest.raises(DataError) as caught:
        mix(path, **settings)
    assert not (path.parent / "out").exists() or not list((path.parent / "out").iterdir())
    return str(caught.value)


def prefixes(path):
    return Counter(row.turns[0].content.split()[0] for row in read_rows(path))


@pytest.fixture
def two(tmp_path):
    sources = {"a.jsonl": (pairs("a", 30), {"weight": 3}), "b.jsonl": (pairs("b", 200), {"weight": 1})}
    return configured(tmp_path, sources, eval_fraction=0.1)


def test_weights_are_shares_of_what_is_written(two):
    report = mix(two)
    counts = prefixes(report.output)
    assert counts["a"] == pytest.approx(3 * counts["b"], abs=1)
    assert sum(counts.values()) == report.rows
    assert [source.rows for source in report.sources] == [counts["a"], counts["b"]]
    assert [source.share for source in report.sources] == pytest.approx([0.75, 0.25], abs=0.01)
    # No row of the source that fixes the size is lost, none of the other is taken more often than another.
    times = Counter(row.turns[0].content for row in read_rows(report.output))
    assert report.eval_rows + len(times) == 230
    assert {times[prompt] for prompt in times if prompt[0] == "b"} == {1}
    assert len({times[prompt] // 2 for prompt in times if prompt[0] == "a"}) <= 2


def test_a_size_samples_what_is_too_much(tmp_path):
    sources = {"a.jsonl": (pairs("a", 30), {"weight": 3}), "b.jsonl": (pairs("b", 200), {"weight": 1})}
    report = mix(configured(tmp_path, sources, eval_fraction=0, total_rows=80))
    assert prefixes(report.output) == {"a": 60, "b": 20}
    assert report.eval_output is None
    assert not (tmp_path / "out/eval.jsonl").exists()


def test_the_same_files_and_seed_give_the_same_bytes_and_another_seed_others(two, tmp_path):
    contents = []
    for seed in (0, 0, 1):
        config = yaml.safe_load(two.read_text())
        two.write_text(yaml.safe_dump({**config, "seed": seed}))
        report = mix(two)
        contents.append([(tmp_path / "out" / name).read_bytes() for name in ("train.jsonl", "eval.jsonl")])
        assert report.sha256 == {
            name: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() for name in report.sha256
        }
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]
    assert contents[0][1] != contents[2][1]


def test_sources_come_shuffled(two):
    order = [row.turns[0].content[0] for row in read_rows(mix(two).output)]
    assert sum(one != next_one for one, next_one in itertools.pairwise(order)) > 50


def test_nothing_of_the_held_out_rows_is_trained_on(tmp_path):
    # Every prompt comes with three responses, and every response with two prompts.
    rows = [{"prompt": f"question number {n // 3}", "response": f"a long enough answer {n // 2}"} for n in range(300)]
    rows += [{"prompt": f"alone {n}", "response": f"another long enough answer {n}"} for n in range(300)]
    report = mix(configured(tmp_path, {"a.jsonl": (rows, {}), "b.jsonl": (pairs("b", 9), {})}, eval_fraction=0.3))
    train, held_out = read_rows(report.output), read_rows(report.eval_output)
    assert held_out
    for marks in (questions, answers):
        assert not {m for row in train for m in marks(row)} & {m for row in held_out for m in marks(row)}
    assert report.overlap == {"rows_read": len(train) + len(held_out), "questions": 0, "answers": 0}


def test_parts_that_overlap_are_found_in_what_was_written(two, monkeypatch, tmp_path):
    alike = pairs("a", 30)
    put(tmp_path / "a.jsonl", alike + [{**row, "response": row["response"] + "!"} for row in alike])
    # A split that looks at nothing.
    monkeypatch.setattr("mens_core.corpus.marks.Apart.held_out", lambda *_: [n < 30 for n in range(260)])
    assert "are not what they should be" in refused(two)


def test_short_answers_that_many_rows_share_do_not_hold_them_together(tmp_path):
    rows = [{"prompt": f"Is {n} even?", "response": "no" if n % 2 else "yes"} for n in range(400)]
    report = mix(configured(tmp_path, {"a.jsonl": (rows, {})}, eval_fraction=0.1))
    assert 20 < report.eval_rows < 60
    assert report.labels == 2


def test_equal_rows_are_used_once_across_sources_unless_asked_otherwise(tmp_path):
    spaced = [{**row, "response": row["response"].replace(" ", "  ")} for row in pairs("a", 20)]
    sources = {"a.jsonl": (pairs("a", 20), {}), "b.jsonl": ([*spaced, *pairs("b", 5)], {})}
    report = mix(configured(tmp_path, sources, eval_fraction=0))
    assert [source.dropped["duplicate"] for source in report.sources] == [0, 20]
    assert [source.available for source in report.sources] == [20, 5]
    report = mix(configured(tmp_path, sources, eval_fraction=0, dedup=False))
    assert [source.available for source in report.sources] == [20, 25]


def test_lanes_choose_rows_and_a_lane_that_no_row_has_is_told(tmp_path):
    sources = {"a.jsonl": ([*pairs("a", 9), *pairs("d", 4, category="documentation")], {})}
    report = mix(configured(tmp_path, sources, eval_fraction=0))
    assert report.lanes == {"vox_codegen": 9, "vox_docs_qa": 4}
    report = mix(configured(tmp_path, sources, eval_fraction=0, exclude_lanes=["vox_docs_qa", "vox_speach"]))
    assert report.lanes == {"vox_codegen": 9}
    assert report.sources[0].dropped["lane"] == 4
    assert report.warnings == ("exclude_lanes: no row is in the lane vox_speach",)
    report = mix(configured(tmp_path, sources, eval_fraction=0, include_lanes=["vox_docs_qa", "vox_codgen"]))
    assert report.lanes == {"vox_docs_qa": 4}
    assert "did you mean vox_codegen?" in report.warnings[0]


def test_a_sample_is_chosen_by_content(tmp_path):
    sources = {"a.jsonl": (pairs("a", 1000), {"sample_rate": 0.25})}
    report = mix(configured(tmp_path, sources, eval_fraction=0))
    assert 200 < report.rows < 300
    first = {row.turns[0].content for row in read_rows(report.output)}
    put(tmp_path / "a.jsonl", reversed(pairs("a", 1000)))
    assert {row.turns[0].content for row in read_rows(mix(tmp_path / "mix.yaml").output)} == first


def test_a_packed_source_is_a_source(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(pairs("a", 1)[0]).encode()))
    assert mix(configured(tmp_path, {"a.jsonl.gz": (None, {})}, eval_fraction=0)).rows == 1


def test_everything_that_is_wrong_with_the_sources_is_told_at_once(tmp_path):
    sources = {
        "good.jsonl": (pairs("a", 9), {}),
        "absent.jsonl": (None, {}),
        "may_be_absent.jsonl": (None, {"optional": True}),
        "empty.jsonl": ([], {}),
        "bad.jsonl": (["{}\n", "x\n"], {}),
        "docs.jsonl": (pairs("d", 3, lane="prose"), {}),
        "again.jsonl": (pairs("a", 9), {}),
    }
    path = configured(tmp_path, sources, exclude_lanes=["prose"])
    message = refused(path)
    for problem in (
        "absent.jsonl is missing",
        "empty.jsonl is empty",
        "2 of 2 lines cannot be used",
        "docs.jsonl is nothing left: 3 dropped by lane",
        "again.jsonl is nothing left: 9 dropped by duplicate",
    ):
        assert problem in message
    assert "may_be_absent" not in message
    assert "2 of 2 lines" in refused(path, allow_missing_sources=True)
    put(tmp_path / "bad.jsonl", pairs("b", 9))
    report = mix(path, allow_missing_sources=True)
    assert {"absent.jsonl is missing", "empty.jsonl is empty", "docs.jsonl is nothing left"} <= set(report.warnings)


def test_a_mix_of_nothing_is_refused_even_when_all_may_be_missing(tmp_path):
    path = configured(tmp_path, {"a.jsonl": (None, {"optional": True})})
    assert "no source gives a row" in refused(path)
    assert "no source gives a row" in refused(path, allow_missing_sources=True)


def test_bad_rows_are_an_error_or_left_out_up_to_a_share(tmp_path):
    path = configured(tmp_path, {"a.jsonl": ([*pairs("a", 18), "x\n", {"prompt": "a"}], {})}, eval_fraction=0)
    assert "1 row: no 'response' (line 20)" in refused(path)
    assert "at most 0.05 of them" in refused(path, on_bad_row="skip")
    report = mix(path, on_bad_row="skip", max_bad_share=0.1)
    assert (report.rows, report.rows_in) == (18, 20)
    assert [(kind.rows, kind.first_lines) for kind in report.sources[0].bad_rows] == [(1, (19,)), (1, (20,))]
    written = json.loads((tmp_path / "out/train.mix_report.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    with pytest.raises(DataError, match="out of range"):
        mix(path, on_bad_row="ignore")


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("sources: []\n", ["at least one source"]),
        ("output: x\n", ["at least one source"]),
        ("sources: [a]\n", ["sources[0] must be a mapping"]),
        (
            "sources: [{pth: a}]\nsead: 1\n",
            ["pth is not a key; did you mean path?", "has no path", "did you mean seed?"],
        ),
        ("sources: [{path: a, weight: 0}]", ["sources[0].weight must be a number above 0", "leave the source out"]),
        ("sources: [{path: a, weight: -1}]", ["above 0"]),
        ("sources: [{path: a, weight: .inf}]", ["above 0"]),
        ("sources: [{path: a, weight: true}]", ["above 0"]),
        ("sources: [{path: a, record_format: tool-trace}]", ["did you mean tool_trace?"]),
        ("sources: [{path: a, sample_rate: 2}]", ["at most 1"]),
        ("sources: [{path: a}]\neval_fraction: 1\ntotal_rows: 0\ndedup: 2\n", ["3 problems"]),
        ("sources: [{path: a}]\ninclude_lanes: x\n", ["a list of words"]),
        ("sources: [{path: a}]\ninclude_lanes: [x]\nexclude_lanes: [x]\n", ["x is both included and excluded"]),
        ("sources: [{path: a}]\nsources: [{path: a}]\n", ["stands twice"]),
        ("sources: [{path: a}]\n", ["names no output"]),
        ("sources: [{path: a}]\noutput: a.txt\n", ["cannot have this name"]),
        ("sources: [{path: a}]\noutput: eval.jsonl\n", ["cannot have this name"]),
        ("sources: [{path: a.jsonl}]\noutput: a.jsonl\n", ["would replace a source"]),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused_with_all_its_problems(tmp_path, text, problems):
    (tmp_path / "mix.yaml").write_text(text)
    message = refused(tmp_path / "mix.yaml")
    assert all(problem in message for problem in problems)


def test_rows_that_no_mix_wrote_are_not_replaced(two, tmp_path):
    (tmp_path / "out").mkdir()
    mine = put(tmp_path / "out/train.jsonl", pairs("mine", 1))
    with pytest.raises(DataError, match="no mix wrote"):
        mix(two)
    assert len(read_rows(mine)) == 1
    assert mix(two, overwrite=True).rows == mix(two).rows > 1


def test_what_an_earlier_mix_held_out_does_not_stay(two, tmp_path):
    assert mix(two).eval_output
    two.write_text(yaml.safe_dump({**yaml.safe_load(two.read_text()), "eval_fraction": 0}))
    mix(two)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.jsonl", "train.mix_report.json"]


def test_a_full_disk_leaves_the_earlier_mix(two, tmp_path, monkeypatch):
    mix(two)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(mixing, "_read_back", full)
    with pytest.raises(OSError, match="No space"):
        mix(two)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_memory_does_not_grow_with_the_text(tmp_path):
    def peak(characters):
        rows = [{"prompt": f"{n} asks", "response": f"{n} " + "x " * (characters // 2)} for n in range(2000)]
        path = configured(tmp_path, {"a.jsonl": (rows, {})})
        del rows
        tracemalloc.start()
        try:
            mix(path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Ten megabytes more of text.
    assert peak(5500) < peak(500) + 1e6


def test_tool_trace_rows_are_in_the_mix_that_comes_with_the_package(tmp_path):
    report = mix(output=tmp_path / "train.jsonl")
    rows = [row for row in read_rows(tmp_path / "train.jsonl") if row.metadata["category"] == "tool_trace"]
    traces = next(source for source in report.sources if source.record_format == "tool_trace")
    assert len(rows) == traces.rows >= 10
    assert all("[vox_tool_supervision]" in row.turns[0].content for row in rows)
    assert {row.metadata["lane"] for row in rows} == {"vox_tooling"}
    assert {row.metadata["response_mode"] for row in rows} == {"json_only", "prose_only"}


def test_tool_trace_rows_are_left_out_where_a_mix_wants_only_code(tmp_path):
    sources = {"a.jsonl": (pairs("a", 5), {}), "t.jsonl": ([TRACE], {"record_format": "tool_trace"})}
    path = configured(tmp_path, sources, include_lanes=["vox_codegen"])
    assert "t.jsonl is nothing left: 1 dropped by lane" in refused(path)


def test_the_verb_mixes_and_says_what_it_did(two, tmp_path, capsys):
    output = tmp_path / "elsewhere" / "rows.jsonl"
    assert main(["corpus", "mix", "--config", str(two), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "75.0%" in said
    assert "rows.mix_report.json" in said
    assert sorted(path.name for path in output.parent.iterdir()) == ["eval.jsonl", "rows.jsonl", "rows.mix_report.json"]
    assert main(["corpus", "mix", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "the mix does not exist" in capsys.readouterr().err


def test_the_example_mix_stands_in_the_package():
    assert {path.name for path in DEFAULT_MIX.parent.iterdir()} == {"default.yaml", "pairs.jsonl", "tool_traces.jsonl"}
