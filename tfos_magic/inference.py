"""Inference: a DataFrame in, the same DataFrame with predictions out, by nodes that load the model once.

Runs on: driver.

    infer(spark, payload, options, frame)
      │
      Cluster.start   the function runs once on each node and returns what predicts: a function of a batch, or a model
      schema          given, or asked of the nodes with the first rows
      ▼
    Inference.frame   lazy: in an action each Spark task asks one node, rows stay in order, and columns that are only
                      kept never leave the task
    Inference.close   the nodes are gone; the frame cannot be computed again
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tfos_magic import session, tasks
from tfos_magic.cluster import Cluster
from tfos_magic.errors import DataError, FeedError, RunInterrupted, RunTimeoutError, UsageError
from tfos_magic.failures import python_reason
from tfos_magic.feed.prepare import columns_of, vectors_as_arrays, vectors_restored
from tfos_magic.jobs import SparkJob
from tfos_magic.options import RunOptions
from tfos_magic.status import Event, PhaseChanged, RunEnded

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from tfos_magic.result import NodeInfo
    from tfos_magic.shipping import Payload

_SAMPLE_ROWS = 4
_PATIENCE_S = 600.0
_QUEUE = "input"
_RESULTS = "__tfos_results"
_log = logging.getLogger(__name__)


class Inference:
    """Nodes that predict for as long as it is open, and the DataFrame that asks them.

    Parameters
    ----------
    spark : SparkSession or SparkContext
    payload : Payload
        A function that returns a function of one batch (column name → array), or a Keras model.
    options : RunOptions
        ``num_nodes``, ``batch_size``, and as ``features`` the columns that nodes get; all by default. ``timeout_s`` is
        for getting ready and for :meth:`save`; nodes that wait for questions may wait for as long as they like.
    data : DataFrame
    schema : str, optional
        Names and types of the new columns, e.g. ``"score float, label long"``; found out with a few rows by default.
    keep : sequence of str, optional
        The input's columns that the result has too; all by default.
    on_event : callable(Event)
        Told everything that happens, from several threads.
    cell_names : mapping of str to str
        File name of a compiled cell → what tracebacks call it.

    Attributes
    ----------
    frame : DataFrame
        Lazy; row count and order are those of the input. It can be computed while the nodes are there.
    """

    def __init__(
        self,
        spark: Any,
        payload: Payload,
        options: RunOptions,
        data: DataFrame,
        *,
        schema: str | None = None,
        keep: Sequence[str] | None = None,
        on_event: Callable[[Event], None],
        cell_names: Mapping[str, str] | None = None,
    ) -> None:
        self._spark = session.as_session(spark)
        self._emit = on_event
        self._data = data
        self._asked = _require_columns(data, options.features)
        self._keep = _require_columns(data, keep)
        wanted = self._parse(schema)
        self._timeout_s = options.timeout_s
        options = replace(options, timeout_s=None)
        self._cluster = Cluster(
            self._spark, payload, options, on_event=on_event, cell_names=cell_names or {}, queues=[_QUEUE]
        )
        with self._ending_on_error():
            self._cluster.start(timeout_s=self._timeout_s)
            self._wait(lambda: all(node.is_predicting for node in self._cluster.fed_nodes), "load the model")
            self._plan = self._plan_questions(options.batch_size)
            self.frame = self._make_frame(wanted)
            on_event(PhaseChanged("ready: nodes wait for questions"))
        self._watch = threading.Thread(target=self._tell_failure, name="tfos_magic watch", daemon=True)
        self._watch.start()

    @property
    def is_open(self) -> bool:
        """Whether the nodes are there."""
        return not self._cluster.has_failed and not self._cluster.is_closing

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """Where the nodes run; none when they are gone."""
        running = self._cluster.nodes if self.is_open else ()
        return tuple(node.describe() for node in running if node.peer is not None)

    def save(self, path: str, mode: str = "errorifexists") -> DataFrame:
        """Compute everything once, write it as Parquet, stop the nodes, and return the written DataFrame.

        Parameters
        ----------
        path : str
            Whatever Spark can write to.
        mode : str
            Of Spark's ``DataFrameWriter.mode``.

        Raises
        ------
        FeedError, NodeError, …
            After everything has been stopped.
        """
        with self._ending_on_error():
            self._emit(PhaseChanged(f"writing {path}"))
            self._run(lambda: self.frame.write.mode(mode).parquet(path), f"write {path}")
        self.close()
        return self._spark.read.parquet(path)

    def close(self) -> None:
        """Let the nodes end; idempotent."""
        if self._cluster.is_closing:
            return
        with self._ending_on_error():
            self._cluster.queues.finish()
            self._cluster.wait()
            self._cluster.close()
        self._emit(RunEnded("done"))
        self._watch.join()

    # --- the frame ----------------------------------------------------------------------------------------

    def _make_frame(self, wanted: Any) -> DataFrame:
        plain = vectors_as_arrays(self._data)
        if wanted is None:
            wanted = self._ask_schema(plain)
        taken = [field.name for field in wanted if field.name in self._keep]
        if taken:
            raise UsageError(
                f"The result has a column '{taken[0]}', and so has the input.",
                hint="Give it another name, or leave the input's out: --keep "
                + ",".join(name for name in self._keep if name not in taken),
            )
        plan = {**self._plan, "schema": session.arrow_schema(wanted).serialize().to_pybytes()}
        function = session.arrow_function(_task("predict_column", plan), wanted)
        if function is None:
            kept = [plain.schema[name] for name in self._keep]
            result = plain.mapInArrow(_task("predict_batches", plan), type(plain.schema)([*kept, *wanted.fields]))
            return vectors_restored(result, self._data)
        # Here what is only kept never leaves the JVM.
        asked = columns_of(self._data, self._asked)
        return self._data.select(
            *columns_of(self._data, self._keep, as_arrays=False), function(*asked).alias(_RESULTS)
        ).select(*[f"`{name}`" for name in self._keep], *[f"`{_RESULTS}`.`{name}`" for name in wanted.names])

    def _ask_schema(self, plain: DataFrame) -> Any:
        import pyarrow as pa

        self._emit(PhaseChanged("asking for the result's types"))
        few = plain.limit(_SAMPLE_ROWS).coalesce(1)
        task = _task("predict_schema", self._plan)
        rows = self._run(lambda: few.mapInArrow(task, "schema binary").collect(), "ask for the result's types")
        if not rows:
            raise DataError(
                "The DataFrame has 0 rows: nobody can tell which columns the result has.",
                hint='Say it: --schema "score float".',
            )
        return session.spark_schema(pa.ipc.read_schema(pa.py_buffer(bytes(rows[0][0]))))

    def _plan_questions(self, batch_size: int) -> dict[str, Any]:
        questions = self._cluster.queues.plan_questions(_QUEUE)
        asked = {"asked": self._asked, "keep": self._keep, "batch_rows": batch_size}
        return {**questions, **asked, "patience_s": _PATIENCE_S}

    def _parse(self, schema: str | None) -> Any:
        if schema is None:
            return None
        try:
            return self._spark.createDataFrame([], schema).schema
        except Exception as error:  # Spark's parser raises what it likes
            raise UsageError(
                f"The schema {schema!r} cannot be read: {str(error).strip().splitlines()[0]}",
                hint='Names and types, as in SQL: --schema "score float, words array<string>".',
            ) from None

    def _run(self, action: Callable[[], Any], what: str) -> Any:
        """Run a Spark action that asks the nodes; a node's error comes before Spark's."""
        group = f"tfos_magic-{self._cluster.id}-infer"
        job = SparkJob(self._spark.sparkContext, group, f"tfos_magic: {what}", action, self._wake)
        try:
            self._wait(lambda: job.has_ended, what)
        except BaseException:
            job.cancel()
            raise
        if job.error is not None:
            error = FeedError(f"Spark could not {what}: {python_reason(str(job.error))}")
            error.__cause__ = job.error
            with self._cluster.changed:
                self._cluster.raise_cause_of(error)
        return job.value

    def _wait(self, is_done: Callable[[], bool], what: str) -> None:
        """Wait for nodes or for a job, within the timeout."""

        def is_over() -> bool:
            if not is_done() and self._timeout_s is not None and self._cluster.elapsed_s > self._timeout_s:
                raise RunTimeoutError(
                    f"The timeout of {self._timeout_s:g} s was not enough to {what}.",
                    cause="; ".join(f"{node.name} is {node.state.value}" for node in self._cluster.nodes),
                    hint="Give it more time with --timeout, or look at the nodes' logs.",
                )
            return is_done()

        self._cluster.wait_until(is_over, what, None)

    def _wake(self, job: SparkJob) -> None:
        with self._cluster.changed:
            self._cluster.changed.notify_all()

    # --- errors -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        """Stop everything when what runs inside does not succeed."""
        try:
            yield
        except KeyboardInterrupt:
            what = f"interrupted after {self._cluster.elapsed_s:.0f} s; {len(self._cluster.nodes)} nodes stopped"
            self._cluster.abandon("stopped", what)
            raise RunInterrupted(what) from None
        except BaseException as error:
            self._cluster.abandon("failed", getattr(error, "headline", str(error)))
            raise

    def _tell_failure(self) -> None:
        """End everything when a node fails in an action of the user's, which knows only that the node has gone."""
        error = self._cluster.wait_for_failure()
        if error is not None:
            self._cluster.abandon("failed", error.headline)
            _log.error("inference has failed\n%s", error)


def _task(entry: str, plan: dict[str, Any]) -> Any:
    return tasks.task(f"tfos_magic.feed.task:{entry}", plan)


def _require_columns(data: DataFrame, names: Sequence[str] | None) -> list[str]:
    from tfos_magic.feed.columns import unknown_column

    for name in names or ():
        if name not in data.columns:
            raise unknown_column(name, data.columns)
    return list(data.columns if names is None else names)
