"""From rows to a run: bad rows, long rows, what is supervised, packing; and the rows shown as training sees them."""

import gzip
import json
import re

import pytest

import mens_core
from mens_core import Planner
from mens_core.cli import main
from mens_core.errors import DataError, GateError
from mens_core.report import plan_text, run_summary

ANSWER = "x = 1"


def row(answer=ANSWER, **more):
    return {"prompt": "Write x.", "response": answer, **more}


@pytest.fixture
def data(tmp_path):
    """A function that writes rows, or lines, into a data folder of its own."""

    def write(rows, name="train.jsonl"):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return folder

    return write


def run(folder, tmp_path, **fields):
    defaults = {"max_steps": 1, "batch_size": 2, "grad_accum": 1, "device": "cpu", "backend": "torch", "rank": 2}
    return Planner().run(data_dir=folder, output_dir=tmp_path / "run", overwrite=True, **defaults | fields)


def test_the_manifest_keeps_what_the_length_costs_every_source(data, tmp_path):
    rows = [row(source="good:1")] * 8 + [row("y" * 300, source="bad/f.py:2")] * 2
    result = run(data(rows), tmp_path, seq_len=128, on_overlong="truncate")
    lengths = result.manifest["lengths"]
    assert list(lengths["by_source"]) == ["bad"]
    assert lengths["by_source"]["bad"]["rows_truncated"] == 2
    assert lengths["total"]["supervised_tokens_cut"] == result.manifest["counters"]["supervised_tokens_cut"] > 0
    assert lengths["longest_row"] > 300
    assert "bad: 2 rows, 602 supervised tokens" in run_summary(result.output_dir, result.manifest)
    assert "bad: 2 rows, 602 supervised tokens" in plan_text(result.manifest["plan"])
    (warning,) = result.manifest["plan"]["warnings"]
    assert re.search(r"20.0% of the rows are longer than 128 tokens .* loses 61\.5%", warning)


def test_a_run_refuses_to_lose_a_tenth_of_its_rows_unasked(data, tmp_path):
    folder = data([row()] * 9 + [row("y" * 300)])
    with pytest.raises(DataError, match="1 of 10 rows are longer than 128 tokens"):
        run(folder, tmp_path, seq_len=128)
    assert not (tmp_path / "run").exists()
    assert run(folder, tmp_path, seq_len=128, on_overlong="split").manifest["counters"]["rows_split"] == 1


def test_bad_rows_refuse_the_run_or_are_left_out_and_counted(data, tmp_path):
    folder = data([row()] * 30 + ['{"prompt": "no answer"}'])
    with pytest.raises(GateError, match="rows_readable"):
        run(folder, tmp_path)
    result = run(folder, tmp_path, on_bad_row="skip")
    assert result.manifest["counters"]["rows_dropped_faulty"] == 1
    assert result.manifest["counters"]["rows"] == 30
    with pytest.raises(DataError, match="1 of 31 lines cannot be used"):
        run(folder, tmp_path, on_bad_row="skip", max_skip_rate=0.01)


def test_supervising_the_last_turn_trains_on_less(data, tmp_path):
    turns = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b")] * 2]
    folder = data([{"turns": turns}] * 4)
    counted = {
        supervise: run(folder, tmp_path, supervise=supervise).manifest["counters"]["supervised_tokens"]
        for supervise in ("all-assistant", "last-assistant", "suffix-1")
    }
    assert counted == {"all-assistant": 16, "last-assistant": 8, "suffix-1": 4}


def test_a_compressed_corpus_trains(data, tmp_path):
    result = run(data([row()] * 4, "train.jsonl.gz"), tmp_path)
    assert result.manifest["counters"]["rows"] == 4


def test_a_plan_says_how_many_steps_packing_takes(data):
    folder = data([row()] * 64)
    plans = {
        packing: Planner().plan(
            data_dir=folder, output_dir="run", packing=packing, seq_len=128, batch_size=1, grad_accum=1, epochs=1
        )
        for packing in ("none", "best-fit")
    }
    assert plans["none"].workload.steps == 64
    assert plans["best-fit"].workload.steps == 22  # three rows of 33 tokens a bin
    assert plans["best-fit"].workload.tokens == 64 / 22 * plans["none"].workload.tokens


def test_a_packed_run_meets_every_row_in_the_steps_that_were_planned(data, tmp_path):
    folder = data([row(ANSWER * (k % 5 + 1)) for k in range(23)])
    result = run(folder, tmp_path, packing="best-fit", seq_len=200, epochs=2, max_steps=None)
    assert result.manifest["results"]["tokens_trained"] == 2 * result.manifest["counters"]["tokens"]
    assert result.manifest["results"]["optimizer_steps"] == result.manifest["plan"]["workload"]["steps"]


def show(capsys, *words):
    status = main(["data", "show", *map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_rows_are_shown_with_what_is_trained_on(data, capsys):
    folder = data([row(), row("second", source="there/f.py:3"), row("y" * 200)])
    status, out, _ = show(capsys, "--data-dir", folder, "--row", 2, "--seq-len", 128, "--on-overlong", "truncate")
    assert status == 0
    assert "line 2, there:" in out
    assert "Write x.<|im_end|>\n<|im_start|>assistant\n⟦second<|im_end|>⟧" in out
    assert "line 1" not in out
    assert "1 rows truncated" in out
    assert re.search(r"tokens of user +\d+%", out)


def test_rows_that_are_left_out_are_not_among_those_shown(data, capsys):
    folder = data([row("first"), row("second", category="tools"), row("third")])
    _, out, _ = show(capsys, "--data-dir", folder, "--context-filter", "tools")
    assert "⟦second" in out
    assert "⟦first" not in out
    # Unless somebody asks for the line itself.
    _, out, _ = show(capsys, "--data-dir", folder, "--context-filter", "tools", "--row", 1)
    assert "⟦first" in out


def test_what_would_refuse_a_run_is_shown_with_the_rows(data, capsys):
    folder = data([row()] * 3 + [row("y" * 300)] * 2 + ["not json"])
    status, out, _ = show(capsys, "--data-dir", folder, "--seq-len", 128)
    assert status == 2
    assert "1 of 6 lines cannot be used" in out
    assert "⟦x = 1<|im_end|>⟧" in out
    assert main(["data", "show", "--data-dir", str(folder), "--row", "6"]) == 2
    assert "line 6 holds no row" in capsys.readouterr().err


def test_a_folder_without_rows_is_an_error_that_says_how_to_make_some(capsys, tmp_path):
    status, out, err = show(capsys, "--data-dir", tmp_path)
    assert status == 2
    assert not out
    assert "there are no rows to look at" in err
    assert "corpus pairs" in err


def test_a_page_of_rows_shows_text_and_no_markup_of_the_rows(data, capsys, tmp_path):
    folder = data([row("<script>alert(1)</script>")] * 2)
    page = tmp_path / "rows.html"
    assert show(capsys, "--data-dir", folder, "--html", page)[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt;&lt;|im_end|&gt;</mark>" in text
    assert "<script>" not in text


def test_what_is_shown_is_what_a_run_is_trained_on(data, tmp_path):
    folder = data([row(), row("second answer")])
    contract = mens_core.FineTuneContract.from_fields(trains=False, data_dir=folder)
    shown = mens_core.preview_rows(contract, first=2)
    result = run(folder, tmp_path)
    assert sum(one.trained for one in shown.shown) == result.manifest["counters"]["supervised_tokens"]
    assert sum(one.tokens for one in shown.shown) == result.manifest["counters"]["tokens"]
    assert shown.counters == result.manifest["counters"]
