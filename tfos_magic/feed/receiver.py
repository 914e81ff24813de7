"""The node's end of the feed: takes chunks from any number of Spark tasks and publishes those that count.

Runs on: executors (agent). Needs neither Arrow nor TensorFlow: a chunk goes from the socket to the file unparsed.

A row reaches the user exactly once, whatever Spark repeats::

    sender of (partition 7, attempt 0) ──► staged ──┐
    sender of (partition 7, attempt 1) ──► staged ──┤   driver: "partition 7 is attempt 1"
                                                    └─► publish(7, 1): attempt 1 becomes visible, 0 is thrown away

A sender that dies in mid-stream leaves staged chunks that nobody will publish.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tfos_magic.errors import FeedError, TfosError
from tfos_magic.feed import wire
from tfos_magic.feed.spool import ChunkRef, Spool

_UNPROVEN_CONNECTIONS = 256  # more strangers than this at once wait in the kernel's queue
_DRAIN_PIECE_BYTES = 256 << 10


@dataclass(frozen=True)
class FeedOpened:
    """The feed's columns are known; `fd` is the spool's and stays the receiver's."""

    name: str
    schema_ipc: bytes
    fd: int


@dataclass(frozen=True)
class ChunkReady:
    """A published chunk."""

    name: str
    offset: int
    length_bytes: int
    row_count: int


@dataclass(frozen=True)
class FeedEnded:
    """Every partition is published; how many rows each node was dealt."""

    name: str
    rows_per_node: tuple[int, ...]


@dataclass(frozen=True)
class FeedFailed:
    """The feed will not be completed."""

    name: str
    message: str


FeedNotice = FeedOpened | ChunkReady | FeedEnded | FeedFailed


@dataclass
class _Stream:
    """What one attempt at one partition has delivered so far."""

    chunks: list[ChunkRef] = field(default_factory=list)
    is_unwanted: bool = False

    @property
    def row_count(self) -> int:
        return sum(chunk.row_count for chunk in self.chunks)


class _Feed:
    """One feed's spool and its partitions. The receiver's lock protects it."""

    def __init__(self, name: str, directory: str) -> None:
        self.name = name
        self.spool = Spool(directory)
        self.columns: str | None = None
        self.staged: dict[int, dict[int, _Stream]] = {}
        self.winners: dict[int, int] = {}
        self.rows_published = 0
        self.is_over = False

    @property
    def rows_received(self) -> int:
        return self.rows_published + sum(s.row_count for streams in self.staged.values() for s in streams.values())

    def stage(self, partition: int, attempt: int) -> _Stream:
        """Begin a stream; one that the driver has decided against already is read and thrown away."""
        stream = _Stream(is_unwanted=self.is_over or partition in self.winners)
        if not stream.is_unwanted:
            replaced = self.staged.setdefault(partition, {}).get(attempt)
            if replaced is not None:
                self.drop(replaced)
            self.staged[partition][attempt] = stream
        return stream

    def keep(self, stream: _Stream, chunk: ChunkRef) -> None:
        """Add a chunk to its stream, unless the stream has been decided against while the chunk was on its way."""
        if not stream.is_unwanted:
            stream.chunks.append(chunk)
        else:
            self.spool.discard(chunk)

    def drop(self, stream: _Stream) -> None:
        stream.is_unwanted = True
        for chunk in stream.chunks:
            self.spool.discard(chunk)
        stream.chunks.clear()

    def take(self, partition: int, attempt: int) -> list[ChunkRef]:
        """Decide for `attempt`: return its chunks, throw away those of the others."""
        self.winners[partition] = attempt
        streams = self.staged.pop(partition, {})
        winner = streams.pop(attempt, _Stream())
        for loser in streams.values():
            self.drop(loser)
        self.rows_published += winner.row_count
        return winner.chunks

    def close(self) -> None:
        self.is_over = True
        for streams in self.staged.values():
            for stream in streams.values():
                stream.is_unwanted = True
        self.spool.close()


class FeedReceiver:
    """Listens for senders from construction to :meth:`close`.

    Parameters
    ----------
    host : str
        Address to bind; the port is chosen by the kernel.
    secret : bytes
        The run's secret; a sender without it is dropped before anything it says is read.
    directory : str
        Where the spools' disk space is taken from.
    notify : callable
        Gets each :data:`FeedNotice`, in order, from whichever thread caused it. Called with the receiver's lock
        held: it must be quick and must not call the receiver.

    Attributes
    ----------
    port : int
    """

    def __init__(self, host: str, secret: bytes, directory: str, notify: Callable[[FeedNotice], None]) -> None:
        if not secret:
            raise ValueError("the feed's secret is empty")
        self._secret = secret
        self._directory = directory
        self._notify = notify
        self._lock = threading.RLock()
        self._feeds: dict[str, _Feed] = {}
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._strangers = threading.BoundedSemaphore(_UNPROVEN_CONNECTIONS)
        self._is_closed = False
        self._listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept_all, name="tfos-feed-accept", daemon=True)
        self._acceptor.start()

    def rows_received(self, name: str) -> int:
        """Return how many rows of feed `name` have arrived, published or still staged; 0 if there is none such.

        It can go down, when an attempt is thrown away.
        """
        with self._lock:
            feed = self._feeds.get(name)
            return feed.rows_received if feed else 0

    def publish(self, name: str, partition: int, attempt: int, row_count: int | None = None) -> None:
        """Make the chunks of one attempt visible, in the order they came, and throw away the partition's others.

        A repeated decision about a partition changes nothing.

        Parameters
        ----------
        name : str
        partition, attempt : int
            As the sender named itself.
        row_count : int, optional
            How many rows the sender dealt to this node. If the staged ones are not as many, the feed fails
            rather than train on part of the data.
        """
        with self._lock:
            feed = self._feed(name)
            if partition in feed.winners or feed.is_over:
                return
            chunks = feed.take(partition, attempt)
            staged = sum(chunk.row_count for chunk in chunks)
            if row_count is not None and staged != row_count:
                self.fail(name, f"Partition {partition} of feed '{name}': {row_count} rows dealt, {staged} arrived.")
                return
            for chunk in chunks:
                self._notify(ChunkReady(name, chunk.offset, chunk.length_bytes, chunk.row_count))

    def end(self, name: str, rows_per_node: Sequence[int]) -> None:
        """Say that every partition has been published."""
        self._finish(name, FeedEnded(name, tuple(rows_per_node)))

    def fail(self, name: str, message: str) -> None:
        """Say that the feed will not be completed, and why."""
        self._finish(name, FeedFailed(name, message))

    def close(self) -> None:
        """Drop every connection, end every thread, let go of the spools. Takes milliseconds. Idempotent."""
        with self._lock:
            self._is_closed = True
            connections = dict(self._connections)
        _hang_up(self._listener)
        for connection in connections:
            _hang_up(connection)
        self._acceptor.join()
        for thread in connections.values():
            thread.join()
        self._listener.close()
        with self._lock:
            for feed in self._feeds.values():
                feed.close()

    # --- the driver's decisions ---------------------------------------------------------------------------

    def _feed(self, name: str) -> _Feed:
        feed = self._feeds.get(name)
        if feed is None:
            feed = self._feeds[name] = _Feed(name, self._directory)
        return feed

    def _finish(self, name: str, notice: FeedNotice) -> None:
        with self._lock:
            feed = self._feed(name)
            if feed.is_over:
                return
            feed.is_over = True
            for streams in feed.staged.values():
                for stream in streams.values():
                    feed.drop(stream)
            feed.staged.clear()
            self._notify(notice)

    # --- connections --------------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        while True:
            self._strangers.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:  # close() hung up
                return
            thread = threading.Thread(target=self._serve, args=(connection,), name="tfos-feed", daemon=True)
            with self._lock:
                if self._is_closed:
                    connection.close()
                    return
                self._connections[connection] = thread
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError, wire.ConnectionEndedError):
                if self._is_sender(connection):
                    connection.settimeout(None)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    self._receive(connection)
        finally:
            with self._lock:
                self._connections.pop(connection, None)

    def _is_sender(self, connection: socket.socket) -> bool:
        try:
            connection.settimeout(wire.HANDSHAKE_TIMEOUT_S)
            return wire.prove_as_receiver(connection, self._secret)
        finally:
            self._strangers.release()

    def _receive(self, connection: socket.socket) -> None:
        try:
            row_count = self._receive_stream(connection)
        except wire.ConnectionEndedError:
            raise
        except (TfosError, OSError, ValueError, KeyError) as error:
            wire.send_frame(connection, wire.REFUSED, str(error).encode())
            _drain(connection)
        else:
            wire.send_frame(connection, wire.ACCEPTED, row_count=row_count)

    def _receive_stream(self, connection: socket.socket) -> int:
        """Stage one attempt; return the rows that came. Rows of an unwanted attempt are counted and dropped."""
        opening = json.loads(wire.receive_payload(connection, _expect(connection, wire.OPEN)))
        schema_ipc = wire.receive_payload(connection, _expect(connection, wire.SCHEMA))
        feed, stream = self._open(opening, schema_ipc)
        row_count = 0
        while (header := wire.receive_header(connection)).kind == wire.CHUNK:
            self._receive_chunk(connection, header, feed, stream)
            row_count += header.row_count
        if header.kind != wire.END or header.row_count != row_count:
            raise FeedError(f"A sender announced {header.row_count} rows, {row_count} arrived.")
        return row_count

    def _open(self, opening: dict[str, object], schema_ipc: bytes) -> tuple[_Feed, _Stream]:
        name, columns = str(opening["name"]), str(opening["columns"])
        with self._lock:
            if self._is_closed:
                raise wire.ConnectionEndedError("The node's receiver has been closed.")
            feed = self._feed(name)
            if feed.columns is None:
                feed.columns = columns
                self._notify(FeedOpened(name, schema_ipc, feed.spool.fd))
            elif feed.columns != columns:
                raise FeedError(f"Feed '{name}' has the columns ({feed.columns}); a partition brings ({columns}).")
            return feed, feed.stage(int(str(opening["partition"])), int(str(opening["attempt"])))

    def _receive_chunk(self, connection: socket.socket, header: wire.Header, feed: _Feed, stream: _Stream) -> None:
        if stream.is_unwanted:
            _skip(connection, header.length_bytes)
            return
        chunk = feed.spool.append_from(
            lambda piece: wire.receive_into(connection, piece), header.length_bytes, header.row_count
        )
        with self._lock:
            feed.keep(stream, chunk)


def _expect(connection: socket.socket, kind: bytes) -> wire.Header:
    header = wire.receive_header(connection)
    if header.kind != kind:
        raise FeedError(f"The feed got a frame {header.kind!r} where {kind!r} was due.")
    return header


def _skip(connection: socket.socket, length_bytes: int) -> None:
    buffer = memoryview(bytearray(min(length_bytes, _DRAIN_PIECE_BYTES)))
    while length_bytes:
        piece = buffer[: min(length_bytes, len(buffer))]
        wire.receive_into(connection, piece)
        length_bytes -= len(piece)


def _drain(connection: socket.socket) -> None:
    """Read on until the sender hangs up: closing with data unread would reset the connection and lose our answer."""
    connection.settimeout(wire.HANDSHAKE_TIMEOUT_S)
    while connection.recv(_DRAIN_PIECE_BYTES):
        pass


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # the peer may have gone first
        connection.shutdown(socket.SHUT_RDWR)
