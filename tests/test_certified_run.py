"""``--certify``: a run that is held to the specification before it begins, and refused where it does not hold."""

import hashlib
import json
import shutil

import attrs
import pytest

from mens_core import Planner, certify, planner
from mens_core.contract import FineTuneContract
from mens_core.errors import ContractError, GateError, PluginError
from mens_core.parity import kernels, subjects
from mens_core.parity.kernels import Subject, compare_kernels
from mens_core.planner import plan_in_float32, resolve

SETTINGS = {"max_steps": 1, "rank": 4, "batch_size": 2, "grad_accum": 1, "seq_len": 256, "backend": "torch"}


@pytest.fixture
def asked(model_dirs, corpus_dir, tmp_path):
    """A run that asks for a certificate, of one step."""
    places = {"model": str(model_dirs["gpt2"]), "data_dir": str(corpus_dir), "output_dir": str(tmp_path / "run")}
    return {**SETTINGS, **places, "certify": True}


def test_a_certified_run_keeps_its_certificate_and_the_manifest_its_hash(asked):
    # With modules that are trained whole, which are held to the specification like the pairs.
    result = Planner().run(**asked, modules_to_save=("lm_head", "wte", "ln_f"))
    file = result.output_dir / "parity.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    (model,) = found["models"]
    assert found["passed"]
    assert set(model["kernels"]) == {"torch_lora", "jax_lora"}
    assert {"torch", "jax", "oracle"} <= {
        side for each in model["comparisons"] for side in (each["left"], each["right"])
    }
    kept = result.manifest["parity"]
    assert kept == {
        "file": "parity.json",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "passed": True,
        "comparisons": found["comparisons"],
        "failed": 0,
    }


def test_a_certificate_that_fails_refuses_the_run_before_its_folder_is_there(asked, tmp_path, monkeypatch):
    comparison = {"what": "logits", "left": "torch", "right": "oracle", "max_error": 1e-3, "tolerance": 1e-6}
    model = {"comparisons": [{**comparison, "passed": False}]}
    found = {"passed": False, "comparisons": 1, "models": [model]}
    monkeypatch.setattr(planner, "certify_run", lambda *_: found)
    with pytest.raises(GateError, match=r"logits, torch and oracle: 0\.001") as caught:
        Planner().run(**asked)
    assert caught.value.codes == ("parity_certified",)
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_too_large_is_certified_on_its_familys_tiny_model_and_says_so(asked, monkeypatch):
    plan, _ = resolve(FineTuneContract.from_fields(**asked))
    compared = []

    def compare(subject, _):
        compared.append(subject)
        return {"passed": True, "comparisons": []}

    monkeypatch.setattr(subjects, "compare_kernels", compare)
    monkeypatch.setattr(subjects, "obstacle_to_oracle", lambda *_: "too many parameters")
    subjects.certify_run(plan, plan_in_float32)
    (subject,) = compared
    assert subject.label == "tiny gpt2"
    assert subject.backends == ("torch", "jax")
    assert subject.methods == ("lora",)
    assert subject.notes == (f"not on {plan.model_name} itself: too many parameters",)
    assert "targets" not in subject.fields


def test_a_backend_that_cannot_take_part_is_left_out_with_the_reason(model_dirs, tmp_path, monkeypatch):
    found = subjects.installed_backends()
    without = [attrs.evolve(info, missing=("jax",)) if info.name == "jax" else info for info in found]
    monkeypatch.setattr(subjects, "installed_backends", lambda: without)
    names, notes = subjects.able_backends(model_dirs["gpt2"], plan_in_float32)
    assert names == ("torch",)
    assert notes == ("jax takes no part: it needs jax",)
    monkeypatch.undo()
    config = json.loads((model_dirs["llama"] / "config.json").read_text(encoding="utf-8"))
    base = shutil.copytree(model_dirs["llama"], tmp_path / "mistral")
    unknown = {**config, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (base / "config.json").write_text(json.dumps(unknown), encoding="utf-8")
    names, (note,) = subjects.able_backends(base, plan_in_float32)
    assert names == ("torch",)
    assert "jax takes no part" in note


def test_one_backend_without_the_specification_has_nothing_to_be_held_to(model_dirs, monkeypatch):
    monkeypatch.setattr(kernels, "obstacle_to_oracle", lambda *_: "too many parameters")
    subject = Subject(label="a base", folder=model_dirs["gpt2"], backends=("torch",), methods=("lora",))
    with pytest.raises(PluginError, match="too many parameters"):
        compare_kernels(subject, plan_in_float32)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"families": ["bert"]},
        {"model": "x", "families": ["gpt2"]},
        {"families": ["gpt2"], "backends": []},
        {"families": ["gpt2"], "backends": ["torch", "torch"]},
    ],
)
def test_a_certificate_is_of_a_model_or_of_known_families_by_backends_named_once(asked):
    with pytest.raises(ContractError, match=r"family|one of the two|backends are"):
        certify(**asked)
