"""Plain Keras 3 ``fit`` and ``evaluate`` over all nodes, as on one big machine.

Runs on: executors.

    fit ─► on_train_begin: same model, same number of steps everywhere? weights := node 0's
      step ─► model.train_step (the user's or Keras's own), with these put in between while it is traced:
               optimizer.apply     ◄─ gradients := sum(rows_i * g_i) / sum(rows_i)        one message
               metric.result       ◄─ remembered, computed again from the whole batch's metrics
               variable.assign     ◄─ remembered (moving statistics)
           ─► metrics += sum of what each node added; moving statistics averaged            one message
      epoch end ─► stop_training is true where any node says so; ctx.report_epoch

The model stays an ordinary Keras model with ordinary variables, outside any ``tf.distribute`` scope. Only public
methods of this one instance are replaced (``fit``, ``evaluate``, ``train_step``, ``test_step``,
``make_train_function``, ``make_test_function``), so saving, cloning and pickling are as before. Everything that acts on
gradients – clipping, weight decay, EMA, loss scaling, accumulation – comes after the averaging and so acts as on the
whole batch.

What is exact and what is not: see :func:`tfos_magic.training.distribute`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfos_magic.errors import TfosError, UsageError
from tfos_magic.training.ring import Ring

_log = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.4
_UNKNOWN = -1
_UNBUILT = 0

Tensor = Any  # tf.Tensor has no published types
Step = Callable[[Any], Any]


class KerasFit:
    """What ``ctx.distribute`` puts on one model.

    Parameters
    ----------
    model : keras.Model
    ring : Ring or None
        None for a single node: then only the reporting is added.
    ctx : NodeContext
        Its ``is_chief``, ``report`` and ``report_epoch`` are used.
    number : int
        Which of this process's distributed models this is, from 0.
    """

    def __init__(self, model: Any, ring: Ring | None, ctx: Any, number: int = 0) -> None:
        self.model = model
        self.ctx = ctx
        self.number = number
        self._ring = ring
        self._fit = model.fit
        self._evaluate = model.evaluate
        self._train_step: Step = model.train_step
        self._test_step: Step = model.test_step
        self._make_train_function = model.make_train_function
        self._make_test_function = model.make_test_function
        self._is_fitting = False
        self._train_pending = True
        self._test_pending = True
        self._synced: dict[int, Any] = {}  # id → variable; the reference keeps the id from being used again

    def install(self) -> None:
        """Set the hooks on the model."""
        model = self.model
        model.fit = self.fit
        model.evaluate = self.evaluate
        if self._ring is None:
            return
        model.train_step = self.train_step
        model.test_step = self.test_step
        model.make_train_function = self.make_train_function
        model.make_test_function = self.make_test_function
        model.train_function = None  # made before now, they would not pass through the hooks
        model.test_function = None

    # --- calls that Keras users make ----------------------------------------------------------------------------

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """``model.fit``, synchronous over all nodes."""
        call = _bind(self._fit, args, kwargs)
        self._quieten(call)
        if isinstance(call.arguments.get("x"), tf.data.Dataset):
            call.arguments.setdefault("shuffle", False)  # Keras ignores it, but newer ones warn about their own default
        callback = _FitCallback(self)
        call.arguments["callbacks"] = _with_callback(call.arguments.get("callbacks"), callback, self.model)
        self._is_fitting = True
        try:
            with self._plain_errors():
                return self._fit(*call.args, **call.kwargs)
        finally:
            self._is_fitting = False

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.evaluate``: each node its rows, the metrics are those of all rows."""
        call = _bind(self._evaluate, args, kwargs)
        self._quieten(call)
        with self._plain_errors():
            if self._ring is not None:
                self._begin_evaluate(call.arguments)
            return self._evaluate(*call.args, **call.kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """Keras's own, with XLA off: it cannot compile a step that talks to other nodes."""
        self._train_pending |= self.model.train_function is None or force
        self._no_xla()
        return self._make_train_function(force=force)

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
        return _SharedStep(self, data, "train").run(self._train_step)

    def test_step(self, data: Any) -> Any:
        """``model.test_step`` on this node's share of the batch."""
        if self._test_pending:
            self._make_variables(self._test_step, data)
            self._test_pending = False
        return _SharedStep(self, data, "test").run(self._test_step)

    # --- before the first step ----------------------------------------------------------------------------------

    def begin_fit(self, steps: int | None, epochs: int) -> None:
        """Compare the nodes' plans and give all of them node 0's weights."""
        if self._ring is None:
            return
        self._synced.clear()
        self._agree(_Plan("fit", self.number, steps, epochs, self.model.steps_per_execution, self._structure()))

    def end_epoch(self) -> None:
        """Stop everywhere when any node wants to stop."""
        if self._ring is not None:
            wants_stop = np.array([bool(self.model.stop_training)], np.int64)
            self.model.stop_training = bool(self._ring.all_reduce(wants_stop, "end of epoch")[0])

    def _begin_evaluate(self, arguments: dict[str, Any]) -> None:
        if not self._is_fitting:
            self._synced.clear()
        steps = _count_steps(arguments)
        self._agree(_Plan("evaluate", self.number, steps, 1, self.model.steps_per_execution, self._structure()))

    def _agree(self, plan: _Plan) -> None:
        ring = self._require_ring()
        rows = ring.gather(plan.encode(), "start")
        plans = [_Plan.decode(row) for row in rows]
        _compare(plans, ring.plan.names)
        if all(other.structure.is_built for other in plans):
            self._share_weights()

    def _make_variables(self, step: Step, data: Any) -> None:
        """Create what `step` creates on its first run – weights, slots, metrics – without running it; then share."""
        try:
            _rehearse(step, data)
        except Exception:
            if not self.model.run_eagerly:
                raise
            # A step that only runs eagerly: at least the weights can be made. Metrics start at zero anyway.
            self.model(data[0] if isinstance(data, tuple) else data)
        ring = self._require_ring()
        with tf.init_scope():
            mine = _Structure.of(self._variables()).encode()
            structures = [_Structure.decode(row) for row in ring.gather(mine, "structure")]
            _compare_structures(structures, ring.plan.names)
            self._share_weights()

    def _variables(self) -> list[Any]:
        """Return what must be equal on all nodes: weights and optimizer state, no random seeds, no metrics."""
        found = list(self.model.weights)
        for optimizer in _optimizers(self.model):
            found += optimizer.variables
        return list({id(v): v for v in found}.values())

    def _structure(self) -> _Structure:
        return _Structure.of(self.model.weights)

    def _share_weights(self) -> None:
        """Set the variables that were not yet set in this fit to node 0's values."""
        ring = self._require_ring()
        fresh = [v for v in self._variables() if id(v) not in self._synced]
        by_dtype: dict[Any, list[Any]] = {}
        for variable in fresh:
            by_dtype.setdefault(_wire_dtype(variable.dtype), []).append(variable)
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

    def _require_ring(self) -> Ring:
        if self._ring is None:
            raise UsageError("This model trains on a single node.")
        return self._ring

    def _quieten(self, call: inspect.BoundArguments) -> None:
        """Print one line per epoch on the chief and nothing elsewhere, unless the user has asked for something."""
        if call.arguments.get("verbose", "auto") == "auto":
            call.arguments["verbose"] = 2 if self.ctx.is_chief else 0

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


# --- one step -------------------------------------------------------------------------------------------------


class _SharedStep:
    """One training or test step, as traced: the model's own step with the exchanges put in.

    Parameters
    ----------
    owner : KerasFit
    data : nested tensors
        This node's batch, of any number of rows.
    kind : {"train", "test"}
    """

    def __init__(self, owner: KerasFit, data: Any, kind: str) -> None:
        self._owner = owner
        self._model = owner.model
        self._ring = owner._require_ring()
        self._kind = kind
        self._data = data
        self._rows = _row_count(data)
        self._applied = 0
        self._assigned: dict[int, Any] = {}
        self._results: dict[int, tuple[Any, Callable[[], Any], int]] = {}
        self._scalar_means: dict[int, Any] = {}

    def run(self, step: Step) -> Any:
        metrics = _unique(self._model.metrics)
        counters = _unique([v for metric in metrics for v in metric.variables if _wire_dtype(v.dtype)])
        statistics = [v for v in self._model.non_trainable_weights if _is_float(v)] if self._kind == "train" else []
        before = {id(v): _read(v) for v in (*counters, *statistics)}
        with contextlib.ExitStack() as undo:
            self._intercept(undo, metrics, statistics)
            logs = step(_never_empty(self._data, self._rows))
        moved = [v for v in statistics if id(v) in self._assigned]
        return self._merge(logs, counters, moved, before)

    # --- what is put in between ---------------------------------------------------------------------------------

    def _intercept(self, undo: contextlib.ExitStack, metrics: Sequence[Any], statistics: Sequence[Any]) -> None:
        if self._kind == "train":
            for optimizer in _optimizers(self._model):
                undo.enter_context(_replaced(optimizer, "apply", functools.partial(self._apply, optimizer.apply)))
        for variable in statistics:
            undo.enter_context(_replaced(variable, "assign", functools.partial(self._note_assign, variable)))
        for metric in metrics:
            undo.enter_context(_replaced(metric, "result", functools.partial(self._note_result, metric.result)))
            if type(metric) is keras.metrics.Mean:
                undo.enter_context(_replaced(metric, "update_state", functools.partial(self._note_update, metric)))

    def _note_assign(self, variable: Any, *args: Any, **kwargs: Any) -> Any:
        self._assigned[id(variable)] = variable
        return type(variable).assign(variable, *args, **kwargs)

    def _note_result(self, result: Callable[[], Any]) -> Any:
        value = result()
        for position, leaf in enumerate(tf.nest.flatten(value)):
            self._results[id(leaf)] = (leaf, result, position)
        return value

    def _note_update(self, metric: Any, values: Any, sample_weight: Any = None) -> Any:
        """Find means of one number per batch without a weight: they stand for all rows of the batch."""
        if sample_weight is None and tf.convert_to_tensor(values).shape.rank == 0:
            self._scalar_means[id(metric)] = metric
        return type(metric).update_state(metric, values, sample_weight=sample_weight)

    def _apply(self, apply: Callable[..., Any], grads: Any, trainable_variables: Any = None) -> Any:
        """``optimizer.apply`` with the gradients of the whole batch; left out when no node has a row."""
        grads = list(grads)
        variables = None if trainable_variables is None else list(trainable_variables)
        label = f"gradients {self._applied}" if self._applied else "gradients"
        self._applied += 1
        dense = [tf.convert_to_tensor(g) for g in grads if g is not None and not _is_slices(g)]
        slices = [g for g in grads if _is_slices(g)]
        *sums, total = self._exchange([*map(self._share, dense), self._row_share()], label)
        safe = tf.maximum(total, 1.0)
        means = iter([tf.cast(s / tf.cast(safe, s.dtype), g.dtype) for s, g in zip(sums, dense, strict=True)])
        rows = iter([self._join_slices(g, safe, f"{label}: slices") for g in slices])
        averaged = [None if g is None else next(rows if _is_slices(g) else means) for g in grads]
        return self._where_rows(total, lambda: apply(averaged, variables))

    def _join_slices(self, gradient: Any, total: Tensor, label: str) -> Any:
        """Return the slices of all nodes one after the other, as the whole batch has them.

        Not as a dense sum: Keras's Adam squares each occurrence of a row by itself, so that the result would differ.
        """
        values = self._share(gradient.values)
        indices = tf.cast(gradient.indices, tf.int64)
        if not (isinstance(self._rows, int) and self._rows > 0):
            count = tf.where(tf.convert_to_tensor(self._rows) > 0, tf.shape(indices)[0], 0)
            values, indices = values[:count], indices[:count]
        joined, where = self._on_host(lambda *a: [self._ring.concatenate(x, label) for x in a], [values, indices])
        joined = tf.ensure_shape(joined, [None, *gradient.values.shape[1:]])
        where = tf.ensure_shape(where, [None])
        joined = tf.cast(joined / tf.cast(total, joined.dtype), gradient.values.dtype)
        return tf.IndexedSlices(joined, tf.cast(where, gradient.indices.dtype), gradient.dense_shape)

    def _where_rows(self, total: Tensor, action: Callable[[], Any]) -> Any:
        if isinstance(self._rows, int) and self._rows > 0:
            return action()
        if tf.executing_eagerly():
            return action() if float(total) > 0 else None

        def act() -> Tensor:
            action()
            return tf.constant(True)

        tf.cond(total > 0, act, lambda: tf.constant(False))
        return None

    # --- after the step -----------------------------------------------------------------------------------------

    def _merge(self, logs: Any, counters: list[Any], moved: list[Any], before: dict[int, Tensor]) -> Any:
        """Make metrics, moving statistics and logs those of the whole batch, in one exchange."""
        scalar = {id(v) for metric in self._scalar_means.values() for v in metric.variables}
        deltas = [_read(v) - before[id(v)] for v in counters]
        leaves = tf.nest.flatten(logs)
        loose = [x for x in leaves if id(x) not in self._results and _is_float_tensor(x)]
        *sums, total = self._exchange(
            [
                *(self._share(d) if id(v) in scalar else self._alone(d) for v, d in zip(counters, deltas, strict=True)),
                *(self._share(_read(v)) for v in moved),
                *(self._share(x) for x in loose),
                self._row_share(),
            ],
            f"{self._kind} metrics",
        )
        safe = tf.maximum(total, 1.0)
        shared = iter(sums)
        for variable in counters:
            change = next(shared)
            change = change / tf.cast(safe, change.dtype) if id(variable) in scalar else change
            variable.assign(before[id(variable)] + tf.cast(change, variable.dtype))
        for variable in moved:
            mean = tf.cast(next(shared) / safe, variable.dtype)
            variable.assign(tf.where(total > 0, mean, before[id(variable)]))
        means = {id(x): tf.cast(next(shared) / safe, x.dtype) for x in loose}
        return tf.nest.pack_sequence_as(logs, [self._final(leaf, means) for leaf in leaves])

    def _final(self, leaf: Any, means: dict[int, Tensor]) -> Any:
        if id(leaf) in self._results:
            _, result, position = self._results[id(leaf)]
            return tf.nest.flatten(result())[position]
        return means.get(id(leaf), leaf)

    # --- arithmetic ---------------------------------------------------------------------------------------------

    def _row_share(self) -> Tensor:
        return tf.cast(self._rows, tf.float32)

    def _share(self, value: Tensor) -> Tensor:
        """Return rows × value, zero for an empty batch, whose own means are NaN."""
        value = tf.cast(value, _wire_dtype(value.dtype))
        return self._alone(value * tf.cast(self._rows, value.dtype))

    def _alone(self, value: Tensor) -> Tensor:
        return tf.where(tf.convert_to_tensor(self._rows) > 0, value, tf.zeros_like(value))

    def _exchange(self, values: list[Tensor], label: str) -> list[Tensor]:
        """Return the sums of `values` over all nodes, as one message per dtype."""
        values = [tf.cast(v, _wire_dtype(v.dtype)) for v in values]
        dtypes = list(dict.fromkeys(v.dtype for v in values))
        flats = [tf.concat([tf.reshape(v, [-1]) for v in values if v.dtype == d], 0) for d in dtypes]
        label = f"{label} (model {self._owner.number})" if self._owner.number else label

        sums = self._on_host(lambda *arrays: [self._ring.all_reduce(a, label) for a in arrays], flats)
        queues = {}
        for dtype, total in zip(dtypes, sums, strict=True):
            mine = [v for v in values if v.dtype == dtype]
            queues[dtype] = iter(tf.split(total, [_size(v) for v in mine]))
        return [
            tf.reshape(next(queues[v.dtype]), v.shape if v.shape.is_fully_defined() else tf.shape(v)) for v in values
        ]

    @staticmethod
    def _on_host(function: Callable[..., list[Any]], tensors: list[Tensor]) -> list[Tensor]:
        """Call `function` with arrays, now or when the graph runs; its results have the tensors' dtypes."""
        if tf.executing_eagerly():
            return [tf.convert_to_tensor(result) for result in function(*(t.numpy() for t in tensors))]
        with tf.device("CPU:0"):
            return list(tf.nest.flatten(tf.numpy_function(function, tensors, [t.dtype for t in tensors])))


# --- callbacks ------------------------------------------------------------------------------------------------


class _FitCallback(keras.callbacks.Callback):  # type: ignore[misc]  # Keras publishes no types
    """Comes after the user's callbacks, so that what those load or decide is what all nodes get."""

    async_safe = True
    """Newer Keras may call batch ends from another thread; nothing here minds."""

    def __init__(self, owner: KerasFit) -> None:
        super().__init__()
        self._owner = owner
        self._next_report = 0.0
        self._steps_done = 0
        self._batches_seen = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._owner.begin_fit(self.params.get("steps"), int(self.params.get("epochs") or 1))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._batches_seen = batch + 1
        now = time.monotonic()
        if now >= self._next_report and logs and "loss" in logs:
            self._next_report = now + _REPORT_EVERY_S
            self._owner.ctx.report(step=self._steps_done + self._batches_seen, loss=float(logs["loss"]))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._steps_done += self._batches_seen
        self._batches_seen = 0
        self._owner.ctx.report_epoch(epoch + 1, _numbers(logs or {}))
        self._owner.end_epoch()


def _with_callback(callbacks: Any, callback: Any, model: Any) -> Any:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.callbacks.append(callback)
        callback.set_model(model)
        callback.set_params(callbacks.params)
        return callbacks
    return [*keras.tree.flatten(callbacks), callback] if callbacks else [callback]


def _numbers(logs: Any) -> dict[str, float]:
    found = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            found[name] = float(value)
    return found


# --- what nodes compare before they start ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Structure:
    """A model's variables in three numbers; all zero while it is not built."""

    digest: int = _UNBUILT
    variable_count: int = 0
    parameter_count: int = 0

    @classmethod
    def of(cls, variables: Sequence[Any]) -> _Structure:
        if not variables:
            return cls()
        # Not the names: the automatic ones count the layers that each process has ever made.
        text = ";".join(f"{tuple(v.shape)}{v.dtype}" for v in variables)
        count = sum(int(np.prod(v.shape)) for v in variables)
        return cls(zlib.crc32(text.encode()) | 1 << 32, len(variables), count)

    @classmethod
    def decode(cls, row: Any) -> _Structure:
        return cls(*(int(x) for x in row))

    @property
    def is_built(self) -> bool:
        return self.digest != _UNBUILT

    def encode(self) -> Any:
        return np.array([self.digest, self.variable_count, self.parameter_count], np.int64)


@dataclass(frozen=True)
class _Plan:
    """What a node is about to do."""

    call: str
    model_number: int
    steps: int | None
    epochs: int
    steps_per_execution: int
    structure: _Structure = field(default_factory=_Structure)

    def encode(self) -> Any:
        steps = _UNKNOWN if self.steps is None else int(self.steps)
        plan = [_CALLS.index(self.call), self.model_number, steps, self.epochs, int(self.steps_per_execution)]
        return np.concatenate([np.array(plan, np.int64), self.structure.encode()])

    @classmethod
    def decode(cls, row: Any) -> _Plan:
        call, number, steps, epochs, per_execution = (int(x) for x in row[:5])
        known = None if steps == _UNKNOWN else steps
        return cls(_CALLS[call], number, known, epochs, per_execution, _Structure.decode(row[5:]))


_CALLS = ("fit", "evaluate")


def _compare(plans: Sequence[_Plan], names: Sequence[str]) -> None:
    """Raise if the nodes are about to do different things, which would end in a hang or a wrong result."""
    _same("calls", [f"model.{p.call}" for p in plans], names, "Every node must make the same calls in the same order.")
    _same("models", [p.model_number for p in plans], names, "Call ctx.distribute in the same order on every node.")
    _same("epochs", [p.epochs for p in plans], names, "Pass the same epochs on every node.")
    _same("steps_per_execution", [p.steps_per_execution for p in plans], names, "Compile alike on every node.")
    if all(p.steps is not None for p in plans):
        _same(
            f"numbers of batches in {plans[0].call}",
            [p.steps for p in plans],
            names,
            "Use ctx.dataset(…), which gives every node the same number, pass steps_per_epoch=/validation_steps=, "
            "or cut the arrays to equal lengths.",
        )
    built = [p.structure for p in plans if p.structure.is_built]
    if len(built) == len(plans):
        _compare_structures(built, names)


def _compare_structures(structures: Sequence[_Structure], names: Sequence[str]) -> None:
    if len({s.digest for s in structures}) == 1:
        return
    shown = [f"{s.variable_count} variables with {s.parameter_count:,} numbers" for s in structures]
    _same(
        "models",
        [f"{text} (structure {s.digest & 0xFFFF:04x})" for text, s in zip(shown, structures, strict=True)],
        names,
        "Build the same layers with the same sizes on every node.",
    )


def _same(what: str, values: Sequence[Any], names: Sequence[str], hint: str) -> None:
    if len(set(values)) > 1:
        shown = ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        raise UsageError(f"The nodes have different {what}: {shown}.", hint=hint)


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
    with contextlib.suppress(TypeError, AttributeError):
        return len(x)  # type: ignore[arg-type]  # a PyDataset
    return None


# --- small things ---------------------------------------------------------------------------------------------


def _bind(function: Callable[..., Any], args: Any, kwargs: Any) -> inspect.BoundArguments:
    return inspect.signature(function).bind(*args, **kwargs)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of this one instance for a while."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def _optimizers(model: Any) -> list[Any]:
    """Return the compiled optimizer and those that a custom model keeps as attributes."""
    candidates = [getattr(model, "optimizer", None), *vars(model).values()]
    return _unique([c for c in candidates if isinstance(c, keras.optimizers.Optimizer)])


def _unique(things: Sequence[Any]) -> list[Any]:
    return list({id(thing): thing for thing in things}.values())


def _rehearse(step: Step, data: Any) -> None:
    """Trace `step` into a graph that is thrown away."""
    flat = tf.nest.flatten(data)

    def replay(*stand_ins: Tensor) -> Any:
        waiting = iter(stand_ins)
        return step(tf.nest.pack_sequence_as(data, [None if t is None else next(waiting) for t in flat]))

    # Not under tf.init_scope, which stops gradient tapes; a trace needs no scope, it adds nothing to a graph around it.
    tf.function(replay, autograph=False).get_concrete_function(
        *(tf.type_spec_from_value(t) for t in flat if t is not None)
    )


def _row_count(data: Any) -> int | Tensor:
    """Return the rows of a batch: an int where the shape says so, else a scalar tensor."""
    first = next(t for t in tf.nest.flatten(data, expand_composites=False) if t is not None)
    if isinstance(first, tf.RaggedTensor):
        return first.nrows()
    if isinstance(first, tf.SparseTensor):
        return first.dense_shape[0]
    first = tf.convert_to_tensor(first)
    return tf.shape(first)[0] if first.shape[0] is None else int(first.shape[0])


def _read(variable: Any) -> Tensor:
    return tf.convert_to_tensor(variable.value)


def _never_empty(data: Any, rows: int | Tensor) -> Any:
    """Return the batch, or one row of zeros in place of none: not every layer and loss can do with none.

    What comes of that row is left out afterwards.
    """
    flat = tf.nest.flatten(data)
    if any(t is not None and not tf.is_tensor(t) for t in flat) or (isinstance(rows, int) and rows > 0):
        return data
    present = [t for t in flat if t is not None and t.shape.rank]

    def fill() -> list[Tensor]:
        return [tf.zeros(tf.concat([[1], tf.shape(t)[1:]], 0), t.dtype) for t in present]

    filled = tf.cond(tf.convert_to_tensor(rows) > 0, lambda: [tf.identity(t) for t in present], fill)
    replacement = iter(filled)
    result = []
    for tensor in flat:
        if tensor is not None and tensor.shape.rank:
            new = next(replacement)
            new = tf.ensure_shape(new, [None, *tensor.shape[1:]])
            result.append(new)
        else:
            result.append(tensor)
    return tf.nest.pack_sequence_as(data, result)


def _is_slices(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)


def _size(value: Tensor) -> Any:
    return value.shape.num_elements() if value.shape.is_fully_defined() else tf.size(value)


def _is_float(variable: Any) -> bool:
    return bool(tf.as_dtype(variable.dtype).is_floating)


def _is_float_tensor(value: Any) -> bool:
    return tf.is_tensor(value) and bool(value.dtype.is_floating)


def _wire_dtype(dtype: Any) -> Any:
    """Return the dtype that travels in place of `dtype`, None where sums make no sense."""
    dtype = tf.as_dtype(dtype)
    if dtype == tf.float64:
        return dtype
    if dtype.is_floating:
        return tf.float32
    return tf.int64 if dtype.is_integer or dtype.is_bool else None
