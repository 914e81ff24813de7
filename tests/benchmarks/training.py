"""Samples per second of Keras ``fit`` on 1 and 2 nodes, against the same ``fit`` in one plain process.

    python tests/benchmarks/training.py [--rounds 3] [--rows 60000]

A dense model 784-256-10, batch 128 per node, rows from memory in all three cases, so that only training is timed; the
figure is that of the best epoch after the first, which compiles. On a machine of two cores two nodes share what the
plain process has for itself: 1.0 is then the most that can be expected of a CPU-bound model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

from benchmarks.tables import local_spark, median, print_machine, print_table, spread
from runs import run_cell

FIT = """
import time, numpy as np, keras
keras.utils.set_random_seed(1)
x = np.random.default_rng(0).random((args.rows, 784), dtype="float32")
y = (x.sum(axis=1) * 10).astype("int32") % 10
model = keras.Sequential([keras.Input((784,)), keras.layers.Dense(256, "relu"), keras.layers.Dense(10, "softmax")])
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
if ctx is not None:
    ctx.distribute(model)
class Clock(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()
    def on_epoch_end(self, epoch, logs=None):
        seconds.append(time.perf_counter() - self.began)
seconds = []
model.fit(x, y, batch_size=128, epochs=4, verbose=0, callbacks=[Clock()])
args.rows / min(seconds[1:])
"""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=60_000)
    options = parser.parse_args()
    spark = local_spark(3)
    print_machine()
    plain, one, two = [], [], []
    for _ in range(options.rounds):
        plain.append(plain_fit(options.rows))
        one.append(sum(on_nodes(spark, 1, options.rows)))
        two.append(sum(on_nodes(spark, 2, options.rows // 2)))
    table = [("fit", "samples/s", "ratio to plain", "min-max")]
    for name, figures in (("one plain process", plain), ("1 node", one), ("2 nodes", two)):
        ratios = [ours / theirs for ours, theirs in zip(figures, plain, strict=True)]
        table.append((name, f"{median(figures):,.0f}", f"{median(ratios):.2f}", spread(ratios)))
    print_table("Training, dense 784-256-10, batch 128 per node", table)
    spark.stop()


def plain_fit(rows: int) -> float:
    """Return samples/s of the same code in a process of its own."""
    begin = f"import types; args = types.SimpleNamespace(rows={rows}); ctx = None\n"
    lines = FIT.strip().split("\n")
    code = begin + "\n".join(lines[:-1]) + f"\nprint({lines[-1]})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def on_nodes(spark: Any, nodes: int, rows: int) -> list[float]:
    """Return each node's samples/s."""
    return list(run_cell(spark, FIT, nodes, args={"rows": rows}, preload=("tensorflow",)).values)


if __name__ == "__main__":
    main()
