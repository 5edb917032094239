"""Observers, each with its real library and without a network: what it recorded is what telemetry says."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from mens_core.cli import main
from mens_core.observers.scalars import scalars
from mens_core.plugins import check_observers
from mens_core.training.telemetry_log import read_telemetry
from mens_core.training.telemetry_schema import telemetry_schema

SETTINGS = {"max_steps": 3, "rank": 4, "batch_size": 2, "grad_accum": 1, "seq_len": 256}
SHOWN = ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_sec", "eval/loss")


def _train(name, model_dirs, corpus_dir, output, **variables):
    """A run that reports to an observer, in a process of its own: these libraries change the one they are in."""
    for needed in {"mlflow": ("mlflow", "sqlalchemy")}.get(name, (name,)):
        pytest.importorskip(needed)
    fields = {"model": str(model_dirs["llama"]), "data_dir": str(corpus_dir), "output_dir": str(output)}
    code = f"from mens_core import Planner; Planner().run(report_to=({name!r},), **{fields | SETTINGS!r})"
    # Nothing listens there: a request to anywhere would fail.
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | nowhere | variables
    )
    assert done.returncode == 0, done.stderr
    return output


def _expected(output):
    """Name → (step, number) of every number that the telemetry holds, in order."""
    expected = {}
    for event in read_telemetry(output).events:
        for name, number in scalars(event).items():
            expected.setdefault(name, []).append((event["payload"]["step"], pytest.approx(number, rel=1e-6)))
    assert set(SHOWN) <= expected.keys()
    return expected


def test_tensorboard_reads_back_what_telemetry_says(model_dirs, corpus_dir, tmp_path):
    output = _train("tensorboard", model_dirs, corpus_dir, tmp_path / "run")
    script = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps({tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}))
"""
    words = [sys.executable, "-W", "ignore", "-c", script, str(output / "tensorboard")]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert {tag: [tuple(entry) for entry in entries] for tag, entries in found.items()} == _expected(output)


def test_wandb_keeps_offline_what_telemetry_says(model_dirs, corpus_dir, tmp_path):
    output = _train("wandb", model_dirs, corpus_dir, tmp_path / "run", WANDB_MODE="offline")
    (file,) = output.glob("wandb/offline-run-*/run-*.wandb")
    script = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2
# LevelDB's log: blocks of 32 KiB of chunks (crc32, length, 1 whole | 2 first | 3 middle | 4 last) after 7 bytes.
data, place, whole, found, code = open(sys.argv[1], "rb").read(), 7, b"", {}, None
while place + 7 <= len(data):
    room = 32768 - place % 32768
    length, kind = struct.unpack_from("<HB", data, place + 4) if room >= 7 else (0, 0)
    if kind == 0:
        place += room
        continue
    whole += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(whole)
        whole = b""
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name in items.keys() - {"_step", "_runtime", "_timestamp"}:
            found.setdefault(name, []).append((items["_step"], items[name]))
        code = record.exit.exit_code if record.HasField("exit") else code
print(json.dumps([found, code]))
"""
    words = [sys.executable, "-W", "ignore", "-c", script, str(file)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found, code = json.loads(done.stdout)
    assert code == 0
    assert {name: [tuple(entry) for entry in entries] for name, entries in found.items()} == _expected(output)


def test_mlflow_gives_back_what_telemetry_says(model_dirs, corpus_dir, tmp_path):
    output = _train("mlflow", model_dirs, corpus_dir, tmp_path / "run")
    script = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
(run,) = client.search_runs([client.get_experiment_by_name("mens-core").experiment_id])
metrics = {
    name: [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, name)]
    for name in run.data.metrics
}
print(json.dumps([metrics, run.info.status, run.data.params]))
"""
    uri = f"sqlite:///{output / 'mlflow' / 'mlflow.db'}"
    words = [sys.executable, "-W", "ignore", "-c", script, uri]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found, status, params = json.loads(done.stdout)
    assert {name: [tuple(entry) for entry in entries] for name, entries in found.items()} == _expected(output)
    assert status == "FINISHED"
    assert (params["rank"], params["execution_kernel"]) == ("4", "torch_lora")


def test_no_observer_is_loaded_unless_asked_for(model_dirs, corpus_dir, tmp_path):
    fields = {"model": str(model_dirs["llama"]), "data_dir": str(corpus_dir), "output_dir": str(tmp_path / "run")}
    code = f"""
import sys
from mens_core import Planner
Planner().run(**{fields | SETTINGS!r})
print([name for name in ("wandb", "mlflow", "tensorboard", "mens_core.observers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_observer_is_refused_with_the_nearest_before_anything_is_read(tmp_path, capsys):
    words = ["train", "--data-dir", "absent", "--output-dir", str(tmp_path / "run"), "--report-to", "tensorbord"]
    assert main(words) == 2
    assert "did you mean 'tensorboard'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_observer_whose_library_is_missing_is_refused_with_the_line_that_brings_it(monkeypatch, tmp_path, capsys):
    found = importlib.metadata.distribution

    def without(name):
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without)
    assert main(["plan", "--data-dir", "absent", "--output-dir", str(tmp_path), "--report-to", "wandb"]) == 2
    printed = capsys.readouterr().err
    assert "observer 'wandb' needs wandb" in printed
    assert "pip install 'mens-core[wandb]'" in printed


def test_none_is_nobody_and_a_name_twice_is_once():
    assert check_observers(["none"]) == []
    if not any(entry.name == "tensorboard" for entry in importlib.metadata.entry_points(group="mens_core.observers")):
        pytest.fail("the observers of this distribution are not registered")
    pytest.importorskip("tensorboard")
    assert [entry.name for entry in check_observers(["tensorboard", "none", "tensorboard"])] == ["tensorboard"]


@pytest.mark.parametrize("name", telemetry_schema()["$defs"])
def test_only_numbers_of_the_schema_are_shown(name):
    fields = telemetry_schema()["$defs"][name]["properties"]
    shown = scalars({"event": name, "payload": dict.fromkeys(fields, 1)})
    assert bool(shown) == (name in {"step", "evaluation"})
