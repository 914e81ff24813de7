"""The process behind a ``TFManager``: queues and values, all as bytes.

Runs on: anywhere.

    owner ── stdin: settings, later the end ──► server ── stdout: its address ──► owner
    any process ── multiprocessing's protocol, authenticated, one thread per connection ──► server

It is neither forked, because a process that runs TensorFlow must not be, nor started by multiprocessing's "spawn",
which would run the user's script again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.managers import BaseManager, BaseProxy
from pathlib import Path
from typing import Any, TypeAlias

from tfos_magic.errors import TfosError

Address: TypeAlias = "str | tuple[str, int]"

_BOOT = "import sys; sys.path[0] = sys.argv[1]; from tfos_magic.queue_server import serve; serve()"
_ARCHIVE = "/proc/self/fd/"  # where this package lies when a run has brought it along
_QUEUE_METHODS = frozenset({"put", "get", "task_done", "join", "qsize", "empty"})
_STOP_TIMEOUT_S = 5.0


def start(authkey: bytes, queues: Sequence[str], *, is_remote: bool) -> subprocess.Popen[bytes]:
    """Start a server; it ends with :func:`stop`, or with this process.

    Parameters
    ----------
    authkey : bytes
    queues : sequence of str
    is_remote : bool
        Listen on this host's address; else on a socket in a directory that only this user can enter.
    """
    root = str(Path(__file__).parents[1])
    archive = [int(root.removeprefix(_ARCHIVE))] if root.startswith(_ARCHIVE) else []
    server = subprocess.Popen(
        [sys.executable, "-c", _BOOT, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=archive,
        start_new_session=True,  # an interrupt of the notebook is none of its business
    )
    config = {"authkey": authkey.hex(), "queues": list(queues), "is_remote": is_remote}
    if server.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # read_address tells what became of it
            server.stdin.write(json.dumps(config).encode() + b"\n")
            server.stdin.flush()
    return server


def read_address(server: subprocess.Popen[bytes]) -> Address:
    """Wait for the server and return where it listens; TfosError if it could not start."""
    line = server.stdout.readline() if server.stdout is not None else b""
    answer = json.loads(line) if line else {"error": f"it exited with {server.wait(_STOP_TIMEOUT_S)}"}
    if "error" in answer:
        raise TfosError(
            f"The manager's server did not start: {answer['error']}.",
            hint="Its own output, if any, is in this process's stderr.",
        )
    address = answer["address"]
    return address if isinstance(address, str) else (str(address[0]), int(address[1]))


def stop(server: subprocess.Popen[bytes], owner_pid: int) -> None:
    """End the server and wait until it is gone."""
    if os.getpid() != owner_pid:  # a fork of the owner, in which the server only seems to be a child
        return
    for pipe in (server.stdin, server.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                if pipe is server.stdin:
                    pipe.write(b".")  # not only its end, which a fork may keep open
                pipe.close()
    try:
        server.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


# --- in the server ---------------------------------------------------------------------------------------


class _Store:
    """What the server holds: everything as bytes, which only clients can read."""

    def __init__(self, queues: Sequence[str]) -> None:
        self._queues: dict[str, queue.Queue[bytes]] = {name: queue.Queue() for name in queues}
        self._values: dict[str, bytes] = {}

    def has_queue(self, name: str) -> bool:
        return name in self._queues

    def call_queue(self, name: str, method: str, *arguments: Any) -> Any:
        if method not in _QUEUE_METHODS:
            raise AttributeError(f"a queue has no method {method}")
        return getattr(self._queues[name], method)(*arguments)

    def get(self, key: str) -> bytes:
        return self._values[key]

    def set(self, key: str, data: bytes) -> None:
        self._values[key] = data


class StoreProxy(BaseProxy):
    """A client's end of the store."""

    _exposed_ = ("has_queue", "call_queue", "get", "set")


def serve() -> None:
    """Be the server: settings come on stdin, the address goes to stdout, and the end of stdin is the end."""
    config = json.loads(sys.stdin.buffer.readline())
    with tempfile.TemporaryDirectory(prefix="tfos_magic-") as directory:
        try:
            server = _make_server(config, directory)
            answer: dict[str, Any] = {"address": server.address}
            threading.Thread(target=server.serve_forever, daemon=True).start()
        except OSError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        sys.stdin.buffer.read(1)
    os._exit(0)  # threads that still wait in a queue wait for nobody


def _make_server(config: dict[str, Any], directory: str) -> Any:
    store = _Store(config["queues"])

    class Serving(BaseManager):
        pass

    Serving.register("_store", callable=lambda: store, proxytype=StoreProxy)
    address: Address = str(Path(directory, "manager")) if not config["is_remote"] else (_host_address(), 0)
    return Serving(address, bytes.fromhex(config["authkey"])).get_server()


def _host_address() -> str:
    """Return the address by which other hosts reach this one; Spark's where it says which."""
    told = os.environ.get("SPARK_LOCAL_IP")
    if told:
        return told
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing: the kernel only chooses the way out
        return str(probe.getsockname()[0])
    return socket.gethostbyname(socket.gethostname())
