"""``ctx.mgr``: TensorFlowOnSpark's manager, of this process alone.

Runs on: executor, in the child.

There, a second process held the queues, and each row was a call to it. Here rows come from this node's cache or
stream, and its queues are views of that.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import UsageError
from tfos_magic.marker import EndPartition

if TYPE_CHECKING:
    from tfos_magic.feed.readers import Reader
    from tfos_magic.feed.rows import Rows
    from tfos_magic.feed.source import Feeds


class Manager:
    """The feeds of a node as TensorFlowOnSpark's queues, and a few values by name.

    Parameters
    ----------
    feeds : Feeds
    """

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        self._values: dict[str, Any] = {"state": "running"}
        self._queues: dict[str, Any] = {}
        self._read_last: Reader | None = None
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Manager, {self._values['state']}>"

    def reader(self, qname: str) -> Reader:
        """Return what gives the rows of a feed or queue: of ``--data`` anew from the start, of a queue the next ones.

        Raises
        ------
        UsageError
            This run has no feed or queue of that name.
        """
        self._read_last = reader = self._feeds.reader(qname)
        return reader

    def get_queue(self, qname: str) -> Any:
        """Return something with the methods of :class:`queue.Queue`; the same one each time.

        Parameters
        ----------
        qname : str
            ``input`` or another feed or queue of the run: its rows one by one. ``output``: takes one result for each
            row that was got. Any other name: a queue inside this process.
        """
        with self._lock:
            if qname not in self._queues:
                self._queues[qname] = self._make_queue(qname)
            return self._queues[qname]

    def get(self, key: str) -> Any:
        """Return the value kept under `key`; KeyError if there is none. ``state`` is there from the start."""
        return self._values[key]

    def set(self, key: str, value: Any) -> None:
        """Keep a value. TensorFlowOnSpark's ``state`` is ``running``, ``terminating`` or ``stopped``."""
        self._values[key] = value

    def put_result(self, result: Any) -> None:
        """Give back the result for the next row of what was read last."""
        (self._read_last or self.reader("input")).put_results([result])

    def _make_queue(self, qname: str) -> Any:
        if qname == "output":
            return ResultQueue(self)
        if qname != "error":
            try:
                return RowQueue(qname, self.reader(qname))
            except UsageError:
                if qname == "input":  # nothing would ever come
                    raise
        return queue.Queue()


class RowQueue:
    """The rows of a reader one by one, ``EndPartition`` between them, None at the end.

    Parameters
    ----------
    name : str
    reader : Reader
    """

    def __init__(self, name: str, reader: Reader) -> None:
        self.name = name
        self._reader = reader
        self._rest: Rows | None = None
        self._is_over = False

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next row, an ``EndPartition``, or None when no row will ever come again.

        It waits until that is known, whatever `block` and `timeout` say: rows come by the chunk, and a node that waits
        here has nothing else to do. After None has been returned, a get that does not want to wait raises
        :class:`queue.Empty`, so that loops which empty a queue come to their end.
        """
        if self._is_over and not (block and timeout is None):
            raise queue.Empty
        if not self._rest:
            item = self._reader.next_item()
            if item is None or isinstance(item, EndPartition):
                self._is_over = item is None
                return item
            self._rest = item
        part, self._rest = self._rest.cut(1)
        self._reader.count_consumed(1)
        return part.items()[0]

    def get_nowait(self) -> Any:
        """As ``get(block=False)``."""
        return self.get(block=False)

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Refuse: Spark fills this queue."""
        raise UsageError(
            f"Queue '{self.name}' is filled by Spark; a node cannot put a {type(item).__name__} into it.",
            hint="Results go to mgr.get_queue('output'), or by DataFeed.batch_results(results).",
        )

    put_nowait = put

    def task_done(self) -> None:
        """Do nothing: a row counts when it is got."""

    def join(self) -> None:
        """Do nothing: who feeds waits elsewhere."""

    def qsize(self) -> int:
        """Return how many rows are at hand; more may be on their way."""
        return len(self._rest or ())

    def empty(self) -> bool:
        """Return whether no further row will come; waits until that is known."""
        return not self._rest and not self._reader.has_rows()

    def full(self) -> bool:
        """Return False: nothing can be put here."""
        return False


class ResultQueue:
    """Takes the results of inference, one for each row that was got.

    Parameters
    ----------
    manager : Manager
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Send a result to Spark."""
        self._manager.put_result(item)

    put_nowait = put

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Refuse: Spark takes the results."""
        raise UsageError("Queue 'output' is emptied by Spark; a node cannot get from it.")

    get_nowait = get

    def task_done(self) -> None:
        """Do nothing: Spark takes the results."""

    def join(self) -> None:
        """Do nothing: what was put is on its way."""

    def qsize(self) -> int:
        """Return 0: nothing stays here."""
        return 0

    def empty(self) -> bool:
        """Return True: nothing stays here."""
        return True

    def full(self) -> bool:
        """Return False: Spark takes what comes."""
        return False
