"""TensorFlow's own ways to train over nodes, for loops that people write themselves.

Runs on: executors.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from tfos_magic.errors import UsageError

_servers: list[Any] = []  # they live as long as the process


def make_strategy(ctx: Any) -> Any:
    """Return a new strategy for this node; see :func:`tfos_magic.training.strategy`."""
    import tensorflow as tf

    if ctx.cluster_spec.get("ps"):
        return _parameter_server_strategy(ctx)
    if ctx.job_name == "evaluator":
        raise UsageError(
            f"{ctx.job_name}:{ctx.task_index} takes no part in synchronous training.",
            cause="ctx.strategy() gives a MultiWorkerMirroredStrategy, made of chief and worker nodes only.",
            hint="On an evaluator use an ordinary model.",
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


def _parameter_server_strategy(ctx: Any) -> Any:
    import tensorflow as tf

    if ctx.job_name != "chief":
        raise UsageError(
            f"{ctx.job_name}:{ctx.task_index} cannot lead a cluster with parameter servers: the chief does.",
            cause="ctx.strategy() gives a ParameterServerStrategy here, which drives the ps and worker nodes.",
            hint="On ps and worker nodes call tfos_magic.training.serve(ctx), or write the cell as a body, without a "
            "function of (args, ctx): then they serve by themselves. It takes a chief (no --no-chief).",
        )
    return tf.distribute.ParameterServerStrategy(tf.distribute.cluster_resolver.TFConfigClusterResolver())


def serve(ctx: Any) -> NoReturn:
    """Be a parameter server or a worker that a coordinator on the chief drives; does not return.

    It ends the user's function; the process stays, and serves, until the run is over.

    Parameters
    ----------
    ctx : NodeContext
        Its ``job_name`` must be ``ps`` or ``worker``.

    Raises
    ------
    UsageError
        On a chief or an evaluator.
    SystemExit
        Always else.
    """
    import tensorflow as tf

    if ctx.job_name not in ("ps", "worker"):
        raise UsageError(
            f"{ctx.job_name}:{ctx.task_index} cannot be a server.",
            hint="Servers are ps and worker nodes; the chief drives them with a "
            "tf.distribute.coordinator.ClusterCoordinator.",
        )
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    _servers.append(
        tf.distribute.Server(
            resolver.cluster_spec(),
            job_name=ctx.job_name,
            task_index=ctx.task_index,
            protocol=resolver.rpc_layer or "grpc",
            start=True,
        )
    )
    raise SystemExit(0)


def is_serving() -> bool:
    """Return True where :func:`serve` has been called in this process."""
    return bool(_servers)
