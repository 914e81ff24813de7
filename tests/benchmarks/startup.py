"""How long from the cell's start to the first user line on all nodes, and where that time goes.

    python tests/benchmarks/startup.py [--rounds 5] [--nodes 2]

The baseline is taken in the same run: an empty Spark job with as many barrier tasks, and one process that imports
TensorFlow on a machine as busy (N of them at once). Overhead is what remains of our time beyond these two.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

from benchmarks.tables import local_spark, median, print_machine, print_table, spread
from runs import run_cell


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    spark = local_spark(options.nodes + 1)
    print_machine()
    rounds = [one_round(spark, options.nodes) for _ in range(options.rounds + 1)][1:]  # the first one warms up
    table = [("part", "median s", "min-max")]
    for name in rounds[0]:
        values = [figures[name] for figures in rounds]
        table.append((name, f"{median(values):.2f}", spread(values)))
    print_table(f"From the cell's start to the first user line on all of {options.nodes} nodes", table)
    spark.stop()


def one_round(spark: Any, nodes: int) -> dict[str, float]:
    """Return the seconds of each part."""
    context = spark.sparkContext
    began = time.perf_counter()
    context.parallelize(range(nodes), nodes).barrier().mapPartitions(lambda part: part).collect()
    job = time.perf_counter() - began
    began = time.perf_counter()
    importers = [subprocess.Popen([sys.executable, "-c", "import tensorflow"], stderr=-3) for _ in range(nodes)]
    for importer in importers:
        importer.wait()
    alone = time.perf_counter() - began
    result = run_cell(spark, "None", nodes, preload=("tensorflow",))
    timings = result.timings
    slowest_import = max(times["imported"] - times["child"] for times in timings_of_nodes(result))
    return {
        "baseline: empty barrier job": job,
        "baseline: TensorFlow's import, as many processes at once": alone,
        "cell start to agents connected (Spark, spawn, rendezvous)": timings["connected"],
        "TensorFlow's import on the slowest node": slowest_import,
        "all imported to all in the user's function": timings["running"] - timings["imported"],
        "cell start to first user line on all nodes": timings["running"],
        "overhead beyond Spark's job and TensorFlow's import": timings["running"] - job - slowest_import,
        "end of the last function to everything gone": timings["total"] - timings["finished"],
    }


def timings_of_nodes(result: Any) -> list[dict[str, float]]:
    """Return each node's own stamps."""
    return [dict(node.times) for node in result.nodes]


if __name__ == "__main__":
    main()
