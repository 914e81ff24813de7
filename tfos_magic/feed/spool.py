"""The file in which a node keeps the rows it was dealt.

Runs on: executors (agent; a Spark task on the same host writes into it).

The file has no name: nothing needs to be cleaned up, however the agent dies. The child gets its descriptor. There are
two kinds:

=============  ==============================  =====================================================================
kind           where                           a chunk's space
=============  ==============================  =====================================================================
cached         a disk, of Spark's local ones   is used once: what has been mapped stays valid for every epoch
passing        memory, up to the queue's       is used again once the child has taken the chunk: the pages are there
               bound                           already, and the kernel need not find and clear new ones
=============  ==============================  =====================================================================

A task on another host sends its chunks over TCP, and the agent writes them. One on this host writes them itself, into
the place that the agent names (:class:`SpoolWriter`): it opens the file through the agent's entry in ``/proc``, which
the kernel allows to the same user only, and which needs no further socket.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tfos_magic.errors import FeedError

_ALIGNMENT_BYTES = 64  # what Arrow and NumPy like best
_PIECE_BYTES = 256 << 10  # stays in the second-level cache between the socket and the file
_PUNCH_HOLE_KEEP_SIZE = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_IDLE_BYTES = 32 << 20  # of a passing spool: places kept for further use; the rest goes back to the system


@dataclass(frozen=True)
class ChunkRef:
    """Where a chunk lies in its spool: one Arrow IPC message of `row_count` rows."""

    offset: int
    length_bytes: int
    row_count: int


class Spool:
    """A file without a name. Safe to use from several threads at once.

    Parameters
    ----------
    directory : str, optional
        Where a cached spool's blocks are taken from, e.g. one of Spark's local directories. None for a passing one.
    """

    def __init__(self, directory: str | None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._places = _Places()
        if directory is None:
            self.fd = os.memfd_create("tfos-feed", os.MFD_CLOEXEC)
        else:
            self.fd, path = tempfile.mkstemp(prefix="tfos-feed-", dir=directory)
            os.unlink(path)

    @property
    def size_bytes(self) -> int:
        """How far the file has been handed out, discarded chunks included."""
        return self._places.end

    @property
    def offer(self) -> dict[str, Any]:
        """What a task on this host needs to know to write here: plain values for :meth:`SpoolWriter.open`."""
        found = os.fstat(self.fd)
        place = {"pid": os.getpid(), "fd": self.fd, "device": found.st_dev, "inode": found.st_ino}
        return {**place, "directory": self._directory}

    def append(self, message: bytes | memoryview, row_count: int) -> ChunkRef:
        """Write one chunk that is already in memory."""
        view = memoryview(message).cast("B")
        position = 0

        def fill(piece: memoryview) -> None:
            nonlocal position
            piece[:] = view[position : position + len(piece)]
            position += len(piece)

        return self.append_from(fill, len(view), row_count)

    def append_from(self, fill: Callable[[memoryview], None], length_bytes: int, row_count: int) -> ChunkRef:
        """Write one chunk, piece by piece as `fill` delivers it.

        Parameters
        ----------
        fill : callable
            Fills the view it is given with the chunk's next bytes.
        length_bytes, row_count : int
            Of the whole chunk.

        Raises
        ------
        FeedError
            If the disk is full. What `fill` raises passes through; the space is given back.
        """
        buffer = memoryview(bytearray(min(length_bytes, _PIECE_BYTES)))
        with self.place(length_bytes, row_count) as chunk:
            for start in range(0, length_bytes, _PIECE_BYTES):
                piece = buffer[: min(_PIECE_BYTES, length_bytes - start)]
                fill(piece)
                _write(self.fd, piece, chunk.offset + start, self._directory)
        return chunk

    @contextmanager
    def place(self, length_bytes: int, row_count: int) -> Iterator[ChunkRef]:
        """Find space for a chunk that is written inside the ``with``; an exception there gives it back."""
        with self._lock:
            chunk = ChunkRef(self._places.take(length_bytes), length_bytes, row_count)
        try:
            yield chunk
        except BaseException:
            self.discard(chunk)
            raise

    def recycle(self, chunk: ChunkRef) -> None:
        """Take back the space of a chunk that nobody will read or write again."""
        with self._lock:
            is_kept = self._directory is None and self._places.put(chunk.offset)
        if not is_kept:
            self.discard(chunk)

    def discard(self, chunk: ChunkRef) -> None:
        """Give the chunk's blocks back to the system, where the file system can do that (ext4, xfs, btrfs, tmpfs).

        Its place is not used again: whoever was to write it may be about to.
        """
        with self._lock:
            capacity = self._places.forget(chunk.offset)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        libc.fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, chunk.offset, max(1, capacity))

    def close(self) -> None:
        """Let go of the file; its blocks are freed once the child has let go as well."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SpoolWriter:
    """A spool of another process on this host, to write into. Made by :meth:`open`."""

    def __init__(self, fd: int, directory: str | None) -> None:
        self._fd = fd
        self._directory = directory

    @classmethod
    def open(cls, offer: Mapping[str, Any]) -> SpoolWriter | None:
        """Return a writer for what :attr:`Spool.offer` describes; None if this process cannot reach it.

        It cannot where the two are in different containers, or ``/proc`` shows a user only their own processes.
        """
        try:
            fd = os.open(f"/proc/{int(offer['pid'])}/fd/{int(offer['fd'])}", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return None
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (offer["device"], offer["inode"]):  # another container's process
            os.close(fd)
            return None
        return cls(fd, offer["directory"])

    def write(self, payload: memoryview | bytes, offset: int) -> None:
        """Write a chunk to its place.

        Raises
        ------
        FeedError
            If the disk is full.
        """
        _write(self._fd, memoryview(payload), offset, self._directory)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Places:
    """Which parts of the file are in use, which may be used again, and where unused space begins."""

    def __init__(self) -> None:
        self.end = 0
        self._capacities: dict[int, int] = {}
        self._idle: list[int] = []
        self._idle_bytes = 0

    def take(self, length_bytes: int) -> int:
        """Return an offset: of an idle place that this does not waste half of, or at the end."""
        wanted = _aligned(length_bytes)
        for index, offset in enumerate(self._idle):
            if wanted <= self._capacities[offset] <= 2 * wanted:
                del self._idle[index]
                self._idle_bytes -= self._capacities[offset]
                return offset
        offset, self.end = self.end, self.end + wanted
        self._capacities[offset] = wanted
        return offset

    def put(self, offset: int) -> bool:
        """Keep a place for further use; False if enough are kept."""
        if self._idle_bytes + self._capacities[offset] > _IDLE_BYTES:
            return False
        self._idle.append(offset)
        self._idle_bytes += self._capacities[offset]
        return True

    def forget(self, offset: int) -> int:
        """Never hand this place out again; return its size in bytes."""
        return self._capacities.pop(offset)


def _aligned(length_bytes: int) -> int:
    return -(-length_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _write(fd: int, piece: memoryview, offset: int, directory: str | None) -> None:
    try:
        while piece:
            count = os.pwrite(fd, piece, offset)
            piece, offset = piece[count:], offset + count
    except OSError as error:
        if directory is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FeedError(
            f"The disk under {directory} is full: the feed's cache holds {offset:,} bytes there.",
            cause="A node keeps its whole share of the rows, to repeat them in every epoch.",
            hint="Set spark.local.dir to a larger disk, select fewer columns, or use more nodes.",
        ) from error
