"""The examination: trace, ask the other side, look for traps, and write it down.

Runs on: driver.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic.doctor import arrival, namedtuples, names, remote, second, traps
from tfos_magic.doctor.case import Case
from tfos_magic.doctor.dialects import NodesDialect, SparkDialect, becomes_another
from tfos_magic.doctor.findings import Diagnosis, Finding, Trip, Verdict
from tfos_magic.doctor.graph import BUDGET_S, Node, Tracer, trace
from tfos_magic.doctor.round_trip import SecondInterpreter
from tfos_magic.doctor.traps.spark import function_of_udf
from tfos_magic.tracing import Step

if TYPE_CHECKING:
    from tfos_magic.cell import CellFunction

_FAST_BUDGET_S = 0.3


class Doctor:
    """Diagnoses objects, and keeps a second interpreter for it until :meth:`close`.

    Parameters
    ----------
    globals_ : mapping of str to object, optional
        The notebook's globals; those of ``__main__`` by default.
    interpreter : SecondInterpreter, optional
        One that somebody else closes.
    """

    def __init__(self, globals_: Mapping[str, Any] | None = None, interpreter: SecondInterpreter | None = None) -> None:
        self._namespace = globals_
        self._is_owner = interpreter is None
        self.interpreter = interpreter or SecondInterpreter()

    def __enter__(self) -> Doctor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the second interpreter; it starts again with the next question."""
        if self._is_owner:
            self.interpreter.close()

    def examine(
        self,
        value: Any,
        name: str = "value",
        *,
        round_trip: bool = True,
        executors: Any = None,
        fast: bool = False,
        for_nodes: bool = False,
        on_progress: Callable[[Diagnosis], None] | None = None,
    ) -> Diagnosis:
        """Diagnose one object; parameters as in :func:`tfos_magic.doctor.examine`."""
        started = time.perf_counter()
        dialect = NodesDialect() if for_nodes else SparkDialect()
        subject = value if for_nodes else function_of_udf(value)
        graph = trace(subject, name, dialect, _FAST_BUDGET_S if fast else BUDGET_S)
        case = Case(graph, dialect, self._globals, value, _context(executors), executors is not None)
        examination = _Examination(case, subject, started, on_progress)
        return examination.run(self.interpreter if round_trip and not fast else None, None if fast else executors)

    def examine_cell(
        self,
        cell: CellFunction,
        *,
        round_trip: bool = True,
        executors: Any = None,
        fast: bool = False,
        on_progress: Callable[[Diagnosis], None] | None = None,
    ) -> Diagnosis:
        """Diagnose a whole cell as ``%%tfos_train`` would ship it: everything that it takes from the notebook."""
        started = time.perf_counter()
        dialect = NodesDialect()
        captured = cell.captured
        tracer = Tracer(dialect, _FAST_BUDGET_S if fast else BUDGET_S)
        graph = tracer.trace_all([(Step(f"global {n}", n), v) for n, v in captured.items()], cell.label, cell)
        case = Case(graph, dialect, self._globals, cell, _context(executors), executors is not None)
        examination = _Examination(case, captured, started, on_progress)
        return examination.run(self.interpreter if round_trip and not fast else None, None if fast else executors)

    @property
    def _globals(self) -> Mapping[str, Any]:
        return self._namespace if self._namespace is not None else vars(sys.modules["__main__"])


class _Examination:
    """One examination, from the tracer's graph to the record.

    Parameters
    ----------
    case : Case
    subject : object
        What is pickled.
    started : float
        On the performance counter.
    on_progress : callable(Diagnosis), optional
    """

    def __init__(
        self, case: Case, subject: Any, started: float, on_progress: Callable[[Diagnosis], None] | None
    ) -> None:
        self._case = case
        self._subject = subject
        self._started = started
        self._on_progress = on_progress
        self._parcel: arrival.Parcel | None = None
        self._failure: Finding | None = None

    def run(self, interpreter: SecondInterpreter | None, executors: Any) -> Diagnosis:
        """Ask whoever is given, and say what is known."""
        if interpreter is not None or executors is not None:
            self._parcel, self._failure = _pack(self._case, self._subject)
        trip = None
        if interpreter is not None and self._parcel is not None:
            self._tell(_slow_part_of(interpreter, self._parcel, executors))
            trip = arrival.ask_second(self._case, interpreter, self._subject, self._parcel)
        found = self._look()
        if interpreter is not None:
            found += arrival.look(self._case, trip, found, interpreter)
        if executors is None or self._parcel is None:
            return self._record(found, trip)
        trips = []
        for facts in remote.ask_executors(executors, self._parcel.blob, self._parcel.question):
            trips.append(arrival.to_trip(facts["executor"], facts, self._subject, self._parcel))
            found += arrival.look_at_executor(self._case, trips[-1], facts, found)
            self._case.facts = facts
        return self._record(found, trip, trips)

    def _tell(self, awaits: str) -> None:
        if awaits and self._on_progress is not None:
            self._on_progress(self._record(self._look(), None, awaits=awaits))

    def _look(self) -> list[Finding]:
        found = list(traps.look(self._case))
        if self._failure is not None and not any(finding.verdict is Verdict.BREAKS for finding in found):
            found.append(self._failure)
        return found

    def _record(
        self, found: list[Finding], trip: Trip | None, executors: Sequence[Trip] = (), awaits: str = ""
    ) -> Diagnosis:
        case = self._case
        return Diagnosis(
            name=case.graph.root.step.words,
            kind=second.full_name(type(case.value)),
            pickles=self._failure is None and not any(_is_stopped(node) for node in case.graph),
            pickler=case.dialect.title,
            size_bytes=self._parcel.size_bytes if self._parcel is not None else case.graph.root.size_bytes,
            seconds=time.perf_counter() - self._started,
            findings=tuple(_sorted(found)),
            tree=case.graph.to_part(),
            names=tuple(names.table(case.graph, case.facts, frozenset(_patched_names(found)))),
            namedtuples=tuple(namedtuples.tables(case)),
            trip=trip,
            executors=tuple(executors),
            awaits=awaits,
        )


def _slow_part_of(interpreter: SecondInterpreter, parcel: arrival.Parcel, executors: Any) -> str:
    """Return what will take seconds, in words; empty when nothing will."""
    libraries = interpreter.will_import(parcel.question["modules"])
    if libraries:
        return f"a clean second interpreter, which imports {', '.join(libraries)} first"
    return "the executors" if executors is not None else ""


def _pack(case: Case, subject: Any) -> tuple[arrival.Parcel | None, Finding | None]:
    """Return the pickle; None, and perhaps why, where there is none."""
    if any(_is_stopped(node) for node in case.graph):
        return None, None
    try:
        return arrival.pack(case, subject), None
    except Exception as error:  # any __reduce__ may raise anything; the tracer has not seen it because it is far inside
        why = f"Pickling it fails: {type(error).__name__}: {str(error).strip().splitlines()[:1]}."
        fix = "Make it inside the function, in the task."
        return None, case.finding(case.graph.root, "unpicklable", Verdict.BREAKS, why, fix)


def _is_stopped(node: Node) -> bool:
    if node.obstacle is not None:
        return not becomes_another(node.value, node.obstacle)
    return node.error is not None


def _sorted(found: list[Finding]) -> list[Finding]:
    """Worst first, each once; within a verdict in the order in which they were met."""
    once = {(finding.trap, finding.path, finding.verdict): finding for finding in reversed(found)}
    certain = {finding.trap for finding in found if finding.verdict is not Verdict.FINE}
    told = [each for each in reversed(once.values()) if each.verdict is not Verdict.FINE or each.trap not in certain]
    return sorted(told, key=lambda finding: -finding.verdict)


def _patched_names(found: list[Finding]) -> Iterator[str]:
    for finding in found:
        if finding.trap in ("patched-module", "module-state", "stale-module") and finding.verdict is Verdict.WRONG:
            for step in finding.path:
                if step.startswith(("global ", "closure ")):
                    yield step.partition(" ")[2]


def _context(executors: Any) -> Any:
    """Return the SparkContext that is asked, else the one that is alive, else None."""
    pyspark = sys.modules.get("pyspark")
    if executors is not None:
        try:
            return getattr(executors, "sparkContext", executors)
        except Exception:  # Spark Connect's sessions raise where classic ones have it
            return None
    return getattr(getattr(pyspark, "SparkContext", None), "_active_spark_context", None)
