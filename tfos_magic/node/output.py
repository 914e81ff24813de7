"""What a node prints, as lines, bounded.

Runs on: executor.
"""

from __future__ import annotations

import os
import re
from collections import deque

_LINES_PER_BEAT = 200
_LINE_CHARACTERS = 2000
_LINES_KEPT = 200
# What TensorFlow says at each import, also under TF_CPP_MIN_LOG_LEVEL=1: INFO lines written before its log is set up.
_CHATTER = re.compile(
    r"I\d{4} \d\d:\d\d:|\d{4}-\d\d-\d\d [\d:.]+: I (tensorflow|external)/|"
    r"WARNING: All log messages before absl::InitializeLog|To enable the following instructions:|"
    # TensorFlow 2.16, at each import and at the end of each epoch:
    r".*TF-TRT Warning: Could not find TensorRT|.*local_rendezvous.*OUT_OF_RANGE: End of sequence|"
    r"\s*\[\[\{\{node IteratorGetNext\}\}\]\]$"
)
_NO_GPU = re.compile(r"E\d{4} .*failed call to cuInit|.*: E external/.*(cuInit|Unable to register cu)")


class OutputLines:
    """Bytes from a pipe → text lines, bounded: what is too much is counted and dropped, oldest first."""

    def __init__(self) -> None:
        self._shows_all = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0"
        self._has_gpu = os.path.exists("/dev/nvidiactl")
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
            if text.strip() and not self._is_chatter(text):
                self._keep(text)

    def take(self) -> tuple[list[str], int]:
        """Return the lines since the last call, and how many more there were."""
        taken = list(self._pending), self._dropped
        self._pending.clear()
        self._dropped = 0
        return taken

    def _is_chatter(self, text: str) -> bool:
        """Return True for what TensorFlow says on every machine, or of a GPU where there is none."""
        if self._shows_all:
            return False
        return bool(_CHATTER.match(text)) or (not self._has_gpu and bool(_NO_GPU.match(text)))

    def _keep(self, text: str) -> None:
        self.tail.append(text)
        if len(self._pending) == self._pending.maxlen:
            self._dropped += 1
        self._pending.append(text)
