"""TensorFlowOnSpark's ``TFManager``: queues and values in a process of their own, for any number of processes.

Runs on: anywhere.

    start(…) ─► server: a fresh interpreter      connect(address, authkey)
        │         │  queues, values                    │
        └─────────┴── multiprocessing's protocol, ─────┘
                      authenticated

This package's own feed does not need it (see :mod:`tfos_magic.node.manager`); code written for TensorFlowOnSpark may.
What is put into a queue travels as :mod:`tfos_magic.feed.objects` has it, so that classes of the notebook arrive as
what they are, and the server (:mod:`tfos_magic.queue_server`) never needs the classes of what it holds.
"""

from __future__ import annotations

import os
import subprocess
import weakref
from collections.abc import Iterable, Sequence
from multiprocessing.managers import BaseManager, BaseProxy
from typing import TYPE_CHECKING, Any

from tfos_magic import queue_server
from tfos_magic.errors import UsageError
from tfos_magic.feed import objects

if TYPE_CHECKING:
    from tfos_magic.queue_server import Address


def start(authkey: str | bytes, queues: Iterable[str], mode: str = "local") -> TFManager:
    """Start a server and return a manager connected to it.

    Parameters
    ----------
    authkey : str or bytes
        Who connects must know it.
    queues : iterable of str
        Names of the queues that there are to be.
    mode : str
        ``local``: reachable on this host, by this user; ``remote``: on this host's address.

    Returns
    -------
    TFManager
        The server ends with its ``shutdown()``, with the manager object, or with this process.
    """
    if mode not in ("local", "remote"):
        raise UsageError(f"mode is {mode!r}; it must be 'local' or 'remote'.")
    server = queue_server.start(_as_bytes(authkey), list(queues), is_remote=mode == "remote")
    try:
        manager = connect(queue_server.read_address(server), authkey)
    except BaseException:
        queue_server.stop(server, os.getpid())
        raise
    manager.own(server)
    return manager


def connect(address: Address | Sequence[Any], authkey: str | bytes) -> TFManager:
    """Return a manager connected to a server that runs.

    Parameters
    ----------
    address : str or (str, int)
        The other manager's ``address``.
    authkey : str or bytes

    Raises
    ------
    multiprocessing.AuthenticationError
        The key is another one.
    OSError
        Nobody listens there.
    """
    place = address if isinstance(address, str) else (str(address[0]), int(address[1]))
    manager = TFManager(place, authkey=_as_bytes(authkey))
    manager.connect()
    return manager


class TFManager(BaseManager):
    """A connection to a server; made by :func:`start` or :func:`connect`.

    Attributes
    ----------
    address : str or (str, int)
        For :func:`connect`.
    """

    if TYPE_CHECKING:

        def _store(self) -> BaseProxy: ...

    def __init__(self, address: Address, authkey: bytes) -> None:
        super().__init__(address=address, authkey=authkey)
        self._proxy: BaseProxy | None = None
        self._stop_server: weakref.finalize[..., TFManager] | None = None

    def own(self, server: subprocess.Popen[bytes]) -> None:
        """Let `server` end with this object."""
        self._stop_server = weakref.finalize(self, queue_server.stop, server, os.getpid())

    def get_queue(self, qname: str) -> TFQueue | None:
        """Return a queue, None if the server was started without one of that name."""
        return TFQueue(self, qname) if self.call("has_queue", qname) else None

    def get(self, key: str) -> Any:
        """Return the value that any process has set under `key`; KeyError if none has."""
        return objects.loads(self.call("get", key))[0]

    def set(self, key: str, value: Any) -> None:
        """Keep a value for all processes."""
        self.call("set", key, objects.dumps([value]))

    def shutdown(self) -> None:  # type: ignore[override]  # there, an attribute that its own start() makes
        """End the server if :func:`start` made this object; a second call does nothing."""
        if self._stop_server is not None:
            self._stop_server()

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call the server; each thread has a connection of its own, so that one may wait and others go on."""
        if self._proxy is None:
            self._proxy = self._store()
        return self._proxy._callmethod(method, arguments)


class TFQueue:
    """A queue in the server, with the methods of :class:`queue.Queue`.

    Parameters
    ----------
    manager : TFManager
    name : str
    """

    def __init__(self, manager: TFManager, name: str) -> None:
        self._manager = manager
        self.name = name

    def __repr__(self) -> str:
        return f"<TFQueue {self.name!r} at {self._manager.address!r}>"

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Append an object that can be pickled."""
        self._call("put", objects.dumps([item]), block, timeout)

    def put_nowait(self, item: Any) -> None:
        """As ``put(item, block=False)``."""
        self.put(item, block=False)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the next object; :class:`queue.Empty` if none came in `timeout` seconds."""
        return objects.loads(self._call("get", block, timeout))[0]

    def get_nowait(self) -> Any:
        """As ``get(block=False)``."""
        return self.get(block=False)

    def task_done(self) -> None:
        """Say that one object that was taken needs no more work."""
        self._call("task_done")

    def join(self) -> None:
        """Wait until as many objects are done as were put."""
        self._call("join")

    def qsize(self) -> int:
        """Return how many objects wait."""
        return int(self._call("qsize"))

    def empty(self) -> bool:
        """Return whether no object waits now."""
        return bool(self._call("empty"))

    def full(self) -> bool:
        """Return False: the queue is as long as it must be."""
        return False

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._manager.call("call_queue", self.name, method, *arguments)


TFManager.register("_store", proxytype=queue_server.StoreProxy)


def _as_bytes(authkey: str | bytes) -> bytes:
    return authkey.encode() if isinstance(authkey, str) else bytes(authkey)
