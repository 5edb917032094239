"""Preflight: what a run is refused for before a file of it exists, and a plan only warned of."""

import functools
import importlib
import json
from pathlib import Path

import attrs
import folders
import numpy as np
import pytest

from mens_core import Planner
from mens_core.artifacts.tensors import open_tensors, write_tensors
from mens_core.cli import main
from mens_core.errors import DataError, GateError, ModelError
from mens_core.hf.keymap import tensor_shapes
from mens_core.hf.layout import read_layout
from mens_core.preflight import whole_modules_exist

EMBEDDING = "model.embed_tokens.weight"
O_PROJ = "model.layers.{}.self_attn.o_proj.weight"


@pytest.fixture
def fields(tmp_path):
    """A request for a QLoRA run on the runbook's fixture: hidden 7, heads 1, layers 2, vocabulary 5."""
    return {
        "model": str(tmp_path / "m"),
        "data_dir": folders.rows_folder(tmp_path / "d"),
        "output_dir": tmp_path / "run",
        "seq_len": 64,
        "method": "qlora",
    }


def _write(fields, keep=None, hidden=7):
    return folders.qwen2_folder(Path(fields["model"]), hidden=hidden, heads=1, layers=2, vocab=5, keep=keep)


def _refused(plan):
    return [verdict.code for verdict in plan.preflight if not verdict.passed]


def test_preflight_strict_rejects_missing_o_proj(fields):
    _write(fields, keep={EMBEDDING})
    for act in (Planner().plan, Planner().run):
        with pytest.raises(GateError) as caught:
            act(**fields, qlora_require_full_proxy_stack=True)
        text = str(caught.value)
        assert caught.value.codes == ("strict_proxy_stack",)
        assert "strict proxy stack: 0 of 2" in text
        assert all(O_PROJ.format(layer) in text for layer in range(2))
    assert not fields["output_dir"].exists()


@pytest.mark.parametrize("backend", ["qlora", "lora", "torch_qlora", "jax_lora"])
def test_preflight_strict_rejects_missing_o_proj_from_the_command_line(fields, backend, capsys):
    _write(fields, keep={EMBEDDING})
    words = [f"--{name.replace('_', '-')}={fields[name]}" for name in ("model", "data_dir", "output_dir", "seq_len")]
    flags = ["--backend", backend, "--tokenizer=hf", "--qlora-require-full-proxy-stack"]
    assert main(["train", *words, *flags]) == 2
    assert "strict proxy stack" in capsys.readouterr().err
    assert not fields["output_dir"].exists()


def test_a_partial_stack_is_planned_with_a_warning_and_not_run(fields):
    _write(fields, keep={EMBEDDING})
    plan = Planner().plan(**fields, qlora_allow_partial_proxy_stack=True)
    assert (plan.coverage.eligible, plan.coverage.complete) == (True, False)
    assert (plan.coverage.keys_matched, plan.coverage.keys_expected) == (0, 2)
    assert any("partial proxy stack" in warning and O_PROJ.format(1) in warning for warning in plan.warnings)
    with pytest.raises(GateError) as caught:
        Planner().run(**fields)
    assert caught.value.codes == ("tensors_present", "rotary_pairs")
    assert not fields["output_dir"].exists()


def test_a_complete_stack_passes_the_strict_gate(fields):
    _write(fields)
    plan = Planner().plan(**fields, qlora_require_full_proxy_stack=True)
    assert plan.coverage.complete
    assert not any("proxy stack" in warning for warning in plan.warnings)


def test_heads_that_cannot_be_rotated_in_pairs_are_refused_before_the_run(fields):
    _write(fields)
    assert _refused(Planner().plan(**fields)) == ["rotary_pairs"]
    with pytest.raises(GateError, match="heads of 7 dimensions"):
        Planner().run(**fields)


def test_at_most_32_missing_keys_are_told(tmp_path, fields):
    folders.qwen2_folder(tmp_path / "deep", hidden=4, heads=1, layers=40, vocab=5, keep={EMBEDDING})
    with pytest.raises(GateError) as caught:
        Planner().plan(**{**fields, "model": str(tmp_path / "deep")}, qlora_require_full_proxy_stack=True)
    text = str(caught.value)
    assert text.count("o_proj.weight") == 32
    assert "and 8 more" in text


def test_a_target_that_is_no_linear_layer_is_refused_before_the_run_with_the_nearest(fields):
    _write(fields, hidden=8)
    plan = Planner().plan(**fields, targets=("q_proj", "v_porj"))
    (verdict,) = (verdict for verdict in plan.preflight if not verdict.passed)
    assert verdict.code == "targets_exist"
    assert "there is no v_porj (did you mean v_proj?)" in verdict.message
    assert not _refused(Planner().plan(**fields, targets=("q_proj", "layers.1.mlp.up_proj")))
    with pytest.raises(GateError, match="targets_exist"):
        Planner().run(**fields, targets=("q_proj", "v_porj"))
    assert not fields["output_dir"].exists()


def _change(folder, change):
    tensors = {name: np.array(tensor) for name, tensor in open_tensors(folder).items()}
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors, {})


def _narrow(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]


def _whole_numbers(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)


def _one_more(tensors):
    tensors["surplus"] = np.zeros(3, np.float32)


def _poison(tensors):
    tensors["model.norm.weight"][2] = np.nan


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "tensors_present", "model.norm.weight is missing"),
        (_one_more, "tensors_known", "surplus is left over"),
        (_narrow, "tensor_shapes", "model.norm.weight has shape (7,), the config asks for (8,)"),
        (_whole_numbers, "tensor_dtypes", "model.norm.weight is stored as I32"),
        (_poison, "weights_finite", "model.norm.weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_before_the_run(fields, method, change, code, named):
    _change(_write(fields, hidden=8), change)
    fields = {**fields, "method": method, "scan_weights": True}
    (verdict,) = (verdict for verdict in Planner().plan(**fields).preflight if not verdict.passed)
    assert verdict.code == code
    assert named in verdict.message
    with pytest.raises(GateError) as caught:
        Planner().run(**fields)
    assert caught.value.codes == (code,)
    assert not fields["output_dir"].exists()


def test_what_older_versions_saved_beside_the_weights_is_passed_over(fields):
    folder = _write(fields, hidden=8)
    width = read_layout(folder).hidden_size

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = np.zeros((5, width), np.float32)

    _change(folder, add)
    assert "lm_head.weight" not in tensor_shapes(read_layout(folder))
    assert not _refused(Planner().plan(**fields))


def test_a_faulty_row_in_the_sample_is_a_warning_of_the_plan(fields):
    _write(fields, hidden=8)
    with (fields["data_dir"] / "train.jsonl").open("a") as file:
        file.write("\n{]\n")
    (verdict,) = (verdict for verdict in Planner().plan(**fields).preflight if not verdict.passed)
    assert verdict.code == "rows_readable"
    assert "2 cannot" in verdict.message


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(fields):
    folder = _write(fields)
    folders.word_level(folder / "tokenizer.json", 6)
    with pytest.raises(ModelError, match="highest id 5, embedding rows 5"):
        Planner().plan(**fields)


def test_a_finished_preflight_is_kept_with_every_check(corpus_dir, model_dirs, tmp_path):
    result = Planner().run(
        model=str(model_dirs["qwen2"]),
        data_dir=corpus_dir,
        output_dir=tmp_path / "run",
        seq_len=256,
        max_steps=1,
        learning_rate=1e-3,
        warmup_steps=0,
        batch_size=2,
        grad_accum=1,
    )
    kept = json.loads((result.output_dir / "training-preflight.json").read_text())
    assert kept["schema_version"] == "vox.mens.preflight.v0"
    assert kept["execution_kernel"] == result.manifest["execution_kernel"] == "torch_lora"
    assert kept["contract_digest"] == result.manifest["finetune_contract_digest"]
    assert {check["code"] for check in kept["checks"]} >= {"tensor_shapes", "rows_readable", "fits_memory"}
    assert all(check["passed"] for check in kept["checks"])


@pytest.mark.parametrize(
    ("files", "train"),
    [
        ({"validated.jsonl": "x"}, "validated.jsonl"),
        ({"train.jsonl": "x", "validated.jsonl": "y"}, "train.jsonl"),
        ({"training_contract.yaml": "train_path: own.jsonl\n", "own.jsonl": "x", "train.jsonl": "y"}, "own.jsonl"),
    ],
)
def test_the_rows_are_found_where_the_folder_says(fields, tmp_path, files, train):
    _write(fields)
    data = tmp_path / "data"
    data.mkdir()
    line = (fields["data_dir"] / "train.jsonl").read_text().splitlines()[0] + "\n"
    for name, text in files.items():
        (data / name).write_text(text if name.endswith("yaml") else line)
    assert Planner().plan(**{**fields, "data_dir": data}).train_file == data / train


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train_path: nowhere.jsonl\n", "names no file"),
        ("train_paht: x\n", "did you mean train_path"),
        ("train_path: 3\n", "names no file"),
        ("[]\n", "no mapping"),
    ],
)
def test_a_contract_of_the_data_that_leads_nowhere_is_an_error(fields, text, problem):
    _write(fields)
    (fields["data_dir"] / "training_contract.yaml").write_text(text)
    with pytest.raises(DataError, match=problem):
        Planner().plan(**fields)


def test_rows_are_chosen_by_rating_and_context_and_counted(fields):
    _write(fields, hidden=8)
    with (fields["data_dir"] / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "w1", "response": "w2", "rating": 2, "category": "Code review"}) + "\n")
        file.write(json.dumps({"prompt": "w1", "response": "w2 w3", "lane": "prose"}) + "\n")
    settings = {"max_steps": 1, "warmup_steps": 0, "rank": 2, "method": "lora"}
    result = Planner().run(**{**fields, **settings}, min_rating=3, context_filter="CODE")
    assert result.manifest["counters"]["rows"] == 6
    assert result.manifest["counters"]["rows_dropped_rating"] == 1
    assert result.manifest["counters"]["rows_dropped_filter"] == 1
    with pytest.raises(DataError, match=r"25.0% of the rows are left out"):
        Planner().run(
            **{**fields, **settings, "overwrite": True}, min_rating=3, context_filter="code", max_skip_rate=0.2
        )


def test_too_few_rows_are_refused(fields):
    _write(fields, hidden=8)
    with pytest.raises(DataError, match="at least 7"):
        Planner().run(**fields, min_rows=7)
    assert not fields["output_dir"].exists()


def test_a_rating_that_is_none_is_an_error_only_where_it_counts(fields):
    _write(fields)
    with (fields["data_dir"] / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "w1", "response": "w2", "rating": "good"}) + "\n")
    assert Planner().plan(**fields).workload.rows == 7
    with pytest.raises(DataError, match="no usable rating"):
        Planner().plan(**fields, min_rating=1)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("lm_haed",), "there is no lm_haed (did you mean lm_head?)"),
        (("norm", "q_proj"), "q_proj is a linear layer, which is trained by a low-rank update"),
        (("layers.0",), "layers.0 has more than one module in it"),
        (("tokens", "norm"), "there is no tokens"),
        (("lm_head", "embed_tokens", "model.norm", "1.input_layernorm"), None),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_before_anything_is_written(fields, names, words):
    _write(fields)
    plan = Planner().plan(**fields, modules_to_save=names)
    (verdict,) = [verdict for verdict in plan.preflight if verdict.code == "whole_modules_exist"]
    assert verdict.passed == (words is None)
    if words is not None:
        assert words in verdict.message
        with pytest.raises(GateError, match="whole_modules_exist"):
            Planner().run(**fields, modules_to_save=names)
        assert not fields["output_dir"].exists()


def test_of_a_family_that_the_core_does_not_know_nothing_is_trained_whole(fields):
    _write(fields)
    verdict = whole_modules_exist(("lm_head",), attrs.evolve(read_layout(Path(fields["model"])), family=None), ())
    assert not verdict.passed
    assert "does not know these, only of gpt2, llama" in verdict.message


def _without_word(offered, **told):
    return offered(**{**told, "modules_to_save": False})


def test_a_backend_that_does_not_say_that_it_trains_modules_whole_is_not_given_them(fields, monkeypatch):
    _write(fields)
    for name in ("torch", "jax"):
        module = importlib.import_module(f"mens_{name}.offer")
        monkeypatch.setattr(module, "KernelOffer", functools.partial(_without_word, module.KernelOffer))
    with pytest.raises(GateError, match="does not say that it trains modules whole; leave modules_to_save out"):
        Planner().plan(**fields, modules_to_save=("norm",))
    assert Planner().plan(**fields).backend == "torch"
