"""Queues: rows that pass once, in as many feeds as one likes, until the nodes are told that it was all.

Runs on: driver.

    feed(queue, data)   one delivery per epoch: ordinary Spark tasks deal the rows, commit them, and the nodes take them
                        returns when every node's function has taken its last row, or one of them wants no more
    ask(queue, data)    a lazy RDD: each Spark task asks one node, and yields one result per row, in order
    finish()            no further feed: readers on the nodes come to their end

State is changed under the cluster's lock; what only names a method here is called by the cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic import archive, tasks
from tfos_magic.errors import StalledError, TfosError, UsageError
from tfos_magic.feed.staging import QUEUE_LIMIT_BYTES
from tfos_magic.feeding import Delivery
from tfos_magic.members import Member
from tfos_magic.status import NodeState

if TYPE_CHECKING:
    from tfos_magic.cluster import Cluster

_ANSWER_PATIENCE_S = 2.0  # for nodes to say what they are doing
_FEED = "tfos_magic.feed.task:"


class Queues:
    """The queues of one cluster.

    Parameters
    ----------
    cluster : Cluster
        Its nodes and its lock.
    names : sequence of str
    limit_bytes : int
        How much may wait on each node for its turn.
    """

    def __init__(self, cluster: Cluster, names: Sequence[str], limit_bytes: int = QUEUE_LIMIT_BYTES) -> None:
        self._cluster = cluster
        self._names = tuple(names)
        self._limit_bytes = limit_bytes
        self._count = 0
        self._current: list[Delivery] = []
        self._stopped: dict[str, str] = {}
        self._is_finished = False

    def why_stopped(self, queue: str) -> str:
        """Return who wants no more of this queue; empty while it is open."""
        return self._stopped.get(queue, "")

    # --- feeding ------------------------------------------------------------------------------------------

    def feed(self, queue: str, data: Any, *, epochs: int = 1, patience_s: float = 600.0) -> int:
        """Deal all rows over the nodes, and return when they have been taken.

        Parameters
        ----------
        queue : str
        data : DataFrame or RDD
            Rows of a DataFrame travel as Arrow and arrive as tuples; those of an RDD arrive as they are.
        epochs : int
            How often. Spark computes the data each time anew, unless they are cached.
        patience_s : float
            How long a node may hold rows without taking one.

        Returns
        -------
        int
            Rows that were dealt. Fewer than there are when a node wanted no more: see :meth:`why_stopped`.

        Raises
        ------
        FeedError
            Spark could not compute the data. The cluster goes on; what had been dealt stays dealt.
        StalledError
            No node took a row for `patience_s`, while there were some.
        NodeError, …
            A node has failed: the cluster is over.
        """
        self._require_open(queue)
        require_data(data)
        deliveries: list[Delivery] = []
        try:
            for _ in range(epochs):
                if queue in self._stopped:
                    break
                deliveries.append(self._deliver(queue, data))
                # The next epoch may start while the nodes still work on this one's last rows.
                self._wait(deliveries, lambda: deliveries[-1].has_ended, patience_s)
            self._wait(deliveries, lambda: all(map(_is_over, deliveries)), patience_s)
        except BaseException:
            with self._cluster.changed:
                for delivery in deliveries:
                    delivery.stop()
            raise
        finally:
            self._forget(deliveries)
        return sum(delivery.row_count for delivery in deliveries)

    def _deliver(self, queue: str, data: Any) -> Delivery:
        self._count += 1
        delivery = Delivery(f"{queue}/{self._count}", self._cluster.fed_nodes, queue, self._limit_bytes)
        with self._cluster.changed:
            self._current.append(delivery)
        self._cluster.open_feed(delivery)
        task = tasks.task(_FEED + _entry(data, "feed"), self._cluster.plan_of(delivery))
        if _travels_as_arrow(data):
            action = data.mapInArrow(task, "rows long").collect
        else:
            action = _rdd(data).mapPartitions(task).collect
        with self._cluster.changed:
            if queue not in self._stopped:
                self._cluster.run_feed_job(delivery, action)
            else:
                delivery.is_stopped = delivery.has_ended = True
        return delivery

    def _wait(self, deliveries: list[Delivery], is_done: Callable[[], bool], patience_s: float) -> None:
        watch = _Watch(self._cluster.fed_nodes, patience_s)

        def is_over() -> bool:
            error = next((each.error for each in deliveries if each.error is not None), None)
            if error is not None:
                self._cluster.raise_cause_of(error)
            for delivery in deliveries:
                if delivery.is_stopped and not delivery.has_ended:
                    delivery.stop()  # once more: Spark forgets a cancellation that comes before the job
            watch.look()
            return is_done()

        self._cluster.wait_until(is_over, "Feeding the nodes", None)

    def _forget(self, deliveries: list[Delivery]) -> None:
        with self._cluster.changed:
            for delivery in deliveries:
                self._current.remove(delivery)
                self._cluster.forget_feed(delivery)

    # --- asking -------------------------------------------------------------------------------------------

    def ask(self, queue: str, data: Any, *, patience_s: float = 600.0) -> Any:
        """Return a lazy RDD of the nodes' results: one for each row, in order.

        Parameters
        ----------
        queue : str
        data : DataFrame or RDD
        patience_s : float
            How long a Spark task may wait for anything to move.

        Returns
        -------
        RDD
            Each action on it asks the nodes anew; it must run before the cluster is closed.
        """
        require_data(data)
        plan = {**self.plan_questions(queue), "patience_s": patience_s}
        task = tasks.task(_FEED + _entry(data, "ask"), plan)
        if not _travels_as_arrow(data):
            return _rdd(data).mapPartitions(task)
        packed = data.mapInArrow(task, "results binary").rdd
        return packed.mapPartitions(archive.by_value(_FEED + "unpack_results", archive.build()))

    def plan_questions(self, queue: str) -> dict[str, Any]:
        """Let the nodes take questions from Spark tasks; return what such a task must know."""
        self._require_open(queue)
        self._count += 1
        delivery = Delivery(f"{queue}/{self._count}", self._cluster.fed_nodes, queue, self._limit_bytes)
        self._cluster.open_feed(delivery)
        return self._cluster.plan_of(delivery)

    # --- ends ---------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Tell the nodes that no further feed will come."""
        self._is_finished = True
        for queue in self._names:
            for node in self._cluster.fed_nodes:
                node.send({"type": "queue_finish", "queue": queue})

    def stop(self, queue: str, reason: str) -> None:
        """End a queue at once, on all nodes; Spark's jobs that feed it are cancelled. Called under the lock."""
        if queue in self._stopped or queue not in self._names:
            return
        self._stopped[queue] = reason
        for node in self._cluster.fed_nodes:
            node.send({"type": "queue_stop", "queue": queue, "reason": reason})
        for delivery in self._current:
            if delivery.queue == queue:
                delivery.stop()

    def node_returned(self, node: Member) -> None:
        """Stop what is fed to a node whose function is over: nobody would take its rows. Called under the lock."""
        for delivery in [each for each in self._current if not each.is_consumed]:
            self.stop(str(delivery.queue), f"the function of {node.name} has returned")

    def _require_open(self, queue: str) -> None:
        if queue not in self._names:
            raise UsageError(
                f"This cluster has no queue '{queue}'; it has {', '.join(self._names) or 'none'}.",
                hint="Name it in TFCluster.run(…, queues=[…]), with input_mode=InputMode.SPARK.",
            )
        if self._is_finished:
            raise UsageError("The cluster is being shut down: its nodes have been told that no more rows will come.")


class _Watch:
    """Tells whether the nodes still take rows: their time runs only while they hold some."""

    def __init__(self, nodes: Sequence[Member], patience_s: float) -> None:
        self._nodes = nodes
        self._patience_s = patience_s
        self._seen: tuple[int, ...] = ()
        self._moved_at = time.monotonic()
        self._asked_at: float | None = None

    def look(self) -> None:
        """Raise StalledError when nothing has moved for too long; first ask the nodes what they are doing."""
        now = time.monotonic()
        held = [node for node in self._nodes if _holds_rows(node)]
        seen = tuple(node.rows_received + node.rows_consumed for node in self._nodes)
        if seen != self._seen or not held:
            self._seen, self._moved_at, self._asked_at = seen, now, None
        elif self._asked_at is None:
            if now - self._moved_at > self._patience_s:
                self._asked_at = now
                for node in held:
                    node.whereabouts = ""
                    node.send({"type": "where"})
        elif all(node.whereabouts for node in held) or now - self._asked_at > _ANSWER_PATIENCE_S:
            raise self._error(held)

    def _error(self, held: Sequence[Member]) -> TfosError:
        waiting = sum(node.rows_received - node.rows_consumed for node in held)
        doing = "; ".join(f"{node.name} is at {node.whereabouts or 'an unknown place'}" for node in held[:4])
        return StalledError(
            f"No row was taken for {self._patience_s:g} s, while {waiting:,} wait on {len(held)} node(s).",
            cause=doing + ("; …" if len(held) > 4 else ""),
            hint="If one batch may take that long, give a longer feed_timeout; "
            "a function that wants no more rows says so with DataFeed.terminate().",
        )


def _holds_rows(node: Member) -> bool:
    """Return whether a node's function runs and has rows that it does not take."""
    return node.state is NodeState.RUNNING and node.rows_received > node.rows_consumed and not node.is_waiting


def _is_over(delivery: Delivery) -> bool:
    return delivery.is_consumed or (delivery.is_stopped and delivery.has_ended)


def _is_frame(data: Any) -> bool:
    return hasattr(data, "mapInArrow")


def _travels_as_arrow(data: Any) -> bool:
    """Return whether the rows are a DataFrame's, and of types that Arrow knows; ML vectors are Python's own."""
    return _is_frame(data) and not any(hasattr(field.dataType, "sqlType") for field in data.schema.fields)


def _rdd(data: Any) -> Any:
    return data.rdd if _is_frame(data) else data


def _entry(data: Any, verb: str) -> str:
    return f"{verb}_batches" if _travels_as_arrow(data) else f"{verb}_rows"


def require_data(data: Any) -> None:
    """Refuse what is neither a DataFrame nor an RDD."""
    if not _is_frame(data) and not hasattr(data, "mapPartitions"):
        raise UsageError(
            f"A DataFrame or an RDD is needed, not {type(data).__name__}.",
            hint="spark.createDataFrame(pandas_frame) or sc.parallelize(rows) makes one.",
        )
