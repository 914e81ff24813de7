"""One training or test step over all nodes: the model's own step, with the exchanges put in while it is traced.

Runs on: executors.

    batch of 0 … B rows ─► the model's step ─► gradients ─► exchange ─► optimizer
                                            └► metrics, moving statistics ─► exchange ─► logs

Each exchange is one call out of the graph to the ring. In Keras's own step the two are one: nothing that comes after
the optimizer depends on the new weights. Everything a node contributes is weighted with its rows, and left out when it
has none; divided by all rows, it is what one machine computes from the whole batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfos_magic.errors import UsageError
from tfos_magic.training.accumulation import Accumulation
from tfos_magic.training.batch_norm import shared_moments, synchronised_layers
from tfos_magic.training.exchange import Exchange, is_slices, weighted_slices, when, wire_dtype

Tensor = Any  # tf.Tensor has no published types
Step = Callable[[Any], Any]


class SharedStep:
    """One training or test step, as traced: the model's own step with the exchanges put in.

    Parameters
    ----------
    model : keras.Model
    exchange : Exchange
        Without a ring, only `accumulation` has an effect.
    data : nested tensors
        This node's batch, of any number of rows.
    kind : {"train", "test"}
    accumulation : Accumulation, optional
        Where several batches make an update.
    """

    def __init__(
        self, model: Any, exchange: Exchange, data: Any, kind: str, accumulation: Accumulation | None = None
    ) -> None:
        self._model = model
        self._exchange = exchange
        self._accumulation = accumulation if accumulation is not None and accumulation.every > 1 else None
        self._kind = kind
        self._data = data
        self._rows = _row_count(data)
        self._applied = 0
        self._is_due: Tensor = None
        self._is_plain = False
        self._waiting: _Update | None = None
        self._assigned: dict[int, Any] = {}
        self._results: dict[int, tuple[Any, Callable[[], Any], int]] = {}
        self._scalar_means: dict[int, Any] = {}

    def run(self, step: Step) -> Any:
        """Return what `step` returns, as of the whole batch."""
        if self._accumulation is not None and self._kind == "train":
            self._is_due = self._accumulation.count_batch(self._exchange)
        if self._exchange.ring is None:
            with contextlib.ExitStack() as undo:
                self._intercept(undo, [], [])
                return step(self._data)
        self._is_plain = self._is_due is None and _is_keras_own(self._model, step)
        metrics = unique(self._model.metrics)
        counters = unique([v for metric in metrics for v in metric.variables if wire_dtype(v.dtype)])
        statistics = [v for v in self._model.non_trainable_weights if _is_float(v)] if self._kind == "train" else []
        before = {id(v): _read(v) for v in (*counters, *statistics)}
        with contextlib.ExitStack() as undo:
            self._intercept(undo, metrics, statistics)
            logs = step(_never_empty(self._data, self._rows))
        if self._kind == "train" and not self._applied and self._model.trainable_weights:
            raise _no_optimizer(self._model)
        moved = [v for v in statistics if id(v) in self._assigned]
        return self._merge(logs, counters, moved, before)

    # --- what is put in between ---------------------------------------------------------------------------------

    def _intercept(self, undo: contextlib.ExitStack, metrics: Sequence[Any], statistics: Sequence[Any]) -> None:
        if self._kind == "train":
            for optimizer in optimizers_of(self._model):
                undo.enter_context(_replaced(optimizer, "apply", functools.partial(self._apply, optimizer.apply)))
        for variable in statistics:
            undo.enter_context(_replaced(variable, "assign", functools.partial(self._note_assign, variable)))
        if self._exchange.ring is None:
            return
        for layer in synchronised_layers(self._model):  # `_moments` is private: Keras 3.3 to 3.15 have it
            moments = functools.partial(shared_moments, self._gather, self._rows, layer)
            undo.enter_context(_replaced(layer, "_moments", moments))
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
        variables = None if trainable_variables is None else list(trainable_variables)
        number = self._applied
        self._applied += 1
        grads = [None if g is None else g if is_slices(g) else tf.convert_to_tensor(g) for g in grads]
        update = _Update(grads, lambda means: apply(means, variables), f"gradients {number}" if number else "gradients")
        if self._accumulation is not None:
            # `_trainable_variables` is private: what Keras 3.3 to 3.15 take when they are given none.
            known = apply.__self__._trainable_variables if variables is None else variables  # type: ignore[attr-defined]
            shapes = [variable.shape for variable in known]
            self._accumulation.add(number, grads, shapes, self._rows, self._is_due, self._exchange, update.apply)
            return None
        if self._is_plain:
            self._waiting = update  # nothing but metrics comes after it: they travel together
            return None
        means, _, _, total = self._exchange.average(update.dense, self._rows, update.label)
        return self._finish(update, means, total)

    def _finish(self, update: _Update, means: list[Tensor], total: Tensor) -> Any:
        """Apply the averaged gradients, the slices joined."""
        rest = iter(means)
        averaged = [
            None if g is None else self._join_slices(g, total, update.label) if is_slices(g) else next(rest)
            for g in update.gradients
        ]
        return when(True if self._surely_has_rows else total > 0, lambda: update.apply(averaged))

    def _join_slices(self, gradient: Any, total: Tensor, label: str) -> Any:
        values, indices = weighted_slices(gradient, self._rows)
        if not self._surely_has_rows:
            count = tf.where(tf.convert_to_tensor(self._rows) > 0, tf.shape(indices)[0], 0)
            values, indices = values[:count], indices[:count]
        joined, where = self._exchange.join(values, indices, total, label)
        joined = tf.cast(joined, gradient.values.dtype)
        return tf.IndexedSlices(joined, tf.cast(where, gradient.indices.dtype), gradient.dense_shape)

    # --- after the step -----------------------------------------------------------------------------------------

    def _merge(self, logs: Any, counters: list[Any], moved: list[Any], before: dict[int, Tensor]) -> Any:
        """Make metrics, moving statistics and logs those of the whole batch, in one exchange."""
        scalar = {id(v) for metric in self._scalar_means.values() for v in metric.variables}
        averaged = [v for v in counters if id(v) in scalar]
        added = [v for v in counters if id(v) not in scalar]
        leaves = tf.nest.flatten(logs)
        loose = [x for x in leaves if id(x) not in self._results and _is_float_tensor(x)]
        deltas = {id(v): _read(v) - before[id(v)] for v in counters}
        waiting = self._waiting
        gradients, shared, sums, total = self._exchange.average(
            [] if waiting is None else waiting.dense,
            self._rows,
            f"{self._kind} metrics" if waiting is None else "gradients and metrics",
            weighted=[*(deltas[id(v)] for v in averaged), *map(_read, moved), *loose],
            plain=[deltas[id(v)] for v in added],
        )
        if waiting is not None:
            self._finish(waiting, gradients, total)
        means = iter(shared)
        for variable, change in [*zip(averaged, means, strict=False), *zip(added, sums, strict=True)]:
            variable.assign(before[id(variable)] + tf.cast(change, variable.dtype))
        for variable in moved:
            variable.assign(tf.where(total > 0, tf.cast(next(means), variable.dtype), before[id(variable)]))
        replaced = {id(x): tf.cast(next(means), x.dtype) for x in loose}
        return tf.nest.pack_sequence_as(logs, [self._final(leaf, replaced) for leaf in leaves])

    def _final(self, leaf: Any, means: dict[int, Tensor]) -> Any:
        if id(leaf) in self._results:
            _, result, position = self._results[id(leaf)]
            return tf.nest.flatten(result())[position]
        return means.get(id(leaf), leaf)

    # --- arithmetic ---------------------------------------------------------------------------------------------

    @property
    def _surely_has_rows(self) -> bool:
        return isinstance(self._rows, int) and self._rows > 0

    def _gather(self, row: Tensor) -> Tensor:
        """Return the vectors of all nodes as rows of a matrix; its gradient is that of the loss of the whole batch."""
        ring, label = self._exchange.ring, f"batch normalisation{self._exchange.name}"
        assert ring is not None  # a single node needs none of this
        rows = tf.cast(self._rows, row.dtype)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def gather(mine: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            def gradient(upstream: Tensor) -> Tensor:
                # Each node's loss depends on this node's row. Weighted as gradients are later, and the own weight out.
                (total,) = self._exchange.call(
                    lambda a: [ring.all_reduce(a.ravel(), f"{label}: gradients")], [upstream * rows]
                )
                total = tf.reshape(total, [ring.plan.size, mine.shape[0]])
                return total[ring.plan.rank] / tf.maximum(rows, 1.0)

            (table,) = self._exchange.call(lambda a: [ring.gather(a, label)], [mine])
            return tf.ensure_shape(table, [ring.plan.size, mine.shape[0]]), gradient

        return gather(row)


@dataclass(frozen=True)
class _Update:
    """What one call of an optimizer's ``apply`` was given."""

    gradients: list[Any]
    apply: Callable[[list[Any]], Any]
    label: str

    @property
    def dense(self) -> list[Tensor]:
        return [g for g in self.gradients if g is not None and not is_slices(g)]


def _is_keras_own(model: Any, step: Step) -> bool:
    """Tell whether after ``optimizer.apply`` the step does nothing but update metrics: Keras's own, not overridden."""
    compute_metrics = getattr(model.compute_metrics, "__func__", None)
    return getattr(step, "__func__", None) is keras.Model.train_step and compute_metrics is keras.Model.compute_metrics


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of this one instance for a while."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def optimizers_of(model: Any) -> list[Any]:
    """Return the compiled optimizer and those that a custom model keeps as attributes, also in lists and dicts."""
    candidates = [getattr(model, "optimizer", None)]
    for value in vars(model).values():
        candidates += (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        )
    return unique([c for c in candidates if isinstance(c, keras.optimizers.Optimizer)])


def unique(things: Sequence[Any]) -> list[Any]:
    """Return `things` in order, each object once."""
    return list({id(thing): thing for thing in things}.values())


def _no_optimizer(model: Any) -> UsageError:
    return UsageError(
        f"The train_step of {type(model).__name__} called no optimizer's apply, so that no gradient was averaged.",
        cause="It changes the weights by itself, or its optimizer is not an attribute of the model.",
        hint="Call self.optimizer.apply(gradients, self.trainable_weights), or keep the optimizer as self.….",
    )


def rehearse(step: Step, data: Any) -> None:
    """Trace `step` into a graph that is thrown away."""
    flat = tf.nest.flatten(data)

    def replay(*stand_ins: Tensor) -> Any:
        waiting = iter(stand_ins)
        return step(tf.nest.pack_sequence_as(data, [None if t is None else next(waiting) for t in flat]))

    # Not under tf.init_scope, which stops gradient tapes; a trace needs no scope, it adds nothing to a graph around it.
    tf.function(replay, autograph=False).get_concrete_function(
        *(t if isinstance(t, tf.TypeSpec) else tf.type_spec_from_value(t) for t in flat if t is not None)
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
    if (isinstance(rows, int) and rows > 0) or not all(t is None or isinstance(t, tf.Tensor) for t in flat):
        return data  # ragged and sparse ones stay as they are
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


def _is_float(variable: Any) -> bool:
    return bool(tf.as_dtype(variable.dtype).is_floating)


def _is_float_tensor(value: Any) -> bool:
    return tf.is_tensor(value) and bool(value.dtype.is_floating)
