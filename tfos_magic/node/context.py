"""What the user's function sees as ``ctx``: TensorFlowOnSpark's names first, then ours.

Runs on: executor, in the child.
"""

from __future__ import annotations

import contextlib
import logging
import numbers
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic import TFNode
from tfos_magic.errors import UsageError
from tfos_magic.node.manager import Manager
from tfos_magic.training.options import TrainingOptions

if TYPE_CHECKING:
    import tensorflow as tf

    from tfos_magic.feed.datafeed import DataFeed
    from tfos_magic.node.link import Link

_NOT_TRAINING = frozenset({"ps", "evaluator"})


class Secret(bytes):
    """Bytes that do not show themselves when somebody prints what holds them."""

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__


class NodeContext:
    """One node's view of its run.

    Attributes
    ----------
    executor_id, worker_num : int
        The node's index, 0 … num_nodes - 1 (both names for the same, as in TensorFlowOnSpark).
    job_name : str
        ``chief``, ``worker``, ``ps`` or ``evaluator``.
    task_index : int
        Index within `job_name`.
    num_nodes : int
        Nodes that train: chief and workers.
    num_workers : int
        The same number under TensorFlowOnSpark's name.
    cluster_spec : dict of str to list of str
        Job name → ``host:port`` of each task.
    is_chief : bool
        True on ``chief:0``, or on ``worker:0`` where there is no chief.
    args : object
        What the magic's options and ``--args`` gave: ``args.epochs``, ``args.batch_size``, …
    point : dict or None
        This node's point of ``--grid``; its keys are attributes of `args` as well.
    attempt : int
        0, and one more after each restart.
    run_id : str
        The same for all nodes and attempts of a run, and different for each run.
    training : TrainingOptions
        What the line says of checkpoints, seed and the exchange of gradients.
    working_dir, defaultFS : str
        Where relative paths point to, and Hadoop's default file system.
    mgr : Manager
        This node's queues; see :mod:`tfos_magic.node.manager`.
    tmp_socket : socket.socket or None
        What keeps this node's port free, only where the run was started with ``release_port=False``.
    log : logging.Logger
        Its lines appear on the board and in the result.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        start: Mapping[str, Any],
        args: Any,
        link: Link,
        point: Mapping[str, Any] | None = None,
    ) -> None:
        self.executor_id: int = config["index"]
        self.worker_num: int = config["index"]
        self.job_name: str = start["job_name"]
        self.task_index: int = start["task_index"]
        self.cluster_spec: dict[str, list[str]] = dict(start["cluster_spec"])
        self.num_nodes: int = sum(len(tasks) for job, tasks in self.cluster_spec.items() if job not in _NOT_TRAINING)
        self.num_workers: int = start["num_workers"]
        self.is_chief: bool = start["is_chief"]
        self.is_server: bool = start["is_server"]
        self.is_coordinator: bool = start["is_coordinator"]
        self.args = args
        self.point = None if point is None else dict(point)
        self.attempt: int = config.get("attempt", 0)
        self.run_id: str = config.get("run_id", "")
        self.working_dir: str = os.getcwd()
        self.defaultFS: str = config["default_fs"]
        self.log = _logger(f"{self.job_name}:{self.task_index}")
        self.feeds = link.feeds
        self.mgr = Manager(self.feeds)
        self.secret = Secret(bytes.fromhex(config["node_secret"]))
        self._data_options: Mapping[str, Any] = start["data_options"]
        self.training = TrainingOptions.from_json(start["training"])
        self._link = link
        self._saving_depth = 0
        self.tmp_socket = self._hold_port() if start.get("release_port") is False else None

    def __repr__(self) -> str:
        return f"<NodeContext {self.job_name}:{self.task_index}, {self.num_nodes} training nodes>"

    @property
    def checkpoint_dir(self) -> str | None:
        """The directory that ``--checkpoint`` names; ``ctx.distribute`` keeps its own files in folders of it."""
        return self.training.checkpoint_dir

    @property
    def is_resuming(self) -> bool:
        """True when what the directory holds is to be gone on with: with ``--resume``, or after a restart."""
        return self.training.resume or self.attempt > 0

    def dataset(
        self,
        name: str = "train",
        batch_size: int | None = None,
        features: Sequence[str] | str | None = None,
        label: str | None = None,
        weight: str | None = None,
        shuffle: bool | None = None,
        *,
        raw: bool = False,
        ragged: Sequence[str] = (),
    ) -> tf.data.Dataset:
        """Return this node's share of the data; iterating it once is one epoch.

        Parameters
        ----------
        name : str
            ``train`` (``--data``) or ``validation`` (``--validation``).
        batch_size : int, optional
            Rows in a batch of this node; default ``args.batch_size``.
        features, label, weight : optional
            Column names; default what the magic's line says, else DESIGN's rule: the label is the column called
            ``label``, ``y`` or ``target``, the features are all others.
        shuffle : bool, optional
            Another order in every epoch; default True for ``train`` unless ``--no-shuffle``, False for others.
        raw : bool
            Yield the dict of all columns.
        ragged : sequence of str
            List columns whose lists differ in length: they become ``tf.RaggedTensor``.

        Returns
        -------
        tf.data.Dataset
            Yields ``x``, ``(x, y)`` or ``(x, y, weight)``; ``x`` is a tensor for one feature column, ``(rows,)`` for
            numbers and ``(rows, k)`` for lists of k, and a dict by column name for several. The first
            dimension is at most batch_size, and the number of batches is the same on every node: one that has used up
            its rows yields batches of 0 rows.

        Raises
        ------
        UsageError
            There is no such feed in this run, or this node gets no rows.
        """
        from tfos_magic.feed.dataset import make_dataset

        self._require_rows()
        options = self._data_options
        if shuffle is None:
            shuffle = bool(options["shuffle"]) and name == "train"
        return make_dataset(
            self.feeds.get(name),
            batch_size=batch_size or options["batch_size"],
            features=[features] if isinstance(features, str) else features or options["features"],
            label=label or options["label"],
            weight=weight or options["weight"],
            shuffle=shuffle,
            seed=options["seed"],
            raw=raw,
            ragged=ragged,
        )

    def get_data_feed(
        self,
        train_mode: bool = True,
        qname_in: str = "input",
        qname_out: str = "output",
        input_mapping: Mapping[str, str] | None = None,
    ) -> DataFeed:
        """Return TensorFlowOnSpark's ``DataFeed`` over the training data; see :mod:`tfos_magic.feed.datafeed`."""
        from tfos_magic.feed.datafeed import DataFeed

        self._require_rows()
        return DataFeed(self.mgr, train_mode, qname_in, qname_out, input_mapping)

    def _require_rows(self) -> None:
        """Refuse on nodes that no feed task knows: reading there would wait for ever."""
        if self.job_name in _NOT_TRAINING:
            raise UsageError(
                f"{self.job_name}:{self.task_index} gets no rows: they are dealt over chief and workers.",
                hint="Read the data on this node by yourself, from files whose path --args gives.",
            )

    def distribute(self, model: Any) -> Any:
        """Make `model`'s ``fit``, ``evaluate`` and ``predict`` synchronous over all training nodes; return it."""
        from tfos_magic import training

        return training.distribute(model, self)

    def strategy(self) -> Any:
        """Return the ``tf.distribute`` strategy of this cluster, for custom loops; see :mod:`tfos_magic.training`."""
        from tfos_magic import training

        return training.strategy(self)

    def is_training_over(self, wait_s: float = 0.0) -> bool:
        """Tell an evaluator whether chief and workers have all returned, so that nothing new will come from them.

        Parameters
        ----------
        wait_s : float
            How long to wait for that at most, e.g. until the next look at the checkpoints. It ends at once when
            training does.

        Raises
        ------
        UsageError
            On a node that trains: there it is over when your function returns.
        """
        if self.job_name not in _NOT_TRAINING:
            raise UsageError(
                f"{self.job_name}:{self.task_index} trains: it cannot wait for the end of what it does itself.",
                hint='Ask on the evaluator: if ctx.job_name == "evaluator".',
            )
        return self._link.training_over.wait(wait_s)

    def report(self, step: int | None = None, **metrics: float) -> None:
        """Show metrics on the board and keep them in the result, e.g. ``ctx.report(step=10, loss=0.3)``."""
        self._link.send("metrics", step=step, epoch=None, values=_numbers(metrics))

    def report_epoch(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Record the metrics of a whole epoch, counted from 1; ``ctx.distribute`` calls it by itself."""
        self._link.send("metrics", step=None, epoch=epoch, values=_numbers(logs))

    def notice(self, text: str, level: int = logging.INFO) -> None:
        """Log a line that matters for the whole run, and show it on the board under its title.

        Parameters
        ----------
        text : str
        level : int
            Of :mod:`logging`.
        """
        self.log.log(level, text)
        self._link.send("notice", text=text)

    def report_checkpoint(self, where: str, size_bytes: int) -> None:
        """Show on the board up to where training is saved; ``ctx.distribute`` calls it by itself.

        Parameters
        ----------
        where : str
            In words, e.g. ``epoch 3, step 120``.
        size_bytes : int
            Of the file.
        """
        self._link.send("checkpoint", where=where, size_bytes=size_bytes)

    def absolute_path(self, path: str) -> str:
        """Return `path` with its file system; see :func:`tfos_magic.TFNode.hdfs_path`."""
        return TFNode.hdfs_path(self, path)

    def start_cluster_server(
        self, num_gpus: int = 1, rdma: bool = False
    ) -> tuple[tf.train.ClusterSpec, tf.compat.v1.train.Server]:
        """Start TensorFlow 1's server for this node; see :func:`tfos_magic.TFNode.start_cluster_server`."""
        return TFNode.start_cluster_server(self, num_gpus, rdma)

    def export_saved_model(
        self, sess: tf.compat.v1.Session, export_dir: str, tag_set: str, signatures: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Write a TensorFlow 1 session as a SavedModel; see :func:`tfos_magic.TFNode.export_saved_model`."""
        with self.saving():
            TFNode.export_saved_model(sess, export_dir, tag_set, signatures)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Show on the board that this node saves, as long as the block takes; blocks may be inside each other."""
        self._saving_depth += 1
        if self._saving_depth == 1:
            self._link.send("state", state="SAVING")
        try:
            yield
        finally:
            self._saving_depth -= 1
            if not self._saving_depth:
                self._link.send("state", state="RUNNING")

    def release_port(self) -> None:
        """Close :attr:`tmp_socket`; see :func:`tfos_magic.TFNode.release_port`."""
        TFNode.release_port(self)

    def _hold_port(self) -> socket.socket | None:
        """Bind this node's port as the agent does: shared with TensorFlow, and never listened on."""
        tasks = self.cluster_spec.get(self.job_name, ())
        if self.task_index >= len(tasks):  # the evaluator, which is no part of the cluster
            return None
        host, _, port = tasks[self.task_index].rpartition(":")
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, int(port)))
        return holder


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values as plain floats: Keras and TensorFlow hand over arrays and tensors of one element."""
    plain = {}
    for name, value in values.items():
        if isinstance(value, numbers.Real) or getattr(value, "shape", None) is not None or hasattr(value, "__float__"):
            plain[name] = float(value)
        else:
            raise UsageError(f"Metric {name!r} is a {type(value).__name__}, not a number.")
    return plain


def _logger(name: str) -> logging.Logger:
    log = logging.getLogger(f"tfos_magic.{name}")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
