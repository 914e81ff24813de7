"""What a node prints, as lines, bounded: in bytes per heartbeat, in memory, and in the work that it costs.

Runs on: executor.

    child ──pipe──► OutputPipe   one read every few milliseconds, however fast the child writes
                       │ bytes
                       ▼
                    OutputLines  a flood: the first lines since the last beat, a count, the last lines
                       │ take(), at each beat: only here bytes become lines
                       ▼ "log" messages to the driver

Bytes that will be left out are never looked at, only their newlines are counted. Thus `yes` costs the agent some
per cent of a core, and its child is slowed down to what one reader can count.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from tfos_magic.status import clean_line, left_out_here

_BYTES_PER_BEAT = 256 << 10  # 512 KiB/s: what no program writes for long that somebody reads
_BYTES_PER_BEAT_ALL_NODES = 2 << 20  # 4 MiB/s cost the driver 6 to 15 % of a core
_BYTES_PER_BEAT_LEAST = 8 << 10
_BURST_BEATS = 8  # a node that was silent may print a table at once: beats that it has not used count
_FIRST_BYTES = 4 << 10
_LINE_BYTES = 64 << 10  # of a line without an end
_LINES_KEPT = 200
_PIPE_BYTES = 1 << 20
_PIPE_BYTES_PER_S = 200e6
_REDRAWN = re.compile(rb"\r|\x08{2,}")  # Keras goes back by backspaces and carriage return, others by the latter
# What TensorFlow says at each import, also under TF_CPP_MIN_LOG_LEVEL=1: INFO lines written before its log is set up.
_CHATTER = re.compile(
    r"I\d{4} \d\d:\d\d:|\d{4}-\d\d-\d\d [\d:.]+: I (tensorflow|external)/|"
    r"WARNING: All log messages before absl::InitializeLog|To enable the following instructions:|"
    # TensorFlow 2.16, at each import and at the end of each epoch:
    r".*TF-TRT Warning: Could not find TensorRT|.*local_rendezvous.*OUT_OF_RANGE: End of sequence|"
    r"\s*\[\[\{\{node IteratorGetNext\}\}\]\]$"
)
_NO_GPU = re.compile(r"E\d{4} .*failed call to cuInit|.*: E external/.*(cuInit|Unable to register cu)")


def bytes_per_beat(num_nodes: int) -> int:
    """Return how much a node may send at each beat, so that all together do not overload the driver."""
    return max(_BYTES_PER_BEAT_LEAST, min(_BYTES_PER_BEAT, _BYTES_PER_BEAT_ALL_NODES // max(1, num_nodes)))


class OutputPipe:
    """The reading end of the child's stdout and stderr, as wide as the system lets it be; never blocks.

    Parameters
    ----------
    descriptor : int
        Stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)
        with contextlib.suppress(OSError):  # /proc/sys/fs/pipe-max-size, or the user has too many wide ones
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._capacity: int = fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)

    @property
    def pause_s(self) -> float:
        """How long not to read after a read: so short that only a flood fills the pipe meanwhile.

        A child that writes line by line would otherwise wake its reader for every one of them.
        """
        return self._capacity / _PIPE_BYTES_PER_S

    def read(self) -> bytes | None:
        """Return what has been written, b"" at the end, None when there is nothing yet."""
        try:
            return os.read(self._descriptor, self._capacity)
        except BlockingIOError:
            return None

    def drain(self) -> Iterator[bytes]:
        """Yield all that was written before now; no more than the pipe holds, for the writer may go on."""
        size = 0
        while size < self._capacity and (data := self.read()):
            size += len(data)
            yield data


class Taken(NamedTuple):
    """Lines in the order in which they were written."""

    first: list[str]
    dropped: int
    """Lines left out between the two."""
    last: list[str]
    """The last one of them may be unfinished so far, e.g. a progress bar: then it ends in a carriage return."""


class OutputLines:
    r"""Bytes from a pipe → text lines; of too many the middle ones are counted and left out.

    A line that was redrawn with ``\r`` or backspaces is one line: its last state. Blank lines, and what TensorFlow says
    everywhere, are left out.

    Parameters
    ----------
    budget : int
        Bytes for each :meth:`take`; what is not used of it is saved up for bursts, within limits.
    """

    def __init__(self, budget: int = _BYTES_PER_BEAT) -> None:
        self._shows_all = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0"
        self._has_gpu = os.path.exists("/dev/nvidiactl")
        self.tail: deque[str] = deque(maxlen=_LINES_KEPT)
        """The last lines that were taken."""
        self._budget = budget
        self._allowance = budget * _BURST_BEATS
        self._first = bytearray()
        self._last: deque[bytes] = deque()
        self._last_bytes = 0
        self._lines_dropped = 0
        self._unfinished = b""
        self._told = ""  # the unfinished line as it was last taken

    def feed(self, data: bytes) -> None:
        """Take what the pipe gave; b"" ends an unfinished last line."""
        data = data or b"\n"
        room = max(0, min(_FIRST_BYTES, self._allowance // 4) - len(self._first))
        self._first += data[:room]
        if len(data) > room:
            self._last.append(data[room:])
            self._last_bytes += len(data) - room
            self._drop(self._allowance, whole_pieces=True)

    def take(self) -> Taken:
        """Return the lines since the last call."""
        if not self._first:
            return Taken([], 0, [])
        self._drop(self._allowance)
        first, last, dropped = self._unfinished + self._first, b"".join(self._last), self._lines_dropped
        self._allowance += self._budget - len(self._first) - len(last)
        self._allowance = min(max(self._allowance, self._budget), self._budget * _BURST_BEATS)
        self._first, self._last, self._last_bytes, self._lines_dropped = bytearray(), deque(), 0, 0
        if dropped:
            begun, newline, after = last.partition(b"\n")  # the rest of a line whose beginning is gone
            taken = Taken(self._texts(first.split(b"\n")[:-1]), dropped + len(newline), [])
            last = after if newline else begun
        else:  # if anything is missing then within a line, and nobody misses it there
            taken, last = Taken([], 0, []), bytes(first) + last
        *ended, rest = last.split(b"\n")
        taken.last.extend(self._texts(ended))
        self._remember(taken)
        self._unfinished = _current_state(rest)
        return self._with_unfinished(taken)

    def _drop(self, limit: int, *, whole_pieces: bool = False) -> None:
        """Leave out the oldest bytes after the first ones, and count the lines that go with them."""
        while self._last and self._last_bytes - len(self._last[0]) >= limit:
            piece = self._last.popleft()
            self._last_bytes -= len(piece)
            self._lines_dropped += piece.count(b"\n")
        excess = self._last_bytes - limit
        if excess > 0 and not whole_pieces:
            self._lines_dropped += self._last[0].count(b"\n", 0, excess)
            self._last[0] = self._last[0][excess:]

    def _remember(self, taken: Taken) -> None:
        self.tail.extend(taken.first)
        if taken.dropped:
            self.tail.append(left_out_here(taken.dropped))
        self.tail.extend(taken.last)

    def _with_unfinished(self, taken: Taken) -> Taken:
        """Add the unfinished line where it has changed."""
        current = clean_line(self._unfinished.decode(errors="ignore"))
        if current.strip() and (current != self._told or taken.last) and not self._is_chatter(current):
            taken.last.append(current + "\r")
        self._told = current
        return taken

    def _texts(self, raw_lines: list[bytes]) -> list[str]:
        """Return the lines worth showing."""
        texts = (clean_line(_cut(raw).decode(errors="replace")).rstrip() for raw in raw_lines)
        return [text for text in texts if text and not self._is_chatter(text)]

    def _is_chatter(self, text: str) -> bool:
        """Return True for what TensorFlow says on every machine, or of a GPU where there is none."""
        if self._shows_all:
            return False
        return bool(_CHATTER.match(text)) or (not self._has_gpu and bool(_NO_GPU.match(text)))


def _cut(raw: bytes) -> bytes:
    """Return what is worth reading of a very long line: its beginning, or the end of one that is redrawn."""
    if len(raw) <= _LINE_BYTES:
        return raw
    end = raw[-_LINE_BYTES:]
    return end if _REDRAWN.search(end) else raw[:_LINE_BYTES]


def _current_state(raw: bytes) -> bytes:
    """Return an unfinished line without the states that it has overwritten already."""
    raw = _cut(raw)
    states = _REDRAWN.split(raw)
    if len(states) == 1:
        return raw
    shown = max((index for index, state in enumerate(states) if state.strip()), default=0)
    is_overwritten_next = shown < len(states) - 1
    return states[shown] + (b"\r" if is_overwritten_next else b"")
