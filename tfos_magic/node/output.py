"""What a node prints, as lines, bounded.

Runs on: executor.
"""

from __future__ import annotations

from collections import deque

_LINES_PER_BEAT = 200
_LINE_CHARACTERS = 2000
_LINES_KEPT = 200


class OutputLines:
    """Bytes from a pipe → text lines, bounded: what is too much is counted and dropped, oldest first."""

    def __init__(self) -> None:
        self.tail: deque[str] = deque(maxlen=_LINES_KEPT)
        self._pending: deque[str] = deque(maxlen=_LINES_PER_BEAT)
        self._dropped = 0
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what the pipe gave; b"" flushes an unfinished last line."""
        *lines, self._rest = (self._rest + data).split(b"\n") if data else [self._rest, b""]
        if len(self._rest) > 1 << 16:  # a progress bar that never ends its line
            lines, self._rest = [*lines, self._rest], b""
        for raw in lines:
            # A line redrawn with carriage returns is worth its last state.
            text = raw.decode(errors="replace").rstrip("\r").rpartition("\r")[2][:_LINE_CHARACTERS]
            if text.strip():
                self._keep(text)

    def take(self) -> tuple[list[str], int]:
        """Return the lines since the last call, and how many more there were."""
        taken = list(self._pending), self._dropped
        self._pending.clear()
        self._dropped = 0
        return taken

    def _keep(self, text: str) -> None:
        self.tail.append(text)
        if len(self._pending) == self._pending.maxlen:
            self._dropped += 1
        self._pending.append(text)
