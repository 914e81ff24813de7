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
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tfos_magic.feed.source import Feeds  # here, not when first needed: see Link
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
        self._started = threading.Event()
        self._exit = threading.Event()
        self._start: Mapping[str, Any] = {}
        threading.Thread(target=self._read, name="tfos_magic channel", daemon=True).start()
        threading.Thread(target=self._count, name="tfos_magic counters", daemon=True).start()

    def send(self, message_type: str, /, **fields: Any) -> None:
        """Send a small message to the agent, which passes it on to the driver."""
        with self._send_lock:
            channel.send(self._socket, {"type": message_type, **fields})

    def send_blob(self, message_type: str, data: bytes) -> None:
        """Send a message of any size."""
        descriptor = channel.memory_file(data)
        try:
            with self._send_lock:
                channel.send(self._socket, {"type": message_type}, descriptor)
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
        """Tell how many rows the function has taken, and how long it waited for them."""
        is_waiting = any(feed.is_waiting for feed in self.feeds)
        self.send("counters", rows_consumed=self.feeds.rows_consumed, wait_s=self.feeds.wait_s, is_waiting=is_waiting)

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

    def _take(self, note: channel.Note) -> None:
        header = note.header
        if note.type == "start":
            self._start = header
            self.feeds = Feeds(header["feeds"], header["feed_index"], header["data_options"]["epochs"])
            self._started.set()
        elif note.type == "exit":
            self._exit.set()
        elif note.type == "feed_opened":
            if note.descriptor is None:
                raise EOFError("a feed was opened without its spool")
            self.feeds.get(header["feed"]).open(bytes.fromhex(header["schema"]), note.descriptor)
        elif note.type == "chunk":
            self.feeds.get(header["feed"]).add(*header["chunk"])
        elif note.type == "feed_ended":
            self.feeds.get(header["feed"]).end(list(header["rows_per_node"]))
        elif note.type == "feed_failed":
            self.feeds.get(header["feed"]).fail(header["message"])

    def _count(self) -> None:
        self._started.wait()
        while not self._exit.wait(_COUNTERS_INTERVAL_S):
            with contextlib.suppress(OSError):
                self.send_counters()
