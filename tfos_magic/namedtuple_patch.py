"""PySpark's namedtuple patch: detect it, prevent it, take it out, put it back.

Runs on: anywhere. Standard library only; never imports PySpark.

PySpark (always up to 3.2; up to 4.x when ``PYSPARK_ENABLE_NAMEDTUPLE_PATCH=1``) swaps the code of
``collections.namedtuple`` in place, so that all classes made afterwards, by anybody, pickle as name + fields + values:

    class Point(namedtuple("Point", "x y")): …
        dumps ──► pyspark.serializers._restore("Point", ("x", "y"), (1, 2))
        loads ──► a bare namedtuple; the subclass and its methods are gone

:func:`revert` undoes that:

    collections.namedtuple    code, keyword defaults, planted globals ──► as Python has them; the flag that stops
                                                                          PySpark from patching again stays
    each class affected       PySpark's __reduce__ off, __module__ corrected, and then
        found by its name     ──► nothing more: it pickles as if there had been no patch           "repaired"
        not found by it       ──► exactly this class travels by value; subclasses pickle as usual  "made safe"
        its module not found  ──► the same; its __module__ stays "collections"                     "lost"

The state that suits a driver
-----------------------------
The patch has one use: classes of ``__main__`` (the notebook) cannot be imported on an executor, and where the patch is
on, PySpark moves RDD data and broadcasts with plain pickle. After a bare revert these fail with "Can't get attribute
'A' on <module 'pyspark.daemon'>". Three ways out:

* PySpark's own cure, a structural ``__reduce__``, for ``__main__`` only. What arrives is still another class: no
  ``isinstance``, no methods, no defaults. And it needs ``pyspark.serializers._restore``, which executors of
  PySpark ≥ 3.3 lack unless they have the variable too.
* ``sc.serializer = CloudPickleSerializer()`` keeps the class, but must be done to every context, misses broadcasts and
  RDDs that exist, slows all data down, and lets cloudpickle overwrite the driver's own classes with what comes back.
* **The guard**, chosen (``keep_main=True``, the default): ``collections.namedtuple`` gets a code of the same signature
  that calls Python's own and then gives classes of ``__main__``, and no others, a ``__reduce_ex__`` that sends *the
  class by value* (PySpark's cloudpickle, once per batch) with the values. It holds in closures, data, broadcasts,
  shuffles and results, for contexts old and new; it keeps the type: cloudpickle's class tracker finds the driver's own
  class again, and here, unlike in cloudpickle itself, does not overwrite it. It serves subclasses, and needs nothing
  installed on executors, because the function travels inside the class. It costs 10–14 KB and under 1 ms per pickle
  (PySpark pickles rows in batches of 64 KB and more); classes outside ``__main__`` pay nothing.

What it cannot mend: PySpark ≤ 3.2's cloudpickle fails on a ``typing.NamedTuple`` class of ``__main__`` that a *closure*
captures, with the patch, without it, and with the guard; as data, such rows travel well.

The guard is only put where the patch was found or where this PySpark would apply it. A node's own processes want plain
Python and call :func:`ensure_clean`.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import socket
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENABLING_VARIABLE = "PYSPARK_ENABLE_NAMEDTUPLE_PATCH"

# PySpark asks for this attribute of collections.namedtuple before it patches. As strings, so that no class mangles it.
_FLAG = "__hijack"
_PLANTED = ("_old_namedtuple", "_old_namedtuple_kwdefaults", "_hack_namedtuple")
_GUARD_NAME = "_tfos_magic_make_namedtuple"
_ALWAYS_UP_TO = (3, 2)
# In pyspark.serializers, _restore makes the classes of what a patched process sent; they must be able to go back.
_TRAVELLING_MODULES = frozenset({"__main__", "pyspark.serializers"})
_IN_FLIGHT_TIMEOUT_S = 1.0
_TENSORFLOW = frozenset({"keras", "tf_keras", "tensorboard"})


@dataclass(frozen=True)
class PatchStatus:
    """What the patch's state is in this process.

    Attributes
    ----------
    is_patched : bool
        ``collections.namedtuple`` runs PySpark's code now.
    is_prevented : bool
        Not patched, and an import of PySpark will not patch it.
    is_guarded : bool
        Namedtuples of ``__main__`` travel by value (see the module's docstring).
    cause : str
        Why this PySpark patches, whether it still does or not; empty when it would not.
    pyspark_version : str
        Version loaded; empty when PySpark is not loaded.
    class_count : int
        Classes that carry PySpark's ``__reduce__``.
    downgraded : tuple of str
        Subclasses of these, by full name, that would arrive as bare namedtuples.
    first_affected : str
        The earliest of the classes that carry it: what was imported before that one was made before the patch.
    reverted_at : float or None
        When :func:`revert` or :func:`prevent` last changed something here, in seconds since the epoch.
    mended_count : int
        Classes that have carried it and that :func:`revert` has put right.
    rescued : tuple of str
        What was `downgraded` until then.
    owners : dict of str to str
        For each of `downgraded` and `rescued` whose it is: ``yours``, ``TensorFlow`` or ``other``.
    """

    is_patched: bool
    is_prevented: bool
    is_guarded: bool
    cause: str
    pyspark_version: str
    class_count: int
    downgraded: tuple[str, ...]
    first_affected: str
    reverted_at: float | None
    mended_count: int
    rescued: tuple[str, ...]
    owners: dict[str, str]

    @property
    def summary(self) -> str:
        """The state in one line."""
        affected = f"{self.class_count} classes carry it, {len(self.downgraded)} subclasses would lose their type"
        if self.is_patched:
            return f"namedtuple patch: on ({self.cause}); {affected}"
        words = ["off"]
        if self.cause and self.is_prevented:
            words.append(f"and kept off ({self.cause})")
        elif self.cause:
            words.append(f"until PySpark is imported ({self.cause})")
        if self.is_guarded:
            words.append("– namedtuples of __main__ travel by value")
        return f"namedtuple patch: {' '.join(words)}" + (f"; {affected}" if self.class_count else "")

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, the summary with them."""
        names = {key: list(getattr(self, key)) for key in ("downgraded", "rescued")}
        return {**asdict(self), **names, "summary": self.summary}


@dataclass(frozen=True)
class RevertReport:
    """What :func:`revert` found and did.

    Attributes
    ----------
    was_patched : bool
        The patch was on.
    repaired : tuple of str
        Classes that now pickle as if there had been no patch.
    made_safe : tuple of str
        Classes that their own name does not find (most are the bases of ``class X(namedtuple("X", …))``): exactly
        these classes travel by value, their subclasses pickle as usual.
    lost : tuple of str
        Made safe likewise, but nothing tells which module made them, so that ``__module__`` stays ``collections``.
    keeps_main : bool
        The guard is on: namedtuples of ``__main__`` travel by value.
    seconds : float
        Time it took.
    """

    was_patched: bool
    repaired: tuple[str, ...]
    made_safe: tuple[str, ...]
    lost: tuple[str, ...]
    keeps_main: bool
    seconds: float

    @property
    def summary(self) -> str:
        """What was done, in one line."""
        counts = f"{len(self.repaired)} classes repaired, {len(self.made_safe) + len(self.lost)} made safe"
        if self.was_patched:
            return f"namedtuple patch: reverted in {self.seconds * 1000:.0f} ms; {counts}"
        if self.repaired or self.made_safe or self.lost:
            return f"namedtuple patch: was off; {counts}"
        return "namedtuple patch: not present, nothing to revert"

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers, the summary with them."""
        names = {key: list(getattr(self, key)) for key in ("repaired", "made_safe", "lost")}
        return {**asdict(self), **names, "summary": self.summary}


def status() -> PatchStatus:
    """Return the patch's state in this process; changes nothing."""
    function = _namedtuple()
    classes = list(_patched_classes())
    downgraded = _downgraded(classes)
    is_patched = _is_patched(function)
    return PatchStatus(
        is_patched=is_patched,
        is_prevented=not is_patched and hasattr(function, _FLAG),
        is_guarded=_GUARD_NAME in function.__globals__,
        cause=_cause() or ("unknown: not by PySpark's own rules" if is_patched else ""),
        pyspark_version=_loaded_version(),
        class_count=len(classes),
        downgraded=_full_names(downgraded),
        first_affected=_full_name(classes[0]) if classes else "",
        reverted_at=_STATE.reverted_at,
        mended_count=len(_STATE.classes),
        rescued=_full_names(_STATE.rescued),
        owners={_full_name(cls): _owner(cls) for cls in (*downgraded, *_STATE.rescued)},
    )


def prevent() -> None:
    """Make a later ``import pyspark`` leave namedtuple alone; does nothing where the patch is already on."""
    with _STATE.lock:
        function = _namedtuple()
        if not hasattr(function, _FLAG):
            setattr(function, _FLAG, 1)
            _STATE.is_flag_ours = True
            _STATE.reverted_at = time.time()


def revert(repair: bool = True, keep_main: bool = True) -> RevertReport:
    """Take the patch out of this process and keep it out.

    Parameters
    ----------
    repair : bool
        Also repair the classes that the patch has already marked.
    keep_main : bool
        Let namedtuples of ``__main__`` go on travelling in Spark's data, broadcasts, shuffles and results, where the
        patch was on or would come; what a driver wants. False leaves plain Python.

    Returns
    -------
    RevertReport
        What was there and what became of it. A second call finds nothing to do, from any thread.
    """
    started = time.perf_counter()
    with _STATE.lock:
        function = _namedtuple()
        was_patched = _is_patched(function)
        if was_patched:
            _take_out(function)
        prevent()
        needs_guard = keep_main and (was_patched or _STATE.pyspark is not None or bool(_cause()))
        _set_guard(function, needs_guard)
        classes = list(_patched_classes()) if repair else []
        _STATE.rescued.update(_downgraded(classes))
        repaired, made_safe, lost = _repair(classes)
        if was_patched or classes:
            _STATE.reverted_at = time.time()
    return RevertReport(
        was_patched=was_patched,
        repaired=tuple(sorted(repaired)),
        made_safe=tuple(sorted(made_safe)),
        lost=tuple(sorted(lost)),
        keeps_main=needs_guard,
        seconds=time.perf_counter() - started,
    )


def restore() -> PatchStatus:
    """Put everything back as it was before :func:`revert` and :func:`prevent`: the inverse of both.

    Returns
    -------
    PatchStatus
        The state afterwards: patched if it was, or if PySpark was imported meanwhile and would have patched.
    """
    with _STATE.lock:
        function = _namedtuple()
        _set_guard(function, False)
        if _STATE.pyspark is not None:
            _put_back(function, _STATE.pyspark)
        elif _STATE.is_flag_ours:
            delattr(function, _FLAG)
            # What the import would have done, had it not been prevented.
            hijack = getattr(sys.modules.get("pyspark.serializers"), "_hijack_namedtuple", None)
            if hijack is not None:
                hijack()
        _STATE.forget()
        return status()


def ensure_clean() -> PatchStatus:
    """Leave plain Python, whatever was there: for a node's processes, before anything of the user's is imported."""
    revert(keep_main=False)
    return status()


# --- the function -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PySparkPatch:
    """What PySpark had put into place, to give it back exactly."""

    code: types.CodeType
    kwdefaults: dict[str, Any] | None
    planted: dict[str, Any]


@dataclass(frozen=True)
class _ClassPatch:
    """What one class carried. It holds the class: to undo is possible as long as the process lives."""

    cls: type[tuple[Any, ...]]
    reduce: Any
    module: str
    has_mark: bool


class _State:
    """What this module has changed in the process; the patch is the process's, and so is this record."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.travel = _travelling(f"{socket.gethostname()}:{os.getpid()}")
        self.forget()

    def forget(self) -> None:
        """Start anew: nothing is changed."""
        self.pyspark: _PySparkPatch | None = None
        self.is_flag_ours = False
        self.original: types.CodeType | None = None
        self.classes: list[_ClassPatch] = []
        self.guarded: weakref.WeakSet[type] = weakref.WeakSet()
        self.rescued: weakref.WeakSet[type] = weakref.WeakSet()
        self.reverted_at: float | None = None


def _namedtuple() -> types.FunctionType:
    """Return the function as what it is; its published type is a class-like overload."""
    return collections.namedtuple  # type: ignore[return-value]


def _is_patched(function: types.FunctionType) -> bool:
    return "_hack_namedtuple" in function.__code__.co_names


def _take_out(function: types.FunctionType) -> None:
    """Give `function` Python's own code again and remove what PySpark planted beside it."""
    space = function.__globals__
    planted = {name: space[name] for name in _PLANTED if name in space}
    code = function.__code__
    _STATE.pyspark = _PySparkPatch(code, function.__kwdefaults__, planted)
    leaving = _Leaving()
    space["_hack_namedtuple"] = leaving
    function.__code__ = planted["_old_namedtuple"].__code__
    function.__kwdefaults__ = planted["_old_namedtuple_kwdefaults"]
    # Other threads may be inside PySpark's code; without its globals they would get a NameError.
    if leaving.wait(code):
        for name in planted:
            space.pop(name, None)


class _Leaving:
    """Stands in for ``_hack_namedtuple`` while calls that began before the revert come to their end."""

    def __init__(self) -> None:
        self._has_left = threading.Event()

    def __call__(self, cls: type[tuple[Any, ...]]) -> type[tuple[Any, ...]]:
        # Two frames up is who called namedtuple: PySpark's extra frame had hidden that from Python.
        if cls.__module__ == "collections":
            cls.__module__ = sys._getframe(2).f_globals.get("__name__", "__main__")
        _guard_class(cls)
        self._has_left.set()
        return cls

    def wait(self, code: types.CodeType) -> bool:
        """Return True when no thread runs `code` any more, False if one still does after a second."""
        deadline = time.monotonic() + _IN_FLIGHT_TIMEOUT_S
        while _is_running(code):
            if time.monotonic() > deadline:
                return False
            self._has_left.wait(0.01)  # the timeout is for calls that end in an exception
            self._has_left.clear()
        return True


def _is_running(code: types.CodeType) -> bool:
    for top in sys._current_frames().values():
        frame: types.FrameType | None = top
        while frame is not None:
            if frame.f_code is code:
                return True
            frame = frame.f_back
    return False


def _put_back(function: types.FunctionType, patch: _PySparkPatch) -> None:
    function.__globals__.update(patch.planted)
    function.__kwdefaults__ = patch.kwdefaults
    function.__code__ = patch.code
    setattr(function, _FLAG, 1)
    for change in _STATE.classes:
        _stop_travel(change.cls)
        change.cls.__reduce__ = change.reduce  # type: ignore[method-assign]
        change.cls.__module__ = change.module
        if change.has_mark:
            change.cls._is_namedtuple_ = True  # type: ignore[attr-defined]
    # Made meanwhile in __main__: as PySpark treats the classes that it finds there.
    for cls in list(_STATE.guarded):
        _stop_travel(cls)
        if "__reduce__" not in cls.__dict__:
            patch.planted["_hack_namedtuple"](cls)


# --- the guard --------------------------------------------------------------------------------------------


def _guard_template(typename, field_names, *, rename=False, defaults=None, module=None):  # type: ignore[no-untyped-def]
    # Only its code is used: it runs among the globals of `collections`. Signature: namedtuple's own.
    return _tfos_magic_make_namedtuple(typename, field_names, rename, defaults, module)  # type: ignore[name-defined] # noqa: F821


def _set_guard(function: types.FunctionType, is_on: bool) -> None:
    """Switch the guard; expects that PySpark's code is out."""
    space = function.__globals__
    if is_on == (_GUARD_NAME in space):
        return
    if is_on:
        _STATE.original = function.__code__
        plain = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__)
        space[_GUARD_NAME] = _guarded_maker(plain)
        function.__code__ = _guard_template.__code__.replace(co_name=function.__name__)
    elif _STATE.original is not None:
        guard_code, function.__code__ = function.__code__, _STATE.original
        if _Leaving().wait(guard_code):
            space.pop(_GUARD_NAME, None)


def _guarded_maker(plain: Callable[..., type]) -> Callable[..., type]:
    def make(typename: Any, field_names: Any, rename: Any, defaults: Any, module: Any) -> type:
        if module is None:
            # Frame 0 is this one, 1 the guard's, 2 who asked for the class.
            module = sys._getframe(2).f_globals.get("__name__", "__main__")
        cls = plain(typename, field_names, rename=rename, defaults=defaults, module=module)
        _guard_class(cls)
        return cls

    return make


def _guard_class(cls: type) -> None:
    if cls.__module__ in _TRAVELLING_MODULES:
        _STATE.guarded.add(cls)
        _let_travel(cls)


def _travelling(home: str) -> Callable[..., Any]:
    """Return a ``__reduce_ex__`` by which an instance takes its class along.

    Parameters
    ----------
    home : str
        This process. A class that comes back to the process that made it is that very class, unchanged.

    Notes
    -----
    Everything is defined in here, and imported inside, so that cloudpickle sends it by value: executors need not have
    this package. Plain pickle meets an instance as ``maker(values)``; `maker` pickles as ``pickle.loads(class_bytes)``
    and is the same object for all instances, so that pickle's memo sends the class once per batch.
    """

    class Makers(dict):  # type: ignore[type-arg]
        """Makers by class, and the classes being pickled, by thread: this process's own, empty wherever it arrives."""

        def __init__(self) -> None:
            self.under_way: set[Any] = set()

        def __reduce__(self) -> Any:
            return Makers, ()

    class Maker:
        """Makes instances of one class; what a pickle has in the class's place."""

        def __init__(self, cls: Any) -> None:
            self.cls = cls
            self.is_simple = cls.__bases__ == (tuple,) and cls.__reduce__ is object.__reduce__
            self.attributes: Any = None
            self.data = b""

        def __call__(self, *args: Any) -> Any:
            return self.cls.__new__(self.cls, *args)

        def __reduce__(self) -> Any:
            import pickle

            # A class with nothing of the user's in it is pickled once; methods can depend on globals that change.
            attributes = dict(self.cls.__dict__) if is_plain(self.cls) else None
            if attributes is None or attributes != self.attributes:
                self.data = class_bytes(self.cls, attributes is not None)
                self.attributes = attributes
            return pickle.loads, (self.data,)

    class Arrival:
        """Unpickles as what ``arrive`` returns."""

        def __init__(self, *args: Any) -> None:
            self.args = args

        def __reduce__(self) -> Any:
            return arrive, self.args

    def is_plain(cls: Any) -> bool:
        names = "__doc__ __slots__ _fields _field_defaults __new__ _make _replace __replace__ __repr__ _asdict"
        names += " __getnewargs__ __match_args__ __module__ __annotations__ __reduce_ex__ __orig_bases__"
        return cls.__bases__ == (tuple,) and not set(cls.__dict__).difference(names.split(), cls._fields)

    def class_bytes(cls: Any, is_plain: bool) -> Any:
        import copyreg
        import functools
        import threading

        from pyspark import cloudpickle
        from pyspark.cloudpickle import cloudpickle as details

        # For these cloudpickle sends typing.NamedTuple as the base: Python ≥ 3.9 refuses it from cloudpickle 1
        # (PySpark ≤ 3.2), and where the patch is on, a second class without fields would be made and marked.
        has_bases = "__orig_bases__" in cls.__dict__
        if has_bases:
            bases = cls.__orig_bases__
            del cls.__orig_bases__
        key = (threading.get_ident(), cls)
        makers.under_way.add(key)
        try:
            make = functools.partial(copyreg.__newobj__, cls)  # type: ignore[attr-defined]
            data = cloudpickle.dumps(make)  # type: ignore[no-untyped-call]
        finally:
            makers.under_way.discard(key)
            if has_bases:
                cls.__orig_bases__ = bases
        tracker_id = details._get_or_create_tracker_id(cls)  # type: ignore[no-untyped-call]
        return cloudpickle.dumps(Arrival(tracker_id, data, is_plain))  # type: ignore[no-untyped-call]

    def arrive(tracker_id: str, data: bytes, is_plain: bool) -> Any:
        """Return the maker of the class's instances, for the process where this runs."""
        import copyreg
        import functools
        import os
        import pickle
        import socket

        from pyspark.cloudpickle import cloudpickle as details

        if is_plain or home == f"{socket.gethostname()}:{os.getpid()}":
            cls = details._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
            # A class without _fields is one that cloudpickle is just making, further out.
            if hasattr(cls, "_fields"):
                return functools.partial(copyreg.__newobj__, cls)  # type: ignore[attr-defined]
        return pickle.loads(data)

    def is_rootless(cls: Any) -> bool:
        """Return whether no other process can find `cls` by its name, now that it is ours or came by value."""
        from pyspark.cloudpickle import cloudpickle as details

        # The last: cloudpickle 1 loses the __module__ of a subclass on the way.
        return (
            "__reduce_ex__" in cls.__dict__
            or cls.__module__ == "__main__"
            or cls in details._DYNAMIC_CLASS_TRACKER_BY_CLASS
        )

    def reduction(self: Any, protocol: Any) -> Any:
        """Return what Python itself would, also where the class was marked by PySpark on arrival."""
        import copyreg

        cls = type(self)
        if "_hack_namedtuple" not in getattr(cls.__reduce__, "__qualname__", ""):
            return object.__reduce_ex__(self, max(protocol, 2))
        state = getattr(self, "__dict__", None) or None
        return copyreg.__newobj__, (cls, *self.__getnewargs__()), state  # type: ignore[attr-defined]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        cls = type(self)
        maker = makers.get(cls)
        if maker is not None and maker.is_simple and not makers.under_way:
            return maker, tuple(self)
        import copyreg
        import sys
        import threading

        reduced = reduction(self, protocol)
        is_usual = reduced[0] is copyreg.__newobj__  # type: ignore[attr-defined]
        if not is_usual or "pyspark" not in sys.modules or not is_rootless(cls):
            return reduced
        if (threading.get_ident(), cls) in makers.under_way:
            # An instance among its own class's attributes: on arrival the class will not have its __new__ yet.
            return (tuple.__new__, (cls, tuple(self)), *reduced[2:])
        if maker is None:
            maker = makers.setdefault(cls, Maker(cls))
        return (maker, reduced[1][1:], *reduced[2:])

    makers = Makers()
    return __reduce_ex__


def _let_travel(cls: type) -> None:
    cls.__reduce_ex__ = _STATE.travel  # type: ignore[method-assign]


def _stop_travel(cls: type) -> None:
    if getattr(cls.__dict__.get("__reduce_ex__"), "__module__", None) == __name__:
        del cls.__reduce_ex__


# --- the classes ------------------------------------------------------------------------------------------


def _patched_classes() -> Iterator[type[tuple[Any, ...]]]:
    """Yield the classes that carry PySpark's ``__reduce__`` themselves."""
    for cls in tuple.__subclasses__():
        if _is_pysparks(cls.__dict__.get("__reduce__")):
            yield cls


def _is_pysparks(reduce: Any) -> bool:
    # By name: a class that came from another process brings its own copy of the function.
    name = getattr(reduce, "__qualname__", None)
    return name == "_hack_namedtuple.<locals>.__reduce__" and reduce.__module__ == "pyspark.serializers"


def _downgraded(classes: Iterable[Any]) -> set[Any]:
    """Return the subclasses that inherit the patched ``__reduce__`` and so would lose their type."""
    found: set[Any] = set()
    todo = [sub for cls in classes for sub in cls.__subclasses__()]
    while todo:
        cls = todo.pop()
        if cls not in found and _is_pysparks(cls.__reduce__) and cls.__reduce_ex__ is object.__reduce_ex__:
            found.add(cls)
        todo += cls.__subclasses__()
    return found


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _full_names(classes: Iterable[type]) -> tuple[str, ...]:
    return tuple(sorted(map(_full_name, classes)))


def _owner(cls: type) -> str:
    """Return whose class it is: what is installed is others', all else the user's."""
    root = cls.__module__.partition(".")[0]
    if root.startswith("tensorflow") or root in _TENSORFLOW:
        return "TensorFlow"
    if cls.__module__ == "__main__":
        return "yours"
    if root in sys.stdlib_module_names or root in ("pyspark", "py4j"):
        return "other"
    module = sys.modules.get(cls.__module__)
    path = getattr(module, "__file__", None) or ""
    return "other" if "site-packages" in path or "dist-packages" in path else "yours"


def _repair(classes: list[type[tuple[Any, ...]]]) -> tuple[list[str], list[str], list[str]]:
    """Clean each class; return the names of those repaired, made safe and lost."""
    repaired: list[str] = []
    made_safe: list[str] = []
    lost: list[str] = []
    modules = _find_modules([cls for cls in classes if cls.__module__ == "collections"])
    for cls in classes:
        _clean(cls, modules.get(cls))
        if _resolves(cls):
            repaired.append(_full_name(cls))
            if cls.__module__ == "__main__" and _GUARD_NAME in _namedtuple().__globals__:
                _let_travel(cls)
            continue
        _let_travel(cls)
        (lost if cls.__module__ == "collections" else made_safe).append(_full_name(cls))
    return repaired, made_safe, lost


def _clean(cls: type[tuple[Any, ...]], module: str | None) -> None:
    has_mark = "_is_namedtuple_" in cls.__dict__
    _STATE.classes.append(_ClassPatch(cls, cls.__dict__["__reduce__"], cls.__module__, has_mark))
    # First the name, then the pickling: another thread may be pickling an instance meanwhile.
    if module is not None:
        cls.__module__ = module
    del cls.__reduce__
    if has_mark:
        del cls._is_namedtuple_  # type: ignore[attr-defined]


def _resolves(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def _find_modules(classes: list[type[tuple[Any, ...]]]) -> dict[type, str]:
    """Return which module made each class, where anything tells.

    The patch's extra frame made all of them say ``collections``. Asked in this order: whether PySpark's ``_restore``
    made it for something that came in; which module holds it under its name, which has a subclass of it, which holds it
    under another name, which has a class that contains it. Classes of compiled modules get the module that holds them;
    Python itself, finding no frame there, says ``importlib._bootstrap``, where no pickle can find them.
    """
    if not classes:
        return {}
    restored = getattr(sys.modules.get("pyspark.serializers"), "__cls", {}).values()
    found = {cls: "pyspark.serializers" for cls in restored if cls in classes}
    wanted = {id(cls): cls for cls in classes if cls not in found}
    by_name: dict[type, list[str]] = {}
    by_other: dict[type, list[str]] = {}
    for module, key, value in _module_items():
        cls = wanted.get(id(value))
        if cls is not None:
            (by_name if key == cls.__name__ else by_other).setdefault(cls, []).append(module)
    found.update((cls, _most_likely(cls, modules)) for cls, modules in by_name.items())
    for cls in classes:
        if cls not in found and cls.__subclasses__():
            found[cls] = cls.__subclasses__()[0].__module__
    for cls, modules in by_other.items():
        found.setdefault(cls, _most_likely(cls, modules))
    missing = {key: cls for key, cls in wanted.items() if cls not in found}
    if missing:
        found.update(_find_nested(missing))
    return found


def _find_nested(wanted: dict[int, type]) -> dict[type, str]:
    """Search the bodies of all classes of all modules."""
    found: dict[type, str] = {}
    for module, _, value in _module_items():
        if isinstance(value, type) and value.__module__ == module:
            for inner in list(vars(value).values()):
                cls = wanted.get(id(inner))
                if cls is not None:
                    found[cls] = module
    return found


def _module_items() -> Iterator[tuple[str, str, Any]]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType):
            # Not vars(): lazy modules load themselves when they are asked for anything.
            for key, value in list(object.__getattribute__(module, "__dict__").items()):
                yield name, key, value


def _most_likely(cls: type, modules: list[str]) -> str:
    """Pick, of the modules that hold `cls`, the one that made it: packages and notebooks import, modules make."""
    makers = [name for name in modules if _can_make(name)] or modules
    if len(makers) > 1:
        makers = [name for name in makers if _has_definition(name, cls.__name__)] or makers
    return min(makers, key=lambda name: (name == "__main__", -name.count("."), len(name)))


def _can_make(module: str) -> bool:
    space = object.__getattribute__(sys.modules[module], "__dict__") if module in sys.modules else {}
    return "namedtuple" in space or space.get("collections") is collections


def _has_definition(module: str, name: str) -> bool:
    """Read the module's source: two modules that could both have made a class are rare enough for that."""
    path = object.__getattribute__(sys.modules[module], "__dict__").get("__file__") or ""
    try:
        text = Path(path).read_text(encoding="utf-8") if path.endswith(".py") else ""
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(rf"namedtuple\(\s*[\"']{name}[\"']", text) is not None


# --- PySpark ----------------------------------------------------------------------------------------------


def _loaded_version() -> str:
    return str(getattr(sys.modules.get("pyspark"), "__version__", ""))


def _installed_version() -> str:
    """Return the version that an import would load, read without importing it; empty without PySpark."""
    try:
        spec = importlib.util.find_spec("pyspark")
    except ValueError:  # a stand-in in sys.modules has no spec
        return ""
    if spec is None or spec.origin is None:
        return ""
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:  # inside a zip
        return ""
    match = re.search(r"__version__[^=]*=\s*[\"']([^\"']+)", text)
    return match[1] if match else ""


def _cause() -> str:
    """Return why PySpark patches in this process, or would if imported; empty when it would not."""
    version = _loaded_version() or _installed_version()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers <= _ALWAYS_UP_TO:
        return f"PySpark {version} applies it always"
    if os.environ.get(ENABLING_VARIABLE) == "1":
        return f"{ENABLING_VARIABLE}=1"
    return ""


_STATE = _State()
