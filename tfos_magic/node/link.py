"""The child's end of the channel to its agent.

Runs on: executor, in the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tfos_magic.feed.source import Feeds  # here, not when first needed: see Link
from tfos_magic.feed.spool import ChunkRef
from tfos_magic.feed.stream import StreamSource
from tfos_magic.node import channel

if TYPE_CHECKING:
    from tfos_magic.errors import RemoteException

_COUNTERS_INTERVAL_S = 0.5


class Link:
    """The child's end of the channel: a reader thread for what the agent says, and what the child has to say.

    Its threads import nothing. The main thread imports TensorFlow meanwhile, and two threads that import modules which
    import each other (shutil, zipfile, tempfile) can wait for each other for ever: seen with Python 3.10.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.feeds: Feeds
        """There from the start message on."""
        self._send_lock = threading.Lock()
        self.training_over = threading.Event()
        """Set when the driver says that chief and workers have all returned; others than those hear of it."""
        self._started = threading.Event()
        self._exit = threading.Event()
        self._start: Mapping[str, Any] = {}
        threading.Thread(target=self._read, name="tfos_magic channel", daemon=True).start()
        threading.Thread(target=self._count, name="tfos_magic counters", daemon=True).start()

    def send(self, message_type: str, /, **fields: Any) -> None:
        """Send a small message to the agent, which passes it on to the driver."""
        with self._send_lock:
            channel.send(self._socket, {"type": message_type, **fields})

    def send_blob(self, message_type: str, data: bytes, /, **fields: Any) -> None:
        """Send a message of any size."""
        descriptor = channel.memory_file(data)
        try:
            with self._send_lock:
                channel.send(self._socket, {"type": message_type, **fields}, descriptor)
        finally:
            os.close(descriptor)

    def fail(self, kind: str, error: BaseException) -> None:
        """Report how the node failed: as plain data, never as a pickle."""
        from tfos_magic.errors import RemoteException

        remote: RemoteException = RemoteException.from_exception(error)
        module = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        data = {"kind": kind, "exception": remote.to_json(), "missing_module": module, "sys_executable": sys.executable}
        self.send_blob("failure", json.dumps(data).encode())

    def send_counters(self) -> None:
        """Tell how many rows the function has taken, how long it waited for them, and what lies here for it."""
        feeds = self.feeds
        queued_chunks, queued_bytes = feeds.queued
        self.send(
            "counters",
            rows_consumed=feeds.rows_consumed,
            wait_s=feeds.wait_s,
            is_waiting=any(feed.is_waiting for feed in feeds),
            queued_chunks=queued_chunks,
            queued_bytes=queued_bytes,
            rows_per_epoch=feeds.rows_per_epoch,
        )

    def wait_start(self) -> Mapping[str, Any]:
        """Return the driver's start message, once every node has met."""
        self._started.wait()
        return self._start

    def wait_exit(self) -> None:
        """Stay until told to go: TensorFlow's cluster must not lose a node that others may still need."""
        self._exit.wait()

    def _read(self) -> None:
        try:
            while not self._exit.is_set():
                self._take(channel.receive(self._socket))
        except EOFError:
            os._exit(1)  # the agent is gone: so are we
        except Exception as error:  # a fault of ours; a node that hears nothing any more must not seem to wait
            self.fail("agent", error)

    def _take(self, note: channel.Note) -> None:
        handler: Callable[[channel.Note], None] | None = getattr(self, f"_on_{note.type}", None)
        if handler is not None:
            handler(note)

    def _on_start(self, note: channel.Note) -> None:
        self._start = start = note.header
        index = start["feed_index"]
        queues = [StreamSource(name, index, self) for name in start["queues"]]
        data = start["data_options"]
        self.feeds = Feeds(start["feeds"], index, data["epochs"], queues, in_order=data["seed"] is not None)
        self._started.set()

    def _on_exit(self, note: channel.Note) -> None:
        self._exit.set()

    def _on_training_over(self, note: channel.Note) -> None:
        self.training_over.set()

    def _on_where(self, note: channel.Note) -> None:
        self.send("where", text=_whereabouts())

    # --- feeds and queues ---

    def _on_feed_announced(self, note: channel.Note) -> None:
        self.feeds.announce(note.header["feed"], note.header["queue"])

    def _on_feed_opened(self, note: channel.Note) -> None:
        if note.descriptor is None:
            raise EOFError("a feed was opened without its spool")
        feed, schema = note.header["feed"], bytes.fromhex(note.header["schema"])
        queue = self.feeds.queue_of(feed)
        if queue is not None:
            queue.open(feed, schema, note.descriptor)
        else:
            self.feeds.get(feed).open(schema, note.descriptor)

    def _on_chunk(self, note: channel.Note) -> None:
        feed, chunk = note.header["feed"], note.header["chunk"]
        queue = self.feeds.queue_of(feed)
        if queue is not None:
            queue.add(feed, ChunkRef(*chunk), note.header["session"])
        else:
            self.feeds.get(feed).add(ChunkRef(*chunk), note.header["partition"])

    def _on_partition_ended(self, note: channel.Note) -> None:
        queue = self.feeds.queue_of(note.header["feed"])
        if queue is not None:
            queue.end_partition(note.header["feed"], note.header["session"])

    def _on_session_lost(self, note: channel.Note) -> None:
        queue = self.feeds.queue_of(note.header["feed"])
        if queue is not None:
            queue.lose(note.header["session"])

    def _on_feed_ended(self, note: channel.Note) -> None:
        feed, rows = note.header["feed"], list(note.header["rows_per_node"])
        queue = self.feeds.queue_of(feed)
        if queue is not None:
            queue.end_delivery(feed, rows)
        else:
            self.feeds.get(feed).end(rows, note.header["fingerprint"])

    def _on_feed_failed(self, note: channel.Note) -> None:
        feed = note.header["feed"]
        (self.feeds.queue_of(feed) or self.feeds.get(feed)).fail(note.header["message"])

    def _on_queue_finish(self, note: channel.Note) -> None:
        self.feeds.queue(note.header["queue"]).finish()

    def _on_queue_stop(self, note: channel.Note) -> None:
        self.feeds.queue(note.header["queue"]).stop()

    def _count(self) -> None:
        self._started.wait()
        while not self._exit.wait(_COUNTERS_INTERVAL_S):
            with contextlib.suppress(OSError):
                self.send_counters()


def _whereabouts() -> str:
    """Return the line at which the user's function is now, and what it called from there; for whom it seems to hang."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame)
    ours = os.path.dirname(os.path.dirname(__file__))
    theirs = [entry for entry in stack if not entry.filename.startswith((ours, "<frozen", sys.prefix, "/proc/self/fd"))]
    shown = [f"{entry.filename}, line {entry.lineno} ({entry.name})" for entry in [*theirs[-1:], *stack[-1:]]]
    return ", in ".join(dict.fromkeys(shown))
