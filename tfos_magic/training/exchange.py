"""Tensors that are added up over all nodes, from within a traced step or eagerly.

Runs on: executors.

    tensors ──one call out of the graph──► packing ──► ring ──► the same bits on every node
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfos_magic.training.packing import average
from tfos_magic.training.ring import Ring

Tensor = Any  # tf.Tensor has no published types


class Exchange:
    """What the steps of one model send to the other nodes, and how.

    Parameters
    ----------
    ring : Ring or None
        None for a single node: then sums are its own.
    name : str
        Put behind the names of messages.
    wire_dtype : {"float32", "bfloat16"}
        What gradients are while they travel.

    Attributes
    ----------
    turn : tf.Variable or None
        Orders the exchanges of a graph in which some are in a ``tf.cond``; TensorFlow orders calls out of the graph by
        itself only where they all are at its top.
    """

    def __init__(self, ring: Ring | None, name: str = "", wire_dtype: str = "float32") -> None:
        self.ring = ring
        self.name = name
        self.turn: Any = None
        self._wire = None if wire_dtype == "float32" else np.dtype(tf.as_dtype(wire_dtype).as_numpy_dtype)

    def average(
        self,
        gradients: Sequence[Tensor],
        rows: Tensor,
        label: str,
        *,
        weighted: Sequence[Tensor] = (),
        plain: Sequence[Tensor] = (),
        is_sum: bool = False,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Add up over all nodes; a node without rows adds nothing, be its numbers NaN.

        Parameters
        ----------
        gradients, weighted : sequence of tensors
            Averaged with `rows` as this node's weight. Only the former may be rounded for the way.
        rows : int or scalar tensor
        label : str
            What this is, for the ring.
        plain : sequence of tensors
            Summed.
        is_sum : bool
            `gradients` and `weighted` have been multiplied by `rows` before.

        Returns
        -------
        gradients, weighted, plain : lists of tensors
        total : tensor
            The rows of all nodes, a scalar float32.
        """
        given = [*gradients, *weighted, *plain]
        rows = tf.cast(rows, tf.float32)
        if self.ring is None:
            divisor = tf.maximum(rows, 1.0) if is_sum else tf.constant(1.0)
            return [over(g, divisor) for g in gradients], list(weighted), list(plain), rows
        ring, label, wire = self.ring, label + self.name, self._wire
        first, second = len(gradients), len(gradients) + len(weighted)

        def exchange(count: Any, *arrays: Any) -> list[Any]:
            parts = arrays[:first], arrays[first:second], arrays[second:]
            results, total = average(ring, *parts, float(count), label, wire=wire, is_sum=is_sum)
            return [np.float32(total), *results]

        total, *results = self.call(exchange, [rows, *(tf.cast(value, wire_dtype(value.dtype)) for value in given)])
        results = [
            tf.cast(tf.ensure_shape(result, value.shape), value.dtype)
            for result, value in zip(results, given, strict=True)
        ]
        return results[:first], results[first:second], results[second:], tf.ensure_shape(total, [])

    def join(self, values: Tensor, indices: Tensor, total: Tensor, label: str) -> tuple[Tensor, Tensor]:
        """Return the slices of all nodes one after the other, as the whole batch has them.

        Not as a dense sum: Keras's Adam squares each occurrence of a row by itself, so that the result would differ.

        Parameters
        ----------
        values, indices : tensors
            Those of this node, the former times its rows.
        total : tensor
            The rows of all nodes.
        label : str
        """
        ring = self.ring
        joined, where = values, indices
        if ring is not None:
            name = f"{label}: slices{self.name}"
            joined, where = self.call(lambda *a: [ring.concatenate(x, name) for x in a], [values, indices])
        joined = tf.ensure_shape(joined, [None, *values.shape[1:]])
        return over(joined, tf.maximum(total, 1.0)), tf.ensure_shape(where, [None])

    def call(self, function: Callable[..., list[Any]], tensors: list[Tensor]) -> list[Tensor]:
        """Call `function` with arrays, in the order of the program; its results have the tensors' dtypes."""
        if self.turn is None or tf.executing_eagerly():
            return on_host(function, tensors)
        with tf.control_dependencies([self.turn.read_value()]):
            results = on_host(function, tensors)
        with tf.control_dependencies(results):
            self.turn.assign_add(1)
        return results


def on_host(function: Callable[..., list[Any]], tensors: list[Tensor]) -> list[Tensor]:
    """Call `function` with arrays, now or when the graph runs; its results have the tensors' dtypes."""
    if tf.executing_eagerly():
        return [tf.convert_to_tensor(result) for result in function(*(t.numpy() for t in tensors))]
    with tf.device("CPU:0"):
        return list(tf.nest.flatten(tf.numpy_function(function, tensors, [t.dtype for t in tensors])))


def when(condition: Tensor | bool, action: Callable[[], Any]) -> Any:
    """Do `action` where `condition` holds: now, or when the graph runs, and then nothing is returned."""
    if isinstance(condition, bool):
        return action() if condition else None
    if tf.executing_eagerly():
        return action() if bool(condition) else None

    def act() -> Tensor:
        action()
        return tf.constant(True)

    tf.cond(condition, act, lambda: tf.constant(False))
    return None


def over(value: Tensor, divisor: Tensor) -> Tensor:
    """Return ``value / divisor`` in `value`'s dtype."""
    return value / tf.cast(divisor, value.dtype)


def is_slices(gradient: Any) -> bool:
    """Tell whether a gradient is some rows of a variable only."""
    return isinstance(gradient, tf.IndexedSlices)


def weighted_slices(gradient: Any, rows: Any) -> tuple[Tensor, Tensor]:
    """Return values, times `rows`, and indices of slices, in the dtypes in which they travel."""
    values = tf.cast(gradient.values, wire_dtype(gradient.values.dtype))
    return values * tf.cast(rows, values.dtype), tf.cast(gradient.indices, tf.int64)


def wire_dtype(dtype: Any) -> Any:
    """Return the dtype that travels in place of `dtype`, None where sums make no sense."""
    dtype = tf.as_dtype(dtype)
    if dtype == tf.float64:
        return dtype
    if dtype.is_floating:
        return tf.float32
    return tf.int64 if dtype.is_integer or dtype.is_bool else None
