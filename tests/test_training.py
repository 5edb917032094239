"""Whole runs, from rows to a run directory that PEFT opens: every kernel, every family."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tolerances import LOGITS

import mens_core
from mens_core import Planner
from mens_core.artifacts.adapter import initial_state
from mens_core.artifacts.adapters import open_adapter
from mens_core.chat.open_chat import ChatML
from mens_core.contract import FineTuneContract
from mens_core.errors import DataError, GateError, ModelError, RunDirectoryError, TrainingError
from mens_core.exchange import NF4Spec, TrainingState
from mens_core.hf.hub import find_model
from mens_core.hf.layout import GRAPHS
from mens_core.planner import resolve
from mens_core.text.encode import Encoder
from mens_core.text.pack import Batching, pack
from mens_core.text.tokens import TokenRow, TokenRows

RUNBOOK = {"lora": "burn_lora", "qlora": "candle_qlora"}
RUN_FILES = {
    "MODEL_CARD.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoints",
    "populi_adapter_manifest_v3.json",
    "telemetry.jsonl",
    "training-preflight.json",
    "training_manifest.json",
}

# Enough steps for a random model to learn which tokens there are.
SETTINGS = {"max_steps": 10, "learning_rate": 5e-3, "rank": 4, "batch_size": 2, "grad_accum": 2, "seq_len": 256}


def _hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def _events(folder):
    return [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=GRAPHS)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=["lora", "qlora"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def finished(backend, method, family, model_dirs, corpus_dir, tmp_path_factory):
    """A finished run of one kernel on one family, with the base folder's hashes before and after."""
    output = tmp_path_factory.mktemp("runs") / f"{backend.name}-{method}-{family}"
    before = _hashes(model_dirs[family])
    result = Planner().run(
        model=str(model_dirs[family]),
        data_dir=corpus_dir,
        output_dir=output,
        backend=backend.name,
        method=method,
        **SETTINGS,
    )
    return result, before, _hashes(model_dirs[family])


def test_the_run_directory_is_complete_and_holds_nothing_else(finished):
    result, _, _ = finished
    assert {path.name for path in result.output_dir.iterdir()} == RUN_FILES


def test_the_manifest_says_what_ran(finished, backend, method):
    result, _, _ = finished
    manifest = json.loads((result.output_dir / "training_manifest.json").read_text())
    assert manifest == result.manifest
    assert manifest["status"] == "complete"
    assert manifest["execution_kernel"] == f"{backend.name}_{method}"
    assert manifest["runbook_kernel"] == RUNBOOK[method]
    assert manifest["results"]["optimizer_steps"] == len(result.losses) == SETTINGS["max_steps"]
    assert manifest["sha256"]["base_shards"] == {
        name: digest for name, digest in finished[1].items() if name.endswith(".safetensors")
    }


def test_the_manifest_holds_the_estimate_beside_what_was_measured(finished):
    result, _, _ = finished
    estimate, results = result.manifest["estimate"], result.manifest["results"]
    assert estimate["peak_memory_bytes"]["measured"] == results["peak_memory_bytes"]
    assert estimate["seconds_per_step"]["measured"] == results["median_step_seconds"]
    tokens = results["tokens_trained"] / results["optimizer_steps"]
    assert estimate["tokens_per_sec"]["measured"] == pytest.approx(tokens / results["median_step_seconds"])
    for entry in estimate.values():
        assert entry["error"] == pytest.approx(entry["measured"] / entry["estimated"] - 1)
    assert result.manifest["plan"]["estimate"]["peak_memory_bytes"] == estimate["peak_memory_bytes"]["estimated"]


def test_something_was_learned(finished):
    result, _, _ = finished
    # A random model of this vocabulary starts near ln 512 = 6.24. Its frozen head (rows of norm 0.16) lets the logits
    # move by a few tenths only; ten steps take off about a tenth of a nat, a no-op exactly nothing.
    assert result.eval_loss_before == pytest.approx(np.log(512), abs=0.2)
    assert result.eval_loss_after < result.eval_loss_before - 0.05


def test_the_base_is_untouched(finished):
    _, before, after = finished
    assert before == after


def test_telemetry_tells_the_whole_run(finished, backend, method):
    result, _, _ = finished
    events = _events(result.output_dir)
    # A checkpoint is told of when it is on the disk, which may be a few steps later.
    assert [event["event"] for event in events if event["event"] != "checkpoint_saved"] == [
        "train_start",
        "evaluation",
        *["step"] * SETTINGS["max_steps"],
        "evaluation",
        "train_complete",
    ]
    start = events[0]["payload"]
    assert start["execution_kernel"] == f"{backend.name}_{method}"
    assert start["candle_compat_mode"] is (method == "qlora")
    assert start["contract_digest"] == result.manifest["finetune_contract_digest"]
    steps = [event["payload"] for event in events if event["event"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, SETTINGS["max_steps"] + 1))
    assert [step["loss"] for step in steps] == list(result.losses)
    assert all(0 < step["supervised_ratio"] < 1 and step["tokens_per_sec"] > 0 for step in steps)
    assert events == sorted(events, key=lambda event: event["ts_ms"])


def test_the_v3_manifest_and_the_preflight_agree_with_the_adapter(finished, backend, method):
    result, _, _ = finished
    v3 = json.loads((result.output_dir / "populi_adapter_manifest_v3.json").read_text())
    modules = set(open_adapter(result.adapter_dir).modules)
    assert (v3["format"], v3["version"], v3["adapter_method"]) == ("vox_mens_adapter", 3, method)
    assert v3["quant"] == {"base_quant": "nf4" if method == "qlora" else "none", "double_quant": method == "qlora"}
    assert set(v3["layer_order"]) == modules == set(v3["base_key_map"])
    peft = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert (v3["rank"], v3["alpha"]) == (peft["r"], peft["lora_alpha"]) == (SETTINGS["rank"], 32)
    assert isinstance(v3["alpha"], int)
    preflight = json.loads((result.output_dir / "training-preflight.json").read_text())
    assert preflight["execution_kernel"] == f"{backend.name}_{method}"
    assert preflight["contract_digest"] == result.manifest["finetune_contract_digest"]


def _through_nf4(backend, model):
    """Put every decoder linear of a transformers model through NF4 and back, as QLoRA stores it."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            transposed = isinstance(module, Conv1D)
            weight = module.weight.detach().T if transposed else module.weight.detach()
            stored = backend.dequantize(backend.quantize(np.ascontiguousarray(weight), NF4Spec()))
            restored = torch.from_numpy(stored.copy())
            module.weight.data = restored.T.contiguous() if transposed else restored


def test_peft_binds_every_tensor_and_computes_the_same_logits(finished, backend, method, family, model_dirs):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result, _, _ = finished
    base = AutoModelForCausalLM.from_pretrained(model_dirs[family])
    if method == "qlora":
        _through_nf4(backend, base)
    model = PeftModel.from_pretrained(base, result.adapter_dir).eval()
    bound = {
        name.removeprefix("base_model.model.").replace(".default.", "."): tensor.detach().numpy()
        for name, tensor in model.named_parameters()
        if ".lora_" in name
    }
    adapter = open_adapter(result.adapter_dir).tensors()
    assert bound.keys() == adapter.keys()
    assert all(np.array_equal(bound[name], tensor) for name, tensor in adapter.items())

    ids = np.arange(24, dtype=np.int32) * 17 % 512
    row = TokenRow(ids, np.ones(24, np.bool_))
    plan, loaded = resolve(FineTuneContract.from_fields(**result.manifest["plan"]["contract"]))
    session = loaded.open(plan, Batching(batch_size=1, grad_accum=1, seed=0).shape(TokenRows.of([row]), 1))
    session = loaded.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
    ours = loaded.forward(session, pack(TokenRows.of([row])))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    assert np.abs(ours - theirs).max() <= LOGITS
    # The twin: without its adapter the base is further away than that.
    with torch.no_grad(), model.disable_adapter():
        bare = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    assert np.abs(ours - bare).max() > 10 * LOGITS


@pytest.fixture
def fields(model_dirs, corpus_dir, tmp_path):
    """A valid run; tests change one thing."""
    return {
        "model": str(model_dirs["llama"]),
        "data_dir": corpus_dir,
        "output_dir": tmp_path / "run",
        "backend": "torch",
        **SETTINGS,
    }


def _manifest(fields):
    return json.loads((fields["output_dir"] / "training_manifest.json").read_text())


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(fields, tmp_path):
    adapters = [
        Planner().run(**{**fields, "seed": seed, "output_dir": tmp_path / name}).adapter_dir
        / "adapter_model.safetensors"
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    first, again, other = (path.read_bytes() for path in adapters)
    assert first == again
    assert first != other


def test_the_start_of_an_adapter_depends_on_seed_and_name_alone():
    shapes = {"m.a.lora_A.weight": np.empty((4, 9)), "m.a.lora_B.weight": np.empty((7, 4))}
    start = initial_state(shapes, seed=3).adapter
    alone = initial_state({"m.a.lora_A.weight": np.empty((4, 9))}, seed=3).adapter
    assert np.array_equal(start["m.a.lora_A.weight"], alone["m.a.lora_A.weight"])
    assert not start["m.a.lora_B.weight"].any()
    a = initial_state({"m.a.lora_A.weight": np.empty((64, 400))}, seed=3).adapter["m.a.lora_A.weight"]
    # Uniform on ±1/√in: the extremes of 25,600 draws come within 1 % of the ends, the mean within 4 standard errors.
    assert np.abs(a).max() == pytest.approx(1 / 20, rel=0.01)
    assert np.abs(a).max() <= 1 / 20
    assert abs(a.mean()) < 4 * (1 / 20 / np.sqrt(3)) / np.sqrt(a.size)


def test_planning_writes_nothing_and_names_the_kernel(fields):
    plan = Planner().plan(**{**fields, "backend": "qlora"})
    assert plan.execution_kernel == "torch_qlora"
    assert plan.candle_compat_mode
    assert all(gate.passed for gate in plan.gates)
    assert not fields["output_dir"].exists()


_TAGGED = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_training_text_is_the_models_own_template_where_it_has_one(fields, tmp_path, name):
    def add(folder):
        config = {"eos_token": "<|endoftext|>"} | ({"chat_template": _TAGGED} if name.endswith("json") else {})
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if name.endswith("jinja"):
            (folder / name).write_text(_TAGGED)

    plain = Planner().plan(**fields)
    model = _changed_model(Path(fields["model"]), tmp_path / "templated", add)
    result = Planner().run(**{**fields, "model": model})
    assert (plain.chat, result.manifest["plan"]["chat"]) == ("chatml", "template")
    assert plain.contract_digest != result.manifest["plan"]["contract_digest"]
    contract = FineTuneContract.from_fields(trains=False, model=str(model), data_dir=fields["data_dir"])
    (row,) = mens_core.preview_rows(contract, first=1).shown
    texts, answer = "".join(text for text, _ in row.pieces), next(text for text, trained in row.pieces if trained)
    first = json.loads((fields["data_dir"] / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert texts == f"[user]{first['prompt']}<|endoftext|>[assistant]{first['response']}<|endoftext|>"
    assert answer == first["response"] + "<|endoftext|>"


def test_training_text_of_a_template_that_is_no_template_is_refused(fields, tmp_path):
    model = _changed_model(
        Path(fields["model"]),
        tmp_path / "broken",
        lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"),
    )
    with pytest.raises(ModelError, match="template"):
        Planner().plan(**{**fields, "model": model})


def test_a_kernel_can_be_forced(fields):
    assert Planner().plan(**{**fields, "backend": "jax_lora"}).execution_kernel == "jax_lora"


def test_a_contract_and_its_fields_are_the_same_request(fields):
    contract = FineTuneContract.from_fields(**fields)
    assert Planner().plan(contract).contract_digest == Planner().plan(**fields).contract_digest
    with pytest.raises(mens_core.MensError, match="not both"):
        Planner().plan(contract, rank=3)


def _changed_model(source, target, change):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    change(target)
    return str(target)


def _set_model_type(name):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), GateError, "config_json_exists"),
        (lambda folder: (folder / "model.safetensors").unlink(), ModelError, "holds no weights"),
        (lambda folder: (folder / "tokenizer.json").unlink(), GateError, "tokenizer_exists"),
        (_set_model_type("nosuch"), GateError, "nosuch"),
    ],
)
def test_a_model_folder_that_cannot_work_is_refused_before_anything_is_written(
    fields, tmp_path, change, error, message
):
    model = _changed_model(Path(fields["model"]), tmp_path / "broken", change)
    with pytest.raises(error, match=message):
        Planner().run(**{**fields, "model": model})
    assert not fields["output_dir"].exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [("", "empty"), ("{]\n", "1"), ('{"prompt": "x"}\n', "response"), (None, "train_file_exists")],
)
def test_data_that_cannot_work_is_refused_before_anything_is_written(fields, tmp_path, lines, message):
    data = tmp_path / "data"
    data.mkdir()
    if lines is not None:
        (data / "train.jsonl").write_text(lines)
    with pytest.raises((DataError, GateError), match=message):
        Planner().run(**{**fields, "data_dir": data})
    assert not fields["output_dir"].exists()


def test_a_model_that_is_no_folder_and_no_hub_id_is_an_error(fields):
    with pytest.raises(ModelError, match="no such model folder"):
        Planner().plan(**{**fields, "model": "./nowhere"})


def test_rows_longer_than_the_model_are_refused(fields):
    with pytest.raises(GateError, match="row_fits_positions"):
        Planner().plan(**{**fields, "seq_len": 4096})


def test_a_second_run_does_not_touch_the_first(fields):
    Planner().run(**fields)
    first = _hashes(fields["output_dir"])
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        Planner().run(**fields)
    assert _hashes(fields["output_dir"]) == first
    Planner().run(**fields, overwrite=True, seed=9)
    assert _hashes(fields["output_dir"]) != first


def test_a_run_that_diverges_is_failed_and_says_why(fields):
    with pytest.raises(TrainingError, match="finite"):
        Planner().run(**{**fields, "learning_rate": 1e30, "max_grad_norm": 1e30})
    manifest = _manifest(fields)
    assert manifest["status"] == "failed"
    assert "finite" in manifest["error"]
    assert not (fields["output_dir"] / "adapter_model.safetensors").exists()


def test_an_interrupted_run_says_so(fields):
    def interrupt(event):
        if event["event"] == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Planner().run(**fields, observers=[interrupt])
    assert _manifest(fields)["status"] == "interrupted"


def test_a_terminated_process_leaves_an_honest_manifest(fields):
    flags = [f"--{name.replace('_', '-')}={fields[name]}" for name in ("model", "data_dir", "output_dir", "backend")]
    command = [sys.executable, "-m", "mens_core", "train", *flags, "--epochs=5000"]
    telemetry = fields["output_dir"] / "telemetry.jsonl"
    deadline = time.monotonic() + 120
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (telemetry.exists() and '"step"' in telemetry.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143
    assert _manifest(fields)["status"] == "interrupted"


def test_observers_from_plugins_hear_every_event_and_gates_can_refuse(fields, tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "mens_watch-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mens-watch\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mens_core.plugins]\nwatch = mens_watch\n")
    (site / "mens_watch.py").write_text(
        "from mens_core import GateVerdict, hookimpl\n"
        "HEARD, PASSED = [], [True]\n"
        "@hookimpl\ndef mens_event(event): HEARD.append(event['event'])\n"
        "@hookimpl\ndef mens_gates(contract, plan):\n"
        "    return [GateVerdict(code='friday', passed=PASSED[0], message='not on a Friday')]\n"
    )
    monkeypatch.syspath_prepend(str(site))
    result = Planner().run(**fields)
    watch = sys.modules["mens_watch"]
    assert [event["event"] for event in _events(result.output_dir)] == watch.HEARD
    assert result.manifest["plan"]["gates"][-1]["code"] == "friday"
    watch.PASSED[0] = False
    with pytest.raises(GateError, match=r"\[friday\] not so"):
        Planner().plan(**fields)


def test_generation_takes_base_and_settings_from_the_run(fields):
    # A block size of its own, so that a base quantised with the default would answer otherwise.
    asked = {**fields, "method": "qlora", "block_size": 256, "max_steps": 30, "epochs": 30, "learning_rate": 2e-2}
    result = Planner().run(**asked)
    answer = mens_core.generate("Write x.", adapter=result.adapter_dir, backend="torch", max_new_tokens=8)
    spelled_out = {name: asked[name] for name in ("method", "block_size", "model")}
    assert answer == mens_core.generate(
        "Write x.", adapter=result.adapter_dir, backend="torch", max_new_tokens=8, **spelled_out
    )
    assert answer != mens_core.generate("Write x.", model=fields["model"], backend="torch", max_new_tokens=8)


def test_an_adapter_without_a_manifest_is_read_from_pefts_config(fields):
    result = Planner().run(**{**fields, "targets": ("q_proj", "v_proj"), "dropout": 0.1})
    assert json.loads((result.adapter_dir / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    whole = mens_core.generate("Write x.", adapter=result.adapter_dir, backend="torch", max_new_tokens=8)
    (result.output_dir / "training_manifest.json").unlink()
    assert mens_core.generate("Write x.", adapter=result.adapter_dir, backend="torch", max_new_tokens=8) == whole


def test_an_answer_ends_at_an_end_tag_that_is_spelled_in_several_tokens(fields, tmp_path):
    def forget_tags(folder):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "im_" not in token["content"]]
        for tag in ("<|im_start|>", "<|im_end|>"):
            tokenizer["model"]["vocab"].pop(tag, None)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        # A template whose end of turn is no token is refused; ChatML spells it.
        (folder / "tokenizer_config.json").unlink()

    # The lab base, because a random one cannot learn an answer by heart.
    model = _changed_model(find_model(None, None)[1], tmp_path / "untagged", forget_tags)
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "q", "response": "ab"}\n' * 2)
    steps = {"max_steps": 60, "epochs": 60, "grad_accum": 1}
    result = Planner().run(**{**fields, "model": model, "data_dir": data, **steps})
    untagged = Tokenizer.from_file(f"{model}/tokenizer.json")
    assert len(Encoder(untagged, ChatML(untagged)).stop_tokens()) == 1  # the end of the text alone
    assert result.losses[-1] < 0.1
    assert mens_core.generate("q", adapter=result.adapter_dir, backend="torch", max_new_tokens=60) == "ab"
