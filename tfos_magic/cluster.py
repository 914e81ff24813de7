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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tfos_magic import archive, roles, session
from tfos_magic.errors import DataError, FeedError, RunTimeoutError, TfosError, UsageError
from tfos_magic.failures import Failure, describe_launch_error, error_of, root_of
from tfos_magic.feed.prepare import prepare
from tfos_magic.jobs import SparkJob
from tfos_magic.rendezvous import Message, Peer, RendezvousServer
from tfos_magic.result import NodeInfo, RunResult
from tfos_magic.status import (
    Event,
    GpuSample,
    MachineSample,
    MetricsReported,
    NodeBeat,
    NodeChanged,
    NodeLogged,
    NodeState,
    PhaseChanged,
    RunEnded,
    RunPlanned,
    StatusBoard,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from tfos_magic.shipping import Payload

_MEET_TIMEOUT_S = 60.0
_CONSEQUENCE_GRACE_S = 1.5
_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RunOptions:
    """How to run; checked when made.

    Attributes
    ----------
    num_nodes : int
        All nodes, parameter servers and evaluator included.
    epochs, batch_size : int
        `batch_size` is per node: a step of N nodes takes N times as many rows.
    label, weight : str, optional
    features : tuple of str, optional
        Columns; see ``ctx.dataset``.
    timeout_s : float, optional
        The whole run's limit; None for none.
    preload : tuple of str
        Modules that each node imports while the nodes meet, before it unpickles the function.
    serves_itself : bool
        With parameter servers: True when the function runs on every node and serves there by itself, as
        TensorFlowOnSpark's do; False when ps and workers only serve and the chief alone runs the function.
    """

    num_nodes: int
    num_ps: int = 0
    chief: bool = True
    evaluator: bool = False
    epochs: int = 1
    batch_size: int = 64
    label: str | None = None
    features: tuple[str, ...] | None = None
    weight: str | None = None
    shuffle: bool = True
    seed: int | None = None
    timeout_s: float | None = None
    serves_itself: bool = True
    preload: tuple[str, ...] = ("tensorflow",)
    title: str = "tfos_magic"

    def __post_init__(self) -> None:
        for name in ("num_nodes", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise UsageError(f"timeout_s is {self.timeout_s:g}; it must be more than 0.")
        self.roles()

    def roles(self) -> tuple[roles.Role, ...]:
        """Return one role per node; UsageError when there are too few nodes."""
        return roles.assign(self.num_nodes, num_ps=self.num_ps, has_chief=self.chief, has_evaluator=self.evaluator)


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
    frames = {
        name: prepare(frame, options.features, options.label, options.weight) for name, frame in (data or {}).items()
    }
    cluster = Cluster(spark, payload, options, on_event=notify, cell_names=cell_names or {})
    try:
        cluster.start(feeds=tuple(frames))
        for name, frame in frames.items():
            cluster.feed(name, frame)
        cluster.wait()
        cluster.close()
    except KeyboardInterrupt:
        cluster.abandon("stopped", f"stopped: interrupted after {cluster.elapsed_s:.0f} s")
        raise
    except TfosError as error:
        cluster.abandon("failed", str(error))
        raise
    except BaseException as error:
        cluster.abandon("failed", f"{type(error).__name__}: {error}")
        raise
    notify(RunEnded("done"))
    return cluster.result(board)


def _tell(listeners: Sequence[Callable[[Event], None]], event: Event) -> None:
    for listener in listeners:
        listener(event)


@dataclass(eq=False)
class Node:
    """One node as the driver knows it."""

    index: int
    role: roles.Role
    peer: Peer | None = None
    info: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    state: NodeState = NodeState.PLANNED
    feed_port: int | None = None
    result: bytes | None = None
    has_ended: bool = False
    """Its connection is closed: agent and child are gone."""

    @property
    def name(self) -> str:
        """``worker:2``."""
        return self.role.name


@dataclass
class Feed:
    """One DataFrame on its way to the nodes."""

    name: str
    rows_per_node: list[int]
    """Rows that count so far, for each node that takes data."""
    committed: dict[int, int] = field(default_factory=dict)
    """Partition → the attempt that counts."""
    job: SparkJob | None = None
    error: TfosError | None = None


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
        self._nodes = [Node(index, role) for index, role in enumerate(options.roles())]
        self._feeds: dict[str, Feed] = {}
        self._feed_names: tuple[str, ...] = ()
        self._failures: list[Failure] = []
        self._is_closing = False
        self._changed = threading.Condition()
        self._server: RendezvousServer | None = None
        self._launch_job: SparkJob | None = None
        self._began = time.time()
        self._timings: dict[str, float] = {}

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
        self._emit(RunPlanned(self._options.title, tuple(node.name for node in self._nodes), self._options.epochs))
        slots = self._require_slots()
        bind, host = session.driver_address(self._context)
        self._server = RendezvousServer(bind, self._secret, self._on_message, self._on_close)
        self._launch((host, self._server.port), holds_slots=slots > len(self._nodes))
        self._wait_until(lambda: all(node.peer for node in self._nodes), "meet", _MEET_TIMEOUT_S)
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
            self._context, f"tfos_magic-{self._id}", f"tfos_magic: {count} nodes", tasks.collect, self._job_ended
        )

    def _send_start(self) -> None:
        addresses = [f"{node.info['address']}:{node.info['port']}" for node in self._nodes]
        spec = roles.cluster_spec([node.role for node in self._nodes], addresses)
        for node in self._nodes:  # node 0 first: it leads the others, who wait a second if it is late
            if node.peer is not None:
                node.peer.send(self._start_message(node, spec))

    def _start_message(self, node: Node, spec: Mapping[str, Sequence[str]]) -> dict[str, Any]:
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
        targets = self._feed_targets()
        feed = self._feeds[name] = Feed(name, [0] * len(targets))
        for node in targets:
            if node.peer is not None:
                node.peer.send({"type": "open_feed", "feed": name})
        self._wait_until(lambda: all(node.feed_port for node in targets), "open the feed", _MEET_TIMEOUT_S)
        plan = {
            "name": name,
            "secret": self._feed_secret.hex(),
            "nodes": [(node.info["address"], node.feed_port) for node in targets],
            "rendezvous": (session.driver_address(self._context)[1], self._server.port if self._server else 0),
            "rendezvous_secret": self._secret.hex(),
        }
        task = functools.partial(archive.by_value("tfos_magic.feed.task:feed_task", archive.build()), plan)
        action = frame.mapInArrow(task, "rows long").collect
        group, description = f"tfos_magic-{self._id}-{name}", f"tfos_magic: feed {name}"
        feed.job = SparkJob(self._context, group, description, action, lambda job: self._feed_ended(feed, job))

    def _feed_targets(self) -> list[Node]:
        return [node for node in self._nodes if node.role.is_training and not self._is_server(node.role)]

    def _feed_ended(self, feed: Feed, job: SparkJob) -> None:
        with self._changed:
            rows = feed.rows_per_node
            if job.error is not None and feed.error is None:
                feed.error = FeedError(
                    f"Spark failed while it delivered {feed.name!r}: {_first_line(job.error)}",
                    cause="Spark could not compute the DataFrame, or a node went away.",
                )
                feed.error.__cause__ = job.error
            elif feed.error is None and sum(rows) == 0:
                feed.error = DataError(f"The DataFrame for {feed.name!r} has 0 rows.", hint="Look at its filters.")
            if feed.error is not None and not self._is_closing:
                self._failures.append(Failure("feed", error=feed.error))
            elif not self._is_closing:
                self._timings[f"fed_{feed.name}"] = self.elapsed_s
            self._changed.notify_all()
        for node in self._feed_targets():
            if node.peer is not None and feed.error is None:
                node.peer.send({"type": "feed_end", "feed": feed.name, "rows_per_node": rows})

    def _commit(self, peer: Peer, header: Mapping[str, Any]) -> None:
        """Decide which attempt of a partition counts: the first that delivered all of it."""
        feed = self._feeds[header["feed"]]
        partition, attempt = header["partition"], header["attempt"]
        is_accepted = feed.committed.setdefault(partition, attempt) == attempt
        if is_accepted:
            feed.rows_per_node = [total + rows for total, rows in zip(feed.rows_per_node, header["rows"], strict=True)]
            decision = {"type": "publish", "feed": feed.name, "partition": partition, "attempt": attempt}
            for node, rows in zip(self._feed_targets(), header["rows"], strict=True):
                if node.peer is not None:
                    node.peer.send({**decision, "rows": rows})
        peer.send({"type": "committed", "accepted": is_accepted})

    # --- what nodes report (in the rendezvous' thread) ----------------------------------------------------

    def _on_message(self, peer: Peer, message: Message) -> None:
        with self._changed:
            if message.type == "commit":
                self._commit(peer, message.header)
            elif message.type == "feed_error":
                self._feed_failed(message.header)
            elif message.type == "hello":
                self._greet(peer, dict(message.header))
            elif "node" in peer.info:
                self._node_reports(peer.info["node"], message)
            self._changed.notify_all()

    def _feed_failed(self, header: Mapping[str, Any]) -> None:
        feed = self._feeds[header["feed"]]
        if feed.error is None:
            feed.error = DataError(header["fact"], cause=header["cause"], hint=header["hint"])
            self._failures.append(Failure("feed", error=feed.error))

    def _greet(self, peer: Peer, hello: dict[str, Any]) -> None:
        node = self._nodes[hello["index"]]
        if node.peer is not None:  # a task that Spark ran twice
            peer.close()
            return
        node.peer, node.info = peer, hello
        peer.info["node"] = node
        self._set_state(node, NodeState.STARTING)

    def _node_reports(self, node: Node, message: Message) -> None:
        header = message.header
        if message.type == "state":
            node.times.update(header.get("times", {}))
            self._set_state(node, NodeState[header["state"]])
        elif message.type == "beat":
            self._beat(node, header)
        elif message.type == "log":
            self._emit(NodeLogged(node.name, tuple(header["lines"]), header["dropped"]))
        elif message.type == "metrics":
            self._emit(MetricsReported(node.name, header["values"], header["step"], header["epoch"]))
        elif message.type == "feed_port":
            node.feed_port = header["port"]
        elif message.type == "result":
            node.result = message.blob
            self._set_state(node, NodeState.FINISHED)
        elif message.type == "failure":
            self._node_failed(node, Failure.from_report(node.index, header))
        elif message.type == "exited" and not header["answered"]:
            self._node_failed(node, Failure("exited", node=node.index, code=header["code"], tail=tuple(header["tail"])))

    def _beat(self, node: Node, header: Mapping[str, Any]) -> None:
        machine = dict(header["machine"])
        gpus = tuple(GpuSample(**gpu) for gpu in machine.pop("gpus", ()))
        if node.state in (NodeState.RUNNING, NodeState.WAITING):
            self._set_state(node, NodeState.WAITING if header.get("is_waiting") else NodeState.RUNNING)
        self._emit(
            NodeBeat(
                node.name,
                rows_received=header["rows_received"],
                rows_consumed=header.get("rows_consumed", 0),
                wait_s=header.get("wait_s", 0.0),
                machine=MachineSample(**machine, gpus=gpus),
            )
        )

    def _node_failed(self, node: Node, failure: Failure) -> None:
        if not self._is_closing:
            self._failures.append(failure)
            self._set_state(node, NodeState.FAILED)

    def _on_close(self, peer: Peer) -> None:
        with self._changed:
            node = peer.info.get("node")
            if node is not None:
                node.has_ended = True
                if not self._is_closing:
                    self._failures.append(Failure("lost", node=node.index))
                    self._set_state(node, NodeState.LOST)
            self._changed.notify_all()

    def _set_state(self, node: Node, state: NodeState) -> None:
        if state is not node.state and not node.state.is_final:
            node.state = state
            self._emit(NodeChanged(node.name, state, node.info.get("host", "")))

    def _job_ended(self, job: SparkJob) -> None:
        with self._changed:
            if job.error is not None and not self._is_closing:
                self._failures.append(Failure("launch", error=describe_launch_error(job.error)))
            self._changed.notify_all()

    # --- wait ---------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until every node has returned.

        Raises
        ------
        NodeError, FeedError, DataError, RunTimeoutError, …
            The root failure, once it is known.
        """
        self._emit(PhaseChanged("running"))
        waited_for = [node for node in self._nodes if not self._is_server(node.role)]
        self._wait_until(lambda: all(node.result is not None for node in waited_for), "finish", None)
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
        if deadline is not None and time.monotonic() > deadline and not session.is_dynamic(self._context):
            late = [node.name for node in self._nodes if node.peer is None or node.feed_port is None]
            raise RunTimeoutError(
                f"{len(late)} of {len(self._nodes)} nodes did not {purpose} in {_MEET_TIMEOUT_S:.0f} s: "
                f"{', '.join(late)}.",
                cause="Their Spark tasks may wait for slots that other jobs hold: see the Spark UI.",
            )

    def _root_error(self) -> TfosError:
        """Wait briefly for the cause when what came first looks like a consequence; return the error to show."""
        deadline = time.monotonic() + _CONSEQUENCE_GRACE_S
        while (root := root_of(self._failures)).is_consequence and time.monotonic() < deadline:
            self._changed.wait(deadline - time.monotonic())
        nodes = {node.index: (node.name, node.info.get("host", "an unknown host")) for node in self._nodes}
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
        for node in self._nodes:
            if node.peer is not None:
                node.peer.send({"type": "stop"})
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
                self._set_state(node, NodeState.DONE if node.result is not None else NodeState.STOPPED)
        if self._launch_job is not None:
            self._launch_job.wait(_CLOSE_TIMEOUT_S)

    def _jobs(self) -> list[SparkJob]:
        jobs = [self._launch_job, *(feed.job for feed in self._feeds.values())]
        return [job for job in jobs if job is not None]

    def result(self, board: StatusBoard) -> RunResult:
        """Return what the nodes returned; call it after :meth:`wait`."""
        infos = tuple(
            NodeInfo(
                node.name,
                node.info["host"],
                f"{node.info['address']}:{node.info['port']}",
                node.info["child_pid"],
                ".".join(map(str, node.info["python"])),
                dict(node.times),
            )
            for node in self._nodes
        )
        history = {name: list(values) for name, values in board.view().history.items()}
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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


__all__ = ["Cluster", "RunOptions", "plan", "run"]
