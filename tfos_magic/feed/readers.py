"""Where ``DataFeed`` gets its rows from, and where the results go.

Runs on: executors (child).

====================  ==========================================================================================
reader                rows
====================  ==========================================================================================
CachedReader          of ``--data``: in this node's cache, as often as there are epochs
stream.StreamSource   of ``cluster.train`` and ``cluster.inference``: they pass once
QueueReader           of any object with TensorFlowOnSpark's queues (``get_queue``, ``get``, ``set``)
====================  ==========================================================================================
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tfos_magic.errors import UsageError
from tfos_magic.feed.rows import ArrowRows, ObjectRows, Rows
from tfos_magic.marker import EndPartition

if TYPE_CHECKING:
    from tfos_magic.feed.source import FeedSource

_QUIET_S = 5.0
_NOTHING = object()


class Reader(Protocol):
    """Gives rows in order and takes results."""

    def next_item(self) -> Rows | EndPartition | None:
        """Return the next rows or the end of a partition; waits. None when no further row will ever come."""

    def has_rows(self) -> bool:
        """Return whether there is a further row; waits until that is known, takes no row, skips partitions' ends."""

    def count_consumed(self, row_count: int) -> None:
        """Take note that so many rows have reached the user."""

    def put_results(self, results: Sequence[Any]) -> None:
        """Give back one result for each row that was consumed."""

    def terminate(self) -> None:
        """Want no more rows: :meth:`next_item` returns None from now on."""


class CachedReader:
    """The rows of a cached feed, as often as there are epochs.

    Parameters
    ----------
    source : FeedSource
    epochs : int
    """

    def __init__(self, source: FeedSource, epochs: int = 1) -> None:
        self._source = source
        self._epochs_left = max(1, epochs)
        self._next_chunk = 0
        self._is_terminated = False

    def next_item(self) -> Rows | EndPartition | None:
        """Return the next chunk's rows; waits for Spark where need be."""
        if not self.has_rows():
            return None
        (batch,) = self._source.next_chunks(self._next_chunk, limit_bytes=1)
        self._next_chunk += 1
        return ArrowRows(batch)

    def has_rows(self) -> bool:
        """Return whether a row is left, in this epoch or the next."""
        if self._is_terminated:
            return False
        if self._source.has_more(self._next_chunk):
            return True
        if self._next_chunk == 0 or self._epochs_left == 1:
            return False
        self._epochs_left -= 1
        self._next_chunk = 0
        return True

    def count_consumed(self, row_count: int) -> None:
        """Count for the board."""
        self._source.count_consumed(row_count)

    def put_results(self, results: Sequence[Any]) -> None:
        """Refuse: a training run has nowhere to put results of inference."""
        raise UsageError(
            f"This run trains; it takes no results ({len(results)} were given).",
            cause=f"The rows of '{self._source.name}' came with --data, and nobody waits for an answer to them.",
            hint="Return them: the function's value of each node is in the result. Or feed with cluster.inference().",
        )

    def terminate(self) -> None:
        """Stop reading: the rows are in this node's cache, and who does not read them costs nobody anything."""
        self._is_terminated = True


class QueueReader:
    """The items of a queue by TensorFlowOnSpark's protocol: rows, ``EndPartition``, and None at the end.

    Parameters
    ----------
    queue_in, queue_out : queue-like
        With the methods of :class:`queue.Queue`.
    mgr : object
        Its ``set("state", "terminating")`` tells who feeds that no more is wanted.
    quiet_s : float
        After :meth:`terminate`: how long nothing must have come until nothing more is expected.
    """

    def __init__(self, queue_in: Any, queue_out: Any, mgr: Any, quiet_s: float = _QUIET_S) -> None:
        self._queue_in = queue_in
        self._queue_out = queue_out
        self._mgr = mgr
        self._quiet_s = quiet_s
        self._ahead: Any = _NOTHING
        self._is_over = False

    def next_item(self) -> Rows | EndPartition | None:
        """Return the next row by itself, or what stands between rows; waits."""
        if self._is_over:
            return None
        item, self._ahead = self._peek(), _NOTHING
        self._queue_in.task_done()  # not before it is handed over: until then who feeds must wait
        if item is None:
            self._is_over = True
            return None
        return item if isinstance(item, EndPartition) else ObjectRows([item])

    def has_rows(self) -> bool:
        """Return whether a row is left; waits for the next item that is a row or the end."""
        while not self._is_over:
            item = self._peek()
            if item is not None and not isinstance(item, EndPartition):
                return True
            self.next_item()
        return False

    def count_consumed(self, row_count: int) -> None:
        """Do nothing: each item was reported done when it was handed over."""

    def put_results(self, results: Sequence[Any]) -> None:
        """Put each result into the queue."""
        if self._queue_out is None:
            raise UsageError(
                f"There is no queue for {len(results)} results.",
                hint="Name one that the manager was started with: DataFeed(mgr, False, qname_out='output').",
            )
        for result in results:
            self._queue_out.put(result, block=True)

    def terminate(self) -> None:
        """Tell who feeds to stop, and drop what still comes: a feeder waits until its items are taken."""
        self._mgr.set("state", "terminating")
        if self._ahead is not _NOTHING:
            self.next_item()
        while not self._is_over:
            try:
                item = self._queue_in.get(block=True, timeout=self._quiet_s)
            except queue.Empty:
                break
            self._queue_in.task_done()
            self._is_over = item is None
        self._is_over = True

    def _peek(self) -> Any:
        if self._ahead is _NOTHING:
            self._ahead = self._queue_in.get(block=True)
        return self._ahead
