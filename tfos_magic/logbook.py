"""The files in which a run's output is kept while the run is known: one node, one log, bounded.

Runs on: driver. Knows nothing of Spark or IPython.

    StatusBoard ──cleaned lines──► LogBook.append ──► <temporary directory>/tfos_magic-logs-…/   (mode 0700)
                                                        worker-0.log      the newest lines, up to half the limit
                                                        worker-0.log.1    the half before them; what was there is gone
    %tfos_logs, handle.logs ◄── LogBook.read ◄──────────┘

Whoever makes a book closes it, and with it go the files: in a notebook that is the record of runs
(:class:`tfos_magic.background.Runs`), when it forgets the run. Whatever nobody closes goes with the object, or with the
process: a kernel that has used Spark ends by a signal, and no exit handler of Python's runs, so a shell stands by that
removes the files when its pipe closes. Where that was killed too, :func:`remove_abandoned` finds the files.

A cluster in a script (``TFCluster``, ``cluster.run``) keeps no files: nothing there lists past runs and forgets them.
The last lines are in ``board.logs``; a script that wants more sets ``board.store = LogBook()``, and closes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tfos_magic.status import LEFT_OUT, left_out_here

LIMIT_BYTES = 16 << 20
_PREFIX = "tfos_magic-logs-"
_LOCK = ".lock"
_BLOCK_BYTES = 1 << 16


@dataclass
class _Log:
    """One node's."""

    path: Path
    size: int = 0
    total_lines: int = 0
    """All that the node wrote: those left out, and those that are gone, as well."""

    @property
    def older(self) -> Path:
        return self.path.with_name(self.path.name + ".1")


class LogBook:
    """The output of one run's nodes, in files; safe to use from any thread.

    The files come with the first line. A disk that is full closes the book: a run does not fail because of its log.

    Parameters
    ----------
    limit_bytes : int
        For each node; at least the last half of it is always there.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._segment_bytes = limit_bytes // 2
        self._lock = threading.Lock()
        self._logs: dict[str, _Log] = {}
        self._remove: weakref.finalize[..., LogBook] | None = None
        self._directory = Path()
        self._is_closed = False

    def append(self, node: str, lines: Sequence[str], dropped: int = 0) -> None:
        """Add lines of a node.

        Parameters
        ----------
        node : str
        lines : sequence of str
            Cleaned by :func:`tfos_magic.status.clean_line`.
        dropped : int
            So many were left out before them.
        """
        with self._lock:
            if self._is_closed or not (lines or dropped):
                return
            try:
                log = self._logs.get(node) or self._open(node)
                noted = [left_out_here(dropped), *lines] if dropped and log.total_lines else lines
                self._write(log, [line.encode() + b"\n" for line in noted])
            except OSError:
                self._close()
            else:
                log.total_lines += len(lines) + dropped

    def read(
        self, node: str, last: int | None = None, pattern: re.Pattern[str] | None = None
    ) -> tuple[list[str], int] | None:
        """Return lines of a node, oldest first, and how many more it wrote.

        Without a pattern only as much is read as is returned.

        Parameters
        ----------
        node : str
        last : int, optional
            No more than so many, the last ones.
        pattern : re.Pattern, optional
            Only lines in which it is found. Of lines that are gone nobody knows whether it would have been: they count.

        Returns
        -------
        (list of str, int), optional
            None when the book is closed.
        """
        with contextlib.ExitStack() as stack:
            with self._lock:
                if self._is_closed:
                    return None
                if node not in self._logs:
                    return [], 0
                total = self._logs[node].total_lines
                files = _opened(self._logs[node], stack)
            lines = _backwards(files)
            return _last_matching(lines, total, last, pattern) if pattern else _last(lines, total, last)

    @property
    def paths(self) -> dict[str, Path]:
        """Node → the file of its newest lines; those before them are beside it, in the same name with ``.1``."""
        with self._lock:
            return {node: log.path for node, log in self._logs.items()}

    def close(self) -> None:
        """Remove the files. Idempotent."""
        with self._lock:
            self._close()

    # --- under the lock ---

    def _close(self) -> None:
        self._is_closed = True
        self._logs.clear()
        if self._remove is not None:
            self._remove()

    def _open(self, node: str) -> _Log:
        if self._remove is None:
            self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
            held = _locked(self._directory), _guard(self._directory)
            self._remove = weakref.finalize(self, _remove, self._directory, *held, os.getpid())
        name = re.sub(r"[^\w.-]", "-", node)
        log = self._logs[node] = _Log(self._directory / f"{name}.log")
        return log

    def _write(self, log: _Log, lines: Sequence[bytes]) -> None:
        """Append; a segment that is full takes the place of the older one."""
        start, size = 0, log.size
        for index, line in enumerate(lines):
            if size and size + len(line) > self._segment_bytes:
                _add(log.path, lines[start:index])
                os.replace(log.path, log.older)
                start = index
                size = log.size = 0
            size += len(line)
        _add(log.path, lines[start:])
        log.size = size


def _add(path: Path, lines: Sequence[bytes]) -> None:
    if lines:
        with open(path, "ab") as file:
            file.write(b"".join(lines))


# --- reading ----------------------------------------------------------------------------------------------------


def _opened(log: _Log, stack: contextlib.ExitStack) -> list[tuple[BinaryIO, int]]:
    """Return the files, the newest first, and their sizes now: so they stay readable, whatever the writer does."""
    files: list[tuple[BinaryIO, int]] = []
    for path in (log.path, log.older):
        with contextlib.suppress(FileNotFoundError):
            file = stack.enter_context(path.open("rb"))
            files.append((file, file.seek(0, os.SEEK_END)))
    return files


def _backwards(files: Sequence[tuple[BinaryIO, int]]) -> Iterator[str]:
    """Yield lines, the last one first."""
    for file, position in files:
        rest = b""
        while position:
            start = max(0, position - _BLOCK_BYTES)
            file.seek(start)
            rest, *lines = (file.read(position - start) + rest).split(b"\n")
            position = start
            yield from (line.decode() for line in reversed(lines) if line)  # after the last newline there is none
        if rest:
            yield rest.decode()


def _last(lines: Iterator[str], total: int, last: int | None) -> tuple[list[str], int]:
    found: list[str] = []
    for line in lines:
        if last is not None and len(found) >= last:
            break
        found.append(line)
    found.reverse()
    return found, max(0, total - sum(map(_count, found)))


def _last_matching(
    lines: Iterator[str], total: int, last: int | None, pattern: re.Pattern[str]
) -> tuple[list[str], int]:
    found: list[str] = []
    seen = matching = 0
    for line in lines:
        if LEFT_OUT.fullmatch(line):
            continue
        seen += 1
        if pattern.search(line):
            matching += 1
            if last is None or matching <= last:
                found.append(line)
    found.reverse()
    return found, max(0, total - seen) + matching - len(found)


def _count(line: str) -> int:
    """Return for how many lines a line of the file stands."""
    note = LEFT_OUT.fullmatch(line) if line.startswith("…") else None
    return int(note[1].replace(",", "")) if note else 1


# --- nothing stays behind ---------------------------------------------------------------------------------------


def _locked(directory: Path) -> int:
    """Return the descriptor of a lock that lasts as long as this process, and says that the directory is in use."""
    # Locked before it has its name: whoever finds it by that finds it locked.
    temporary = directory / f"{_LOCK}.new"
    descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600)
    with contextlib.suppress(OSError):  # some network file systems know no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(temporary, directory / _LOCK)
    return descriptor


def _guard(directory: Path) -> subprocess.Popen[bytes] | None:
    """Start what removes the directory when this process is gone, however it ends."""
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; rm -rf -- "$1"', "tfos_magic-logs", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # a notebook sends its signals to the kernel's whole group
        )
    except OSError:  # no more processes, or no shell
        return None


def _remove(directory: Path, lock: int, guard: subprocess.Popen[bytes] | None, pid: int) -> None:
    """Remove a book's directory; in the process that made it, not in one forked from it."""
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
        if guard is not None:
            guard.communicate(b"\n")  # not only closed: a process forked from this one may hold the pipe open


def remove_abandoned() -> None:
    """Remove what processes of this user have left that were killed."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(directory: Path) -> None:
    with contextlib.suppress(OSError):
        if directory.stat().st_uid != os.getuid():
            return
        with open(directory / _LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
