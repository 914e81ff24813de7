"""Training over the nodes: ``ctx.distribute`` for Keras 3, ``ctx.strategy`` for custom loops.

Runs on: executors.

    options.py          what the magic's line says of it
    ring.py             sums of arrays over all nodes, by TCP; knows nothing of TensorFlow
    keras_fit.py        the hooks on a Keras model: fit and evaluate over a ring
    shared_step.py      one step of it, as traced
    exchange.py         tensors added up over all nodes
    packing.py          many arrays in one message
    accumulation.py     --accumulate: gradients of several batches, one exchange
    checkpointing.py    one call of fit: saved as it goes on, and brought back
    callback_states.py  what callbacks remember
    checkpoint_files.py the files
    directories.py      where the chief writes
    export.py           the trained models, where --save says
    batch_norm.py       batch normalisation with the statistics of the whole batch
    agreement.py        what nodes compare before they start
    tf_strategies.py    TensorFlow's own strategies and servers, for custom loops

Importing this imports neither TensorFlow nor Keras; calling its functions does.
"""

from __future__ import annotations

import gc
import itertools
import logging
import sys
from typing import Any, NoReturn

from tfos_magic.errors import UsageError

__all__ = ["close", "distribute", "is_consequence", "is_serving", "serve", "strategy"]

_STATE = "_tfos_training"
_TRAINING_JOBS = ("chief", "master", "worker")


class _Training:
    """What this process has set up for training; owned by the node's context."""

    def __init__(self) -> None:
        self.ring: Any = None
        self.strategy: Any = None
        self.fits: list[Any] = []
        self.fit_numbers = itertools.count(1)

    @classmethod
    def of(cls, ctx: Any) -> _Training:
        """Return the context's own, made on first use."""
        state = getattr(ctx, _STATE, None)
        if state is None:
            state = cls()
            object.__setattr__(ctx, _STATE, state)
        return state

    @property
    def has_fitted(self) -> bool:
        """Whether a distributed model has been fitted."""
        return any(fit.has_fitted for fit in self.fits)

    def close(self) -> None:
        """Close the connections to the other nodes."""
        if self.ring is not None:
            self.ring.close()


def distribute(model: Any, ctx: Any) -> Any:
    """Make ``model.fit`` and ``model.evaluate`` train on all nodes at once, as on one machine with all their rows.

    Every node must call this, and then make the same calls of ``fit`` and ``evaluate``. It may come before or after
    ``compile``, on a built or an unbuilt model, several times, and for several models.

    Parameters
    ----------
    model : keras.Model
        Functional, Sequential or subclassed, also with its own ``train_step``.
    ctx : NodeContext

    Returns
    -------
    keras.Model
        The same object.

    Raises
    ------
    UsageError
        Not a Keras 3 model; a node that takes no part in training; a strategy made before.
    RendezvousError
        Another node did not come.

    Notes
    -----
    N nodes with batch B follow one process with batch N·B on the same rows, up to the rounding of sums:

    * Gradients are averaged with each node's number of rows as the weight. So batches may be uneven, or empty on
      some nodes. That is exact for losses that are means over rows (Keras's default reduction, also with sample
      weights and class weights, which Keras does not put into the divisor), plus regularisers. It is not exact for
      ``reduction="sum"`` (it gives the mean of the nodes' sums), ``"mean_with_sample_weight"`` and masked losses,
      whose divisor is not the number of rows.
    * Metrics are those of the whole batch where their variables add up over rows, as in all of Keras's. A metric
      *function* that returns one number per batch counts once per node and batch.
    * Within a step each node normalises with its own batch (BatchNormalization), or with the whole batch of all nodes
      (``BatchNormalization(synchronized=True)``: one more message per layer and pass). Moving statistics are averaged.
    * Weights, optimizer state and metrics are the same bits on all nodes after each step. Random seeds are not shared.
    * ``predict`` is each node's own. Callbacks run on every node and see the same logs, so that they decide alike.
      Where they do not: the chief's learning rate at the begin of an epoch and its weights at the end of ``fit`` are
      those of all, and when one node sets ``stop_training``, all stop after that epoch. In the middle of an epoch only
      all nodes can stop, at the same step, as TerminateOnNaN does.
    * Only the chief writes files: on other nodes ModelCheckpoint, BackupAndRestore, CSVLogger, TensorBoard,
      OrbaxCheckpoint and RemoteMonitor, and classes made of them, are left out. All go on with the weights, the state
      of the optimizer and the epoch that BackupAndRestore finds on the chief. Other callbacks run everywhere: one of
      your own that writes should ask ``ctx.is_chief``.
    * ``jit_compile`` is switched off with more than one node.
    * With ``--accumulate K`` the gradients of K batches are added up before nodes exchange and apply them: one step
      with K·B rows. ``optimizer.iterations`` counts updates; what an epoch leaves over is applied at its end.
    * With ``--wire-dtype bfloat16`` dense gradients travel with 8 bits of precision, and half the bytes. Sums are made
      in float32, and all nodes still have the same bits.
    """
    import keras

    from tfos_magic.training.keras_fit import KerasFit

    if not isinstance(model, keras.Model):
        raise UsageError(
            f"ctx.distribute needs a Keras 3 model, not {type(model).__module__}.{type(model).__qualname__}.",
            hint="Make tf_keras models in `with ctx.strategy().scope():`: their fit runs under it.",
        )
    state = _Training.of(ctx)
    if any(fit.model is model for fit in state.fits):
        return model
    if ctx.num_nodes > 1 and state.ring is None:
        state.ring = _meet(ctx, state)
    fit = KerasFit(model, state.ring, ctx, len(state.fits), state.fit_numbers)
    fit.install()
    state.fits.append(fit)
    return model


def _meet(ctx: Any, state: _Training) -> Any:
    from tfos_magic.training.ring import Ring

    if getattr(ctx, "is_coordinator", False):
        raise UsageError(
            "ctx.distribute averages over nodes that all run the cell; with --ps the workers only serve the chief.",
            hint="Leave --ps away, or train with ctx.strategy() and a tf.distribute.coordinator.ClusterCoordinator.",
        )
    if ctx.job_name not in _TRAINING_JOBS:
        raise UsageError(
            f"{ctx.job_name}:{ctx.task_index} takes no part in synchronous training.",
            hint="Call ctx.distribute on chief and worker nodes only.",
        )
    if state.strategy is not None:
        raise UsageError(
            "ctx.distribute came after ctx.strategy(): both would listen on this node's port.",
            hint="Use ctx.distribute(model) with model.fit, or ctx.strategy() with a loop of your own.",
        )
    return Ring.connect(_ring_plan(ctx))


def _ring_plan(ctx: Any) -> Any:
    from tfos_magic.training.ring import RingPlan

    nodes = [
        (f"{job}:{index}", address)
        for job in _TRAINING_JOBS
        for index, address in enumerate(ctx.cluster_spec.get(job, ()))
    ]
    names = tuple(name for name, _ in nodes)
    return RingPlan(
        names=names,
        addresses=tuple(address for _, address in nodes),
        rank=names.index(f"{ctx.job_name}:{ctx.task_index}"),
        secret=getattr(ctx, "secret", b""),
    )


def strategy(ctx: Any) -> Any:
    """Return TensorFlow's strategy for this cluster, made once per node.

    Without parameter servers that is a MultiWorkerMirroredStrategy over all training nodes. With them (``--ps``) it is
    a ParameterServerStrategy, on the chief only: give it to a ``tf.distribute.coordinator.ClusterCoordinator``.

    Call it before TensorFlow runs anything else. It is for loops of your own; Keras 3's ``fit`` does not run under it:
    use :func:`distribute` for that.

    Parameters
    ----------
    ctx : NodeContext

    Returns
    -------
    tf.distribute.MultiWorkerMirroredStrategy or tf.distribute.ParameterServerStrategy

    Raises
    ------
    UsageError
        On a ps or evaluator node, on a worker where there are parameter servers, or when TensorFlow has already run
        an operation.

    Examples
    --------
    Each node has its own rows, so hand them over with ``distribute_datasets_from_function``: the other way,
    ``experimental_distribute_dataset``, would split them once more and drop most of them. ::

        strategy = ctx.strategy()
        with strategy.scope():
            model, optimizer = build_model(), keras.optimizers.SGD(0.1)
            optimizer.build(model.trainable_variables)
        batches = strategy.distribute_datasets_from_function(lambda _: ctx.dataset())


        def step(batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(loss_per_row(y, model(x, training=True))) / (ctx.num_nodes * args.batch_size)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)  # sums them over the nodes
            return loss


        @tf.function
        def train_step(batch):
            return strategy.reduce("SUM", strategy.run(step, args=(batch,)), axis=None)


        for batch in batches:
            train_step(batch)
    """
    state = _Training.of(ctx)
    if state.strategy is None:
        from tfos_magic.training.tf_strategies import make_strategy

        state.strategy = make_strategy(ctx)
    return state.strategy


def serve(ctx: Any) -> NoReturn:
    """Be a parameter server or a worker that the chief's coordinator drives; does not return.

    See :func:`tfos_magic.training.tf_strategies.serve`.
    """
    from tfos_magic.training import tf_strategies

    tf_strategies.serve(ctx)


def is_serving() -> bool:
    """Return True where :func:`serve` has been called in this process."""
    module = sys.modules.get(f"{__name__}.tf_strategies")
    return module is not None and bool(module.is_serving())


def close(ctx: Any) -> None:
    """Close this node's connections to the others; does nothing if there are none.

    Who still needs this node hears by it that the node is gone, and need not wait for ever.
    """
    state = getattr(ctx, _STATE, None)
    if state is not None:
        state.close()


def warn_if_forgotten(ctx: Any) -> None:
    """Say so on the node's log when a Keras model was trained here without the others: most likely by oversight.

    Parameters
    ----------
    ctx : NodeContext
        Of a run whose function has returned.
    """
    state = getattr(ctx, _STATE, None)
    if ctx.training.checkpoint_dir is not None and ctx.is_chief and not (state is not None and state.has_fitted):
        ctx.notice(
            "--checkpoint: nothing was saved. What is saved is model.fit after ctx.distribute(model); in a loop of "
            "your own, ctx.checkpoint_dir says where to.",
            logging.WARNING,
        )
    is_shared = state is not None and (state.fits or state.strategy is not None)
    keras = sys.modules.get("keras")
    if ctx.num_nodes == 1 or is_shared or keras is None:
        return
    for model in (each for each in gc.get_objects() if isinstance(each, keras.Model)):
        if getattr(model, "optimizer", None) is not None and int(model.optimizer.iterations.numpy()):
            ctx.log.warning(
                "%s was trained on %s:%d alone, as on each of the %d nodes: ctx.distribute(model) before fit makes it "
                "one training.",
                model.name,
                ctx.job_name,
                ctx.task_index,
                ctx.num_nodes,
            )
            return


def prepare(ctx: Any) -> None:
    """Raise what can be known to be wrong before the function begins: a directory that cannot be written to."""
    if ctx.training.save_dir is not None and ctx.is_chief:
        from tfos_magic.training.directories import writable

        with writable(ctx.training.save_dir, "Models cannot be saved to", "--save"):
            pass


def save(ctx: Any, value: Any) -> None:
    """Leave the trained models where ``--save`` says; on the chief, when the function has returned.

    Parameters
    ----------
    ctx : NodeContext
    value : object
        What the function returned: where no model was given to :func:`distribute`, this may be one.
    """
    if ctx.training.save_dir is None or not ctx.is_chief:
        return
    state, keras = getattr(ctx, _STATE, None), sys.modules.get("keras")
    models = [fit.model for fit in state.fits] if state is not None else []
    if not models and keras is not None and isinstance(value, keras.Model):
        models = [value]
    if not models:
        ctx.notice(
            "--save: there is no model to be saved. It is the one given to ctx.distribute(model), or else the value of "
            "the cell's last line.",
            logging.WARNING,
        )
        return
    from tfos_magic.training.export import save_models

    with ctx.saving():
        save_models(models, ctx.training.save_dir, ctx.notice)


def is_consequence(type_name: str, message: str) -> bool:
    """Tell whether an exception is what the failure of *another* node looks like here.

    Of several failing nodes, the first for which this is False has the root failure. It imports nothing, so that the
    driver can ask.

    Parameters
    ----------
    type_name : str
        Qualified name of the exception's class, as in :class:`tfos_magic.errors.RemoteException`.
    message : str
    """
    if type_name.endswith("PeerLostError") or "PeerLostError" in message:
        return True
    is_tensorflow = type_name.rpartition(".")[2] in _TENSORFLOW_VICTIMS
    return is_tensorflow and any(mark in message for mark in _PEER_MARKS)


_TENSORFLOW_VICTIMS = frozenset(
    {
        "AbortedError",
        "CancelledError",
        "DeadlineExceededError",
        "FailedPreconditionError",
        "InternalError",
        "UnavailableError",
        "UnknownError",
    }
)
_PEER_MARKS = (
    "Collective ops is aborted by",
    "stopped sending heartbeats",
    "The tasks have crashed",
    "coordination service",
    "failed to connect to all addresses",
    "Connection refused",
    "Connection reset by peer",
    "Socket closed",
)
