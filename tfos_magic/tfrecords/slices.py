"""Many byte strings in one buffer.

Runs on: executors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Slices:
    """Byte strings, as places in a buffer.

    Attributes
    ----------
    data : ndarray of uint8
    starts, ends : ndarray of int64
        Ascending and not overlapping; there may be gaps.
    """

    data: Array
    starts: Array
    ends: Array

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.starts[index] : self.ends[index]].tobytes()

    @property
    def lengths(self) -> Array:
        """Bytes of each."""
        return np.asarray(self.ends - self.starts)

    @classmethod
    def of(cls, strings: pa.Array) -> Slices:
        """Return the byte strings of an Arrow array of (large) strings or binaries without nulls; copies no data."""
        is_large = pa.types.is_large_binary(strings.type) or pa.types.is_large_string(strings.type)
        _, offsets_buffer, data = strings.buffers()
        kind = np.int64 if is_large else np.int32
        if not len(strings):
            return cls.joined(np.empty(0, np.uint8), np.zeros(1, np.int64))
        offsets = np.frombuffer(offsets_buffer, kind, len(strings) + 1, strings.offset * np.dtype(kind).itemsize)
        return cls.joined(np.frombuffer(data or b"", np.uint8), offsets.astype(np.int64, copy=False))

    @classmethod
    def joined(cls, data: Array, offsets: Array) -> Slices:
        """Return the byte strings that `offsets` cut `data` into, as Arrow has them."""
        return cls(data, offsets[:-1], offsets[1:])

    @classmethod
    def from_list(cls, strings: list[bytes]) -> Slices:
        """Return the byte strings of a list."""
        offsets = np.cumsum([0, *map(len, strings)], dtype=np.int64)
        return cls.joined(np.frombuffer(b"".join(strings), np.uint8), offsets)

    def to_arrow(self) -> pa.LargeBinaryArray:
        """Return an Arrow array of them; copies only where there are gaps."""
        count = len(self)
        if not count:
            return pa.array([], pa.large_binary())
        if np.array_equal(self.starts[1:], self.ends[:-1]):
            return _large_binary(self.data, np.append(self.starts, self.ends[-1]))
        # Arrow takes every other one of strings and gaps faster than NumPy gathers bytes.
        offsets = np.stack([self.starts, self.ends], axis=1).ravel()
        return _large_binary(self.data, offsets).take(pa.array(np.arange(0, 2 * count, 2)))

    def packed(self) -> Slices:
        """Return them side by side, with no gaps."""
        return Slices.of(self.to_arrow())

    def content(self) -> Array:
        """Return all their bytes in one array, with no gaps."""
        packed = self.packed()
        return packed.data[packed.starts[0] : packed.ends[-1]] if len(packed) else np.empty(0, np.uint8)


def _large_binary(data: Array, offsets: Array) -> pa.LargeBinaryArray:
    offsets = np.ascontiguousarray(offsets, dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)
