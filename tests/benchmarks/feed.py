"""How fast rows reach a model: ``ctx.dataset`` against bare ``mapInArrow`` that drops its input, in one run.

    python tests/benchmarks/feed.py [--rounds 5] [--rows 4000000] [--wide-rows 300000]

Both read the same cached DataFrame with the same tasks; pairs are run in turn, and the ratio is taken pair by pair.
The feed's time runs from the start of its Spark job until every node has iterated over all of its batches.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

from benchmarks.tables import local_spark, median, print_machine, print_table, spread
from runs import start_cell

from tfos_magic.feed.prepare import prepare
from tfos_magic.status import NodeChanged, NodeState, StatusBoard

READ = """
import time, numpy as np
dataset = ctx.dataset(shuffle=False)
rows = 0
for x, y in dataset:
    rows += int(y.shape[0])
first_pass = time.time()
again = sum(int(y.shape[0]) for x, y in dataset)
rows, first_pass, time.time() - first_pass
"""
WIDE_COLUMNS = 784


def main() -> None:
    """Run both shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4_000_000, help="narrow rows; 0 leaves them out")
    parser.add_argument("--wide-rows", type=int, default=300_000, help="0 leaves them out")
    parser.add_argument("--nodes", type=int, default=1)
    options = parser.parse_args()
    spark = local_spark(3, spark_driver_memory="6g", spark_sql_execution_arrow_maxRecordsPerBatch="10000")
    print_machine()
    table = [("rows", "batch", "mapInArrow rows/s", "ctx.dataset rows/s", "MB/s", "ratio", "min-max", "cached rows/s")]
    shapes = ((narrow, options.rows), (wide, options.wide_rows))
    for name, frame, row_bytes in (make(spark, rows) for make, rows in shapes if rows):
        frame = frame.cache()
        total = frame.count()
        for batch_size in (128, 1024):
            table.append(measure(spark, name, frame, total, row_bytes, batch_size, options))
        frame.unpersist()
    print_table("Feed", table)
    spark.stop()


def narrow(spark: Any, rows: int) -> tuple[str, Any, int]:
    """Return rows of 4 floats and a label."""
    columns = [f"cast(rand({seed}) as float) as f{seed}" for seed in range(4)]
    return (
        "4 floats + label",
        spark.range(rows, numPartitions=16).selectExpr(*columns, "cast(id % 10 as int) as label"),
        20,
    )


def wide(spark: Any, rows: int) -> tuple[str, Any, int]:
    """Return rows of one array of 784 floats and a label."""
    pixels = f"transform(sequence(1, {WIDE_COLUMNS}), i -> cast((id * i) % 255 as float)) as pixels"
    frame = spark.range(rows, numPartitions=16).selectExpr(pixels, "cast(id % 10 as int) as label")
    return "784 floats + label", frame, WIDE_COLUMNS * 4 + 4


def measure(
    spark: Any, name: str, frame: Any, total: int, row_bytes: int, batch_size: int, options: argparse.Namespace
) -> tuple[str, ...]:
    """Return one line of the table."""
    bare, fed, cached = [], [], []
    drop(frame)  # starts the Python workers
    for _ in range(options.rounds):
        bare.append(total / timed(lambda: drop(frame)))
        seconds, again = feed(spark, frame, total, batch_size, options.nodes)
        fed.append(total / seconds)
        cached.append(total / again)
    ratios = [ours / theirs for ours, theirs in zip(fed, bare, strict=True)]
    megabytes = median(fed) * row_bytes / 1e6
    figures = (f"{median(bare):,.0f}", f"{median(fed):,.0f}", f"{megabytes:,.0f}", f"{median(ratios):.2f}")
    return (name, str(batch_size), *figures, spread(ratios), f"{median(cached):,.0f}")


def drop(frame: Any) -> None:
    """Send everything through a Python function that looks at nothing."""

    def nothing(batches: Iterator[Any]) -> Iterator[Any]:
        for _ in batches:
            pass
        yield from ()

    frame.mapInArrow(nothing, "x int").collect()


def timed(action: Callable[[], object]) -> float:
    """Return how many seconds `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def feed(spark: Any, frame: Any, total: int, batch_size: int, nodes: int) -> tuple[float, float]:
    """Return seconds from the feed's start to the last node's last batch, and of a second pass from the cache."""
    waiting: set[str] = set()
    all_wait = threading.Event()

    def note(event: Any) -> None:
        if isinstance(event, NodeChanged) and event.state is NodeState.WAITING:
            waiting.add(event.node)
            if len(waiting) == nodes:
                all_wait.set()

    running = start_cell(spark, READ, nodes, feeds=("train",), batch_size=batch_size, on_event=note)
    with contextlib.closing(running):
        all_wait.wait(120)  # TensorFlow is imported, the function waits for its first batch
        began = time.time()
        running.feed("train", prepare(frame))
        running.wait()
    values = running.result(StatusBoard()).values
    assert sum(rows for rows, _, _ in values) == total
    return max(end for _, end, _ in values) - began, max(again for *_, again in values)


if __name__ == "__main__":
    main()
