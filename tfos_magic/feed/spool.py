"""The file in which a node keeps the rows it was dealt.

Runs on: executors (agent).

The file has no name: nothing needs to be cleaned up, however the agent dies. The child gets its descriptor and maps it.
Chunks are only ever added, so what has been mapped stays valid.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tfos_magic.errors import FeedError

_ALIGNMENT_BYTES = 64  # what Arrow and NumPy like best
_PIECE_BYTES = 256 << 10  # stays in the second-level cache between the socket and the file
_PUNCH_HOLE_KEEP_SIZE = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@dataclass(frozen=True)
class ChunkRef:
    """Where a chunk lies in its spool: one Arrow IPC message of `row_count` rows."""

    offset: int
    length_bytes: int
    row_count: int


class Spool:
    """An append-only file without a name. Safe to use from several threads at once.

    Parameters
    ----------
    directory : str
        Where the file's blocks are taken from, e.g. one of Spark's local directories.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._size_bytes = 0
        self.fd, path = tempfile.mkstemp(prefix="tfos-feed-", dir=directory)
        os.unlink(path)

    @property
    def size_bytes(self) -> int:
        """Bytes handed out so far, discarded chunks included."""
        return self._size_bytes

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
        offset = self._reserve(length_bytes)
        buffer = memoryview(bytearray(min(length_bytes, _PIECE_BYTES)))
        chunk = ChunkRef(offset, length_bytes, row_count)
        try:
            for start in range(0, length_bytes, _PIECE_BYTES):
                piece = buffer[: min(_PIECE_BYTES, length_bytes - start)]
                fill(piece)
                self._write(piece, offset + start)
        except BaseException:
            self.discard(chunk)
            raise
        return chunk

    def discard(self, chunk: ChunkRef) -> None:
        """Give the chunk's blocks back to the file system, where it can do that (ext4, xfs, btrfs, tmpfs can)."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        libc.fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, chunk.offset, max(1, chunk.length_bytes))

    def close(self) -> None:
        """Let go of the file; its blocks are freed once the child has let go as well."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _reserve(self, length_bytes: int) -> int:
        with self._lock:
            offset = self._size_bytes
            self._size_bytes += -(-length_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return offset

    def _write(self, piece: memoryview, offset: int) -> None:
        try:
            while piece:
                count = os.pwrite(self.fd, piece, offset)
                piece, offset = piece[count:], offset + count
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise FeedError(
                f"The disk under {self._directory} is full: the feed's cache holds {self._size_bytes:,} bytes there.",
                cause="A node keeps its whole share of the rows, to repeat them in every epoch.",
                hint="Set spark.local.dir to a larger disk, select fewer columns, or use more nodes.",
            ) from error
