"""Predictions per second: ``%%tfos_infer``'s engine against ``pyspark.ml.functions.predict_batch_udf``, in one run.

    python tests/benchmarks/inference.py [--rounds 5] [--rows 200000] [--nodes 2]

The same Keras model, the same cached DataFrame of 784 floats, the same batches; both write their predictions nowhere
(Spark's ``noop``). The model is loaded before the clock starts, in both; pairs are run in turn.

Each side has a Spark of its own. In one Spark they would share Python workers, and a worker calls ``gc.collect()``
after each task: with predict_batch_udf's TensorFlow in it that takes 0.15 s, which the other side would pay as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

from benchmarks.tables import local_spark, median, print_machine, print_table, spread
from runs import pack_cell

from tfos_magic.inference import Inference
from tfos_magic.options import RunOptions
from tfos_magic.status import StatusBoard

WIDTH = 784
BATCH = 1024
WARM_UP = 3
MAKE_MODEL = """
import sys, keras
model = keras.Sequential([keras.Input((784,)), keras.layers.Dense(int(sys.argv[2]), "relu"), keras.layers.Dense(10)])
model.save(sys.argv[1])
"""
CELL = """
import keras
model = keras.models.load_model(args.path)

def predict(batch):
    return {"scores": model.predict_on_batch(batch["x"])}

predict
"""


def main() -> None:
    """Run all model sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--hidden", type=int, nargs="*", default=[32, 512], help="width of the model's hidden layer")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    print_machine()
    table = [("model", "predict_batch_udf rows/s", "tfos_infer rows/s", "ratio", "min-max")]
    with tempfile.TemporaryDirectory(prefix="tfos-benchmark-") as directory:
        for hidden in options.hidden:
            path = f"{directory}/model{hidden}.keras"
            table.append(measure(path, hidden, options))
    print_table("Predictions, batch 1024", table)


def measure(path: str, hidden: int, options: argparse.Namespace) -> tuple[str, ...]:
    """Return one line of the table."""
    subprocess.run([sys.executable, "-c", MAKE_MODEL, path, str(hidden)], check=True, capture_output=True)
    with contextlib.ExitStack() as stack:
        theirs, ours = (stack.enter_context(side(name, path, options)) for name in SIDES)
        for _ in range(WARM_UP):
            theirs(), ours()
        pairs = [(theirs(), ours()) for _ in range(options.rounds)]
    ratios = [their_s / our_s for their_s, our_s in pairs]
    rates = [f"{options.rows / median(times):,.0f}" for times in zip(*pairs, strict=True)]
    return f"784-{hidden}-10", *rates, f"{median(ratios):.2f}", spread(ratios)


@contextlib.contextmanager
def side(name: str, path: str, options: argparse.Namespace) -> Iterator[Any]:
    """Start one side's process; yield a function that computes everything once there and returns the seconds."""
    settings = ["--side", name, "--model", path, "--rows", str(options.rows), "--nodes", str(options.nodes)]
    with subprocess.Popen(
        [sys.executable, __file__, *settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        talk = process.stdin, process.stdout

        def compute_once() -> float:
            print("go", file=talk[0], flush=True)
            return float(talk[1].readline())

        yield compute_once
        process.stdin.close()


def serve(options: argparse.Namespace) -> None:
    """Be one side: compute whenever a line comes in, and print how long it took."""
    spark = local_spark(
        options.nodes + 1, spark_driver_memory="6g", spark_sql_execution_arrow_maxRecordsPerBatch="1024"
    )
    frame = wide(spark, options.rows).cache()
    frame.count()
    with SIDES[options.side](spark, frame, options) as result:
        for _ in sys.stdin:
            began = time.perf_counter()
            result.write.format("noop").mode("overwrite").save()
            print(time.perf_counter() - began, flush=True)
    spark.stop()


def wide(spark: Any, rows: int) -> Any:
    """Return a DataFrame of one array column."""
    from pyspark.sql import functions

    numbers = [(functions.col("id") % (k + 2)).cast("float") for k in range(WIDTH)]
    return spark.range(rows, numPartitions=8).select("id", functions.array(*numbers).alias("x"))


@contextlib.contextmanager
def their_frame(spark: Any, frame: Any, options: argparse.Namespace) -> Iterator[Any]:
    """Spark's own way: each Python worker loads the model."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import ArrayType, FloatType

    path = options.model

    def load() -> Any:
        import keras

        return keras.models.load_model(path).predict_on_batch

    predict = predict_batch_udf(
        load, return_type=ArrayType(FloatType()), batch_size=BATCH, input_tensor_shapes=[[WIDTH]]
    )
    yield frame.withColumn("scores", predict("x"))


@contextlib.contextmanager
def our_frame(spark: Any, frame: Any, options: argparse.Namespace) -> Iterator[Any]:
    """Ours, with its nodes for as long as it is used."""
    wanted = RunOptions(num_nodes=options.nodes, chief=False, predicts=True, batch_size=BATCH, features=("x",))
    payload = pack_cell(CELL, {}, {"path": options.model})
    inference = Inference(spark, payload, wanted, frame, on_event=StatusBoard().apply)
    try:
        yield inference.frame
    finally:
        inference.close()


SIDES = {"theirs": their_frame, "ours": our_frame}


if __name__ == "__main__":
    main()
