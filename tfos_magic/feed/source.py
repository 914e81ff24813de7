"""The child's end of the feed: the chunks that this node has got so far, and a way to wait for more.

Runs on: executors (child).

One thread, the agent's channel, tells what there is; any number of readers map it and wait for the rest. Nothing is
copied: a chunk is a view of the spool's pages, so the cache costs page cache and no memory of the process.
"""

from __future__ import annotations

import difflib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import FeedError, UsageError
from tfos_magic.feed.spool import ChunkRef
from tfos_magic.feed.stream import StreamSource

if TYPE_CHECKING:
    import pyarrow as pa

    from tfos_magic.feed.readers import Reader

_COPIED_BYTES = 64 << 10  # smaller chunks are read, not mapped: a mapping costs more than the copy


class FeedSource:
    """One feed, as seen by this node.

    Parameters
    ----------
    name : str
        The feed's, e.g. ``train``.
    node_index : int
        This node's place in ``rows_per_node``.
    in_order : bool
        Let readers wait for the feed's end, and give them the chunks in the order of the partitions: so they are the
        same in each run. Otherwise readers get them as they come.

    Attributes
    ----------
    fingerprint : int
        From the feed's end on: a number that is most likely another one when the feed's rows, or their order, are.
    reading : str
        How the last dataset that was made reads it: what, with the rows, decides what its batches are.
    whole_columns : dict
        Datasets keep the feed's joined columns here. Not in a dataset: TensorFlow never frees a generator's closure.
    error : BaseException or None
        What a dataset raised because of this feed. TensorFlow shows it as text inside its own exception; this is the
        original.
    """

    def __init__(self, name: str, node_index: int, *, in_order: bool = False) -> None:
        self.name = name
        self.node_index = node_index
        self.fingerprint = 0
        self.reading = ""
        self._in_order = in_order
        self._partitions: list[int] = []
        self.whole_columns: dict[Any, Any] = {}
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._schema_ipc: bytes | None = None
        self._schema: pa.Schema | None = None
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._chunks: list[ChunkRef] = []
        self._rows_per_node: tuple[int, ...] | None = None
        self._failure: str | None = None
        self._rows_consumed = 0
        self._used_chunks = 0  # how many of the first ones have been used once
        self._used_rows = 0
        self._passes = 0
        self._wait_s = 0.0
        self._waiting_readers = 0
        self._waiting_since = 0.0

    # --- told by the agent's channel ----------------------------------------------------------------------

    def open(self, schema_ipc: bytes, fd: int) -> None:
        """Take the feed's columns, and ownership of the spool's descriptor."""
        with self._changed:
            if self._fd >= 0:
                os.close(self._fd)
            self._schema_ipc, self._fd = schema_ipc, fd
            self._changed.notify_all()

    def add(self, chunk: ChunkRef, partition: int = 0) -> None:
        """Take one more chunk; those of a partition come in their order."""
        with self._changed:
            self._chunks.append(chunk)
            self._partitions.append(partition)
            self._changed.notify_all()

    def end(self, rows_per_node: Sequence[int], fingerprint: int = 0) -> None:
        """Take note that nothing more will come; fails the feed if this node's chunks do not add up."""
        with self._changed:
            self.fingerprint = fingerprint
            if self._in_order:
                places = sorted(range(len(self._chunks)), key=self._partitions.__getitem__)
                self._chunks = [self._chunks[place] for place in places]
            arrived, dealt = self._arrived(), rows_per_node[self.node_index]
            if arrived != dealt:
                self._failure = f"Feed '{self.name}': this node was dealt {dealt:,} rows, {arrived:,} arrived."
            self._rows_per_node = tuple(rows_per_node)
            self._changed.notify_all()

    def fail(self, message: str) -> None:
        """Take note that the feed will not be completed; every reader raises FeedError."""
        with self._changed:
            self._failure = message
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of the file. Chunks that somebody still holds stay valid; readers that wait raise FeedError."""
        with self._changed:
            if self._rows_per_node is None and self._failure is None:
                self._failure = f"Feed '{self.name}' was closed before it had ended."
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._map = -1, None
            self.whole_columns.clear()
            self._changed.notify_all()

    # --- readers ------------------------------------------------------------------------------------------

    @property
    def schema(self) -> pa.Schema | None:
        """The columns; waits until they are known. None if the feed ended without a single row."""
        with self._changed:
            self._wait_until(lambda: self._has_columns or self.is_ended)
            if self._schema is None and self._schema_ipc is not None:
                import pyarrow as pa

                self._schema = pa.ipc.read_schema(pa.py_buffer(self._schema_ipc))
            return self._schema

    @property
    def is_ended(self) -> bool:
        """Whether all rows are here."""
        return self._rows_per_node is not None

    @property
    def row_count(self) -> int | None:
        """Rows of this node; None while the feed goes on."""
        with self._changed:
            return None if self._rows_per_node is None else self._arrived()

    @property
    def chunk_refs(self) -> tuple[ChunkRef, ...]:
        """The chunks so far."""
        with self._changed:
            return tuple(self._chunks)

    def steps(self, batch_size: int) -> int:
        """Return how many batches the node with most rows needs; waits for the feed's end."""
        with self._changed:
            self._wait_until(lambda: self._rows_per_node is not None)
            return -(-max(self._rows_per_node or (0,)) // batch_size)

    def chunks(self, start: int = 0) -> Iterator[pa.RecordBatch]:
        """Yield the chunks from number `start` on, waiting for those to come, until the feed has ended."""
        while batches := self.next_chunks(start, limit_bytes=1):
            start += len(batches)
            yield from batches

    def next_chunks(self, start: int, limit_bytes: int) -> list[pa.RecordBatch]:
        """Return the chunks from number `start` on that are there, waiting for the first.

        Parameters
        ----------
        start : int
        limit_bytes : int
            Stop after the chunk that reaches this size.

        Returns
        -------
        list of pyarrow.RecordBatch
            Empty only at the feed's end.

        Raises
        ------
        FeedError
            If the feed has failed.
        """
        with self._changed:
            self._wait_until(lambda: self._has(start) or self.is_ended)
            refs, size_bytes = [], 0
            for ref in self._chunks[start:]:
                refs.append(ref)
                size_bytes += ref.length_bytes
                if size_bytes >= limit_bytes:
                    break
        return [self.read(ref) for ref in refs]

    def has_more(self, start: int) -> bool:
        """Return whether there is, or will be, a chunk number `start`; waits until that is known."""
        with self._changed:
            self._wait_until(lambda: self._has(start) or self.is_ended)
            return len(self._chunks) > start

    def read(self, ref: ChunkRef) -> pa.RecordBatch:
        """Return one chunk: a view of the spool, or a copy if it is small."""
        import pyarrow as pa

        schema = self.schema
        return pa.ipc.read_record_batch(pa.py_buffer(self._bytes(ref)), schema)

    # --- counters -----------------------------------------------------------------------------------------

    @property
    def rows_consumed(self) -> int:
        """Rows handed to the user so far, over all epochs."""
        return self._rows_consumed

    def count_consumed(self, row_count: int) -> None:
        """Add to :attr:`rows_consumed`; called by the readers."""
        with self._changed:
            self._rows_consumed += row_count

    @property
    def queued(self) -> tuple[int, int]:
        """How many chunks hold rows that have not been used even once, as a count of rows tells, and their bytes."""
        with self._changed:
            for chunk in self._chunks[self._used_chunks :]:
                if self._used_rows + chunk.row_count > self._rows_consumed:
                    break
                self._used_chunks += 1
                self._used_rows += chunk.row_count
            left = self._chunks[self._used_chunks :]
        return len(left), sum(chunk.length_bytes for chunk in left)

    @property
    def passes(self) -> int:
        """How often datasets have begun to read this feed; to set it is to go on as after so many times."""
        return self._passes

    @passes.setter
    def passes(self, count: int) -> None:
        with self._changed:
            self._passes = count

    def begin_pass(self) -> int:
        """Return how often datasets have begun to read this feed before: what makes each epoch's order different."""
        with self._changed:
            self._passes += 1
            return self._passes - 1

    @property
    def wait_s(self) -> float:
        """Seconds during which at least one reader waited for something that Spark had yet to deliver."""
        with self._changed:
            ongoing = time.monotonic() - self._waiting_since if self._waiting_readers else 0.0
            return self._wait_s + ongoing

    @property
    def is_waiting(self) -> bool:
        """Whether a reader waits right now."""
        return self._waiting_readers > 0

    # --- inside -------------------------------------------------------------------------------------------

    @property
    def _has_columns(self) -> bool:
        """Whether the columns may be told before the feed has ended."""
        return not self._in_order and self._schema_ipc is not None

    def _has(self, start: int) -> bool:
        """Return whether chunk number `start` can be read before the feed has ended."""
        return not self._in_order and len(self._chunks) > start

    def _arrived(self) -> int:
        return sum(chunk.row_count for chunk in self._chunks)

    def _wait_until(self, is_true: Callable[[], bool]) -> None:
        """Wait under the lock; FeedError as soon as the feed has failed."""
        if not self._failure and not is_true():
            with self._counted_as_waiting():
                self._changed.wait_for(lambda: self._failure or is_true())
        if self._failure:
            raise FeedError(self._failure)

    @contextmanager
    def _counted_as_waiting(self) -> Iterator[None]:
        if not self._waiting_readers:
            self._waiting_since = time.monotonic()
        self._waiting_readers += 1
        try:
            yield
        finally:
            self._waiting_readers -= 1
            if not self._waiting_readers:
                self._wait_s += time.monotonic() - self._waiting_since

    def _bytes(self, ref: ChunkRef) -> Any:
        with self._changed:
            if self._fd < 0:
                raise FeedError(f"Feed '{self.name}' has been closed.")
            if ref.length_bytes < _COPIED_BYTES:
                return os.pread(self._fd, ref.length_bytes, ref.offset)
            end = ref.offset + ref.length_bytes
            if self._map is None or len(self._map) < end:
                # The whole file anew: chunks come in bursts, and each map object costs a descriptor.
                self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
            return memoryview(self._map)[ref.offset : end]


class Feeds:
    """The feeds and queues of one node, by name; what the agent's channel and ``ctx`` share.

    Parameters
    ----------
    names : sequence of str
        The cached feeds that this run has.
    node_index : int
        This node's place in each feed's ``rows_per_node``.
    epochs : int
        How often ``DataFeed`` repeats the rows of a cached feed.
    queues : sequence of StreamSource
        What rows pass through once.
    in_order : bool
        Whether the rows of cached feeds are to come in the same order in each run; see :class:`FeedSource`.
    """

    def __init__(
        self,
        names: Sequence[str],
        node_index: int,
        epochs: int = 1,
        queues: Sequence[StreamSource] = (),
        *,
        in_order: bool = False,
    ) -> None:
        self.epochs = epochs
        self._sources = {name: FeedSource(name, node_index, in_order=in_order) for name in names}
        self._queues = {queue.name: queue for queue in queues}
        self._deliveries: dict[str, StreamSource] = {}

    def get(self, name: str) -> FeedSource:
        """Return a cached feed; ``input``, TensorFlowOnSpark's name for it, means ``train``.

        Raises
        ------
        UsageError
            If the run has no such feed.
        """
        if name in self._queues:
            raise UsageError(
                f"'{name}' is a queue, whose rows pass once: ctx.dataset() cannot repeat them.",
                hint="Read it with ctx.get_data_feed(), or give the run its data at the start: --data df.",
            )
        source = self._sources.get("train" if name == "input" and "input" not in self._sources else name)
        if source is None:
            names = [*self._sources, *self._queues]
            close = difflib.get_close_matches(name, names, n=1)
            raise UsageError(
                f"This run has no feed '{name}'; it has {', '.join(names) or 'none'}.",
                hint=f"Did you mean '{close[0]}'?"
                if close
                else "Give the run its data: %%tfos_train --data df --validation test_df.",
            )
        return source

    def reader(self, name: str) -> Reader:
        """Return what ``DataFeed`` reads: a queue, or a cached feed's rows over all epochs."""
        if name in self._queues:
            return self._queues[name]
        from tfos_magic.feed.readers import CachedReader

        return CachedReader(self.get(name), self.epochs)

    @property
    def cached(self) -> list[FeedSource]:
        """The cached feeds, in the order of their names in the run."""
        return [*self._sources.values()]

    def queue(self, name: str) -> StreamSource:
        """Return a queue that the run has."""
        return self._queues[name]

    def announce(self, delivery: str, queue: str) -> None:
        """Expect a feed into a queue."""
        self._deliveries[delivery] = self._queues[queue]
        self._queues[queue].announce(delivery)

    def queue_of(self, feed: str) -> StreamSource | None:
        """Return the queue into which a feed goes; None for a cached one."""
        return self._deliveries.get(feed)

    def __iter__(self) -> Iterator[FeedSource | StreamSource]:
        return iter([*self._sources.values(), *self._queues.values()])

    @property
    def rows_consumed(self) -> int:
        """Rows handed to the user, over all feeds."""
        return sum(source.rows_consumed for source in self)

    @property
    def wait_s(self) -> float:
        """Seconds that readers waited for Spark, over all feeds."""
        return sum(source.wait_s for source in self)

    @property
    def queued(self) -> tuple[int, int]:
        """Chunks that lie here and have not been used yet, over all feeds, and their bytes."""
        counts = [source.queued for source in self]
        return sum(chunks for chunks, _ in counts), sum(size_bytes for _, size_bytes in counts)

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of this node in all cached feeds; None before all have ended, and where there is none."""
        counts = [source.row_count for source in self._sources.values()]
        known = [count for count in counts if count is not None]
        return sum(known) if known and len(known) == len(counts) else None

    def close(self) -> None:
        """Close every feed."""
        for source in self:
            source.close()
