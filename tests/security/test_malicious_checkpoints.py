"""Checkpoints that somebody else wrote: sizes and hashes agree, and what they hold lies."""

import json
import os
import struct

import numpy as np
import pytest
from hostile import CANARY, pickle_bomb

from mens_core.artifacts.checkpoints import COMPLETE, read_checkpoint, write_checkpoint
from mens_core.artifacts.files import sha256_file
from mens_core.artifacts.tensors import write_tensors
from mens_core.errors import ResumeError
from mens_core.exchange import TrainingState

FILES = ("adapter.safetensors", "optimizer.safetensors", "curve.safetensors", "state.json")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of three steps that is what it says."""
    draw = np.random.default_rng(0).standard_normal
    adapter = {f"m.lora_{letter}.weight": draw((2, 2)).astype(np.float32) for letter in "AB"}
    curve = {"losses": np.arange(3.0), "step_seconds": np.ones(3)}
    write_checkpoint(tmp_path, TrainingState(adapter=adapter, optimizer={}, step=3), {"epoch": 0}, curve)
    return tmp_path / "step-00000003"


def _sign(folder):
    """Let COMPLETE agree with what is there now."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in FILES}
    (folder / COMPLETE).write_text(json.dumps({"schema_version": 2, "files": files}))


def _tensors(folder, name, **tensors):
    write_tensors(folder / name, tensors, {})


def _header(folder, header, body=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "adapter.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def _state(folder, **changes):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | changes))


def _f32(shape, start, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


HOSTILE = {
    "a header longer than its file": lambda f: (f / FILES[0]).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
    "a header of nested lists": lambda f: _header(f, b"[" * 200_000),
    "tensors that overlap": lambda f: _header(f, {"a": _f32([2], 0, 8), "b": _f32([2], 4, 12)}, bytes(12)),
    "a tensor behind the end": lambda f: _header(f, {"a": _f32([1 << 40], 0, 1 << 42)}, bytes(16)),
    "a negative shape": lambda f: _header(f, {"a": _f32([-1, -4], 0, 16)}, bytes(16)),
    "a type that is another": lambda f: _header(f, {"a": _f32([8], 0, 16)}, bytes(16)),
    "a pickle for an adapter": lambda f: (f / FILES[0]).write_bytes(pickle_bomb()),
    "an adapter that is not finite": lambda f: _tensors(f, FILES[0], a=np.full((2, 2), np.nan, np.float32)),
    "an adapter of integers": lambda f: _tensors(f, FILES[0], a=np.ones((2, 2), np.int64)),
    "moments that are not finite": lambda f: _tensors(f, FILES[1], a=np.full((2, 2), np.inf, np.float32)),
    "moments of bytes": lambda f: _tensors(f, FILES[1], a=np.ones(4, np.uint8)),
    "losses of another rank": lambda f: _tensors(f, FILES[2], losses=np.ones((3, 2)), step_seconds=np.ones(3)),
    "seconds below nothing": lambda f: _tensors(f, FILES[2], losses=np.ones(3), step_seconds=-np.ones(3)),
    "no losses": lambda f: _tensors(f, FILES[2], step_seconds=np.ones(3)),
    "a state that nests without end": lambda f: (f / FILES[3]).write_text("[" * 100_000),
    "a state that is a number": lambda f: (f / FILES[3]).write_text("7"),
    "a state with a key twice": lambda f: (f / FILES[3]).write_text('{"step": 3, "step": 4}'),
    "a step below nothing": lambda f: _state(f, optimizer_step=-1),
    "a step past the windows": lambda f: _state(f, optimizer_step=4),
    "a step in words": lambda f: _state(f, optimizer_step="3; reboot"),
    "a step without end": lambda f: _state(f, optimizer_step=10**30),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_checkpoint_is_refused(case, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HOSTILE[case](checkpoint)
    _sign(checkpoint)
    with pytest.raises(ResumeError) as caught:
        read_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("name", [*FILES, COMPLETE])
@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing"])
def test_what_is_no_file_is_refused_and_not_waited_for(name, kind, checkpoint):
    (checkpoint / name).unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "nothing": lambda _: None}[kind](checkpoint / name)
    with pytest.raises(ResumeError):
        read_checkpoint(checkpoint)


def test_a_friendly_checkpoint_is_read(checkpoint):
    _sign(checkpoint)
    assert read_checkpoint(checkpoint).step == 3
