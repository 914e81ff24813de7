"""TensorFlowOnSpark's ``DataFeed`` over a feed.

Runs on: executors (child).

Names and meaning are those of TensorFlowOnSpark's documentation (``TFNode.DataFeed``), with three things better:
rows come by the chunk and not one remote call each; :meth:`DataFeed.should_stop` knows the end before an empty batch
has been handed out; ``input_mapping`` gives NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tfos_magic.errors import UsageError
from tfos_magic.feed import columns
from tfos_magic.feed.source import FeedSource

if TYPE_CHECKING:
    import pyarrow as pa

    from tfos_magic.feed.columns import Array


class FeedManager(Protocol):
    """What ``DataFeed`` needs of ``ctx.mgr``."""

    @property
    def epochs(self) -> int:
        """How often the rows are repeated."""

    def get(self, name: str) -> FeedSource:
        """Return a feed by name; ``input`` means ``train``."""

    def put_results(self, name: str, results: Sequence[Any]) -> None:
        """Take results of inference, for queue `name`."""

    def terminate(self, name: str) -> None:
        """Take note that this node wants no more of feed `name`."""


class DataFeed:
    """Hands out the rows that Spark feeds to this node.

    Parameters
    ----------
    mgr : FeedManager
        ``ctx.mgr``.
    train_mode : bool
        True when only reading; False when results are given back as well.
    qname_in, qname_out : str
        Feed to read (``input`` is the training data) and queue for the results.
    input_mapping : mapping of str to str, optional
        Column name → tensor name. With it, batches are dicts of arrays.
    """

    def __init__(
        self,
        mgr: FeedManager,
        train_mode: bool = True,
        qname_in: str = "input",
        qname_out: str = "output",
        input_mapping: Mapping[str, str] | None = None,
    ) -> None:
        self.mgr = mgr
        self.train_mode = train_mode
        self.qname_in = qname_in
        self.qname_out = qname_out
        self.input_mapping = input_mapping
        self._source = mgr.get(qname_in)
        self._is_terminated = False
        self._epochs_left = max(1, mgr.epochs)
        self._next_chunk = 0
        self._chunk: _Rows | None = None

    def next_batch(self, batch_size: int) -> list[Any] | dict[str, Array]:
        """Return the next rows; waits for Spark where need be.

        Parameters
        ----------
        batch_size : int

        Returns
        -------
        list
            Of tuples in column order, or of plain values if there is one column.
        dict of str to numpy.ndarray
            With `input_mapping`: tensor name → ``(n, …)``; text is an object array of str.

        Both are shorter than `batch_size` only when the last epoch's rows are used up.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be at least 1.")
        parts = list(self._take(batch_size))
        self._source.count_consumed(sum(len(part) for part in parts))
        if self.input_mapping is not None:
            return self._arrays(parts)
        return [row for part in parts for row in part.tuples()]

    def should_stop(self) -> bool:
        """Return whether no row is left; waits until Spark has delivered one or has ended."""
        return not self._has_rows()

    def batch_results(self, results: Sequence[Any]) -> None:
        """Give results of inference back to Spark, one per row of the last batch."""
        self.mgr.put_results(self.qname_out, results)

    def terminate(self) -> None:
        """Want no more rows: :meth:`should_stop` is true from now on."""
        self._is_terminated = True
        self._chunk = None
        self.mgr.terminate(self.qname_in)

    def _take(self, row_count: int) -> Iterator[_Rows]:
        while row_count and self._has_rows():
            assert self._chunk is not None  # for mypy: _has_rows has seen to it
            part, self._chunk = self._chunk.cut(row_count)
            row_count -= len(part)
            yield part

    def _has_rows(self) -> bool:
        """Return whether a chunk with rows is at hand, getting the next one if there is any."""
        while not self._is_terminated and not self._chunk:
            if self._source.has_more(self._next_chunk):
                (batch,) = self._source.next_chunks(self._next_chunk, limit_bytes=1)
                self._next_chunk += 1
                self._chunk = _Rows(batch)
            elif self._next_chunk == 0 or self._epochs_left == 1:
                return False
            else:
                self._epochs_left -= 1
                self._next_chunk = 0
        return not self._is_terminated

    def _arrays(self, parts: Sequence[_Rows]) -> dict[str, Array]:
        import numpy as np

        mapping = self.input_mapping or {}
        if not parts:
            return {tensor: np.empty(0) for tensor in mapping.values()}
        return {tensor: np.concatenate([part.array(name) for part in parts]) for name, tensor in mapping.items()}


class _Rows:
    """Some rows of a chunk."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def cut(self, row_count: int) -> tuple[_Rows, _Rows]:
        """Return the first `row_count` rows and the rest."""
        return _Rows(self._batch.slice(0, row_count)), _Rows(self._batch.slice(min(row_count, len(self))))

    def tuples(self) -> list[Any]:
        values = [_python_values(column) for column in self._batch.columns]
        return values[0] if len(values) == 1 else list(zip(*values, strict=True))

    def array(self, name: str) -> Array:
        if name not in self._batch.schema.names:
            raise columns.unknown_column(name, self._batch.schema.names)
        array: Array = columns.to_numpy(self._batch.column(name))
        return array


def _python_values(column: pa.Array) -> list[Any]:
    """Return what Spark's rows would hold; numbers by way of NumPy, several times faster than Arrow's own."""
    from pyarrow import types

    if column.null_count == 0 and (types.is_integer(column.type) or types.is_floating(column.type)):
        numbers: list[Any] = column.to_numpy(zero_copy_only=True).tolist()
        return numbers
    values: list[Any] = column.to_pylist()
    return values
