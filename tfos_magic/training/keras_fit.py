"""Plain Keras 3 ``fit`` and ``evaluate`` over all nodes, as on one big machine.

Runs on: executors.

    fit ─► on other nodes than the chief: callbacks that write files are left out
           on_train_begin: a checkpoint to go on with? same model, same number of steps everywhere?
                           weights, first epoch := node 0's
           epoch begin ─► learning rate := node 0's
      step ─► drawn before the checkpoint? then it is passed over
           ─► model.train_step (the user's or Keras's own), with these put in between while it is traced:
               optimizer.apply     ◄─ gradients := sum(rows_i * g_i) / sum(rows_i)
               metric.result       ◄─ remembered, computed again from the whole batch's metrics
               variable.assign     ◄─ remembered (moving statistics)
           ─► metrics += sum of what each node added; moving statistics averaged
                                         (in one message with the gradients where the step is Keras's own)
           ─► time for a checkpoint?
      epoch end ─► stop_training is true where any node says so; ctx.report_epoch; a checkpoint
           on_train_end: if a callback has changed weights on some nodes only, weights := node 0's

The model stays an ordinary Keras model with ordinary variables, outside any ``tf.distribute`` scope. Only public
methods of this one instance are replaced (``fit``, ``evaluate``, ``predict``, ``train_step``, ``test_step``,
``make_train_function``, ``make_test_function``; ``save``, ``export`` and ``save_weights`` also tell the board), so
saving, cloning and pickling are as before. Everything that acts on gradients – clipping, weight decay, EMA, loss
scaling, accumulation – comes after the averaging and so acts as on the whole batch.

What is exact and what is not: see :func:`tfos_magic.training.distribute`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfos_magic.errors import TfosError, UsageError
from tfos_magic.training.accumulation import Accumulation
from tfos_magic.training.agreement import Plan, Structure, compare_plans, compare_structures
from tfos_magic.training.checkpointing import FitCheckpoints, seed_states
from tfos_magic.training.exchange import Exchange, wire_dtype
from tfos_magic.training.ring import Ring
from tfos_magic.training.shared_step import SharedStep, Step, optimizers_of, rehearse, unique

_log = logging.getLogger(__name__)
# A feed's length is known only at its end, and the end of an epoch is then news to Keras, not a mistake.
_END_OF_EPOCH = "Your input ran out of data"

_REPORT_EVERY_S = 0.4

# Newer Keras has more of them than older.
_WRITERS = ("ModelCheckpoint", "BackupAndRestore", "CSVLogger", "TensorBoard", "OrbaxCheckpoint", "RemoteMonitor")


class KerasFit:
    """What ``ctx.distribute`` puts on one model.

    Parameters
    ----------
    model : keras.Model
    ring : Ring or None
        None for a single node: then only the reporting is added.
    ctx : NodeContext
        The node's: who it is, what the line says of training, and where reports go.
    number : int
        Which of this process's distributed models this is, from 0.
    fit_numbers : iterator of int
        Gives each call of ``fit`` in this process its number; all models share it.
    """

    def __init__(
        self, model: Any, ring: Ring | None, ctx: Any, number: int = 0, fit_numbers: Iterator[int] | None = None
    ) -> None:
        warnings.filterwarnings("ignore", message=_END_OF_EPOCH)
        self.model = model
        self.ctx = ctx
        self.number = number
        self._ring = ring
        self._accumulation = Accumulation(ctx.training.accumulate)
        self._fit = model.fit
        self._evaluate = model.evaluate
        self._predict = model.predict
        self._train_step: Step = model.train_step
        self._test_step: Step = model.test_step
        self._make_train_function = model.make_train_function
        self._make_test_function = model.make_test_function
        self._is_fitting = False
        self.has_fitted = False
        self._train_pending = True
        self._test_pending = True
        self._synced: dict[int, Any] = {}  # id → variable; the reference keeps the id from being used again
        self._parted: dict[int, Any] = {}  # random seeds that are this node's own now
        self._fit_numbers = fit_numbers or itertools.count(1)
        self._checkpoints: FitCheckpoints | None = None
        self._data: tuple[Any, ...] = ()

    def install(self) -> None:
        """Set the hooks on the model."""
        model = self.model
        model.fit = self.fit
        model.evaluate = self.evaluate
        model.predict = self.predict
        for name in ("save", "export", "save_weights"):
            if hasattr(model, name):  # oldest Keras 3: not every kind of model can be exported
                setattr(model, name, self._told(getattr(model, name)))
        model.make_train_function = self.make_train_function
        if self._ring is None and self._accumulation.every == 1:
            return
        model.train_step = self.train_step
        model.train_function = None  # made before now, they would not pass through the hooks
        if self._ring is None:
            return
        model.test_step = self.test_step
        model.make_test_function = self.make_test_function
        model.test_function = None

    # --- calls that Keras users make ----------------------------------------------------------------------------

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """``model.fit``, synchronous over all nodes."""
        call = _bind(self._fit, args, kwargs)
        self._quieten(call)
        if isinstance(call.arguments.get("x"), tf.data.Dataset):
            call.arguments.setdefault("shuffle", False)  # Keras ignores it, but newer ones warn about their own default
        self._leave_files_to_chief(call)
        callbacks = call.arguments.get("callbacks")
        last = _FitCallback(self, callbacks, call.arguments)
        if self._accumulation.every > 1:
            callbacks = _with_callback(callbacks, self._accumulation.callback(), self.model, is_first=True)
        call.arguments["callbacks"] = _with_callback(callbacks, last, self.model)
        self._data = tuple(call.arguments.get(name) for name in ("x", "y", "sample_weight"))
        self._is_fitting = self.has_fitted = True
        try:
            with self._plain_errors(), self._saved():
                return self._fit(*call.args, **call.kwargs)
        finally:
            self._is_fitting = False
            self._data = ()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.evaluate``: each node its rows, the metrics are those of all rows."""
        call = _bind(self._evaluate, args, kwargs)
        self._quieten(call)
        self._leave_files_to_chief(call)
        with self._plain_errors():
            if self._ring is not None:
                self._begin_evaluate(call.arguments)
            return self._evaluate(*call.args, **call.kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """``model.predict`` on this node alone; only the chief shows its progress."""
        call = _bind(self._predict, args, kwargs)
        self._quieten(call)
        return self._predict(*call.args, **call.kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """Keras's own, with XLA off where nodes talk, for it cannot compile that; and room for checkpoints."""
        self._train_pending |= self.model.train_function is None or force
        if self._ring is not None:
            self._no_xla()
        self._make_train_function(force=force)
        function = self.model.train_function
        if self.ctx.training.checkpoint_dir is not None and not isinstance(function, _Step):
            self.model.train_function = _Step(self, function)
        return self.model.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Keras's own, with XLA off."""
        # compile() forgets both functions. If there is one for training, its first step has made everything.
        has_trained = self.model.train_function is not None and not self._train_pending
        self._test_pending |= self.model.test_function is None and not has_trained
        self._no_xla()
        return self._make_test_function(force=force)

    def train_step(self, data: Any) -> Any:
        """``model.train_step`` on this node's share of the batch."""
        if self._train_pending:
            self._make_variables(self._train_step, data)
            self._train_pending = False
        return self._shared_step(data, "train").run(self._train_step)

    def test_step(self, data: Any) -> Any:
        """``model.test_step`` on this node's share of the batch."""
        if self._test_pending:
            self._make_variables(self._test_step, data)
            self._test_pending = False
        return self._shared_step(data, "test").run(self._test_step)

    # --- before the first step ----------------------------------------------------------------------------------

    def begin_fit(
        self, steps: int | None, epochs: int, initial_epoch: int, callbacks: Sequence[Any], *, spans_epochs: bool
    ) -> int:
        """Compare the nodes' plans and give all of them node 0's weights, and the epoch it goes on with.

        Returns
        -------
        int
            How many batches lie before that epoch.
        """
        self._synced.clear()
        batches_before = 0
        if self._checkpoints is not None:
            x = self._data[0]
            count = int(x.cardinality()) if isinstance(x, tf.data.Dataset) else -1
            found = self._checkpoints.find(
                epochs, self._build, callbacks, spans_epochs=spans_epochs, batch_count=count if count >= 0 else None
            )
            if found is not None:
                self._parted = {id(v): v for v in seed_states(self.model)}
                self.model._initial_epoch = found
                batches_before = self._checkpoints.batches_before_epoch
        if self._ring is not None:
            self._begin_together(steps, epochs, initial_epoch)
        return batches_before

    def _begin_together(self, steps: int | None, epochs: int, initial_epoch: int) -> None:
        restored = getattr(self.model, "_initial_epoch", None)
        chiefs = self._agree(
            self._plan("fit", steps, epochs=epochs, initial_epoch=initial_epoch, restored_epoch=restored)
        )
        if chiefs.restored_epoch != restored:
            self.model._initial_epoch = chiefs.restored_epoch  # not public, but all that Keras gives to its callbacks
        self._part_seeds()

    def share_rates(self) -> None:
        """Take node 0's learning rates: a callback may have set them there only, or to another value here."""
        optimizers = optimizers_of(self.model)
        if self._ring is None or not optimizers:
            return
        mine = np.array([float(keras.ops.convert_to_numpy(o.learning_rate)) for o in optimizers], np.float64)
        rates = self._ring.gather(mine, "learning rates")[0]
        for optimizer, rate, own in zip(optimizers, rates, mine, strict=True):
            if rate != own and not np.isnan(rate):
                self._set_rate(optimizer, float(rate), float(own))

    def end_epoch(self) -> None:
        """Stop everywhere when any node wants to stop."""
        if self._ring is not None:
            wants_stop = np.array([bool(self.model.stop_training)], np.int64)
            self.model.stop_training = bool(self._ring.all_reduce(wants_stop, "end of epoch")[0])

    def end_fit(self) -> None:
        """Take node 0's weights where callbacks have left different ones, say best weights restored on some nodes."""
        self.share_rates()
        if self._ring is None or self._train_pending:
            return
        checksum = 0
        for variable in self.model.weights:
            checksum = zlib.crc32(np.asarray(variable.value).tobytes(), checksum)
        if len(np.unique(self._ring.gather(np.array([checksum], np.int64), "end of fit"))) > 1:
            _log.info("Callbacks have left different weights on the nodes: all take those of the chief.")
            self._synced.clear()
            self._share_weights()

    def _begin_evaluate(self, arguments: dict[str, Any]) -> None:
        if not self._is_fitting:
            self._synced.clear()
        self._agree(self._plan("evaluate", _count_steps(arguments)))

    def _plan(self, call: str, steps: int | None, *, epochs: int = 1, **first_epoch: Any) -> Plan:
        model = self.model
        has_slots = bool(getattr(model.optimizer, "built", False))
        structure = Structure.of(model.weights)
        return Plan(
            call, self.number, steps, epochs, model.steps_per_execution, structure, has_slots=has_slots, **first_epoch
        )

    def _agree(self, plan: Plan) -> Plan:
        """Return node 0's plan, once all are compared and its weights are everyone's."""
        ring = self._require_ring()
        rows = ring.gather(plan.encode(), "start")
        plans = [Plan.decode(row) for row in rows]
        compare_plans(plans, ring.plan.names)
        if all(other.structure.is_built for other in plans):
            if not plan.has_slots and any(other.has_slots for other in plans):
                self.model.optimizer.build(self.model.trainable_variables)  # loaded from a file on another node
            self._share_weights()
        return plans[0]

    def _make_variables(self, step: Step, data: Any) -> None:
        """Create what `step` creates on its first run – weights, slots, metrics – without running it; then share."""
        try:
            rehearse(step, data)
        except Exception:
            if not self.model.run_eagerly:
                raise
            # A step that only runs eagerly: at least the weights can be made. Metrics start at zero anyway.
            self._make_weights(data)
        if self._ring is None:
            return
        ring = self._ring
        with tf.init_scope():
            mine = Structure.of(self.shared_variables()).encode()
            structures = [Structure.decode(row) for row in ring.gather(mine, "structure")]
            compare_structures(structures, ring.plan.names)
            self._share_weights()
            self._part_seeds()

    def _make_weights(self, data: Any) -> None:
        """Create weights and slots, with zeros where there is no batch yet."""
        x = data[0] if isinstance(data, tuple) else data
        self.model(keras.tree.map_structure(_zeros_of, x))
        if self.model.optimizer is not None and not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)

    def _build(self) -> None:
        """Make every variable that training makes, before there is a batch: a checkpoint is to be put into them."""
        if self._train_pending:
            self._make_variables(self._train_step, _specs_of(*self._data))
            self._train_pending = False

    def _part_seeds(self) -> None:
        """Give random layers a stream of their own on each node, also where the cell has set one seed for all."""
        rank = self._require_ring().plan.rank
        for variable in seed_states(self.model):
            if rank and id(variable) not in self._parted:
                state = np.array(variable.value)
                state.flat[0] ^= (rank * 0x9E3779B1) & 0x7FFFFFFF
                variable.assign(state)
            self._parted[id(variable)] = variable

    def shared_variables(self) -> list[Any]:
        """Return what must be equal on all nodes: weights and optimizer state, no random seeds, no metrics."""
        found = list(self.model.weights)
        for optimizer in optimizers_of(self.model):
            found += optimizer.variables
        return unique(found)

    def _share_weights(self) -> None:
        """Set the variables that were not yet set in this fit to node 0's values."""
        ring = self._require_ring()
        fresh = [v for v in self.shared_variables() if id(v) not in self._synced]
        by_dtype: dict[Any, list[Any]] = {}
        for variable in fresh:
            by_dtype.setdefault(wire_dtype(variable.dtype), []).append(variable)
        for dtype, variables in by_dtype.items():
            if dtype is None:
                continue
            flat = np.concatenate([np.asarray(v.value).astype(dtype.as_numpy_dtype).ravel() for v in variables])
            # Adding zeros is exact, and moves no more than a broadcast around the ring would.
            shared = ring.all_reduce(flat if ring.plan.rank == 0 else np.zeros_like(flat), "initial weights")
            offset = 0
            for variable in variables:
                count = int(np.prod(variable.shape))
                variable.assign(tf.cast(shared[offset : offset + count].reshape(variable.shape), variable.dtype))
                offset += count
        self._synced.update((id(v), v) for v in fresh)

    # --- helpers ------------------------------------------------------------------------------------------------

    def _shared_step(self, data: Any, kind: str) -> SharedStep:
        name = f" (model {self.number})" if self.number else ""
        exchange = Exchange(self._ring, name, self.ctx.training.wire_dtype)
        return SharedStep(self.model, exchange, data, kind, self._accumulation)

    def _require_ring(self) -> Ring:
        if self._ring is None:
            raise UsageError("This model trains on a single node.")
        return self._ring

    def _quieten(self, call: inspect.BoundArguments) -> None:
        """Print on the chief what Keras prints, and nothing elsewhere: it would be the same, N times."""
        if not self.ctx.is_chief:
            call.arguments["verbose"] = 0

    def _leave_files_to_chief(self, call: inspect.BoundArguments) -> None:
        """Take out the callbacks of Keras, and classes made of them, that would write the same files on every node."""
        callbacks = call.arguments.get("callbacks")
        if self.ctx.is_chief or not callbacks:
            return
        given = _each_of(callbacks)
        writers = tuple(getattr(keras.callbacks, name) for name in _WRITERS if hasattr(keras.callbacks, name))
        kept = [callback for callback in given if not isinstance(callback, writers)]
        if len(kept) == len(given):
            return
        left_out = ", ".join(type(callback).__name__ for callback in given if isinstance(callback, writers))
        _log.info("Left out on %s:%d, the chief writes for all: %s", self.ctx.job_name, self.ctx.task_index, left_out)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.callbacks[:] = kept
        else:
            call.arguments["callbacks"] = kept

    def _set_rate(self, optimizer: Any, rate: float, own: float) -> None:
        try:
            optimizer.learning_rate = rate
        except (TypeError, AttributeError):  # a schedule or a function of the user's: cannot be set
            raise UsageError(
                f"The learning rate of {self.ctx.job_name}:{self.ctx.task_index} is {own:g}, the chief's is {rate:g}.",
                cause="It comes from a schedule or a function that is not the same on all nodes.",
                hint="Compile with the same schedule on every node.",
            ) from None

    def _told(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Return `save`, shown on the board while it runs; a checkpoint callback calls it, too."""

        @functools.wraps(save)
        def saving(*args: Any, **kwargs: Any) -> Any:
            with self.ctx.saving():
                return save(*args, **kwargs)

        return saving

    def _no_xla(self) -> None:
        if not self.model.jit_compile:
            return
        self.model.jit_compile = False
        # "auto" resolves to True only where there is an accelerator; elsewhere somebody has asked for it.
        asked_for = not tf.config.list_physical_devices("GPU")
        _log.log(
            logging.WARNING if asked_for else logging.INFO,
            "jit_compile is off under ctx.distribute: XLA cannot compile the exchange between nodes.",
        )

    @contextlib.contextmanager
    def _saved(self) -> Iterator[None]:
        """Let a fit be saved as it goes on, where the run has a directory for that."""
        if self.ctx.training.checkpoint_dir is None:
            yield
            return
        _specs_of(*self._data)  # refuses, before hours are spent, what could not be gone on with
        number = next(self._fit_numbers)
        self._checkpoints = FitCheckpoints(self.model, self._ring, self.ctx, number, self.shared_variables)
        try:
            yield
        finally:
            self._checkpoints.close()
            self._checkpoints = None
            self.model._initial_epoch = None  # Keras keeps it for the next fit

    def run_step(self, function: Callable[[Any], Any], iterator: Any) -> Any:
        """Run Keras's train function once, or what a resumed fit does in its place."""
        return function(iterator) if self._checkpoints is None else self._checkpoints.step(function, iterator)

    @property
    def checkpoints(self) -> FitCheckpoints | None:
        """Of the fit that goes on, where the run has a directory for them."""
        return self._checkpoints

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Raise our own error in place of TensorFlow's report of it."""
        try:
            yield
        except TfosError:
            raise
        except Exception as error:
            failure = self._ring.failure if self._ring is not None else None
            if failure is None or not isinstance(error, tf.errors.OpError):
                raise
            raise failure from None


class _Step:
    """Keras's train function, with its owner's say in each call."""

    def __init__(self, owner: KerasFit, function: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._function = function

    def __call__(self, iterator: Any) -> Any:
        return self._owner.run_step(self._function, iterator)


# --- callbacks ------------------------------------------------------------------------------------------------


class _FitCallback(keras.callbacks.Callback):  # type: ignore[misc]  # Keras publishes no types
    """Comes after the user's callbacks, so that what those load or decide is what all nodes get."""

    async_safe = True
    """Newer Keras may call batch ends from another thread; nothing here minds."""

    def __init__(self, owner: KerasFit, callbacks: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self._owner = owner
        self._others = [each for each in _each_of(callbacks) if not isinstance(each, _FitCallback)]
        self._initial_epoch = int(arguments.get("initial_epoch") or 0)
        self._spans_epochs = arguments.get("steps_per_epoch") is not None
        self._next_report = 0.0
        self._steps_done = 0
        self._batches_seen = 0
        self._epochs = 1

    def on_train_begin(self, logs: Any = None) -> None:
        params = self.params or {}
        self._epochs = int(params.get("epochs") or 1)
        self._steps_done = self._owner.begin_fit(
            params.get("steps"),
            self._epochs,
            self._initial_epoch,
            self._others,
            spans_epochs=self._spans_epochs,
        )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._owner.checkpoints is not None:
            self._owner.checkpoints.begin_epoch(epoch)
        self._owner.share_rates()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._batches_seen = batch + 1
        now = time.monotonic()
        if now >= self._next_report and logs and "loss" in logs:
            self._next_report = now + _REPORT_EVERY_S
            self._owner.ctx.report(step=self._steps_done + self._batches_seen, loss=float(logs["loss"]))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._steps_done += self._batches_seen
        self._batches_seen = 0
        if logs and "loss" in logs:  # the throttled reports have most likely missed the last step
            self._owner.ctx.report(step=self._steps_done, loss=float(logs["loss"]))
        numbers = _numbers(logs or {})
        self._owner.ctx.report_epoch(epoch + 1, numbers)
        self._owner.end_epoch()
        if self._owner.checkpoints is not None:
            self._owner.checkpoints.end_epoch(epoch, logs, numbers, is_stopping=self._owner.model.stop_training)

    def on_train_end(self, logs: Any = None) -> None:
        self._owner.end_fit()
        if self._owner.checkpoints is not None:
            self._owner.checkpoints.end(self._epochs)


def _with_callback(callbacks: Any, callback: Any, model: Any, *, is_first: bool = False) -> Any:
    """Return the callbacks of a ``fit`` with one more, before or behind the others."""
    others = [each for each in _each_of(callbacks) if type(each) is not type(callback)]  # of a fit before this one
    joined = [callback, *others] if is_first else [*others, callback]
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return joined
    callbacks.callbacks[:] = joined
    callback.set_model(model)
    callback.set_params(getattr(callbacks, "params", None) or {})  # Keras 3.3 sets none when there are none
    return callbacks


def _each_of(callbacks: Any) -> list[Any]:
    """Return the callbacks, in whichever way ``fit`` was given them."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return list(callbacks.callbacks)
    return keras.tree.flatten(callbacks) if callbacks else []


def _numbers(logs: Any) -> dict[str, float]:
    found = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            found[name] = float(value)
    return found


# --- arguments ------------------------------------------------------------------------------------------------


def _bind(function: Callable[..., Any], args: Any, kwargs: Any) -> inspect.BoundArguments:
    return inspect.signature(function).bind(*args, **kwargs)


def _count_steps(arguments: dict[str, Any]) -> int | None:
    """Return the number of batches of an ``evaluate`` call, None where nothing says so beforehand."""
    x, steps = arguments.get("x"), arguments.get("steps")
    if steps is not None:
        return int(steps)
    if isinstance(x, tf.data.Dataset):
        count = int(x.cardinality())
        return count if count >= 0 else None
    first = next(iter(tf.nest.flatten(x)), None)
    if isinstance(first, (np.ndarray, tf.Tensor)):
        return -(-int(first.shape[0]) // int(arguments.get("batch_size") or 32))
    return x.num_batches if isinstance(x, keras.utils.PyDataset) else None


def _zeros_of(value: Any) -> Any:
    if not isinstance(value, tf.TensorSpec):
        return value
    return tf.zeros([1, *(size or 1 for size in value.shape[1:])], value.dtype)


def _specs_of(x: Any, y: Any, sample_weight: Any) -> Any:
    """Return what a batch of a ``fit`` call's data is, as tensor specs.

    Raises
    ------
    UsageError
        Only a batch itself could tell.
    """
    if isinstance(x, tf.data.Dataset):
        return x.element_spec
    if x is None or isinstance(x, keras.utils.PyDataset) or inspect.isgenerator(x):
        raise UsageError(
            f"--checkpoint: a fit on a {type(x).__name__} could not be resumed, its place in the data is unknown.",
            hint="Give fit ctx.dataset(…), a tf.data.Dataset or arrays.",
        )

    def spec(values: Any) -> tf.TensorSpec:
        array = values if hasattr(values, "dtype") and hasattr(values, "shape") else np.asarray(values)
        dtype = tf.as_dtype(array.dtype)
        return tf.TensorSpec((None, *array.shape[1:]), keras.backend.floatx() if dtype.is_floating else dtype)

    packed = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
    return keras.tree.map_structure(spec, packed)
