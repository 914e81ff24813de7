"""The child's end of a queue: rows that pass once, as TensorFlowOnSpark's ``input`` queue has them.

Runs on: executors (child).

    deliveries, one after the other   of cluster.train: rows count once, whatever Spark repeats
    sessions, side by side            of cluster.inference: rows ask for one result each
        │ chunks, partition ends (channel's thread)
        ▼
    next_item ──► rows, in the order of the queue ──► count_consumed ──┬─ of a delivery: "drained" when it was the last
        (user's thread)                                                └─ of a session: they wait for put_results

A chunk is copied out of the spool when its turn comes, and the agent may then use its space again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tfos_magic.errors import FeedError, UsageError
from tfos_magic.feed.spool import ChunkRef
from tfos_magic.marker import EndPartition

if TYPE_CHECKING:
    import pyarrow as pa

    from tfos_magic.feed.rows import Rows


class Report(Protocol):
    """How a stream speaks to the agent."""

    def send(self, message_type: str, /, **fields: Any) -> None:
        """Send a small message."""

    def send_blob(self, message_type: str, data: bytes, /, **fields: Any) -> None:
        """Send a message of any size."""


@dataclass
class _Delivery:
    """One feed into the queue, as far as this node knows it."""

    name: str
    schema_ipc: bytes = b""
    schema: pa.Schema | None = None
    fd: int = -1
    rows_handed: int = 0
    rows_in_all: int | None = None


@dataclass
class _Portion:
    """Rows that were handed over, of one delivery or session."""

    delivery: _Delivery
    session: int | None
    row_count: int


@dataclass
class _Queued:
    """What stands in the queue: a chunk, or without one the end of a partition."""

    delivery: _Delivery
    session: int | None
    chunk: ChunkRef | None = field(default=None)


class StreamSource:
    """One queue, as seen by this node; a :class:`~tfos_magic.feed.readers.Reader`.

    Parameters
    ----------
    name : str
        The queue's, e.g. ``input``.
    node_index : int
        This node's place in each delivery's ``rows_per_node``.
    report : Report
        To the agent.
    """

    def __init__(self, name: str, node_index: int, report: Report) -> None:
        self.name = name
        self.node_index = node_index
        self.error: BaseException | None = None
        self._report = report
        self._changed = threading.Condition()
        self._deliveries: dict[str, _Delivery] = {}
        self._queue: deque[_Queued] = deque()
        self._handed: deque[_Portion] = deque()
        self._awaiting: deque[_Portion] = deque()
        self._lost_sessions: set[int] = set()
        self._is_finished = False
        self._is_terminated = False
        self._failure: str | None = None
        self._rows_consumed = 0
        self._wait_s = 0.0
        self._waiting_since: float | None = None

    # --- told by the agent's channel ----------------------------------------------------------------------

    def announce(self, delivery: str) -> None:
        """Expect a feed into this queue."""
        with self._changed:
            self._deliveries[delivery] = _Delivery(delivery)

    def open(self, delivery: str, schema_ipc: bytes, fd: int) -> None:
        """Take a feed's columns, and ownership of its spool's descriptor."""
        with self._changed:
            known = self._deliveries[delivery]
            known.schema_ipc, known.fd = schema_ipc, fd

    def add(self, delivery: str, chunk: ChunkRef, session: int | None) -> None:
        """Take one more chunk."""
        self._append(_Queued(self._deliveries[delivery], session, chunk))

    def end_partition(self, delivery: str, session: int | None) -> None:
        """Take note that all rows of a partition, as far as they are this node's, are in the queue."""
        self._append(_Queued(self._deliveries[delivery], session))

    def end_delivery(self, delivery: str, rows_per_node: Sequence[int]) -> None:
        """Take note that nothing more of this feed will come."""
        with self._changed:
            known = self._deliveries[delivery]
            known.rows_in_all = rows_per_node[self.node_index]
            self._close_if_drained(known)
            self._changed.notify_all()

    def lose(self, session: int) -> None:
        """Forget a session whose Spark task is gone; its rows need no answer."""
        with self._changed:
            self._lost_sessions.add(session)
            dead = [item for item in self._queue if self._is_dead(item)]
            self._queue = deque(item for item in self._queue if not self._is_dead(item))
            self._changed.notify_all()
        for item in dead:
            self._release(item)

    def finish(self) -> None:
        """Take note that no further delivery will come: readers get to the end."""
        with self._changed:
            self._is_finished = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Want nothing more: one node has said so for all."""
        with self._changed:
            self._is_terminated = True
            self._queue.clear()
            self._handed.clear()
            self._changed.notify_all()

    def fail(self, message: str) -> None:
        """Take note that the feed will not be completed; every reader raises FeedError."""
        with self._changed:
            self._failure = message
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of the spools."""
        with self._changed:
            self._failure = self._failure or f"Queue '{self.name}' has been closed."
            for delivery in self._deliveries.values():
                _close(delivery)
            self._changed.notify_all()

    # --- readers ------------------------------------------------------------------------------------------

    def next_item(self) -> Rows | EndPartition | None:
        """Return the next rows or the end of a partition; waits. None when no further row will come.

        Raises
        ------
        FeedError
            The feed has failed.
        """
        with self._changed:
            self._wait_for_item()
            if not self._queue:
                return None
            item = self._queue.popleft()
            if item.chunk is None:
                return EndPartition()
            self._handed.append(_Portion(item.delivery, item.session, item.chunk.row_count))
            data = os.pread(item.delivery.fd, item.chunk.length_bytes, item.chunk.offset)
        self._release(item)
        return self._rows(item.delivery, data)

    def has_rows(self) -> bool:
        """Return whether a row is left; waits until that is known. Ends of partitions are skipped."""
        with self._changed:
            while True:
                self._wait_for_item()
                if not self._queue or self._queue[0].chunk is not None:
                    return bool(self._queue)
                self._queue.popleft()

    def count_consumed(self, row_count: int) -> None:
        """Take note that so many rows, in the order in which they came, have reached the user."""
        with self._changed:
            self._rows_consumed += row_count
            while row_count and self._handed:
                portion = self._handed[0]
                taken = min(row_count, portion.row_count)
                row_count -= taken
                self._count(portion, taken)
                portion.row_count -= taken
                if not portion.row_count:
                    self._handed.popleft()

    def put_results(self, results: Sequence[Any]) -> None:
        """Give back one result for each row consumed, in the same order, in as many calls as one likes.

        Raises
        ------
        UsageError
            There are more results than rows that wait for one.
        ResultError
            A result cannot be pickled.
        """
        from tfos_magic.feed import objects

        results = list(results)
        for portion in self._claim(len(results)):
            part, results = results[: portion.row_count], results[portion.row_count :]
            self.answer(portion.session, objects.dumps(part, is_result=True), len(part))

    def answer(self, session: int | None, data: bytes, row_count: int) -> None:
        """Send the results of a session's next rows, ready for the wire."""
        self._report.send_blob("results", data, session=session, rows=row_count)

    def claim(self, row_count: int) -> list[tuple[int | None, int]]:
        """Return whose results the next `row_count` ones are, as (session, rows), and count them as given."""
        return [(portion.session, portion.row_count) for portion in self._claim(row_count)]

    def terminate(self) -> None:
        """Want no more rows, on any node: the driver ends the Spark job that feeds them."""
        self.stop()
        self._report.send("terminate", queue=self.name)

    # --- counters -----------------------------------------------------------------------------------------

    @property
    def rows_consumed(self) -> int:
        """Rows handed to the user so far."""
        return self._rows_consumed

    @property
    def queued(self) -> tuple[int, int]:
        """How many chunks stand in the queue, and their bytes."""
        with self._changed:
            chunks = [item.chunk for item in self._queue if item.chunk is not None]
        return len(chunks), sum(chunk.length_bytes for chunk in chunks)

    @property
    def wait_s(self) -> float:
        """Seconds during which a reader waited for rows."""
        since = self._waiting_since
        return self._wait_s + (time.monotonic() - since if since is not None else 0.0)

    @property
    def is_waiting(self) -> bool:
        """Whether a reader waits right now."""
        return self._waiting_since is not None

    # --- inside -------------------------------------------------------------------------------------------

    def _append(self, item: _Queued) -> None:
        with self._changed:
            is_dead = self._is_dead(item)
            if not self._is_terminated and not is_dead:
                self._queue.append(item)
                self._changed.notify_all()
        if is_dead:
            self._release(item)

    def _release(self, item: _Queued) -> None:
        """Let the agent use a chunk's space again."""
        if item.chunk is not None:
            place = [item.chunk.offset, item.chunk.length_bytes]
            self._report.send("released", feed=item.delivery.name, chunk=place)

    def _is_dead(self, item: _Queued) -> bool:
        return item.session is not None and item.session in self._lost_sessions

    def _wait_for_item(self) -> None:
        def is_known() -> bool:
            return bool(self._queue or self._is_finished or self._is_terminated or self._failure)

        if not is_known():
            self._waiting_since = time.monotonic()
            try:
                self._changed.wait_for(is_known)
            finally:
                self._wait_s += time.monotonic() - self._waiting_since
                self._waiting_since = None
        if self._failure and not self._is_terminated:
            raise FeedError(self._failure)

    def _rows(self, delivery: _Delivery, data: bytes) -> Rows:
        from tfos_magic.feed.rows import ArrowRows, ObjectRows

        if not delivery.schema_ipc:
            from tfos_magic.feed import objects

            return ObjectRows(objects.loads(data))
        import pyarrow as pa

        if delivery.schema is None:
            delivery.schema = pa.ipc.read_schema(pa.py_buffer(delivery.schema_ipc))
        return ArrowRows(pa.ipc.read_record_batch(pa.py_buffer(data), delivery.schema))

    def _count(self, portion: _Portion, row_count: int) -> None:
        if portion.session is not None:
            self._awaiting.append(_Portion(portion.delivery, portion.session, row_count))
            return
        portion.delivery.rows_handed += row_count
        self._close_if_drained(portion.delivery)

    def _close_if_drained(self, delivery: _Delivery) -> None:
        if delivery.rows_in_all is not None and delivery.rows_handed >= delivery.rows_in_all:
            _close(delivery)
            self._report.send("drained", feed=delivery.name)

    def _claim(self, row_count: int) -> list[_Portion]:
        with self._changed:
            waiting = sum(portion.row_count for portion in self._awaiting)
            if row_count > waiting and not self._is_terminated:
                raise UsageError(
                    f"Queue '{self.name}' was given {row_count} results; {waiting} rows wait for one.",
                    cause="Each row of cluster.inference() takes exactly one result, a row of cluster.train() none.",
                    hint="Give batch_results as many results as next_batch gave rows.",
                )
            claimed: list[_Portion] = []
            while row_count and self._awaiting:
                portion = self._awaiting[0]
                taken = min(row_count, portion.row_count)
                claimed.append(_Portion(portion.delivery, portion.session, taken))
                portion.row_count -= taken
                row_count -= taken
                if not portion.row_count:
                    self._awaiting.popleft()
            return claimed


def _close(delivery: _Delivery) -> None:
    if delivery.fd >= 0:
        os.close(delivery.fd)
        delivery.fd = -1
