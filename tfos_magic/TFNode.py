"""TensorFlowOnSpark's ``TFNode``: what a map function of ``(args, ctx)`` calls.

Runs on: executor, in the child.

Names, defaults and meaning are TensorFlowOnSpark's. What it only refuses under TensorFlow 2 works here, through
``tf.compat.v1`` and with a DeprecationWarning that names what to use instead.
"""

from __future__ import annotations

import getpass
import logging
import posixpath
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import UsageError
from tfos_magic.feed.datafeed import DataFeed

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = [
    "DataFeed",
    "batch_results",
    "export_saved_model",
    "hdfs_path",
    "next_batch",
    "release_port",
    "start_cluster_server",
    "terminate",
]

_KEPT_FEEDS = "_tfos_magic_feeds"
_log = logging.getLogger(__name__)


def hdfs_path(ctx: Any, path: str) -> str:
    """Return an absolute path with a file system, as TensorFlow takes it.

    ==========================  ====================================================================
    `path`                      result
    ==========================  ====================================================================
    ``scheme://…``              as it is
    ``/absolute``               under the default file system
    ``relative``                under the user's home, ``/user/<name>``, on hdfs and viewfs;
                                under the working directory on file; else, with a warning, under the
                                default file system's root
    ==========================  ====================================================================

    Parameters
    ----------
    ctx : NodeContext
        Its ``defaultFS`` and ``working_dir`` count.
    path : str
    """
    if "://" in path or path.startswith("file:"):
        return path
    scheme, _, rest = ctx.defaultFS.partition(":")
    root = f"{scheme}://{rest.strip('/')}"  # Hadoop writes its default as file:///
    if path.startswith("/"):
        return root + path
    if scheme in ("hdfs", "viewfs"):
        return f"{root}/user/{getpass.getuser()}/{path}"
    if scheme == "file":
        return f"{root}/{posixpath.join(ctx.working_dir, path).lstrip('/')}"
    _log.warning("The default file system %s has no home for the relative path %s.", ctx.defaultFS, path)
    return f"{root}/{path}"


def start_cluster_server(
    ctx: Any, num_gpus: int = 1, rdma: bool = False
) -> tuple[tf.train.ClusterSpec, tf.compat.v1.train.Server]:
    """Start TensorFlow 1's server for this node and return ``(cluster_spec, server)``.

    Parameters
    ----------
    ctx : NodeContext
    num_gpus : int
        GPUs that this node uses of those it sees; parameter servers use none.
    rdma : bool
        Must be False: TensorFlow has no RDMA transport since 2.0.

    Raises
    ------
    UsageError
        An argument is wrong, or this node is not in the cluster: the evaluator is not.
    """
    _deprecate("start_cluster_server", "ctx.distribute(model), or ctx.strategy() for custom loops")
    if rdma:
        raise UsageError(
            "rdma=True cannot be had: TensorFlow has no grpc+verbs since 2.0.",
            hint="Leave it out: start_cluster_server(ctx, num_gpus) uses gRPC.",
        )
    if num_gpus < 0:
        raise UsageError(f"num_gpus is {num_gpus}; it must be 0 or more.")
    if ctx.task_index >= len(ctx.cluster_spec.get(ctx.job_name, ())):
        raise UsageError(
            f"{ctx.job_name}:{ctx.task_index} is no part of the cluster, so it starts no server.",
            hint="Let the evaluator read the checkpoints that the others write.",
        )
    import tensorflow as tf

    wanted = 0 if ctx.job_name == "ps" else num_gpus
    found = len(tf.config.list_physical_devices("GPU"))
    if found and wanted > found:
        raise UsageError(
            f"num_gpus is {num_gpus}, and {ctx.job_name}:{ctx.task_index} sees {found}.",
            hint="Ask Spark for more: spark.task.resource.gpu.amount. Or lower num_gpus.",
        )
    cluster = tf.train.ClusterSpec(ctx.cluster_spec)
    config = tf.compat.v1.ConfigProto(device_count={"GPU": wanted})
    return cluster, tf.compat.v1.train.Server(cluster, ctx.job_name, ctx.task_index, config=config)


def export_saved_model(
    sess: tf.compat.v1.Session, export_dir: str, tag_set: str, signatures: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a session's graph and variables as a SavedModel.

    Parameters
    ----------
    sess : tf.compat.v1.Session
    export_dir : str
        A directory that does not exist yet or is empty.
    tag_set : str
        One tag or more, separated by commas, e.g. ``serve``.
    signatures : mapping
        Name → ``{"inputs": {alias: tensor}, "outputs": {alias: tensor}, "method_name": text}``. A tensor may be given
        by its name; ``method_name`` is by default the signature's name.
    """
    _deprecate("export_saved_model", "model.export(path), or tf.saved_model.save")
    import tensorflow as tf

    v1 = tf.compat.v1.saved_model
    graph = sess.graph

    def infos(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {alias: v1.build_tensor_info(_tensor(graph, tensor)) for alias, tensor in tensors.items()}

    was_finalized = graph.finalized
    graph._unsafe_unfinalize()  # supervised sessions finalize it, and saving adds operations
    try:
        with graph.as_default():  # outside of a graph TensorFlow 2 is eager, and refuses
            definitions = {
                name: v1.build_signature_def(
                    infos(signature["inputs"]), infos(signature["outputs"]), signature.get("method_name", name)
                )
                for name, signature in signatures.items()
            }
            builder = v1.Builder(export_dir)
            tags = [tag.strip() for tag in tag_set.split(",")]
            builder.add_meta_graph_and_variables(sess, tags, signature_def_map=definitions, clear_devices=True)
            builder.save()
    finally:
        if was_finalized:
            graph.finalize()


def release_port(ctx: Any) -> None:
    """Close the socket that keeps the node's port free, where ``TFCluster.run(release_port=False)`` left that to you.

    Parameters
    ----------
    ctx : NodeContext
        Its ``tmp_socket`` is None afterwards.
    """
    if ctx.tmp_socket is None:
        _log.warning("release_port() has nothing to do: this node holds no socket.")
        return
    ctx.tmp_socket.close()
    ctx.tmp_socket = None


def next_batch(mgr: Any, batch_size: int, qname: str = "input") -> Any:
    """Return the next rows as ``DataFeed(mgr, train_mode=False).next_batch`` does."""
    _deprecate("next_batch", "feed = ctx.get_data_feed(); feed.next_batch(batch_size)")
    return _kept_feed(mgr, qname).next_batch(batch_size)


def batch_results(mgr: Any, results: Sequence[Any], qname: str = "output") -> None:
    """Give back the results of the last batch as ``DataFeed.batch_results`` does."""
    _deprecate("batch_results", "feed = ctx.get_data_feed(train_mode=False); feed.batch_results(results)")
    feeds = [feed for feed in vars(mgr).get(_KEPT_FEEDS, {}).values() if feed.qname_out == qname]
    if feeds:
        feeds[-1].batch_results(results)
        return
    queue = mgr.get_queue(qname)
    for result in results:
        queue.put(result, block=True)


def terminate(mgr: Any, qname: str = "input") -> None:
    """Want no more rows, as ``DataFeed.terminate`` does."""
    _deprecate("terminate", "feed = ctx.get_data_feed(); feed.terminate()")
    _kept_feed(mgr, qname).terminate()


def _kept_feed(mgr: Any, qname: str) -> DataFeed:
    """Return the one feed of that name for this manager, kept with it: rows left over belong to the next call."""
    feeds: dict[str, DataFeed] = vars(mgr).setdefault(_KEPT_FEEDS, {})
    feed = feeds.pop(qname, None) or DataFeed(mgr, train_mode=False, qname_in=qname)
    feeds[qname] = feed  # the last one is the one in use
    return feed


def _tensor(graph: tf.Graph, tensor: Any) -> Any:
    if not isinstance(tensor, str):
        return tensor
    return graph.get_tensor_by_name(tensor if ":" in tensor else f"{tensor}:0")


def _deprecate(name: str, instead: str) -> None:
    """Warn at the user's line, be it of the function here or of the method of ``ctx``."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("tfos_magic."):
        level, frame = level + 1, frame.f_back
    message = f"TFNode.{name} is TensorFlowOnSpark's way for TensorFlow 1. Now: {instead}."
    warnings.warn(message, DeprecationWarning, stacklevel=level)
