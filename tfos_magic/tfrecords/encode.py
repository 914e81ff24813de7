"""Arrow columns to serialized Examples, a whole batch at a time.

Runs on: executors.

A record is pieces, one after the other, and each piece of all records is one Arrow column:

    header of features │ header of "age" │ its values │ header of "name" │ its values │ …

The values are the columns' own buffers, cut at other offsets. A header depends on nothing but the length of the values
after it, so few of them are made. Arrow joins the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tfos_magic.errors import DataError
from tfos_magic.tfrecords import varints
from tfos_magic.tfrecords.example import NUMBERS, header, message
from tfos_magic.tfrecords.kinds import BYTES, FLOAT, INT64
from tfos_magic.tfrecords.slices import Array, Slices

_ABSENT = -1


def examples(batch: pa.RecordBatch) -> Slices:
    """Return each row as a serialized ``tf.train.Example``.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        Columns of the types in :mod:`tfos_magic.tfrecords.kinds`.

    Raises
    ------
    DataError
        An array has a null in it.
    """
    pieces: list[pa.LargeBinaryArray] = []
    sizes = np.zeros(batch.num_rows, np.int64)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for piece in _feature(name, column):
            pieces.append(piece.to_arrow())
            sizes += piece.lengths
    start = _headers(sizes, lambda size: header(1, size)).to_arrow()
    return Slices.of(join([start, *pieces]))


def join(columns: Sequence[pa.LargeBinaryArray]) -> pa.LargeBinaryArray:
    """Return the byte strings of all columns, joined row by row."""
    return pc.binary_join_element_wise(*columns, pa.scalar(b"", pa.large_binary()))


def _feature(name: str, column: pa.Array) -> tuple[Slices, Slices]:
    """Return header and values of a feature, both empty where it is null."""
    values, counts, is_there = _flat(name, column)
    kind = _kind_of(values.type)
    data, offsets = _ENCODERS[kind](values)
    content = Slices.joined(data, offsets[np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])])
    sizes = np.where(is_there, content.lengths, _ABSENT)
    return _headers(sizes, lambda size: _feature_header(name, kind, size)), content


def _flat(name: str, column: pa.Array) -> tuple[pa.Array, Array, Array]:
    """Return the values of all rows, how many each row has, and which rows are not null."""
    is_there = column.is_valid().to_numpy(zero_copy_only=False)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return column.drop_null(), is_there.astype(np.int64), is_there
    counts = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = column.flatten()
    if values.null_count:
        place = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(np.cumsum(counts), place, side="right"))
        raise DataError(
            f"Column '{name}' has {values.null_count} nulls inside its arrays, the first of them in "
            f"{column[row].as_py()!s:.100}.",
            cause="A TensorFlow feature has no place for a null among its values.",
            hint=f"Leave them out: df.withColumn('{name}', F.array_compact('{name}')), or fill them with F.transform.",
        )
    return values, counts, is_there


def _kind_of(value_type: pa.DataType) -> str:
    if pa.types.is_floating(value_type):
        return FLOAT
    return INT64 if pa.types.is_integer(value_type) or pa.types.is_boolean(value_type) else BYTES


def _floats(values: pa.Array) -> tuple[Array, Array]:
    data = values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False).astype("<f4", copy=False)
    return np.ascontiguousarray(data).view(np.uint8), np.arange(0, 4 * len(values) + 1, 4)


def _integers(values: pa.Array) -> tuple[Array, Array]:
    return _joined(varints.encode(values.cast(pa.int64()).to_numpy(zero_copy_only=False)))


def _strings(values: pa.Array) -> tuple[Array, Array]:
    strings = Slices.of(values)
    heads = _headers(strings.lengths, lambda size: header(1, size))
    return _joined(Slices.of(join([heads.to_arrow(), strings.to_arrow()])))


def _joined(strings: Slices) -> tuple[Array, Array]:
    return strings.data, np.append(strings.starts, strings.ends[-1:]) if len(strings) else np.zeros(1, np.int64)


_ENCODERS: dict[str, Callable[[pa.Array], tuple[Array, Array]]] = {
    FLOAT: _floats,
    INT64: _integers,
    BYTES: _strings,
}


def _headers(sizes: Array, make: Callable[[int], bytes]) -> Slices:
    """Return what `make` returns for each size; it is called once for each different one."""
    distinct, which = np.unique(sizes, return_inverse=True)
    made = pa.array([b"" if size == _ABSENT else make(size) for size in distinct.tolist()], pa.large_binary())
    return Slices.of(made.take(pa.array(which)))


def _feature_header(name: str, kind: str, size: int) -> bytes:
    """Return all that stands before `size` bytes of values."""
    values = b"" if kind == BYTES or not size else header(1, size)
    start = header(NUMBERS[kind], len(values) + size) + values
    start = message(1, name.encode()) + header(2, len(start) + size) + start
    return header(1, len(start) + size) + start
