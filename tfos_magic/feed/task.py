"""The feed's part inside an ordinary Spark task: one partition, dealt over the nodes or asked of one of them.

Runs on: executor, in a Python worker, from the shipped package.

A task that deals asks the driver before its rows count (``commit``), over the same authenticated rendezvous that the
nodes use. What is wrong with the data itself goes to the driver as a message, and is no failure of the task.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import DataError, FeedError
from tfos_magic.rendezvous import Connection, connect

if TYPE_CHECKING:
    import pyarrow as pa

    from tfos_magic.feed.cargo import FeedPlan, Portion

_Commit = Callable[["Portion"], bool]


def feed_batches(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Deal one partition of a DataFrame and yield one batch with the number of rows that count.

    Parameters
    ----------
    archive : bytes
        The package; mounted already, so not used here.
    plan : dict
        From the cluster: feed name, nodes, secrets, where the driver is.
    batches : iterator of pyarrow.RecordBatch
    """
    import pyarrow as pa

    from tfos_magic.feed.sender import feed_partition

    rows = _deal(plan, lambda of, partition, attempt, commit: feed_partition(batches, of, partition, attempt, commit))
    yield pa.RecordBatch.from_pydict({"rows": [rows]})


def feed_rows(archive: bytes, plan: dict[str, Any], rows: Iterable[Any]) -> Iterator[int]:
    """Deal one partition of an RDD and yield the number of rows that count; parameters as :func:`feed_batches`."""
    from tfos_magic.feed.sender import feed_objects

    yield _deal(plan, lambda of, partition, attempt, commit: feed_objects(rows, of, partition, attempt, commit))


def ask_rows(archive: bytes, plan: dict[str, Any], rows: Iterable[Any]) -> Iterator[Any]:
    """Yield a node's result for each row of an RDD's partition."""
    from tfos_magic.feed.exchange import ask_objects

    yield from ask_objects(rows, _feed_plan(plan), _task()[0], plan["patience_s"])


def ask_batches(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield a node's results for the rows of a DataFrame's partition, packed, in a column ``results``."""
    import pyarrow as pa

    from tfos_magic.feed import cargo
    from tfos_magic.feed.exchange import exchange

    feed_plan = _feed_plan(plan)
    loads = cargo.of_batches(batches, feed_plan.of_one_node())
    for data, _ in exchange(loads, feed_plan, _task()[0], plan["patience_s"]):
        yield pa.RecordBatch.from_pydict({"results": [data]})


def unpack_results(archive: bytes, rows: Iterable[Any]) -> Iterator[Any]:
    """Yield the single results out of what :func:`ask_batches` gave."""
    from tfos_magic.feed import objects

    for row in rows:
        yield from objects.loads(bytes(row[0]))


def predict_batches(
    archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Yield the columns to keep and those that a node makes of them, in the plan's types."""
    import pyarrow as pa

    from tfos_magic.feed.kept import Kept

    schema = pa.ipc.read_schema(pa.py_buffer(plan["schema"]))
    kept = Kept(plan["keep"])
    for data, row_count in _asked(plan, kept.passing(batches)):
        yield kept.joined(_unpacked(data), row_count, schema)


def predict_column(archive: bytes, plan: dict[str, Any], columns: Iterator[Any]) -> Iterator[pa.Array]:
    """Yield what a node makes of the columns, as one column of structs in the plan's types."""
    import pyarrow as pa

    from tfos_magic.feed.kept import cast

    schema = pa.ipc.read_schema(pa.py_buffer(plan["schema"]))
    arrays = (each if isinstance(each, tuple) else (each,) for each in columns)
    batches = (pa.RecordBatch.from_arrays(list(each), names=plan["asked"]) for each in arrays)
    for data, _ in _asked(plan, batches):
        yield cast(_unpacked(data), schema).to_struct_array()


def predict_schema(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the types of the columns that a node makes of a few rows."""
    import pyarrow as pa

    for data, _ in _asked(plan, batches):
        yield pa.RecordBatch.from_pydict({"schema": [_unpacked(data).schema.serialize().to_pybytes()]})


def _asked(plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[bytes, int]]:
    from tfos_magic.feed import cargo
    from tfos_magic.feed.exchange import exchange

    feed_plan = _feed_plan(plan)
    asked = (batch.select(plan["asked"]) for batch in batches)
    return exchange(cargo.of_batches(asked, feed_plan.of_one_node()), feed_plan, _task()[0], plan["patience_s"])


def _unpacked(data: bytes) -> pa.RecordBatch:
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        return reader.read_next_batch()


def _deal(plan: dict[str, Any], deal: Callable[[FeedPlan, int, int, _Commit], list[int]]) -> int:
    partition, attempt = _task()
    host, port = plan["rendezvous"]
    driver = connect((host, port), bytes.fromhex(plan["rendezvous_secret"]))
    rows = []
    try:
        commit = functools.partial(_commit, driver, plan["name"], partition, attempt)
        rows = deal(_feed_plan(plan), partition, attempt, commit)
    except DataError as error:
        # The driver ends the run for it; raised here it would be retried, and fill the notebook with Java's stacks.
        report = {"type": "feed_error", "feed": plan["name"]}
        driver.send({**report, "fact": error.fact, "cause": error.cause, "hint": error.hint})
    finally:
        driver.close()
    return sum(rows)


def _feed_plan(plan: dict[str, Any]) -> FeedPlan:
    from tfos_magic.feed.cargo import FeedPlan

    nodes = tuple((host, port) for host, port in plan["nodes"])
    feed_plan = FeedPlan(plan["name"], bytes.fromhex(plan["secret"]), nodes, batch_rows=plan.get("batch_rows", 1))
    return feed_plan.into_queue(plan["portion_bytes"]) if plan["is_queue"] else feed_plan


def _task() -> tuple[int, int]:
    """Return the partition and the attempt: unlike attemptNumber it differs between a stage and its re-run too."""
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        raise RuntimeError("this runs inside a Spark task only")
    return context.partitionId(), context.taskAttemptId()


def _commit(driver: Connection, feed: str, partition: int, attempt: int, portion: Portion) -> bool:
    """Ask the driver whether a portion counts.

    Raises
    ------
    FeedError
        Spark has computed the partition anew, and it is not what it was.
    """
    where = {"feed": feed, "partition": partition, "attempt": attempt}
    driver.send({"type": "commit", **where, **asdict(portion)})
    answer = driver.receive().header
    if answer["refusal"]:
        raise FeedError(answer["refusal"])
    return bool(answer["accepted"])
