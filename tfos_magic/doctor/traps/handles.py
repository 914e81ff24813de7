"""What belongs to one process: locks, files, sessions, and what cannot be pickled for other reasons.

Runs on: driver.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from tfos_magic.doctor import code
from tfos_magic.doctor.case import Case
from tfos_magic.doctor.dialects import becomes_another
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Node

_LISTED = 20


def look(case: Case) -> Iterator[Finding]:
    """Yield what stops the pickler."""
    stopped = [node for node in case.graph if node.obstacle is not None or node.error is not None]
    for node in stopped[:_LISTED]:
        yield _failed(case, node) if node.obstacle is None else _known(case, node)
    for node in case.graph:
        if node.is_by_name:
            yield _by_name(case, node)


def _known(case: Case, node: Node) -> Finding:
    obstacle = node.obstacle
    if obstacle is None:  # for the type checker: look() has asked
        raise ValueError(node)
    fix = obstacle.fix if case.is_nodes or obstacle.in_spark is None else obstacle.in_spark
    if becomes_another(node.value, obstacle) and not case.is_nodes:
        what = "a StringIO with all that is in it" if obstacle.trap == "open-file" else obstacle.arrives_as
        return case.finding(node, obstacle.trap, Verdict.WRONG, f"It is {obstacle.what}, and arrives as {what}.", fix)
    generic = _singledispatch_above(node) if obstacle.trap == "weakref" else None
    if generic is not None:
        why = "functools.singledispatch keeps its functions under weak references, which point into this process."
        return case.finding(generic, "singledispatch", Verdict.BREAKS, why, _SINGLEDISPATCH_FIX)
    if node.parent is not None and isinstance(node.parent.value, functools.cached_property):
        return case.finding(node.parent, "cached-property", Verdict.BREAKS, _CACHED_PROPERTY, _CACHED_PROPERTY_FIX)
    return _dragged(case, node) or case.finding(
        node, obstacle.trap, Verdict.BREAKS, f"It is {obstacle.what}. {obstacle.why}", fix
    )


_CACHED_PROPERTY = "Up to Python 3.11 functools.cached_property has a lock in it, and the class travels with it."
_CACHED_PROPERTY_FIX = "@property in place of it, with the value kept in self; or the class in a module."
_SINGLEDISPATCH_FIX = "Put the function and what it registers into a module that executors have, or dispatch with if."


def _singledispatch_above(node: Node) -> Node | None:
    for above in node.chain:
        if isinstance(above.value, types.FunctionType) and {"register", "dispatch"} <= set(vars(above.value)):
            return above
    return None


# --- self drags all of itself along ------------------------------------------------------------------------


def _dragged(case: Case, node: Node) -> Finding | None:
    """Return a finding where a function takes a whole object along for an attribute of it that is not this one."""
    chain = list(node.chain)[::-1]
    for position, holder in enumerate(chain[:-2]):
        dragged, attribute = chain[position + 1], chain[position + 2]
        name = _name_of_dragged(holder, dragged)
        if name is None or not attribute.step.words.startswith("attribute "):
            continue
        function: Any = holder.value.__func__ if isinstance(holder.value, types.MethodType) else holder.value
        used = code.used_attributes(function, name)
        failing = attribute.step.words.removeprefix("attribute ")
        if failing in used or (isinstance(holder.value, types.MethodType) and not used):
            continue
        return _say_dragged(case, node, holder, name, sorted(used), failing)
    return None


def _name_of_dragged(holder: Node, dragged: Node) -> str | None:
    if isinstance(holder.value, types.MethodType) and dragged.step.words == "self":
        names = holder.value.__func__.__code__.co_varnames if hasattr(holder.value.__func__, "__code__") else ()
        return names[0] if names else None
    if isinstance(holder.value, types.FunctionType) and dragged.step.words == "closure self":
        return "self"
    return None


def _say_dragged(case: Case, node: Node, holder: Node, name: str, used: list[str], failing: str) -> Finding:
    what = node.obstacle.what if node.obstacle is not None else "something that cannot be pickled"
    uses = f"uses {' and '.join(f'{name}.{each}' for each in used[:3])}" if used else f"mentions {name}"
    why = f"It {uses}, so all of {name} travels, and {name}.{failing} leads to {what}."
    if isinstance(holder.value, types.MethodType):
        fix = "Pass a function that takes what it needs as arguments, in place of a bound method."
    else:
        fix = f"{used[0]} = {name}.{used[0]}  # before the function, which then uses {used[0]}" if used else ""
    return case.finding(node, "drags-self", Verdict.BREAKS, why, fix or f"Leave {name} out of the function.")


# --- other reasons -----------------------------------------------------------------------------------------


def _failed(case: Case, node: Node) -> Finding:
    error = node.error
    if isinstance(error, RecursionError) or isinstance(getattr(error, "__cause__", None), RecursionError):
        why = "It is nested too deeply to be pickled."
        return case.finding(node, "too-deep", Verdict.BREAKS, why, "Make it flatter, or make it in the task.")
    text = str(error).strip().split("\n")[0][:200]
    why = f"Pickling it fails: {type(error).__name__}: {text}."
    return case.finding(node, "unpicklable", Verdict.BREAKS, why, "Make it inside the function, in the task.")


def _by_name(case: Case, node: Node) -> Finding:
    name = getattr(node.value, "__qualname__", None) or getattr(node.value, "__name__", None) or "?"
    why = f"It is pickled as the name __main__.{name}, and the __main__ of an executor is Spark's own."
    if isinstance(node.value, functools._lru_cache_wrapper):
        fix = f"Take {name}.__wrapped__ along, or put the cached function into a module that executors have."
        return case.finding(node, "lru-cache", Verdict.BREAKS, f"A cached function is made in C. {why}", fix)
    if type(node.value).__name__ == "NewType":
        fix = "Use the plain type in code that travels, or define it in a module that executors have."
        return case.finding(node, "new-type", Verdict.BREAKS, why, fix)
    fix = "Put it into a module that executors have."
    return case.finding(node, "by-name-in-main", Verdict.BREAKS, why, fix)
