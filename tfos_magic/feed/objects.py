"""Rows of any Python objects as bytes, and back: equal, and of the same type.

Runs on: executors (Spark's Python workers and children).

What makes it difficult are classes of the notebook. They live in ``__main__``, which is the notebook's on the driver,
pyspark's daemon in a Python worker, and the cell's namespace in a child::

    Python worker                                    child
    rows ── pickle ── fails, or names __main__ ──┐
              │ else: plain, and fast            │ class as (name, fields) + what makes it
              ▼                                  ▼
            bytes ─────────────────────────► class of that name and those fields in this __main__, else the one that
                                             this process has made or sent before, else a new one

So ``isinstance`` and ``==`` hold on arrival, and a class that is there already is never changed. The same for a
namedtuple that PySpark's patch (see :mod:`tfos_magic.namedtuple_patch`) has reduced to its name and fields.
"""

from __future__ import annotations

import collections
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle

from tfos_magic.errors import DataError, ResultError

_PATCH = ("pyspark.serializers", "_restore")
_GUARD = "tfos_magic.namedtuple_patch"
# Strings in a pickle are never torn apart, so one look tells whether it names any of these. Text that happens to hold
# one only takes the slower way.
_MAIN_MARK = b"__main__"
_MARKS = (__name__.encode(), _PATCH[0].encode())


def dumps(rows: list[Any], *, is_result: bool = False) -> bytes:
    """Return the rows as bytes for :func:`loads` in another process on the same or another machine.

    Parameters
    ----------
    rows : list
        Of any picklable objects.
    is_result : bool
        Say "result" instead of "row" if something is wrong.

    Raises
    ------
    DataError
        A row cannot be pickled; with `is_result` a ResultError.
    """
    try:
        data = pickle.dumps(rows, protocol=5)
        if _MAIN_MARK not in data:
            return data
    except Exception:  # any __reduce__ may raise anything, and the other way may do better
        pass
    stream = io.BytesIO()
    try:
        _Pickler(stream, protocol=5).dump(rows)
    except Exception as error:
        raise _refusal(rows, error, is_result) from error
    return stream.getvalue()


def loads(data: bytes) -> list[Any]:
    """Return the rows that :func:`dumps` was given.

    Raises
    ------
    ModuleNotFoundError
        A row's class is in a module that this process cannot import.
    """
    if not any(mark in data for mark in _MARKS):
        rows: list[Any] = pickle.loads(data)
        return rows
    with _CLASSES.lock:  # a class is made in several steps; nobody may meet it before the last
        rows = _Unpickler(io.BytesIO(data)).load()
    return rows


# --- classes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)  # no namedtuple: where the patch is on, that would arrive as another class
class _Key:
    """By what a class is known to all processes; not by its module, which cloudpickle before 2 loses of some."""

    name: str
    """With those around it: ``Outer.Inner``."""
    fields: tuple[str, ...]
    """Of a namedtuple, dataclass, attrs class or enum."""
    bases: tuple[str, ...]
    """Tells ``class P(namedtuple("P", …))`` from the P beneath it."""
    tracker_id: str
    """cloudpickle's, for classes made inside functions: another one at each call. Empty for all others."""


class _Classes:
    """The classes that this process has made of bytes or sent as bytes; like ``sys.modules`` they are the process's.

    Held weakly: a class without instances need not be the same one the next time.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._known: weakref.WeakValueDictionary[_Key, type] = weakref.WeakValueDictionary()

    def find(self, key: _Key) -> type | None:
        """Return the class for `key` that is here already."""
        live = None if key.tracker_id else _in_main(key.name)
        if live is not None and _fields(live) == key.fields:
            return live
        return self._known.get(key)

    def keep(self, key: _Key, cls: type) -> None:
        """Remember `cls` unless there is one already."""
        self._known.setdefault(key, cls)


_CLASSES = _Classes()


def _in_main(name: str) -> type | None:
    found: Any = sys.modules.get("__main__")
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def _fields(cls: type) -> tuple[str, ...]:
    for attribute in ("_fields", "__dataclass_fields__", "__members__"):
        names = getattr(cls, attribute, None)
        if names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return tuple(str(each.name) for each in getattr(cls, "__attrs_attrs__", ()))


def _restore(name: str, fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    """Make an instance as ``pyspark.serializers._restore`` would, but of the notebook's own class where it is here."""
    key = _Key(name, tuple(fields), ("tuple",), "")
    cls: Any = _CLASSES.find(key)
    if cls is None:
        make: Any = collections.namedtuple  # mypy wants its arguments as literals
        cls = make(name, fields, rename=True, module="__main__")  # names like _1 are refused without "rename"
        _CLASSES.keep(key, cls)
    return tuple.__new__(cls, values)


def _arrive(key: _Key, make: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """Return the class for `key`, an empty one if there is none yet; what pickles have in a class's place."""
    return _CLASSES.find(key) or make(*arguments)


def _complete(cls: type, state: tuple[_Key, Callable[..., Any], Any]) -> type:
    """Give an empty class what is in it; one that is complete is left as it is."""
    key, set_state, content = state
    if _CLASSES.find(key) is not cls:
        set_state(cls, content)
        cls.__qualname__ = key.name
        # Where the patch is on, Spark moves rows by plain pickle, which finds no class of another __main__.
        mark = collections.namedtuple.__globals__.get("_hack_namedtuple")
        if mark is not None and issubclass(cls, tuple) and "_fields" in cls.__dict__:
            mark(cls)
        _CLASSES.keep(key, cls)
    return cls


# --- pickling ----------------------------------------------------------------------------------------------


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle publishes no types
    """Sends classes that cannot be imported elsewhere by value, with a key by which the receiver may know them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type):
            reduced = super().reducer_override(obj)
            # Six parts: to be made and then filled; else it is one of Python's own, or travels by its name.
            return _class_reduction(obj, reduced) if isinstance(reduced, tuple) and len(reduced) == 6 else reduced
        kind = type(obj)
        if _is_of(kind.__reduce_ex__, _GUARD):
            return object.__reduce_ex__(obj, 5)  # the guard would send a class of its own making
        if "__slots__" in kind.__dict__ and getattr(obj, "__dict__", None):
            return _slotted_reduction(obj)
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _restore if (module, name) == _PATCH else super().find_class(module, name)


def _class_reduction(cls: type, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    make, arguments, (attributes, slots), _, _, set_state = reduced
    # The last two are cloudpickle's id for the class, by which it would find, and overwrite, one of its own.
    *arguments, tracker_id, extra = arguments
    bases = tuple(base.__name__ for base in cls.__bases__)
    is_local = "<locals>" in cls.__qualname__
    key = _Key(cls.__qualname__, _fields(cls), bases, tracker_id if is_local else "")
    _CLASSES.keep(key, cls)
    clean = {name: value for name, value in attributes.items() if not _is_patched(name, value)}
    return _arrive, (key, make, (*arguments, None, extra)), (key, set_state, (clean, slots)), None, None, _complete


def _is_patched(name: str, value: Any) -> bool:
    """Return whether an attribute was put on a namedtuple by PySpark's patch or by our guard."""
    return name == "_is_namedtuple_" or (
        name in ("__reduce__", "__reduce_ex__") and (_is_of(value, _GUARD) or _is_of(value, _PATCH[0]))
    )


def _is_of(function: Any, module: str) -> bool:
    return getattr(function, "__module__", None) == module


def _slotted_reduction(obj: Any) -> Any:
    """Pickle an instance whose class has lost its slots on the way here, so that it fits the original as well."""
    reduced = obj.__reduce_ex__(5)
    state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    if not (isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict)):
        return reduced
    names = type(obj).__dict__["__slots__"]
    names = {names} if isinstance(names, str) else set(names)
    rest = {name: value for name, value in state[0].items() if name not in names}
    slots = {**(state[1] or {}), **{name: value for name, value in state[0].items() if name in names}}
    return (*reduced[:2], (rest or None, slots), *reduced[3:])


def _refusal(rows: list[Any], error: Exception, is_result: bool) -> DataError | ResultError:
    """Name the first row that cannot be pickled."""
    what = "result" if is_result else "row"
    guilty: Any = None
    for position, row in enumerate(rows):
        try:
            _Pickler(io.BytesIO(), protocol=5).dump(row)
        except Exception:
            guilty = position, type(row).__name__
            break
    which = f"A {what} ({guilty[1]}, number {guilty[0]} of {len(rows):,})" if guilty else f"{len(rows):,} {what}s"
    hint = "Numbers, arrays, strings, and tuples, dicts and dataclasses of them can."
    fact = f"{which} cannot travel between processes: {type(error).__name__}: {error}."
    return ResultError(fact, hint=hint) if is_result else DataError(fact, hint=hint)
