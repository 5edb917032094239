"""Whole runs, from rows to a run directory that PEFT opens: every kernel, every family."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import mens_core
from mens_core import Planner
from mens_core.artifacts.adapter import initial_state, read_adapter
from mens_core.contract import FineTuneContract
from mens_core.errors import DataError, GateError, HookContractError, ModelError, RunDirectoryError, TrainingError
from mens_core.exchange import TrainingState
from mens_core.hf.layout import FAMILIES
from mens_core.planner import resolve
from mens_core.text.pack import run_shape
from mens_core.training import run as run_module

RUNBOOK = {"lora": "burn_lora", "qlora": "candle_qlora"}
RUN_FILES = {
    "MODEL_CARD.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "populi_adapter_manifest_v3.json",
    "telemetry.jsonl",
    "training-preflight.json",
    "training_manifest.json",
}

# Enough steps for a random model to learn which tokens there are.
SETTINGS = {"max_steps": 6, "learning_rate": 5e-3, "rank": 4, "batch_size": 2, "grad_accum": 2, "seq_len": 256}


def _hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _events(folder):
    return [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=FAMILIES)
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


def test_something_was_learned(finished):
    result, _, _ = finished
    # A random model of this vocabulary starts near ln 512 = 6.24; six steps of any working trainer take off a
    # tenth of a nat, and no trainer that changes nothing can.
    assert result.eval_loss_before == pytest.approx(np.log(512), abs=0.2)
    assert result.eval_loss_after < result.eval_loss_before - 0.1


def test_the_base_is_untouched(finished):
    _, before, after = finished
    assert before == after


def test_telemetry_tells_the_whole_run(finished, backend, method):
    result, _, _ = finished
    events = _events(result.output_dir)
    assert [event["event"] for event in events] == [
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
    modules = {name.rsplit(".lora_", 1)[0] for name in read_adapter(result.adapter_dir)}
    assert (v3["format"], v3["version"], v3["adapter_method"]) == ("vox_mens_adapter", 3, method)
    assert v3["quant"] == {"base_quant": "nf4" if method == "qlora" else "none", "double_quant": method == "qlora"}
    assert set(v3["layer_order"]) == modules == set(v3["base_key_map"])
    preflight = json.loads((result.output_dir / "training-preflight.json").read_text())
    assert preflight["execution_kernel"] == f"{backend.name}_{method}"
    assert preflight["contract_digest"] == result.manifest["finetune_contract_digest"]


def _own_logits(backend, result, rows):
    contract = FineTuneContract.from_fields(**result.manifest["plan"]["contract"])
    plan, loaded = resolve(contract)
    session = loaded.open(plan, run_shape(rows, batch_size=1, grad_accum=1, seed=0, epochs=1))
    session = loaded.restore(session, TrainingState(adapter=read_adapter(result.adapter_dir), optimizer={}, step=0))
    return loaded.forward(session, run_module.pack_rows(rows))


def test_peft_opens_the_adapter_and_computes_the_same_logits(finished, backend, method, family, model_dirs):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if method == "qlora":
        pytest.skip("PEFT has no NF4 base on this path; the adapter's file is the same, see the LoRA case")
    result, _, _ = finished
    base = AutoModelForCausalLM.from_pretrained(model_dirs[family])
    model = PeftModel.from_pretrained(base, result.adapter_dir).eval()
    assert not [name for name, _ in model.named_parameters() if "lora_B" in name and not _.any()]
