"""DataFrames to TFRecord files and back, through Spark and by themselves; TensorFlow's own classes beside it.

    python tests/benchmarks/tfrecords.py [--rows 1000000]

"By itself" is one core without Spark: Arrow batches in memory to the bytes of a file, and back. TensorFlow writes and
reads the same rows with ``tf.train.Example`` and its own TFRecord writer and reader, record by record in Python.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
from benchmarks.tables import local_spark, print_machine, print_table

from tfos_magic import dfutil
from tfos_magic.tfrecords import decode, encode, frames
from tfos_magic.tfrecords.kinds import Column

BATCH_ROWS = 10_000
SHAPES = {"3 scalars + 4 floats": (4, 1), "3 scalars + 784 floats": (784, 40)}
TYPES = {"a": "double", "b": "bigint", "s": "string", "x": "array<float>"}


def main() -> None:
    """Run both shapes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="narrow rows; wide ones are a fortieth")
    options = parser.parse_args()
    print_machine()
    alone = [[name, *one_core(options.rows // 5 // less, size)] for name, (size, less) in SHAPES.items()]
    header = ("rows", "write, rows/s", "TensorFlow", "read, rows/s", "TensorFlow")
    print_table("by itself, CPU time of one core", [header, *alone])
    spark = local_spark(2, spark_driver_memory="4g")
    through = []
    for name, (size, less) in SHAPES.items():
        for compression in (None, "gzip"):
            through.append(
                [name, compression or "none", *through_spark(spark, options.rows // less, size, compression)]
            )
    print_table("through Spark, two slots", [("rows", "compression", "save, rows/s", "load, rows/s"), *through])
    spark.stop()


def one_core(rows: int, size: int) -> list[str]:
    """Return rows per second of CPU: written and read here and by TensorFlow."""
    batches = [batch(start, min(BATCH_ROWS, rows - start), size) for start in range(0, rows, BATCH_ROWS)]
    columns = [Column.of(name, kind) for name, kind in TYPES.items()]

    def write() -> bytes:
        return b"".join(frames.framed(encode.examples(each)) for each in batches)

    def read() -> list[Any]:
        found = frames.read(io.BytesIO(data), "a file")
        return [decode.columns(records, columns, decode.Place("a file", 0)) for records in found]

    data = write()
    theirs = tensorflow(batches)
    figures = [cpu_s(write), *theirs[:1], cpu_s(read), *theirs[1:]]
    counts = [rows, batches[0].num_rows, rows, batches[0].num_rows]
    return [f"{count / seconds:,.0f}" for count, seconds in zip(counts, figures, strict=True)]


def batch(first: int, rows: int, size: int) -> pa.RecordBatch:
    """Return rows of three scalars and a list."""
    rng = np.random.default_rng(first)
    floats = pa.array(rng.random(rows * size, dtype=np.float32))
    lists = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * size), floats)
    words = pa.array([f"row {first + number}" for number in range(rows)])
    return pa.RecordBatch.from_arrays(
        [pa.array(rng.random(rows)), rng.integers(0, 10**6, rows), words, lists], [*TYPES]
    )


def tensorflow(batches: list[pa.RecordBatch]) -> tuple[float, float]:
    """Return the seconds of CPU that TensorFlow takes to write and to read the first batch."""
    import tensorflow as tf

    rows = batches[0].to_pylist()
    feature, floats = tf.train.Feature, tf.train.FloatList

    def example(row: dict[str, Any]) -> bytes:
        features = {
            "a": feature(float_list=floats(value=[row["a"]])),
            "b": feature(int64_list=tf.train.Int64List(value=[row["b"]])),
            "s": feature(bytes_list=tf.train.BytesList(value=[row["s"].encode()])),
            "x": feature(float_list=floats(value=row["x"])),
        }
        return bytes(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/file"

        def write() -> None:
            with tf.io.TFRecordWriter(path) as writer:
                for row in rows:
                    writer.write(example(row))

        def read() -> None:
            for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
                features = tf.train.Example.FromString(record).features.feature
                _ = [list(getattr(each, each.WhichOneof("kind")).value) for each in features.values()]

        return cpu_s(write), cpu_s(read)


def cpu_s(run: Callable[[], Any]) -> float:
    """Return the least CPU time of five runs."""
    times = []
    for _ in range(5):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def through_spark(spark: Any, rows: int, size: int, compression: str | None) -> list[str]:
    """Return rows per second that are saved from a cached DataFrame, and loaded into nothing."""
    numbers = f"transform(sequence(1, {size}), k -> float(rand()))"
    df = spark.range(0, rows, 1, 4).selectExpr("rand() a", "id b", "concat('row ', id) s", f"{numbers} x").cache()
    df.count()
    best = [float("inf"), float("inf")]
    for _ in range(3):
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            dfutil.saveAsTFRecords(df, f"{directory}/o", compression=compression)
            best[0] = min(best[0], time.perf_counter() - start)
            loaded = dfutil.loadTFRecords(spark, f"{directory}/o", schema="a double, b long, s string, x array<float>")
            start = time.perf_counter()
            loaded.write.format("noop").mode("overwrite").save()
            best[1] = min(best[1], time.perf_counter() - start)
    df.unpersist()
    return [f"{rows / seconds:,.0f}" for seconds in best]


if __name__ == "__main__":
    main()
