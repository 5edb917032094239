"""Token rows are made once, found again by content, and never half there."""

import hashlib
import json
import os

import numpy as np
import pytest

from mens_core.chat.open_chat import ChatML
from mens_core.corpus.rows import iter_rows
from mens_core.errors import DataError
from mens_core.text import cache
from mens_core.text.cache import cached_table
from mens_core.text.encode import Encoder
from mens_core.text.lab import lab_tokenizer
from mens_core.text.table import Supervision, table_in_memory

LAB = lab_tokenizer()
ENCODER = Encoder(LAB, ChatML(LAB))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache.tokens_folder()


@pytest.fixture
def rows(tmp_path):
    """A file of rows, one of which cannot be used."""
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": f"p{k}", "response": f"answer {k}", "rating": 4, "source": "s"}) for k in range(9)]
    path.write_text("\n".join([*lines, '{"prompt": "no answer"}']) + "\n")
    return path


def table(path, reads=None, supervision=Supervision()):  # noqa: B008 (frozen)
    def read(faults):
        if reads is not None:
            reads.append(path)
        yield from iter_rows(path, faults)

    return cached_table(path, hashlib.sha256(path.read_bytes()).hexdigest(), ENCODER, supervision, read)


def same(one, other):
    """Whether two tables hold the same."""
    return (
        all(
            np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.supervised, b.supervised)
            for a, b in zip(one.rows, other.rows, strict=True)
        )
        and np.array_equal(one.rows.trained, other.rows.trained)
        and np.array_equal(one.columns.lines, other.columns.lines)
        and np.array_equal(one.columns.ratings, other.columns.ratings)
        and list(one.columns.sources) == list(other.columns.sources)
        and one.faults.as_dict() == other.faults.as_dict()
    )


def test_a_file_is_tokenised_once_and_found_as_it_was(folder, rows):
    reads = []
    first, again = table(rows, reads), table(rows, reads)
    assert reads == [rows]
    assert same(first, again)
    assert (len(again.rows), again.faults.count, again.faults.lines) == (9, 1, 10)
    assert isinstance(again.rows.input_ids.base, np.memmap)
    assert [entry.is_dir() for entry in folder.iterdir()] == [True]


@pytest.mark.usefixtures("folder")
def test_what_is_kept_is_what_memory_holds(rows):
    kept = table(rows)
    faults = kept.faults
    in_memory = table_in_memory(iter_rows(rows, type(faults)(rows)), ENCODER, Supervision(), faults)
    assert np.array_equal(kept.rows.input_ids, in_memory.rows.input_ids)
    assert np.array_equal(kept.rows.supervised, in_memory.rows.supervised)


def test_other_content_and_other_supervision_are_other_rows(folder, rows):
    table(rows)
    table(rows, supervision=Supervision(suffix=2))
    rows.write_text(rows.read_text().replace("answer 3", "answer x"))
    table(rows)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("file", ["tokens.i4", "mask.b1", "offsets.i8", "context.i4", "table.json"])
def test_what_was_damaged_is_made_anew(folder, rows, file):
    before = [row.input_ids.tolist() for row in table(rows).rows]
    (entry,) = folder.iterdir()
    os.truncate(entry / file, 3)
    reads = []
    assert [row.input_ids.tolist() for row in table(rows, reads).rows] == before
    assert reads


def test_what_a_run_that_died_left_half_made_is_removed_in_time(folder, rows):
    folder.mkdir(parents=True)
    recent, ancient = folder / ".a.tmp", folder / ".b.tmp"
    for left in (recent, ancient):
        left.mkdir()
    os.utime(ancient, (1, 1))
    table(rows)
    assert recent.exists()
    assert not ancient.exists()


def test_a_reader_that_fails_leaves_nothing_behind(folder, rows):
    def read(faults):
        yield from list(iter_rows(rows, faults))[:3]
        raise DataError("the disk broke")

    with pytest.raises(DataError, match="the disk broke"):
        cached_table(rows, "0" * 64, ENCODER, Supervision(), read)
    assert list(folder.iterdir()) == []


def test_rows_that_cannot_be_read_are_not_the_caches_fault(folder, rows):
    def read(faults):
        yield from list(iter_rows(rows, faults))[:1]
        raise OSError(5, "Input/output error")

    with pytest.raises(DataError, match="rows cannot be read: Input/output error") as found:
        cached_table(rows, "1" * 64, ENCODER, Supervision(), read)
    assert "XDG_CACHE_HOME" not in str(found.value)
    assert list(folder.iterdir()) == []


def test_those_unused_for_longest_make_room(folder, rows, monkeypatch):
    table(rows)
    (oldest,) = folder.iterdir()
    os.utime(oldest / "table.json", (1, 1))
    table(rows, supervision=Supervision(suffix=1))
    (second,) = set(folder.iterdir()) - {oldest}
    size = sum(file.stat().st_size for file in second.iterdir())
    monkeypatch.setattr(cache, "LIMIT_BYTES", 2 * size + size // 2)
    table(rows, supervision=Supervision(suffix=2))
    kept = set(folder.iterdir())
    assert oldest not in kept
    assert second in kept
    assert len(kept) == 2


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path, rows, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        table(rows)
