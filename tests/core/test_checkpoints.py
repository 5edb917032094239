"""The format of a checkpoint, and how far a run has come."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.artifacts.checkpoints import (
    COMPLETE,
    check_checkpoint,
    checkpoint_folders,
    keep_only,
    read_checkpoint,
    write_checkpoint,
)
from mens_core.artifacts.files import sha256_file
from mens_core.errors import ResumeError
from mens_core.exchange import TrainingState
from mens_core.training.progress import Progress

LOSSES = st.floats(0, 20, allow_nan=False)


def _state(step, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    adapter = {f"m.lora_{letter}.weight": draw((2, 2)).astype(np.float32) for letter in "AB"}
    moments = {f"{name}.{moment}": tensor for name, tensor in adapter.items() for moment in ("exp_avg", "exp_avg_sq")}
    return TrainingState(adapter=adapter, optimizer=moments, step=step)


def _write(home, step, seed=0, losses=None):
    curve = {"losses": np.arange(step) / 3 if losses is None else losses, "step_seconds": np.ones(step)}
    return write_checkpoint(home, _state(step, seed), {"epoch": 0}, curve)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    size = _write(tmp_path, 3)
    read = read_checkpoint(tmp_path / "step-00000003")
    state = _state(3)
    assert size == sum(path.stat().st_size for path in read.path.iterdir() if path.name != COMPLETE)
    assert read.state.step == 3
    for given_, found in ((state.adapter, read.state.adapter), (state.optimizer, read.state.optimizer)):
        assert {name: array.tobytes() for name, array in given_.items()} == {
            name: array.tobytes() for name, array in found.items()
        }
    assert read.curve["losses"].tolist() == [0 / 3, 1 / 3, 2 / 3]
    assert read.record["epoch"] == 0


def test_a_checkpoint_takes_the_place_of_an_older_one(tmp_path):
    _write(tmp_path, 3, seed=1)
    (tmp_path / "step-00000003" / "state.json").write_text("damaged")
    _write(tmp_path, 3, seed=2)
    assert (
        read_checkpoint(tmp_path / "step-00000003").state.adapter["m.lora_A.weight"][0, 0]
        == (_state(3, 2).adapter["m.lora_A.weight"][0, 0])
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_only_checkpoints_are_removed(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        _write(tmp_path, step) if step < 9 else (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-mine").mkdir()
    (tmp_path / "notes").write_text("mine")
    assert list(checkpoint_folders(tmp_path)) == [100_000_000, 3, 2, 1]
    keep_only(tmp_path, [2])
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-mine", "notes"}
    assert checkpoint_folders(tmp_path / "nowhere") == {}


def _rewrite(folder, name, change):
    """Change a file and let COMPLETE agree, as somebody would who writes checkpoints of his own."""
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    complete = json.loads((folder / COMPLETE).read_text())
    complete["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    (folder / COMPLETE).write_text(json.dumps(complete))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state | {"schema_version": 1}, "schema 1"),
        (lambda state: state | {"step": 4}, "one loss a step"),
        (lambda state: state | {"step": None}, "state.json cannot be read"),
        (list, "state.json cannot be read"),
    ],
)
def test_a_state_of_another_form_is_refused(tmp_path, change, words):
    _write(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    _rewrite(folder, "state.json", change)
    assert check_checkpoint(folder)
    with pytest.raises(ResumeError, match=words):
        read_checkpoint(folder)


def test_without_the_runs_folder_there_is_no_place_for_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError):
        _write(tmp_path / "gone" / "checkpoints", 3)
    assert not list(tmp_path.iterdir())


@given(st.lists(LOSSES, max_size=12), st.sampled_from([0.0, 0.5]))
def test_the_best_is_the_first_of_the_lowest_and_counts_what_came_after(losses, min_delta):
    progress = Progress(evaluations={0: -1.0} | {3 * place: loss for place, loss in enumerate(losses, start=1)})
    best = progress.best(min_delta)
    if not losses:
        assert best is None
        return
    assert best.since == len(losses) - best.step // 3
    assert best.loss == losses[best.step // 3 - 1] <= min(losses) + min_delta
    if min_delta == 0.0:
        assert best.step // 3 - 1 == losses.index(min(losses))
    later = losses[best.step // 3 :]
    assert all(loss >= best.loss - min_delta for loss in later)
