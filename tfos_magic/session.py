"""The notebook's Spark session: found, or made when there is none; its slots and its address.

Runs on: driver. All knowledge of PySpark's private corners is in this file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import SessionError, TooFewSlotsError

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

_NAMES = ("spark", "sc")
_EXECUTORS_TIMEOUT_S = 20.0


def find_session(namespace: Mapping[str, Any], name: str | None = None) -> SparkSession | None:
    """Return the session to use: the one called `name`, else ``spark`` or ``sc``, else the active one, else None.

    Parameters
    ----------
    namespace : mapping of str to object
        The notebook's globals.
    name : str, optional
        From ``--session``.

    Raises
    ------
    SessionError
        `name` is not a usable Spark session.
    """
    if name is not None:
        if name not in namespace:
            raise SessionError(
                f"There is no variable {name!r} in the notebook.", hint="--session takes the name of a SparkSession."
            )
        return as_session(namespace[name], name)
    if "pyspark" not in sys.modules:
        return None
    for candidate in _NAMES:
        if candidate in namespace and _is_spark(namespace[candidate]):
            return as_session(namespace[candidate], candidate)
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    return as_session(active, "the active session") if active is not None else None


def as_session(spark: Any, name: str = "the session") -> SparkSession:
    """Return `spark`, a SparkSession or SparkContext, as a session that can run nodes.

    Raises
    ------
    SessionError
        It is something else, is stopped, or is a Spark Connect session.
    """
    kind = f"{type(spark).__module__}.{type(spark).__qualname__}"
    if ".connect." in kind:
        raise SessionError(
            f"{name} is a Spark Connect session, which has no SparkContext to run nodes on.",
            hint='Use a classic session: SparkSession.builder.master("local[4]").getOrCreate().',
        )
    if not _is_spark(spark):
        raise SessionError(f"{name} is a {kind}, not a SparkSession or SparkContext.")
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    context = spark if isinstance(spark, SparkContext) else spark.sparkContext
    if context._jsc is None:
        raise SessionError(
            f"{name} is stopped.", hint="Make a new session: spark = SparkSession.builder.getOrCreate()."
        )
    return SparkSession(context) if isinstance(spark, SparkContext) else spark


def _is_spark(value: Any) -> bool:
    return any(
        base.__module__.startswith("pyspark.") and base.__name__ in ("SparkSession", "SparkContext")
        for base in type(value).__mro__
    )


def local_session(slots: int) -> SparkSession:
    """Return a new local session with `slots` task slots.

    Raises
    ------
    SessionError
        There is no Java, or Spark does not start.
    """
    from tfos_magic import java

    java.ensure_java()
    from pyspark.sql import SparkSession

    # A SparkContext takes SIGINT for itself; the notebook's interrupt must stay the notebook's. PySpark runs whatever
    # "python3" the PATH has unless told otherwise; the nodes need the interpreter that has the user's packages.
    with _signal_kept(), _environment(PYSPARK_PYTHON=os.environ.get("PYSPARK_PYTHON", sys.executable)):
        try:
            return (
                SparkSession.builder.master(f"local[{slots}]")
                .appName("tfos_magic")
                .config("spark.ui.showConsoleProgress", "false")
                .getOrCreate()
            )
        except Exception as error:  # py4j and Java raise what they like
            raise SessionError(
                f"Spark did not start: {type(error).__name__}: {error}",
                cause="Most often the Java version does not fit: Spark 3.5 needs 8, 11 or 17, Spark 4 needs 17 or 21.",
            ) from error


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _signal_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def driver_address(context: SparkContext) -> tuple[str, str]:
    """Return (address to bind, address that executors connect to), both from Spark's own settings."""
    conf = context.getConf()
    host = conf.get("spark.driver.host") or "localhost"
    return conf.get("spark.driver.bindAddress") or host, host


def kept_environment(context: SparkContext) -> list[str]:
    """Return the names of the environment variables that the user set for executors."""
    prefix = "spark.executorEnv."
    names = [key[len(prefix) :] for key, _ in context.getConf().getAll() if key.startswith(prefix)]
    # In local mode executors share this process's environment: what is set here was set by the user.
    return names + (["OMP_NUM_THREADS"] if "OMP_NUM_THREADS" in os.environ else [])


def default_file_system(context: SparkContext) -> str:
    """Return Hadoop's ``fs.defaultFS``, e.g. ``hdfs://name:8020`` or ``file:///``."""
    return str(context._jsc.hadoopConfiguration().get("fs.defaultFS") or "file:///")


def is_local(context: SparkContext) -> bool:
    """Return True where the driver's own JVM is the only executor."""
    return context.master == "local" or str(context.master).startswith("local[")


def is_dynamic(context: SparkContext) -> bool:
    """Return True under dynamic allocation, where Spark refuses barrier stages and slots come on demand."""
    wanted = (context.getConf().get("spark.dynamicAllocation.enabled") or "false").lower() == "true"
    return wanted and not is_local(context)  # where Spark ignores the setting


@dataclass(frozen=True, order=True)
class SlotLimit:
    """How many slots there can be, and the setting that says so."""

    slots: int
    setting: str
    value: str


def slot_limit(context: SparkContext) -> SlotLimit | None:
    """Return how far the slots of dynamic allocation can grow; None when no setting limits them."""
    conf = context.getConf()
    profile = _default_profile(context)
    per_executor = int(profile.maxTasksPerExecutor(context._jsc.sc().conf()))
    limits = []
    setting = "spark.dynamicAllocation.maxExecutors"
    value = conf.get(setting)
    if value and profile.isCoresLimitKnown():  # else an executor has as many cores as its host
        limits.append(SlotLimit(int(value) * per_executor, setting, value))
    setting = "spark.cores.max"
    value = conf.get(setting)
    if value and str(context.master).startswith("spark://"):
        limits.append(SlotLimit(int(value) // int(conf.get("spark.task.cpus") or 1), setting, value))
    return min(limits, default=None)


def slot_count(context: SparkContext) -> int:
    """Return how many tasks can run at the same time on the executors that are there now."""
    return int(context._jsc.sc().maxNumConcurrentTasks(_default_profile(context)))


def _default_profile(context: SparkContext) -> Any:
    return context._jsc.sc().resourceProfileManager().defaultResourceProfile()


def busy_slot_count(context: SparkContext) -> int:
    """Return how many tasks run now."""
    # The scheduler's own count: the status tracker's lags behind by up to an executor's heartbeat, 10 s.
    running = context._jsc.sc().taskScheduler().runningTasksByExecutors().values().mkString(",")
    return sum(int(count) for count in running.split(",") if count)


def require_slots(context: SparkContext, needed: int, on_wait: Callable[[int], None]) -> int:
    """Return the cluster's slots; wait for executors that are still registering.

    Parameters
    ----------
    context : SparkContext
    needed : int
        Nodes to run.
    on_wait : callable(int)
        Told the slots so far, while there are too few.

    Raises
    ------
    TooFewSlotsError
        Fewer than `needed`, and no more came for 20 s (at once in local mode).
    """
    pause = threading.Event()
    slots = slot_count(context)
    deadline = time.monotonic() + (0 if is_local(context) else _EXECUTORS_TIMEOUT_S)
    while slots < needed and time.monotonic() < deadline:
        on_wait(slots)
        pause.wait(0.2)  # Spark has no event for this that Python could wait on
        now = slot_count(context)
        if now > slots:
            deadline = time.monotonic() + _EXECUTORS_TIMEOUT_S
        slots = now
    if slots < needed:
        raise TooFewSlotsError(
            f"{needed} nodes need {needed} task slots; the cluster {context.master} has {slots}.",
            needed=needed,
            available=slots,
            cause=_slots_cause(context, slots),
            hint=_slots_hint(context, needed, slots),
        )
    return slots


def require_room(context: SparkContext, nodes: int, *, is_fed: bool) -> None:
    """Refuse what dynamic allocation can never find the slots for; those that it can find may still take a while.

    Parameters
    ----------
    context : SparkContext
        Its executors come on demand.
    nodes : int
    is_fed : bool
        Whether Spark tasks are to feed the nodes. The nodes hold their slots: an executor without a task looks idle to
        Spark, which then ends it. So feeding takes one more.

    Raises
    ------
    TooFewSlotsError
    """
    limit = slot_limit(context)
    needed = nodes + is_fed
    if limit is None or limit.slots >= needed:
        return
    feed = " and the tasks that feed them" if is_fed else ""
    raise TooFewSlotsError(
        f"{nodes} nodes{feed} need {needed} task slots; dynamic allocation can make {limit.slots}.",
        needed=needed,
        available=limit.slots,
        cause=f"{limit.setting} is {limit.value}.",
        hint=f"--executors {max(limit.slots - is_fed, 1)}, or a new session with a higher {limit.setting}.",
    )


def _slots_cause(context: SparkContext, slots: int) -> str:
    if slots == 0:
        return "No executor has registered: the cluster may be busy or refuse this application."
    conf = context.getConf()
    cpus = int(conf.get("spark.task.cpus") or 1)
    return f"spark.task.cpus is {cpus}: each node takes {cpus} cores." if cpus > 1 else ""


def _slots_hint(context: SparkContext, needed: int, slots: int) -> str:
    fewer = f"--executors {slots}, or " if slots else ""
    if str(context.master).startswith("local"):
        return f'{fewer}a new session with more slots: spark.stop(), then .master("local[{needed}]").'
    return f"{fewer}more executors or cores: spark.executor.instances, spark.executor.cores, spark.cores.max."


def arrow_schema(schema: Any) -> Any:
    """Return a Spark schema as Arrow's, the way Spark itself sees it in ``mapInArrow``."""
    from pyspark.sql.pandas.types import to_arrow_schema

    return to_arrow_schema(schema)


def spark_schema(schema: Any) -> Any:
    """Return an Arrow schema as Spark's."""
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


def arrow_function(task: Callable[..., Any], result: Any) -> Any:
    """Return a function of columns that goes from Arrow arrays to Arrow arrays; None before PySpark 4.1.

    Parameters
    ----------
    task : callable
        Takes an iterator of tuples of arrays and yields arrays, in all as many rows as came.
    result : DataType
    """
    from pyspark.sql import functions

    make = getattr(functions, "arrow_udf", None)
    if make is None:
        return None
    from pyspark.sql.pandas.functions import ArrowUDFType

    with warnings.catch_warnings():
        # It prefers type hints, which a function that ships itself by value does not have.
        warnings.filterwarnings("ignore", "It is preferred to specify type hints", UserWarning)
        function = make(task, result, ArrowUDFType.SCALAR_ITER)
    return function.asNondeterministic()  # else Spark computes it once for each field taken out of the result
