"""The driver's part of the feed: which nodes take rows, which attempts count, how it ended.

Runs on: driver. No locks of its own: the cluster that owns the feeds calls under its lock.

    feed task ──"commit partition 7, attempt 12, rows [30, 31]"──► Delivery.commit
                 the first attempt of a partition counts: "publish" to every node, "accepted" to the task
    Spark job ends ──► Delivery.end ──► "feed end" with every node's rows, or the error to show
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tfos_magic.errors import DataError, FeedError, TfosError
from tfos_magic.failures import python_reason
from tfos_magic.feed.staging import QUEUE_LIMIT_BYTES
from tfos_magic.jobs import SparkJob
from tfos_magic.members import Member
from tfos_magic.rendezvous import Peer


class Delivery:
    """One DataFrame or RDD on its way to the nodes.

    Parameters
    ----------
    name : str
        ``train``, ``validation``, … of a cached feed; ``input/1``, ``input/2``, … into a queue.
    members : sequence of Member
        The nodes that take its rows, in the order of all row counts.
    queue : str, optional
        The queue into which it goes; its rows pass once.
    limit_bytes : int
        How much may wait on a node for its turn in a queue.
    """

    def __init__(
        self, name: str, members: Sequence[Member], queue: str | None = None, limit_bytes: int = QUEUE_LIMIT_BYTES
    ) -> None:
        self.name = name
        self.queue = queue
        self.job: SparkJob | None = None
        self.error: TfosError | None = None
        self.has_ended = False
        self.is_stopped = False
        self._limit_bytes = limit_bytes
        self._drained: set[str] = set()
        self._members = list(members)
        self._rows = [0] * len(self._members)
        self._winners: dict[int, int] = {}

    @property
    def is_open(self) -> bool:
        """True when every node listens for the rows."""
        return all(self.name in member.open_feeds for member in self._members)

    @property
    def is_consumed(self) -> bool:
        """True when it has ended, and every node's function has taken its last row."""
        return self.has_ended and len(self._drained) == len(self._members)

    @property
    def row_count(self) -> int:
        """Rows that count so far."""
        return sum(self._rows)

    def open(self) -> None:
        """Ask every node to listen."""
        for member in self._members:
            member.send({"type": "open_feed", "feed": self.name, "queue": self.queue, "limit_bytes": self._limit_bytes})

    def drain(self, member: Member) -> None:
        """Take note that a node's function has taken its last row of this delivery."""
        self._drained.add(member.name)

    def stop(self) -> None:
        """End it early, whatever of it is still in Spark: a node wants no more."""
        self.is_stopped = True
        if self.job is not None:
            self.job.cancel()

    def plan(self, secret: bytes, rendezvous: tuple[str, int], rendezvous_secret: bytes) -> dict[str, Any]:
        """Return what a feed task must know, as plain values."""
        return {
            "name": self.name,
            "is_queue": self.queue is not None,
            "secret": secret.hex(),
            "nodes": [(member.info["address"], member.feed_port) for member in self._members],
            "rendezvous": rendezvous,
            "rendezvous_secret": rendezvous_secret.hex(),
        }

    def commit(self, task: Peer, header: Mapping[str, Any]) -> None:
        """Decide whether this attempt of a partition counts: the first that has delivered all of it does."""
        partition, attempt = header["partition"], header["attempt"]
        is_first = partition not in self._winners
        if is_first:
            self._winners[partition] = attempt
            self._rows = [total + rows for total, rows in zip(self._rows, header["rows"], strict=True)]
            decision = {"type": "publish", "feed": self.name, "partition": partition, "attempt": attempt}
            for member, rows in zip(self._members, header["rows"], strict=True):
                member.send({**decision, "rows": rows})
        task.send({"type": "committed", "accepted": self._winners[partition] == attempt})

    def refuse(self, header: Mapping[str, Any]) -> None:
        """Take note that a task found the data wrong; the first such finding is the one to show."""
        self.error = self.error or DataError(header["fact"], cause=header["cause"], hint=header["hint"])

    def end(self, job: SparkJob) -> None:
        """Take note that the Spark job has ended; tell the nodes when all rows are there."""
        self.has_ended = True
        if self.error is None and job.error is not None and not self.is_stopped:
            self.error = _spark_error(self.queue or self.name, job.error)
        elif self.error is None and not self.row_count and self.queue is None:
            self.error = DataError(f"The DataFrame for {self.name!r} has 0 rows.", hint="Look at its filters.")
        if self.error is None or self.queue is not None:  # what has reached a queue stays there
            for member in self._members:
                member.send({"type": "feed_end", "feed": self.name, "rows_per_node": self._rows})


def _spark_error(name: str, error: Exception) -> FeedError:
    feed_error = FeedError(
        f"Spark failed while it delivered {name!r}: {python_reason(str(error)) or type(error).__name__}",
        cause="Spark could not compute the DataFrame, or a node went away.",
        hint="Compute it alone: df.count() raises the same error if it is the DataFrame's.",
    )
    feed_error.__cause__ = error
    return feed_error
