"""The feed's part inside an ordinary Spark task: one partition's Arrow batches, dealt over the nodes.

Runs on: executor, in a Python worker, from the shipped package.

The task asks the driver before its rows count (``commit``), over the same authenticated rendezvous that the nodes use.
What is wrong with the data itself goes to the driver as a message, and is no failure of the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import DataError
from tfos_magic.rendezvous import Connection, connect

if TYPE_CHECKING:
    import pyarrow as pa


def feed_task(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Deal one partition and yield one batch with the number of rows that count.

    Parameters
    ----------
    archive : bytes
        The package; mounted already, so not used here.
    plan : dict
        From the cluster: feed name, nodes, secrets, where the driver is.
    batches : iterator of pyarrow.RecordBatch
    """
    import pyarrow as pa
    from pyspark import TaskContext

    from tfos_magic.feed.sender import FeedPlan, feed_partition

    context = TaskContext.get()
    if context is None:
        raise RuntimeError("feed_task runs inside a Spark task only")
    # Unlike attemptNumber, taskAttemptId differs also between a stage and its re-run.
    partition, attempt = context.partitionId(), context.taskAttemptId()
    nodes = tuple((host, port) for host, port in plan["nodes"])
    feed_plan = FeedPlan(plan["name"], bytes.fromhex(plan["secret"]), nodes)
    host, port = plan["rendezvous"]
    driver = connect((host, port), bytes.fromhex(plan["rendezvous_secret"]))
    rows = []
    try:
        rows = feed_partition(
            batches, feed_plan, partition, attempt, lambda rows: _commit(driver, plan["name"], partition, attempt, rows)
        )
    except DataError as error:
        # The driver ends the run for it; raised here it would be retried, and fill the notebook with Java's stacks.
        report = {"type": "feed_error", "feed": plan["name"]}
        driver.send({**report, "fact": error.fact, "cause": error.cause, "hint": error.hint})
    finally:
        driver.close()
    yield pa.RecordBatch.from_pydict({"rows": [sum(rows)]})


def _commit(driver: Connection, feed: str, partition: int, attempt: int, rows: list[int]) -> bool:
    driver.send({"type": "commit", "feed": feed, "partition": partition, "attempt": attempt, "rows": rows})
    return bool(driver.receive().header["accepted"])
