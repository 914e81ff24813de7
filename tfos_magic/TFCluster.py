"""TensorFlowOnSpark's ``TFCluster``: its names and their meaning, over :mod:`tfos_magic.cluster`.

Runs on: driver.

    from tfos_magic import TFCluster

    cluster = TFCluster.run(sc, map_fun, args, num_executors=4, input_mode=TFCluster.InputMode.SPARK)
    cluster.train(rdd_or_dataframe, num_epochs=3)       as often as one likes
    predictions = cluster.inference(rdd)                lazy, in the order of the input
    cluster.shutdown()

What is different: an error is an exception of :mod:`tfos_magic.errors`, raised where the caller waits, and neither ends
the program nor stops the SparkContext; nothing of one cluster is left for the next; a DataFrame may stand where an RDD
may; and a cluster is a context manager, which shuts down at the end of its block, and stops everything on an error.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from tfos_magic import session, shipping
from tfos_magic.cluster import Cluster
from tfos_magic.errors import TfosError, UsageError
from tfos_magic.feed.staging import QUEUE_LIMIT_BYTES
from tfos_magic.members import Member
from tfos_magic.options import RunOptions, modules_to_preload
from tfos_magic.result import NodeInfo, RunResult
from tfos_magic.status import RunEnded, StatusBoard

_EPOCHS_IF_UNSAID = 10  # TensorFlowOnSpark's own
_QUEUES = ("input", "output", "error")
_TENSORBOARD_S = 60.0
_log = logging.getLogger(__name__)


class InputMode:
    """How the nodes get their data."""

    TENSORFLOW = 0
    """The function reads files by itself."""
    SPARK = 1
    """Spark feeds rows: :meth:`TFCluster.train`, :meth:`TFCluster.inference`."""


def run(
    sc: Any,
    map_fun: Any,
    tf_args: Any,
    num_executors: int,
    num_ps: int = 0,
    tensorboard: bool = False,
    input_mode: int = InputMode.TENSORFLOW,
    log_dir: str | None = None,
    driver_ps_nodes: bool = False,
    master_node: str | None = None,
    reservation_timeout: float = 600,
    queues: Sequence[str] = _QUEUES,
    eval_node: bool = False,
    release_port: bool = True,
    *,
    queue_limit_bytes: int = QUEUE_LIMIT_BYTES,
) -> TFCluster:
    """Start a TensorFlow cluster on Spark's executors and run a function on each of its nodes.

    Parameters
    ----------
    sc : SparkContext or SparkSession
    map_fun : callable(args, ctx)
        What each node runs; it travels by value if it is the notebook's or the script's own.
    tf_args : object
        Its first argument: an ``argparse.Namespace``, or a list of words, which becomes ``sys.argv`` as well.
    num_executors : int
        All nodes, parameter servers and evaluator included.
    num_ps : int
        How many of them are parameter servers (job ``ps``).
    tensorboard : bool
        Run TensorBoard beside the chief; see :meth:`TFCluster.tensorboard_url`.
    input_mode : int
        Of :class:`InputMode`.
    log_dir : str, optional
        What TensorBoard shows; the chief's working directory by default.
    driver_ps_nodes : bool
        Run the parameter servers as processes of the driver's machine. They then take no slot.
    master_node : str, optional
        The job name of the node that leads, ``chief`` or ``master``; without one ``worker:0`` leads.
    reservation_timeout : float
        Seconds to wait for free slots.
    queues : sequence of str
        The queues that rows can be fed into; ``output`` and ``error`` are the way back.
    eval_node : bool
        Make one of the nodes an evaluator.
    release_port : bool
        False: the function must call ``ctx.release_port()`` before it starts a TensorFlow server.
    queue_limit_bytes : int
        How many bytes of rows may wait on each node before Spark has to wait for the nodes.

    Returns
    -------
    TFCluster
        As soon as all nodes have met; their functions then run.

    Raises
    ------
    UsageError, ShippingError
        Before Spark is asked for anything.
    TooFewSlotsError, RendezvousError, RunTimeoutError, NodeError
        The nodes did not all start; those that had are gone.
    """
    if driver_ps_nodes and input_mode != InputMode.TENSORFLOW:
        raise UsageError("driver_ps_nodes needs input_mode=InputMode.TENSORFLOW, as in TensorFlowOnSpark.")
    payload = shipping.pack(map_fun, args=tf_args)
    options = RunOptions(
        num_nodes=num_executors,
        num_ps=num_ps,
        chief=bool(master_node),
        chief_name=master_node or "chief",
        evaluator=eval_node,
        release_port=release_port,
        queue_limit_bytes=queue_limit_bytes,
        ps_on_driver=driver_ps_nodes,
        preload=modules_to_preload(payload),
        tensorboard=(log_dir or "") if tensorboard else None,
        title=f"{getattr(map_fun, '__name__', 'map_fun')} on {num_executors} nodes",
    )
    return TFCluster(session.as_session(sc), payload, options, input_mode, queues, reservation_timeout)


class TFCluster:
    """A running cluster; made by :func:`run`.

    Attributes
    ----------
    sc : SparkContext
    defaultFS, working_dir : str
        Hadoop's default file system, and the driver's working directory.
    num_executors : int
    cluster_id : str
    cluster_info : list of dict
        One for each node: ``executor_id``, ``host``, ``job_name``, ``task_index``, ``port``, ``tb_pid``, ``tb_port``,
        ``addr``. There is no ``authkey``: no secret leaves the cluster.
    cluster_meta, meta : dict
        ``id``, ``num_executors``, ``default_fs``, ``working_dir``, ``cluster_template``, …
    input_mode : int
    queues : list of str
    nodeRDD : RDD
        The nodes' indices, one in each partition.
    server : Server
        ``server.done`` is true once a node wants no more rows.
    board : StatusBoard
        What is known of every node now.
    result : RunResult or None
        What the functions returned, after :meth:`shutdown`.
    """

    def __init__(
        self,
        spark: Any,
        payload: shipping.Payload,
        options: RunOptions,
        input_mode: int,
        queues: Sequence[str],
        reservation_timeout_s: float,
    ) -> None:
        self.input_mode = input_mode
        self.queues = list(queues)
        self.num_executors = options.num_nodes
        self._has_tensorboard = options.tensorboard is not None
        self.board = StatusBoard()
        self.result: RunResult | None = None
        self._error: TfosError | None = None
        fed = [name for name in queues if name not in ("output", "error")] if input_mode == InputMode.SPARK else []
        self._cluster = Cluster(spark, payload, options, on_event=self.board.apply, cell_names={}, queues=fed)
        with self._ending_on_error(always=True):
            self._cluster.start(timeout_s=reservation_timeout_s)
        self.sc = spark.sparkContext
        self.nodeRDD = self.sc.parallelize(range(self.num_executors), self.num_executors)
        self.defaultFS = session.default_file_system(self.sc)
        self.working_dir = os.getcwd()
        self.cluster_id = self._cluster.id
        self.cluster_info = [_info(node) for node in self._cluster.nodes]
        self.meta = self.cluster_meta = self._describe()
        self.server = Server(self)
        # A failure while nobody waits must not leave the other nodes running until somebody does.
        self._watch = threading.Thread(target=self._end_on_failure, name="tfos_magic watch", daemon=True)
        self._watch.start()

    def __enter__(self) -> TFCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.shutdown()
        else:
            self._abandon("failed", f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        return f"<TFCluster {self.cluster_id}: {', '.join(node.name for node in self._cluster.nodes)}>"

    # --- feeding ------------------------------------------------------------------------------------------

    def train(self, dataRDD: Any, num_epochs: int = 0, feed_timeout: float = 600, qname: str = "input") -> None:
        """Feed rows to the nodes, and return when they have taken them all; for InputMode.SPARK.

        Parameters
        ----------
        dataRDD : RDD, DataFrame or DStream
            A DStream feeds each of its RDDs from when the StreamingContext starts; the call itself returns at once. In
            a Structured Streaming query, call ``train`` from ``foreachBatch``.
        num_epochs : int
            How often the rows are fed; 0 means 10, as in TensorFlowOnSpark.
        feed_timeout : float
            Seconds that a node may hold rows without taking one.
        qname : str

        Raises
        ------
        FeedError
            Spark could not compute the rows; the cluster goes on.
        StalledError
            Nobody took a row for `feed_timeout`; the cluster goes on.
        NodeError, …
            A node has failed; the cluster is over.
        """
        self._require_spark_mode("train")
        if num_epochs < 0:
            raise UsageError(f"num_epochs is {num_epochs}; it must be 0 or more.")
        if hasattr(dataRDD, "foreachRDD"):
            dataRDD.foreachRDD(lambda rdd: self.train(rdd, 1, feed_timeout, qname))
            return
        feed = functools.partial(self._cluster.queues.feed, qname, dataRDD, patience_s=feed_timeout)
        with self._ending_on_error():
            feed(epochs=num_epochs or _EPOCHS_IF_UNSAID)
        stopped = self._cluster.queues.why_stopped(qname)
        if stopped:
            _log.info("feeding %r ended early: %s", qname, stopped)

    def inference(self, dataRDD: Any, feed_timeout: float = 600, qname: str = "input") -> Any:
        """Return an RDD of the nodes' results, one for each row, in order; for InputMode.SPARK.

        Parameters
        ----------
        dataRDD : RDD or DataFrame
        feed_timeout : float
            Seconds for which nothing at all may move between a Spark task and its node.
        qname : str

        Returns
        -------
        RDD
            Lazy: an action on it asks the nodes, and must run before :meth:`shutdown`.
        """
        self._require_spark_mode("inference")
        with self._ending_on_error():
            return self._cluster.queues.ask(qname, dataRDD, patience_s=feed_timeout)

    # --- the end ------------------------------------------------------------------------------------------

    def shutdown(self, ssc: Any = None, grace_secs: float = 0, timeout: float = 259200) -> None:
        """Tell the nodes that no more rows will come, wait until their functions have returned, and stop the cluster.

        Parameters
        ----------
        ssc : StreamingContext, optional
            Wait for its end first; it is stopped, gracefully, once a node wants no more rows.
        grace_secs : float
            How long an evaluator may go on after all others. (The others are waited for in any case.)
        timeout : float
            Seconds to wait for the functions; -1 for as long as it takes.

        Raises
        ------
        NodeError, RunTimeoutError, …
            After everything has been stopped.
        """
        self._raise_earlier_error()
        if self.result is not None:
            return
        with self._ending_on_error(always=True):
            if ssc is not None:
                self._await_streaming(ssc)
            self._cluster.queues.finish()
            self._cluster.wait(timeout if timeout > 0 else None, evaluator_grace_s=grace_secs)
            self._cluster.close()
        self.board.apply(RunEnded("done"))
        self.result = self._cluster.result(self.board)
        self._watch.join()

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """Where the nodes run; none when it is shut down."""
        running = () if self._cluster.is_closing else self._cluster.nodes
        return tuple(node.describe() for node in running if node.peer is not None)

    def tensorboard_url(self) -> str | None:
        """Return where TensorBoard is, waiting until it has come up; None if there is none."""
        leader = self._cluster.nodes[0]
        if not self._has_tensorboard:
            return None
        with contextlib.suppress(TfosError):
            self._cluster.wait_until(
                lambda: bool(leader.tensorboard_url or leader.tensorboard_problem), "TensorBoard", _TENSORBOARD_S
            )
        if leader.tensorboard_problem:
            _log.warning("no TensorBoard on %s: %s", leader.name, leader.tensorboard_problem)
        return leader.tensorboard_url

    def _await_streaming(self, ssc: Any) -> None:
        while not ssc.awaitTerminationOrTimeout(1):
            self._raise_earlier_error()
            if self.server.done:
                ssc.stop(stopSparkContext=False, stopGraceFully=True)
                return

    # --- errors -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _ending_on_error(self, *, always: bool = False) -> Iterator[None]:
        """End the cluster when a node has failed, and `always` at its start and end, where any error leaves it halfway.

        An interrupted ``train`` or ``inference`` only ends that call.
        """
        try:
            yield
        except TfosError as error:
            if always or self._cluster.has_failed:
                self._fail(error)
            raise self._error or error from None
        except BaseException as error:
            if always:
                self._abandon("stopped", f"{type(error).__name__} {error}".strip())
            raise

    def _end_on_failure(self) -> None:
        error = self._cluster.wait_for_failure()
        if error is not None:
            self._fail(error)

    def _fail(self, error: TfosError) -> None:
        self._error = self._error or error
        self._abandon("failed", error.headline)

    def _abandon(self, outcome: str, message: str) -> None:
        self._cluster.abandon(outcome, message)

    def _raise_earlier_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _require_spark_mode(self, what: str) -> None:
        self._raise_earlier_error()
        if self.input_mode != InputMode.SPARK:
            raise UsageError(
                f"TFCluster.{what}() feeds rows, and this cluster reads its data by itself.",
                hint="TFCluster.run(…, input_mode=TFCluster.InputMode.SPARK).",
            )
        if self.result is not None:
            raise UsageError("The cluster has been shut down.", hint="Start another: TFCluster.run(…).")

    def _describe(self) -> dict[str, Any]:
        template: dict[str, list[int]] = {}
        for node in self._cluster.nodes:
            template.setdefault(node.role.job_name, []).append(node.index)
        return {
            "id": self.cluster_id,
            "cluster_template": template,
            "num_executors": self.num_executors,
            "default_fs": self.defaultFS,
            "working_dir": self.working_dir,
        }


class Server:
    """What programs written for TensorFlowOnSpark ask of ``cluster.server``."""

    def __init__(self, cluster: TFCluster) -> None:
        self._cluster = cluster

    @property
    def done(self) -> bool:
        """True once a node wants no more rows, or the cluster is over."""
        ends = [self._cluster._cluster.queues.why_stopped(queue) for queue in self._cluster.queues]
        return any(ends) or self._cluster.result is not None or self._cluster._error is not None

    def stop(self) -> None:
        """End every queue: what is fed is fed no further, and readers come to their end."""
        self._cluster._cluster.stop_queues("server.stop() was called")


def _info(node: Member) -> Mapping[str, Any]:
    return {
        "executor_id": node.index,
        "host": node.host,
        "job_name": node.role.job_name,
        "task_index": node.role.task_index,
        "port": node.info["port"],
        "addr": (node.info["address"], node.info["port"]),
        "tb_pid": 0,
        "tb_port": 0,
    }
