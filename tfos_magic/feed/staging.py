"""What a node has been dealt so far: attempts that may count, chunks that do, and how much of it may wait.

Runs on: executors (agent). Belongs to :mod:`tfos_magic.feed.receiver`, whose lock protects all of it.

Two kinds of feed share this book-keeping. A *cached* one (``train``, ``validation``) keeps every chunk, for every
epoch. A *delivery* into a queue passes once: its chunks count against a bound until the child has taken them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from tfos_magic.feed.spool import ChunkRef, Spool

QUEUE_LIMIT_BYTES = 256 << 20
"""Chunks that may wait on a node for a child that is slower than the feed."""


@dataclass(frozen=True)
class FeedOpened:
    """The feed's columns are known (no schema: its chunks are pickled rows); `fd` stays the receiver's."""

    name: str
    schema_ipc: bytes
    fd: int


@dataclass(frozen=True)
class ChunkReady:
    """A published chunk; of inference if it has a session."""

    name: str
    offset: int
    length_bytes: int
    row_count: int
    session: int | None = None
    partition: int = 0


@dataclass(frozen=True)
class PartitionEnded:
    """All rows of a partition that this node was dealt have been published. Only for queues."""

    name: str
    session: int | None = None


@dataclass(frozen=True)
class SessionLost:
    """The Spark task that waited for these results is gone."""

    name: str
    session: int


@dataclass(frozen=True)
class FeedEnded:
    """Every partition is published; how many rows each node was dealt."""

    name: str
    rows_per_node: tuple[int, ...]
    fingerprint: int = 0
    """Of all rows in the order of their partitions, as far as samples of them tell."""


@dataclass(frozen=True)
class FeedFailed:
    """The feed will not be completed."""

    name: str
    message: str


FeedNotice = FeedOpened | ChunkReady | PartitionEnded | SessionLost | FeedEnded | FeedFailed


@dataclass
class Stream:
    """What one attempt at one partition has delivered so far."""

    place: tuple[int, ...] = ()
    """Its order among the streams of its feed: whose turn it is when not all of them may go on."""
    chunks: list[ChunkRef] = field(default_factory=list)
    portions: deque[list[ChunkRef]] = field(default_factory=deque)
    """Complete ones, oldest first: chunks of the next one may be here before the driver's word on the last."""
    is_unwanted: bool = False
    is_complete: bool = False

    @property
    def row_count(self) -> int:
        """Rows so far."""
        return sum(chunk.row_count for chunks in (*self.portions, self.chunks) for chunk in chunks)

    def end_portion(self) -> None:
        """Take note that what has come since the last portion is one."""
        self.portions.append(self.chunks)
        self.chunks = []


@dataclass(frozen=True)
class Waiting:
    """Chunks of all queues that wait on this node: for the driver's decision, and for the child."""

    staged_bytes: int
    published_bytes: int


class Feed:
    """One feed's spool and its partitions.

    Parameters
    ----------
    name : str
    directory : str
        For the spool of a cached feed; what passes stays in memory.
    limit_bytes : int, optional
        For a delivery into a queue: how much may wait. None for a cached feed, which has no bound but the disk.
    """

    def __init__(self, name: str, directory: str, limit_bytes: int | None = None) -> None:
        self.name = name
        self.spool = Spool(directory if limit_bytes is None else None)
        self.limit_bytes = limit_bytes
        self.columns: str | None = None
        self.staged: dict[int, dict[int, Stream]] = {}
        self.winners: dict[int, int] = {}
        self.rows_published = 0
        self.staged_bytes = 0
        self.published_bytes = 0
        self.is_over = False

    @property
    def staged_chunks(self) -> int:
        """Chunks that wait for the driver's word."""
        return sum(len(chunks) for stream in self._streams() for chunks in (*stream.portions, stream.chunks))

    @property
    def rows_received(self) -> int:
        """Rows published or still staged."""
        return self.rows_published + sum(stream.row_count for stream in self._streams())

    def stage(self, partition: int, attempt: int) -> Stream:
        """Begin a stream; one that the driver has decided against already is read and thrown away."""
        stream = Stream((partition, attempt), is_unwanted=self.is_over or partition in self.winners)
        if not stream.is_unwanted:
            replaced = self.staged.setdefault(partition, {}).get(attempt)
            if replaced is not None:
                self.drop(replaced)
            self.staged[partition][attempt] = stream
        return stream

    def has_room(self, stream: Stream, length_bytes: int, waiting: Waiting) -> bool:
        """Return whether a chunk of this stream may be taken in now.

        The last quarter of the bound is for one stream only, the same on every node, so that its portion gets through;
        and not even for that one while half of the bound waits for the child, which can make room itself.
        """
        if self.limit_bytes is None or stream.is_unwanted:
            return True
        if waiting.staged_bytes + waiting.published_bytes + length_bytes <= self.limit_bytes * 3 // 4:
            return True
        is_first = stream.place == min(other.place for other in self._streams() if not other.is_complete)
        return is_first and waiting.published_bytes <= self.limit_bytes // 2

    def keep(self, stream: Stream, chunk: ChunkRef) -> None:
        """Add a chunk to its stream, unless the stream has been decided against while the chunk was on its way."""
        if stream.is_unwanted:
            self.spool.discard(chunk)
        else:
            stream.chunks.append(chunk)
            self.staged_bytes += chunk.length_bytes

    def drop(self, stream: Stream) -> None:
        """Throw a stream away, and whatever of it is still to come."""
        stream.is_unwanted = True
        while stream.portions:
            self._give_back(stream.portions.popleft())
        self._give_back(stream.chunks)
        stream.chunks = []

    def _give_back(self, chunks: list[ChunkRef]) -> None:
        for chunk in chunks:
            self.staged_bytes -= chunk.length_bytes
            self.spool.discard(chunk)

    def hang_up(self, stream: Stream) -> None:
        """Throw away what is incomplete of a stream whose sender has gone; the driver may yet decide for the rest."""
        self._give_back(stream.chunks)
        stream.chunks = []
        stream.is_complete = True

    def take(self, partition: int, attempt: int, *, is_last: bool = True) -> list[ChunkRef]:
        """Decide for a portion of `attempt`: return its chunks; at the last, throw away those of the others."""
        stream = self.staged.get(partition, {}).get(attempt, Stream())
        chunks = stream.portions.popleft() if stream.portions else []
        for chunk in chunks:
            self.staged_bytes -= chunk.length_bytes
            self.publish(chunk)
        if is_last:
            self.winners[partition] = attempt
            for other in self.staged.pop(partition, {}).values():
                self.drop(other)
        return chunks

    def discard(self, partition: int, attempt: int) -> None:
        """Decide against a portion of `attempt`, but not against what is still to come."""
        stream = self.staged.get(partition, {}).get(attempt)
        if stream is not None and stream.portions:
            self._give_back(stream.portions.popleft())

    def publish(self, chunk: ChunkRef) -> None:
        """Count a chunk that the child is about to hear of."""
        self.rows_published += chunk.row_count
        self.published_bytes += chunk.length_bytes

    def release(self, chunk: ChunkRef) -> None:
        """Give back the space of a chunk that the child has taken."""
        self.published_bytes -= chunk.length_bytes
        if self.spool.fd >= 0:
            self.spool.recycle(chunk)

    def finish(self) -> None:
        """Take nothing more."""
        self.is_over = True
        for stream in self._streams():
            self.drop(stream)
        self.staged.clear()

    def close(self) -> None:
        """Let go of the spool."""
        self.is_over = True
        for stream in self._streams():
            stream.is_unwanted = True
        self.spool.close()

    def _streams(self) -> Iterator[Stream]:
        for attempts in self.staged.values():
            yield from attempts.values()
