"""What is known not to travel, why, and what to do instead.

Runs on: anywhere. Recognises objects by the names of their classes, so it imports none of the libraries it knows.

=====================  ==============================================================================
kind                   behaviour
=====================  ==============================================================================
refused                must not travel even where it would pickle: driver-only, or silently another thing
explained              pickling fails by itself; the entry says why in words a person can use
=====================  ==============================================================================

Words and advice are those for a node's function. Spark's ordinary jobs have no ``ctx`` and no cell, so the doctor
has the advice that suits them, ``in_spark``; where that is None, such a job may take the object along.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Obstacle:
    """One kind of object that cannot travel."""

    trap: str
    """Its name in a diagnosis; stable."""
    what: str
    why: str
    fix: str
    """What to do instead in a node's function."""
    in_spark: str | None
    """What to do instead in an ordinary Spark job; None where nothing needs to be done."""
    is_refused: bool = True
    arrives_as: str = ""
    """What it becomes where it pickles all the same."""


_DRIVER_ONLY = "Spark's own objects talk to the JVM of the driver; executors have none."
_PASS_DATA = "Give it to the nodes with --data, and read it there with ctx.dataset()."
_USE_ON_DRIVER = "Use it on the driver; take along what it gives: rows = df.collect(), or join the DataFrames."
_HANDLE = "It is a handle of this process and means nothing in another."
_MAKE_THERE = "Make it inside the cell, on the node that uses it."
_MAKE_IN_TASK = "Make it inside the function, in the task that uses it (once per partition: mapPartitions)."
_TF_HANDLE = "TensorFlow keeps it outside Python, in this process."

_LOCK = Obstacle("lock", "a lock", "A lock belongs to the threads of one process.", _MAKE_THERE, _MAKE_IN_TASK)
_THREAD = Obstacle("thread", "a thread, or something that waits for threads", _HANDLE, _MAKE_THERE, _MAKE_IN_TASK)
_FILE = Obstacle(
    "open-file",
    "an open file",
    _HANDLE,
    "Ship its path, and open it inside the cell.",
    "Take its path along, and open it inside the function: with open(path) as file: …",
)
_RUNNING = Obstacle(
    "generator",
    "a generator or iterator in flight",
    "Its place in its code cannot be pickled.",
    "Ship the function that makes it, and call that inside the cell; or a list of its values.",
    "Take along the function that makes it, and call that in the task; or list(…) of its values.",
)
_SOCKET = Obstacle(
    "socket",
    "a network connection",
    _HANDLE,
    "Ship its address, and connect inside the cell.",
    "Take its address along, and connect inside the function (once per partition: mapPartitions).",
)
_DATABASE = Obstacle(
    "database",
    "a database connection",
    _HANDLE,
    "Ship its path or URL, and connect inside the cell.",
    "Take its path or URL along, and connect inside the function (once per partition: mapPartitions).",
)
_KEEP_TEXT = "Keep its text: traceback.format_exc()."
_FRAME = Obstacle("frame", "a stack frame or traceback", _HANDLE, _KEEP_TEXT, _KEEP_TEXT)
_KERNEL = Obstacle(
    "kernel",
    "part of the notebook's kernel",
    "Nodes have no IPython.",
    "Leave it out of the cell and of what it calls.",
    "Leave it out of the function and of what it calls.",
)
_SESSION = Obstacle("spark-session", "the Spark session", _DRIVER_ONLY, _PASS_DATA, _USE_ON_DRIVER)
_DATAFRAME = Obstacle("spark-dataframe", "a Spark DataFrame or RDD", _DRIVER_ONLY, _PASS_DATA, _USE_ON_DRIVER)
_COLUMN = Obstacle(
    "spark-column",
    "a Spark column expression",
    _DRIVER_ONLY,
    "Use it on the driver, before --data.",
    "Use it on the driver: df.select(column).",
)
_UDF = Obstacle(
    "spark-udf",
    "a Spark user-defined function",
    _DRIVER_ONLY,
    "Capture the plain function instead: its .func.",
    "Take along the plain function instead: its .func.",
)
_BROADCAST = Obstacle(
    "spark-broadcast",
    "a Spark broadcast or accumulator",
    _DRIVER_ONLY,
    "Capture its .value, or report with ctx.report().",
    None,
)
_SPARK_MODEL = Obstacle(
    "spark-model",
    "a Spark ML model or transformer",
    _DRIVER_ONLY,
    "Apply it on the driver, before --data.",
    "Apply it on the driver: model.transform(df).",
)
_DATASET = Obstacle(
    "tf-dataset",
    "a tf.data pipeline",
    _TF_HANDLE,
    "Make it inside the cell: ctx.dataset() for Spark's rows, or from files.",
    _MAKE_IN_TASK,
)
_STRATEGY = Obstacle(
    "tf-strategy",
    "a tf.distribute strategy",
    _TF_HANDLE,
    "Use ctx.strategy() or ctx.distribute(model) inside the cell.",
    _MAKE_IN_TASK,
)
_GRAPH = Obstacle(
    "tf-graph", "a TensorFlow graph, session or compiled function", _TF_HANDLE, _MAKE_THERE, _MAKE_IN_TASK
)
_TABLE = Obstacle("tf-table", "a TensorFlow lookup table", _TF_HANDLE, _MAKE_THERE, _MAKE_IN_TASK)
_TF_WRITER = Obstacle(
    "tf-handle",
    "a TensorFlow resource",
    _TF_HANDLE,
    _MAKE_THERE,
    _MAKE_IN_TASK,
    is_refused=False,
)
_TF_FUNCTION = Obstacle(
    "tf-function-called",
    "a tf.function that has been called",
    "Its first call compiled it into a graph of this process.",
    "Ship the plain function (.python_function), and apply tf.function inside the cell.",
    "Take along the plain function (.python_function), and apply tf.function inside the task.",
    is_refused=False,
)
_CHECKPOINT = Obstacle(
    "tf-checkpoint",
    "a TensorFlow checkpoint object",
    _TF_HANDLE,
    "Ship its path, and make it inside the cell.",
    "Take its path along, and make it inside the function.",
    is_refused=False,
)
_CACHED = Obstacle(
    "lru-cache",
    "a function cached by functools",
    "The cache is made in C and is pickled by name, which the nodes do not have.",
    "Ship the plain function (.__wrapped__), and cache it inside the cell.",
    "Take along the plain function (.__wrapped__), or put the cached one into a module that executors have.",
    is_refused=False,
)
_WEAK = Obstacle(
    "weakref",
    "a weak reference (functools.singledispatch holds some)",
    "It points into this process.",
    "Define what holds it inside the cell.",
    "Define what holds it inside the function, or in a module that executors have.",
    is_refused=False,
)
_VIEW = Obstacle(
    "memoryview",
    "a view of memory",
    _HANDLE,
    "Ship bytes(…) of it.",
    "Take bytes(…) of it along.",
    arrives_as="bytes",
)
_PROCESS = Obstacle("process", "a process or a pool of them", _HANDLE, _MAKE_THERE, _MAKE_IN_TASK)
_CONTEXT_VARIABLE = Obstacle(
    "contextvar",
    "a context variable",
    "Its values belong to the threads of one process.",
    "Ship its value: variable.get().",
    "Take its value along: variable.get().",
)

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
    ("_contextvars", "ContextVar", _CONTEXT_VARIABLE),
    ("weakref", "ReferenceType", _WEAK),
    ("builtins", "weakref", _WEAK),
    ("weakref", "WeakKeyDictionary", _WEAK),
    ("weakref", "WeakValueDictionary", _WEAK),
    ("_weakrefset", "WeakSet", _WEAK),
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
    ("pyspark", "UserDefinedFunction", _UDF),
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
    ("tensorflow.python", "SummaryWriter", _TF_WRITER),
    ("tensorflow.python", "TensorArray", _TF_WRITER),
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
