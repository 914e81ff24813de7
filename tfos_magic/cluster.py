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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic import grid, session, tasks
from tfos_magic.briefing import Briefing
from tfos_magic.errors import RunInterrupted, RunStoppedError, RunTimeoutError, TfosError
from tfos_magic.failures import (
    Failure,
    describe_launch_error,
    error_of,
    exit_words,
    is_worth_a_restart,
    root_of,
    summary,
)
from tfos_magic.feed.prepare import prepare
from tfos_magic.feeding import Delivery
from tfos_magic.jobs import SparkJob
from tfos_magic.launching import Launch
from tfos_magic.members import Member
from tfos_magic.node.launch import CLOSING, TAKEN
from tfos_magic.options import RunOptions, modules_to_preload
from tfos_magic.queues import Queues
from tfos_magic.rendezvous import Message, Peer, RendezvousServer
from tfos_magic.result import RunResult
from tfos_magic.status import (
    Event,
    NodeLogged,
    NodeState,
    PhaseChanged,
    RunEnded,
    RunPlanned,
    RunRestarted,
    StatusBoard,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from tfos_magic.shipping import Payload

_PATIENCE_S = 60.0
_CONSEQUENCE_GRACE_S = 1.5
_OF_ONE_POINT = ("user", "exited", "lost")  # failures that say nothing of a grid's other points
_CLOSE_TIMEOUT_S = 15.0  # for processes to end that have been told to; on a busy machine even that takes its time


def run(
    spark: Any,
    payload: Payload,
    options: RunOptions,
    *,
    data: Mapping[str, DataFrame] | None = None,
    on_event: Callable[[Event], None] | None = None,
    cell_names: Mapping[str, str] | None = None,
    board: StatusBoard | None = None,
    stop: threading.Event | None = None,
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
    stop : threading.Event, optional
        Set by another thread, at any time, it ends the run.

    Raises
    ------
    TfosError
        One of :mod:`tfos_magic.errors`, after everything has been stopped. RunStoppedError after `stop`, unless the
        run had failed before, or all nodes have returned: then the failure, or the result, stands.
    KeyboardInterrupt
        Likewise.
    """
    board = board or StatusBoard()
    notify = functools.partial(_tell, [board.apply] + ([on_event] if on_event not in (None, board.apply) else []))
    stop = stop or threading.Event()
    began, attempt, run_id = time.time(), 0, secrets.token_hex(8)
    while True:
        cluster = Cluster(
            spark,
            payload,
            options,
            on_event=notify,
            cell_names=cell_names or {},
            stop=stop,
            attempt=attempt,
            began=began,
            run_id=run_id,
        )
        try:
            cluster.run_through(data or {})
        except KeyboardInterrupt:
            what = cluster.interruption
            cluster.abandon("stopped", what)
            interruption = RunInterrupted(_lines(what, _way_on(board)))
            interruption.partial = cluster.partial_result(board)
            raise interruption from None
        except TfosError as error:
            if attempt == options.max_restarts or stop.is_set() or not is_worth_a_restart(error):
                cluster.abandon("stopped" if isinstance(error, RunStoppedError) else "failed", error.headline)
                given_up = f"Given up after {attempt + 1} attempts." if attempt else ""
                error.add_hint(given_up, _way_on(board))
                error.partial = cluster.partial_result(board)
                raise
            attempt += 1
            try:
                cluster.give_up_attempt()
            except KeyboardInterrupt:
                what = cluster.interruption
                notify(RunEnded("stopped", what))
                raise RunInterrupted(_lines(what, _way_on(board))) from None
            notify(RunRestarted(" ".join(error.headline.split()), options.max_restarts - attempt))
        except BaseException as error:
            cluster.abandon("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            notify(RunEnded("done"))
            return cluster.result(board)


def _lines(*parts: str) -> str:
    return "\n".join(filter(None, parts))


def _way_on(board: StatusBoard) -> str:
    """Return what is not lost of a run that has ended too early; empty where nothing was saved."""
    saved = board.view().checkpoint
    return f"Training is saved up to {saved.where}: the same line with --resume goes on from there." if saved else ""


def check(spark: Any, options: RunOptions, data: Mapping[str, DataFrame]) -> None:
    """Raise what :func:`run` would find wrong before it starts anything, as far as that needs no waiting.

    Raises
    ------
    UsageError, DataError
        A column.
    TooFewSlotsError
        There never will be enough: in local mode, or with the limits of dynamic allocation. Elsewhere executors may
        still be registering, and only the run itself can wait for them.
    """
    context = session.as_session(spark).sparkContext
    _prepared(options, data)
    if session.is_local(context) or session.is_dynamic(context):
        nodes = [Member(index, role, _ignore) for index, role in enumerate(options.roles())]
        Launch(context, options, nodes).require_slots(_ignore, is_fed=bool(data))


def _prepared(options: RunOptions, data: Mapping[str, DataFrame]) -> dict[str, DataFrame]:
    columns = options.features, options.label, options.weight
    return {name: prepare(frame, *columns) for name, frame in data.items()}


def _ignore(event: Event) -> None:
    """Nobody listens yet."""


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
        queues: Sequence[str] = (),
        stop: threading.Event | None = None,
        attempt: int = 0,
        began: float | None = None,
        run_id: str = "",
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
        self.queues = Queues(self, queues, options.queue_limit_bytes)
        self._queue_names = tuple(queues)
        self._failures: list[Failure] = []
        self._failed_points: dict[int, Failure] = {}
        self._is_closing = False
        self._stop = stop or threading.Event()
        self._closed = threading.Event()
        self.changed = threading.Condition()
        self._server: RendezvousServer | None = None
        self._launch = Launch(self._context, options, self._nodes)
        self._briefing = Briefing(options, self._nodes, (), queues)
        self._attempt = attempt
        self._run_id = run_id or self._id  # the same for all attempts
        self._began = time.time() if began is None else began
        self._timings: dict[str, float] = {}
        self._points = [grid.told(point) for point in options.grid or ()]
        if not attempt:
            self._emit(self._planned())

    def _planned(self) -> RunPlanned:
        return RunPlanned(
            self._options.title,
            tuple(node.name for node in self._nodes),
            self._options.epochs,
            is_independent=self._options.is_independent,
            points=tuple(self._points),
        )

    @property
    def id(self) -> str:
        """Eight hexadecimal digits, different for each run."""
        return self._id

    @property
    def nodes(self) -> Sequence[Member]:
        """All nodes, in node order."""
        return self._nodes

    @property
    def has_failed(self) -> bool:
        """Whether something has gone wrong that ends the run."""
        return bool(self._failures)

    @property
    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._is_closing

    def wait_for_failure(self) -> TfosError | None:
        """Wait until the run fails, and return why; None when it is closed before that."""
        with self.changed:
            self.changed.wait_for(lambda: self._failures or self._is_closing)
            return self._root_error() if self._failures else None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.time() - self._began

    @property
    def interruption(self) -> str:
        """What to say when somebody interrupts the run now."""
        return f"interrupted after {self.elapsed_s:.0f} s; {len(self._nodes)} nodes stopped"

    # --- start --------------------------------------------------------------------------------------------

    def run_through(self, data: Mapping[str, DataFrame]) -> None:
        """Start, feed, wait for all, and close."""
        frames = _prepared(self._options, data)
        self.start(feeds=tuple(frames))
        for name, frame in frames.items():
            self.feed(name, frame)
        self.wait()
        self.close()

    def start(self, feeds: Sequence[str] = (), timeout_s: float | None = None) -> None:
        """Start all nodes; return when each has heard who is who.

        Parameters
        ----------
        feeds : sequence of str
            Names of the cached feeds that will come.
        timeout_s : float, optional
            How long to wait for busy slots.

        Raises
        ------
        TooFewSlotsError, RendezvousError, EnvironmentMismatchError, NodeError
        """
        self._briefing = Briefing(self._options, self._nodes, feeds, self._queue_names)
        self._launch.require_slots(self._emit_unless_stopped, is_fed=bool(feeds or self._queue_names))
        bind, host = session.driver_address(self._context)
        self._server = RendezvousServer(bind, self._secret, self._on_message, self._on_close)
        config = {
            "address": (host, self._server.port),
            "secret": self._secret.hex(),
            "feed_secret": self._feed_secret.hex(),
            "node_secret": self._node_secret.hex(),
            "attempt": self._attempt,
            "run_id": self._run_id,
        }
        self._launch.begin(f"tfos_magic-{self._id}", config, self._payload.data, self._launch_ended)
        if not self._options.waits_for_all:
            return  # each node begins when it comes
        self.wait_until(lambda: all(node.peer for node in self._nodes), "Waiting for free slots", timeout_s)
        self._timings["connected"] = self.elapsed_s
        self._briefing.send_all()

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
        delivery = Delivery(name, self.fed_nodes)
        self.open_feed(delivery)
        task = tasks.task("tfos_magic.feed.task:feed_batches", self.plan_of(delivery))
        self.run_feed_job(delivery, frame.mapInArrow(task, "rows long").collect)

    def open_feed(self, delivery: Delivery) -> None:
        """Let all nodes expect a delivery; return when they do."""
        with self.changed:
            self._feeds[delivery.name] = delivery
        delivery.open()
        self.wait_until(lambda: delivery.is_open, "Opening the feed on the nodes", _PATIENCE_S)

    def plan_of(self, delivery: Delivery) -> dict[str, Any]:
        """Return what a Spark task must know to send rows."""
        rendezvous = session.driver_address(self._context)[1], self._server.port if self._server else 0
        return delivery.plan(self._feed_secret, rendezvous, self._secret)

    def run_feed_job(self, delivery: Delivery, action: Callable[[], Any]) -> None:
        """Run a delivery's Spark action beside the main thread."""
        group, description = f"tfos_magic-{self._id}-{delivery.name}", f"tfos_magic: feed {delivery.name}"
        delivery.job = SparkJob(
            self._context, group, description, action, lambda job: self._delivery_ended(delivery, job)
        )

    def stop_queues(self, reason: str) -> None:
        """End every queue at once, on all nodes."""
        with self.changed:
            for queue in self._queue_names:
                self.queues.stop(queue, reason)

    def forget_feed(self, delivery: Delivery) -> None:
        """Drop a delivery whose rows have passed. Called under the lock."""
        if delivery.has_ended:
            del self._feeds[delivery.name]

    @property
    def fed_nodes(self) -> list[Member]:
        """The nodes over which rows are dealt."""
        return self._briefing.fed_nodes

    def _delivery_ended(self, delivery: Delivery, job: SparkJob) -> None:
        with self.changed:
            if not self._is_closing:
                delivery.end(job)
                self._timings[f"fed_{delivery.name}"] = self.elapsed_s
                self._note_feed_error(delivery)
            self.changed.notify_all()

    def _note_feed_error(self, delivery: Delivery) -> None:
        if delivery.error is not None and delivery.queue is None:  # of a queue, whoever feeds it raises the error
            self._note(Failure("feed", error=delivery.error))

    # --- what nodes report (in the rendezvous' thread) ----------------------------------------------------

    def _on_message(self, peer: Peer, message: Message) -> None:
        with self.changed:
            header = message.header
            if message.type == "begin":
                self._admit(self._nodes[header["index"]], peer)
            elif message.type == "hello":
                self._welcome(peer.info["member"], peer, header)
            elif message.type == "commit":
                self._commit(peer, header)
            elif message.type == "feed_error" and header["feed"] in self._feeds:
                self._feeds[header["feed"]].refuse(header)
                self._note_feed_error(self._feeds[header["feed"]])
            elif "member" in peer.info:
                self._take_report(peer.info["member"], message)
            self.changed.notify_all()

    def _admit(self, node: Member, task: Peer) -> None:
        is_unwanted = self._is_closing or node.index in self._failed_points
        refusal = CLOSING if is_unwanted else "" if node.admit(task) else TAKEN
        task.send({"type": "answer", "refusal": refusal})

    def _welcome(self, node: Member, peer: Peer, hello: Mapping[str, Any]) -> None:
        node.greet(peer, dict(hello))
        if not self._options.waits_for_all and not self._is_closing:
            self._briefing.send_alone(node)

    def _commit(self, task: Peer, header: Mapping[str, Any]) -> None:
        if header["feed"] in self._feeds:
            self._feeds[header["feed"]].commit(task, header)
        else:  # a twin of a task, come after the feed's end
            task.send({"type": "committed", "accepted": False, "refusal": ""})

    def _take_report(self, node: Member, message: Message) -> None:
        if message.type == "drained" and message.header["feed"] in self._feeds:
            self._feeds[message.header["feed"]].drain(node)
        elif message.type == "terminate":
            self.queues.stop(message.header["queue"], f"{node.name} wants no more rows (terminate)")
        elif message.type == "result":
            self.queues.node_returned(node)
            if self._options.is_independent:
                node.stop()  # its slot is another node's turn
        elif message.type == "exited" and message.header["answered"]:
            self._lose_server(node, message.header)
        failure = node.report(message)
        if failure is not None and self._note(failure):
            node.change(NodeState.FAILED)
        if message.type == "result" and all(other.result is not None for other in self.fed_nodes):
            self._tell_spectators()

    def _tell_spectators(self) -> None:
        """Tell an evaluator that nothing new will come: it cannot know which checkpoint is the last one."""
        for node in self._nodes:
            if not node.role.is_training:
                node.send({"type": "training_over"})

    def _lose_server(self, node: Member, header: Mapping[str, Any]) -> None:
        """Note the death of a node that has returned and serves: a coordinator goes on while it has a worker."""
        if node.state is not NodeState.RUNNING or self._is_closing:
            return  # it does not serve, and its value is here; or it was told to end
        others = [other for other in self._nodes if other is not node and other.role.job_name == "worker"]
        if node.role.job_name == "worker" and not all(other.state.is_final for other in others):
            self._emit(NodeLogged(node.name, (f"{node.name} {exit_words(header['code'])}; the others go on.",)))
            node.change(NodeState.LOST)
        elif self._note(Failure("exited", node=node.index, code=header["code"], tail=tuple(header["tail"]))):
            node.change(NodeState.FAILED)

    def _on_close(self, peer: Peer) -> None:
        with self.changed:
            node = peer.info.get("member")
            if node is not None:
                node.leave()
                if node.has_ended:  # of one that never began Spark says why, or starts it again
                    self._note_end(node)
            self.changed.notify_all()

    def _note_end(self, node: Member) -> None:
        if node.result is not None and self._options.is_independent:
            node.change(NodeState.DONE)
        elif self._note(Failure("lost", node=node.index)):
            node.change(NodeState.LOST)

    def _launch_ended(self, job: SparkJob) -> None:
        with self.changed:
            if job.error is not None:
                self._note(Failure("launch", error=describe_launch_error(job.error)))
            self.changed.notify_all()

    def _note(self, failure: Failure) -> bool:
        """Keep a failure; what fails once the end has begun is the end's own doing and does not count."""
        is_ending = self._is_closing or self._stop.is_set()
        if is_ending:
            return False
        if self._options.grid is not None and failure.node is not None and failure.kind in _OF_ONE_POINT:
            self._failed_points.setdefault(failure.node, failure)
            self._nodes[failure.node].stop()  # the others know nothing of it: they go on, and get its slot
        else:
            self._failures.append(failure)
        return True

    # --- wait ---------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None, evaluator_grace_s: float | None = None) -> None:
        """Wait until every node has returned, but for those that only serve: parameter servers may never return.

        Parameters
        ----------
        timeout_s : float, optional
        evaluator_grace_s : float, optional
            How long an evaluator may go on when all others have returned; as long as it likes by default.

        Raises
        ------
        NodeError, FeedError, DataError, RunTimeoutError, …
            The root failure, once it is known.
        """
        self._emit(PhaseChanged("running"))
        evaluators = [node for node in self._nodes if node.role.job_name == "evaluator"]
        others = [
            node for node in self._nodes if node.role.job_name != "ps" and not self._briefing.is_server(node.role)
        ]
        if evaluator_grace_s is not None:
            others = [node for node in others if node not in evaluators]
        self.wait_until(
            lambda: all(node.result is not None or node.index in self._failed_points for node in others),
            "Running",
            timeout_s,
        )
        if evaluator_grace_s is not None and evaluators:
            until = time.monotonic() + evaluator_grace_s
            self.wait_until(
                lambda: all(node.result is not None for node in evaluators) or time.monotonic() > until,
                "Evaluating",
                None,
            )
        for name in ("imported", "running"):
            stamps = [node.times[name] for node in self._nodes if name in node.times]
            if stamps:
                self._timings[name] = max(stamps) - self._began
        self._timings["finished"] = self.elapsed_s
        if self._failed_points:
            raise self._error_of_points()

    def wait_until(self, is_done: Callable[[], bool], purpose: str, timeout_s: float | None) -> None:
        """Wait for what nodes report; `is_done` is asked under the lock, a few times a second at least.

        Raises
        ------
        NodeError, …
            The root failure, if the run fails meanwhile.
        RunTimeoutError
            `timeout_s`, or the run's own timeout, has passed.
        RunStoppedError
            The run's stop was set.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.changed:
            while True:
                if is_done():
                    return
                if self._failures:
                    raise self._root_error()
                self._check_stop()
                if deadline is not None and time.monotonic() > deadline:
                    raise RunTimeoutError(
                        f"{purpose} took more than {timeout_s:g} s.",
                        cause="; ".join(f"{node.name} is {node.state.value}" for node in self._nodes),
                        hint="The executors' stderr (Spark UI) says what they do.",
                    )
                self._check_time()
                self.changed.wait(0.25)  # short, so that the run's own timeout is kept, and a stop heard

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise RunStoppedError(f"The run was stopped after {self.elapsed_s:.0f} s.")

    def _emit_unless_stopped(self, event: Event) -> None:
        self._check_stop()
        self._emit(event)

    def _check_time(self) -> None:
        limit = self._options.timeout_s
        if limit is not None and self.elapsed_s > limit:
            raise RunTimeoutError(
                f"The run did not finish in its timeout of {limit:g} s.",
                cause="; ".join(f"{node.name} is {node.state.value}" for node in self._nodes),
                hint="Give it more time with --timeout, or look at the nodes' logs.",
            )

    def raise_cause_of(self, error: TfosError) -> None:
        """Raise what has made a feed fail: a node's end if there is one, which may be heard of later than the feed's.

        Called under the lock.
        """
        deadline = time.monotonic() + _CONSEQUENCE_GRACE_S
        while not self._failures and time.monotonic() < deadline:
            self.changed.wait(deadline - time.monotonic())
        raise self._root_error() if self._failures else error

    def _root_error(self) -> TfosError:
        """Wait briefly for the cause when what came first looks like a consequence; return the error to show."""
        deadline = time.monotonic() + _CONSEQUENCE_GRACE_S
        while (root := root_of(self._failures)).is_consequence and time.monotonic() < deadline:
            self.changed.wait(deadline - time.monotonic())
        return self._error_of(root, self._failures)

    def _error_of_points(self) -> TfosError:
        """Return the error of a grid all of whose points have ended, some of them badly.

        None of them explains another, so the grid's order decides which is told first: that of time is chance.
        """
        failures = [failure for _, failure in sorted(self._failed_points.items())]
        error = self._error_of(root_of(failures), failures)
        if len(failures) < len(self._nodes):
            error.add_hint(f"{len(failures)} of {len(self._nodes)} points failed; the others are done.")
        return error

    def _error_of(self, root: Failure, failures: Sequence[Failure]) -> TfosError:
        nodes = {node.index: (node.name, node.host) for node in self._nodes}
        return error_of(root, failures, nodes, self._cell_names, self._points)

    # --- end ----------------------------------------------------------------------------------------------

    def abandon(self, outcome: str, message: str) -> None:
        """End a run that did not succeed: stop everything, then tell how it ended."""
        try:
            self._emit(PhaseChanged(f"stopping {len(self._nodes)} nodes…"))
            self.close()
        finally:
            self._emit(RunEnded(outcome, message))

    def give_up_attempt(self) -> None:
        """Stop everything of an attempt that another one follows."""
        self._emit(PhaseChanged(f"stopping {len(self._nodes)} nodes, to start them again…"))
        self.close()

    def close(self) -> None:
        """Stop all nodes and jobs and give back the port; idempotent. An interrupt meanwhile forces it."""
        with self.changed:
            was_closing, self._is_closing = self._is_closing, True
            self.changed.notify_all()
        if was_closing:
            self._closed.wait()
            return
        try:
            self._stop_nodes()
        finally:
            self._launch.cancel()
            self._launch.wait(_CLOSE_TIMEOUT_S)
            # Whatever is still alive now loses its connection, and an agent without one ends at once.
            if self._server is not None:
                self._server.close()
            for job in [feed.job for feed in self._feeds.values() if feed.job is not None]:
                job.cancel()
                job.wait(_CLOSE_TIMEOUT_S)
            self._timings["total"] = self.elapsed_s
            self._closed.set()

    def _stop_nodes(self) -> None:
        is_done = "finished" in self._timings  # what still serves then has served its turn
        for node in self._nodes:
            node.stop()
        for feed in self._feeds.values():
            if feed.job is not None:
                feed.job.cancel()
        if not all(node.place or node.has_ended for node in self._nodes):
            self._launch.cancel()  # some wait for slots; those that get one now are refused
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        with self.changed:
            while any(node.place for node in self._nodes):
                if time.monotonic() > deadline:
                    break
                self.changed.wait(0.1)
            for node in self._nodes:
                node.change(NodeState.DONE if node.result is not None or is_done else NodeState.STOPPED)
        self._launch.wait(_CLOSE_TIMEOUT_S)

    def result(self, board: StatusBoard) -> RunResult:
        """Return what the nodes returned; call it after :meth:`wait`."""
        infos = tuple(node.describe() for node in self._nodes)
        history = {name: list(values) for name, values in (board.view().history or board.reports()).items()}
        blobs = tuple(node.result or b"" for node in self._nodes)
        missing = {node.name: self._why_missing(node) for node in self._nodes if node.result is None}
        return RunResult(
            infos,
            history,
            dict(self._timings),
            board,
            blobs,
            grid=self._options.grid,
            missing=missing if self._options.grid is not None else {},
        )

    def partial_result(self, board: StatusBoard) -> RunResult | None:
        """Return what the points of a grid gave that were done when the run ended; None if there are none."""
        is_worth_it = self._options.grid is not None and any(node.result is not None for node in self._nodes)
        return self.result(board) if is_worth_it else None

    def _why_missing(self, node: Member) -> str:
        if node.index in self._failed_points:
            return f"failed: {summary(self._failed_points[node.index])}"
        return "stopped" if node.peer is not None else "not begun"


def plan(spark: Any, options: RunOptions) -> list[str]:
    """Return what :func:`run` would start and where, as lines of text; starts nothing."""
    context = session.as_session(spark).sparkContext
    slots, names = session.slot_count(context), [role.name for role in options.roles()]
    free = slots - session.busy_slot_count(context)
    is_held = options.is_independent or free > len(names)
    held = "each holds its slot" if is_held else "all slots are needed: nodes give theirs back once they run"
    return [
        f"{len(names)} nodes on {context.master} (application {context.applicationId}): {', '.join(names)}",
        f"{slots} task slots, {slots - free} busy now; {held}"
        if slots >= len(names)
        else f"{slots} task slots for {len(names)} nodes: they start as slots come"
        if not options.waits_for_all
        else f"too few slots: {len(names)} needed, {slots} there",
        *_plan_of_gpus(context, options),
        f"driver address {session.driver_address(context)[1]}, Spark {context.version}",
    ]


def _plan_of_gpus(context: Any, options: RunOptions) -> list[str]:
    """Return what can be said of GPUs before executors are asked: nothing where nobody named any."""
    amount, wanted = context.getConf().get("spark.task.resource.gpu.amount"), options.gpus_per_node
    if amount is None:
        each = "each node hides its host's GPUs" if wanted == 0 else f"{wanted} free ones of its host for each node"
        return [] if wanted is None else [f"GPUs: {each} (--gpus-per-node)"]
    assigned = max(1, int(float(amount)))  # less than 1: several tasks share one
    line = f"GPUs: Spark assigns {assigned} to each node (spark.task.resource.gpu.amount={amount})"
    if wanted is None:
        return [line]
    return [f"{line}, too few for --gpus-per-node {wanted}" if wanted > assigned else f"{line}; it uses {wanted}"]


__all__ = ["Cluster", "RunOptions", "check", "modules_to_preload", "plan", "run"]
