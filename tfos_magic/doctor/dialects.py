"""Which cloudpickle an object would meet, and what that one makes of it.

Runs on: driver.

=========  =============================  ================================================================
dialect    pickles with                   for
=========  =============================  ================================================================
Spark      ``pyspark.cloudpickle``        closures, UDFs and data of Spark's ordinary jobs; not pip's
nodes      pip's ``cloudpickle``          what ``%%tfos_train`` and ``%%tfos_infer`` ship
=========  =============================  ================================================================

Both leave the user's objects as they are: a broadcast is not noted for the next job, an open file is not read.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Any

from tfos_magic import obstacles, shipping
from tfos_magic.errors import SessionError
from tfos_magic.obstacles import Obstacle

Reduce = Callable[[Any], Any]


class RefusedError(Exception):
    """Stops a pickler at an object that cannot travel; the object is `value`."""

    def __init__(self, value: Any, obstacle: Obstacle) -> None:
        super().__init__(f"it is {obstacle.what}")
        self.value = value
        self.obstacle = obstacle


class Dialect:
    """One way to pickle; made anew for each examination, because it keeps what took long to reduce.

    Attributes
    ----------
    title : str
        The cloudpickle's name and version.
    pickler : type
        Its ``Pickler``.
    is_nodes : bool
        It is the one of our nodes.
    """

    title: str
    is_nodes: bool
    pickler: Any

    def __init__(self) -> None:
        self._reduced: dict[int, tuple[Any, Any]] = {}

    def find_obstacle(self, obj: Any) -> Obstacle | None:
        """Return what is known to stop `obj`, or to make something else of it, before it is pickled."""
        raise NotImplementedError

    def explain(self, obj: Any) -> Obstacle | None:
        """Return what is known about `obj`, of which pickling has failed."""
        raise NotImplementedError

    def reduce(self, obj: Any, default: Reduce) -> Any:
        """Return what ``reducer_override`` of this dialect would."""
        if is_of(obj, "keras", "KerasSaveable"):
            return self._reduce_once(obj)
        return default(obj)

    def _reduce_once(self, obj: Any) -> Any:
        # Keras writes a whole file for each of these; traced, measured and sent, it would write three.
        if id(obj) not in self._reduced:
            self._reduced[id(obj)] = (obj, obj.__reduce_ex__(5))
        return self._reduced[id(obj)][1]

    def dumps(self, value: Any) -> bytes:
        """Pickle for the second interpreter; RefusedError where something cannot travel."""
        file = io.BytesIO()
        self.dump(value, file)
        return file.getvalue()

    def dump(self, value: Any, file: Any, on_object: Callable[[Any], None] | None = None) -> None:
        """Pickle into `file`, at full speed; `on_object` sees all that is not of Python's simplest types."""
        pickler = self._fast_pickler(file, protocol=5)
        pickler.on_object = on_object
        pickler.dump(value)

    @functools.cached_property
    def _fast_pickler(self) -> Any:
        dialect = self
        base: Any = self.pickler

        class Pickler(base):  # type: ignore[misc]  # cloudpickle publishes no types
            def reducer_override(self, obj: Any) -> Any:
                if self.on_object is not None:
                    self.on_object(obj)
                obstacle = dialect.find_obstacle(obj)
                if obstacle is not None and not becomes_another(obj, obstacle):
                    raise RefusedError(obj, obstacle)
                if obstacle is not None:
                    return str, (obstacle.what,)
                return dialect.reduce(obj, super().reducer_override)

        return Pickler


class SparkDialect(Dialect):
    """Spark's ordinary jobs.

    Raises
    ------
    SessionError
        There is no PySpark.
    """

    is_nodes = False

    def __init__(self) -> None:
        super().__init__()
        try:
            from pyspark import cloudpickle
        except ImportError:
            raise SessionError(
                "PySpark is not installed, so nobody can say how it would pickle this.",
                hint="pip install pyspark; or %%tfos_doctor above a cell, which asks the nodes' own cloudpickle.",
            ) from None
        self.pickler = cloudpickle.CloudPickler
        self.title = f"pyspark.cloudpickle {getattr(cloudpickle, '__version__', '')}".strip()

    def find_obstacle(self, obj: Any) -> Obstacle | None:
        """Let broadcasts and accumulators pass, which are made to be captured; standard streams are found by name."""
        found = obstacles.find(obj, is_refused=True)
        if found is None or found.in_spark is None or obj is sys.stdout or obj is sys.stderr:
            return None
        return found

    def explain(self, obj: Any) -> Obstacle | None:
        """As :func:`obstacles.find`, without what Spark itself knows how to send."""
        found = obstacles.find(obj)
        return found if found is not None and found.in_spark is not None else None

    def reduce(self, obj: Any, default: Reduce) -> Any:
        """Write only the name of a broadcast: pickling one would add it to what the next job sends."""
        if is_of(obj, "pyspark", "Broadcast") or is_of(obj, "pyspark", "Accumulator"):
            return str, (type(obj).__name__,)
        return super().reduce(obj, default)


class NodesDialect(Dialect):
    """What our nodes are sent."""

    is_nodes = True

    def __init__(self) -> None:
        super().__init__()
        import cloudpickle

        self.pickler = cloudpickle.Pickler
        self.title = f"cloudpickle {cloudpickle.__version__}"

    def find_obstacle(self, obj: Any) -> Obstacle | None:
        """Find what :func:`tfos_magic.shipping.pack` refuses."""
        return obstacles.find(obj, is_refused=True)

    def explain(self, obj: Any) -> Obstacle | None:
        """As :func:`obstacles.find`."""
        return obstacles.find(obj)

    def reduce(self, obj: Any, default: Reduce) -> Any:
        """As :func:`tfos_magic.shipping.pack` does."""
        return shipping.reduce_for_nodes(obj, functools.partial(super().reduce, default=default))


def becomes_another(obj: Any, obstacle: Obstacle) -> bool:
    """Tell whether cloudpickle pickles what it cannot really send, so that something else arrives."""
    if obstacle.trap == "open-file":
        return is_read_as_text(obj)
    return bool(obstacle.arrives_as)


def is_read_as_text(file: Any) -> bool:
    """Tell whether cloudpickle would read this open file to its end and send a ``StringIO``."""
    if type(file).__name__ != "TextIOWrapper" or file.closed:
        return False
    mode = str(getattr(file, "mode", ""))
    return "r" in mode and "+" not in mode and not file.isatty()


def is_of(obj: Any, package: str, name: str) -> bool:
    """Tell whether a class called `name`, of `package`, is among the classes of `obj`; imports nothing."""
    return any(
        kind.__name__ == name and str(kind.__module__).partition(".")[0] == package for kind in type(obj).__mro__
    )
