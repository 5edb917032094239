"""``verify``: every byte that a run rests on, and every file that it left, is held to the manifest."""

import json
import shutil

import pytest

import mens_core
from mens_core import Planner
from mens_core.cli import main
from mens_core.errors import ModelError
from mens_core.hf.hub import find_model


@pytest.fixture(scope="module")
def places(model_dirs, corpus_dir, tmp_path_factory):
    """A short run, with a base and rows of its own to be changed."""
    root = tmp_path_factory.mktemp("verify")
    shutil.copytree(model_dirs["qwen3"], root / "base")
    shutil.copytree(corpus_dir, root / "data")
    fields = {"model": str(root / "base"), "data_dir": root / "data", "output_dir": root / "run", "backend": "torch"}
    Planner().run(**fields, seq_len=512, max_steps=2, rank=2)
    return root


def _states(run):
    return {check["what"]: check["state"] for check in mens_core.verify_run(run)["checks"]}


def _flipped(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def restored(places):
    """The folder, whose files are put back afterwards."""
    kept = {path: path.read_bytes() for path in places.rglob("*") if path.is_file()}
    yield places
    for path, raw in kept.items():
        path.write_bytes(raw)
    for path in places.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()


def test_a_run_that_nobody_touched_holds(places, capsys):
    assert main(["verify", str(places / "run")]) == 0
    assert "all hold" in capsys.readouterr().out
    assert set(_states(places / "run").values()) == {"ok"}


def test_the_manifest_has_the_hash_of_every_file_that_the_run_left(places):
    hashes = json.loads((places / "run" / "training_manifest.json").read_text())["sha256"]["run_files"]
    assert {"training_manifest.json", *hashes} == {path.name for path in (places / "run").iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "telemetry.jsonl"} < set(hashes)


def test_a_checkpoint_that_is_damaged_is_noticed(restored):
    _flipped(restored / "run" / "checkpoints" / "step-00000002" / "optimizer.safetensors", -1)
    assert {what for what, state in _states(restored / "run").items() if state != "ok"} == {"checkpoint, step-00000002"}


# File → where a bit is turned, and the checks that notice.
CHANGES = {
    "base/model.safetensors": (-1, {"base, model.safetensors"}),
    "base/config.json": (-1, {"base, config.json", "chat template"}),
    "base/tokenizer.json": (-1, {"tokenizer.json", "chat template"}),
    "data/train.jsonl": (20, {"rows, train.jsonl"}),
    "data/eval.jsonl": (20, {"rows, eval.jsonl"}),
    "run/adapter_model.safetensors": (-1, {"run, adapter_model.safetensors"}),
    "run/adapter_config.json": (-1, {"run, adapter_config.json", "run, rank and scale of its adapter"}),
    "run/populi_adapter_manifest_v3.json": (-1, {"run, populi_adapter_manifest_v3.json"}),
    "run/telemetry.jsonl": (20, {"run, telemetry.jsonl"}),
    "run/MODEL_CARD.md": (20, {"run, MODEL_CARD.md"}),
    "run/training-preflight.json": (-1, {"run, training-preflight.json", "run, kernel and digest that were checked"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_bit_is_found(restored, name):
    place, noticing = CHANGES[name]
    _flipped(restored / name, place)
    states = _states(restored / "run")
    assert {what for what, state in states.items() if state == "changed"} == noticing
    assert set(states.values()) == {"ok", "changed"}
    assert main(["verify", str(restored / "run")]) == 1


@pytest.mark.parametrize("name", CHANGES)
def test_a_missing_file_is_named(restored, name):
    (restored / name).unlink()
    found = mens_core.verify_run(restored / "run")
    missing = {check["what"] for check in found["checks"] if check["state"] == "missing"}
    assert missing & CHANGES[name][1]
    assert not found["holds"]


def _manifest(change):
    def apply(root):
        path = root / "run" / "training_manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


def _chat_template(root):
    path, lab = root / "base" / "tokenizer_config.json", find_model(None, None)[1] / "tokenizer_config.json"
    template = json.loads(lab.read_text())["chat_template"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


CLAIMS = {
    "another chat template": (_chat_template, "chat template"),
    "another learning rate": (_manifest(lambda m: m["plan"]["contract"].update(learning_rate=1.0)), "contract digest"),
    "another kernel": (
        _manifest(lambda m: m.update(execution_kernel="jax_lora")),
        "run, kernel and digest that were checked",
    ),
    "a run that failed": (_manifest(lambda m: m.update(status="failed")), "status"),
    "another weight hash": (
        _manifest(lambda m: m["sha256"]["base_shards"].update({"model.safetensors": "0" * 64})),
        "base, model.safetensors",
    ),
    "other tensors": (
        _manifest(lambda m: m["sha256"].update(weight_headers="0" * 64)),
        "base, names, types and shapes of its tensors",
    ),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_manifest_that_says_something_else_is_found(restored, case):
    change, noticing = CLAIMS[case]
    change(restored)
    assert _states(restored / "run")[noticing] == "changed"


def test_a_manifest_without_hashes_of_the_runs_files_does_not_hold(restored):
    _manifest(lambda manifest: manifest["sha256"].pop("run_files"))(restored)
    assert _states(restored / "run")["run, adapter_model.safetensors"] == "missing"


def test_the_adapter_that_a_run_went_on_from_is_held_to_it_too(restored):
    fields = {"model": str(restored / "base"), "data_dir": restored / "data", "backend": "torch", "rank": 2}
    mens_core.convert_adapter(restored / "run", "mlx", restored / "start")
    Planner().run(**fields, output_dir=restored / "further", start_from=restored / "start", seq_len=512, max_steps=1)
    assert _states(restored / "further")["adapter that it went on from"] == "ok"
    _flipped(restored / "start" / "adapters.safetensors", -1)
    assert _states(restored / "further")["adapter that it went on from"] == "changed"


def test_a_base_that_has_gone_is_missing_and_the_rest_is_still_looked_at(restored):
    (restored / "base").rename(restored / "elsewhere")
    states = _states(restored / "run")
    (restored / "elsewhere").rename(restored / "base")
    assert {state for what, state in states.items() if what.startswith("base")} == {"missing"}
    assert {state for what, state in states.items() if what.startswith(("run", "rows"))} == {"ok"}


def test_a_folder_without_a_manifest_is_an_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "there is no training_manifest.json" in capsys.readouterr().err
    (tmp_path / "training_manifest.json").write_text("{}")
    with pytest.raises(ModelError, match="the run's manifest cannot be read"):
        mens_core.verify_run(tmp_path)
