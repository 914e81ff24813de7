"""Many arrays in one message, and back, without needless copies.

Runs on: executors.

    gradients ──× rows──► one buffer ──ring──► the same buffer, averaged ──► views of it, one per gradient

Each number is written once on the way in and not copied on the way out: TensorFlow takes an array as it is when it
begins at a multiple of 64 bytes, so that large tensors do; small ones lie close together and are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tfos_magic.training.ring import Ring

Array = npt.NDArray[Any]

_ALIGNED = 64
"""Bytes; what TensorFlow asks of a buffer that it is to use as it is."""
_LARGE = 1024
"""Elements; smaller tensors are not worth the padding."""


def average(
    ring: Ring,
    gradients: Sequence[Array],
    weighted: Sequence[Array],
    plain: Sequence[Array],
    rows: float,
    label: str,
    *,
    wire: np.dtype[Any] | None = None,
    is_sum: bool = False,
) -> tuple[list[Array], float]:
    """Add up over all nodes, in one message per dtype.

    Parameters
    ----------
    ring : Ring
    gradients, weighted, plain : sequence of arrays
        Left as they are. The first two are averaged with `rows` as this node's weight, the last are summed.
    rows : float
        With 0, this node's numbers do not count, whatever they are.
    label : str
        What this is, for the ring.
    wire : dtype, optional
        What float32 of `gradients` are while they travel; they then are a message of their own.
    is_sum : bool
        What is to be averaged has been multiplied by `rows` before.

    Returns
    -------
    arrays : list of arrays
        In the order of `gradients`, `weighted`, `plain`.
    total : float
        The rows of all nodes.
    """
    arrays = [*gradients, *weighted, *plain]
    results = list(arrays)
    averaged_count = len(gradients) + len(weighted)
    total = 0.0
    for dtype, travels, members in _messages(arrays, len(gradients), wire):
        averaged = [index for index in members if index < averaged_count]
        slots, buffer = _slots(ring, [arrays[index].shape for index in members], dtype)
        for index, slot in zip(members, slots, strict=True):
            if rows <= 0:
                slot[...] = 0
            elif index < averaged_count and not is_sum:
                np.multiply(arrays[index], dtype.type(rows), out=slot)
            else:
                slot[...] = arrays[index]
            results[index] = slot
        # Summed ones come last, behind the end of the last averaged one.
        end = _end_of(slots[len(averaged) - 1], buffer) if averaged else 0
        total = ring.average(buffer, rows, label, averaged=end, wire=travels)
    return results, total


def _messages(
    arrays: Sequence[Array], gradient_count: int, wire: np.dtype[Any] | None
) -> Iterator[tuple[np.dtype[Any], np.dtype[Any] | None, list[int]]]:
    """Yield per message its dtype here and on the way, and which arrays are in it, in order; at least one."""
    groups: dict[Any, list[int]] = {}
    for index, array in enumerate(arrays):
        is_rounded = wire is not None and index < gradient_count and array.dtype == np.float32
        groups.setdefault((array.dtype, wire if is_rounded else None), []).append(index)
    for (dtype, travels), members in (groups or {(np.dtype(np.float32), None): []}).items():
        yield dtype, travels, members


def _slots(ring: Ring, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> tuple[list[Array], Array]:
    """Return an array per shape, all of them in one buffer, and that."""
    spans, end = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        begin = end + (-end % (_ALIGNED // dtype.itemsize) if size >= _LARGE else 0)
        spans.append((end, begin, begin + size))
        end = begin + size
    raw = ring.empty(end * dtype.itemsize + _ALIGNED, np.uint8)
    skipped = -raw.ctypes.data % _ALIGNED
    buffer = raw[skipped : skipped + end * dtype.itemsize].view(dtype)
    for previous_end, begin, _ in spans:
        buffer[previous_end:begin] = 0  # padding travels, too
    return [buffer[begin:end].reshape(shape) for (_, begin, end), shape in zip(spans, shapes, strict=True)], buffer


def _end_of(slot: Array, buffer: Array) -> int:
    """Return where in `buffer` the numbers of `slot` end."""
    return (slot.ctypes.data - buffer.ctypes.data) // buffer.itemsize + slot.size
