"""What each kind of column becomes: the rules, and Arrow's arrays turned into NumPy's.

Runs on: executors (Spark tasks and children); :func:`choose` on the driver as well.

==========================================  ================================================================
column in Spark                             tensor, for a batch of n rows
==========================================  ================================================================
byte, short, int, long                      int8, int16, int32, int64 ``(n,)``
float                                       float32 ``(n,)``
double                                      float32 ``(n,)``: TensorFlow's default, to which Keras would cast
                                            it anyway; float64 in ``ctx.dataset(raw=True)`` and in ``DataFeed``
decimal                                     as double
boolean                                     bool ``(n,)``
string                                      tf.string ``(n,)``, UTF-8
binary (images, serialized examples)        tf.string ``(n,)``, the bytes as they are
date                                        int32 ``(n,)``, days since 1970-01-01
timestamp, timestamp_ntz                    int64 ``(n,)``, microseconds since 1970-01-01 (UTC)
day-time interval                           int64 ``(n,)``, microseconds
array<T>                                    ``(n, k)`` of T's dtype; k is the first row's length, the same in
                                            every row. Nested arrays: ``(n, k, m)`` and so on
array<T>, named in ``ragged=[…]``           tf.RaggedTensor ``(n, None)`` of T's dtype; inner arrays, if any,
                                            are of equal lengths: ``(n, None, m)``
ML vector, dense or sparse                  as array<float> (``prepare`` converts it inside Spark)
struct, map, variant, null, year interval   DataError that says how to flatten it
null in any used column                     DataError with the column, the count, and how to drop or fill it
==========================================  ================================================================

Lengths are a rule and not a guess from the data at hand: each node sees other rows, and all must build the same model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tfos_magic.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Array: TypeAlias = npt.NDArray[Any]
    # A column of a block: NumPy for numbers of equal shapes, an Arrow array for the rest, which NumPy holds badly.
    Column: TypeAlias = Any

LABEL_NAMES = ("label", "y", "target")
"""Where the label is looked for when it is not named, in this order."""

_LENGTHS_KEY = b"tfos_lengths"
_TEXT = "object"


# --- which columns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The part each column plays."""

    features: tuple[str, ...]
    label: str | None
    weight: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All columns in use: features, then label, then weight."""
        return tuple(dict.fromkeys(n for n in (*self.features, self.label, self.weight) if n is not None))


def choose(
    available: Sequence[str], features: Sequence[str] | None = None, label: str | None = None, weight: str | None = None
) -> Choice:
    """Apply the contract's rules about which column is what.

    Parameters
    ----------
    available : sequence of str
        The columns there are.
    features : sequence of str, optional
        In the order wanted; by default every column that is neither label nor weight.
    label : str, optional
        By default the first of ``label``, ``y``, ``target`` that exists and is not a feature, else there is none.
    weight : str, optional
        Column of sample weights.

    Raises
    ------
    UsageError
        If a name is unknown, or no feature is left.
    """
    for name in (*(features or ()), *([label] if label else ()), *([weight] if weight else ())):
        if name not in available:
            raise unknown_column(name, available)
    if label is None:
        label = next((n for n in LABEL_NAMES if n in available and n not in (features or ()) and n != weight), None)
    chosen = tuple(features or (n for n in available if n not in (label, weight)))
    if not chosen:
        raise UsageError(
            f"The DataFrame has no feature column: its only columns are {', '.join(available) or 'none at all'}.",
            hint="Add the feature columns to the DataFrame, or name other ones with --features and --label.",
        )
    return Choice(chosen, label, weight)


def unknown_column(name: str, available: Sequence[str]) -> UsageError:
    """Return the error for a column that is not there, with the likeliest name that is."""
    close = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    by_case = [candidate for candidate in available if candidate.lower() == name.lower()]
    guess = next(iter(by_case or close), None)
    return UsageError(
        f"There is no column '{name}' among the {len(available)} columns: {', '.join(available)}.",
        hint=f"Did you mean '{guess}'?" if guess else "",
    )


# --- in the sender ------------------------------------------------------------------------------------------


def describe(schema: pa.Schema) -> str:
    """Return names and types in one line; equal for equal columns, whatever their metadata."""
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def with_list_lengths(batch: pa.RecordBatch) -> pa.Schema:
    """Return the batch's schema with the first row's list lengths noted in each field's metadata."""
    import pyarrow as pa

    fields = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        lengths = json.dumps(_first_lengths(column)).encode()
        fields.append(field.with_metadata({_LENGTHS_KEY: lengths}))
    return pa.schema(fields)


def without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch with dictionary-encoded columns written out, so that each message stands alone."""
    import pyarrow as pa

    if not any(pa.types.is_dictionary(kind) for kind in batch.schema.types):
        return batch
    plain = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(plain, names=batch.schema.names)


def refuse_nulls(batch: pa.RecordBatch, feed_name: str) -> None:
    """Raise DataError for the first column that holds a null, also inside a list."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        _refuse_nulls(column, name, feed_name)


def _refuse_nulls(column: pa.Array, name: str, feed_name: str) -> None:
    rows, inside, values = len(column), "", column
    while True:
        if values.null_count:
            raise DataError(
                f"Column '{name}' of feed '{feed_name}' holds {values.null_count:,} nulls{inside} in {rows:,} rows.",
                cause="A tensor has no null.",
                hint=_null_hint(name, is_inside=bool(inside)),
            )
        if not _is_list(values.type):
            return
        values, inside = values.flatten(), " inside its lists"


def _null_hint(name: str, *, is_inside: bool) -> str:
    if is_inside:
        return (
            f'Drop them: df.withColumn("{name}", F.filter("{name}", lambda v: v.isNotNull())), or fill them likewise.'
        )
    return f'Drop those rows: df.dropna(subset=["{name}"]), or fill them: df.fillna({{"{name}": 0}}).'


def _first_lengths(column: pa.Array) -> list[int]:
    lengths = []
    while _is_list(column.type):
        first = column[0].as_py() if len(column) else None
        lengths.append(len(first or ()))
        column = column.flatten()
    return lengths


# --- in the child -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnSpec:
    """What one column becomes.

    Attributes
    ----------
    name, feed_name : str
    dtype : str
        NumPy's name; ``object`` stands for bytes and becomes tf.string.
    lengths : tuple of int
        Static lengths of the list levels below the rows; without the outermost one if that is ragged.
    is_ragged : bool
        Whether the outermost list level varies in length.
    """

    name: str
    feed_name: str
    dtype: str
    lengths: tuple[int, ...] = ()
    is_ragged: bool = False

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of one row."""
        return (None, *self.lengths) if self.is_ragged else self.lengths

    @property
    def is_numpy(self) -> bool:
        """Whether a block keeps the column as a NumPy array."""
        return not self.is_ragged and self.dtype != _TEXT


@dataclass(frozen=True)
class Ragged:
    """Rows of differing lengths: row i is ``values[row_splits[i]:row_splits[i + 1]]``."""

    values: Array
    row_splits: Array


def column_specs(
    schema: pa.Schema, feed_name: str, *, ragged: Iterable[str] = (), keep_float64: bool = False
) -> dict[str, ColumnSpec]:
    """Apply the module's table to a feed's schema.

    Parameters
    ----------
    schema : pyarrow.Schema
        With the first row's list lengths, as the sender notes them.
    feed_name : str
    ragged : iterable of str
        Array columns whose rows differ in length.
    keep_float64 : bool
        Leave doubles as they are.

    Raises
    ------
    DataError
        If a column has no tensor form.
    UsageError
        If `ragged` names no column, or one that holds no arrays.
    """
    wanted = set(ragged)
    for name in sorted(wanted):
        if name not in schema.names:
            raise unknown_column(name, schema.names)
        if not _is_list(schema.field(name).type):
            raise UsageError(f"ragged names column '{name}', which holds no arrays but {schema.field(name).type}.")
    return {field.name: _spec(field, feed_name, field.name in wanted, keep_float64) for field in schema}


def _spec(field: pa.Field, feed_name: str, is_ragged: bool, keep_float64: bool) -> ColumnSpec:
    kind = field.type
    while _is_list(kind):
        kind = kind.value_type
    dtype = _dtype(kind)
    if dtype is None:
        raise _no_tensor(field.name, feed_name, kind)
    if dtype == "float64" and not keep_float64:
        dtype = "float32"
    lengths = json.loads((field.metadata or {}).get(_LENGTHS_KEY, b"[]"))
    return ColumnSpec(field.name, feed_name, dtype, tuple(lengths[1:] if is_ragged else lengths), is_ragged)


def _dtype(kind: pa.DataType) -> str | None:
    """Return the NumPy name of what a scalar type becomes, None if it has no tensor form."""
    from pyarrow import types

    if types.is_integer(kind) or types.is_floating(kind):
        return str(kind.to_pandas_dtype().__name__)
    if types.is_boolean(kind):
        return "bool"
    if types.is_decimal(kind):
        return "float64"
    if _is_text(kind):
        return _TEXT
    if types.is_date(kind):
        return "int32"
    return "int64" if types.is_timestamp(kind) or types.is_duration(kind) else None


def _no_tensor(name: str, feed_name: str, kind: pa.DataType) -> DataError:
    from pyarrow import types

    if types.is_struct(kind):
        hint = f'Take its fields out: df.select("*", "{name}.*").drop("{name}").'
    elif types.is_map(kind):
        hint = f'Take values out by key: df.withColumn("a", df["{name}"]["a"]).drop("{name}").'
    else:
        hint = f'Cast or drop it: df.withColumn("{name}", df["{name}"].cast("double")), df.drop("{name}").'
    return DataError(f"Column '{name}' of feed '{feed_name}' has the type {kind}, which has no tensor form.", hint=hint)


def extract(batch: pa.RecordBatch, spec: ColumnSpec) -> Column:
    """Return one column of a chunk, decoded and checked.

    Returns
    -------
    numpy.ndarray
        ``(n, *spec.lengths)``, still in the stored dtype; a view of the chunk where that is possible.
    pyarrow.Array
        If ``spec.is_numpy`` is False.

    Raises
    ------
    DataError
        If there are nulls, or lists of differing lengths.
    """
    column = batch.column(spec.name)
    if column.null_count or _is_list(column.type):
        _refuse_nulls(column, spec.name, spec.feed_name)
    values = column
    if spec.is_ragged:
        values = values.flatten()
    for length in spec.lengths:
        values = _equal_lists(values, length, spec)
    return _numbers(values).reshape(len(column), *spec.lengths) if spec.is_numpy else column


def join(parts: Sequence[Column], spec: ColumnSpec) -> Column:
    """Return the parts one after another; numbers in the spec's dtype and contiguous, without a copy if they are."""
    import numpy as np
    import pyarrow as pa

    if not spec.is_numpy:
        return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0], dtype=spec.dtype)
    return np.concatenate(parts, dtype=spec.dtype, casting="same_kind")


def pick(column: Column, rows: slice | Array) -> Column:
    """Return those rows: a view for a slice, a copy for an array of indices."""
    import numpy as np

    if isinstance(column, np.ndarray):
        return column[rows] if isinstance(rows, slice) else _take(column, rows)
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(len(column))
        return column.slice(start, stop - start)
    import pyarrow as pa

    return column.take(pa.array(rows))


def finish(column: Column, spec: ColumnSpec) -> Array | Ragged:
    """Turn rows of a block into what TensorFlow takes: an array ``(n, *spec.lengths)``, or a :class:`Ragged`."""
    import numpy as np

    if spec.is_numpy:
        array: Array = column
        return array
    row_count, values, splits = len(column), column, None
    if spec.is_ragged:
        splits = values.offsets.to_numpy().astype(np.int64)
        splits -= splits[0]
    while _is_list(values.type):
        values = values.flatten()
    flat = _bytes(values) if spec.dtype == _TEXT else _numbers(values).astype(spec.dtype, copy=False)
    if splits is None:
        return flat.reshape(row_count, *spec.lengths)
    return Ragged(flat.reshape(splits[-1], *spec.lengths), splits)


def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch of 0 rows."""
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def to_numpy(column: pa.Array) -> Array:
    """Return a column as one array for ``DataFeed``: lists of equal lengths as rows, whatever else as objects."""
    import numpy as np

    if column.null_count == 0 and _dtype(column.type) not in (None, _TEXT):
        return _numbers(column)
    if _is_list(column.type) and column.null_count == 0 and len(column):
        inner = to_numpy(column.flatten())
        lengths = _lengths(column)
        if inner.dtype != object and (lengths == lengths[0]).all():
            return inner.reshape(len(column), int(lengths[0]), *inner.shape[1:])
    objects = np.empty(len(column), object)
    objects[:] = column.to_pylist()
    return objects


def _take(column: Array, rows: Array) -> Array:
    """Take rows into memory that starts where TensorFlow wants it, which saves a copy."""
    import numpy as np

    out = aligned_empty((len(rows), *column.shape[1:]), column.dtype)
    return np.take(column, rows, axis=0, out=out, mode="clip")  # "clip": numpy buffers `out` otherwise


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised array whose data starts on a 64-byte boundary."""
    import numpy as np

    size_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size_bytes].view(dtype).reshape(shape)


def _equal_lists(lists: pa.Array, length: int, spec: ColumnSpec) -> pa.Array:
    """Return the lists' values, having made sure that every list has `length` of them."""
    lengths = _lengths(lists)
    wrong = lengths != length
    if wrong.any():
        raise DataError(
            f"Column '{spec.name}' of feed '{spec.feed_name}' holds lists of different lengths: {length} in the first "
            f"row, but {wrong.sum():,} of {len(lists):,} rows differ, e.g. one of {lengths[wrong][0]}.",
            cause="A tensor needs rows of one shape.",
            hint=f"Make them equal in Spark, or take them as they are: ctx.dataset(…, ragged=[{spec.name!r}]).",
        )
    return lists.flatten()


def _lengths(lists: pa.Array) -> Array:
    import numpy as np
    import pyarrow as pa

    if pa.types.is_fixed_size_list(lists.type):
        return np.full(len(lists), lists.type.list_size)
    return np.diff(view(lists.offsets))


def _numbers(values: pa.Array) -> Array:
    """Return a scalar column without nulls as NumPy array, in the stored dtype; a view where that is possible."""
    import pyarrow as pa
    from pyarrow import types

    kind = values.type
    if types.is_boolean(kind):
        return _copied(values)
    if types.is_decimal(kind):
        values = values.cast(pa.float64())
    elif types.is_date(kind):
        values = values.cast(pa.date32()).view(pa.int32())
    elif types.is_timestamp(kind):
        values = values.cast(pa.timestamp("us", kind.tz), safe=False).view(pa.int64())
    elif types.is_duration(kind):
        values = values.cast(pa.duration("us"), safe=False).view(pa.int64())
    return view(values)


def _bytes(values: pa.Array) -> Array:
    import pyarrow as pa

    if pa.types.is_string(values.type):
        values = values.cast(pa.binary())
    elif pa.types.is_large_string(values.type):
        values = values.cast(pa.large_binary())
    return _copied(values)


def view(numbers: pa.Array) -> Array:
    """Return numbers without nulls as a NumPy array over the same memory.

    Arrow's own ``to_numpy`` does it too, but imports pandas first, which takes longer than a whole small feed.
    """
    import numpy as np

    data, dtype = numbers.buffers()[1], np.dtype(numbers.type.to_pandas_dtype())
    if data is None:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, len(numbers), numbers.offset * dtype.itemsize)


def _copied(values: pa.Array) -> Array:
    array: Array = values.to_numpy(zero_copy_only=False)
    return array


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
    )
