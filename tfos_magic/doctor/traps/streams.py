"""What has a place in a sequence: random number generators and iterators. Every task gets a copy at the same place.

Runs on: driver.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

from tfos_magic.doctor.case import Case
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Node

_GENERATORS = frozenset(
    {
        ("random", "Random"),
        ("numpy.random", "Generator"),
        ("numpy.random", "RandomState"),
        ("numpy.random", "BitGenerator"),
        ("tensorflow", "Generator"),
        ("keras", "SeedGenerator"),
        ("torch", "Generator"),
    }
)
_ITERATORS = frozenset({"zip", "map", "filter", "enumerate", "reversed"})


def look(case: Case) -> Iterator[Finding]:
    """Yield the generators and iterators that the user holds himself."""
    for node in case.users_nodes:
        if not node.is_by_value:
            continue
        if _is_rng(node) and not _is_one_of_many(node) and not (node.parent is not None and _is_rng(node.parent)):
            yield _rng(case, node)
        elif _is_iterator(node) and not (node.parent is not None and _is_iterator(node.parent)):
            why = "Each task gets a copy of the iterator at the same place, and yields the same values."
            fix = "Make it inside the function; or give each task its part of the data with sc.parallelize(values)."
            yield case.finding(node, "captured-iterator", Verdict.WRONG, why, fix)


def _is_rng(node: Node) -> bool:
    for kind in type(node.value).__mro__:
        for module, name in _GENERATORS:
            if kind.__name__ == name and (kind.__module__ == module or kind.__module__.startswith(f"{module}.")):
                return True
    return False


def _is_one_of_many(node: Node) -> bool:
    """One generator for each task is how it should be."""
    holder = node.parent
    return holder is not None and isinstance(holder.value, list | tuple) and sum(map(_is_rng, holder.parts)) > 1


def _rng(case: Case, node: Node) -> Finding:
    owner = node.parent.value if node.parent is not None else None
    if isinstance(owner, types.MethodType | types.BuiltinMethodType) and node.step.words == "self":
        name = owner.__name__
        why = f"{name} is a method of a generator, whose state travels with it: all tasks draw the same numbers."
        return case.finding(node, "captured-rng", Verdict.WRONG, why, _own_module(owner, name))
    why = "Each task gets a copy of the generator in the same state: all tasks draw the same numbers."
    fix = "Make it inside the function from a seed and the task's number: TaskContext.get().partitionId()."
    if case.is_nodes:
        fix = "Make it inside the cell from a seed and the node's number: ctx.executor_id."
    return case.finding(node, "captured-rng", Verdict.WRONG, why, fix)


def _own_module(owner: types.MethodType | types.BuiltinMethodType, name: str) -> str:
    module = "numpy.random" if type(owner.__self__).__module__.startswith("numpy") else "random"
    return f"import {module}, and call {module}.{name}(…) in the function: each Python worker has a state of its own."


def _is_iterator(node: Node) -> bool:
    cls = type(node.value)
    if cls.__module__ == "itertools":
        return hasattr(cls, "__next__")
    return cls.__module__ == "builtins" and (cls.__name__.endswith("_iterator") or cls.__name__ in _ITERATORS)
