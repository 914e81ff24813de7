"""What arrives: the question to the other side, and what its answer means.

Runs on: driver.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfos_magic.doctor import names, second
from tfos_magic.doctor.case import Case
from tfos_magic.doctor.findings import Finding, Trip, Verdict
from tfos_magic.doctor.graph import Node
from tfos_magic.doctor.round_trip import DEADLINE_S, SecondInterpreter
from tfos_magic.doctor.traps import modules
from tfos_magic.doctor.traps.errors import is_rebuilt_by_call

SENT_BYTES = 200_000_000
"""What is larger is not sent for a look."""

_SEARCH_S = 3.0
_SEARCHED_PARTS = 20
_SECOND = "a clean second interpreter"


@dataclasses.dataclass(frozen=True)
class Parcel:
    """A pickle with the question that goes with it."""

    blob: bytes
    size_bytes: int
    question: Mapping[str, Any]


def pack(case: Case, subject: Any) -> Parcel:
    """Pickle `subject` and its exceptions; raises what pickling raises."""
    data = case.dialect.dumps(subject)
    rebuilt = [(node.value, node.value.args) for node in case.graph if is_rebuilt_by_call(node.value)]
    blob = case.dialect.dumps((subject, rebuilt)) if rebuilt else data
    cls = type(subject)
    question = {
        "has_exceptions": bool(rebuilt),
        "pickler": "cloudpickle" if case.is_nodes else "pyspark.cloudpickle",
        "mro": [second.full_name(each) for each in cls.__mro__],
        "methods": [name for name in _public_methods(cls)],
        "modules": names.needed_modules(case.graph),
        "names": [item.key for item in names.comparable_names(case.graph)],
    }
    return Parcel(blob, len(data), question)


def _public_methods(cls: type) -> Iterator[str]:
    for base in cls.__mro__[:-1]:
        if base.__module__ == "builtins":
            continue
        for name, value in vars(base).items():
            if not name.startswith("_") and callable(value):
                yield name


def ask_second(case: Case, interpreter: SecondInterpreter, subject: Any, parcel: Parcel) -> Trip:
    """Send it through the second interpreter; the facts are then the case's."""
    if len(parcel.blob) > SENT_BYTES:
        return Trip(_SECOND, "not asked", f"{parcel.size_bytes / 1e6:.0f} MB are too much for a look")
    question = {**parcel.question, "path": [str(case.added_files)] if case.added_files else []}
    facts = interpreter.ask(parcel.blob, question, modules=question["modules"])
    case.facts = facts
    return to_trip(_SECOND, facts, subject, parcel)


def to_trip(where: str, facts: Mapping[str, Any], subject: Any, parcel: Parcel) -> Trip:
    """Return the facts as a record."""
    outcome, error = _outcome(facts)
    return Trip(
        where=where,
        outcome=outcome,
        error=error,
        type_before=second.full_name(type(subject)),
        type_after=str(facts.get("type", "")),
        is_instance=not facts["missing_classes"] if "missing_classes" in facts else None,
        is_equal=facts.get("is_equal"),
        is_same=facts.get("is_same"),
        lost_methods=tuple(facts.get("lost_methods", ())),
        size_before=parcel.size_bytes,
        size_after=int(facts.get("size_bytes", 0)),
        seconds=float(facts.get("seconds", 0.0)),
        python=str(facts.get("python", "")),
        is_namedtuple_patched=facts.get("is_namedtuple_patched"),
        modules=tuple((name, names.version_of(each)) for name, each in facts.get("modules", {}).items()),
    )


def _outcome(facts: Mapping[str, Any]) -> tuple[str, str]:
    if "no_interpreter" in facts:
        return "not asked", str(facts["no_interpreter"])
    if facts.get("error"):
        return "failed", f"{facts['error']['type']}: {facts['error']['text']}"
    if "died_of" in facts:
        return "died", f"signal {facts['died_of']}"
    if "type" not in facts:
        return "timed out", f"no answer in {DEADLINE_S:.0f} s"
    return "arrived", ""


# --- what it means -----------------------------------------------------------------------------------------


def look(case: Case, trip: Trip | None, found: Sequence[Finding], interpreter: SecondInterpreter) -> Iterator[Finding]:
    """Yield what the second interpreter has seen, and no trap has explained."""
    is_explained = any(finding.verdict is Verdict.BREAKS for finding in found)
    if trip is None or is_explained:
        return
    if trip.outcome in ("failed", "died"):
        node = _locate(case, interpreter, str((case.facts.get("error") or {}).get("type", "")))
        yield _fails(case, node, trip.error)
    elif trip.outcome == "timed out":
        why = f"It could not be unpickled in {DEADLINE_S:.0f} s, in a clean interpreter."
        yield case.finding(case.graph.root, "slow-arrival", Verdict.COSTLY, why, "Make it in the task.")
    elif trip.outcome == "arrived" and not any(f.verdict is Verdict.WRONG and len(f.path) == 1 for f in found):
        yield from _changed(case, trip)


def _fails(case: Case, node: Node, error: str) -> Finding:
    if "Could not locate" in error or "Could not interpret" in error:
        fix = "Define what it names in a module that executors have, or build the model in the task."
        return case.finding(node, "keras-main-layer", Verdict.BREAKS, f"It pickles, and cannot be read: {error}.", fix)
    if "Can't get attribute" in error and "__main__" in error:
        fix = "Put it into a module that executors have."
        return case.finding(node, "by-name-in-main", Verdict.BREAKS, f"It is pickled by its name: {error}.", fix)
    why = f"It pickles, and cannot be unpickled in a clean interpreter: {error}."
    return case.finding(node, "fails-on-arrival", Verdict.BREAKS, why, "Make it inside the function, in the task.")


def _locate(case: Case, interpreter: SecondInterpreter, error: str) -> Node:
    """Return the smallest part that fails in the same way when it is sent by itself."""
    node = case.graph.root
    until = time.monotonic() + _SEARCH_S
    while time.monotonic() < until:
        parts = [part for part in node.parts if part.is_named and part.is_by_value]
        guilty = next((part for part in parts[:_SEARCHED_PARTS] if _fails_alone(case, interpreter, part, error)), None)
        if guilty is None:
            return node
        node = guilty
    return node


def _fails_alone(case: Case, interpreter: SecondInterpreter, part: Node, error: str) -> bool:
    try:
        blob = case.dialect.dumps(part.value)
    except Exception:  # it needs what is around it
        return False
    facts = interpreter.ask(blob, {}, deadline_s=_SEARCH_S)
    return str((facts.get("error") or {}).get("type", "died" if "died_of" in facts else "none")) == (error or "died")


def _changed(case: Case, trip: Trip) -> Iterator[Finding]:
    root = case.graph.root
    if trip.type_after != trip.type_before:
        why = f"A {trip.type_before} is sent, and a {trip.type_after} arrives."
        yield case.finding(
            root, "type-changed", Verdict.WRONG, why, "Send what it is made of, and make it in the task."
        )
    elif trip.is_instance is False or trip.lost_methods:
        lost = (
            f"without {', '.join(trip.lost_methods[:3])}" if trip.lost_methods else "without some of its base classes"
        )
        yield case.finding(root, "type-changed", Verdict.WRONG, f"It arrives {lost}.", "Define its class in a module.")
    error = case.facts.get("back_error")
    if error and not callable(case.value):
        why = f"It arrives, and cannot come back: {error['type']}: {error['text']}."
        yield case.finding(root, "fails-on-way-back", Verdict.BREAKS, why, "Return plain values made of it.")


# --- executors ---------------------------------------------------------------------------------------------


def look_at_executor(case: Case, trip: Trip, facts: Mapping[str, Any], found: Sequence[Finding]) -> Iterator[Finding]:
    """Yield what is different on one executor."""
    there = dataclasses.replace(case, facts=facts, executor=trip.where)
    known = {(finding.trap, finding.path) for finding in found}
    here = ".".join(map(str, sys.version_info[:2]))
    if trip.python and not trip.python.startswith(f"{here}."):
        why = f"{trip.where} runs Python {trip.python}, the driver {here}: code cannot travel between minor versions."
        fix = "Set spark.pyspark.python (or PYSPARK_PYTHON) to the same version on both sides."
        yield case.finding(case.graph.root, "other-python", Verdict.BREAKS, why, fix)
        return
    differs = [*modules.look(there), *_versions(case, trip)]
    for finding in differs:
        if (finding.trap, finding.path) not in known and finding.verdict is not Verdict.FINE:
            is_named = trip.where in finding.why
            yield finding if is_named else dataclasses.replace(finding, why=f"On {trip.where}: {finding.why}")
    if trip.outcome in ("failed", "died") and not any(f.verdict is Verdict.BREAKS for f in (*differs, *found)):
        yield _fails(case, case.graph.root, f"on {trip.where}: {trip.error}")
    if trip.is_namedtuple_patched and _has_namedtuples(case):
        why = f"PySpark's namedtuple patch is on in {trip.where}: namedtuples that come back are bare ones."
        fix = "%tfos_namedtuple revert"
        yield case.finding(case.graph.root, "namedtuple-patch", Verdict.WRONG, why, fix)


def _versions(case: Case, trip: Trip) -> Iterator[Finding]:
    for name, there in trip.modules:
        described = second.describe_module(name)
        here = str((described or {}).get("version") or "")
        if there not in ("missing", "built in") and here and "/" not in there and there != here:
            why = f"It needs {name}: the driver has {here}, and {there} is there."
            fix = f"Install {name} {here} on the executors, or {there} on the driver."
            yield case.finding(case.graph.root, "other-version", Verdict.WRONG, why, fix)


def _has_namedtuples(case: Case) -> bool:
    kinds = (node.value if isinstance(node.value, type) else type(node.value) for node in case.graph)
    return any(issubclass(kind, tuple) and hasattr(kind, "_fields") for kind in kinds)
