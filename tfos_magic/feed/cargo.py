"""What a Spark task sends: rows in loads, cut into chunks; Arrow batches of a DataFrame, or pickled rows of an RDD.

Runs on: executors (Spark's Python workers).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

_GROUP_BYTES = 32 << 20  # what a task keeps in memory at most, plus the batch that Spark hands over
_SMALL_BATCH_BYTES = 128 << 10  # smaller ones are joined before they are dealt
_FIRST_OBJECTS = 256  # before it is known how large an object is
_MOST_OBJECTS = 1 << 16
OBJECTS = "Python objects"
"""Stands in for the columns of a feed whose chunks are pickled rows."""


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
    portion_bytes : int, optional
        How much of a partition, on each node, is held back until it counts; a larger partition comes in portions. The
        whole partition by default.
    chunk_bytes : int
        Aimed size of a chunk.
    batch_rows : int
        How many rows the node works on at once: a chunk holds a multiple of them, so that few batches are short.
    timeout_s : float, optional
        How long a node may make no progress at all before the task fails. None for a queue: there the node may be as
        slow as it likes, and the driver watches whether it gets on.
    allow_nulls : bool
        Let rows travel as they are, for a queue: nulls, which ``DataFeed`` gives as None, and lists of any length. A
        dataset needs values, and lists of one length.
    """

    name: str
    secret: bytes = field(repr=False)
    nodes: tuple[tuple[str, int], ...]
    portion_bytes: int | None = None
    chunk_bytes: int = 2 << 20
    batch_rows: int = 1
    timeout_s: float | None = 120.0
    allow_nulls: bool = False

    def into_queue(self, portion_bytes: int) -> FeedPlan:
        """Return the same plan for a queue: rows as they are, in portions, and time for the slowest node."""
        return replace(self, allow_nulls=True, timeout_s=None, portion_bytes=portion_bytes)

    def of_one_node(self) -> FeedPlan:
        """Return the same plan for loads that are not shared out."""
        return replace(self, nodes=self.nodes[:1])

    @property
    def group_bytes(self) -> int:
        """How much is gathered before it is dealt: a chunk per node, within bounds."""
        return min(_GROUP_BYTES, self.chunk_bytes * len(self.nodes))


@dataclass(frozen=True)
class Portion:
    """Rows of a partition that become visible together; most partitions are one.

    Attributes
    ----------
    number : int
        0, 1, … within the partition.
    rows_per_node : tuple of int
    is_last : bool
    fingerprint : int
        Of all the partition's chunks up to this portion's end: when Spark computes the partition again, what has been
        published of it must come the same way, or rows would be lost and others come twice.
    """

    number: int
    rows_per_node: tuple[int, ...]
    is_last: bool
    fingerprint: int


class Load(Protocol):
    """Some rows, to be cut off from the front."""

    @property
    def row_count(self) -> int:
        """Rows that are left."""

    @property
    def columns(self) -> str:
        """The columns in words; all loads of a feed have the same."""

    @property
    def schema_ipc(self) -> bytes:
        """The columns for the node; empty for pickled rows."""

    def cut(self, row_count: int) -> Iterator[tuple[memoryview | bytes, int]]:
        """Yield the next rows in chunks, each with its number of rows."""


class _Batches:
    """Rows of a DataFrame; cutting copies nothing."""

    def __init__(self, batches: Sequence[pa.RecordBatch], plan: FeedPlan) -> None:
        self.row_count = sum(batch.num_rows for batch in batches)
        self._plan = plan
        self._batches = list(reversed(batches))

    @property
    def columns(self) -> str:
        from tfos_magic.feed import columns

        return columns.describe(self._schema)

    @property
    def schema_ipc(self) -> bytes:
        schema: bytes = self._schema.serialize().to_pybytes()
        return schema

    @property
    def _schema(self) -> pa.Schema:
        from tfos_magic.feed import columns

        batch = self._batches[-1]
        return batch.schema if self._plan.allow_nulls else columns.with_list_lengths(batch)

    def cut(self, row_count: int) -> Iterator[tuple[memoryview | bytes, int]]:
        while row_count:
            batch = self._batches.pop()
            if batch.num_rows > row_count:
                self._batches.append(batch.slice(row_count))
                batch = batch.slice(0, row_count)
            row_count -= batch.num_rows
            self.row_count -= batch.num_rows
            for piece in _split(batch, self._plan):
                yield memoryview(piece.serialize()), piece.num_rows


class _Objects:
    """Rows of an RDD."""

    columns = OBJECTS
    schema_ipc = b""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows
        self._start = 0
        self.size_bytes = 0

    @property
    def row_count(self) -> int:
        return len(self._rows) - self._start

    def cut(self, row_count: int) -> Iterator[tuple[memoryview | bytes, int]]:
        from tfos_magic.feed import objects

        if row_count:
            data = objects.dumps(self._rows[self._start : self._start + row_count])
            self._start += row_count
            self.size_bytes += len(data)
            yield data, row_count


def of_batches(batches: Iterator[pa.RecordBatch], plan: FeedPlan) -> Iterator[Load]:
    """Gather a DataFrame's batches up to a size worth dealing."""
    for group in _grouped(_checked(batches, plan), plan.group_bytes):
        yield _Batches(group, plan)


def of_objects(rows: Iterable[Any], plan: FeedPlan) -> Iterator[Load]:
    """Gather an RDD's rows, as many as make a chunk for each node by what the last ones weighed."""
    rows = iter(rows)  # Spark hands over a plain range for sc.parallelize(range(n))
    count = _FIRST_OBJECTS * len(plan.nodes)
    while part := list(itertools.islice(rows, count)):
        load = _Objects(part)
        yield load
        row_bytes = max(1.0, load.size_bytes / len(part))
        wanted = int(plan.group_bytes / row_bytes)
        count = max(len(plan.nodes), min(wanted, 4 * count, _MOST_OBJECTS * len(plan.nodes)))


def _split(batch: pa.RecordBatch, plan: FeedPlan) -> Iterator[pa.RecordBatch]:
    count = max(1, round(batch.nbytes / plan.chunk_bytes))
    rows = _rounded_up(-(-batch.num_rows // count), plan.batch_rows)
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


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
