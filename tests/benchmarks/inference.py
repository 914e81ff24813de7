"""Predictions per second: ``%%tfos_infer``'s engine against ``pyspark.ml.functions.predict_batch_udf``, in one run.

    python tests/benchmarks/inference.py [--rounds 5] [--rows 200000] [--nodes 2]

The same Keras model, the same cached DataFrame of 784 floats, the same batches; both write their predictions nowhere
(Spark's ``noop``). The model is loaded before the clock starts, in both; pairs are run in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
    options = parser.parse_args()
    spark = local_spark(
        options.nodes + 1, spark_driver_memory="6g", spark_sql_execution_arrow_maxRecordsPerBatch="1024"
    )
    print_machine()
    frame = wide(spark, options.rows).cache()
    frame.count()
    table = [("model", "predict_batch_udf rows/s", "tfos_infer rows/s", "ratio", "min-max")]
    with tempfile.TemporaryDirectory(prefix="tfos-benchmark-") as directory:
        for hidden in options.hidden:
            path = f"{directory}/model{hidden}.keras"
            table.append(measure(spark, frame, path, hidden, options))
    print_table("Predictions, batch 1024", table)
    spark.stop()


def wide(spark: Any, rows: int) -> Any:
    """Return a DataFrame of one array column."""
    from pyspark.sql import functions

    numbers = [(functions.col("id") % (k + 2)).cast("float") for k in range(WIDTH)]
    return spark.range(rows, numPartitions=8).select("id", functions.array(*numbers).alias("x"))


def measure(spark: Any, frame: Any, path: str, hidden: int, options: argparse.Namespace) -> tuple[str, ...]:
    """Return one line of the table."""
    import subprocess

    subprocess.run([sys.executable, "-c", MAKE_MODEL, path, str(hidden)], check=True, capture_output=True)
    theirs = frame.withColumn("scores", spark_udf(path)("x"))
    with our_frame(spark, frame, path, options) as ours:
        compute(theirs), compute(ours)
        pairs = [(seconds(lambda: compute(theirs)), seconds(lambda: compute(ours))) for _ in range(options.rounds)]
    ratios = [their_s / our_s for their_s, our_s in pairs]
    rates = [f"{options.rows / median(times):,.0f}" for times in zip(*pairs, strict=True)]
    return f"784-{hidden}-10", *rates, f"{median(ratios):.2f}", spread(ratios)


def compute(frame: Any) -> None:
    """Compute every row and drop it."""
    frame.write.format("noop").mode("overwrite").save()


def seconds(action: Callable[[], None]) -> float:
    """Return how long an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def spark_udf(path: str) -> Any:
    """Return Spark's own way: each Python worker loads the model."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import ArrayType, FloatType

    def load() -> Any:
        import keras

        return keras.models.load_model(path).predict_on_batch

    return predict_batch_udf(load, return_type=ArrayType(FloatType()), batch_size=BATCH, input_tensor_shapes=[[WIDTH]])


@contextlib.contextmanager
def our_frame(spark: Any, frame: Any, path: str, options: argparse.Namespace) -> Iterator[Any]:
    """Return ours, with its nodes for as long as it is used."""
    wanted = RunOptions(num_nodes=options.nodes, chief=False, predicts=True, batch_size=BATCH, features=("x",))
    inference = Inference(spark, pack_cell(CELL, {}, {"path": path}), wanted, frame, on_event=StatusBoard().apply)
    try:
        yield inference.frame
    finally:
        inference.close()


if __name__ == "__main__":
    main()
