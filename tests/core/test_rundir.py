"""The run directory: claimed once, never half-written, never somebody else's."""

import json
import multiprocessing
import signal
from pathlib import Path

import pytest

from mens_core.artifacts.files import write_json, write_text
from mens_core.artifacts.rundir import MANIFEST, RunDirectory
from mens_core.contract import OutputSpec
from mens_core.errors import RunDirectoryError


def _claim(path, *, overwrite=False):
    return RunDirectory.claim(OutputSpec(output_dir=path, overwrite=overwrite))


def _hold(path, held, release):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _claim(path):
        held.set()
        release.wait(30)


def test_two_processes_cannot_share_a_folder(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path / "run", held, release))
    other.start()
    try:
        assert held.wait(30)
        with pytest.raises(RunDirectoryError, match=f"process {other.pid}"), _claim(tmp_path / "run"):
            pass
    finally:
        release.set()
        other.join()


def test_a_finished_run_is_kept_unless_told_to_overwrite_and_other_files_survive(tmp_path):
    with _claim(tmp_path) as folder:
        write_json(folder.manifest, {})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="--overwrite"), _claim(tmp_path):
        pass
    assert (tmp_path / MANIFEST).exists()
    with _claim(tmp_path, overwrite=True):
        assert not (tmp_path / MANIFEST).exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_of_other_files_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"thesis\.tex"), _claim(tmp_path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunDirectoryError, match="cannot be made"), _claim(tmp_path / "run"):
        pass


def test_nothing_of_the_claim_remains(tmp_path):
    with _claim(tmp_path / "a" / "run") as folder:
        assert folder.path.is_dir()
    assert list(folder.path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_is_not_other_peoples(tmp_path):
    # Killed in its first second, before there was a manifest.
    (tmp_path / f".{MANIFEST}.0123abcd.tmp").write_text("{")
    (tmp_path / ".run.holder").write_text("process 1 on elsewhere")
    (tmp_path / ".run.lock").touch()
    with _claim(tmp_path) as folder:
        write_json(folder.manifest, {})
        # Killed in the middle of a save, of a removal and of a rewrite.
        for name in (".step-00000002.ab12", ".step-00000001.0123abcd"):
            (folder.checkpoints / name).mkdir(parents=True)
            (folder.checkpoints / name / "state.json").write_text("{")
        (tmp_path / ".telemetry.jsonl.0123abcd.tmp").write_text("")
        (tmp_path / ".notes.tmp").write_text("mine")
    with RunDirectory.claim(OutputSpec(output_dir=tmp_path), goes_on=True) as folder:
        assert list(folder.checkpoints.iterdir()) == []
    assert {entry.name for entry in tmp_path.iterdir()} == {MANIFEST, ".notes.tmp", "checkpoints"}


def test_a_run_that_is_cleared_stays_a_run_until_the_last_file(tmp_path, monkeypatch):
    with _claim(tmp_path) as folder:
        write_json(folder.manifest, {})
        (folder.checkpoints / "step-00000001").mkdir(parents=True)
        (folder.checkpoints / "notes").write_text("mine")
        folder.telemetry.write_text("")
    removed = []
    real = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **given: removed.append(path.name) if path.exists() else real(path, **given)
    )
    folder.clear()
    assert removed[-1] == MANIFEST
    assert [entry.name for entry in folder.checkpoints.iterdir()] == ["notes"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "manifest.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new\ud800")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"b": 1, "a": "é"}
