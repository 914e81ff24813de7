"""Inference with DataFrames, without a notebook: values, types, order, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from leftovers import processes_with
from pyspark.sql import functions
from runs import pack_cell

from tfos_magic.errors import DataError, NodeError, UsageError
from tfos_magic.inference import Inference
from tfos_magic.node import inference as on_node
from tfos_magic.options import RunOptions
from tfos_magic.status import StatusBoard

Make = Callable[..., Inference]


@pytest.fixture
def infer(spark_local4: Any) -> Iterator[Make]:
    """Return a function that opens an inference, which is closed at the end."""
    opened: list[Inference] = []

    def make(body: str, frame: Any, nodes: int = 2, **options: Any) -> Inference:
        names = ("batch_size", "features")
        run = {name: options.pop(name) for name in names if name in options}
        wanted = RunOptions(num_nodes=nodes, chief=False, predicts=True, preload=(), **run)
        payload = pack_cell(body, {}, {})
        inference = Inference(spark_local4, payload, wanted, frame, on_event=StatusBoard().apply, **options)
        opened.append(inference)
        return inference

    yield make
    for inference in opened:
        inference.close()
    assert not processes_with("tfos_magic.node")


@pytest.fixture
def frame(spark_local4: Any) -> Any:
    x = functions.array(functions.col("id") * 1.0, functions.col("id") * 2.0)
    name = functions.concat(functions.lit("n"), functions.col("id").cast("string"))
    return spark_local4.range(5000, numPartitions=7).select("id", x.alias("x"), name.alias("name"))


def test_every_row_once_in_its_place_with_all_kinds_of_results(infer: Make, frame: Any) -> None:
    body = """
import numpy as np
calls = []
def predict(batch):
    calls.append(len(batch["id"]))
    return {
        "score": batch["x"] @ np.array([1.0, 10.0]),
        "both": (batch["x"] * 2).astype("float32"),
        "upper": [name.upper() for name in batch["name"]],
        "flag": batch["id"] % 2 == 0,
        "grid": np.zeros((len(batch["id"]), 2, 3), np.uint8),
        "seen": np.full(len(batch["id"]), max(calls)),
    }
predict
"""
    inference = infer(body, frame, batch_size=100)
    types = {name: kind for name, kind in inference.frame.dtypes}
    assert list(types) == ["id", "x", "name", "score", "both", "upper", "flag", "grid", "seen"]
    assert types["both"] == "array<float>" and types["grid"] == "array<array<smallint>>" and types["flag"] == "boolean"
    rows = inference.frame.collect()
    assert [row.id for row in rows] == list(range(5000))
    for row in rows[::97]:
        assert (row.score, row.both, row.upper) == (21.0 * row.id, [2.0 * row.id, 4.0 * row.id], f"N{row.id}")
        assert row.flag == (row.id % 2 == 0) and row.grid == [[0, 0, 0], [0, 0, 0]]
        assert row.seen <= 100
    assert inference.frame.filter("score >= 21 * 4990").count() == 10
    assert inference.frame.limit(3).count() == 3


@pytest.mark.slow
def test_chosen_columns_a_given_schema_and_vectors(infer: Make, spark_local4: Any) -> None:
    from pyspark.ml.linalg import Vectors

    data = [(n, Vectors.dense([n, n + 1.0]), {"k": n}) for n in range(20)]
    frame = spark_local4.createDataFrame(data, ["id", "v", "extra"])
    body = "lambda batch: {'total': batch['v'].sum(axis=1), 'names': sorted(batch) * len(batch['v'])}"
    inference = infer(body, frame, schema="total double", keep=["v", "id"], features=("v",))
    assert inference.frame.columns == ["v", "id", "total"]
    assert [row.total for row in inference.frame.collect()] == [2.0 * n + 1 for n in range(20)]
    assert inference.frame.first().v == Vectors.dense([0.0, 1.0])


@pytest.mark.slow
def test_saved_results_are_complete_and_the_nodes_gone(infer: Make, frame: Any, tmp_path: Any) -> None:
    inference = infer("lambda batch: batch['id'] * 2", frame)
    saved = inference.save(str(tmp_path / "out"))
    assert not processes_with("tfos_magic.node")
    assert not inference.is_open
    assert sorted(row.prediction for row in saved.collect()) == [2 * n for n in range(5000)]


@pytest.mark.slow
def test_the_function_runs_once_on_each_node_however_many_partitions_ask(
    infer: Make, frame: Any, tmp_path: Any
) -> None:
    body = f"""
import os, tempfile
tempfile.mkstemp(dir={str(tmp_path)!r})
lambda batch: batch["id"]
"""
    inference = infer(body, frame.repartition(16))
    assert inference.frame.count() == 5000
    assert inference.frame.agg(functions.sum("prediction")).first()[0] == sum(range(5000))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("7", r"type int; nothing can be predicted"),
        ("lambda batch: batch['id'][:-1]", "rows, for a batch of"),
        ("lambda batch: None", "returned None"),
        ("lambda batch: 1 / 0", "ZeroDivisionError"),
        ("lambda batch: batch['idd']", "idd"),
    ],
)
def test_what_goes_wrong_on_a_node_is_told_when_it_gets_ready(infer: Make, frame: Any, body: str, message: str) -> None:
    with pytest.raises(NodeError, match=message):
        infer(body, frame, 1)
    assert not processes_with("tfos_magic.node")


@pytest.mark.slow
def test_what_can_be_told_before_anything_starts(infer: Make, frame: Any, spark_local4: Any) -> None:
    with pytest.raises(UsageError, match="scor floot"):
        infer("lambda batch: batch['id']", frame, schema="scor floot,,")
    with pytest.raises(UsageError, match="no column 'nam'"):
        infer("lambda batch: batch['id']", frame, keep=["nam"])
    with pytest.raises(UsageError, match="The result has a column 'id', and so has the input"):
        infer("lambda batch: {'id': batch['id']}", frame)
    with pytest.raises(DataError, match="0 rows"):
        infer("lambda batch: batch['id']", frame.limit(0))
    assert infer("lambda batch: batch['id']", frame.limit(0), schema="prediction long").frame.count() == 0


def test_an_action_after_the_nodes_end_says_so(infer: Make, frame: Any) -> None:
    # One partition: Spark interrupts the tasks beside one that fails. Where such a task is just starting its Python
    # worker, Spark 4 takes that for a lost daemon, ends it, and the worker which it was forking may live on.
    inference = infer("lambda batch: batch['id']", frame.coalesce(1), 1)
    inference.close()
    with pytest.raises(Exception, match="have been stopped, or have failed"):
        inference.frame.collect()  # a count alone asks nobody


@pytest.mark.slow
def test_a_failure_in_an_action_ends_the_nodes(infer: Make, frame: Any, caplog: Any) -> None:
    inference = infer("lambda batch: 1 / (0 if batch['id'].max() > 1000 else 1) + batch['id']", frame, 1)
    with pytest.raises(Exception, match="went away"):
        inference.frame.collect()
    inference._watch.join(20)
    assert not inference.is_open
    assert "ZeroDivisionError" in caplog.text


# --- what a node makes of results -------------------------------------------------------------------------


def test_results_of_many_shapes_become_columns() -> None:
    import pandas as pd

    assert on_node.to_batch([1, 2], 2).to_pydict() == {"prediction": [1, 2]}
    assert on_node.to_batch(np.eye(2, dtype=np.float16), 2).to_pydict() == {"prediction": [[1.0, 0.0], [0.0, 1.0]]}
    assert on_node.to_batch([np.zeros(2), np.ones(2)], 2).schema.names == ["prediction_0", "prediction_1"]
    assert on_node.to_batch(pd.DataFrame({"a": [1], "b": ["x"]}), 1).to_pydict() == {"a": [1], "b": ["x"]}
    assert on_node.to_batch({"e": np.zeros((2, 0))}, 2).to_pydict() == {"e": [[], []]}
    with pytest.raises(DataError, match="single value"):
        on_node.to_batch({"a": 3.0}, 1)


def test_a_model_gets_one_array_or_a_dict() -> None:
    class Model:
        def predict_on_batch(self, x: Any) -> Any:
            return x

    batch = {"a": np.zeros(2), "b": np.ones(2)}
    assert on_node.as_function(Model(), ["a"])(batch) is batch["a"]
    assert on_node.as_function(Model(), None)(batch) == batch
