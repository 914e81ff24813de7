"""The namedtuple patch in all processes of a session: the driver, the executors' ordinary Python workers, the nodes.

Runs on: driver.

    survey ──┬─ driver    namedtuple_patch.status()
             ├─ workers   short Spark jobs, until every executor and every idle worker has answered
             └─ nodes     what each child said of itself when it began                     ──► SessionStatus

    revert   driver's own revert · CleanJobs on  · the same jobs, which bring the revert along
    restore  driver's own restore · CleanJobs off · jobs that put back what was changed in workers

Spark keeps its idle workers in a queue for each pool, first in, first out, so that as many short tasks as there are
idle workers meet them all; what each task sees in ``/proc`` tells whether they have.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tfos_magic import archive, namedtuple_patch, namedtuple_worker, session
from tfos_magic.jobs import SparkJob
from tfos_magic.namedtuple_jobs import CleanJobs

if TYPE_CHECKING:
    from pyspark import SparkContext

    from tfos_magic.result import NodeInfo

_PATIENCE_S = 20.0
_CANCEL_S = 10.0
_ROUNDS = 8
_NAMES_SHOWN = 3
_PIDS_SHOWN = 4


@dataclass(frozen=True)
class ProcessStatus:
    """The patch in one process.

    Attributes
    ----------
    kind : str
        ``driver``, ``Python worker`` or ``node``.
    name : str
        Which one: ``driver``, ``executor 2``, ``worker:0``.
    host : str
    pid : int
    patch : dict
        A :class:`tfos_magic.namedtuple_patch.PatchStatus` as plain values.
    since_s : float or None
        Since when it is as it is, in seconds since the epoch; None when only the order of events is known.
    since : str
        The same in words.
    problem : str
        Why the revert has failed there; empty when it has not.
    """

    kind: str
    name: str
    host: str
    pid: int
    patch: Mapping[str, Any]
    since_s: float | None
    since: str
    problem: str = ""

    @property
    def is_patched(self) -> bool:
        """Whether PySpark's code runs there now."""
        return bool(self.patch["is_patched"])

    @property
    def state(self) -> str:
        """Return the state in a few words."""
        if self.is_patched:
            return "on"
        if self.patch["mended_count"] or (self.patch["reverted_at"] and self.kind == "Python worker"):
            return "off, reverted"
        return "off, kept off" if self.patch["is_prevented"] and self.patch["cause"] else "off"

    @property
    def classes(self) -> str:
        """How many classes are affected, and how many were until they were put right."""
        mended = self.patch["mended_count"]
        return f"{self.patch['class_count']}" + (f" (put right: {mended})" if mended else "")

    @property
    def matters(self) -> str:
        """Return the subclasses that lose their type, or did before the revert: the user's by name, others' counted."""
        return _tell_owners(self.patch["downgraded"], self.patch["owners"]) or _tell_owners(
            self.patch["rescued"], self.patch["owners"], "put right: "
        )

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row of the table, without the pid."""
        return (
            self.name if self.kind == "driver" else f"{self.kind}, {self.name}",
            self.host,
            self.state + (f" (the revert failed: {self.problem})" if self.problem else ""),
            self.patch["cause"] or "–",
            self.since,
            self.classes,
            self.matters or "–",
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "patch": dict(self.patch), "state": self.state}


@dataclass(frozen=True)
class SessionStatus:
    """The patch in all processes of a session.

    Attributes
    ----------
    driver : ProcessStatus
    workers : tuple of ProcessStatus
        The executors' ordinary Python workers that have answered.
    nodes : tuple of ProcessStatus
        Children of nodes, as they were when they began.
    spark : str
        Where the session runs; empty without one.
    executor_count : int
        How many executors there are.
    jobs_are_clean : bool
        Every job reverts the patch in its workers, before anything of it is unpickled there.
    notes : tuple of str
        What could not be asked, and why.
    """

    driver: ProcessStatus
    workers: tuple[ProcessStatus, ...] = ()
    nodes: tuple[ProcessStatus, ...] = ()
    spark: str = ""
    executor_count: int = 0
    jobs_are_clean: bool = False
    notes: tuple[str, ...] = ()

    HEADINGS = ("process", "host", "pid", "patch", "because of", "since", "classes affected", "of which matter")

    @property
    def processes(self) -> tuple[ProcessStatus, ...]:
        """The driver, the workers, the nodes."""
        return (self.driver, *self.workers, *self.nodes)

    @property
    def is_patched(self) -> bool:
        """Whether any of them is."""
        return any(process.is_patched for process in self.processes)

    @property
    def summary(self) -> str:
        """All of it in one line."""
        parts = [f"driver {self.driver.state}"]
        if self.workers:
            parts.append(f"{_count(self.workers, 'Python worker')} {_states(self.workers)}")
        if self.nodes:
            parts.append(f"{_count(self.nodes, 'node')} {_states(self.nodes)}")
        if self.spark:
            parts.append("every job reverts it first" if self.jobs_are_clean else "jobs run as they are")
        return f"namedtuple patch: {'; '.join(parts)}"

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells, without its head; processes that differ in nothing but their pid share a row."""
        pids: dict[tuple[str, ...], list[str]] = {}
        for process in self.processes:
            pids.setdefault(process.cells, []).append(str(process.pid))
        return [(*cells[:2], _shortened(pids[cells]), *cells[2:]) for cells in pids]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, the summary with them."""
        return {
            "driver": self.driver.to_json(),
            "workers": [worker.to_json() for worker in self.workers],
            "nodes": [node.to_json() for node in self.nodes],
            "spark": self.spark,
            "executor_count": self.executor_count,
            "jobs_are_clean": self.jobs_are_clean,
            "is_patched": self.is_patched,
            "notes": list(self.notes),
            "summary": self.summary,
        }

    def __str__(self) -> str:
        """Return the table as text."""
        rows = [self.HEADINGS, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.HEADINGS))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([self.summary, *lines, *self.notes])


# --- what can be asked for --------------------------------------------------------------------------------


def survey(
    spark: Any = None,
    *,
    jobs: CleanJobs | None = None,
    nodes: Iterable[NodeInfo] = (),
    timeout_s: float = _PATIENCE_S,
) -> SessionStatus:
    """Return the patch's state in all processes of a session; changes nothing.

    Parameters
    ----------
    spark : SparkSession or SparkContext, optional
        Whose executors to ask; without one, only the driver is asked.
    jobs : CleanJobs, optional
        What keeps jobs clean, if anything does.
    nodes : iterable of NodeInfo
        Of running clusters.
    timeout_s : float
        How long to wait for executors that are busy.

    Raises
    ------
    KeyboardInterrupt
        After the jobs were cancelled.
    """
    return _ask(spark, jobs, nodes, timeout_s, "report", as_is=True)


def revert(
    spark: Any = None,
    *,
    jobs: CleanJobs,
    nodes: Iterable[NodeInfo] = (),
    timeout_s: float = _PATIENCE_S,
) -> SessionStatus:
    """Take the patch out of the driver and of the workers that are there, and keep all jobs to come clean.

    Parameters and exceptions are those of :func:`survey`.
    """
    namedtuple_patch.revert()
    jobs.start()
    return _ask(spark, jobs, nodes, timeout_s, "report", as_is=False)


def restore(
    spark: Any = None,
    *,
    jobs: CleanJobs,
    nodes: Iterable[NodeInfo] = (),
    timeout_s: float = _PATIENCE_S,
) -> SessionStatus:
    """Put everything back as it was, in PySpark, in the driver, and in the workers that a job has reverted.

    Parameters and exceptions are those of :func:`survey`.
    """
    jobs.close()
    namedtuple_patch.restore()
    return _ask(spark, jobs, nodes, timeout_s, "restore", as_is=True)


def restore_workers(contexts: Iterable[SparkContext], timeout_s: float = _PATIENCE_S) -> list[str]:
    """Put back what jobs have changed in the workers of these contexts; return what could not be reached."""
    problems: list[str] = []
    for context in contexts:
        if context._jsc is not None:
            answers = _Answers(context, "restore", timeout_s, contextlib.nullcontext)
            answers.gather()
            problems += answers.notes()
    return problems


# --- asking -----------------------------------------------------------------------------------------------


def _ask(
    spark: Any, jobs: CleanJobs | None, nodes: Iterable[NodeInfo], timeout_s: float, entry: str, *, as_is: bool
) -> SessionStatus:
    known = SessionStatus(
        driver=_driver(),
        nodes=tuple(_node(node) for node in nodes if node.namedtuple_patch),
        jobs_are_clean=jobs is not None and jobs.is_on,
    )
    if spark is None:
        return known
    context = session.as_session(spark).sparkContext
    frame = jobs.left_as_is if as_is and jobs is not None else contextlib.nullcontext
    answers = _Answers(context, entry, timeout_s, frame)
    answers.gather()
    return SessionStatus(
        driver=known.driver,
        workers=tuple(answers.workers()),
        nodes=known.nodes,
        spark=str(context.master),
        executor_count=answers.executor_count,
        jobs_are_clean=known.jobs_are_clean,
        notes=tuple(answers.notes()),
    )


class _Answers:
    """Asks the executors' Python workers until all have answered, or until time or patience is over.

    Parameters
    ----------
    context : SparkContext
    entry : str
        The function of `namedtuple_worker` that runs there.
    timeout_s : float
    frame : callable() -> context manager
        What each job is started in, in its own thread.
    """

    def __init__(
        self,
        context: SparkContext,
        entry: str,
        timeout_s: float,
        frame: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._context = context
        self._frame = frame
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._ask = archive.by_value(f"tfos_magic.namedtuple_worker:{entry}", archive.build())
        self._found: dict[tuple[str, int], dict[str, Any]] = {}
        self._silent: set[tuple[str, int]] = set()
        self._error = ""

    @property
    def executor_count(self) -> int:
        """How many executors Spark has now."""
        return max(_executor_count(self._context), len({self._executor(answer) for answer in self._found.values()}))

    def gather(self) -> None:
        """Run the jobs: RDDs first, then SQL's pool where that has workers, then what was missed."""
        ways: list[Callable[[int], Any]] = [self._by_rdd]
        for turn in range(_ROUNDS):
            before = len(self._found)
            if not self._run(ways[turn % len(ways)]):
                return
            self._silent = self._unasked()
            if not self._silent and self._has_all_executors():
                return
            if len(ways) == 1 and self._has_other_pools():
                ways.append(self._by_udf)
            elif len(self._found) == before and turn >= len(ways):
                return  # those left are busy, or their pool is of another kind

    def workers(self) -> Iterator[ProcessStatus]:
        """Yield those that have answered, by executor."""
        for answer in sorted(self._found.values(), key=lambda each: (each["host"], each["executor"], each["pid"])):
            yield _worker(answer)

    def notes(self) -> list[str]:
        """Return what is missing, in sentences."""
        if self._error:
            return [self._error]
        missing = self.executor_count - len({self._executor(answer) for answer in self._found.values()})
        notes = [f"{missing} of {self.executor_count} executors have not answered: they are busy."] if missing else []
        if self._silent:
            count = len(self._silent)
            notes.append(f"{count} more Python worker{'s' * (count > 1)} could not be asked: busy, or of another pool.")
        return notes

    @staticmethod
    def _executor(answer: Mapping[str, Any]) -> tuple[str, int]:
        return answer["host"], answer["jvm_pid"]

    def _run(self, way: Callable[[int], Any]) -> bool:
        count = max(session.slot_count(self._context), 1)
        action = functools.partial(self._framed, way, count)
        group = f"tfos_magic-{uuid.uuid4().hex[:8]}"
        job = SparkJob(self._context, group, "tfos_magic: the namedtuple patch in Python workers", action)
        if not job.finish(self._deadline, cancel_s=_CANCEL_S):
            self._error = f"The executors have not answered in {self._timeout_s:.0f} s: their slots are taken."
            return False
        if job.error is not None:
            self._error = f"The executors could not be asked: {str(job.error).strip().splitlines()[0]}"
            return False
        for line in job.value:
            answer = json.loads(line)
            self._found[answer["host"], answer["pid"]] = answer
        return True

    def _framed(self, way: Callable[[int], Any], count: int) -> Any:
        with self._frame():
            return way(count)

    def _by_rdd(self, count: int) -> list[str]:
        return self._context.parallelize(range(count), count).mapPartitions(self._ask).collect()

    def _by_udf(self, count: int) -> list[str]:
        from pyspark.sql import SparkSession
        from pyspark.sql.functions import udf

        ask = udf(namedtuple_worker.once(self._ask))
        numbers = SparkSession(self._context).range(0, count, 1, count)
        return [row[0] for row in numbers.select(ask("id")).collect()]

    def _unasked(self) -> set[tuple[str, int]]:
        latest = {self._executor(answer): answer for answer in self._found.values()}
        there = {
            (answer["host"], pid) for answer in latest.values() for pool in answer["pools"].values() for pid in pool
        }
        return there - set(self._found)

    def _has_other_pools(self) -> bool:
        asked = {(answer["host"], str(answer["daemon"])) for answer in self._found.values()}
        return any(
            pool and (answer["host"], daemon) not in asked
            for answer in self._found.values()
            for daemon, pool in answer["pools"].items()
        )

    def _has_all_executors(self) -> bool:
        return len({self._executor(answer) for answer in self._found.values()}) >= _executor_count(self._context)


def _executor_count(context: SparkContext) -> int:
    return int(context._jsc.sc().taskScheduler().runningTasksByExecutors().size())


# --- what is known of each process ------------------------------------------------------------------------


def _driver() -> ProcessStatus:
    patch = namedtuple_patch.status().to_json()
    began = datetime.fromtimestamp(namedtuple_worker.started_at(os.getpid()))
    since_s = patch["reverted_at"]
    if patch["is_patched"]:
        since_s = None
        first = patch["first_affected"].rpartition(".")[2]
        since = f"PySpark's import, before {first} was made" if first else "PySpark's import"
    elif since_s is not None:
        since = f"the revert, {_clock(since_s)}"
    else:
        since = f"the process's start, {began:%H:%M:%S}"
        since_s = began.timestamp()
    return ProcessStatus("driver", "driver", socket.gethostname(), os.getpid(), patch, since_s, since)


def _worker(answer: Mapping[str, Any]) -> ProcessStatus:
    patch = answer["patch"]
    reverted_at = None if patch["is_patched"] else patch["reverted_at"]
    since_s = reverted_at or answer["born_at"]
    since = f"a job's start, {_clock(since_s)}" if reverted_at else f"its birth; daemon begun {_clock(since_s)}"
    name = f"executor {answer['executor']}"
    return ProcessStatus("Python worker", name, answer["host"], answer["pid"], patch, since_s, since, answer["problem"])


def _node(node: NodeInfo) -> ProcessStatus:
    patch = node.namedtuple_patch
    since_s = patch["reverted_at"] or node.times.get("child")
    since = f"its birth, {_clock(since_s)}" if since_s else "its birth"
    return ProcessStatus("node", node.name, node.host, node.pid, patch, since_s, since)


def _shortened(pids: Sequence[str]) -> str:
    shown = ", ".join(pids[:_PIDS_SHOWN])
    return shown if len(pids) <= _PIDS_SHOWN else f"{shown}, … ({len(pids)})"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%H:%M:%S")


def _tell_owners(names: Sequence[str], owners: Mapping[str, str], prefix: str = "") -> str:
    by_owner: dict[str, list[str]] = {}
    for name in names:
        by_owner.setdefault(owners.get(name, "other"), []).append(name)
    parts = [f"{owner}: {_some(by_owner[owner])}" for owner in ("yours", "TensorFlow", "other") if owner in by_owner]
    return prefix + "; ".join(parts) if parts else ""


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name.rpartition(".")[2] for name in names[:_NAMES_SHOWN])
    return f"{len(names)} ({shown}{', …' if len(names) > _NAMES_SHOWN else ''})"


def _count(processes: Sequence[ProcessStatus], what: str) -> str:
    return f"{len(processes)} {what}{'s' * (len(processes) > 1)}"


def _states(processes: Sequence[ProcessStatus]) -> str:
    states = sorted({process.state for process in processes})
    if len(states) == 1:
        return states[0]
    return ", ".join(f"{sum(each.state == state for each in processes)} {state}" for state in states)
