"""Namedtuples: whose ``__reduce__`` wins, and whether it is PySpark's patch.

Runs on: driver. How the patch is found and taken out: `tfos_magic.namedtuple_patch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tfos_magic.doctor.case import Case
from tfos_magic.doctor.findings import Ancestor, Finding, NamedtupleTable, Verdict
from tfos_magic.doctor.graph import Node

_DECIDING = ("__reduce_ex__", "__reduce__", "__getnewargs_ex__", "__getnewargs__", "__getstate__")
_LISTED = 10


def look(case: Case) -> Iterator[Finding]:
    """Yield the classes that the patch would turn into bare namedtuples."""
    told: set[int] = set()
    for node, cls in _namedtuples(case):
        if id(cls) in told or not is_patched(cls):
            continue
        told.add(id(cls))
        root = next(base for base in cls.__mro__ if "__reduce__" in vars(base))
        lost = "its class and methods are gone" if root is not cls else "its class is another one"
        why = (
            f"PySpark's namedtuple patch pickles {cls.__name__} as name, fields and values: "
            f"a bare {root.__name__} arrives, {lost}."
        )
        yield case.finding(node, "namedtuple-patch", Verdict.WRONG, why, "%tfos_namedtuple revert")


def is_patched(cls: Any) -> bool:
    """Tell whether instances of a namedtuple class are pickled by PySpark's patch."""
    reduce = cls.__reduce__
    is_pysparks = getattr(reduce, "__qualname__", "") == "_hack_namedtuple.<locals>.__reduce__"
    return is_pysparks and cls.__reduce_ex__ is object.__reduce_ex__


def tables(case: Case) -> list[NamedtupleTable]:
    """Return one table for each class of namedtuples that is met."""
    found: dict[int, NamedtupleTable] = {}
    for node, cls in _namedtuples(case):
        if len(found) < _LISTED:
            found.setdefault(id(cls), NamedtupleTable(node.path, _name(cls), tuple(_ancestors(cls))))
    return list(found.values())


def _namedtuples(case: Case) -> Iterator[tuple[Node, type]]:
    for node in case.graph:
        if node.step.words.startswith("base "):  # it is in the MRO of the other
            continue
        cls = node.value if isinstance(node.value, type) else type(node.value)
        if issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple):
            yield node, cls


def _ancestors(cls: type) -> Iterator[Ancestor]:
    # pickle asks for __reduce_ex__ first; object's own then asks for __reduce__.
    asked = "__reduce_ex__" if _definer(cls, "__reduce_ex__") is not object else "__reduce__"
    winner = _definer(cls, asked)
    for base in cls.__mro__:
        defines = tuple(name for name in _DECIDING if name in vars(base))
        is_winner = base is winner
        yield Ancestor(_name(base), defines, is_winner, is_winner and asked == "__reduce__" and is_patched(cls))


def _definer(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


def _name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
