"""What the traps look at.

Runs on: driver.
"""

from __future__ import annotations

import site
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tfos_magic.cell import CellFunction
from tfos_magic.doctor.dialects import Dialect
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Graph, Node

# What a cell, a list, a dict or a function holds is the user's; what an estimator keeps inside is its library's.
_CALLABLES = (CellFunction, types.FunctionType, types.MethodType, types.BuiltinMethodType)
_USERS_HOLDERS = (*_CALLABLES, type, list, tuple, dict, set)


@dataclass
class Case:
    """One object under examination.

    Attributes
    ----------
    graph : Graph
    dialect : Dialect
    namespace : mapping of str to object
        The notebook's globals.
    value : object
        What is examined; the graph may be that of what Spark would pickle of it.
    spark : SparkContext or None
        Of the session that is alive; classic sessions only.
    are_executors_asked : bool
        They tell better than any guess what they have.
    facts : dict
        What the second interpreter said; empty where it was not asked.
    executor : str
        Which executor has said the facts, where it is one.
    """

    graph: Graph
    dialect: Dialect
    namespace: Mapping[str, Any]
    value: Any
    spark: Any = None
    are_executors_asked: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    executor: str = ""

    @property
    def is_nodes(self) -> bool:
        """It would be sent to our nodes, not through one of Spark's ordinary jobs."""
        return self.dialect.is_nodes

    @cached_property
    def is_on_this_machine(self) -> bool:
        """Nothing needs to be guessed of executors elsewhere: none there are, or they are asked."""
        if self.are_executors_asked:
            return True
        master = str(getattr(self.spark, "master", "local"))
        return master.startswith("local") and not master.startswith("local-cluster")

    @cached_property
    def added_files(self) -> Path | None:
        """Where ``sc.addPyFile`` puts modules, as executors have them; None without a session."""
        if self.spark is None:
            return None
        from pyspark import SparkFiles

        return Path(SparkFiles.getRootDirectory())

    @cached_property
    def users_nodes(self) -> list[Node]:
        """Objects that the user holds himself: no instance of a library's class is in between."""
        return [node for node in self.graph if all(_is_users(above) for above in list(node.chain)[1:])]

    def finding(
        self, node: Node | tuple[str, ...], trap: str, verdict: Verdict, why: str, fix: str, *more: str
    ) -> Finding:
        """Return a finding about `node`; `more` are steps beyond it."""
        path = node.path if isinstance(node, Node) else node
        return Finding(trap, verdict, (*path, *more), why, fix)


def _is_users(node: Node) -> bool:
    value = node.value
    if isinstance(value, type | types.FunctionType):
        return node.is_by_value
    return isinstance(value, _USERS_HOLDERS) or type(value).__module__ in ("__main__", "functools", "collections")


def is_local_module(name: str) -> bool:
    """Tell whether a loaded module is a file of the user's: neither Python's nor installed, and not the notebook."""
    module = sys.modules.get(name) if name != "__main__" else None
    file = getattr(module, "__file__", None) if module is not None else None
    if not isinstance(file, str):
        return False
    path = Path(file)
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any(folder in path.parents for folder in _installed_folders())


@lru_cache(maxsize=1)
def _installed_folders() -> frozenset[Path]:
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    named = [sysconfig.get_path(key) for key in keys] + [str(site.getusersitepackages())]
    return frozenset(Path(each).resolve() for each in named) | frozenset(Path(each) for each in named)


def is_users_code(function: types.FunctionType) -> bool:
    """Tell whether a function is the notebook's, or of a module of the user's."""
    return function.__module__ == "__main__" or is_local_module(str(function.__module__))


def main_instances(case: Case) -> Iterator[tuple[Node, type]]:
    """Yield every instance of a class that travels by value, with that class."""
    by_value = {id(cls) for _, cls in case.graph.classes}
    for node in case.graph:
        cls = type(node.value)
        if id(cls) in by_value and not isinstance(node.value, type):
            yield node, cls
