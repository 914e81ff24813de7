"""What the exchange of gradients costs: Keras ``fit`` of a model of a million parameters on 1 and 2 nodes.

    python tests/benchmarks/exchange.py [--rounds 7] [--steps 150] [--pairs 40] [--batches 128 256] [--only NAME…]

A dense model 784-1024-192-10 (1,002,570 parameters), Adam, batch 64 per node, rows from memory. All rows of a round are
measured one after the other, and ratios are taken within a round; each figure is that of all steps but the first
epoch's, which compiles. Nobody sets a number of threads: plain processes have TensorFlow's default (as many as cores in
each), nodes have their part of the host's cores.

* *two independent*: two plain processes at the same time, their samples per second added: what two cores can do at most
  when nothing is exchanged.
* *2 nodes, one number*: they wait for each other at every step, but keep their gradients to themselves: what is lost by
  waiting alone.
* *2 nodes, over TCP*: as if they were on two hosts; by itself, a node reads its neighbour's memory where it can.
* *MultiWorkerMirroredStrategy*: the loop that ``ctx.strategy``'s docstring recommends, on the same model, over gRPC and
  TensorFlow's own collectives.

Then *2 nodes* against *two independent* again, with larger batches: what a step exchanges stays the same.

Then what ``ctx.distribute`` adds on a single node: two models of one process, one of them distributed, fit an epoch in
turns, and ratios are taken within a pair. On a machine that others use, too, the processor time is the steadier figure.

Then the bytes that each node sends per step, against the least that a ring can: ``2 (N-1)/N`` of the gradients.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

from benchmarks.tables import local_spark, median, print_machine, print_table, spread
from runs import run_cell

from tfos_magic.training.options import TrainingOptions

BATCH = 64
PARAMETERS = 1_002_570
EPOCHS = 4

COMMON = """
import sys, time, numpy as np, keras, tensorflow as tf
BATCH, EPOCHS = args.batch, args.epochs
def build():
    keras.utils.set_random_seed(1)
    layers = [keras.Input((784,)), keras.layers.Dense(1024, "relu"), keras.layers.Dense(192, "relu")]
    return keras.Sequential([*layers, keras.layers.Dense(10)])
def rows():
    x = np.random.default_rng(0).random((args.steps * BATCH, 784), dtype="float32")
    y = (x.sum(axis=1) * 10).astype("int32") % 10
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH, drop_remainder=args.fixed).prefetch(2)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
"""
FIT = (
    COMMON
    + """
class Clock(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.began, self.sent = time.perf_counter(), sent()
    def on_epoch_end(self, epoch, logs=None):
        self.ended, self.last_sent = time.perf_counter(), sent()
def sent():
    ring = None if ctx is None else ctx._tfos_training.ring
    return 0 if ring is None else ring.bytes_sent
model = build()
model.compile("adam", loss)
if ctx is not None:
    ctx.distribute(model)
clock = Clock()
data = rows().repeat()  # one iterator for all epochs: to make one can take a second, and then all nodes wait
meet()
model.fit(data, epochs=EPOCHS, steps_per_epoch=args.steps, verbose=0, callbacks=[clock])
steps = args.steps * (EPOCHS - 1)
steps * BATCH / (clock.ended - clock.began), (clock.last_sent - clock.sent) / steps
"""
)
PAIRS = (
    COMMON
    + """
def cost(model):
    began, used = time.perf_counter(), time.process_time()
    model.fit(data, epochs=1, verbose=0)
    return time.perf_counter() - began, time.process_time() - used
data = rows()
plain, distributed = build(), build()
for model in (plain, distributed):
    model.compile("adam", loss)
ctx.distribute(distributed)
for model in (plain, distributed):
    model.fit(data, epochs=1, verbose=0)
found = []
for number in range(args.pairs):
    first, second = (plain, distributed) if number % 2 else (distributed, plain)
    costs = {first: cost(first), second: cost(second)}
    found.append((costs[plain], costs[distributed]))
found
"""
)
OVER_TCP = """
import functools
from tfos_magic.training.ring import Ring
Ring.connect = functools.partial(Ring.connect, shares_memory=False)
"""
ONE_NUMBER = """
import numpy as np
from tfos_magic.training import exchange
def average(ring, gradients, weighted, plain, rows, label, **kinds):
    return [*gradients, *weighted, *plain], ring.average(np.ones(1, np.float32), rows, label)
exchange.average = average
"""
LOOP = (
    "strategy = ctx.strategy()\n"
    + COMMON
    + """
with strategy.scope():
    model, optimizer = build(), keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
data = strategy.distribute_datasets_from_function(lambda _: rows())
loss_per_row = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
def step(batch):
    x, y = batch
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(loss_per_row(y, model(x, training=True))) / (ctx.num_nodes * BATCH)
    gradients = tape.gradient(value, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)
    return value
@tf.function
def train_step(batch):
    return strategy.reduce("SUM", strategy.run(step, args=(batch,)), axis=None)
for epoch in range(EPOCHS):
    total = 0.0
    for batch in data:
        total += train_step(batch)
    float(total)
    if epoch == 0:
        began = time.perf_counter()
steps = args.steps * (EPOCHS - 1)
steps * BATCH / (time.perf_counter() - began), 0
"""
)


Measure = Callable[[], tuple[float, float]]
PLAIN, INDEPENDENT, MIRRORED = "one plain process", "two independent", "2 nodes, MultiWorkerMirroredStrategy"
TWO, BARE, TCP = "2 nodes", "2 nodes, one number", "2 nodes, over TCP"
HALF, FOURTH = "2 nodes, --wire-dtype bfloat16", "2 nodes, --accumulate 4"
COMPARED = (
    (PLAIN, None),
    (INDEPENDENT, PLAIN),
    (TWO, INDEPENDENT),
    (TWO, MIRRORED),
    (BARE, INDEPENDENT),
    (TCP, INDEPENDENT),
    (MIRRORED, INDEPENDENT),
    (HALF, INDEPENDENT),
    (FOURTH, INDEPENDENT),
)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="*", default=[128, 256], help="rows per node, besides 64")
    parser.add_argument("--only", nargs="*", default=[], help="names of the rows to measure; all when left away")
    options = parser.parse_args()
    spark = local_spark(5)
    print_machine()
    rows = measures(spark, options.steps)
    wanted = [name for name in rows if not options.only or name in options.only]
    rounds = [{name: rows[name]() for name in wanted} for _ in range(options.rounds)]
    print_table("Training, dense model of 1 M parameters, batch 64 per node", speed_table(rounds))
    if options.batches:
        print_table("The same model, by rows per node and step", batch_table(spark, options))
    if not options.only:
        print_table("What ctx.distribute adds on one node", one_node_table(spark, options.steps, options.pairs))
        sent = {2: rounds[-1][TWO][1], 4: on_nodes(spark, 4, 20)[1]}
        print_table("Bytes that a node sends per step", bytes_table(sent))
    spark.stop()


def measures(spark: Any, steps: int, batch: int = BATCH) -> dict[str, Measure]:
    """Return per row what measures it: samples/s, and bytes sent per step and node."""

    def nodes(count: int, cell: str = FIT, **training: Any) -> Measure:
        return lambda: on_nodes(spark, count, steps, cell, batch=batch, **training)

    return {
        PLAIN: lambda: plain_fits(1, steps, batch),
        INDEPENDENT: lambda: plain_fits(2, steps, batch),
        TWO: nodes(2),
        BARE: nodes(2, ONE_NUMBER + FIT),
        TCP: nodes(2, OVER_TCP + FIT),
        MIRRORED: nodes(2, LOOP),
        HALF: nodes(2, wire_dtype="bfloat16"),
        FOURTH: nodes(2, accumulate=4),
    }


def speed_table(rounds: Sequence[dict[str, tuple[float, float]]]) -> list[tuple[str, ...]]:
    """Return the rows that were measured, ratios taken within each round."""
    table: list[tuple[str, ...]] = [("fit", "samples/s", "against", "ratio", "min-max")]
    for name, reference in COMPARED:
        if name not in rounds[0] or (reference == MIRRORED and reference not in rounds[0]):
            continue
        figures = f"{median([each[name][0] for each in rounds]):,.0f}"
        if reference not in rounds[0]:
            table.append((name, figures, "", "", ""))
            continue
        ratios = [each[name][0] / each[reference][0] for each in rounds]
        table.append((name, figures, reference, f"{median(ratios):.2f}", spread(ratios)))
    return table


def batch_table(spark: Any, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return how two nodes compare with two independent processes, per size of batch."""
    table: list[tuple[str, ...]] = [("rows", f"{INDEPENDENT}, samples/s", f"{TWO}, samples/s", "ratio", "min-max")]
    for batch in options.batches:
        rows = measures(spark, options.steps, batch)
        rounds = [(rows[INDEPENDENT]()[0], rows[TWO]()[0]) for _ in range(options.rounds)]
        ratios = [ours / theirs for theirs, ours in rounds]
        theirs, ours = (f"{median(figures):,.0f}" for figures in zip(*rounds, strict=True))
        table.append((str(batch), theirs, ours, f"{median(ratios):.2f}", spread(ratios)))
    return table


def settings(steps: int, batch: int = BATCH, *, fixed: bool = False) -> dict[str, Any]:
    """Return what a cell finds in `args`."""
    return {"steps": steps, "batch": batch, "epochs": EPOCHS, "fixed": fixed}


def one_node_table(spark: Any, steps: int, pairs: int) -> list[tuple[str, ...]]:
    """Return the cost of a step of a plain and of a distributed model, measured in turns."""
    args = {**settings(steps), "pairs": pairs}
    (found,) = run_cell(spark, PAIRS, 1, args=args, preload=("tensorflow",)).values
    table: list[tuple[str, ...]] = [("per step", "plain fit", "1 node", "ratio, median", "quartiles")]
    for number, name in enumerate(("wall time", "processor time")):
        plain, distributed = ([costs[side][number] / steps * 1e3 for costs in found] for side in (0, 1))
        ratios = [mine / theirs for mine, theirs in zip(distributed, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ours, theirs = f"{median(distributed):.2f} ms", f"{median(plain):.2f} ms"
        table.append((name, theirs, ours, f"{middle:.3f}", f"{low:.3f}-{high:.3f}"))
    return table


def bytes_table(sent: dict[int, float]) -> list[tuple[str, ...]]:
    """Return per number of nodes what was sent, and what must be."""
    table: list[tuple[str, ...]] = [("nodes", "bytes per step", "least", "ratio")]
    for count, figure in sent.items():
        least = 2 * (count - 1) / count * 4 * PARAMETERS
        table.append((str(count), f"{figure:,.0f}", f"{least:,.0f}", f"{figure / least:.5f}"))
    return table


def plain_fits(count: int, steps: int, batch: int) -> tuple[float, float]:
    """Return the samples/s of `count` processes that train at the same time, each by itself."""
    begin = f"import types\nargs = types.SimpleNamespace(**{settings(steps, batch)})\nctx = None\n"
    meet = "def meet():\n    print('ready', flush=True)\n    sys.stdin.readline()\n"
    lines = FIT.strip().split("\n")
    code = "\n".join([begin + meet, *lines[:-1], f"print(({lines[-1]})[0])"])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in processes), 0.0


def on_nodes(
    spark: Any, count: int, steps: int, cell: str = FIT, *, batch: int = BATCH, **training: Any
) -> tuple[float, float]:
    """Return the samples/s of all nodes, and the bytes that each sends per step."""
    values = run_cell(
        spark,
        "meet = lambda: None\n" + cell,
        count,
        args=settings(steps, batch, fixed=cell is LOOP),
        preload=("tensorflow",),
        training=TrainingOptions(**training),
    ).values
    return sum(value[0] for value in values), sum(value[1] for value in values) / count


if __name__ == "__main__":
    main()
