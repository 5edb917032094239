"""Signals, and what a machine does to a run: an end in order, a clear error, and a checkpoint that still holds."""

import errno
import json
import os
import resource
import shlex
import shutil
import signal
import stat
import sys
import time

import pytest

from mens_core import Planner
from mens_core.artifacts.checkpoints import check_checkpoint, checkpoint_folders
from mens_core.artifacts.rundir import RunDirectory
from mens_core.backend import Backend
from mens_core.cli import main
from mens_core.cli.signals import Signals
from mens_core.contract import OutputSpec
from mens_core.errors import RunDirectoryError, TrainingError
from mens_core.training.faults import explained

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def asked(model_dirs, tmp_path_factory):
    """A run of ten steps, with a checkpoint after every second one."""
    data = tmp_path_factory.mktemp("small")
    rows = [{"prompt": f"p {i}", "response": f"x = {str(i) * (3 + i % 5)}"} for i in range(20)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sizes = {"epochs": 2, "batch_size": 2, "grad_accum": 2, "seq_len": 128, "rank": 64, "checkpoint_every": 2}
    return {"model": str(model_dirs["llama"]), "data_dir": data, "backend": "torch", **sizes}


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory):
    """The adapter of a run that nothing happened to."""
    return (
        Planner().run(**asked, output_dir=tmp_path_factory.mktemp("whole") / "run").output_dir / ADAPTER
    ).read_bytes()


@pytest.fixture
def fields(asked, tmp_path):
    """The same run in a folder of its own."""
    return {**asked, "output_dir": tmp_path / "run"}


def _manifest(fields):
    return json.loads((fields["output_dir"] / "training_manifest.json").read_text(encoding="utf-8"))


def _flags(fields):
    return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]


def _at_step(monkeypatch, number, act):
    """Do something in the middle of a process's n-th step."""
    real, steps = Backend.step, [0]

    def step(self, *given):
        steps[0] += 1
        if steps[0] == number:
            act()
        return real(self, *given)

    monkeypatch.setattr(Backend, "step", step)


def _goes_on(fields, undisturbed):
    """Every checkpoint is whole, nothing lies about, and the run ends with the same bytes."""
    for path in checkpoint_folders(fields["output_dir"] / "checkpoints").values():
        check_checkpoint(path)
    result = Planner().run(**fields, resume="auto")
    assert (result.output_dir / ADAPTER).read_bytes() == undisturbed
    assert not [path for path in result.output_dir.rglob("*") if path.name.startswith(".")]
    return result


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_the_line_that_is_printed_goes_on(
    fields, undisturbed, number, code, monkeypatch, capsys
):
    former = [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)]
    _at_step(monkeypatch, 3, lambda: signal.raise_signal(number))
    assert main(["train", *_flags(fields), "--resume=never"]) == code
    manifest = _manifest(fields)
    assert (manifest["status"], manifest["reason"], manifest["step"]) == ("interrupted", number.name, 3)
    assert max(checkpoint_folders(fields["output_dir"] / "checkpoints")) == 3
    said = capsys.readouterr().err
    assert f"stopped by {number.name} after step 3; go on with:" in said
    words = shlex.split(said.splitlines()[-1])
    assert words[:4] == ["python", "-m", "mens_core", "train"]
    assert main(words[3:]) == 0
    assert (fields["output_dir"] / ADAPTER).read_bytes() == undisturbed
    assert _manifest(fields)["interruptions"][0]["reason"] == number.name
    assert [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)] == former


def test_a_second_signal_ends_the_run_at_once(fields, undisturbed, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    _at_step(monkeypatch, 5, twice)
    assert main(["train", *_flags(fields)]) == 143
    assert (_manifest(fields)["status"], _manifest(fields)["reason"]) == ("interrupted", "SIGTERM")
    monkeypatch.undo()
    assert _goes_on(fields, undisturbed).resumed_from.name == "step-00000004"


def test_a_signal_before_the_first_step_ends_the_run_at_once():
    with Signals(), pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.stop() is None
        signal.raise_signal(signal.SIGINT)
        assert signals.stop() == "SIGINT"


def test_a_run_out_of_time_has_a_code_of_its_own(fields, undisturbed, capsys):
    assert main(["train", *_flags(fields), "--max-time=0.001s"]) == 124
    assert "stopped by max_time after step 1" in capsys.readouterr().err
    _goes_on(fields, undisturbed)


@pytest.fixture
def file_sizes():
    """Set the largest file that this process may write, as a full disk or a quota would."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_full_disk_fails_the_run_and_leaves_the_last_checkpoint(fields, undisturbed, file_sizes):
    def fill(event):
        if event["event"] == "checkpoint_saved" and event["payload"]["step"] == 4:
            optimizer = fields["output_dir"] / "checkpoints" / "step-00000004" / "optimizer.safetensors"
            file_sizes(optimizer.stat().st_size - 1)

    try:
        with pytest.raises(TrainingError, match="File too large") as caught:
            Planner().run(**fields, observers=[fill])
    finally:
        file_sizes(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert "--resume auto" in str(caught.value)
    assert _manifest(fields)["status"] == "failed"
    assert "File too large" in _manifest(fields)["error"]
    result = _goes_on(fields, undisturbed)
    assert result.resumed_from.name == "step-00000004"
    assert "File too large" in result.interruptions[0]


def test_where_not_even_the_manifest_can_be_written_the_error_says_so(fields, undisturbed, file_sizes):
    try:
        with pytest.raises(TrainingError, match="telemetry cannot be written") as caught:
            Planner().run(
                **fields, observers=[lambda event: file_sizes(100) if event["event"] == "checkpoint_saved" else None]
            )
    finally:
        file_sizes(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    # A note before it where steps had been made since the checkpoint: these could not be saved either.
    assert "still says running" in caught.value.__notes__[-1]
    assert (_manifest(fields)["status"], _manifest(fields)["pid"]) == ("running", os.getpid())
    assert _goes_on(fields, undisturbed).interruptions == ("killed",)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no users to be")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    (tmp_path / "closed").mkdir(mode=0o555)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)  # nobody: modes mean nothing to root
            with RunDirectory.claim(OutputSpec(output_dir=tmp_path / "closed" / "run")):
                os.write(write, b"claimed")
        except RunDirectoryError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert b"the output folder cannot be made" in os.read(read, 4096)
    os.close(read)


def test_checkpoints_that_are_removed_under_the_run_are_saved_again(fields, undisturbed):
    def remove(event):
        # Then none is being written; under one that is, it is an error like any other.
        if event["event"] == "checkpoint_saved" and event["payload"]["step"] == 4:
            shutil.rmtree(fields["output_dir"] / "checkpoints")

    result = Planner().run(**fields, observers=[remove])
    assert (result.output_dir / ADAPTER).read_bytes() == undisturbed
    assert max(checkpoint_folders(result.output_dir / "checkpoints")) == 10


def test_a_run_whose_folder_is_removed_ends_with_an_error_and_does_not_make_another(fields):
    def remove(event):
        if event["event"] == "step" and event["payload"]["step"] == 5:
            # In one move; taken apart it would be a race against the checkpoint that is being written.
            fields["output_dir"].rename(fields["output_dir"].with_name("elsewhere"))

    with pytest.raises(TrainingError, match="has gone while it went on"):
        Planner().run(**fields, observers=[remove])
    assert not fields["output_dir"].exists()


def test_something_in_the_place_of_the_checkpoints_is_an_error(fields, undisturbed):
    def put(event):
        if event["event"] == "train_start":
            (fields["output_dir"] / "checkpoints").write_text("mine")

    with pytest.raises(TrainingError, match="File exists"):
        Planner().run(**fields, observers=[put])
    assert _manifest(fields)["status"] == "failed"
    (fields["output_dir"] / "checkpoints").unlink()
    _goes_on(fields, undisturbed)


def test_a_clock_that_jumps_changes_no_duration_and_no_order(fields, undisturbed, monkeypatch):
    real, calls = time.time_ns, [0]

    def jumping():
        calls[0] += 1
        return real() - calls[0] * 86_400_000_000_000

    monkeypatch.setattr(time, "time_ns", jumping)
    monkeypatch.setattr(time, "time", lambda: jumping() / 1e9)
    result = Planner().run(**fields, max_time="10m")
    lines = (result.output_dir / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert events[0]["ts_ms"] > events[-1]["ts_ms"]
    steps = [event["payload"] for event in events if event["event"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, 11))
    assert all(0 < step["step_seconds"] < 600 for step in steps)
    assert 0 < result.manifest["results"]["wall_seconds"] < 600
    assert (result.output_dir / ADAPTER).read_bytes() == undisturbed


def _torch_error():
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def _jax_error():
    import jax

    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


def _cpu_error():
    return RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [_torch_error, _jax_error, _cpu_error, MemoryError])
def test_every_frameworks_lack_of_memory_is_told_with_what_to_change(error):
    told = explained(error())
    assert isinstance(told, TrainingError)
    assert "--batch-size" in str(told)


def test_other_errors_stay_what_they_are():
    assert explained(RuntimeError("shapes do not fit")) is None
    assert explained(TrainingError("x")) is None
    assert "has gone" in str(explained(OSError(errno.ENOENT, "gone", "x")))


def test_a_run_out_of_memory_is_failed_and_goes_on_with_half_the_batch(fields, monkeypatch):
    def fail():
        raise _torch_error()

    _at_step(monkeypatch, 4, fail)
    with pytest.raises(TrainingError, match="not enough memory: CUDA out of memory") as caught:
        Planner().run(**fields)
    assert caught.value.__cause__.__class__.__name__ == "OutOfMemoryError"
    assert _manifest(fields)["status"] == "failed"
    monkeypatch.undo()
    smaller = {**fields, "batch_size": 1, "grad_accum": 4}
    result = Planner().run(**smaller, resume="auto", resume_anyway=True)
    assert result.resumed_from.name == "step-00000002"
    assert result.manifest["results"]["optimizer_steps"] == 10
