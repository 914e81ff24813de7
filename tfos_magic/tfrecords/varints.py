"""Protobuf's variable-length integers, many at once: seven bits a byte, lowest first, the top bit says "more".

Runs on: executors. The format: https://protobuf.dev/programming-guides/encoding/#varints
"""

from __future__ import annotations

import numpy as np

from tfos_magic.tfrecords.slices import Array, Slices

_LONGEST = 10  # bytes of a negative int64


def encode(values: Array) -> Slices:
    """Return the varint of each int64."""
    bits = values.astype(np.int64, copy=False).view(np.uint64)
    sizes = np.ones(len(bits), np.int64)
    for size in range(1, _LONGEST):
        longer = bits >= np.uint64(1 << (7 * size))
        if not longer.any():
            break
        sizes += longer
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    width = int(sizes.max(initial=1))
    if width == 1:
        return Slices.joined(bits.astype(np.uint8), offsets)
    table = np.empty((len(bits), width), np.uint8)
    for place in range(width):
        table[:, place] = (bits >> np.uint64(7 * place)).astype(np.uint8) & 0x7F
        table[:, place] |= (sizes > place + 1).astype(np.uint8) << 7
    return Slices.joined(table[np.arange(width) < sizes[:, None]], offsets)


def decode(data: Array) -> tuple[Array, Array]:
    """Return the values in `data` as int64, and where each ends; what follows the last complete one is left out.

    Raises
    ------
    ValueError
        A varint is longer than ten bytes.
    """
    ends = np.flatnonzero(data < 0x80) + 1
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
    sizes = ends - starts
    width = int(sizes.max(initial=1))
    if width > _LONGEST:
        raise ValueError(f"a varint of {width} bytes")
    if width == 1:
        return data[: len(ends)].astype(np.int64), ends
    values = np.zeros(len(ends), np.uint64)
    for place in range(width):
        part = data[np.minimum(starts + place, len(data) - 1)].astype(np.uint64) & np.uint64(0x7F)
        values |= np.where(sizes > place, part << np.uint64(7 * place), np.uint64(0))
    return values.view(np.int64), ends


def read_at(data: Array, places: Array) -> tuple[Array, Array]:
    """Read one varint at each place.

    Returns
    -------
    values, ends : ndarray of int64
        Where there is none that fits into a length (five bytes at most), the value is -1.
    """
    values = np.zeros(len(places), np.int64)
    ends = places.astype(np.int64, copy=True)
    more = np.ones(len(places), bool)
    for place in range(5):
        byte = np.take(data, ends, mode="clip").astype(np.int64)
        values |= np.where(more, (byte & 0x7F) << (7 * place), 0)
        ends += more
        more &= byte >= 0x80
        if not more.any():
            break
    values[more | (ends > len(data))] = -1
    return values, ends
