"""Where the feed's time goes, without Spark: sender → receiver, and cache → batches.

    python tests/benchmarks/feed_parts.py [--rows 2000000]

One sender deals to two nodes in the same process. Batches are counted inside TensorFlow (``Dataset.reduce``, which
itself costs about 25 µs per batch on two 2020s cores), so that Python's own iteration is not measured. CPU time is that
of the whole process.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
from benchmarks.tables import print_machine, print_table
from feed_cluster import FakeCluster, fake_cluster

WIDE_COLUMNS = 784
BATCH_ROWS = 10_000


def main() -> None:
    """Run both shapes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000, help="narrow rows; wide ones are a fortieth")
    options = parser.parse_args()
    print_machine()
    transport, reading = [], []
    for name, make, rows, sizes in [
        ("4 doubles + label", narrow, options.rows, (64, 1024, 8192)),
        ("784 floats + label", wide, options.rows // 40, (128,)),
    ]:
        with tempfile.TemporaryDirectory() as directory, fake_cluster(2, Path(directory)) as cluster:
            transport.append([name, *figures(lambda c=cluster, m=make, r=rows: feed(c, m, r))])
            for batch_size in sizes:
                for shuffle in (False, True):
                    run = reader(cluster, batch_size, shuffle)
                    run()  # joins the columns, traces the graph
                    order = "shuffled" if shuffle else "in order"
                    reading.append([name, str(batch_size), order, *figures(run)])
    print_table("sender → receiver", [("rows", "rows/s", "CPU ns per row"), *transport])
    print_table("cache → batches", [("rows", "batch", "order", "rows/s", "CPU ns per row"), *reading])


def narrow(first: int) -> pa.RecordBatch:
    """Return a batch as Spark makes it."""
    numbers = np.random.default_rng(first).random((4, BATCH_ROWS))
    return pa.RecordBatch.from_arrays([*map(pa.array, numbers), pa.array(np.arange(BATCH_ROWS))], names=[*"abcd", "y"])


def wide(first: int) -> pa.RecordBatch:
    """Return a batch of 784-float rows."""
    values = np.random.default_rng(first).random(BATCH_ROWS * WIDE_COLUMNS, np.float32)
    offsets = np.arange(BATCH_ROWS + 1, dtype=np.int32) * WIDE_COLUMNS
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    return pa.RecordBatch.from_arrays([lists, pa.array(np.arange(BATCH_ROWS))], names=["x", "y"])


def feed(cluster: FakeCluster, make: Callable[[int], pa.RecordBatch], rows: int) -> int:
    """Send the rows in partitions of ten batches; the same batch again and again, so that making it costs nothing."""
    batch = make(0)
    count = rows // BATCH_ROWS
    for partition, first in enumerate(range(0, count, 10)):
        cluster.feed([batch] * min(10, count - first), partition)
    cluster.end()
    return count * BATCH_ROWS


def reader(cluster: FakeCluster, batch_size: int, shuffle: bool) -> Callable[[], int]:
    """Return a function that reads one epoch of the first node and counts its rows."""
    import tensorflow as tf

    from tfos_magic.feed.dataset import make_dataset

    dataset = make_dataset(cluster.nodes[0].train, batch_size=batch_size, shuffle=shuffle)

    @tf.function
    def count() -> Any:
        return dataset.reduce(np.int64(0), lambda rows, batch: rows + tf.shape(batch[1], tf.int64)[0])

    return lambda: int(count())


def figures(run: Callable[[], int]) -> tuple[str, str]:
    """Return rows per second and CPU nanoseconds per row."""
    began, cpu = time.monotonic(), _cpu_s()
    rows = run()
    took, used = time.monotonic() - began, _cpu_s() - cpu
    return f"{rows / took:,.0f}", f"{used / rows * 1e9:,.0f}"


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
