"""The node's end of the feed: takes chunks from any number of Spark tasks and publishes those that count.

Runs on: executors (agent). Needs neither Arrow nor TensorFlow: a chunk goes from the socket to the file unparsed.

A row reaches the user exactly once, whatever Spark repeats::

    sender of (partition 7, attempt 0) ──► staged ──┐
    sender of (partition 7, attempt 1) ──► staged ──┤   driver: "partition 7 is attempt 1"
                                                    └─► publish(7, 1): attempt 1 becomes visible, 0 is thrown away

A sender that dies in mid-stream leaves nothing. Inference needs no decision: each attempt is a *session* of its own,
whose rows go to the child at once and whose results go back to that attempt and nobody else.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tfos_magic.errors import FeedError, TfosError
from tfos_magic.feed import wire
from tfos_magic.feed.spool import ChunkRef, Spool
from tfos_magic.feed.staging import (
    ChunkReady,
    Feed,
    FeedEnded,
    FeedFailed,
    FeedNotice,
    FeedOpened,
    PartitionEnded,
    SessionLost,
    Stream,
    Waiting,
)

_UNPROVEN_CONNECTIONS = 256  # more strangers than this at once wait in the kernel's queue
_DRAIN_PIECE_BYTES = 256 << 10
_LOOK_INTERVAL_S = 1.0  # how often a connection that waits for room is looked at; nobody wakes us when its sender dies
_TCP_ESTABLISHED = 1


class _Session:
    """The way back to one Spark task that waits for results.

    Its thread writes them, so that the agent's loop never waits for a task.
    """

    def __init__(self, number: int, feed: Feed, connection: socket.socket) -> None:
        self.number = number
        self.feed = feed
        self.rows_taken = 0
        self.rows_answered = 0
        self._connection = connection
        self._writing = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[bytes, bytes, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="tfos-feed-results", daemon=True)
        self._thread.start()

    @property
    def is_answered(self) -> bool:
        """Whether nothing of this session is under way."""
        return self.rows_taken == self.rows_answered

    def give(self, results: bytes, row_count: int) -> None:
        """Queue the results of the next `row_count` rows."""
        self.rows_answered += row_count
        self._waiting.put((wire.RESULTS, results, row_count))

    def say(self, kind: bytes, payload: bytes) -> None:
        """Send a word to the task between two results. Called by the thread that reads from it."""
        with self._writing:
            wire.send_frame(self._connection, kind, payload)

    def refuse(self, message: str) -> None:
        """Say why no further result will come."""
        self._waiting.put((wire.REFUSED, message.encode(), 0))

    def close(self) -> None:
        """End the thread once it has written what is queued."""
        self._waiting.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                with self._writing:
                    wire.send_frame(self._connection, *item)
            except OSError:  # the task is gone; whoever reads from it notices
                return


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
        self._room_made = threading.Condition(self._lock)
        self._feeds: dict[str, Feed] = {}
        self._sessions: dict[int, _Session] = {}
        self._session_count = 0
        self._rows_of_dropped = 0
        self._held_tasks = 0
        self._waiting_since = 0.0
        self._wait_s = 0.0
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._strangers = threading.BoundedSemaphore(_UNPROVEN_CONNECTIONS)
        self._is_closed = False
        self._listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept_all, name="tfos-feed-accept", daemon=True)
        self._acceptor.start()

    @property
    def rows_received(self) -> int:
        """Rows of all feeds, published or still staged; goes down when an attempt is thrown away."""
        with self._lock:
            return self._rows_of_dropped + sum(feed.rows_received for feed in self._feeds.values())

    @property
    def staged(self) -> tuple[int, int]:
        """How many chunks wait for the driver's word, and their bytes."""
        with self._lock:
            feeds = self._feeds.values()
            return sum(feed.staged_chunks for feed in feeds), sum(feed.staged_bytes for feed in feeds)

    @property
    def wait_s(self) -> float:
        """Seconds during which at least one Spark task waited for room on this node."""
        with self._lock:
            return self._wait_s + (time.monotonic() - self._waiting_since if self._held_tasks else 0.0)

    def add_queue(self, name: str, limit_bytes: int) -> None:
        """Expect a feed that passes once, of which at most `limit_bytes` may wait here for the child.

        Parameters
        ----------
        name : str
            Of one delivery.
        limit_bytes : int
        """
        with self._lock:
            self._feeds.setdefault(name, Feed(name, self._directory, limit_bytes))

    def release(self, name: str, offset: int, length_bytes: int) -> None:
        """Take note that the child has taken a chunk of a queue out of the spool."""
        with self._room_made:
            if name in self._feeds:
                self._feeds[name].release(ChunkRef(offset, length_bytes, 0))
                self._room_made.notify_all()

    def drop(self, name: str) -> None:
        """Forget a feed whose last row has been consumed, and give its disk space back."""
        with self._room_made:
            feed = self._feeds.pop(name, None)
            if feed is not None:
                self._rows_of_dropped += feed.rows_received
                feed.finish()
                feed.close()
                self._room_made.notify_all()

    def answer(self, session: int, results: bytes, row_count: int) -> None:
        """Send results to the Spark task that waits for them; harmless when it is gone."""
        with self._lock:
            if session in self._sessions:
                self._sessions[session].give(results, row_count)
                self._room_made.notify_all()

    def publish(
        self, name: str, partition: int, attempt: int, row_count: int | None = None, *, is_last: bool = True
    ) -> None:
        """Make what one attempt has delivered visible, in the order it came.

        With the last portion the partition's other attempts are thrown away, and no later decision changes anything.

        Parameters
        ----------
        name : str
        partition, attempt : int
            As the sender named itself.
        row_count : int, optional
            How many rows the sender dealt to this node. If the staged ones are not as many, the feed fails
            rather than train on part of the data.
        is_last : bool
            False for a portion of a partition of which more will come.
        """
        with self._lock:
            feed = self._feed(name)
            if partition in feed.winners or feed.is_over:
                return
            chunks = feed.take(partition, attempt, is_last=is_last)
            staged = sum(chunk.row_count for chunk in chunks)
            if row_count is not None and staged != row_count:
                self.fail(name, f"Partition {partition} of feed '{name}': {row_count} rows dealt, {staged} arrived.")
                return
            for chunk in chunks:
                place = chunk.offset, chunk.length_bytes, chunk.row_count
                self._notify(ChunkReady(name, *place, partition=partition))
            if feed.limit_bytes is not None and is_last:
                self._notify(PartitionEnded(name))
            self._room_made.notify_all()

    def discard(self, name: str, partition: int, attempt: int) -> None:
        """Throw away what an attempt has delivered so far: another one was first with it."""
        with self._room_made:
            self._feed(name).discard(partition, attempt)
            self._room_made.notify_all()

    def end(self, name: str, rows_per_node: Sequence[int], fingerprint: int = 0) -> None:
        """Say that every partition has been published."""
        self._finish(name, FeedEnded(name, tuple(rows_per_node), fingerprint))

    def fail(self, name: str, message: str) -> None:
        """Say that the feed will not be completed, and why."""
        self._finish(name, FeedFailed(name, message))

    def close(self) -> None:
        """Drop every connection, end every thread, let go of the spools. Takes milliseconds. Idempotent."""
        with self._room_made:
            self._is_closed = True
            connections = dict(self._connections)
            self._room_made.notify_all()
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

    def stop(self, name: str, reason: str) -> None:
        """Take no further row of a queue, and tell the tasks that wait for results why; the child knows already."""
        with self._room_made:
            if name in self._feeds:
                self._feeds[name].finish()
                for session in self._sessions.values():
                    if session.feed is self._feeds[name]:
                        session.refuse(reason)
                self._room_made.notify_all()

    # --- the driver's decisions ---------------------------------------------------------------------------

    def _feed(self, name: str) -> Feed:
        feed = self._feeds.get(name)
        if feed is None:
            feed = self._feeds[name] = Feed(name, self._directory)
        return feed

    def _finish(self, name: str, notice: FeedNotice) -> None:
        with self._lock:
            feed = self._feed(name)
            if feed.is_over:
                return
            feed.finish()
            self._notify(notice)
            self._room_made.notify_all()

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
                    wire.keep_open(connection)
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
            opening = json.loads(wire.receive_payload(connection, _expect(connection, wire.OPEN)))
            schema_ipc = wire.receive_payload(connection, _expect(connection, wire.SCHEMA))
            if opening.get("wants_results"):
                self._serve_session(connection, opening, schema_ipc)
                return
            row_count = self._receive_stream(connection, opening, schema_ipc)
        except wire.ConnectionEndedError:
            raise
        except (TfosError, OSError, ValueError, KeyError) as error:
            wire.send_frame(connection, wire.REFUSED, str(error).encode())
            _drain(connection)
        else:
            wire.send_frame(connection, wire.ACCEPTED, row_count=row_count)

    def _open(self, opening: dict[str, object], schema_ipc: bytes) -> Feed:
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
            return feed

    # --- rows that count once -----------------------------------------------------------------------------

    def _receive_stream(self, connection: socket.socket, opening: dict[str, object], schema_ipc: bytes) -> int:
        """Stage one attempt; return its last portion's rows. Rows of an unwanted attempt are counted and dropped."""
        with self._lock:
            feed = self._open(opening, schema_ipc)
            stream = feed.stage(int(str(opening["partition"])), int(str(opening["attempt"])))
        try:
            if opening.get("is_here"):
                wire.send_frame(connection, wire.SPOOL, json.dumps(feed.spool.offer).encode())
            while True:
                header, row_count = self._receive_portion(connection, feed, stream)
                if header.kind == wire.END:
                    break
                wire.send_frame(connection, wire.ACCEPTED, row_count=row_count)
        except BaseException:
            with self._room_made:
                feed.hang_up(stream)
                self._room_made.notify_all()
            raise
        with self._room_made:
            stream.is_complete = True
            self._room_made.notify_all()
        return row_count

    def _receive_portion(self, connection: socket.socket, feed: Feed, stream: Stream) -> tuple[wire.Header, int]:
        row_count = 0
        while (header := wire.receive_header(connection)).kind in (wire.CHUNK, wire.ASK):
            self._receive_chunk(connection, header, feed, stream)
            row_count += header.row_count
        if header.kind not in (wire.MARK, wire.END) or header.row_count != row_count:
            raise FeedError(f"A sender announced {header.row_count} rows, {row_count} arrived.")
        with self._lock:
            stream.end_portion()
        return header, row_count

    def _receive_chunk(self, connection: socket.socket, header: wire.Header, feed: Feed, stream: Stream) -> None:
        coming = _Coming.announced(connection, header)
        self._wait_for_room(connection, lambda: feed.has_room(stream, coming.length_bytes, self._waiting()))
        if stream.is_unwanted:
            coming.skip(lambda: wire.send_frame(connection, wire.UNWANTED))
            return
        chunk = coming.into(feed.spool, lambda place: wire.send_frame(connection, wire.PLACE, place))
        with self._lock:
            feed.keep(stream, chunk)

    def _waiting(self) -> Waiting:
        queues = [feed for feed in self._feeds.values() if feed.limit_bytes is not None]
        return Waiting(sum(feed.staged_bytes for feed in queues), sum(feed.published_bytes for feed in queues))

    def _wait_for_room(self, connection: socket.socket, has_room: Callable[[], bool]) -> None:
        """Stop reading while the child is slower than Spark: the sender then waits too, for as long as it takes."""
        with self._room_made:
            if has_room():
                return
            with self._counted_as_held():
                while not has_room():
                    if self._is_closed or _has_hung_up(connection):
                        raise wire.ConnectionEndedError("The sender of waiting rows went away.")
                    self._room_made.wait(_LOOK_INTERVAL_S)

    @contextmanager
    def _counted_as_held(self) -> Iterator[None]:
        """Count the time of the block as the feed's waiting for this node; under the lock."""
        if not self._held_tasks:
            self._waiting_since = time.monotonic()
        self._held_tasks += 1
        try:
            yield
        finally:
            self._held_tasks -= 1
            if not self._held_tasks:
                self._wait_s += time.monotonic() - self._waiting_since

    # --- rows that ask for results ------------------------------------------------------------------------

    def _serve_session(self, connection: socket.socket, opening: dict[str, object], schema_ipc: bytes) -> None:
        feed = self._open(opening, schema_ipc)
        with self._session(connection, feed) as session:
            if opening.get("is_here"):
                session.say(wire.SPOOL, json.dumps(feed.spool.offer).encode())
            try:
                while (header := wire.receive_header(connection)).kind in (wire.CHUNK, wire.ASK):
                    self._receive_question(connection, header, feed, session)
            except wire.ConnectionEndedError:
                return
            with self._lock:
                self._notify(PartitionEnded(feed.name, session.number))
            while connection.recv(_DRAIN_PIECE_BYTES):  # until the task hangs up: it has its results, or is gone
                pass

    def _receive_question(self, connection: socket.socket, header: wire.Header, feed: Feed, session: _Session) -> None:
        limit = feed.limit_bytes or 0
        coming = _Coming.announced(connection, header)
        self._wait_for_room(connection, lambda: self._has_room(coming.length_bytes, limit))
        chunk = coming.into(feed.spool, lambda place: session.say(wire.PLACE, place))
        with self._lock:
            if feed.is_over:
                raise FeedError("The node takes no more rows: its function has ended the feed.")
            session.rows_taken += chunk.row_count
            feed.publish(chunk)
            self._notify(ChunkReady(feed.name, chunk.offset, chunk.length_bytes, chunk.row_count, session.number))

    def _has_room(self, length_bytes: int, limit_bytes: int) -> bool:
        """Return whether a question may come in; one by itself always: the child may wait for it to fill a batch."""
        waiting = self._waiting().published_bytes
        return not waiting or waiting + length_bytes <= limit_bytes

    @contextmanager
    def _session(self, connection: socket.socket, feed: Feed) -> Iterator[_Session]:
        with self._lock:
            self._session_count += 1
            session = self._sessions[self._session_count] = _Session(self._session_count, feed, connection)
        try:
            yield session
        except FeedError as error:
            session.refuse(str(error))
        finally:
            with self._lock:
                del self._sessions[session.number]
                if not session.is_answered:
                    self._notify(SessionLost(feed.name, session.number))
            session.close()


@dataclass(frozen=True)
class _Coming:
    """A chunk that a task has announced: its bytes follow, or it will write them where it is told to."""

    connection: socket.socket
    length_bytes: int
    row_count: int
    is_here: bool

    @classmethod
    def announced(cls, connection: socket.socket, header: wire.Header) -> _Coming:
        is_here = header.kind == wire.ASK
        length = wire.unpack_number(wire.receive_payload(connection, header)) if is_here else header.length_bytes
        return cls(connection, length, header.row_count, is_here)

    def into(self, spool: Spool, tell: Callable[[bytes], None]) -> ChunkRef:
        """Take it in; `tell` sends the task a place."""
        if not self.is_here:
            return spool.append_from(
                lambda piece: wire.receive_into(self.connection, piece), self.length_bytes, self.row_count
            )
        with spool.place(self.length_bytes, self.row_count) as chunk:
            tell(wire.pack_number(chunk.offset))
            _expect(self.connection, wire.WRITTEN)
        return chunk

    def skip(self, decline: Callable[[], None]) -> None:
        """Let it pass; `decline` tells the task not to write."""
        if self.is_here:
            decline()
            _expect(self.connection, wire.WRITTEN)
        else:
            _skip(self.connection, self.length_bytes)


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


def _has_hung_up(connection: socket.socket) -> bool:
    """Return whether the peer is gone, without taking anything of what it has sent; a half-closed one counts."""
    state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state != _TCP_ESTABLISHED


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # the peer may have gone first
        connection.shutdown(socket.SHUT_RDWR)
