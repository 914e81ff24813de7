"""Functions that do not do what they seem to: late binding, and changes that stay where they are made.

Runs on: driver.
"""

from __future__ import annotations

import ast
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

from tfos_magic.doctor import code
from tfos_magic.doctor.case import Case, is_users_code
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Node

_LOOKED_AT = 10_000
_WRITES = frozenset({"append", "extend", "insert", "add", "update", "appendleft", "setdefault", "subtract", "write"})
_COLLECTIONS = (list, dict, set, deque, bytearray)


def look(case: Case) -> Iterator[Finding]:
    """Yield what is known of functions."""
    yield from _late_binding(case)
    yield from _changes_that_stay(case)


# --- late binding ------------------------------------------------------------------------------------------


def _late_binding(case: Case) -> Iterator[Finding]:
    """Functions made by one piece of code, in one container, that share every variable: all see its last value."""
    for node in case.graph:
        functions = _functions_in(node.value)
        groups: dict[int, list[types.FunctionType]] = {}
        for function in functions:
            groups.setdefault(id(function.__code__), []).append(function)
        for group in groups.values():
            shared = _shared_variable(group)
            if shared is not None:
                name, value = shared
                why = f"{len(group)} functions made by one line share one {name}, and all see its last value{value}."
                fix = f"Bind it when each is made: lambda …, {name}={name}: …"
                yield case.finding(node, "late-binding", Verdict.WRONG, why, fix)


def _functions_in(value: Any) -> list[types.FunctionType]:
    if isinstance(value, dict):
        items: list[Any] = list(dict.values(value))[:_LOOKED_AT]
    elif isinstance(value, list | tuple):
        items = [*value[:_LOOKED_AT]] if type(value) in (list, tuple) else []
    else:
        items = list(value)[:_LOOKED_AT] if type(value) is set else []
    return list({id(each): each for each in items if isinstance(each, types.FunctionType)}.values())


def _shared_variable(group: list[types.FunctionType]) -> tuple[str, str] | None:
    if len(group) < 2:
        return None
    first, *others = group
    for other in others:
        is_alike = (
            other.__globals__ is first.__globals__
            and _same(other.__closure__, first.__closure__)
            and _same(other.__defaults__, first.__defaults__)
            and other.__kwdefaults__ == first.__kwdefaults__
            and vars(other) == vars(first)
        )
        if not is_alike:
            return None
    known = code.captured(first)
    # What a loop goes through is data; modules and functions are there to be shared.
    names = [n for n, v in known.items() if not isinstance(v, types.ModuleType | types.FunctionType | type)]
    closure = [name for name in names if name in first.__code__.co_freevars]
    candidates = closure or names
    if not candidates:
        return None
    value = known[candidates[0]]
    return candidates[0], f", {value!r}" if type(value) in (int, float, str, bool) and len(repr(value)) < 40 else ""


def _same(first: Any, second: Any) -> bool:
    if first is None or second is None:
        return first is second
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


# --- changes that stay in the task -------------------------------------------------------------------------


def _changes_that_stay(case: Case) -> Iterator[Finding]:
    for node, function in case.graph.functions:
        if not _is_called_by_task(node) or not is_users_code(function):
            continue
        for name, what in _changes(function):
            why = f"It {what}, in a copy of {name} that stays in the task: the driver's own is as before."
            fix = f"Return the values and put them together on the driver; or sc.accumulator() in place of {name}."
            if case.is_nodes:
                fix = "Return the values: each node's come back in the result."
            yield case.finding(node, "mutated-global", Verdict.WRONG, why, fix, code.step_to(function, name))


def _is_called_by_task(node: Node) -> bool:
    """Not a method: what it changes, of globals, is the same trap, but its object is what one looks at."""
    return not any(isinstance(above.value, type) for above in list(node.chain)[1:])


def _changes(function: types.FunctionType) -> Iterator[tuple[str, str]]:
    known = code.captured(function)
    assigned = [*code.global_writes(function), *sorted(code.closure_writes(function))]
    for name in assigned:
        value = known.get(name, function.__globals__.get(name))
        # None is what is made on first use, once per Python worker: that works.
        if value is not None and type(value).__module__.partition(".")[0] not in ("pyspark", "threading"):
            yield name, f"assigns {name}"
    for name, value in known.items():
        if name not in assigned and isinstance(value, _COLLECTIONS) and _is_only_written(function, name):
            yield name, f"only writes to {name}"


def _is_only_written(function: types.FunctionType, name: str) -> bool:
    """Tell whether all that a function does with a collection is to add to it: what it reads may be a cache."""
    tree = code.definition(function)
    if tree is None or isinstance(tree, ast.Lambda):
        return tree is not None and _is_write(tree.body, name) and _count(tree.body, name) == 1
    mentions = sum(_count(each, name) for each in tree.body)
    within = 0
    for statement in _statements(tree):
        if (isinstance(statement, ast.Expr) and _is_write(statement.value, name)) or (
            isinstance(statement, ast.Assign | ast.AugAssign) and _is_item_write(statement, name)
        ):
            within += _count(statement, name)
    return within > 0 and within == mentions


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.Assign | ast.AugAssign):
            yield node


def _count(node: ast.AST, name: str) -> int:
    return sum(isinstance(each, ast.Name) and each.id == name for each in ast.walk(node))


def _is_write(node: ast.expr, name: str) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in _WRITES:
        return False
    target: ast.expr = node.func.value
    while isinstance(target, ast.Subscript):  # found[key].append(…)
        target = target.value
    return isinstance(target, ast.Name) and target.id == name


def _is_item_write(node: ast.Assign | ast.AugAssign, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(
        isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id == name
        for target in targets
    )
