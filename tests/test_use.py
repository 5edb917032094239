"""A run, merged and measured: the commands that stand at the end of the road agree with each other."""

import json

import pytest

import mens_core
from mens_core import Planner
from mens_core.cli import main


@pytest.fixture(scope="module")
def run(model_dirs, corpus_dir, tmp_path_factory):
    """A short QLoRA run on torch, and its base."""
    output = tmp_path_factory.mktemp("use") / "run"
    fields = {"model": str(model_dirs["qwen3"]), "data_dir": corpus_dir, "output_dir": output, "method": "qlora"}
    Planner().run(**fields, backend="torch", seq_len=512, max_steps=6, learning_rate=5e-3)
    return output


@pytest.mark.parametrize("onto", ["quantized", "original"])
def test_merge_says_how_far_the_model_is_from_base_and_adapter(run, tmp_path, capsys, onto):
    words = ["--adapter", str(run), "--output", str(tmp_path / "merged"), "--onto", onto, "--json"]
    assert main(["merge-qlora", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    found = report["fidelity"]
    assert found["positions"] > 200
    if onto == "quantized":
        assert found["max_logit_difference"] < 1e-4
        assert found["top1_agreement"] > 0.99
        assert found["loss_merged"] == pytest.approx(found["loss_adapted"], abs=1e-6)
    else:
        assert found["max_logit_difference"] > 1e-3
        assert found["mean_divergence"] > 0


def test_eval_of_merged_and_unmerged_gives_the_same_loss(run, corpus_dir, tmp_path):
    mens_core.merge([(run, 1.0)], output=tmp_path / "merged", quantized=True, backend="torch")
    data = corpus_dir / "eval.jsonl"
    merged = mens_core.evaluate_model(data, model=str(tmp_path / "merged"), backend="torch", seq_len=512)
    unmerged = mens_core.evaluate_model(data, adapter=run, backend="torch", seq_len=512)
    manifest = json.loads((run / "training_manifest.json").read_text())
    base = mens_core.evaluate_model(data, model=manifest["base_model"], backend="torch", seq_len=512)
    assert merged["loss"] == pytest.approx(unmerged["loss"], abs=1e-5)
    assert unmerged["loss"] == pytest.approx(manifest["results"]["eval_loss_after"], abs=1e-5)
    assert base["loss"] > unmerged["loss"] + 0.1
    assert merged["supervised_tokens"] == unmerged["supervised_tokens"] > 100


def test_eval_prints_loss_and_perplexity(run, corpus_dir, capsys):
    assert main(["eval", "--data", str(corpus_dir / "eval.jsonl"), "--adapter", str(run), "--backend", "torch"]) == 0
    assert "nats a token, perplexity" in capsys.readouterr().out
    assert main(["eval", "--data", str(corpus_dir / "none.jsonl"), "--adapter", str(run)]) == 2
    assert "there is no such file of rows" in capsys.readouterr().err
