"""The Spark tasks: one writes one part file, one reads one file, one looks at a file's first records.

Runs on: executor, in a Python worker, from the shipped package.

What is wrong with the data when a file is written or sampled goes to the driver as a row, and is no failure of the
task: a task that fails is tried again, and would fill the notebook with Java's stacks.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

from tfos_magic.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_Stream: TypeAlias = "contextlib.AbstractContextManager[IO[bytes]]"
_BATCH_BYTES = 16 << 20
_SAMPLE_BLOCK_BYTES = 1 << 18


def write_part(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Write one partition into a file of this attempt's own, and yield its name; the driver gives it its final one.

    Parameters
    ----------
    archive : bytes
        The package; mounted already, so not used here.
    plan : dict
        ``directory``, ``compression``, ``names`` of the features.
    batches : iterator of pyarrow.RecordBatch
    """
    import pyarrow as pa
    from pyspark import TaskContext

    from tfos_magic.tfrecords import files as places

    context = TaskContext.get()
    if context is None:
        raise RuntimeError("write_part runs inside a Spark task only")
    # Unlike attemptNumber, taskAttemptId differs also between a stage and its re-run.
    path = f"{plan['directory']}/{context.partitionId():05d}-{context.taskAttemptId()}"
    files = places.files_for(path)
    problem = ""
    try:
        with files.open(path, "wb") as file, _compressing(file, plan["compression"]) as stream:
            for batch in batches:
                _write(stream, pa.RecordBatch.from_arrays(batch.columns, plan["names"]))
    except DataError as error:
        problem = _as_json(error)
    except BaseException:
        with contextlib.suppress(OSError):
            files.remove(path)
        raise
    yield pa.RecordBatch.from_pydict({"partition": [context.partitionId()], "file": [path], "problem": [problem]})


def _write(stream: IO[bytes], batch: pa.RecordBatch) -> None:
    from tfos_magic.tfrecords import encode, frames

    rows = max(1, batch.num_rows * _BATCH_BYTES // max(batch.nbytes, _BATCH_BYTES))
    for start in range(0, batch.num_rows, rows):
        stream.write(frames.framed(encode.examples(batch.slice(start, rows))))


def _compressing(file: IO[bytes], compression: str | None) -> _Stream:
    if compression is None:
        return contextlib.nullcontext(file)
    # No name and no time in it: the same rows give the same bytes. Level 6 is TensorFlow's.
    return cast("_Stream", gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0, compresslevel=6))


def read_files(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the files whose numbers come in.

    Parameters
    ----------
    archive : bytes
        The package; mounted already, so not used here.
    plan : dict
        ``paths``; ``columns``, each with a Column's fields.
    batches : iterator of pyarrow.RecordBatch
        One column of positions in ``paths``.
    """
    import pyarrow as pa

    from tfos_magic.tfrecords import decode, frames
    from tfos_magic.tfrecords.kinds import Column

    columns = [Column(*fields) for fields in plan["columns"]]
    names = [column.name for column in columns]
    for path in _paths(plan, batches):
        count = 0
        with _open(path) as file:
            for records in frames.read(file, path):
                arrays = decode.columns(records, columns, decode.Place(path, count))
                count += len(records)
                yield pa.RecordBatch.from_arrays(arrays, names)


def sample_files(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield what the first records of files hold, one row of JSON a file.

    Parameters
    ----------
    archive : bytes
        The package; mounted already, so not used here.
    plan : dict
        ``paths``; ``records``, how many of each.
    batches : iterator of pyarrow.RecordBatch
        One column of positions in ``paths``.
    """
    import pyarrow as pa

    for path in _paths(plan, batches):
        summary, problem = "{}", ""
        try:
            summary = json.dumps(_sample(path, plan["records"]))
        except DataError as error:
            problem = _as_json(error)
        yield pa.RecordBatch.from_pydict({"summary": [summary], "problem": [problem]})


def _sample(path: str, record_count: int) -> dict[str, Any]:
    from itertools import chain, islice

    from tfos_magic.tfrecords import frames, summary

    with _open(path) as file:
        batches = frames.read(file, path, _SAMPLE_BLOCK_BYTES)
        records = chain.from_iterable(batches)
        return summary.merged(summary.of(record, path) for record in islice(records, record_count))


def _paths(plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[str]:
    for batch in batches:
        for position in batch.column(0).to_pylist():
            yield plan["paths"][position]


def _open(path: str) -> IO[bytes]:
    from tfos_magic.tfrecords import files as places

    try:
        return places.files_for(path).open(path, "rb")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is not on this executor.",
            cause="The driver sees it; local files must be at the same place on all machines, or it was removed since.",
            hint="Put the files where all machines see them: a shared directory, hdfs:, s3:.",
        ) from error


def _as_json(error: DataError) -> str:
    return json.dumps({"fact": error.fact, "cause": error.cause, "hint": error.hint})
