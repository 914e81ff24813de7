"""A cluster of TensorFlow nodes on a Spark session: start, feed, collect, stop.

Runs on: driver.

    run(spark, payload, options, data)
      │
      Cluster.start   slots enough? ─► rendezvous ─► barrier job: one task = one node ─► N hellos ─► roles ─► "start"
      Cluster.feed    prepare(DataFrame) ─► ordinary Spark tasks deal chunks ─► commit, publish ─► "feed end"
      Cluster.wait    results and failures, as they come; the first root failure ends all
      Cluster.close   "stop" to all ─► agents gone ─► jobs ended ─► port closed          (always, whatever happened)

One object owns all state of a run. What nodes report arrives in the rendezvous' thread, changes that state under one
lock, and wakes whoever waits; the notebook's main thread only ever waits, so that an interrupt is heard at once.
"""

from __future__ import annotations

import functools
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic import archive, roles, session
from tfos_magic.errors import RunInterrupted, RunTimeoutError, TfosError
from tfos_magic.failures import Failure, describe_launch_error, error_of, root_of
from tfos_magic.feed.prepare import prepare
from tfos_magic.feeding import Delivery
from tfos_magic.jobs import SparkJob
from tfos_magic.members import Member
from tfos_magic.options import RunOptions
from tfos_magic.rendezvous import Message, Peer, RendezvousServer
from tfos_magic.result import RunResult
from tfos_magic.status import (
    Event,
    NodeState,
    PhaseChanged,
    RunEnded,
    RunPlanned,
    StatusBoard,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from tfos_magic.shipping import Payload

_PATIENCE_S = 60.0
_CONSEQUENCE_GRACE_S = 1.5
_CLOSE_TIMEOUT_S = 5.0


def run(
    spark: Any,
    payload: Payload,
    options: RunOptions,
    *,
    data: Mapping[str, DataFrame] | None = None,
    on_event: Callable[[Event], None] | None = None,
    cell_names: Mapping[str, str] | None = None,
    board: StatusBoard | None = None,
) -> RunResult:
    """Run the packed function on a cluster of its own and return what came of it.

    Parameters
    ----------
    spark : SparkSession or SparkContext
        Never stopped here.
    payload : Payload
        From :func:`tfos_magic.shipping.pack`.
    options : RunOptions
    data : mapping of str to DataFrame, optional
        ``train``, ``validation``.
    on_event : callable(Event), optional
        Told everything that happens, from several threads.
    cell_names : mapping of str to str, optional
        File name of a compiled cell → what tracebacks call it.
    board : StatusBoard, optional
        Where the result's logs and history come from; one of its own by default.

    Raises
    ------
    TfosError
        One of :mod:`tfos_magic.errors`, after everything has been stopped.
    KeyboardInterrupt
        Likewise.
    """
    board = board or StatusBoard()
    notify = functools.partial(_tell, [board.apply] + ([on_event] if on_event not in (None, board.apply) else []))
    cluster = Cluster(spark, payload, options, on_event=notify, cell_names=cell_names or {})
    columns = options.features, options.label, options.weight
    try:
        frames = {name: prepare(frame, *columns) for name, frame in (data or {}).items()}
        cluster.start(feeds=tuple(frames))
        for name, frame in frames.items():
            cluster.feed(name, frame)
        cluster.wait()
        cluster.close()
    except KeyboardInterrupt:
        what = f"interrupted after {cluster.elapsed_s:.0f} s; {options.num_nodes} nodes stopped"
        cluster.abandon("stopped", what)
        raise RunInterrupted(what) from None
    except TfosError as error:
        cluster.abandon("failed", error.headline)
        raise
    except BaseException as error:
        cluster.abandon("failed", f"{type(error).__name__}: {error}")
        raise
    notify(RunEnded("done"))
    return cluster.result(board)


def _tell(listeners: Sequence[Callable[[Event], None]], event: Event) -> None:
    for listener in listeners:
        listener(event)


class Cluster:
    """The nodes of one run, from the first task to the last process gone.

    Parameters are those of :func:`run`. The timings of its result, in seconds from the start: ``connected`` (all
    agents met the driver), ``imported`` (TensorFlow, on the last node), ``running`` (first user line on the last node),
    ``fed`` (all data delivered), ``finished`` (last function returned), ``total``.
    """

    def __init__(
        self,
        spark: Any,
        payload: Payload,
        options: RunOptions,
        *,
        on_event: Callable[[Event], None],
        cell_names: Mapping[str, str],
    ) -> None:
        self._spark = session.as_session(spark)
        self._context = self._spark.sparkContext
        self._payload = payload
        self._options = options
        self._emit = on_event
        self._cell_names = cell_names
        self._id = secrets.token_hex(4)
        # One secret for each kind of connection: to the driver, from feed tasks, between nodes.
        self._secret, self._feed_secret, self._node_secret = (secrets.token_bytes(32) for _ in range(3))
        self._nodes = [Member(index, role, on_event) for index, role in enumerate(options.roles())]
        self._feeds: dict[str, Delivery] = {}
        self._feed_names: tuple[str, ...] = ()
        self._failures: list[Failure] = []
        self._is_closing = False
        self._changed = threading.Condition()
        self._server: RendezvousServer | None = None
        self._launch_job: SparkJob | None = None
        self._began = time.time()
        self._timings: dict[str, float] = {}
        self._emit(RunPlanned(options.title, tuple(node.name for node in self._nodes), options.epochs))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.time() - self._began

    # --- start --------------------------------------------------------------------------------------------

    def start(self, feeds: Sequence[str] = ()) -> None:
        """Start all nodes; return when each has heard who is who.

        Raises
        ------
        TooFewSlotsError, RendezvousError, EnvironmentMismatchError, NodeError
        """
        self._feed_names = tuple(feeds)
        slots = self._require_slots()
        bind, host = session.driver_address(self._context)
        self._server = RendezvousServer(bind, self._secret, self._on_message, self._on_close)
        self._launch((host, self._server.port), holds_slots=slots > len(self._nodes))
        self._wait_until(lambda: all(node.peer for node in self._nodes), "Waiting for free slots", None)
        self._timings["connected"] = self.elapsed_s
        self._send_start()

    def _require_slots(self) -> int:
        needed = len(self._nodes)
        if session.is_dynamic(self._context):
            self._emit(PhaseChanged(f"waiting for executors: {needed} slots needed"))
            return sys.maxsize
        slots = session.require_slots(
            self._context,
            needed,
            lambda now: self._emit(PhaseChanged(f"waiting for executors: {now} of {needed} slots")),
        )
        free = slots - session.busy_slot_count(self._context)
        waiting = f"waiting for slots: {needed} needed, {max(free, 0)} of {slots} free"
        self._emit(PhaseChanged(f"starting {needed} nodes" if free >= needed else waiting))
        return slots

    def _launch(self, address: tuple[str, int], *, holds_slots: bool) -> None:
        count = len(self._nodes)
        config = {
            "address": address,
            "secret": self._secret.hex(),
            "feed_secret": self._feed_secret.hex(),
            "node_secret": self._node_secret.hex(),
            "hold": holds_slots,
            "keep_env": session.kept_environment(self._context),
            "preload": self._options.preload,
            "default_fs": session.default_file_system(self._context),
        }
        task = functools.partial(
            archive.by_value("tfos_magic.node.launch:launch", archive.build()), config, self._payload.data
        )
        rdd = self._context.parallelize(range(count), count)
        # Spark refuses barrier stages under dynamic allocation (SPARK-24942); there tasks come as slots do.
        tasks = rdd.mapPartitions(task) if session.is_dynamic(self._context) else rdd.barrier().mapPartitions(task)
        self._launch_job = SparkJob(
            self._context, f"tfos_magic-{self._id}", f"tfos_magic: {count} nodes", tasks.collect, self._launch_ended
        )

    def _send_start(self) -> None:
        addresses = [f"{node.info['address']}:{node.info['port']}" for node in self._nodes]
        spec = roles.cluster_spec([node.role for node in self._nodes], addresses)
        for node in self._nodes:  # node 0 first: it leads the others, who wait a second if it is late
            node.send(self._start_message(node, spec))

    def _start_message(self, node: Member, spec: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        environment = {"TF_CONFIG": roles.tf_config(node.role, spec), "TF_GRPC_REUSE_PORT": "true"}
        if node.info["gpus"] is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(node.info["gpus"])
        options, targets = self._options, self._feed_targets()
        return {
            "type": "start",
            "job_name": node.role.job_name,
            "task_index": node.role.task_index,
            "cluster_spec": spec,
            "is_chief": node.index == 0,
            "is_server": self._is_server(node.role),
            "is_coordinator": node.index == 0 and any(self._is_server(other.role) for other in self._nodes),
            "environment": environment,
            "feeds": self._feed_names,
            "feed_index": targets.index(node) if node in targets else 0,
            "data_options": {
                "batch_size": options.batch_size,
                "epochs": options.epochs,
                "features": options.features,
                "label": options.label,
                "weight": options.weight,
                "shuffle": options.shuffle,
                "seed": options.seed,
            },
        }

    def _is_server(self, role: roles.Role) -> bool:
        """Return True for a node that only serves variables or computations to the chief."""
        return bool(self._options.num_ps) and not self._options.serves_itself and role.job_name in ("ps", "worker")

    # --- feed ---------------------------------------------------------------------------------------------

    def feed(self, name: str, frame: DataFrame) -> None:
        """Begin to deal the rows of `frame` over the training nodes; returns at once, the nodes wait for the data.

        Parameters
        ----------
        name : str
            One of those given to :meth:`start`.
        frame : DataFrame
            From :func:`tfos_magic.feed.prepare.prepare`: only columns that can become tensors.
        """
        delivery = self._feeds[name] = Delivery(name, self._feed_targets())
        delivery.open()
        self._wait_until(lambda: delivery.is_open, "Opening the feed on the nodes", _PATIENCE_S)
        rendezvous = session.driver_address(self._context)[1], self._server.port if self._server else 0
        plan = delivery.plan(self._feed_secret, rendezvous, self._secret)
        task = functools.partial(archive.by_value("tfos_magic.feed.task:feed_task", archive.build()), plan)
        action = frame.mapInArrow(task, "rows long").collect
        group, description = f"tfos_magic-{self._id}-{name}", f"tfos_magic: feed {name}"
        delivery.job = SparkJob(
            self._context, group, description, action, lambda job: self._delivery_ended(delivery, job)
        )

    def _feed_targets(self) -> list[Member]:
        return [node for node in self._nodes if node.role.is_training and not self._is_server(node.role)]

    def _delivery_ended(self, delivery: Delivery, job: SparkJob) -> None:
        with self._changed:
            if not self._is_closing:
                delivery.end(job)
                self._timings[f"fed_{delivery.name}"] = self.elapsed_s
                self._note_feed_error(delivery)
            self._changed.notify_all()

    def _note_feed_error(self, delivery: Delivery) -> None:
        if delivery.error is not None:
            self._note(Failure("feed", error=delivery.error))

    # --- what nodes report (in the rendezvous' thread) ----------------------------------------------------

    def _on_message(self, peer: Peer, message: Message) -> None:
        with self._changed:
            header = message.header
            if message.type == "hello":
                self._nodes[header["index"]].greet(peer, dict(header))
            elif message.type == "commit":
                self._feeds[header["feed"]].commit(peer, header)
            elif message.type == "feed_error":
                self._feeds[header["feed"]].refuse(header)
                self._note_feed_error(self._feeds[header["feed"]])
            elif "member" in peer.info:
                self._take_report(peer.info["member"], message)
            self._changed.notify_all()

    def _take_report(self, node: Member, message: Message) -> None:
        failure = node.report(message)
        if failure is not None and self._note(failure):
            node.change(NodeState.FAILED)

    def _on_close(self, peer: Peer) -> None:
        with self._changed:
            node = peer.info.get("member")
            if node is not None:
                node.has_ended = True
                if self._note(Failure("lost", node=node.index)):
                    node.change(NodeState.LOST)
            self._changed.notify_all()

    def _launch_ended(self, job: SparkJob) -> None:
        with self._changed:
            if job.error is not None:
                self._note(Failure("launch", error=describe_launch_error(job.error)))
            self._changed.notify_all()

    def _note(self, failure: Failure) -> bool:
        """Keep a failure; what fails once the end has begun is the end's own doing and does not count."""
        if not self._is_closing:
            self._failures.append(failure)
        return not self._is_closing

    # --- wait ---------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until every node has returned, but for those that only serve: parameter servers may never return.

        Raises
        ------
        NodeError, FeedError, DataError, RunTimeoutError, …
            The root failure, once it is known.
        """
        self._emit(PhaseChanged("running"))
        waited_for = [node for node in self._nodes if node.role.job_name != "ps" and not self._is_server(node.role)]
        self._wait_until(lambda: all(node.result is not None for node in waited_for), "Running", None)
        for name in ("imported", "running"):
            stamps = [node.times[name] for node in self._nodes if name in node.times]
            if stamps:
                self._timings[name] = max(stamps) - self._began
        self._timings["finished"] = self.elapsed_s

    def _wait_until(self, is_done: Callable[[], bool], purpose: str, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not is_done():
                if self._failures:
                    raise self._root_error()
                self._check_time(purpose, deadline)
                self._changed.wait(0.25)  # short, so that the run's own timeout is kept

    def _check_time(self, purpose: str, deadline: float | None) -> None:
        limit = self._options.timeout_s
        if limit is not None and self.elapsed_s > limit:
            raise RunTimeoutError(
                f"The run did not finish in its timeout of {limit:g} s.",
                cause="; ".join(f"{node.name} is {node.state.value}" for node in self._nodes),
                hint="Give it more time with --timeout, or look at the nodes' logs.",
            )
        if deadline is not None and time.monotonic() > deadline:
            raise RunTimeoutError(
                f"{purpose} took more than {_PATIENCE_S:.0f} s.",
                cause="; ".join(f"{node.name} is {node.state.value}" for node in self._nodes),
                hint="The executors' stderr (Spark UI) says what they do.",
            )

    def _root_error(self) -> TfosError:
        """Wait briefly for the cause when what came first looks like a consequence; return the error to show."""
        deadline = time.monotonic() + _CONSEQUENCE_GRACE_S
        while (root := root_of(self._failures)).is_consequence and time.monotonic() < deadline:
            self._changed.wait(deadline - time.monotonic())
        nodes = {node.index: (node.name, node.host) for node in self._nodes}
        return error_of(root, self._failures, nodes, self._cell_names)

    # --- end ----------------------------------------------------------------------------------------------

    def abandon(self, outcome: str, message: str) -> None:
        """End a run that did not succeed: stop everything, then tell how it ended."""
        try:
            self._emit(PhaseChanged(f"stopping {len(self._nodes)} nodes…"))
            self.close()
        finally:
            self._emit(RunEnded(outcome, message))

    def close(self) -> None:
        """Stop all nodes and jobs and give back the port; idempotent. An interrupt meanwhile forces it."""
        with self._changed:
            was_closing, self._is_closing = self._is_closing, True
        if was_closing:
            return
        try:
            self._stop_nodes()
        finally:
            # Whatever is still alive now loses its connection, and an agent without one ends at once.
            if self._server is not None:
                self._server.close()
            for job in self._jobs():
                job.cancel()
                job.wait(_CLOSE_TIMEOUT_S)
            self._timings["total"] = self.elapsed_s

    def _stop_nodes(self) -> None:
        is_done = "finished" in self._timings  # what still serves then has served its turn
        for node in self._nodes:
            node.send({"type": "stop"})
        for feed in self._feeds.values():
            if feed.job is not None:
                feed.job.cancel()
        if self._launch_job is not None and not all(node.peer for node in self._nodes):
            self._launch_job.cancel()  # tasks that have not started yet would start nodes for nobody
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        with self._changed:
            while not all(node.has_ended or node.peer is None for node in self._nodes):
                if time.monotonic() > deadline:
                    break
                self._changed.wait(0.1)
            for node in self._nodes:
                node.change(NodeState.DONE if node.result is not None or is_done else NodeState.STOPPED)
        if self._launch_job is not None:
            self._launch_job.wait(_CLOSE_TIMEOUT_S)

    def _jobs(self) -> list[SparkJob]:
        jobs = [self._launch_job, *(feed.job for feed in self._feeds.values())]
        return [job for job in jobs if job is not None]

    def result(self, board: StatusBoard) -> RunResult:
        """Return what the nodes returned; call it after :meth:`wait`."""
        infos = tuple(node.describe() for node in self._nodes)
        history = {name: list(values) for name, values in (board.view().history or board.reports()).items()}
        blobs = tuple(node.result or b"" for node in self._nodes)
        return RunResult(infos, history, dict(self._timings), board, blobs)


def plan(spark: Any, options: RunOptions) -> list[str]:
    """Return what :func:`run` would start and where, as lines of text; starts nothing."""
    context = session.as_session(spark).sparkContext
    slots, names = session.slot_count(context), [role.name for role in options.roles()]
    held = "each holds its slot" if slots > len(names) else "all slots are needed: nodes give theirs back once they run"
    return [
        f"{len(names)} nodes on {context.master} (application {context.applicationId}): {', '.join(names)}",
        f"{slots} task slots, {session.busy_slot_count(context)} busy now; {held}"
        if slots >= len(names)
        else f"too few slots: {len(names)} needed, {slots} there",
        f"driver address {session.driver_address(context)[1]}, Spark {context.version}",
    ]


__all__ = ["Cluster", "RunOptions", "plan", "run"]
