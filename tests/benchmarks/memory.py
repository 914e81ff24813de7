"""How much memory the processes of a cluster use, role by role, looked at several times a second.

    executor's JVM ── pyspark.daemon ─┬─ Python workers: they feed                         "feeder"
                                      │    └─ forked or started by them, wherever it is    "node"
                                      └─ …

Three figures: anonymous memory (``RssAnon``: what the process wrote itself; after a fork it is counted in both), the
proportional share (``Pss``: libraries, mapped files and forked pages too, divided by how many processes share them),
and the blocks of open files without a name: what waits there is in no process's memory, and may be in the system's.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from stat import S_ISREG

import psutil

PERIOD_S = 0.2
ROLES = ("node", "feeder")


@dataclass(frozen=True)
class Usage:
    """Bytes of one or several processes."""

    anonymous: int = 0
    proportional: int = 0
    in_files: int = 0

    def peak(self, other: Usage) -> Usage:
        """Return the larger of each figure; they need not be of the same moment."""
        return Usage(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Seen:
    """What decides a process's role."""

    pid: int
    parent: int
    command: str


def roles(processes: Iterable[Seen], driver_pid: int) -> dict[int, str]:
    """Return pid → ``node`` or ``feeder``; processes of other roles are left out.

    A node's processes are all that are neither Spark's own nor the driver: TensorFlowOnSpark forks them from a Python
    worker, so they bear its command; ours are started anew and may have init for a parent.
    """
    seen = {process.pid: process for process in processes}
    java = {pid for pid, process in seen.items() if re.match(r"\S*java\b|\S*bash\b", process.command)}
    daemons = {pid for pid, process in seen.items() if "pyspark.daemon" in process.command and process.parent in java}
    feeders = {pid for pid, process in seen.items() if process.parent in daemons}
    return {
        pid: "feeder" if pid in feeders else "node"
        for pid in seen
        if pid not in java | daemons | {driver_pid} and seen[pid].command
    }


def usage(pids: Iterable[int]) -> Usage:
    """Return the memory of some processes together; those that have gone use none."""
    anonymous = proportional = 0
    files: dict[tuple[int, int], int] = {}
    for pid in pids:
        try:
            anonymous += parse_kib(Path(f"/proc/{pid}/status").read_text(), "RssAnon")
            proportional += parse_kib(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss")
            files.update(nameless_files(pid))
        except OSError:
            continue
    return Usage(anonymous, proportional, sum(files.values()))


def nameless_files(pid: int) -> dict[tuple[int, int], int]:
    """Return device and inode → bytes of a process's open regular files that have no name any more."""
    sizes = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            status = os.stat(descriptor)
        except OSError:  # closed meanwhile
            continue
        if S_ISREG(status.st_mode) and status.st_nlink == 0:
            sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sizes


def parse_kib(text: str, name: str) -> int:
    """Return the bytes of a line like ``Pss:   12 kB``; 0 without one."""
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


class MemoryWatch:
    """Notes the peaks of each role from its start to its end.

    Parameters
    ----------
    find : callable() -> iterable of psutil.Process
    driver_pid : int
    """

    def __init__(self, find: Callable[[], Iterable[psutil.Process]], driver_pid: int) -> None:
        self.peaks: Mapping[str, Usage] = dict.fromkeys(ROLES, Usage())
        self.before: Mapping[str, Usage] = self.peaks
        self._find = find
        self._driver_pid = driver_pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def begin(self) -> None:
        """Note what is used before the rows come, and watch from now on."""
        self.before = self.now()
        self._thread.start()

    def now(self) -> dict[str, Usage]:
        """Return what each role uses at this moment, all its processes together."""
        role_of = roles(_look(self._find()), self._driver_pid)
        return {role: usage(pid for pid, its_role in role_of.items() if its_role == role) for role in ROLES}

    def _watch(self) -> None:
        while not self._is_over.wait(PERIOD_S):
            now = self.now()
            self.peaks = {role: self.peaks[role].peak(now[role]) for role in ROLES}


def _look(processes: Iterable[psutil.Process]) -> list[Seen]:
    seen = []
    for process in processes:
        try:
            seen.append(Seen(process.pid, process.ppid(), " ".join(process.cmdline())))
        except psutil.NoSuchProcess:
            continue
    return seen
