"""A run looked at from outside: its telemetry, ``status`` and ``watch``, while it lives and after it died."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jsonschema
import pytest
from rich.console import Console

import mens_core
from mens_core import Planner
from mens_core.artifacts.files import write_json, write_text
from mens_core.artifacts.rundir import RunDirectory, begun
from mens_core.cli import main
from mens_core.errors import TrainingError
from mens_core.sections import OutputSpec
from mens_core.training.telemetry import Telemetry
from mens_core.training.telemetry_log import read_telemetry
from mens_core.training.telemetry_schema import telemetry_schema
from mens_core.training_view import TrainingView
from mens_core.watching import follow_run, run_state

SETTINGS = {"max_steps": 3, "rank": 4, "batch_size": 2, "grad_accum": 1, "seq_len": 256}
NOBODY = 2**22 + 1  # beyond the largest process number there is
VALIDATOR = jsonschema.Draft202012Validator(telemetry_schema())


@pytest.fixture(scope="module")
def finished(backend, model_dirs, corpus_dir, tmp_path_factory):
    """A finished run of each backend."""
    output = tmp_path_factory.mktemp("watched") / backend.name
    Planner().run(
        model=str(model_dirs["llama"]), data_dir=corpus_dir, output_dir=output, backend=backend.name, **SETTINGS
    )
    return output


def _lines(folder):
    return [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]


def test_every_event_of_a_real_run_holds_to_the_schema(finished):
    events = _lines(finished)
    assert [error.message for event in events for error in VALIDATOR.iter_errors(event)] == []
    assert [event["event"] for event in events] == [
        "train_start",
        "evaluation",
        *["step"] * 3,
        "evaluation",
        "checkpoint_saved",
        "train_complete",
    ]


def test_the_first_and_the_last_step_are_there_and_count_real_tokens(finished):
    steps = read_telemetry(finished).payloads("step")
    assert (steps[0]["step"], steps[-1]["step"]) == (1, steps[-1]["total_steps"])
    for step in steps:
        assert step["supervised_ratio"] == step["supervised_tokens"] / step["tokens"]
        assert step["tokens_per_sec"] == pytest.approx(step["tokens"] / step["step_seconds"])


def test_a_finished_run_is_complete(finished, capsys):
    status = mens_core.run_status(finished)
    assert (status["state"], status["advice"], status["notes"]) == ("complete", "", [])
    assert status["last_step"]["step"] == 3
    assert [found["step"] for found in status["evaluations"]] == [0, 3]
    assert main(["status", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "complete" in printed
    assert "3 of 3, epoch 1 of 3" in printed
    assert re.search(r"guards +1\d of 1\d hold", printed)
    assert main(["status", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == status
    assert main(["watch", str(finished)]) == 0
    assert "step 3/3" in capsys.readouterr().out


def _folder(path, manifest, *, holder=None, telemetry=""):
    path.mkdir(parents=True, exist_ok=True)
    if manifest is not None:
        # Whole or not there, as a run writes it: somebody may be watching.
        write_json(path / "training_manifest.json", manifest)
    if holder is not None:
        (path / ".run.holder").write_text(holder)
    write_text(path / "telemetry.jsonl", telemetry)
    return path


ON_LINUX = pytest.mark.skipif(begun(os.getpid()) is None, reason="the system does not say when a process began")
HERE = f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize(
    ("manifest", "holder", "state"),
    [
        ({"status": "running", "pid": os.getpid()}, None, "running"),
        ({"status": "running", "pid": os.getpid()}, HERE, "running"),
        ({"status": "planned"}, HERE, "planned"),
        ({"status": "running"}, f"{HERE}, begun at {begun(os.getpid())}", "running"),
        # The process has gone and another has its id.
        pytest.param({"status": "running"}, f"{HERE}, begun at 1", "died", marks=ON_LINUX),
        (None, HERE, "starting"),
        ({"status": "running", "pid": NOBODY}, f"process {NOBODY} on {socket.gethostname()}", "died"),
        ({"status": "running", "pid": NOBODY}, f"process {NOBODY} on elsewhere", "running"),
        ({"status": "planned"}, f"process {NOBODY} on {socket.gethostname()}", "died"),
        ({"status": "planned"}, None, "died"),
        (None, f"process {NOBODY} on {socket.gethostname()}", "died"),
        ({"status": "failed", "error": "TrainingError: no"}, None, "failed"),
        ({"status": "interrupted"}, None, "interrupted"),
        ({"status": "complete"}, None, "complete"),
        ({"status": "running", "pid": "1; reboot"}, None, "died"),
        ({"status": "running", "pid": -1}, None, "died"),
        ({"status": "running", "pid": 0}, None, "died"),
        ({"status": "running", "pid": True}, None, "died"),
        ({"status": "running", "pid": 10**30}, None, "died"),
        ({"status": "running", "pid": NOBODY}, "\x1b]0;owned\x07", "died"),
    ],
    # Two processes that run the tests know other process ids, and have to agree on the names of the cases.
    ids=map(str, range(99)),
)
def test_the_state_is_what_manifest_and_process_say(manifest, holder, state, tmp_path):
    assert run_state(_folder(tmp_path / "run", manifest, holder=holder))[0] == state


@pytest.mark.parametrize("manifest", [[], {}, {"status": "done"}, {"status": ["complete"]}, "complete", None])
def test_a_folder_that_holds_no_run_is_an_error(manifest, tmp_path, capsys):
    assert main(["status", str(_folder(tmp_path / "run", manifest))]) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_the_claim_of_a_run_directory_is_understood(tmp_path):
    with RunDirectory.claim(OutputSpec(output_dir=tmp_path / "run")):
        assert run_state(tmp_path / "run") == ("starting", f"process {os.getpid()}")


def _long(corpus_dir, output):
    """A run in a process of its own that goes on until it is killed."""
    words = ["train", "--data-dir", str(corpus_dir), "--output-dir", str(output), "--seq-len", "512", "--quiet"]
    words += ["--batch-size", "2", "--grad-accum", "1", "--epochs", "100"]
    return subprocess.Popen([sys.executable, "-m", "mens_core", *words])


def test_a_run_is_watched_from_its_beginning_and_found_dead_when_it_was_killed(corpus_dir, tmp_path, capsys):
    output = tmp_path / "run"
    run = _long(corpus_dir, output)
    seen = []
    try:
        for event in follow_run(output, every=0.05):
            seen.append(event)
            if event["event"] == "step" and run.poll() is None:
                assert mens_core.run_status(output)["state"] == "running"
                run.kill()
                run.wait()
    finally:
        run.kill()
        run.wait()
    assert [event["event"] for event in seen[:3]] == ["train_start", "evaluation", "step"]
    assert main(["watch", str(output)]) == 1
    printed = capsys.readouterr().out
    assert f"died, the manifest says running, but process {run.pid} is gone" in printed
    assert "starts anew" in printed
    assert main(["status", str(output)]) == 1


@pytest.mark.parametrize(("status", "code"), [("complete", 0), ("failed", 1), ("interrupted", 130)])
def test_watching_ends_when_the_run_does_with_its_exit_code(status, code, tmp_path, capsys):
    folder = tmp_path / "run"

    def run():
        time.sleep(1)
        _folder(folder, {"status": "running", "pid": os.getpid()})
        with Telemetry(folder / "telemetry.jsonl", ()) as telemetry:
            time.sleep(0.3)
            telemetry.emit("evaluation", {"step": 0, "eval_loss": 1.25, "eval_perplexity": 3.49})
        _folder(folder, {"status": status}, telemetry=(folder / "telemetry.jsonl").read_text())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert main(["watch", str(folder)]) == code
    finally:
        thread.join()
    printed = capsys.readouterr().out
    assert "waiting for a run there" in printed
    assert "held-out loss 1.2500" in printed


def test_ctrl_c_ends_watching_and_says_that_the_run_goes_on(tmp_path):
    # A child inherits that an interrupt is ignored, as in a job of a shell's background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = _folder(tmp_path / "run", {"status": "running", "pid": os.getpid()})
    watch = subprocess.Popen(
        [sys.executable, "-m", "mens_core", "watch", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(2)
    watch.send_signal(signal.SIGINT)
    _, errors = watch.communicate(timeout=30)
    assert watch.returncode == 130
    assert "goes on without" in errors
    assert "Traceback" not in errors


def test_a_checkpoint_is_told_and_advised(tmp_path):
    saved = {"step": 2, "epoch": 0, "path": "checkpoints/step-00000002", "seconds": 0.1, "bytes": 1 << 20}
    event = {"ts_ms": 1, "event": "checkpoint_saved", "payload": saved}
    folder = _folder(tmp_path / "run", {"status": "running", "pid": NOBODY}, telemetry=json.dumps(event) + "\n{")
    status = mens_core.run_status(folder)
    assert status["checkpoint"] == saved
    assert "--resume auto" in status["advice"]
    assert "half a line" in status["notes"][0]


def test_a_disk_that_is_full_fails_the_run_with_one_error(model_dirs, corpus_dir, tmp_path, monkeypatch):
    def refuse(_self, _line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Telemetry, "_write", refuse)
    with pytest.raises(TrainingError, match="No space left"):
        Planner().run(
            model=str(model_dirs["llama"]),
            data_dir=corpus_dir,
            output_dir=tmp_path / "run",
            backend="torch",
            **SETTINGS,
        )
    assert mens_core.run_status(tmp_path / "run")["state"] == "failed"


def _step(step, loss, *, peak=1 << 30):
    return {
        "event": "step",
        "payload": {
            "step": step,
            "total_steps": 40,
            "loss": loss,
            "lr": 1e-4,
            "tokens_per_sec": 1000.0,
            "eta_seconds": 90.0,
            "peak_memory_bytes": peak,
        },
    }


START = {
    "event": "train_start",
    "payload": {
        "execution_kernel": "torch_lora",
        "compute_device": "cpu",
        "dtype": "float32",
        "base_model": "base\x1b[31m",
        "rows": 9,
        "tokens": 900,
        "supervised_tokens": 600,
        "planned_steps_total": 40,
        "estimate": {"train_seconds": 100.0, "peak_memory_bytes": 3 << 29},
        "warnings": [],
    },
}


def test_plain_lines_say_where_the_loss_is_heading_how_long_and_how_much_memory(capsys):
    view = TrainingView()
    with view:
        view.observe(START)
        for step in range(1, 41):
            view.observe(_step(step, 2.0 - step / 100))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/40", "40/40"]
    assert "loss 1.6000 ↘" in lines[-1]
    assert "1.00GiB of 1.50GiB" in lines[-1]
    assert "90 s left" in lines[-1]


def test_a_terminal_gets_a_bar_in_eighty_columns(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    view = TrainingView()
    with view:
        view.observe(START)
        for step in range(1, 41):
            view.observe(_step(step, 2.0 + step / 100))
        console = Console(width=80, color_system=None)
        with console.capture() as capture:
            console.print(view._progress.get_renderable())
    (line,) = capture.get().splitlines()
    for shown in ("40/40", "loss 2.4000 ↗", "1,000 tokens/s", "1.00GiB of 1.50GiB", "90 s left"):
        assert shown in line
