"""Names: the globals of functions, the modules behind them, and what can be compared with the other side.

Runs on: driver.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tfos_magic import tracing
from tfos_magic.doctor import code, second
from tfos_magic.doctor.case import is_local_module, is_users_code
from tfos_magic.doctor.findings import GlobalName
from tfos_magic.doctor.graph import Graph, Node

_EVERYWHERE = {"__main__", "pyspark", "py4j", "cloudpickle", "builtins"}


@dataclass(frozen=True)
class Comparable:
    """A function or class of a module of the user's, as the driver has it."""

    key: str
    """``module:attribute``, for the other side to look up."""
    fingerprint: str
    path: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module's name."""
        return self.key.partition(":")[0]

    @property
    def name(self) -> str:
        """As code has it: ``helper.rate``."""
        return self.key.replace(":", ".")


def needed_modules(graph: Graph) -> list[str]:
    """Return the top-level modules that must be there to unpickle it; Python's own are everywhere."""
    found = dict.fromkeys(name.partition(".")[0] for name in graph.modules)
    return [name for name in found if name not in sys.stdlib_module_names and name not in _EVERYWHERE]


def comparable_names(graph: Graph) -> list[Comparable]:
    """Return the functions and classes of the user's modules that the code reads, or that are its data's."""
    found: dict[str, Comparable] = {}
    for node in graph:
        for item in _of_node(node):
            if item.fingerprint:
                found.setdefault(item.key, item)
    return list(found.values())


def _of_node(node: Node) -> Iterator[Comparable]:
    value = node.value
    if isinstance(value, types.FunctionType) and node.is_by_value:
        yield from _of_function(node, value)
        return
    found: Any = value if isinstance(value, types.FunctionType | type) else type(value)
    travels = found is value and node.is_by_value
    if is_local_module(found.__module__) and "<locals>" not in found.__qualname__ and not travels:
        yield Comparable(f"{found.__module__}:{found.__qualname__}", second.fingerprint(found), node.path)


def _of_function(node: Node, function: types.FunctionType) -> Iterator[Comparable]:
    known = code.captured(function)
    for name, chain in dict.fromkeys(code.attribute_chains(function)):
        module = known.get(name)
        if not isinstance(module, types.ModuleType) or not is_local_module(module.__name__):
            continue
        found = code.resolve(module, chain[:1])
        if isinstance(found, types.FunctionType | type) and found.__module__ == module.__name__:
            path = (*node.path, code.step_to(function, name), f"attribute {chain[0]}")
            yield Comparable(f"{module.__name__}:{chain[0]}", second.fingerprint(found), path)


def table(graph: Graph, facts: Mapping[str, Any], patched: frozenset[str]) -> list[GlobalName]:
    """Return a row for each global that the code takes along.

    Parameters
    ----------
    graph : Graph
    facts : mapping
        What the second interpreter said.
    patched : frozenset of str
        Names of globals through which something patched is reached.
    """
    rows: dict[str, GlobalName] = {}
    for node in graph:
        words = node.step.words
        function = node.parent.value if node.parent is not None else None
        is_users = not isinstance(function, types.FunctionType) or _is_written(function)
        if not words.startswith(("global ", "closure ")) or not is_users:
            continue
        name = words.partition(" ")[2]
        module = node.how.removeprefix("by import of ") if node.how.startswith("by import") else ""
        here, there = _versions(module, facts) if module else ("", "")
        row = GlobalName(name, tracing.kind_of(node.value), node.how, here, there, name in patched)
        rows.setdefault(f"{name} {node.how}", row)
    return list(rows.values())


def _is_written(function: types.FunctionType) -> bool:
    """Tell what somebody has written from what namedtuple or dataclass have generated."""
    return is_users_code(function) and not function.__code__.co_filename.startswith("<string>")


def _versions(module: str, facts: Mapping[str, Any]) -> tuple[str, str]:
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names or root in _EVERYWHERE:
        return "", ""
    said = facts.get("modules", {})
    there = "" if root not in said else version_of(said[root])
    return version_of(second.describe_module(root)), there


def version_of(described: Mapping[str, Any] | None) -> str:
    """Return what tells a module from another of the same name: its version, else its file."""
    if described is None:
        return "missing"
    return str(described.get("version") or described.get("file") or "built in")
