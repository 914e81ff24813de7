"""A Spark task's end of the feed: deals the rows of its partition over all nodes.

Runs on: executors (Spark's Python workers).

Each node gets every share of every few megabytes, so all nodes' totals stay within a row per partition of each other,
whatever the partitions look like; who gets a partition's odd rows rotates from partition to partition. When every node
has confirmed its share, the driver is asked whether this attempt is the one that counts.
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import FeedError
from tfos_magic.feed import wire

if TYPE_CHECKING:
    import pyarrow as pa

_GROUP_BYTES = 32 << 20  # what a task keeps in memory at most, plus the batch that Spark hands over
_SMALL_BATCH_BYTES = 128 << 10  # smaller ones are joined before they are dealt


@dataclass(frozen=True)
class FeedPlan:
    """What a feed task must know; plain values, pickled into the Spark job.

    Attributes
    ----------
    name : str
        The feed's, e.g. ``train``.
    secret : bytes
        The run's.
    nodes : tuple of (host, port)
        The receivers of the nodes that take data, in the order of ``rows_per_node``.
    chunk_bytes : int
        Aimed size of a chunk.
    timeout_s : float
        How long a node may make no progress at all before the task fails.
    allow_nulls : bool
        Let nulls travel; a dataset will refuse them later, ``DataFeed`` gives None.
    """

    name: str
    secret: bytes = field(repr=False)
    nodes: tuple[tuple[str, int], ...]
    chunk_bytes: int = 2 << 20
    timeout_s: float = 120.0
    allow_nulls: bool = False

    @property
    def group_bytes(self) -> int:
        """How much is gathered before it is dealt: a chunk per node, within bounds."""
        return min(_GROUP_BYTES, self.chunk_bytes * len(self.nodes))


def feed_partition(
    batches: Iterator[pa.RecordBatch],
    plan: FeedPlan,
    partition: int,
    attempt: int,
    commit: Callable[[list[int]], bool],
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
        Called once, with the rows per node, when every node has confirmed its share. True if this attempt counts.

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
    with ExitStack() as stack:
        dealer = _Dealer(plan, partition, attempt, stack)
        for batch in _grouped(_checked(batches, plan), plan.group_bytes):
            dealer.deal(batch)
        rows_per_node = dealer.finish()
    return rows_per_node if commit(rows_per_node) else [0] * len(rows_per_node)


class _Dealer:
    """Deals groups of batches over the nodes; connects when the first row is there."""

    def __init__(self, plan: FeedPlan, partition: int, attempt: int, stack: ExitStack) -> None:
        self._plan = plan
        self._stack = stack
        self._opening = {"name": plan.name, "partition": partition, "attempt": attempt}
        self._turn = partition % len(plan.nodes)
        self._links: list[_Link] = []

    def deal(self, group: list[pa.RecordBatch]) -> None:
        """Send every node its even share of the group."""
        if not self._links:
            self._connect(group[0])
        cutter = _Cutter(group)
        for link, row_count in zip(self._links, self._shares(cutter.row_count), strict=True):
            for piece in cutter.cut(row_count, self._plan.chunk_bytes):
                link.send(piece)

    def finish(self) -> list[int]:
        """Wait until every node has confirmed its rows; return them."""
        for link in self._links:
            link.end()
        for link in self._links:
            link.confirm()
        return [link.row_count for link in self._links] or [0] * len(self._plan.nodes)

    def _shares(self, row_count: int) -> list[int]:
        count = len(self._links)
        base, odd = divmod(row_count, count)
        shares = [base + ((index - self._turn) % count < odd) for index in range(count)]
        self._turn = (self._turn + odd) % count
        return shares

    def _connect(self, batch: pa.RecordBatch) -> None:
        """Open a link to every node, also those that will get no row: all must learn the columns."""
        from tfos_magic.feed import columns

        schema = columns.with_list_lengths(batch)
        opening = json.dumps({**self._opening, "columns": columns.describe(schema)}).encode()
        schema_ipc = schema.serialize().to_pybytes()
        for index, address in enumerate(self._plan.nodes):
            link = _Link(index, address, self._plan)
            self._stack.callback(link.close)
            link.open(opening, schema_ipc)
            self._links.append(link)


class _Link:
    """The connection to one node."""

    def __init__(self, index: int, address: tuple[str, int], plan: FeedPlan) -> None:
        self.row_count = 0
        self._who = f"node {index} at {address[0]}:{address[1]}"
        self._feed_name = plan.name
        try:
            self._connection = socket.create_connection(address, timeout=wire.HANDSHAKE_TIMEOUT_S)
        except OSError as error:
            raise self._lost(error, "could not connect to") from error
        try:
            self._shake_hands(plan)
        except BaseException:
            self.close()
            raise

    def open(self, opening: bytes, schema_ipc: bytes) -> None:
        self._say(wire.OPEN, opening)
        self._say(wire.SCHEMA, schema_ipc)

    def send(self, batch: pa.RecordBatch) -> None:
        if select.select([self._connection], [], [], 0)[0]:
            self.confirm()  # a node only speaks before the end to refuse
        self._say(wire.CHUNK, memoryview(batch.serialize()), batch.num_rows)
        self.row_count += batch.num_rows

    def end(self) -> None:
        self._say(wire.END, b"", self.row_count)

    def confirm(self) -> None:
        try:
            header = wire.receive_header(self._connection)
            payload = wire.receive_payload(self._connection, header)
        except (OSError, wire.ConnectionEndedError) as error:
            raise self._lost(error, "lost") from error
        if header.kind != wire.ACCEPTED or header.row_count != self.row_count:
            raise FeedError(f"Feed '{self._feed_name}': {self._who} refused the rows: {payload.decode()}")

    def close(self) -> None:
        self._connection.close()

    def _shake_hands(self, plan: FeedPlan) -> None:
        try:
            is_receiver = wire.prove_as_sender(self._connection, plan.secret)
        except (OSError, wire.ConnectionEndedError) as error:
            raise self._lost(error, "got no greeting from") from error
        if not is_receiver:
            raise FeedError(
                f"Feed '{plan.name}': {self._who} and this Spark task do not share a secret.",
                cause="That port now belongs to another run or another program.",
            )
        self._connection.settimeout(plan.timeout_s)

    def _say(self, kind: bytes, payload: memoryview | bytes, row_count: int = 0) -> None:
        try:
            wire.send_frame(self._connection, kind, payload, row_count)
        except OSError as error:
            self._explain_refusal()
            raise self._lost(error, "lost") from error

    def _explain_refusal(self) -> None:
        """Raise what the node said before it hung up, if it said anything."""
        try:
            readable = select.select([self._connection], [], [], 0)[0]
        except (OSError, ValueError):
            return
        if readable:
            self.confirm()

    def _lost(self, error: Exception, what: str) -> FeedError:
        reason = "no progress for too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        return FeedError(
            f"Feed '{self._feed_name}': this Spark task {what} {self._who} after {self.row_count:,} rows ({reason}).",
            cause="The node ended, its machine is gone, or a firewall is between the executors.",
        )


class _Cutter:
    """Cuts rows off the front of a list of batches, without copying them."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.row_count = sum(batch.num_rows for batch in batches)
        self._batches = list(reversed(batches))

    def cut(self, row_count: int, chunk_bytes: int) -> Iterator[pa.RecordBatch]:
        """Yield the next `row_count` rows in pieces of about `chunk_bytes`."""
        while row_count:
            batch = self._batches.pop()
            if batch.num_rows > row_count:
                self._batches.append(batch.slice(row_count))
                batch = batch.slice(0, row_count)
            row_count -= batch.num_rows
            yield from _split(batch, chunk_bytes)


def _split(batch: pa.RecordBatch, chunk_bytes: int) -> Iterator[pa.RecordBatch]:
    count = max(1, round(batch.nbytes / chunk_bytes))
    rows = -(-batch.num_rows // count)
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _grouped(batches: Iterator[pa.RecordBatch], group_bytes: int) -> Iterator[list[pa.RecordBatch]]:
    """Gather batches up to a size worth dealing; small ones are joined."""
    group: list[pa.RecordBatch] = []
    size_bytes = 0
    for batch in batches:
        group.append(batch)
        size_bytes += batch.nbytes
        if size_bytes >= group_bytes:
            yield _joined(group, size_bytes)
            group, size_bytes = [], 0
    if group:
        yield _joined(group, size_bytes)


def _joined(group: list[pa.RecordBatch], size_bytes: int) -> list[pa.RecordBatch]:
    if size_bytes >= _SMALL_BATCH_BYTES * len(group) or len(group) == 1:
        return group
    import pyarrow as pa

    joined: list[Any] = pa.Table.from_batches(group).combine_chunks().to_batches()
    return joined


def _checked(batches: Iterator[pa.RecordBatch], plan: FeedPlan) -> Iterator[pa.RecordBatch]:
    """Leave out empty batches, write dictionaries out, refuse nulls."""
    from tfos_magic.feed import columns

    for batch in batches:
        if batch.num_rows:
            plain = columns.without_dictionaries(batch)
            if not plan.allow_nulls:
                columns.refuse_nulls(plain, plan.name)
            yield plain
