"""A merge that cannot go on says why and leaves nothing half-written; one that is killed leaves one hidden folder."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from peft_adapters import peft_adapter

import mens_core
from mens_core.artifacts.tensors import open_tensors
from mens_core.cli import main
from mens_core.errors import ModelError

CHILD = Path(__file__).with_name("merge_child.py")
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the child reads Linux's /proc")


@pytest.fixture
def folder(tmp_path):
    tiny.write_model(tmp_path / "base", "llama", tiny.CONFIGS["llama"])
    peft_adapter(tmp_path / "base", tmp_path / "adapter")
    return tmp_path


def merge(folder, output, **options):
    return mens_core.merge([(folder / "adapter", 1.0)], base=folder / "base", output=output, backend="torch", **options)


def child(folder, mode):
    return subprocess.run(
        [sys.executable, str(CHILD), str(folder), mode], capture_output=True, text=True, check=False, timeout=300
    )


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@on_linux
def test_no_room_left_is_an_error_that_says_so_and_leaves_nothing(folder):
    done = child(folder, "small")
    assert done.returncode == 0, done.stderr
    assert "the merged model cannot be written: File too large" in done.stdout
    assert "room for a model as large as its base" in done.stdout
    assert entries(folder) == ["adapter", "base"]


@on_linux
def test_a_merge_that_is_killed_leaves_one_hidden_folder_and_can_be_done_again(folder):
    assert child(folder, "killed").returncode == -signal.SIGKILL
    left = [name for name in entries(folder) if name not in {"adapter", "base"}]
    assert len(left) == 1
    assert left[0].startswith(".killed.")
    merge(folder, folder / "killed")
    merge(folder, folder / "other")
    once, again = open_tensors(folder / "killed"), open_tensors(folder / "other")
    assert all(np.array_equal(once[name], again[name]) for name in again)
    assert left[0] in entries(folder)


@pytest.mark.parametrize("options", [{}, {"quantize": "nf4"}, {"subset": True}])
def test_an_output_that_cannot_be_made_is_an_error(folder, options):
    (folder / "file").write_text("no folder")
    with pytest.raises(ModelError, match="cannot be written") as refused:
        merge(folder, folder / "file" / "deep" / "out", **options)
    assert str(folder / "file") in str(refused.value)
    assert "choose another --output" in str(refused.value)
    assert entries(folder) == ["adapter", "base", "file"]


def test_the_command_line_ends_with_two_where_the_output_cannot_be_made(folder, capsys):
    (folder / "file").write_text("no folder")
    words = ["--adapter", folder / "adapter", "--base", folder / "base", "--output", folder / "file" / "out"]
    assert main(["merge-adapter", *map(str, words), "--backend", "torch"]) == 2
    assert "error: the merged model cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"quantize": "nf4"}])
def test_a_base_that_may_not_be_written_is_merged_and_stays_as_it_was(folder, options):
    """Root may write whatever the mode says; that nothing was written is seen from hashes and times, too."""
    base = folder / "base"
    for path in base.iterdir():
        path.chmod(0o444)
    base.chmod(0o555)
    before = {path: state(path) for path in base.iterdir()}
    try:
        merge(folder, folder / "out", **options)
        assert {path: state(path) for path in base.iterdir()} == before
    finally:
        base.chmod(0o755)
    assert all(path.stat().st_mode & 0o200 for path in (folder / "out").iterdir())


def state(path):
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_ino
