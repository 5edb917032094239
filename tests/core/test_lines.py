"""Packed files: the same lines as from the plain file, in bounded memory; a damaged one is refused with its place."""

import gzip
import hashlib
import itertools
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mens_core.corpus.data_dir import find_data
from mens_core.corpus.faults import Faults
from mens_core.corpus.lines import read_lines
from mens_core.corpus.rows import iter_rows, read_rows, sample_rows
from mens_core.errors import DataError

PACKERS = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}
GOOD, BAD = b'{"prompt": "a", "response": "b"}\n', b'{"prompt": "a"}\n'

packed = pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
really_packed = pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("lines") / "rows"


def numbered(number):
    """A row that does not pack to nothing."""
    return b'{"prompt": "a", "response": "%s"}\n' % hashlib.sha256(b"%d" % number).hexdigest().encode()


def put(path, content):
    path.write_bytes(content)
    return path


@packed
@given(parts=st.lists(st.binary(max_size=9000), max_size=4))
def test_any_bytes_have_the_lines_that_python_reads_in_one_stream_or_several(file, pack, parts):
    content = b"|" + b"".join(parts)  # no magic bytes at the start
    whole, several = pack(content), b"".join(map(pack, [b"|", *parts]))
    lines = list(read_lines(put(file, whole)))
    assert b"\n".join(lines) == content.removesuffix(b"\n")
    assert len(lines) == content.count(b"\n") + (not content.endswith(b"\n"))
    assert list(read_lines(put(file, several))) == lines


@packed
def test_rows_come_one_by_one_and_the_faulty_ones_are_booked(tmp_path, pack):
    path = put(tmp_path / "rows", pack(b"\xef\xbb\xbf" + GOOD + BAD + GOOD + BAD.strip()))
    faults = Faults(path)
    rows = iter_rows(path, faults)
    assert (next(rows).line, faults.lines) == (1, 1)
    assert [row.line for row in rows] == [3]
    assert (faults.lines, faults.count, faults.by_kind()) == (4, 2, {"no 'response'": 2})
    faults.check(most=0.5)
    with pytest.raises(DataError, match="2 of 4 lines"):
        faults.check(most=0.49)


@packed
def test_a_packed_file_of_nothing_is_empty(tmp_path, pack):
    path = put(tmp_path / "rows", pack(b""))
    with pytest.raises(DataError, match="is empty"):
        read_rows(path)


@really_packed
def test_a_stream_that_was_cut_or_damaged_is_refused_with_the_line_it_reached(tmp_path, pack):
    lines = [numbered(number) for number in range(5000)]
    whole = pack(b"".join(lines))
    for cut in (5, len(whole) // 2, len(whole) - 1):
        path, reached = put(tmp_path / "cut", whole[:cut]), []
        with pytest.raises(DataError, match="ends in the middle") as caught:
            reached.extend(read_lines(path))
        assert f"after line {len(reached)}" in str(caught.value)
        assert reached == [line.strip() for line in lines[: len(reached)]]
        assert cut == 5 or reached


def test_a_damaged_stream_is_refused(tmp_path):
    # Zstandard carries a checksum only where its packer was asked for one; gzip always does.
    checked = zstandard.ZstdCompressor(write_checksum=True)
    for pack in (gzip.compress, checked.compress):
        whole = pack(b"".join(map(numbered, range(1000))))
        for place in range(10, len(whole), len(whole) // 20):
            broken = bytearray(whole)
            broken[place] ^= 0xFF
            with pytest.raises(DataError, match="packed"):
                list(read_lines(put(tmp_path / "broken", broken)))


def test_something_behind_the_packed_stream_is_no_end(tmp_path):
    with pytest.raises(DataError, match="damaged"):
        list(read_lines(put(tmp_path / "rows", gzip.compress(GOOD) + GOOD)))


@packed
def test_memory_does_not_grow_with_the_file(tmp_path, pack):
    path = put(tmp_path / "rows", pack(b"".join(map(numbered, range(100_000)))))
    tracemalloc.start()
    try:
        # Ten million bytes pass by.
        assert sum(1 for _ in read_lines(path)) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


@packed
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 4096])
def test_a_sample_is_spread_evenly_and_a_small_file_is_read_whole(tmp_path, pack, count):
    path = put(tmp_path / "rows", pack(GOOD * count))
    rows, faulty, lines = sample_rows(path, 256)
    assert (faulty, lines) == (0, count)
    assert len(rows) == count if count <= 256 else 128 <= len(rows) <= 256
    places = [row.line for row in rows]
    assert places[0] == 1
    assert len({after - before for before, after in itertools.pairwise(places)}) <= 1
    assert count - places[-1] < max(1, count / 128)


def test_a_sample_counts_the_faulty_rows_and_says_why_none_can_be_used(tmp_path):
    rows, faulty, lines = sample_rows(put(tmp_path / "rows", (GOOD + BAD) * 10), 100)
    assert (len(rows), faulty, lines) == (10, 10, 20)
    with pytest.raises(DataError, match="3 of 3 lines cannot be used"):
        sample_rows(put(tmp_path / "rows", BAD * 3), 100)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_packed_rows_are_found_where_the_plain_file_is_absent(tmp_path, ending):
    put(tmp_path / f"validated.jsonl{ending}", b"")
    put(tmp_path / f"eval.jsonl{ending}", b"")
    files = find_data(tmp_path)
    assert (files.train, files.held_out) == (tmp_path / f"validated.jsonl{ending}", tmp_path / f"eval.jsonl{ending}")
    put(tmp_path / f"train.jsonl{ending}", b"")
    assert find_data(tmp_path).train == tmp_path / f"train.jsonl{ending}"


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_one_name_in_two_forms_is_refused(tmp_path, name):
    put(tmp_path / name, GOOD)
    assert find_data(tmp_path)
    put(tmp_path / f"{name}.zst", zstandard.compress(GOOD))
    with pytest.raises(DataError, match=f"{name} stands in the folder in 2 forms"):
        find_data(tmp_path)


def test_the_packers_of_these_tests_do_pack():
    assert zlib.decompress(gzip.compress(GOOD), wbits=31) == zstandard.decompress(zstandard.compress(GOOD)) == GOOD
