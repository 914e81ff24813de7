"""Memory that a node's neighbour on the same host reads where it lies.

Runs on: executors.

    node 0: Lender ── one file without a name, its parts handed out as arrays ──► node 1: Window, maps the same pages
               └───── over the connection only: which bytes ─────────────────────►

Between two processes of one host this spares both kernel copies of every byte. The file is opened through its owner's
entry in ``/proc``, as the kernel allows to the same user only, and vanishes with the processes that have it. Nobody has
to know beforehand whether the other end is on this host: it opens the file and finds the token in it, or it cannot, and
then bytes go over the connection.
"""

from __future__ import annotations

import contextlib
import hmac
import mmap
import os
import stat
import struct
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SHARED_FROM_BYTES = 1 << 14
"""Less than this is sent as it is: a copy is then cheaper than the pages."""
PLACE = struct.Struct("<QQQ")
"""Where bytes lie: begin and length of the part of the file, and the offset in it."""
OFFER = struct.Struct("<QQ16s")
"""Whose file it is: process, descriptor, token; process 0 when there is none."""
_MAX_IDLE = 3  # parts that wait for their next use; more come together only when sizes change


@dataclass
class _Part:
    """Some pages of the file, lent as one array at a time."""

    begin: int
    pages: mmap.mmap
    address: int
    lent: weakref.ref[Array] | None = None

    @property
    def is_lent(self) -> bool:
        return self.lent is not None and self.lent() is not None


class Lender:
    """Arrays in memory that the next node can read.

    A part of the file is used again when nobody here holds the array any more. Whoever shows one to the neighbour must
    not ask for another before that has said that it has read it, unless it holds the one it showed.
    """

    def __init__(self) -> None:
        self._token = os.urandom(16)
        self._fd = os.memfd_create("tfos-ring", os.MFD_CLOEXEC)
        self._parts: list[_Part] = []
        self._end = 0
        self._grow(len(self._token)).write(self._token)

    @property
    def offer(self) -> bytes:
        """What the other end must be told to open the file."""
        return OFFER.pack(os.getpid(), self._fd, self._token)

    def empty(self, count_bytes: int) -> Array:
        """Return so many bytes, one or more, their content undefined."""
        idle = [part for part in self._parts if not part.is_lent]
        fitting = [part for part in idle if len(part.pages) >= count_bytes]
        if fitting:
            part = min(fitting, key=lambda part: len(part.pages))
        else:
            for useless in idle[: max(0, len(idle) - _MAX_IDLE + 1)]:
                useless.pages.madvise(mmap.MADV_REMOVE)  # else the file would hold the memory as long as the run
                self._parts.remove(useless)
            # A power of two, so that sizes which vary a little find it again; what is not touched takes no memory.
            begin, pages = self._end, self._grow(max(mmap.PAGESIZE, 1 << (count_bytes - 1).bit_length()))
            part = _Part(begin, pages, np.frombuffer(pages, np.uint8).ctypes.data)
            self._parts.append(part)
        lent = np.frombuffer(part.pages, np.uint8)
        part.lent = weakref.ref(lent)  # views of it keep it alive
        return lent[:count_bytes]

    def place_of(self, values: Array) -> bytes | None:
        """Return where `values` lie, for the other end; None if not in the file."""
        address = values.ctypes.data
        for part in self._parts:
            if part.address <= address < part.address + len(part.pages):
                return PLACE.pack(part.begin, len(part.pages), address - part.address)
        return None

    def close(self) -> None:
        """Close the file; arrays that somebody holds stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._parts.clear()

    def _grow(self, count_bytes: int) -> mmap.mmap:
        size = -(-count_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._fd, self._end + size)
        pages = mmap.mmap(self._fd, size, offset=self._end)
        self._end += size
        return pages


class Window:
    """What the previous node shows of its memory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._parts: dict[tuple[int, int], Array] = {}

    @classmethod
    def open(cls, offer: bytes) -> Window | None:
        """Return a view of the file that is offered; None if it cannot be reached from here, as on another host."""
        pid, descriptor, token = OFFER.unpack(offer)
        path = f"/proc/{pid}/fd/{descriptor}"
        with contextlib.suppress(OSError):
            if pid and stat.S_ISREG(os.stat(path).st_mode):  # on another host it may be anything
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if hmac.compare_digest(os.pread(fd, len(token), 0), token):
                    return cls(fd)
                os.close(fd)
        return None

    def view(self, place: bytes, count_bytes: int) -> Array:
        """Return the bytes at `place`, to be read while their owner holds them."""
        begin, size, offset = PLACE.unpack(place)
        if (begin, size) not in self._parts:
            pages = mmap.mmap(self._fd, size, offset=begin, prot=mmap.PROT_READ)
            self._parts[begin, size] = np.frombuffer(pages, np.uint8)
        return self._parts[begin, size][offset : offset + count_bytes]

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._parts.clear()
