"""The driver's part of the feed: which nodes take rows, which attempts count, how it ended.

Runs on: driver. No locks of its own: the cluster that owns the feeds calls under its lock.

    feed task ──"commit partition 7, attempt 12, rows [30, 31]"──► Delivery.commit
                 the first attempt of a partition counts: "publish" to every node, "accepted" to the task
    Spark job ends ──► Delivery.end ──► "feed end" with every node's rows, or the error to show
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tfos_magic.errors import DataError, FeedError, TfosError
from tfos_magic.jobs import SparkJob
from tfos_magic.members import Member
from tfos_magic.rendezvous import Peer

_PYTHON_ERROR = re.compile(r"(?!py4j|pyspark|org\.|java\.|Caused)[\w.]*(Error|Exception|Interrupt|Warning): ")


class Delivery:
    """One DataFrame on its way to the nodes.

    Parameters
    ----------
    name : str
        ``train``, ``validation``, …
    members : sequence of Member
        The nodes that take its rows, in the order of all row counts.
    """

    def __init__(self, name: str, members: Sequence[Member]) -> None:
        self.name = name
        self.job: SparkJob | None = None
        self.error: TfosError | None = None
        self._members = list(members)
        self._rows = [0] * len(self._members)
        self._winners: dict[int, int] = {}

    @property
    def is_open(self) -> bool:
        """True when every node listens for the rows."""
        return all(member.feed_port for member in self._members)

    def open(self) -> None:
        """Ask every node to listen."""
        for member in self._members:
            member.send({"type": "open_feed", "feed": self.name})

    def plan(self, secret: bytes, rendezvous: tuple[str, int], rendezvous_secret: bytes) -> dict[str, Any]:
        """Return what a feed task must know, as plain values."""
        return {
            "name": self.name,
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
        if self.error is None and job.error is not None:
            self.error = _spark_error(self.name, job.error)
        elif self.error is None and not sum(self._rows):
            self.error = DataError(f"The DataFrame for {self.name!r} has 0 rows.", hint="Look at its filters.")
        if self.error is None:
            for member in self._members:
                member.send({"type": "feed_end", "feed": self.name, "rows_per_node": self._rows})


def _spark_error(name: str, error: Exception) -> FeedError:
    feed_error = FeedError(
        f"Spark failed while it delivered {name!r}: {_reason(str(error)) or type(error).__name__}",
        cause="Spark could not compute the DataFrame, or a node went away.",
        hint="Compute it alone: df.count() raises the same error if it is the DataFrame's.",
    )
    feed_error.__cause__ = error
    return feed_error


def _reason(text: str) -> str:
    """Return the line that says most: the last one of a Python traceback, else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    python = [line for line in lines if _PYTHON_ERROR.match(line)]
    return (python or lines or [""])[-1 if python else 0]
