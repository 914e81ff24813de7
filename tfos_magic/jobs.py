"""What runs beside the notebook's main thread: Spark jobs that can be cancelled, and nodes on the driver's machine.

Runs on: driver.

The main thread must stay free: an interrupt in the middle of a py4j call breaks the call and leaves the job running,
while a job in a thread of its own is cancelled in 0.02 s.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic import archive
from tfos_magic.node.launch import launch

if TYPE_CHECKING:
    from pyspark import SparkContext

_INTERRUPTIBLE_S = 0.5
_CANCEL_S = 30.0
_LOOK_S = 0.1


class SparkJob:
    """One Spark action in its own thread and job group.

    Parameters
    ----------
    context : SparkContext
    group : str
        Unique; shown in the Spark UI.
    description : str
    action : callable() -> object
        Runs the action, e.g. ``rdd.collect``.
    on_end : callable(SparkJob), optional
        Called in the job's thread when it has ended, well or not.
    """

    def __init__(
        self,
        context: SparkContext,
        group: str,
        description: str,
        action: Callable[[], Any],
        on_end: Callable[[SparkJob], None] | None = None,
    ) -> None:
        from pyspark import InheritableThread

        self._context = context
        self._group = group
        self._description = description
        self._action = action
        self._on_end = on_end
        self._ended = threading.Event()
        self._is_cancelled = False
        self.value: Any = None
        self.error: Exception | None = None
        # Inherits what the notebook set, e.g. the scheduler pool. A daemon, so that it never keeps the kernel alive.
        self._thread = InheritableThread(target=self._run, name=f"tfos_magic {group}", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """True when the action has returned or raised."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Ask Spark to kill the job's tasks; one that Spark has not begun yet is killed when :meth:`wait` sees it."""
        self._is_cancelled = True
        if not self.has_ended:
            self._context.cancelJobGroup(self._group)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; return whether it came."""
        deadline = time.monotonic() + timeout_s
        # Not Thread.join: after a KeyboardInterrupt CPython up to 3.12 takes a live thread for a dead one.
        while not self._ended.wait(min(max(deadline - time.monotonic(), 0.0), _LOOK_S)):
            if time.monotonic() >= deadline:
                return False
            if self._is_cancelled:
                self._cancel_again()
        self._thread.join()
        return True

    def _cancel_again(self) -> None:
        """Kill what has begun since: Spark forgets the wish to kill a job that it is still planning."""
        tracker = self._context.statusTracker()
        if not set(tracker.getJobIdsForGroup(self._group)).isdisjoint(tracker.getActiveJobsIds()):
            self._context.cancelJobGroup(self._group)

    def finish(self, deadline: float = math.inf, *, cancel_s: float = _CANCEL_S) -> bool:
        """Wait for the end; cancel the job when that does not come in time, or when an exception ends the waiting.

        Parameters
        ----------
        deadline : float
            On the monotonic clock.
        cancel_s : float
            How long to wait for the end of a job that was cancelled.

        Returns
        -------
        bool
            Whether it has ended by itself.
        """
        has_ended = False
        try:
            while not (has_ended := self.wait(_INTERRUPTIBLE_S)) and time.monotonic() < deadline:
                pass
        finally:
            if not has_ended:
                self.cancel()
                self.wait(cancel_s)
        return has_ended

    def _run(self) -> None:
        try:
            self._context.setJobGroup(self._group, self._description, interruptOnCancel=False)
            if not self._is_cancelled:
                self.value = self._action()
        except Exception as error:  # Spark, py4j and Java raise what they like; the owner sorts it out
            self.error = error
        finally:
            self._ended.set()
            if self._on_end is not None:
                self._on_end(self)


class LocalNodes:
    """Nodes that are processes of the driver's machine; each has a thread that stands in for Spark's task.

    Parameters
    ----------
    indices : sequence of int
        Of the nodes.
    config : dict
        What an executor's task would get.
    payload : bytes
        The packed function.
    """

    def __init__(self, indices: Sequence[int], config: dict[str, Any], payload: bytes) -> None:
        self._threads = [
            threading.Thread(target=self._run, args=(index, config, payload), name=f"tfos_magic node {index}")
            for index in indices
        ]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until the nodes have ended."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self, index: int, config: dict[str, Any], payload: bytes) -> None:
        for _ in launch(archive.build(), config, payload, iter([index])):
            pass  # its one summary comes when the node has ended
