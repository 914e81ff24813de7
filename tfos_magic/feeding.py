"""The driver's part of the feed: which nodes take rows, which attempts count, how it ended.

Runs on: driver. No locks of its own: the cluster that owns the feeds calls under its lock.

    feed task ──"commit partition 7, portion 0, attempt 12, rows [30, 31]"──► Delivery.commit
                 the first attempt that has it counts: "publish" to every node, "accepted" to the task
    Spark job ends ──► Delivery.end ──► "feed end" with every node's rows, or the error to show
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tfos_magic.errors import DataError, EnvironmentMismatchError, FeedError, TfosError
from tfos_magic.failures import install_hint, python_reason
from tfos_magic.feed.staging import QUEUE_LIMIT_BYTES
from tfos_magic.jobs import SparkJob
from tfos_magic.members import Member
from tfos_magic.rendezvous import Peer

_MISSING_MODULE = re.compile(r"No module named '([\w.]+)'")


@dataclass
class _Progress:
    """What counts of one partition so far, portion by portion."""

    fingerprints: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    is_complete: bool = False

    def add(self, attempt: int, header: Mapping[str, Any]) -> None:
        self.fingerprints.append(header["fingerprint"])
        self.attempts.append(attempt)
        self.is_complete = header["is_last"]


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
        self._partitions: dict[int, _Progress] = {}

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
            "portion_bytes": self._limit_bytes // 4,
            "secret": secret.hex(),
            "nodes": [(member.info["address"], member.feed_port) for member in self._members],
            "rendezvous": rendezvous,
            "rendezvous_secret": rendezvous_secret.hex(),
        }

    def commit(self, task: Peer, header: Mapping[str, Any]) -> None:
        """Decide whether a portion of this attempt counts: of each portion, the first that all nodes have does."""
        partition, attempt, number = header["partition"], header["attempt"], header["number"]
        progress = self._partitions.setdefault(partition, _Progress())
        accepted, refusal = False, ""
        if number == len(progress.fingerprints) and not progress.is_complete:
            accepted = True
            progress.add(attempt, header)
            self._rows = [total + rows for total, rows in zip(self._rows, header["rows_per_node"], strict=True)]
            self._decide("publish", header)
        elif progress.is_complete:
            accepted = progress.attempts[-1] == attempt  # it asks again: the answer was lost, the decision stands
        elif progress.fingerprints[number] == header["fingerprint"]:
            self._decide("discard", header)
        else:
            refusal = _came_differently(self.queue or self.name, partition)
            self.error = self.error or FeedError(refusal)
        task.send({"type": "committed", "accepted": accepted, "refusal": refusal})

    def _decide(self, decision: str, header: Mapping[str, Any]) -> None:
        about = {name: header[name] for name in ("partition", "attempt", "is_last")}
        for member, rows in zip(self._members, header["rows_per_node"], strict=True):
            member.send({"type": decision, "feed": self.name, **about, "rows": rows})

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
            about = {"rows_per_node": self._rows, "fingerprint": self._fingerprint()}
            for member in self._members:
                member.send({"type": "feed_end", "feed": self.name, **about})

    def _fingerprint(self) -> int:
        """Return a number that is most likely another one when rows, or their order, are others."""
        of_partitions = [self._partitions[number].fingerprints[-1:] for number in sorted(self._partitions)]
        return zlib.crc32(repr((of_partitions, self._rows)).encode())


def _spark_error(name: str, error: Exception) -> TfosError:
    reason = python_reason(str(error)) or type(error).__name__
    missing = _MISSING_MODULE.search(reason)
    found: TfosError
    if missing is not None:
        found = EnvironmentMismatchError(
            f"Spark failed while it delivered {name!r}: the executors' Python has no module {missing[1]!r}.",
            cause="Rows come as Arrow data: Spark's workers need pyarrow for it, as for every pandas UDF."
            if missing[1] == "pyarrow"
            else "The DataFrame's or the RDD's own functions import it.",
            hint=install_hint(missing[1]),
        )
    else:
        found = FeedError(
            f"Spark failed while it delivered {name!r}: {reason}",
            cause="Spark could not compute the DataFrame, or a node went away.",
            hint="Compute it alone: df.count() raises the same error if it is the DataFrame's.",
        )
    found.__cause__ = error
    return found


def _came_differently(name: str, partition: int) -> str:
    return (
        f"Partition {partition} for {name!r} came in another order when Spark computed it once more, and the nodes had "
        "taken part of it already. Compute it once: df.persist() or rdd.checkpoint() before it is fed, or make more "
        "and smaller partitions of it."
    )
