"""Batch normalisation with the mean and the variance of the whole batch of all nodes.

Runs on: executors.

For layers with ``synchronized=True``. Each node sends how many values it has per channel, their mean and the sum of
their squared distances from it; put together, they are those of the whole batch without the loss of digits that sums
of squares bring. Gradients flow through the exchange, so that training is that of one process, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

Tensor = Any  # tf.Tensor has no published types


def synchronised_layers(model: Any) -> list[Any]:
    """Return the layers, however deep, that ask for the statistics of the whole batch."""
    kinds = keras.layers.BatchNormalization
    # `_flatten_layers` is private: Keras 3.3 to 3.15 have it.
    return [each for each in model._flatten_layers() if isinstance(each, kinds) and each.synchronized]


def shared_moments(
    gather: Callable[[Tensor], Tensor], rows: int | Tensor, layer: Any, inputs: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance per channel over all nodes: what the layer takes from its own batch else.

    Parameters
    ----------
    gather : callable
        From a vector to the matrix of all nodes' vectors.
    rows : int or scalar tensor
        How many rows this node's batch has; with 0, what is in `inputs` does not count.
    layer : keras.layers.BatchNormalization
    inputs : tensor
    mask : tensor of bool, optional
        Which values count; one dimension less than `inputs`.
    """
    axes = [axis for axis in range(len(inputs.shape)) if axis != layer.axis % len(inputs.shape)]
    weights = tf.ones_like(inputs) if mask is None else tf.cast(mask, inputs.dtype)[..., None] * tf.ones_like(inputs)
    weights *= tf.cast(tf.convert_to_tensor(rows) > 0, inputs.dtype)
    counts = tf.reduce_sum(weights, axes)
    inputs = tf.where(weights > 0, inputs, tf.zeros_like(inputs))
    means = tf.reduce_sum(inputs, axes) / tf.maximum(counts, 1.0)
    shape = [1 if axis in axes else -1 for axis in range(len(inputs.shape))]
    scatter = tf.reduce_sum(weights * tf.square(inputs - tf.reshape(means, shape)), axes)
    table = gather(tf.ensure_shape(tf.concat([counts, means, scatter], 0), [3 * inputs.shape[layer.axis]]))
    all_counts, all_means, all_scatter = tf.split(table, 3, axis=1)
    total = tf.maximum(tf.reduce_sum(all_counts, 0), 1.0)
    mean = tf.reduce_sum(all_counts * all_means, 0) / total
    variance = tf.reduce_sum(all_scatter + all_counts * tf.square(all_means - mean), 0) / total
    return mean, variance
