"""The spool: places for chunks, used again where the rows pass once, and written to by a task on the same host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfos_magic.errors import FeedError
from tfos_magic.feed.spool import ChunkRef, Spool, SpoolWriter

MIB = 1 << 20


@pytest.fixture(params=["cached", "passing"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Spool]:
    made = Spool(str(tmp_path) if request.param == "cached" else None)
    yield made
    made.close()


@pytest.fixture
def passing() -> Iterator[Spool]:
    made = Spool(None)
    yield made
    made.close()


def read(spool: Spool, chunk: ChunkRef) -> bytes:
    return os.pread(spool.fd, chunk.length_bytes, chunk.offset)


def used_bytes(spool: Spool) -> int:
    return os.fstat(spool.fd).st_blocks * 512


def test_chunks_come_back_as_they_were(spool: Spool) -> None:
    messages = [os.urandom(size) for size in (1, 63, 64, 65, 3 * MIB + 5, 0)]
    chunks = [spool.append(message, row_count) for row_count, message in enumerate(messages)]
    assert [read(spool, chunk) for chunk in chunks] == messages
    assert [chunk.row_count for chunk in chunks] == list(range(6))
    assert all(chunk.offset % 64 == 0 for chunk in chunks)


def test_another_process_of_the_same_user_writes_where_it_is_told(spool: Spool) -> None:
    before = spool.append(b"before", 1)
    code = (
        "import json, sys; from tfos_magic.feed.spool import SpoolWriter\n"
        "writer = SpoolWriter.open(json.loads(sys.argv[1]))\n"
        "writer.write(b'from afar', int(sys.argv[2])); writer.close(); writer.close()"
    )
    with spool.place(9, 1) as chunk:
        subprocess.run([sys.executable, "-c", code, json.dumps(spool.offer), str(chunk.offset)], check=True)
    assert (read(spool, before), read(spool, chunk)) == (b"before", b"from afar")


def test_a_spool_out_of_reach_is_not_written_to(spool: Spool, tmp_path: Path) -> None:
    offer = spool.offer
    (tmp_path / "other").write_bytes(b"untouched")
    with open(tmp_path / "other", "r+b") as other:
        assert SpoolWriter.open({**offer, "fd": other.fileno()}) is None  # another container's process of that number
        assert SpoolWriter.open({**offer, "fd": 1_000_000}) is None
        assert SpoolWriter.open({**offer, "pid": 4_194_304}) is None
    assert (tmp_path / "other").read_bytes() == b"untouched"


def test_what_is_given_back_in_mid_write_is_freed_and_its_place_never_used_again(passing: Spool) -> None:
    with pytest.raises(ConnectionError), passing.place(MIB, 1) as lost:
        os.pwrite(passing.fd, b"x" * MIB, lost.offset)
        raise ConnectionError
    assert used_bytes(passing) < 64 << 10
    assert passing.append(b"y" * MIB, 1).offset != lost.offset


def test_places_of_taken_chunks_are_used_again(passing: Spool) -> None:
    chunk = passing.append(b"1" * 2 * MIB, 1)
    for number in range(50):
        passing.recycle(chunk)
        message = bytes([number]) * (2 * MIB - number)
        chunk = passing.append(message, 1)
        assert read(passing, chunk) == message
    assert passing.size_bytes == 2 * MIB == used_bytes(passing)


def test_a_place_keeps_its_size_when_a_smaller_chunk_has_used_it(passing: Spool) -> None:
    first = passing.append(b"1" * 2 * MIB, 1)
    passing.recycle(first)
    passing.recycle(passing.append(b"2" * (MIB + 64), 1))
    assert passing.append(b"3" * 2 * MIB, 1).offset == first.offset
    assert passing.size_bytes == 2 * MIB


def test_a_small_chunk_does_not_take_a_large_place(passing: Spool) -> None:
    large = passing.append(b"1" * 2 * MIB, 1)
    passing.recycle(large)
    assert passing.append(b"2" * 64, 1).offset == 2 * MIB


def test_a_chunk_in_use_is_never_overwritten(passing: Spool) -> None:
    kept = [passing.append(bytes([n]) * MIB, 1) for n in range(8)]
    passing.recycle(kept.pop(3))
    taken = [passing.append(b"new" * 1000, 1) for _ in range(20)]
    assert len({chunk.offset for chunk in [*kept, *taken]}) == 27
    assert [read(passing, chunk)[:1] for chunk in kept] == [bytes([n]) for n in (0, 1, 2, 4, 5, 6, 7)]


def test_no_more_idle_memory_is_kept_than_a_few_chunks(passing: Spool) -> None:
    chunks = [passing.append(b"x" * 2 * MIB, 1) for _ in range(64)]
    assert used_bytes(passing) == 128 * MIB
    for chunk in chunks:
        passing.recycle(chunk)
    assert used_bytes(passing) == 32 * MIB


def test_a_cached_place_is_not_used_again(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path))
    first = spool.append(b"x" * MIB, 1)
    spool.recycle(first)
    assert spool.append(b"y" * MIB, 1).offset == MIB
    assert not list(tmp_path.iterdir())
    spool.close()


def test_a_full_disk_names_the_directory(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, spool.fd)
    os.close(full)
    with pytest.raises(FeedError, match=rf"(?s)disk under {tmp_path} is full.*spark\.local\.dir"):
        spool.append(b"x", 1)
    spool.close()
