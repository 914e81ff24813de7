"""TensorFlow's own ways to train over nodes, for loops that people write themselves.

Runs on: executors.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NoReturn

from tfos_magic.errors import UsageError

_servers: list[Any] = []  # they live as long as the process
_KERAS_LOOPS = ("fit", "evaluate", "train_on_batch", "test_on_batch")  # predict runs


def make_strategy(ctx: Any) -> Any:
    """Return a new strategy for this node; see :func:`tfos_magic.training.strategy`."""
    strategy = _make(ctx)
    if ctx.cluster_spec.get("ps"):
        _refuse_keras_loops(strategy, "a ParameterServerStrategy")
    elif ctx.num_nodes > 1:
        _refuse_keras_loops(strategy, "a MultiWorkerMirroredStrategy of several nodes")
    return strategy


def _make(ctx: Any) -> Any:
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


def _refuse_keras_loops(strategy: Any, kind: str) -> None:
    """Let Keras 3's own loops refuse models of `strategy` in words, in this process: they would fail in TensorFlow's.

    Keras 3.3 to 3.15 reduces the scalar loss of a strategy of several workers over an axis that it has not, and knows
    nothing of parameter servers. tf_keras's loops run, and are left alone. The process is this run's own.
    """
    import keras

    trainer = next(kind for kind in keras.Model.__mro__ if "fit" in vars(kind))
    for name in _KERAS_LOOPS:
        setattr(trainer, name, _refusing(vars(trainer)[name], strategy, kind))


def _refusing(loop: Callable[..., Any], strategy: Any, kind: str) -> Callable[..., Any]:
    @functools.wraps(loop)
    def refuse_or_run(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.distribute_strategy is not strategy:
            return loop(model, *args, **kwargs)
        raise UsageError(
            f"Keras 3's model.{loop.__name__} does not run under {kind}.",
            cause="The model was made, or is used, in the strategy's scope: there it works in loops of your own only.",
            hint="For fit on all nodes: no ctx.strategy(), no --ps, but ctx.distribute(model) before model.fit. Else a "
            "loop of your own: see help(tfos_magic.training.strategy). A copy made outside the scope can be "
            "evaluated: keras.models.clone_model(model), then set_weights and compile.",
        )

    return refuse_or_run


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
