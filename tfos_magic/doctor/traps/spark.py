"""Spark's own ways: broadcasts use plain pickle, functions are frozen at the first action, namedtuples become rows.

Runs on: driver.
"""

from __future__ import annotations

import pickletools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfos_magic.doctor.case import Case, main_instances
from tfos_magic.doctor.dialects import is_of
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Node

_READ_BYTES = 64_000_000


def look(case: Case) -> Iterator[Finding]:
    """Yield what is known of Spark's own objects, and of what Spark does with the user's."""
    if case.is_nodes:
        return
    for node in case.graph:
        if is_of(node.value, "pyspark", "Broadcast"):
            yield from _plain_pickle(case, node)
    yield from _frozen(case)
    yield from _remarks(case)


def _plain_pickle(case: Case, node: Node) -> Iterator[Finding]:
    """Find what plain pickle, which broadcasts use, sends as a name of ``__main__``."""
    for name in _names_of_main(getattr(node.value, "_path", None)):
        why = f"Broadcasts use plain pickle: {name} is sent as the name __main__.{name}, which executors do not have."
        fix = f"Define {name} in a module that executors have; or capture the value itself in place of the broadcast."
        yield case.finding(node, "broadcast-plain-pickle", Verdict.BREAKS, why, fix, f"value, {name}")


def _names_of_main(path: Any) -> list[str]:
    """Return the names of ``__main__`` in the file of a broadcast, without unpickling anything."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_READ_BYTES)
    except (OSError, TypeError):
        return []
    if b"__main__" not in data:
        return []
    found: dict[str, None] = {}
    strings: list[str] = []
    memo: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL" and str(argument).startswith("__main__ "):
                found[str(argument).partition(" ")[2]] = None
            elif opcode.name == "STACK_GLOBAL" and strings[-2:-1] == ["__main__"]:
                found[strings[-1]] = None
            elif opcode.name == "MEMOIZE":
                memo.append(strings[-1] if strings else "")
            elif "GET" in opcode.name and isinstance(argument, int):
                strings.append(memo[argument] if argument < len(memo) else "")
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:  # encrypted, or cut off
        pass
    return list(found)


def _frozen(case: Case) -> Iterator[Finding]:
    """Find a user-defined function that was pickled when it was first used, with globals that have changed since."""
    root = case.graph.root
    udf = _udf_of(case.value)
    java = getattr(udf, "_judf_placeholder", None)
    if udf is None or java is None:
        return
    names = [node.step.words for node in case.graph if _is_data(node)]
    if names and _has_changed(case, udf, java):
        which = " or ".join(name.partition(" ")[2] for name in names[:3])
        why = f"It was pickled at its first use, with its globals as they were then; {which} has changed since."
        fix = f"Make the function again: {root.step.words} = udf(…); or pass the value as a column: lit(…)."
        yield case.finding(root, "frozen-globals", Verdict.WRONG, why, fix, names[0])


def function_of_udf(value: Any) -> Any:
    """Return the plain function of what ``udf()`` has made, which is what Spark pickles; anything else as it is."""
    udf = _udf_of(value)
    return value if udf is None else udf.func


def _udf_of(value: Any) -> Any:
    """Return the UserDefinedFunction behind what ``udf()`` gives: a plain function that refers to it."""
    if is_of(value, "pyspark", "UserDefinedFunction"):
        return value
    if not isinstance(value, types.FunctionType) or not str(value.__code__.co_filename).endswith("udf.py"):
        return None
    for cell in value.__closure__ or ():
        try:
            if is_of(cell.cell_contents, "pyspark", "UserDefinedFunction"):
                return cell.cell_contents
        except ValueError:
            continue
    return None


def _is_data(node: Node) -> bool:
    return node.step.words.startswith("global ") and node.is_by_value and not callable(node.value)


def _has_changed(case: Case, udf: Any, java: Any) -> bool:
    try:
        from pyspark.sql.udf import _wrap_function

        now = _wrap_function(case.spark, udf.func, udf.returnType)
        return not bool(now.command().equals(java.func().command()))
    except Exception:  # Spark's private ways differ between versions: nothing is known then
        return False


def _remarks(case: Case) -> Iterator[Finding]:
    root = case.graph.root
    value = root.value
    if isinstance(value, list | tuple) and not hasattr(value, "_fields") and value and hasattr(value[0], "_fields"):
        why = "createDataFrame makes Rows of namedtuples; their class is not kept."
        yield case.finding(root, "rows-of-namedtuples", Verdict.FINE, why, "Keep them in an RDD to keep their class.")
    instance = next(((node, cls) for node, cls in main_instances(case) if cls.__module__ == "__main__"), None)
    if instance is not None and not isinstance(value, types.FunctionType | types.MethodType | type):
        node, cls = instance
        why = (
            f"As a broadcast it would break: these use plain pickle, which sends {cls.__name__} as a name of __main__."
        )
        fix = f"Define {cls.__name__} in a module that executors have before you broadcast it."
        yield case.finding(node, "broadcast-plain-pickle", Verdict.FINE, why, fix)
