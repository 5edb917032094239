"""Bytes of one file appended to another: the same bytes whatever the system can do, and holes stay holes."""

import os

import numpy as np
import pytest

from mens_core.artifacts.files import copy_bytes

PAGE = 1 << 16
# Data, a hole, data that ends in the middle of a page, a hole, data, a hole to the end.
PARTS = [(0, PAGE), (3 * PAGE, PAGE // 2 + 3), (7 * PAGE, 2 * PAGE)]
SIZE = 40 * PAGE
RANGES = [(0, SIZE), (5, SIZE - 7), (PAGE - 9, 3 * PAGE + 11), (PAGE + 1, 2 * PAGE), (8 * PAGE, 30 * PAGE), (17, 17)]


@pytest.fixture
def sparse(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for start, length in PARTS:
            file.seek(start)
            file.write(np.random.default_rng(start).integers(1, 256, length, np.uint8).tobytes())
        file.truncate(SIZE)
    return path


@pytest.mark.parametrize("missing", [[], ["SEEK_DATA"], ["copy_file_range"], ["SEEK_DATA", "copy_file_range"]])
def test_the_bytes_are_the_same_whatever_the_system_can_do(sparse, tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name, raising=False)
    expected = b"head"
    with (tmp_path / "copy").open("wb") as target:
        target.write(expected)
        for start, stop in RANGES:
            copy_bytes(sparse, start, stop, target)
            target.write(b"between")
            expected += sparse.read_bytes()[start:stop] + b"between"
    assert (tmp_path / "copy").read_bytes() == expected


def blocks_of_copy(sparse, path):
    with path.open("wb") as target:
        target.write(b"head")
        copy_bytes(sparse, 0, SIZE, target)
        os.fsync(target.fileno())
    return path.stat().st_blocks


def test_holes_of_the_source_take_no_room_in_the_copy(sparse, tmp_path, monkeypatch):
    """The twin that does not look for holes writes them all."""
    if not hasattr(os, "SEEK_DATA") or sparse.stat().st_blocks * 512 > SIZE // 2:
        pytest.skip("this file system keeps no holes")
    with_holes = blocks_of_copy(sparse, tmp_path / "with")
    monkeypatch.delattr(os, "SEEK_DATA")
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    without = blocks_of_copy(sparse, tmp_path / "without")
    assert with_holes * 512 < SIZE // 4
    assert without * 512 >= SIZE


def test_a_source_that_ends_too_early_is_an_error(sparse, tmp_path):
    with (tmp_path / "copy").open("wb") as target, pytest.raises(OSError, match="ended while it was copied"):
        copy_bytes(sparse, 0, SIZE + 1, target)
