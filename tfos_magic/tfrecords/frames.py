"""TFRecord's framing: byte strings to and from a file, with their checksums.

Runs on: executors. The format: https://www.tensorflow.org/tutorials/load_data/tfrecord

    uint64 length │ uint32 masked crc of length │ byte data[length] │ uint32 masked crc of data      little-endian
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from typing import IO, cast

import numpy as np

from tfos_magic.errors import DataError
from tfos_magic.tfrecords import crc32c
from tfos_magic.tfrecords.encode import join
from tfos_magic.tfrecords.slices import Array, Slices

BLOCK_BYTES = 8 << 20
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
_LENGTH = struct.Struct("<Q")
_GZIP_MAGIC = b"\x1f\x8b"


def framed(records: Slices) -> bytes:
    """Return the records as they stand in a file."""
    count = len(records)
    if not count:
        return b""
    headers = np.empty((count, _HEADER_BYTES), np.uint8)
    headers[:, :8] = records.lengths.astype("<u8").view(np.uint8).reshape(count, 8)
    lengths = Slices.joined(np.ascontiguousarray(headers[:, :8]).ravel(), np.arange(0, 8 * count + 1, 8))
    headers[:, 8:] = _as_bytes(crc32c.masked(lengths)).reshape(count, 4)
    rows = np.arange(count + 1)
    whole = join(
        [
            Slices.joined(headers.ravel(), _HEADER_BYTES * rows).to_arrow(),
            records.to_arrow(),
            Slices.joined(_as_bytes(crc32c.masked(records)), _FOOTER_BYTES * rows).to_arrow(),
        ]
    )
    return Slices.of(whole).content().tobytes()


def _as_bytes(crc: Array) -> Array:
    return crc.astype("<u4").view(np.uint8)


def read(file: IO[bytes], name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Slices]:
    """Yield a file's records, many at a time, their checksums verified.

    Parameters
    ----------
    file : binary file
        Compressed by gzip or not; what it is shows in its first bytes.
    name : str
        For messages.
    block_bytes : int
        How much to read at a time; a longer record is read whole.

    Raises
    ------
    DataError
        The file is damaged or ends too early; says at which byte.
    """
    stream, name = _uncompressed(file, name)
    place, rest = 0, b""
    while True:
        try:
            block = stream.read(max(block_bytes, _missing(rest, place, name)))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(name, place + len(rest), f"gzip cannot go on: {error}") from error
        if not block:
            break
        rest += block
        records = _complete_records(rest)
        _verify(records, place, name)
        if len(records):
            yield records
            end = int(records.ends[-1]) + _FOOTER_BYTES
            place, rest = place + end, rest[end:]
    if rest:
        raise _damaged(name, place, f"the file ends {len(rest)} bytes after the start of a record")


def _uncompressed(file: IO[bytes], name: str) -> tuple[IO[bytes], str]:
    """Return the file, or what gzip finds in it."""
    first = file.read(_HEADER_BYTES)
    whole = _Rejoined(first, file)
    # A record of 35,615 bytes begins with gzip's two magic bytes as well; its checksum tells.
    if first.startswith(_GZIP_MAGIC) and not _is_header(first):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=whole)), f"{name} (uncompressed)"
    return cast("IO[bytes]", whole), name


class _Rejoined(io.RawIOBase):
    """A file, its first bytes put back; not every file system can go back."""

    def __init__(self, first: bytes, file: IO[bytes]) -> None:
        self._first = first
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not self._first:
            return self._file.read(size)
        end = len(self._first) if size < 0 else size
        first, self._first = self._first[:end], self._first[end:]
        return first  # fewer than asked for, as raw files may


def _is_header(data: bytes) -> bool:
    one = Slices.from_list([data[:8]])
    return len(data) == _HEADER_BYTES and _as_bytes(crc32c.masked(one)).tobytes() == data[8:]


def _missing(rest: bytes, place: int, name: str) -> int:
    """Return how many bytes the record that `rest` begins with still lacks, if its length can be believed."""
    if len(rest) < _HEADER_BYTES:
        return 0
    if not _is_header(rest[:_HEADER_BYTES]):
        raise _bad_length(name, place)
    length: int = _LENGTH.unpack_from(rest)[0]
    return _HEADER_BYTES + length + _FOOTER_BYTES - len(rest)


def _complete_records(data: bytes) -> Slices:
    starts, ends = [], []
    place, size = 0, len(data)
    unpack = _LENGTH.unpack_from
    while place + _HEADER_BYTES <= size:
        start = place + _HEADER_BYTES
        end = start + unpack(data, place)[0]
        place = end + _FOOTER_BYTES
        if place > size:
            break
        starts.append(start)
        ends.append(end)
    return Slices(np.frombuffer(data, np.uint8), np.array(starts, np.int64), np.array(ends, np.int64))


def _verify(records: Slices, place: int, name: str) -> None:
    """Compare all checksums; the first one that is wrong is the one to tell of."""
    if not len(records):
        return
    starts = records.starts - _HEADER_BYTES
    bad_lengths = _differ(records.data, starts, starts + 8)
    bad_data = _differ(records.data, records.starts, records.ends)
    bad = bad_lengths | bad_data
    if bad.any():
        first = int(np.argmax(bad))
        at = place + int(starts[first])
        if bad_lengths[first]:
            raise _bad_length(name, at)
        raise _damaged(name, at, f"the checksum of the record's {records.lengths[first]:,} bytes does not match")


def _differ(data: Array, starts: Array, ends: Array) -> Array:
    stored = np.ndarray(len(data) - 3, "<u4", data, strides=(1,))[ends]
    return np.asarray(crc32c.masked(Slices(data, starts, ends)) != stored)


def _bad_length(name: str, at: int) -> DataError:
    return _damaged(name, at, "the checksum of the record's length does not match")


def _damaged(name: str, at: int, what: str) -> DataError:
    return DataError(
        f"{name} is damaged or no TFRecord file: at byte {at:,} {what}.",
        cause="It was not written to its end, was changed since, or holds something else.",
        hint="Write the file again, or leave it out: loadTFRecords takes a pattern, e.g. '…/part-0000[0-3]*'.",
    )
