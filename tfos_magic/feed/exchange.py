"""Inference inside a Spark task: a partition's rows go to one node, one result for each comes back, in order.

Runs on: executors (Spark's Python workers).

One thread does both directions: rows are sent as long as the node takes them, results are yielded as they come, and
when Spark does not take results any more (``limit``, a slow writer), neither rows nor results move on.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tfos_magic.errors import FeedError
from tfos_magic.feed import cargo, objects, wire
from tfos_magic.feed.cargo import FeedPlan, Load
from tfos_magic.feed.link import Link, is_here

_RECEIVE_BYTES = 1 << 20


def ask_objects(rows: Iterable[Any], plan: FeedPlan, partition: int, patience_s: float) -> Iterator[Any]:
    """Yield one result for each row of an RDD's partition.

    Parameters
    ----------
    rows : iterator
    plan : FeedPlan
        The node is chosen among its nodes: one on this host if there is any, by turns.
    partition : int
    patience_s : float
        How long nothing at all may move before the task fails.

    Raises
    ------
    FeedError
        The node refuses, goes away, stands still, or gives another number of results.
    """
    for data, row_count in exchange(cargo.of_objects(rows, plan.of_one_node()), plan, partition, patience_s):
        results = objects.loads(data)
        if len(results) != row_count:
            raise FeedError(f"Feed '{plan.name}': {row_count} results were announced, {len(results)} came.")
        yield from results


def exchange(loads: Iterator[Load], plan: FeedPlan, partition: int, patience_s: float) -> Iterator[tuple[bytes, int]]:
    """Send loads to a node and yield its results: packed as the node packs them, with the number of rows.

    Parameters and errors are those of :func:`ask_objects`.
    """
    link = _connect(plan, partition)  # while Spark makes the first batch
    try:
        first = next(loads, None)
        if first is None:
            return
        opening = {"name": plan.name, "wants_results": True, "columns": first.columns}
        link.open(opening, first.schema_ipc)
        yield from _Conversation(link, _chunks(first, loads), plan, patience_s).run()
    finally:
        link.close()


def _connect(plan: FeedPlan, partition: int) -> Link:
    try:
        return Link(_choose(plan, partition), plan)
    except FeedError as error:
        raise FeedError(
            f"The nodes that were to answer do not: {error.fact}",
            cause="They have been stopped, or have failed, since this DataFrame or RDD was made.",
            hint="Run the cell that made it again; actions on it must come before %tfos_stop or cluster.shutdown().",
        ) from error


def _chunks(first: Load, others: Iterator[Load]) -> Iterator[tuple[memoryview | bytes, int]]:
    load: Load | None = first
    while load is not None:
        yield from load.cut(load.row_count)
        load = next(others, None)


def _choose(plan: FeedPlan, partition: int) -> int:
    """Return the index of the node to ask: of those on this host, or of all, each in its turn."""
    near = [index for index, (host, _) in enumerate(plan.nodes) if is_here(host)] or list(range(len(plan.nodes)))
    return near[partition % len(near)]


class _Conversation:
    """Sends and receives at once over a connection that never blocks."""

    def __init__(
        self, link: Link, chunks: Iterator[tuple[memoryview | bytes, int]], plan: FeedPlan, patience_s: float
    ) -> None:
        self._link = link
        self._chunks = chunks
        self._plan = plan
        self._patience_s = patience_s
        self._frames = wire.FrameReader()
        self._outgoing = memoryview(b"")
        self._asked_for: memoryview | bytes | None = None
        self._has_sent_all = False
        self._rows_sent = 0
        self._rows_back = 0

    def run(self) -> Iterator[tuple[bytes, int]]:
        self._link.socket.setblocking(False)
        moved_at = time.monotonic()
        while not (self._has_sent_all and not self._outgoing and self._rows_back == self._rows_sent):
            self._refill()
            wants_to_write = [self._link.socket] if self._outgoing else []
            remaining_s = self._patience_s - (time.monotonic() - moved_at)
            readable, writable, _ = select.select([self._link.socket], wants_to_write, [], max(0.0, remaining_s))
            if not readable and not writable:
                raise self._stands_still()
            if readable:
                yield from self._receive()
            if writable:
                self._guarded(self._send)
            moved_at = time.monotonic()

    def _refill(self) -> None:
        if self._outgoing or self._has_sent_all or self._asked_for is not None:
            return
        chunk = next(self._chunks, None)
        if chunk is None:
            self._has_sent_all = True
            self._say(wire.END, b"", self._rows_sent)
            return
        payload, row_count = chunk
        if self._link.writer is None:
            self._say(wire.CHUNK, payload, row_count)
        else:
            self._asked_for = payload
            self._say(wire.ASK, wire.pack_number(len(payload)), row_count)
        self._rows_sent += row_count

    def _write(self, place: bytes) -> None:
        """Write the chunk that the node has found a place for."""
        if self._asked_for is None or self._link.writer is None:
            raise FeedError(f"Feed '{self._plan.name}': the node named a place that nobody had asked for.")
        self._link.writer.write(self._asked_for, wire.unpack_number(place))
        self._asked_for = None
        self._say(wire.WRITTEN)

    def _say(self, kind: bytes, payload: memoryview | bytes = b"", row_count: int = 0) -> None:
        self._outgoing = memoryview(bytes(self._outgoing) + wire.frame(kind, payload, row_count))

    def _send(self) -> None:
        self._outgoing = self._outgoing[self._link.socket.send(self._outgoing) :]

    def _receive(self) -> Iterator[tuple[bytes, int]]:
        data = self._guarded(lambda: self._link.socket.recv(_RECEIVE_BYTES))
        if not data:
            raise self._gone("it ended")
        for header, payload in self._frames.feed(data):
            if header.kind == wire.PLACE:
                self._write(payload)
                continue
            if header.kind != wire.RESULTS:
                raise FeedError(f"Feed '{self._plan.name}': the node refused the rows: {payload.decode()}")
            self._rows_back += header.row_count
            yield payload, header.row_count

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise self._gone(str(error)) from error

    def _gone(self, reason: str) -> FeedError:
        return FeedError(
            f"Feed '{self._plan.name}': the node went away after {self._rows_back:,} of {self._rows_sent:,} results "
            f"({reason}).",
            cause="The node's function has failed or returned, or the cluster was shut down before this action ran.",
            hint="The node's own error is printed where the cluster was started; cluster.shutdown() raises it.",
        )

    def _stands_still(self) -> FeedError:
        return FeedError(
            f"Feed '{self._plan.name}': no result came for {self._patience_s:g} s; {self._rows_sent:,} rows were sent, "
            f"{self._rows_back:,} results have come.",
            cause="The node's function does not call batch_results() once for every row, or is busy with one batch.",
            hint="Give it more time with feed_timeout, or look at the node's log.",
        )
