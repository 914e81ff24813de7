"""Nodes get their places: slots of Spark's for one task each, or a process beside the driver.

Runs on: driver.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic import archive, session
from tfos_magic.jobs import LocalNodes, SparkJob
from tfos_magic.members import Member
from tfos_magic.options import RunOptions
from tfos_magic.status import Event, PhaseChanged

if TYPE_CHECKING:
    from pyspark import SparkContext


class Launch:
    """The tasks and processes in which the nodes of one run are started.

    Parameters
    ----------
    context : SparkContext
    options : RunOptions
    nodes : sequence of Member
    """

    def __init__(self, context: SparkContext, options: RunOptions, nodes: Sequence[Member]) -> None:
        self._context = context
        self._options = options
        self._names = [node.name for node in nodes]
        self._local = [node.index for node in nodes if options.ps_on_driver and node.role.job_name == "ps"]
        self._remote = [node.index for node in nodes if node.index not in self._local]
        self._slots = 0
        self._job: SparkJob | None = None
        self._local_nodes: LocalNodes | None = None

    def require_slots(self, emit: Callable[[Event], None], *, is_fed: bool = False) -> None:
        """Wait until there are slots enough; they may still be busy.

        Parameters
        ----------
        emit : callable(Event)
            Told what is waited for.
        is_fed : bool
            Whether Spark tasks are to feed the nodes.

        Raises
        ------
        TooFewSlotsError
        """
        needed = len(self._remote) if self._options.waits_for_all else 1
        if session.is_dynamic(self._context):
            session.require_room(self._context, needed, is_fed=is_fed)
            emit(PhaseChanged(f"waiting for executors: {needed} slots needed"))
            return
        self._slots = session.require_slots(
            self._context, needed, lambda now: emit(PhaseChanged(f"waiting for executors: {now} of {needed} slots"))
        )
        free = self._slots - session.busy_slot_count(self._context)
        waiting = f"waiting for slots: {needed} needed, {max(free, 0)} of {self._slots} free"
        emit(PhaseChanged(f"starting {len(self._remote)} nodes" if free >= needed else waiting))

    def begin(self, group: str, config: dict[str, Any], payload: bytes, on_end: Callable[[SparkJob], None]) -> None:
        """Start all nodes; returns at once.

        Parameters
        ----------
        group : str
            The Spark job's.
        config : dict
            What every node must know to meet the driver.
        payload : bytes
            The packed function.
        on_end : callable(SparkJob)
            Called when the tasks have ended.
        """
        config = {
            **config,
            "keep_env": session.kept_environment(self._context),
            "default_fs": session.default_file_system(self._context),
            "preload": self._options.preload,
            "nodes": self._names,
            "gpus_per_node": self._options.gpus_per_node,
            "hold": self._is_holding(),
            "num_nodes": self._options.num_nodes,
        }
        self._local_nodes = LocalNodes(self._local, {**config, "hold": True}, payload)
        task = functools.partial(archive.by_value("tfos_magic.node.launch:launch", archive.build()), config, payload)
        rdd = self._context.parallelize(self._remote, len(self._remote))
        # Spark refuses barrier stages under dynamic allocation (SPARK-24942); there tasks come as slots do.
        is_barrier = self._options.waits_for_all and not session.is_dynamic(self._context)
        tasks = rdd.barrier().mapPartitions(task) if is_barrier else rdd.mapPartitions(task)
        self._job = SparkJob(self._context, group, f"tfos_magic: {len(self._remote)} nodes", tasks.collect, on_end)

    def _is_holding(self) -> bool:
        """Return whether the nodes can keep their slots to themselves."""
        if self._options.is_independent:  # they are not fed, and their slots are others' turns
            return True
        if session.is_dynamic(self._context):  # it ends executors that look idle, and makes more when slots are wanted
            return True
        # Feeding takes at least one more slot, and what other runs hold will not come free before they end.
        return self._slots - session.busy_slot_count(self._context) > len(self._remote)

    def cancel(self) -> None:
        """Ask Spark to kill the tasks."""
        if self._job is not None:
            self._job.cancel()

    def wait(self, timeout_s: float) -> None:
        """Wait until the tasks and the processes beside the driver have ended."""
        if self._job is not None:
            self._job.wait(timeout_s)
        if self._local_nodes is not None:
            self._local_nodes.join(timeout_s)
