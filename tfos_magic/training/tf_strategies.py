"""TensorFlow's own ways to train over nodes, for loops that people write themselves.

Runs on: executors.
"""

from __future__ import annotations

import os
from typing import Any

from tfos_magic.errors import UsageError


def make_strategy(ctx: Any) -> Any:
    """Return a new MultiWorkerMirroredStrategy for this node; see :func:`tfos_magic.training.strategy`."""
    import tensorflow as tf

    if ctx.job_name in ("ps", "evaluator"):
        raise UsageError(
            f"{ctx.job_name}:{ctx.task_index} takes no part in synchronous training.",
            cause="ctx.strategy() gives a MultiWorkerMirroredStrategy, made of chief and worker nodes only.",
            hint="On a ps node call tfos_magic.training.serve(ctx); on an evaluator use an ordinary model.",
        )
    if ctx.num_nodes > 1 and "TF_CONFIG" not in os.environ:
        raise UsageError(
            f"TF_CONFIG is not set, so that TensorFlow cannot find the other {ctx.num_nodes - 1} nodes.",
            hint="Call ctx.strategy() in the function that %%tfos_train runs.",
        )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        if "program startup" not in str(error):
            raise
        raise UsageError(
            "ctx.strategy() came after TensorFlow had run its first operation.",
            cause="TensorFlow sets up its collectives once, before any tensor, variable, layer or dataset is made.",
            hint="Make `strategy = ctx.strategy()` the first line, then build the model in `with strategy.scope():`.",
        ) from error


def serve(ctx: Any) -> None:
    """Be a parameter server or a worker that a coordinator on the chief drives; does not return.

    The node's agent ends the process when the run is over.

    Parameters
    ----------
    ctx : NodeContext
        Its ``job_name`` must be ``ps`` or ``worker``.

    Raises
    ------
    UsageError
        On a chief or an evaluator.
    """
    import tensorflow as tf

    if ctx.job_name not in ("ps", "worker"):
        raise UsageError(
            f"{ctx.job_name}:{ctx.task_index} cannot be a server.",
            hint="Servers are ps and worker nodes; the chief drives them with a "
            "tf.distribute.coordinator.ClusterCoordinator.",
        )
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    server = tf.distribute.Server(
        resolver.cluster_spec(),
        job_name=ctx.job_name,
        task_index=ctx.task_index,
        protocol=resolver.rpc_layer or "grpc",
        start=True,
    )
    server.join()
