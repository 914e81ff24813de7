"""What is known not to travel, why, and what to do instead; and how an object is reached.

Runs on: anywhere. Recognises objects by the names of their classes, so it imports none of the libraries it knows.

=====================  ==============================================================================
kind                   behaviour
=====================  ==============================================================================
refused                must not travel even where it would pickle: driver-only, or silently another thing
explained              pickling fails by itself; the entry says why in words a person can use
=====================  ==============================================================================
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Obstacle:
    """One kind of object that cannot travel."""

    what: str
    why: str
    fix: str
    is_refused: bool = True


_DRIVER_ONLY = "Spark's own objects talk to the JVM of the driver; executors have none."
_PASS_DATA = "Give it to the nodes with --data, and read it there with ctx.dataset()."
_HANDLE = "It is a handle of this process and means nothing in another."
_MAKE_THERE = "Make it inside the cell, on the node that uses it."
_TF_HANDLE = "TensorFlow keeps it outside Python, in this process."

_LOCK = Obstacle("a lock", "A lock belongs to the threads of one process.", _MAKE_THERE)
_THREAD = Obstacle("a thread, or something that waits for threads", _HANDLE, _MAKE_THERE)
_FILE = Obstacle("an open file", _HANDLE, "Ship its path, and open it inside the cell.")
_RUNNING = Obstacle(
    "a generator or iterator in flight",
    "Its place in its code cannot be pickled.",
    "Ship the function that makes it, and call that inside the cell; or a list of its values.",
)
_SOCKET = Obstacle("a network connection", _HANDLE, "Ship its address, and connect inside the cell.")
_DATABASE = Obstacle("a database connection", _HANDLE, "Ship its path or URL, and connect inside the cell.")
_FRAME = Obstacle("a stack frame or traceback", _HANDLE, "Keep its text: traceback.format_exc().")
_KERNEL = Obstacle(
    "part of the notebook's kernel", "Nodes have no IPython.", "Leave it out of the cell and of what it calls."
)
_SESSION = Obstacle("the Spark session", _DRIVER_ONLY, _PASS_DATA)
_DATAFRAME = Obstacle("a Spark DataFrame or RDD", _DRIVER_ONLY, _PASS_DATA)
_COLUMN = Obstacle("a Spark column expression", _DRIVER_ONLY, "Use it on the driver, before --data.")
_BROADCAST = Obstacle(
    "a Spark broadcast or accumulator", _DRIVER_ONLY, "Capture its .value, or report with ctx.report()."
)
_SPARK_MODEL = Obstacle("a Spark ML model or transformer", _DRIVER_ONLY, "Apply it on the driver, before --data.")
_DATASET = Obstacle(
    "a tf.data pipeline", _TF_HANDLE, "Make it inside the cell: ctx.dataset() for Spark's rows, or from files."
)
_STRATEGY = Obstacle(
    "a tf.distribute strategy", _TF_HANDLE, "Use ctx.strategy() or ctx.distribute(model) inside the cell."
)
_GRAPH = Obstacle("a TensorFlow graph, session or compiled function", _TF_HANDLE, _MAKE_THERE)
_TABLE = Obstacle("a TensorFlow lookup table", _TF_HANDLE, _MAKE_THERE)
_TF_FUNCTION = Obstacle(
    "a tf.function that has been called",
    "Its first call compiled it into a graph of this process.",
    "Ship the plain function (.python_function), and apply tf.function inside the cell.",
    is_refused=False,
)
_CHECKPOINT = Obstacle(
    "a TensorFlow checkpoint object", _TF_HANDLE, "Ship its path, and make it inside the cell.", is_refused=False
)
_CACHED = Obstacle(
    "a function cached by functools",
    "The cache is made in C and is pickled by name, which the nodes do not have.",
    "Ship the plain function (.__wrapped__), and cache it inside the cell.",
    is_refused=False,
)
_WEAK = Obstacle(
    "a weak reference (functools.singledispatch holds some)",
    "It points into this process.",
    "Define what holds it inside the cell.",
    is_refused=False,
)
_VIEW = Obstacle("a view of memory", _HANDLE, "Ship bytes(…) of it.")
_PROCESS = Obstacle("a process or a pool of them", _HANDLE, _MAKE_THERE)

# (module or its beginning, class) → obstacle. Classes are looked up along the MRO.
_KNOWN: tuple[tuple[str, str, Obstacle], ...] = (
    ("_thread", "lock", _LOCK),
    ("_thread", "RLock", _LOCK),
    ("threading", "_RLock", _LOCK),
    ("threading", "Condition", _THREAD),
    ("threading", "Event", _THREAD),
    ("threading", "Semaphore", _THREAD),
    ("threading", "Barrier", _THREAD),
    ("threading", "Thread", _THREAD),
    ("_thread", "_local", _THREAD),
    ("_thread", "_ThreadHandle", _THREAD),
    ("queue", "Queue", _THREAD),
    ("_queue", "SimpleQueue", _THREAD),
    ("concurrent.futures", "Executor", _PROCESS),
    ("concurrent.futures", "Future", _THREAD),
    ("subprocess", "Popen", _PROCESS),
    ("multiprocessing.pool", "Pool", _PROCESS),
    ("multiprocessing.process", "BaseProcess", _PROCESS),
    ("asyncio", "AbstractEventLoop", _THREAD),
    ("_asyncio", "Future", _THREAD),
    ("socket", "socket", _SOCKET),
    ("_socket", "socket", _SOCKET),
    ("ssl", "SSLContext", _SOCKET),
    ("sqlite3", "Connection", _DATABASE),
    ("sqlite3", "Cursor", _DATABASE),
    ("_io", "TextIOWrapper", _FILE),
    ("_io", "BufferedReader", _FILE),
    ("_io", "BufferedWriter", _FILE),
    ("_io", "BufferedRandom", _FILE),
    ("_io", "FileIO", _FILE),
    ("tempfile", "_TemporaryFileWrapper", _FILE),
    ("mmap", "mmap", _FILE),
    ("builtins", "generator", _RUNNING),
    ("builtins", "coroutine", _RUNNING),
    ("builtins", "async_generator", _RUNNING),
    ("builtins", "frame", _FRAME),
    ("builtins", "traceback", _FRAME),
    ("builtins", "memoryview", _VIEW),
    ("_contextvars", "ContextVar", _THREAD),
    ("weakref", "ReferenceType", _WEAK),
    ("builtins", "weakref", _WEAK),
    ("weakref", "WeakKeyDictionary", _WEAK),
    ("functools", "_lru_cache_wrapper", _CACHED),
    ("IPython.core.interactiveshell", "InteractiveShell", _KERNEL),
    ("ipykernel", "Kernel", _KERNEL),
    ("ipywidgets", "Widget", _KERNEL),
    ("pyspark", "SparkContext", _SESSION),
    ("pyspark", "SparkSession", _SESSION),
    ("pyspark", "SQLContext", _SESSION),
    ("pyspark", "StreamingContext", _SESSION),
    ("pyspark", "DataFrame", _DATAFRAME),
    ("pyspark", "RDD", _DATAFRAME),
    ("pyspark", "GroupedData", _DATAFRAME),
    ("pyspark", "DataFrameReader", _SESSION),
    ("pyspark", "Column", _COLUMN),
    ("pyspark", "Broadcast", _BROADCAST),
    ("pyspark", "Accumulator", _BROADCAST),
    ("pyspark", "JavaWrapper", _SPARK_MODEL),
    ("py4j", "JavaObject", _SESSION),
    ("py4j", "JavaGateway", _SESSION),
    ("py4j", "JVMView", _SESSION),
    ("tensorflow.python.data", "DatasetV2", _DATASET),
    ("tensorflow.python.data", "IteratorBase", _DATASET),
    ("tensorflow.python.data", "OwnedIterator", _DATASET),
    ("tensorflow.python.distribute", "StrategyBase", _STRATEGY),
    ("tensorflow.python.distribute", "InputIterator", _DATASET),
    ("tensorflow.python.distribute", "DistributedDatasetInterface", _DATASET),
    ("tensorflow.python", "Graph", _GRAPH),
    ("tensorflow.python", "BaseSession", _GRAPH),
    ("tensorflow.python", "ConcreteFunction", _GRAPH),
    ("tensorflow.python", "LookupInterface", _TABLE),
    ("tensorflow.python", "InitializableLookupTableBase", _TABLE),
    ("tensorflow.python.eager.polymorphic_function", "Function", _TF_FUNCTION),
    ("tensorflow.python", "Checkpoint", _CHECKPOINT),
    ("tensorflow.python", "CheckpointV1", _CHECKPOINT),
)


def find(obj: Any, *, is_refused: bool | None = None) -> Obstacle | None:
    """Return what is known about `obj`, or None.

    Parameters
    ----------
    obj : object
    is_refused : bool, optional
        Only obstacles of this behaviour.
    """
    obstacle = _of_type(type(obj))
    if obstacle is None and isinstance(obj, types.FunctionType | types.MethodType) and obj.__name__ == "get_ipython":
        obstacle = _KERNEL if obj.__module__.startswith(("IPython.", "ipykernel.")) else None
    return obstacle if obstacle and is_refused in (None, obstacle.is_refused) else None


_BY_NAME: Mapping[str, Sequence[tuple[str, Obstacle]]] = {
    name: [(module, obstacle) for module, other, obstacle in _KNOWN if other == name] for _, name, _ in _KNOWN
}


def _of_type(kind: type) -> Obstacle | None:
    # Called for every object that is pickled: no loop over all that is known.
    for base in kind.__mro__:
        for module, obstacle in _BY_NAME.get(base.__name__, ()):
            if base.__module__ == module or base.__module__.startswith(f"{module}."):
                return obstacle
    return None


# --- how an object is reached ------------------------------------------------------------------------------


def render_path(name: str, chain: Sequence[Any]) -> str:
    """Return the way from a named object to the last of `chain` as code that a person could type.

    Parameters
    ----------
    name : str
        How the first object of `chain` is called.
    chain : sequence of object
        The pickler's nesting: each object was being pickled as part of the one before. Tuples and dicts that
        pickling made up on the way are skipped.

    Examples
    --------
    >>> render_path("cfg", [cfg := {"opt": [1]}, cfg["opt"]])
    'cfg["opt"]'
    """
    path, position = name, 0
    while position < len(chain) - 1:
        step, position = _next_step(chain, position)
        path += step
    return path


def _next_step(chain: Sequence[Any], position: int) -> tuple[str, int]:
    """Return the words for one step, and where it leads: the first later object that `chain[position]` holds."""
    parts = _parts(chain[position])
    for later in range(position + 1, len(chain)):
        step = parts.get(id(chain[later]))
        if step is not None:
            return step, later
    return "", position + 1


def _parts(holder: Any) -> dict[int, str]:
    """Map the id of everything that `holder` holds to how it is written."""
    found: dict[int, str] = {}
    for step, value in _named_parts(holder):
        found.setdefault(id(value), step)
    return found


def _named_parts(holder: Any) -> list[tuple[str, Any]]:
    if isinstance(holder, types.FunctionType):
        return _function_parts(holder)
    if isinstance(holder, type):
        return [(f".{name}", value) for name, value in vars(holder).items()]
    if isinstance(holder, types.MethodType):
        return [(".__self__", holder.__self__), (".__func__", holder.__func__)]
    if isinstance(holder, functools.partial):
        arguments = [(f".args[{i}]", value) for i, value in enumerate(holder.args)]
        return [(".func", holder.func), *arguments, *((f".keywords[{k!r}]", v) for k, v in holder.keywords.items())]
    if isinstance(holder, property):
        return [(f".{name}", getattr(holder, name)) for name in ("fget", "fset", "fdel")]
    if isinstance(holder, staticmethod | classmethod):
        return [("", holder.__func__)]
    return [*_attributes(holder), *_items(holder)]


def _function_parts(function: types.FunctionType) -> list[tuple[str, Any]]:
    code = function.__code__
    closure = zip(code.co_freevars, function.__closure__ or (), strict=True)
    parts = [(f" → {name}", cell.cell_contents) for name, cell in closure if _is_filled(cell)]
    parts += [(f" → {name}", value) for name, value in function.__globals__.items()]
    parts += [(f".__defaults__[{i}]", value) for i, value in enumerate(function.__defaults__ or ())]
    parts += [(f".__kwdefaults__[{name!r}]", value) for name, value in (function.__kwdefaults__ or {}).items()]
    parts += [(f".{name}", value) for name, value in vars(function).items()]
    return parts


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _attributes(holder: Any) -> list[tuple[str, Any]]:
    attributes = dict(getattr(holder, "__dict__", None) or {})
    for kind in type(holder).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(holder, name):
                attributes.setdefault(name, getattr(holder, name))
    return [(f".{name}", value) for name, value in attributes.items()]


def _items(holder: Any) -> list[tuple[str, Any]]:
    try:
        if isinstance(holder, Mapping):
            return [(_index(key), value) for key, value in holder.items()]
        if isinstance(holder, Sequence) and not isinstance(holder, str | bytes | bytearray | range | memoryview):
            return [(f"[{i}]", value) for i, value in enumerate(holder)]
        if isinstance(holder, Set):
            return [("{…}", value) for value in holder]
    except Exception:  # a user's container may raise anything; its path is then a little shorter
        pass
    return []


def _index(key: Any) -> str:
    return f'["{key}"]' if isinstance(key, str) else f"[{key!r}]"
