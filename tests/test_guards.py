"""Runs that only look healthy fail, by name; windows that are not finite stop a run or are skipped."""

import json
import math
import shutil

import attrs
import numpy as np
import pytest

from mens_core import Planner
from mens_core.artifacts.checkpoints import read_checkpoint, write_checkpoint
from mens_core.backend import Backend
from mens_core.errors import ResumeError, RunInterrupted, TrainingError
from mens_core.exchange import StepMetrics
from mens_core.training import between
from mens_core.training.telemetry_log import read_telemetry
from mens_core.training.telemetry_schema import find_problem

ADAPTER = "adapter_model.safetensors"
CODES = [
    "zero_rate",
    "every_window_supervised",
    "end_of_turn_supervised",
    "ids_in_vocabulary",
    "trainable_set",
    "first_loss",
    "adapter_identity",
    "finite_steps",
    "zero_gradient",
    "loss_spike",
    "eval_loss_not_worse",
    "adapter_changed",
    "base_unchanged",
    "differs_from_base",
    "reload_gives_the_same",
]
SETTINGS = {
    "epochs": 2,
    "batch_size": 2,
    "grad_accum": 2,
    "seq_len": 256,
    "rank": 4,
    "learning_rate": 5e-3,
    "dropout": 0.1,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twenty rows, of which two epochs make ten windows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 20), ("eval", 2)):
        lines = [json.dumps({"prompt": f"p {i}", "response": f"x = {str(i) * (3 + i % 5)}"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def asked(backend, model_dirs, rows, tmp_path):
    model = str(model_dirs["llama"])
    return {"model": model, "data_dir": rows, "backend": backend.name, "output_dir": tmp_path / "run", **SETTINGS}


@pytest.fixture
def short(asked, rows, tmp_path):
    """Two steps without held-out rows, so that only the guards measure a loss."""
    folder = tmp_path / "rows"
    folder.mkdir()
    shutil.copy(rows / "train.jsonl", folder)
    return {**asked, "data_dir": folder, "max_steps": 2, "dropout": 0.0}


def _manifest(fields):
    return json.loads((fields["output_dir"] / "training_manifest.json").read_text(encoding="utf-8"))


def _verdicts(fields):
    return {entry["code"]: entry for entry in _manifest(fields)["guards"]}


def _events(fields):
    lines = (fields["output_dir"] / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _fails(fields, code, **changes):
    """Run, and see that it is failed by one guard, which the manifest and the telemetry name."""
    with pytest.raises(TrainingError, match=f"^{code}: "):
        Planner().run(**fields, **changes)
    manifest = _manifest(fields)
    assert manifest["status"] == "failed"
    assert code in manifest["error"]
    assert [entry["code"] for entry in manifest["guards"] if not entry["passed"]] == [code]
    assert [event["payload"]["code"] for event in _events(fields) if event["event"] == "guard"] == [code]
    assert all(find_problem(event) is None for event in _events(fields))


def test_a_sound_run_has_every_verdict_and_all_of_them_passed(asked):
    result = Planner().run(**asked)
    assert [entry["code"] for entry in result.manifest["guards"]] == CODES
    assert all(entry["passed"] for entry in result.manifest["guards"])
    assert result.manifest == _manifest(asked)
    assert "guard" not in {event["event"] for event in _events(asked)}
    assert "the base is random" in _verdicts(asked)["first_loss"]["message"]


def test_an_adapter_that_is_trained_further_passes_the_guards_too(asked, tmp_path):
    first = Planner().run(**asked)
    fields = {**asked, "output_dir": tmp_path / "further"}
    result = Planner().run(**fields, start_from=first.output_dir)
    assert [entry["code"] for entry in result.manifest["guards"] if entry["passed"]] == CODES
    found = _verdicts(fields)
    assert "trained further" in found["adapter_identity"]["message"]
    # What is called the base is it, and not the adapter that the run begins with.
    assert found["first_loss"]["numbers"] == _verdicts(asked)["first_loss"]["numbers"]


@pytest.mark.parametrize(
    ("call", "change", "code"),
    [
        # Two batches of the first window; then the end, the base again, and the adapter from the disk.
        (0, lambda _: math.nan, "first_loss"),
        (3, lambda losses: losses[-1] + 1e-3, "base_unchanged"),
        (2, lambda losses: losses[0], "differs_from_base"),
        (4, lambda losses: losses[-1] + 1e-3, "reload_gives_the_same"),
    ],
)
def test_a_loss_that_is_another_fails_the_run(short, monkeypatch, call, change, code):
    answered, found = Backend._call, []

    def changed(self, hook, kind, **arguments):
        answer = answered(self, hook, kind, **arguments)
        if hook != "mens_loss":
            return answer
        found.append(float(answer[0]))
        return (change(found), answer[1]) if len(found) == call + 1 else answer

    monkeypatch.setattr(Backend, "_call", changed)
    _fails(short, code)
    monkeypatch.undo()
    assert len(found) == call + 1 if code != "differs_from_base" else call + 2


def test_a_session_that_holds_another_adapter_fails_the_run(short, monkeypatch):
    restored = Backend.restore

    def moved(self, session, state):
        adapter = {name: tensor + np.float32(name.endswith("lora_B.weight")) for name, tensor in state.adapter.items()}
        return restored(self, session, attrs.evolve(state, adapter=adapter))

    monkeypatch.setattr(Backend, "restore", moved)
    _fails(short, "adapter_identity")


def test_a_session_that_trains_something_else_fails_the_run(short, monkeypatch):
    stated = Backend.state

    def fewer(self, session):
        state = stated(self, session)
        return attrs.evolve(state, adapter=dict(list(state.adapter.items())[2:]))

    monkeypatch.setattr(Backend, "state", fewer)
    _fails(short, "trainable_set")


def test_a_rate_of_zero_in_every_step_fails_the_run_before_the_base_is_loaded(short, monkeypatch):
    monkeypatch.setattr(Backend, "open", None)
    _fails({**short, "max_steps": 1, "warmup_steps": 1}, "zero_rate")


def test_rows_without_an_end_fail_the_run_before_the_base_is_loaded(short, monkeypatch):
    monkeypatch.setattr(Backend, "open", None)
    lines = [json.dumps({"prompt": "p", "response": "x = 1\n" * 400})] * 8
    (short["data_dir"] / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _fails({**short, "on_overlong": "truncate"}, "end_of_turn_supervised")


def test_steps_without_a_gradient_fail_the_run(short, monkeypatch):
    stepped = Backend.step

    def zero(self, session, window, rate):
        return attrs.evolve(stepped(self, session, window, rate), grad_norm=0.0)

    monkeypatch.setattr(Backend, "step", zero)
    _fails(short, "zero_gradient")


def _skipping(monkeypatch, *windows):
    """A backend that finds nothing finite in some windows of a run, and so does nothing there, as the hook says."""
    stepped, calls = Backend.step, [0]

    def step(self, session, window, rate):
        calls[0] += 1
        if calls[0] not in windows:
            return stepped(self, session, window, rate)
        supervised = sum(batch.supervised_tokens for batch in window)
        return StepMetrics(loss_sum=math.nan, grad_norm=math.nan, supervised_tokens=supervised)

    monkeypatch.setattr(Backend, "step", step)


def _stop_after(step):
    asked = iter([None] * step)
    return lambda: next(asked, "a test")


def test_a_window_that_is_not_finite_is_skipped_and_counted(asked, monkeypatch):
    _skipping(monkeypatch, 3)
    result = Planner().run(**asked, on_non_finite="skip-window")
    results = result.manifest["results"]
    assert (results["windows_skipped"], results["optimizer_steps"], results["adapter_step"]) == (1, 9, 10)
    assert [step for step, loss in enumerate(result.losses, 1) if math.isnan(loss)] == [3]
    assert math.isfinite(results["first_loss"])
    assert math.isfinite(results["last_loss"])
    assert _verdicts(asked)["finite_steps"]["numbers"] == {"windows": 10, "windows_skipped": 1, "in_a_row": 0}
    told = [event["payload"] for event in _events(asked) if event["event"] == "window_skipped"]
    assert told == [{"epoch": 0, "step": 3, "loss_is_finite": False, "grad_norm_is_finite": False}]
    assert all(find_problem(event) is None for event in _events(asked))
    read_telemetry(asked["output_dir"])
    newest = read_checkpoint(asked["output_dir"] / "checkpoints" / "step-00000010")
    assert (newest.step, newest.state.step) == (10, 9)
    # A run that is complete is read again with the same losses.
    again = Planner().run(**asked, on_non_finite="skip-window", resume="auto")
    np.testing.assert_array_equal(again.losses, result.losses)


def test_a_run_with_skipped_windows_goes_on_to_the_same_bytes(asked, monkeypatch, tmp_path):
    fields = {**asked, "on_non_finite": "skip-window"}
    with monkeypatch.context() as whole:
        _skipping(whole, 3)
        expected = Planner().run(**{**fields, "output_dir": tmp_path / "whole"})
    # Stopped after a window that came behind the skipped one, so that the two counts differ.
    _skipping(monkeypatch, 3)
    with pytest.raises(RunInterrupted) as caught:
        Planner().run(**fields, stop=_stop_after(5))
    assert caught.value.step == 5
    shutil.copytree(fields["output_dir"], tmp_path / "twin")
    result = Planner().run(**fields, resume="auto")
    assert result.resumed_from.name == "step-00000005"
    assert (result.output_dir / ADAPTER).read_bytes() == (expected.output_dir / ADAPTER).read_bytes()
    np.testing.assert_array_equal(result.losses, expected.losses)
    assert result.manifest["results"]["windows_skipped"] == 1
    assert [entry["code"] for entry in result.manifest["guards"]] == CODES

    # With the one count taken for the other it would end otherwise.
    saved = read_checkpoint(tmp_path / "twin" / "checkpoints" / "step-00000005")
    write_checkpoint(saved.path.parent, attrs.evolve(saved.state, step=saved.step), saved.record, saved.curve)
    twin = Planner().run(**{**fields, "output_dir": tmp_path / "twin"}, resume="auto")
    assert (twin.output_dir / ADAPTER).read_bytes() != (expected.output_dir / ADAPTER).read_bytes()


def test_a_run_that_was_stopped_by_a_window_goes_on_by_skipping_it(asked, monkeypatch):
    _skipping(monkeypatch, 3)
    _fails(asked, "finite_steps")
    monkeypatch.undo()
    _skipping(monkeypatch, 1)
    fields = {**asked, "on_non_finite": "skip-window", "resume": "auto"}
    with pytest.raises(ResumeError, match="on_non_finite: stop then, skip-window now"):
        Planner().run(**fields)
    result = Planner().run(**fields, resume_anyway=True)
    assert [step for step, loss in enumerate(result.losses, 1) if math.isnan(loss)] == [3]
    assert all(entry["passed"] for entry in result.manifest["guards"])


def test_more_than_a_tenth_of_the_windows_is_too_much_to_skip(asked, monkeypatch):
    _skipping(monkeypatch, 3, 7)
    _fails(asked, "finite_steps", on_non_finite="skip-window")
    assert _verdicts(asked)["finite_steps"]["numbers"]["windows_skipped"] == 2


def test_a_held_out_loss_that_rose_is_a_warning(asked, monkeypatch):
    measured = iter([2.0, 3.0])
    monkeypatch.setattr(between, "evaluate", lambda *_: next(measured))
    result = Planner().run(**asked, max_steps=2)
    assert result.manifest["status"] == "complete"
    found = _verdicts(asked)["eval_loss_not_worse"]
    assert (found["passed"], found["severity"]) == (False, "warning")
    assert found["numbers"] == {"before": 2.0, "after": 3.0}
    told = [event["payload"] for event in _events(asked) if event["event"] == "guard"]
    assert [(event["code"], event["severity"]) for event in told] == [("eval_loss_not_worse", "warning")]


def test_numbers_that_the_backend_itself_loses_fail_the_run_and_leave_what_was_saved(asked):
    # A rate at which the first update already throws the weights out of float32.
    fields = {**asked, "learning_rate": 1e30, "schedule": "constant", "warmup_steps": 0, "checkpoint_every": 1}
    with pytest.raises(TrainingError, match=r"finite|not a number"):
        Planner().run(**fields)
    manifest = _manifest(fields)
    assert manifest["status"] == "failed"
    assert any(not verdict["passed"] for verdict in manifest["guards"])
    assert not (fields["output_dir"] / ADAPTER).exists()
    for folder in (fields["output_dir"] / "checkpoints").glob("step-*"):
        read_checkpoint(folder)
