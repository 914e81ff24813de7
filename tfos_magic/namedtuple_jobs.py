"""Lets Spark's ordinary jobs run without the namedtuple patch, in workers that are warm and in those to come.

Runs on: driver.

All that PySpark sends to Python workers, of RDDs, UDFs, ``mapInArrow`` and the like, it pickles in one function:

    pyspark.rdd._prepare_for_python_RDD(sc, command) ──► (pickled command, broadcasts, environment, includes)

:class:`CleanJobs` puts another in its place, which hands on ``carry(command)``: see
:mod:`tfos_magic.namedtuple_worker`. So the revert comes with the job itself: no worker is restarted, Spark's settings
and a user's ``sitecustomize`` are left alone, executors need nothing installed, and PySpark 3.2, which always patches,
is served like 4.x. Other ways, and why they were not taken:

* ``sc.environment["PYSPARK_ENABLE_NAMEDTUPLE_PATCH"] = "0"`` gives workers that were never patched. But they are
  others: what the warm ones have loaded (TensorFlow: seconds, and half a gigabyte each, held twice for a minute) is
  lost, they lack ``pyspark.serializers._restore`` for data pickled before, and PySpark 3.2 does not listen.
* A daemon module or ``sitecustomize`` needs a new session, and shadows the user's own.
* One job that reverts all workers at the beginning costs a job, and workers forked later are patched again.

What it cannot reach: a command that Spark already has, of a UDF that was used or an RDD that was computed before. A
patched driver has pickled it, and it runs as it is in a worker that no newer job has passed; a UDF is mended by
defining it again. In the same way, what was computed once while jobs were kept clean keeps its revert afterwards.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark import SparkContext

_HOMES = ("pyspark.core.rdd", "pyspark.rdd")  # PySpark 4, and before
_FUNCTION = "_prepare_for_python_RDD"


class CleanJobs:
    """Keeps jobs clean from :meth:`start` to :meth:`close`; also begins before PySpark is imported."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._carrier: _Carrier | None = None
        self._finder: _Finder | None = None
        self._as_is = threading.local()
        self._touched: weakref.WeakSet[SparkContext] = weakref.WeakSet()

    @property
    def is_on(self) -> bool:
        """Whether jobs are, or will be, kept clean."""
        return self._carrier is not None or self._finder is not None

    def touched(self) -> list[SparkContext]:
        """Return the contexts for which commands have carried the revert."""
        return list(self._touched)

    def start(self) -> None:
        """Keep all jobs from now on clean, of sessions that are there and of those to come; idempotent."""
        with self._lock:
            if self.is_on:
                return
            home = next((sys.modules[name] for name in _HOMES if _has_function(name)), None)
            if home is not None:
                self._join(home)
            else:
                self._finder = _Finder(self._imported)
                sys.meta_path.insert(0, self._finder)

    def close(self) -> None:
        """Give PySpark its own function back; idempotent. Workers stay as they are."""
        with self._lock:
            self._stop_waiting()
            if self._carrier is not None:
                self._carrier.owners.remove(self)
                if not self._carrier.owners:
                    _exchange(self._carrier, self._carrier.original)
                self._carrier = None

    @contextlib.contextmanager
    def left_as_is(self) -> Iterator[None]:
        """Let commands of this thread go without the revert, e.g. to see in which state the workers are."""
        before = self.is_left_as_is
        self._as_is.is_on = True
        try:
            yield
        finally:
            self._as_is.is_on = before

    @property
    def is_left_as_is(self) -> bool:
        """Whether this thread is inside :meth:`left_as_is`."""
        return getattr(self._as_is, "is_on", False)

    def note(self, context: SparkContext) -> None:
        """Remember that a command for `context` carries the revert."""
        self._touched.add(context)

    def _imported(self, module: types.ModuleType) -> None:
        with self._lock:
            if self._finder is not None:  # else closed meanwhile
                self._stop_waiting()
                self._join(module)

    def _stop_waiting(self) -> None:
        if self._finder is not None:
            with contextlib.suppress(ValueError):  # somebody else has taken it out
                sys.meta_path.remove(self._finder)
            self._finder = None

    def _join(self, home: types.ModuleType) -> None:
        found = getattr(home, _FUNCTION)
        carrier = found if isinstance(found, _Carrier) else _Carrier(found)
        carrier.owners.append(self)
        self._carrier = carrier
        _exchange(carrier.original, carrier)


class _Carrier:
    """Stands in PySpark's modules for the function that pickles commands, for as long as it has an owner."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.owners: list[CleanJobs] = []

    def __call__(self, sc: SparkContext, command: Any) -> Any:
        owners = list(self.owners)
        if any(owner.is_left_as_is for owner in owners):
            return self.original(sc, command)
        from tfos_magic import namedtuple_worker  # not before: %load_ext is to cost nothing

        for owner in owners:
            owner.note(sc)
        return self.original(sc, namedtuple_worker.carry(command))


def _has_function(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and hasattr(module, _FUNCTION)


def _exchange(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put `new` wherever PySpark's modules hold `old`: some have imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "pyspark" and isinstance(module, types.ModuleType):
            space = object.__getattribute__(module, "__dict__")
            if space.get(_FUNCTION) is old:
                space[_FUNCTION] = new


class _Finder:
    """Waits for PySpark's RDDs to be imported; finds nothing itself, and leaves no trace on the module."""

    def __init__(self, on_import: Callable[[types.ModuleType], None]) -> None:
        self._on_import = on_import

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _HOMES:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._on_import)  # type: ignore[assignment]  # by its methods
                return spec
        return None


class _Loader:
    """The module's own loader, which tells when the module is there."""

    def __init__(self, loader: Any, on_import: Callable[[types.ModuleType], None]) -> None:
        self._loader = loader
        self._on_import = on_import

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        created: types.ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if hasattr(module, _FUNCTION):
            self._on_import(module)
