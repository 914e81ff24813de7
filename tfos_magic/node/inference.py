"""Inference on a node: batches of columns in, columns out, until nobody asks any more.

Runs on: executor, in the child.

The user's function has run once and returned what predicts: a function of one batch, or a Keras model. From then on
each chunk of the queue is cut into batches, and what comes of them goes back to the Spark task that asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import DataError, UsageError
from tfos_magic.feed.rows import ArrowRows

if TYPE_CHECKING:
    import pyarrow as pa

    from tfos_magic.feed.columns import Array
    from tfos_magic.feed.stream import StreamSource

DEFAULT_COLUMN = "prediction"
"""What a single result without a name is called; Spark ML's word."""

# Spark has no unsigned and no half-precision numbers.
_FOR_SPARK = {"uint8": "int16", "uint16": "int32", "uint32": "int64", "uint64": "int64", "float16": "float32"}


def serve(predictor: Any, queue: StreamSource, batch_size: int, features: Sequence[str] | None = None) -> int:
    """Answer questions until the queue has ended; return the number of rows.

    Parameters
    ----------
    predictor : callable or keras.Model
        See :func:`as_function`.
    queue : StreamSource
        Rows of DataFrames.
    batch_size : int
        Rows in a batch at most.
    features : sequence of str, optional
        The columns that a model gets; all by default.

    Raises
    ------
    UsageError, DataError
        The predictor is none, or its results do not fit the rows.
    """
    predict = as_function(predictor, features)
    row_count = 0
    while (item := queue.next_item()) is not None:
        if isinstance(item, ArrowRows):
            for batch in _batches(item, batch_size):
                results = to_batch(predict(arrays_of(batch)), len(batch))
                queue.count_consumed(len(batch))
                _give_back(queue, results)
                row_count += len(batch)
    return row_count


def as_function(predictor: Any, features: Sequence[str] | None) -> Callable[[dict[str, Array]], Any]:
    """Return a function of a batch: column name → array ``(n, …)``.

    A Keras model gets one array if there is one feature column, else a dict by column name.

    Raises
    ------
    UsageError
        `predictor` is neither a function nor a model.
    """
    on_batch = getattr(predictor, "predict_on_batch", None)
    if on_batch is None:
        if callable(predictor):
            return predictor  # type: ignore[no-any-return]
        raise UsageError(
            f"The cell's last value is of type {type(predictor).__name__}; nothing can be predicted with it.",
            hint="End the cell with a function of one batch (def predict(batch): …), or with a Keras model.",
        )

    def predict(batch: dict[str, Array]) -> Any:
        chosen = {name: batch[name] for name in features or batch}
        return on_batch(next(iter(chosen.values())) if len(chosen) == 1 else chosen)

    return predict


def arrays_of(rows: ArrowRows) -> dict[str, Array]:
    """Return column name → array: numbers ``(n,)``, lists of k ``(n, k)``, text as objects."""
    return rows.arrays({name: name for name in rows.names})


def to_batch(results: Any, row_count: int) -> pa.RecordBatch:
    """Return what a predictor gave, as Arrow columns of `row_count` rows.

    Parameters
    ----------
    results : mapping of str to array-like, array-like, pandas.DataFrame, or sequence of array-likes
        Without names the column is ``prediction``, several of them ``prediction_0``, ….
    row_count : int

    Raises
    ------
    DataError
        A column has another number of rows, or no form in Spark.
    """
    import pyarrow as pa

    arrays = {name: _to_arrow(name, values) for name, values in _named(results)}
    for name, array in arrays.items():
        if len(array) != row_count:
            raise DataError(
                f"Result '{name}' has {len(array)} rows, for a batch of {row_count}.",
                cause="A prediction must give one value for each row.",
                hint="Return arrays whose first dimension is the batch's.",
            )
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def _named(results: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(results, Mapping):
        yield from ((str(name), values) for name, values in results.items())
    elif hasattr(results, "columns") and hasattr(results, "iloc"):  # a pandas DataFrame
        yield from ((str(name), results[name].to_numpy()) for name in results.columns)
    elif isinstance(results, (list, tuple)) and results and all(hasattr(each, "shape") for each in results):
        yield from ((f"{DEFAULT_COLUMN}_{index}", values) for index, values in enumerate(results))
    elif results is None:
        raise DataError("The function returned None for a batch.", hint='Return its results: {"score": scores}.')
    else:
        yield DEFAULT_COLUMN, results


def _to_arrow(name: str, values: Any) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    array = np.asarray(values)  # a tensor too
    if array.ndim == 0:
        raise DataError(f"Result '{name}' is a single value, not one for each row.")
    array = array.astype(_FOR_SPARK.get(array.dtype.name, array.dtype), copy=False)
    if array.dtype.kind in "OUS":
        return pa.array(list(values) if array.ndim == 1 else array.tolist())
    flat: pa.Array = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        offsets = np.arange(0, len(flat) + 1, size, dtype=np.int32) if size else np.zeros(array.shape[0] + 1, np.int32)
        flat = pa.ListArray.from_arrays(pa.array(offsets), flat)
    return flat


def _batches(rows: ArrowRows, batch_size: int) -> Iterator[ArrowRows]:
    while len(rows):
        batch, rows = rows.cut(batch_size)
        yield batch


def _give_back(queue: StreamSource, results: pa.RecordBatch) -> None:
    start = 0
    for session, row_count in queue.claim(results.num_rows):
        queue.answer(session, pack(results.slice(start, row_count)), row_count)
        start += row_count


def pack(batch: pa.RecordBatch) -> bytes:
    """Return one batch with its columns' types, as a task unpacks it."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data
