"""Columns that stay behind in a Spark task while a node works on their rows, and meet its results again.

Runs on: executors (Spark's Python workers).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tfos_magic.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class Kept:
    """The rows under way.

    Parameters
    ----------
    names : sequence of str
        Columns to keep.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._waiting: deque[pa.RecordBatch] = deque()

    def passing(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches as they are, and remember what is to be kept of them."""
        for batch in batches:
            if batch.num_rows:
                self._waiting.append(batch.select(self._names))
            yield batch

    def joined(self, results: pa.RecordBatch, row_count: int, schema: pa.Schema) -> pa.RecordBatch:
        """Return the next rows with their results, kept columns first.

        Parameters
        ----------
        results : pyarrow.RecordBatch
        row_count : int
        schema : pyarrow.Schema
            What the results must be; others that a node gives are left out.

        Raises
        ------
        DataError
            The results are not what the schema announces.
        """
        import pyarrow as pa

        kept = pa.Table.from_batches(list(self._take(row_count))).combine_chunks()
        arrays = [pa.concat_arrays(column.chunks) for column in kept.columns]
        arrays += cast(results, schema).columns
        return pa.RecordBatch.from_arrays(arrays, names=[*self._names, *schema.names])

    def _take(self, row_count: int) -> Iterator[pa.RecordBatch]:
        while row_count:
            batch = self._waiting.popleft()
            if batch.num_rows > row_count:
                self._waiting.appendleft(batch.slice(row_count))
                batch = batch.slice(0, row_count)
            row_count -= batch.num_rows
            yield batch


def cast(results: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a node's results in the types of `schema`; others that it gives are left out.

    Raises
    ------
    DataError
        The results are not what the schema announces.
    """
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([_cast(_found(results, field.name), field) for field in schema], schema=schema)


def _found(results: pa.RecordBatch, name: str) -> pa.Array:
    if name not in results.schema.names:
        raise DataError(
            f"The function gives no column '{name}'; it gives {', '.join(results.schema.names)}.",
            cause="Every batch must give the columns that --schema names, or else those that the first rows gave.",
        )
    return results.column(name)


def _cast(array: pa.Array, field: pa.Field) -> pa.Array:
    import pyarrow as pa

    try:
        return array if array.type == field.type else array.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"Result '{field.name}' came as {array.type} and cannot become {field.type}: {error}",
            hint="Give its type with --schema, or return it as that type.",
        ) from error
