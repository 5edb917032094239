"""training_manifest.json keeps its schema, however a run went."""

import json
from pathlib import Path

import jsonschema
import pytest

import mens_core
from mens_core import Planner
from mens_core.errors import RunInterrupted, TrainingError

SCHEMA = json.loads((Path(mens_core.__file__).parent / "artifacts/manifest_schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def _manifest(folder):
    return json.loads((folder / "training_manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def manifests(model_dirs, corpus_dir, tmp_path_factory):
    """How a run went → its manifest."""
    fields = {"model": str(model_dirs["qwen2"]), "data_dir": corpus_dir, "backend": "torch", "seq_len": 512, "rank": 2}
    root = tmp_path_factory.mktemp("manifests")
    found, whole, broken = {}, root / "whole", root / "broken"
    asked = iter([None, None, "enough"])
    with pytest.raises(RunInterrupted):
        Planner().run(**fields, output_dir=whole, max_steps=3, checkpoint_every=1, stop=lambda: next(asked))
    found["interrupted"] = _manifest(whole)
    Planner().run(**fields, output_dir=whole, max_steps=3, checkpoint_every=1, resume="auto")
    found["complete"] = _manifest(whole)

    def fail(event):
        if event["event"] == "step":
            raise TrainingError("it was enough")

    with pytest.raises(TrainingError):
        Planner().run(**fields, output_dir=broken, max_steps=2, observers=[fail])
    found["failed"] = _manifest(broken)
    return found


@pytest.mark.parametrize("status", ["interrupted", "complete", "failed"])
def test_a_manifest_keeps_the_schema(manifests, status):
    VALIDATOR.validate(manifests[status])
    assert manifests[status]["status"] == status


def test_what_a_run_goes_through_is_in_the_manifest_of_the_whole(manifests):
    (interruption,) = manifests["complete"]["interruptions"]
    assert interruption["reason"] == manifests["interrupted"]["reason"] == "enough"
    assert manifests["complete"]["resumed_from"]["step"] == manifests["interrupted"]["step"]


def test_a_manifest_with_another_field_is_found_out(manifests):
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(manifests["complete"] | {"speed": 1})
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate({name: value for name, value in manifests["complete"].items() if name != "pid"})
