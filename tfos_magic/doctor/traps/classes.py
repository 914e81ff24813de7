"""Classes of the notebook, which travel by value: what they lose, and what they overwrite when they come home.

Runs on: driver.
"""

from __future__ import annotations

import ast
import enum
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

from tfos_magic.doctor import code
from tfos_magic.doctor.case import Case, main_instances
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Node

_MUTABLE = (list, dict, set, bytearray, deque)
_CLASS_MAKERS = frozenset({"namedtuple", "NamedTuple", "make_dataclass", "type", "new_class"})
_ASKED_WITH = frozenset({"get", "pop", "setdefault", "getattr", "next"})


def look(case: Case) -> Iterator[Finding]:
    """Yield what is known of the classes and instances that travel."""
    if not case.is_nodes:
        yield from _leak_back(case)
        yield from _class_in_task(case)
    yield from _defined_again(case)
    yield from _lost_slots(case)
    yield from _lost_identity(case)


# --- class leak-back ---------------------------------------------------------------------------------------


def _leak_back(case: Case) -> Iterator[Finding]:
    """Find classes that would get the state of their copies when these come home.

    Their methods then have globals of their own, and their attributes are as they were. Where nothing comes home,
    nothing happens: of a function, only what it gives back counts.
    """
    homecomers = _homecomers(case)
    for node, cls in case.graph.classes:
        if cls.__module__ != "__main__" or id(cls) not in homecomers:
            continue
        reasons = [*_live_globals(cls), *_live_attributes(cls)]
        if not reasons:
            continue
        what, fix = reasons[0]
        why = f"When one comes back, cloudpickle gives the driver's {cls.__name__} the state of the copy: {what}."
        yield case.finding(_shown_at(case, node, cls), "class-leak-back", Verdict.WRONG, why, fix)


def _homecomers(case: Case) -> set[int]:
    """Ids of the classes of which instances may come back."""
    root = case.graph.root
    function = _function_of(root.value)
    if function is None:
        return {id(cls) for _, cls in case.graph.classes}
    tree = code.definition(function)
    if tree is None:
        return set()
    known = code.captured(function)
    named = [known.get(name) for name in (*code.calls_given_back(tree), *code.names_given_back(tree))]
    return {id(each if isinstance(each, type) else type(each)) for each in named}


def _function_of(value: Any) -> types.FunctionType | None:
    if isinstance(value, types.MethodType):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def _shown_at(case: Case, node: Node, cls: type) -> Node:
    """Return the instance through which the class was met, where there is one."""
    return next((each for each, kind in main_instances(case) if kind is cls), node)


def _live_globals(cls: type) -> Iterator[tuple[str, str]]:
    for name, function in _methods(cls):
        for read in code.global_reads(function):
            value = function.__globals__.get(read)
            if read in function.__globals__ and _is_live(value):
                what = f"{cls.__name__}.{name} then reads a {read} of its own, as it was when it was sent"
                yield what, f"Give {cls.__name__} its {read} as an attribute or argument, or define {_in_module(cls)}."


def _in_module(cls: type) -> str:
    return f"{cls.__name__} in a module that executors have"


def _is_live(value: Any) -> bool:
    """Tell data of the notebook; modules, functions and classes stay what they are."""
    if isinstance(value, types.ModuleType | type | types.FunctionType | types.BuiltinFunctionType | enum.Enum):
        return False
    return type(value).__module__.partition(".")[0] not in ("typing", "logging", "pyspark", "re")


def _live_attributes(cls: type) -> Iterator[tuple[str, str]]:
    if issubclass(cls, enum.Enum) or hasattr(cls, "_fields"):
        return
    for name, value in vars(cls).items():
        if isinstance(value, _MUTABLE) and not (name.startswith("__") and name.endswith("__")):
            what = f"{cls.__name__}.{name} is replaced by a copy of the {type(value).__name__} as it was sent"
            yield what, f"Keep {name} outside the class, in a global of the notebook, or define {_in_module(cls)}."
    for name, function in _methods(cls):
        for written in _class_writes(cls, function):
            what = f"{cls.__name__}.{written}, which {name} sets, gets the value that it had when it was sent"
            yield what, f"Keep {written} outside the class, in a global of the notebook, or define {_in_module(cls)}."


def _methods(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    for name, value in vars(cls).items():
        candidates: tuple[Any, ...] = (value,)
        if isinstance(value, staticmethod | classmethod):
            candidates = (value.__func__,)
        elif isinstance(value, property):
            candidates = (value.fget, value.fset, value.fdel)
        for each in candidates:
            if isinstance(each, types.FunctionType):
                yield name, each


def _class_writes(cls: type, function: types.FunctionType) -> Iterator[str]:
    """Attributes of the class itself that a method assigns: ``P.count += 1``, ``type(self).count = …``."""
    tree = code.definition(function)
    is_of_class = isinstance(vars(cls).get(function.__name__), classmethod)
    first = function.__code__.co_varnames[:1] if is_of_class else ()
    for node in code.own_nodes(tree) if tree is not None else ():
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr in vars(cls) and _is_class(target.value, cls, first):
                yield target.attr


def _is_class(node: ast.expr, cls: type, first: tuple[str, ...]) -> bool:
    if isinstance(node, ast.Name):
        return node.id == cls.__name__ or node.id in first
    if isinstance(node, ast.Attribute):
        return node.attr == "__class__"
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"


# --- the others --------------------------------------------------------------------------------------------


def _class_in_task(case: Case) -> Iterator[Finding]:
    """Find a function that makes a class and gives back one of it: another class at every call."""
    function = _function_of(case.value)
    tree = code.definition(function) if function is not None and case.graph.root.is_by_value else None
    if tree is None:
        return
    made = {each.name for each in code.own_nodes(tree) if isinstance(each, ast.ClassDef)}
    for each in code.own_nodes(tree):
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Call) and _makes_class(each.value):
            made.update(target.id for target in each.targets if isinstance(target, ast.Name))
    for name in sorted(made & (code.calls_given_back(tree) | code.names_given_back(tree))):
        why = f"Each call makes a class {name} of its own: of two results, neither is an instance of the other's class."
        fix = f"Define {name} outside the function, in a cell of its own or in a module."
        yield case.finding(case.graph.root, "class-in-task", Verdict.WRONG, why, fix)


def _makes_class(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in _CLASS_MAKERS and (name != "type" or len(call.args) == 3)


def _defined_again(case: Case) -> Iterator[Finding]:
    """Find instances of classes that have been defined again since."""
    told: set[int] = set()
    for node in case.graph:
        cls = type(node.value)
        if cls.__module__ != "__main__" or id(cls) in told or "<locals>" in cls.__qualname__:
            continue
        now = _named(case, cls.__qualname__)
        if isinstance(now, type) and now is not cls and now.__module__ == "__main__" and not issubclass(now, cls):
            told.add(id(cls))
            why = f"{cls.__name__} was defined again since it was made: isinstance(…, {cls.__name__}) is False for it."
            fix = f"Run the cell that makes it again, so that it is of the new {cls.__name__}."
            yield case.finding(node, "class-defined-again", Verdict.WRONG, why, fix)


def _named(case: Case, qualname: str) -> Any:
    first, *rest = qualname.split(".")
    value: Any = case.namespace.get(first)
    for name in rest:
        value = vars(value).get(name) if isinstance(value, type) else None
    return value


def _lost_slots(case: Case) -> Iterator[Finding]:
    for node, cls in case.graph.classes:
        slots = vars(cls).get("__slots__")
        if not slots or cls.__dictoffset__ or issubclass(cls, tuple):
            continue
        why = (
            f"cloudpickle drops the __slots__ of {cls.__name__}: where it arrives each instance has a __dict__, "
            "takes more memory, and accepts mistyped attributes."
        )
        fix = f"Define {_in_module(cls)}."
        yield case.finding(_shown_at(case, node, cls), "lost-slots", Verdict.COSTLY, why, fix)


# --- identity ----------------------------------------------------------------------------------------------


def _lost_identity(case: Case) -> Iterator[Finding]:
    for node in case.graph:
        if type(node.value) is object and not _is_used_well(node):
            why = "Each pickle makes another object() of it, so that `is` no longer finds it."
            yield case.finding(node, "lost-identity", Verdict.WRONG, why, _IDENTITY_FIX)
    for node, function in case.graph.functions:
        for name in _compared_by_identity(function):
            part = next((each for each in node.parts if each.step.words.endswith(f" {name}")), None)
            if part is not None and part.is_by_value and type(part.value).__module__ == "__main__":
                if isinstance(part.value, type | enum.Enum | types.FunctionType):
                    continue
                why = f"Each pickle makes another one of it, so that `is {name}` is False for what came separately."
                yield case.finding(part, "lost-identity", Verdict.WRONG, why, _IDENTITY_FIX)


_IDENTITY_FIX = "Use a member of an Enum, or a class: class MISSING: ...; those stay one and the same."


def _is_used_well(node: Node) -> bool:
    """Tell a sentinel that its function hands out itself, as its default or to get(…, SENTINEL): that is safe."""
    holder = node.parent
    function = holder.value if holder is not None else None
    if not isinstance(function, types.FunctionType):
        return False
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if any(each is node.value for each in defaults):
        return True
    tree = code.definition(function)
    name = node.step.words.rpartition(" ")[2]
    for each in ast.walk(tree) if tree is not None else ():
        if isinstance(each, ast.Call) and _called(each) in _ASKED_WITH:
            names = [argument.id for argument in each.args if isinstance(argument, ast.Name)]
            if name in names:
                return True
    return False


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _compared_by_identity(function: types.FunctionType) -> set[str]:
    """Names of what a function captures and compares with a parameter of its own by ``is``."""
    tree = code.definition(function)
    if tree is None:
        return set()
    own = {each.arg for each in code.parameters(tree)}
    found: set[str] = set()
    for each in ast.walk(tree):
        if isinstance(each, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in each.ops):
            names = [side.id for side in (each.left, *each.comparators) if isinstance(side, ast.Name)]
            if own & set(names):
                found.update(name for name in names if name not in own)
    return found
