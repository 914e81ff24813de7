"""Some rows in order, and the two kinds that there are: columns of a DataFrame, objects of an RDD.

Runs on: executors (child).

==============  ==========================================  =======================================================
                ``items()``                                 ``arrays({column: tensor})``
==============  ==========================================  =======================================================
ArrowRows       tuples in column order, plain values where  the column of that name
                there is only one column
ObjectRows      the objects as they were put in             columns sorted by name; the k-th is ``row[k]``, or what
                                                            the row itself calls so (Row, namedtuple, dict)
==============  ==========================================  =======================================================
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tfos_magic.errors import DataError, UsageError
from tfos_magic.feed import columns

if TYPE_CHECKING:
    import pyarrow as pa

    from tfos_magic.feed.columns import Array


class Rows(Protocol):
    """Some rows in order; they never change."""

    def __len__(self) -> int: ...

    def cut(self, row_count: int) -> tuple[Rows, Rows]:
        """Return the first `row_count` rows and the rest, without copying any."""

    def items(self) -> list[Any]:
        """Return one Python object per row."""

    def arrays(self, mapping: Mapping[str, str]) -> dict[str, Array]:
        """Return tensor name → array ``(n, …)`` for a mapping of column name to tensor name."""


class ArrowRows:
    """Rows of a DataFrame.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
    start, stop : int, optional
        The part of `batch` that counts.
    """

    def __init__(self, batch: pa.RecordBatch | _Chunk, start: int = 0, stop: int | None = None) -> None:
        self._chunk = batch if isinstance(batch, _Chunk) else _Chunk(batch)
        self._start = start
        self._stop = self._chunk.batch.num_rows if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def names(self) -> list[str]:
        """The columns' names."""
        return self._chunk.names

    def cut(self, row_count: int) -> tuple[ArrowRows, ArrowRows]:
        """Return the first `row_count` rows and the rest: views of the same memory."""
        middle = min(self._start + row_count, self._stop)
        return ArrowRows(self._chunk, self._start, middle), ArrowRows(self._chunk, middle, self._stop)

    def items(self) -> list[Any]:
        """Return tuples in column order, or plain values if there is one column."""
        batch = self._chunk.batch.slice(self._start, len(self))
        values = [_python_values(column) for column in batch.columns]
        return values[0] if len(values) == 1 else list(zip(*values, strict=True))

    def arrays(self, mapping: Mapping[str, str]) -> dict[str, Array]:
        """Return tensor name → array; lists of equal lengths become ``(n, k)``, text an object array of str."""
        return {tensor: self._chunk.rows_of(name, self._start, self._stop) for name, tensor in mapping.items()}


class _Chunk:
    """The columns that rows are parts of; each becomes a NumPy array once, however small the parts."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.names: list[str] = list(batch.schema.names)
        self._arrays: dict[str, Array] = {}

    def rows_of(self, name: str, start: int, stop: int) -> Array:
        """Return some rows of a column."""
        array = self._arrays.get(name)
        if array is None:
            if name not in self.names:
                raise columns.unknown_column(name, self.names)
            array = self._arrays[name] = columns.to_numpy(self.batch.column(name))
        if array.dtype == object:  # lists of several lengths: those of these rows may be of one
            return columns.to_numpy(self.batch.column(name).slice(start, stop - start))
        return array[start:stop]


class ObjectRows:
    """Rows of an RDD: any objects.

    Parameters
    ----------
    rows : list
        Not copied, so it must not be changed afterwards.
    start, stop : int, optional
        The part of `rows` that counts.
    """

    def __init__(self, rows: list[Any], start: int = 0, stop: int | None = None) -> None:
        self._rows = rows
        self._start = start
        self._stop = len(rows) if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def cut(self, row_count: int) -> tuple[ObjectRows, ObjectRows]:
        """Return the first `row_count` rows and the rest: parts of the same list."""
        middle = min(self._start + row_count, self._stop)
        return ObjectRows(self._rows, self._start, middle), ObjectRows(self._rows, middle, self._stop)

    def items(self) -> list[Any]:
        """Return the objects."""
        return self._rows[self._start : self._stop]

    def arrays(self, mapping: Mapping[str, str]) -> dict[str, Array]:
        """Return tensor name → array ``(n, …)``: numbers as NumPy types them, everything else as objects.

        Raises
        ------
        UsageError
            `mapping` names a column that the rows do not have.
        DataError
            The rows are not of one form.
        """
        names = sorted(mapping)
        rows = self.items()
        if not rows:
            return joined_arrays([], mapping)
        values = _columns(rows, names)
        return {mapping[name]: _to_numpy(column) for name, column in zip(names, values, strict=True)}


def joined_arrays(parts: Sequence[Rows], mapping: Mapping[str, str]) -> dict[str, Array]:
    """Return what ``arrays`` of all parts one after another would; arrays that the caller may change."""
    import numpy as np

    if not parts:
        return {tensor: np.empty(0) for tensor in mapping.values()}
    # Queues give their rows one by one: these become one part, else each would be an array of its own.
    singles = [part for part in parts if isinstance(part, ObjectRows)]
    if len(singles) == len(parts) > 1:
        return ObjectRows([row for part in singles for row in part.items()]).arrays(mapping)
    if len(parts) == 1:  # the rule: a chunk holds many batches
        return {tensor: array.copy() for tensor, array in parts[0].arrays(mapping).items()}
    found = [part.arrays(mapping) for part in parts]
    return {tensor: _concatenated([each[tensor] for each in found]) for tensor in mapping.values()}


# --- Arrow -------------------------------------------------------------------------------------------------


def _python_values(column: pa.Array) -> list[Any]:
    """Return what Spark's rows would hold; numbers by way of NumPy, several times faster than Arrow's own."""
    from pyarrow import types

    if column.null_count == 0 and (types.is_integer(column.type) or types.is_floating(column.type)):
        numbers: list[Any] = columns.view(column).tolist()
        return numbers
    values: list[Any] = column.to_pylist()
    return values


def _concatenated(arrays: Sequence[Array]) -> Array:
    import numpy as np

    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    # Lists that are of equal lengths inside each part, but not over all parts.
    return _objects([value.tolist() if isinstance(value, np.ndarray) else value for part in arrays for value in part])


# --- objects -----------------------------------------------------------------------------------------------


def _columns(rows: Sequence[Any], names: Sequence[str]) -> list[Sequence[Any]]:
    """Return the values of each named column, one sequence per name."""
    if isinstance(rows[0], Mapping):
        return [_of_mappings(rows, name) for name in names]
    fields, rows = _with_equal_fields(rows)
    places = [fields.index(name) if name in fields else position for position, name in enumerate(names)]
    if not hasattr(rows[0], "__getitem__") or isinstance(rows[0], str | bytes):
        return [_single_values(rows, names)]
    table = _transposed(rows)
    if len(table) < len(names):
        raise UsageError(
            f"input_mapping names {len(names)} columns, {', '.join(names)}; the rows have {len(table)} values.",
            hint="Columns are taken in the order of their sorted names: the k-th name is the k-th value of a row.",
        )
    return [table[place] for place in places]


def _of_mappings(rows: Sequence[Any], name: str) -> Sequence[Any]:
    if name not in rows[0]:
        raise columns.unknown_column(name, list(map(str, rows[0])))
    try:
        return list(map(operator.itemgetter(name), rows))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"Not all of {len(rows):,} rows have the key '{name}', which the first one has.",
            cause=f"{type(error).__name__}: {error}",
            hint="Give every row the same keys before you feed them.",
        ) from error


def _with_equal_fields(rows: Sequence[Any]) -> tuple[list[str], Sequence[Any]]:
    """Return the names that Rows and namedtuples have for their values, with all rows in that order; else none."""
    first = rows[0]
    holder = "__fields__" if hasattr(first, "__fields__") else "_fields"
    fields = list(getattr(first, holder, ())) if isinstance(first, tuple) else []
    if not fields:
        return [], rows
    try:
        found = list(map(operator.attrgetter(holder), rows))
        if found.count(found[0]) == len(found):
            return fields, rows
        orders = [[list(names).index(field) for field in fields] for names in found]
    except (AttributeError, ValueError) as error:
        raise DataError(
            f"Not all of {len(rows):,} rows have the fields of the first one: {', '.join(fields)}.",
            cause=f"{type(error).__name__}: {error}",
            hint="Give every row the same fields before you feed them.",
        ) from error
    return fields, [[row[place] for place in order] for row, order in zip(rows, orders, strict=True)]


def _single_values(rows: Sequence[Any], names: Sequence[str]) -> Sequence[Any]:
    """Return the rows themselves: plain values are rows of one column."""
    if len(names) > 1:
        raise UsageError(
            f"input_mapping names {len(names)} columns, {', '.join(names)}; the rows are single values "
            f"({type(rows[0]).__name__}).",
            hint="Feed tuples with one value per column, in the order of the sorted column names.",
        )
    return rows


def _transposed(rows: Sequence[Any]) -> list[Sequence[Any]]:
    try:
        return list(zip(*rows, strict=True))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{len(rows):,} rows are not of one length: {error}.",
            hint="Give every row one value per column before you feed them.",
        ) from error


def _to_numpy(values: Sequence[Any]) -> Array:
    import numpy as np

    try:
        array = np.array(values)
    except ValueError:  # lists or arrays of differing lengths
        return _objects(values)
    # NumPy's own text has a fixed width, turns 1 into "1" beside text, and cuts trailing zeros off bytes.
    return array if array.dtype.kind in "biufcOmM" else _objects(values, array.shape)


def _objects(values: Sequence[Any], shape: Sequence[int] | None = None) -> Array:
    """Return an object array: ``(n,)`` of the values as they are, or of `shape` where lists are of equal lengths."""
    import numpy as np

    if shape is not None and len(shape) > 1:
        return np.array(values, dtype=object)
    array = np.empty(len(values), object)
    for index, value in enumerate(values):  # all at once, NumPy would look into lists of equal lengths
        array[index] = value
    return array
