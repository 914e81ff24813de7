"""Gradients of several batches, added up on each node before they are averaged over all and applied.

Runs on: executors.

    batch 1 … K-1 ─► sums += rows × gradients
    batch K       ─► sums += rows × gradients ─► exchange ─► optimizer.apply ─► sums := 0

K batches of B rows are one step with K·B rows: same gradients, one update, one message. All nodes count the same
batches, so that they agree on when. What an epoch leaves over, fewer than K batches, is applied at its end.

Rows of an embedding (slices) are not made dense but kept one after the other, as a batch of K·B rows has them. Within
a step each batch is still one by itself: batch normalisation takes its statistics from B rows, and where a step calls
several optimizers, the later ones see what the earlier ones will change only once per K batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfos_magic.training.exchange import Exchange, is_slices, weighted_slices, when, wire_dtype

Tensor = Any  # tf.Tensor has no published types
Apply = Callable[[list[Any]], Any]


class Accumulation:
    """The sums of one model; lives as long as it is distributed, while its steps are traced again and again.

    Parameters
    ----------
    every : int
        How many batches make an update; 1 or more.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._batches: Any = None
        self._turn: Any = None
        self._sums: dict[int, _Sums] = {}

    @property
    def pending(self) -> int:
        """How many batches are in the sums now."""
        return 0 if self._batches is None else int(self._batches.numpy())

    def count_batch(self, exchange: Exchange) -> Tensor:
        """Begin a batch whose numbers go through `exchange`; return whether an update is due with it."""
        if self._batches is None:
            with tf.init_scope():
                self._batches = tf.Variable(0, trainable=False, dtype=tf.int64, name="accumulated_batches")
                self._turn = tf.Variable(0, trainable=False, dtype=tf.int64, name="turn")
        exchange.turn = self._turn
        count = self._batches.read_value() + 1
        is_due = count >= self.every
        self._batches.assign(tf.where(is_due, tf.zeros_like(count), count))
        return is_due

    def add(
        self,
        number: int,
        gradients: Sequence[Any],
        shapes: Sequence[Any],
        rows: Any,
        is_due: Tensor,
        exchange: Exchange,
        apply: Apply,
    ) -> None:
        """Add a batch's gradients, and update the weights when that is due.

        Parameters
        ----------
        number : int
            Which call of an optimizer's ``apply`` within the step this is, from 0.
        gradients : sequence of tensor, tf.IndexedSlices or None
        shapes : sequence of tuple of int
            Of the variables.
        rows : int or scalar tensor
        is_due : tensor
            From :meth:`count_batch`.
        exchange : Exchange
        apply : callable
            Takes the averaged gradients.
        """
        signature = [_signature(g, tuple(shape)) for g, shape in zip(gradients, shapes, strict=True)]
        sums = self._sums.get(number)
        if sums is None or sums.signature != signature:
            with tf.init_scope():
                sums = self._sums[number] = _Sums(signature, "gradients" + (f" {number}" if number else ""))
        sums.exchange, sums.apply = exchange, apply
        sums.add(gradients, rows)
        when(is_due, sums.update)

    def flush(self) -> None:
        """Update with what is in the sums: the end of an epoch. Every node must call it at the same place."""
        if self.pending:
            for sums in self._sums.values():
                sums.update()
            self._batches.assign(0)

    def callback(self) -> keras.callbacks.Callback:
        """Return what lets each epoch of a ``fit`` end without a rest.

        It goes first of all, so that validation and whatever saves weights at the end of an epoch see them complete.
        """
        return _Flush(self)

    def reset(self) -> None:
        """Forget what is in the sums, say of a fit that was interrupted."""
        if self._batches is not None:
            self._batches.assign(0)
        for sums in self._sums.values():
            sums.reset()


class _Flush(keras.callbacks.Callback):  # type: ignore[misc]  # Keras publishes no types
    """Applies what an epoch has left over, before its validation where there is one."""

    def __init__(self, accumulation: Accumulation) -> None:
        super().__init__()
        self._accumulation = accumulation

    def on_train_begin(self, logs: Any = None) -> None:
        self._accumulation.reset()

    def on_test_begin(self, logs: Any = None) -> None:
        self._accumulation.flush()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._accumulation.flush()


class _Sums:
    """Of the gradients that one call of an optimizer's ``apply`` takes."""

    def __init__(self, signature: list[Any], label: str) -> None:
        self.signature = signature
        self.exchange = Exchange(None)
        self.apply: Apply | None = None
        self._label = label
        self._rows = tf.Variable(0.0, trainable=False, name="accumulated_rows")
        self._parts = [None if each is None else _part(*each) for each in signature]

    def add(self, gradients: Sequence[Any], rows: Any) -> None:
        def act() -> None:
            self._rows.assign_add(tf.cast(rows, tf.float32))
            for part, gradient in zip(self._parts, gradients, strict=True):
                if part is not None:
                    part.add(gradient, rows)

        when(rows > 0, act)  # else they may be NaN

    def update(self) -> None:
        """Average over the nodes, apply, begin anew; nothing is applied when no node had a row."""
        dense = [part for part in self._parts if isinstance(part, _Dense)]
        means, _, _, total = self.exchange.average(
            [part.total() for part in dense], self._rows.read_value(), self._label, is_sum=True
        )
        rest = iter(means)
        averaged = [
            None if part is None else next(rest) if isinstance(part, _Dense) else part.join(self, total)
            for part in self._parts
        ]
        averaged = [
            tf.cast(g, each[0]) if each is not None and not is_slices(g) else g
            for g, each in zip(averaged, self.signature, strict=True)
        ]
        apply = self.apply
        assert apply is not None  # set with the first gradients
        when(total > 0, lambda: apply(averaged))
        self.reset()

    def join(self, values: Tensor, indices: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return self.exchange.join(values, indices, total, self._label)

    def reset(self) -> None:
        self._rows.assign(0.0)
        for part in self._parts:
            if part is not None:
                part.reset()


class _Dense:
    def __init__(self, dtype: Any, shape: Any) -> None:
        self._sum = tf.Variable(tf.zeros(shape, wire_dtype(dtype)), trainable=False, name="accumulated")

    def add(self, gradient: Any, rows: Any) -> None:
        gradient = tf.cast(gradient, self._sum.dtype)
        self._sum.assign_add(gradient * tf.cast(rows, gradient.dtype))

    def total(self) -> Tensor:
        return self._sum.read_value()

    def reset(self) -> None:
        self._sum.assign(tf.zeros_like(self._sum))


class _Slices:
    def __init__(self, dtype: Any, shape: Any, indices_dtype: Any) -> None:
        wide = wire_dtype(dtype)
        self._dtype, self._shape, self._indices_dtype = dtype, shape, indices_dtype
        tail = shape[1:]
        self._values = tf.Variable(tf.zeros([0, *tail], wide), shape=[None, *tail], trainable=False, name="slices")
        self._indices = tf.Variable(tf.zeros([0], tf.int64), shape=[None], trainable=False, name="slice_indices")

    def add(self, gradient: Any, rows: Any) -> None:
        values, indices = weighted_slices(gradient, rows)
        self._values.assign(tf.concat([self._values.read_value(), values], 0))
        self._indices.assign(tf.concat([self._indices.read_value(), indices], 0))

    def join(self, sums: _Sums, total: Tensor) -> Any:
        values, indices = sums.join(self._values.read_value(), self._indices.read_value(), total)
        shape = tf.constant(self._shape, self._indices_dtype)
        return tf.IndexedSlices(tf.cast(values, self._dtype), tf.cast(indices, self._indices_dtype), shape)

    def reset(self) -> None:
        self._values.assign(tf.zeros([0, *self._shape[1:]], self._values.dtype))
        self._indices.assign(tf.zeros([0], tf.int64))


def _signature(gradient: Any, shape: tuple[int, ...]) -> Any:
    """Return what tells the sums of a gradient from those of another one: dtype, shape, and the indices' dtype."""
    if gradient is None:
        return None
    return (gradient.dtype, shape, gradient.indices.dtype) if is_slices(gradient) else (gradient.dtype, shape)


def _part(dtype: Any, shape: Any, indices_dtype: Any = None) -> _Dense | _Slices:
    return _Dense(dtype, shape) if indices_dtype is None else _Slices(dtype, shape, indices_dtype)
