"""A Spark task's end of the feed: deals the rows of its partition over all nodes.

Runs on: executors (Spark's Python workers).

Each node gets every share of every few megabytes, so all nodes' totals stay within a row per partition of each other,
whatever the partitions look like; who gets a partition's odd rows rotates from partition to partition. When every node
has confirmed its share, the driver is asked whether this attempt is the one that counts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tfos_magic.feed import cargo
from tfos_magic.feed.cargo import FeedPlan, Load, Portion
from tfos_magic.feed.link import Link

if TYPE_CHECKING:
    import pyarrow as pa

_FINGER_BYTES = 4096


def feed_partition(
    batches: Iterator[pa.RecordBatch],
    plan: FeedPlan,
    partition: int,
    attempt: int,
    commit: Callable[[Portion], bool],
) -> list[int]:
    """Deal one partition's rows over the plan's nodes.

    Parameters
    ----------
    batches : iterator of pyarrow.RecordBatch
        What ``mapInArrow`` hands over.
    plan : FeedPlan
    partition : int
        Its number; decides who gets the odd rows.
    attempt : int
        Different for every attempt at this partition in the whole run: Spark's ``taskAttemptId()``, since
        ``attemptNumber()`` starts again at 0 when a stage is repeated.
    commit : callable
        Called for each portion when every node has confirmed its share. True if it counts.

    Returns
    -------
    list of int
        Rows per node that count because of this call: zeros if another attempt won.

    Raises
    ------
    DataError
        If a column holds nulls.
    FeedError
        If a node cannot be reached, refuses, goes away, or stands still.
    """
    return _deal_all(cargo.of_batches(batches, plan), plan, partition, attempt, commit)


def feed_objects(
    rows: Iterable[Any], plan: FeedPlan, partition: int, attempt: int, commit: Callable[[Portion], bool]
) -> list[int]:
    """Deal one partition of an RDD, whose rows are any Python objects; otherwise as :func:`feed_partition`."""
    return _deal_all(cargo.of_objects(rows, plan), plan, partition, attempt, commit)


def _deal_all(
    loads: Iterator[Load], plan: FeedPlan, partition: int, attempt: int, commit: Callable[[Portion], bool]
) -> list[int]:
    with ExitStack() as stack:
        dealer = _Dealer(plan, partition, attempt, commit, stack)
        for load in loads:
            dealer.deal(load)
        return dealer.finish()


class _Dealer:
    """Deals loads over the nodes; connects when the first row is there."""

    def __init__(
        self, plan: FeedPlan, partition: int, attempt: int, commit: Callable[[Portion], bool], stack: ExitStack
    ) -> None:
        self._plan = plan
        self._stack = stack
        self._opening = {"name": plan.name, "partition": partition, "attempt": attempt}
        self._turn = partition % len(plan.nodes)
        self._links: list[Link] = []
        self._commit = commit
        self._counted = [0] * len(plan.nodes)
        self._portions = 0
        self._portion_bytes = 0
        self._fingerprint = 0

    def deal(self, load: Load) -> None:
        """Send every node its even share of the load."""
        if not self._links:
            self._connect(load)
        for link, row_count in zip(self._links, self._shares(load.row_count), strict=True):
            for payload, rows in load.cut(row_count):
                link.send(payload, rows)
                self._note(payload)
        limit = self._plan.portion_bytes
        if limit is not None and self._portion_bytes >= limit * len(self._links):
            self._end_portion(is_last=False)

    def finish(self) -> list[int]:
        """Wait until every node has confirmed its rows; return those that count because of this attempt."""
        self._end_portion(is_last=True)
        return self._counted

    def _note(self, payload: memoryview | bytes) -> None:
        """Take both ends of a chunk into the fingerprint: rows that come in another order change them."""
        for end in (payload[:_FINGER_BYTES], payload[-_FINGER_BYTES:]):
            self._fingerprint = zlib.crc32(end, self._fingerprint)
        self._portion_bytes += len(payload)

    def _end_portion(self, *, is_last: bool) -> None:
        for link in self._links:
            link.mark(is_last=is_last)
        rows = tuple(link.confirm() for link in self._links) or (0,) * len(self._plan.nodes)
        if self._commit(Portion(self._portions, rows, is_last, self._fingerprint)):
            self._counted = [total + count for total, count in zip(self._counted, rows, strict=True)]
        self._portions += 1
        self._portion_bytes = 0

    def _shares(self, row_count: int) -> list[int]:
        count = len(self._links)
        base, odd = divmod(row_count, count)
        shares = [base + ((index - self._turn) % count < odd) for index in range(count)]
        self._turn = (self._turn + odd) % count
        return shares

    def _connect(self, load: Load) -> None:
        """Open a link to every node, also those that will get no row: all must learn the columns."""
        opening = {**self._opening, "columns": load.columns}
        for index in range(len(self._plan.nodes)):
            link = Link(index, self._plan)
            self._stack.callback(link.close)
            link.open(opening, load.schema_ipc)
            self._links.append(link)
