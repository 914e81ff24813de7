"""Many arrays in one message, and back, without needless copies.

Runs on: executors.

    gradients ──× rows──► one buffer ──ring──► the same buffer, averaged ──► views of it, one per gradient

Each number is written once on the way in, when the ring needs it, and not copied on the way out: TensorFlow takes an
array as it is when it begins at a multiple of 64 bytes, so that large tensors do; small ones lie close together and are
copied.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    kinds = tuple((array.shape, array.dtype) for array in arrays)
    for layout in _layouts(kinds, len(gradients), averaged_count, wire):
        slots, buffer = _slots(ring, layout)
        for index, slot in zip(layout.members, slots, strict=True):
            results[index] = slot
        factors = [0 if rows <= 0 else rows if index < averaged_count and not is_sum else 1 for index in layout.members]
        given = [arrays[index].reshape(-1) for index in layout.members]
        fill = functools.partial(_fill, layout, buffer, given, factors)
        total = ring.average(buffer, rows, label, averaged=layout.averaged, wire=layout.wire, fill=fill)
    return results, total


@dataclass(frozen=True)
class _Layout:
    """Where the arrays of one message are in its buffer: those of one dtype, what is averaged before what is summed."""

    dtype: np.dtype[Any]
    wire: np.dtype[Any] | None
    members: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    averaged: int
    """Elements, from the first, that are averaged."""


@functools.lru_cache(maxsize=64)  # a step's arrays are the same kinds each time
def _layouts(
    kinds: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...],
    gradient_count: int,
    averaged_count: int,
    wire: np.dtype[Any] | None,
) -> tuple[_Layout, ...]:
    """Return one per message, at least one."""
    groups: dict[Any, list[int]] = {}
    for index, (_, dtype) in enumerate(kinds):
        is_rounded = wire is not None and index < gradient_count and dtype == np.float32
        groups.setdefault((dtype, wire if is_rounded else None), []).append(index)
    layouts = []
    for (dtype, travels), members in (groups or {(np.dtype(np.float32), None): []}).items():
        shapes = tuple(kinds[index][0] for index in members)
        begins, ends, end = [], [], 0
        for shape in shapes:
            size = math.prod(shape)
            begins.append(end + (-end % (_ALIGNED // dtype.itemsize) if size >= _LARGE else 0))
            end = begins[-1] + size
            ends.append(end)
        averaged = max((end for index, end in zip(members, ends, strict=True) if index < averaged_count), default=0)
        layouts.append(_Layout(dtype, travels, tuple(members), shapes, tuple(begins), tuple(ends), averaged))
    return tuple(layouts)


def _slots(ring: Ring, layout: _Layout) -> tuple[list[Array], Array]:
    """Return an array per member, all of them in one buffer, and that."""
    size = layout.ends[-1] if layout.ends else 0
    raw = ring.empty(size * layout.dtype.itemsize + _ALIGNED, np.uint8)
    skipped = -raw.ctypes.data % _ALIGNED
    buffer = raw[skipped : skipped + size * layout.dtype.itemsize].view(layout.dtype)
    for end, begin in zip((0, *layout.ends), layout.begins, strict=False):
        if begin > end:
            buffer[end:begin] = 0  # padding travels, too
    spans = zip(layout.begins, layout.ends, layout.shapes, strict=True)
    return [buffer[begin:end].reshape(shape) for begin, end, shape in spans], buffer


def _fill(
    layout: _Layout, buffer: Array, arrays: Sequence[Array], factors: Sequence[float], begin: int, end: int
) -> None:
    """Put the arrays, times their factors, into the buffer from `begin` to `end`; a factor of 0 makes anything 0."""
    for index in range(bisect.bisect_right(layout.ends, begin), len(arrays)):
        first, last = max(begin, layout.begins[index]), min(end, layout.ends[index])
        if layout.begins[index] >= end:
            break
        slot, factor = buffer[first:last], factors[index]
        given = arrays[index][first - layout.begins[index] : last - layout.begins[index]]
        if factor == 1:
            slot[...] = given
        elif factor:
            np.multiply(given, layout.dtype.type(factor), out=slot)
        else:
            slot[...] = 0
