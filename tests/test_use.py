"""A run, merged and measured: the commands that stand at the end of the road agree with each other."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from peft_adapters import peft_adapter
from transformers import AutoModelForCausalLM

import mens_core
from mens_core import Planner
from mens_core.cli import main
from mens_core.errors import GateError, ModelError


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


def test_a_run_goes_on_from_an_adapter_where_it_ended(run, model_dirs, corpus_dir, tmp_path):
    fields = {"model": str(model_dirs["qwen3"]), "data_dir": corpus_dir, "method": "qlora", "backend": "torch"}
    fields |= {"seq_len": 512, "max_steps": 2, "start_from": run, "output_dir": tmp_path / "further"}
    before = json.loads((run / "training_manifest.json").read_text())
    further = Planner().run(**fields)
    assert further.eval_loss_before == pytest.approx(before["results"]["eval_loss_after"], abs=1e-6)
    assert further.manifest["sha256"]["start_adapter"]
    assert further.manifest["finetune_contract_digest"] != before["finetune_contract_digest"]
    with pytest.raises(GateError, match="its rank is 16, not 8; its scale is 2, not 4") as refused:
        Planner().run(**fields | {"rank": 8, "output_dir": tmp_path / "refused"})
    fields_out = "leave rank, alpha, rslora, rank_pattern, alpha_pattern, targets, modules_to_save out"
    assert fields_out in str(refused.value)
    with pytest.raises(GateError, match="it adapts 14 layers, not 2"):
        Planner().run(**fields | {"targets": ("q_proj",), "output_dir": tmp_path / "refused"})
    with pytest.raises(ModelError, match="no such adapter"):
        Planner().run(**fields | {"start_from": tmp_path / "nothing", "output_dir": tmp_path / "refused"})


def test_an_adapter_of_pefts_trains_on_here(model_dirs, corpus_dir, tmp_path):
    base = model_dirs["llama"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "start")
    fields = {"model": str(base), "data_dir": corpus_dir, "output_dir": tmp_path / "run", "backend": "torch"}
    fields |= {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj"), "seq_len": 512, "max_steps": 2}
    result = Planner().run(**fields, start_from=tmp_path / "start")
    start = mens_core.evaluate_model(
        corpus_dir / "eval.jsonl", model=str(base), adapter=tmp_path / "start", backend="torch", seq_len=512
    )
    assert result.eval_loss_before == pytest.approx(start["loss"], abs=1e-6)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_an_adapter_of_pefts_with_patterns_trains_on_as_it_is(model_dirs, corpus_dir, tmp_path, backend):
    base, held_out = model_dirs["llama"], corpus_dir / "eval.jsonl"
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3}}
    settings = {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    peft_adapter(base, tmp_path / "start", **settings, **patterns)
    fields = {"model": str(base), "data_dir": corpus_dir, "backend": backend, "seq_len": 512, "max_steps": 2}
    fields |= {"start_from": tmp_path / "start"}
    result = Planner().run(**fields, output_dir=tmp_path / "run")
    used = {"model": str(base), "backend": backend, "seq_len": 512}
    start = mens_core.evaluate_model(held_out, adapter=tmp_path / "start", **used)
    assert result.eval_loss_before == pytest.approx(start["loss"], abs=1e-6)
    contract = result.manifest["plan"]["contract"]
    assert {name: contract[name] for name in patterns} == patterns
    assert (contract["rank"], contract["alpha"], contract["rslora"], contract["targets"]) == (
        4,
        12,
        True,
        ["q_proj", "v_proj"],
    )
    assert result.manifest["plan"]["origins"]["rank_pattern"] == f"adapter {tmp_path / 'start'}"
    # What was written opens as what was trained, and is trained on in its turn.
    end = mens_core.evaluate_model(held_out, adapter=result.adapter_dir, **used)
    assert end["loss"] == pytest.approx(result.eval_loss_after, abs=1e-6)
    assert all(check["state"] == "ok" for check in mens_core.verify_run(result.output_dir)["checks"])
    config = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert {name: config[name] for name in patterns} == patterns
    with pytest.raises(GateError, match=r"its rank differs in 2 layers, such as .*q_proj: 2, not 4"):
        Planner().run(**fields | {"rank": 4, "alpha": 12, "rslora": True}, output_dir=tmp_path / "refused")
    with pytest.raises(GateError, match="gate_proj match none"):
        Planner().run(**fields | {"rank_pattern": {"q_proj": 2, "gate_proj": 3}}, output_dir=tmp_path / "refused")


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_with_a_head_of_its_own_is_used_merged_and_trained_on(model_dirs, corpus_dir, tmp_path, backend):
    base, held_out = str(model_dirs["qwen2"]), corpus_dir / "eval.jsonl"
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["up_proj"], modules_to_save=["lm_head"])
    mens_core.merge([(adapter, 1.0)], base=base, output=tmp_path / "merged", backend=backend)
    fields = {"backend": backend, "seq_len": 512}
    used = mens_core.evaluate_model(held_out, model=base, adapter=adapter, **fields)
    merged = mens_core.evaluate_model(held_out, model=str(tmp_path / "merged"), **fields)
    assert used["loss"] == pytest.approx(merged["loss"], abs=1e-5)
    assert abs(used["loss"] - mens_core.evaluate_model(held_out, model=base, **fields)["loss"]) > 0.01
    asked = {"backend": backend, "max_new_tokens": 8}
    answer = mens_core.generate("Write x.", model=base, adapter=adapter, **asked)
    assert answer == mens_core.generate("Write x.", model=str(tmp_path / "merged"), **asked)
    asked = {"model": base, "data_dir": corpus_dir, "start_from": adapter, "max_steps": 3, **fields}
    result = Planner().run(**asked, output_dir=tmp_path / "run", learning_rate=1e-2)
    assert result.eval_loss_before == pytest.approx(used["loss"], abs=1e-6)
    assert result.manifest["plan"]["contract"]["modules_to_save"] == ["lm_head"]
    config = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]
    # What was written is used and merged as what PEFT wrote, and the run verified.
    end = mens_core.evaluate_model(held_out, adapter=result.adapter_dir, **fields)
    assert end["loss"] == pytest.approx(result.eval_loss_after, abs=1e-6)
    assert abs(end["loss"] - used["loss"]) > 0.01
    mens_core.merge([(result.adapter_dir, 1.0)], output=tmp_path / "further", backend=backend)
    merged = mens_core.evaluate_model(held_out, model=str(tmp_path / "further"), **fields)
    assert merged["loss"] == pytest.approx(end["loss"], abs=1e-5)
    assert all(check["state"] == "ok" for check in mens_core.verify_run(result.output_dir)["checks"])
    assert "1 modules trained whole" in (result.output_dir / "MODEL_CARD.md").read_text()
    with pytest.raises(GateError, match=r"whole it has lm_head\.weight \(\d+, \d+\) instead of not at all"):
        Planner().run(**asked, modules_to_save=("norm",), output_dir=tmp_path / "refused")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "head and embedding as one"),
        ({"modules_to_save": ["k_proj"]}, r"model\.layers\.0\.self_attn\.k_proj is a linear layer"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_of_pefts_that_cannot_be_trained_on_is_refused(model_dirs, corpus_dir, tmp_path, settings, problem):
    base = model_dirs["qwen2"]
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["up_proj"], **settings)
    fields = {"model": str(base), "data_dir": corpus_dir, "output_dir": tmp_path / "run", "seq_len": 512}
    with pytest.raises((GateError, ModelError), match=problem) as refused:
        Planner().run(**fields, start_from=adapter)
    assert "merge-adapter" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_an_embedding_that_peft_saved_though_it_was_frozen_is_not_trained_on_in_silence(
    model_dirs, corpus_dir, tmp_path
):
    base = model_dirs["llama"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    fields = {"model": str(base), "data_dir": corpus_dir, "output_dir": tmp_path / "run", "seq_len": 512}
    with pytest.raises(ModelError, match=r"embed_tokens\.weight.*, which it does not say were trained"):
        Planner().run(**fields, start_from=tmp_path / "adapter")


def test_eval_prints_loss_and_perplexity(run, corpus_dir, capsys):
    assert main(["eval", "--data", str(corpus_dir / "eval.jsonl"), "--adapter", str(run), "--backend", "torch"]) == 0
    assert "nats a token, perplexity" in capsys.readouterr().out
    assert main(["eval", "--data", str(corpus_dir / "none.jsonl"), "--adapter", str(run)]) == 2
    assert "there is no such file of rows" in capsys.readouterr().err
