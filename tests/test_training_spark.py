"""Training over the nodes of a Spark session: the test of truth, TensorFlow's strategies, and what goes wrong."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from runs import run_cell

from tfos_magic.errors import NodeError, NodeKilledError
from tfos_magic.result import RunResult
from tfos_magic.status import Event, MetricsReported

TOLERANCE = 1e-5
BATCH = 8
EPOCHS = 3
RATE = 0.1
PRELOAD = ("tensorflow",)


def run_tf(spark: Any, body: str, nodes: int, **options: Any) -> RunResult:
    """Run a body that uses TensorFlow; a hang is an error after two minutes."""
    return run_cell(spark, textwrap.dedent(body).strip(), nodes, preload=PRELOAD, timeout_s=120.0, **options)


def frame(spark: Any, rows: int, partitions: int = 3) -> Any:
    """Return rows of an id, four features and a label of three classes; a row's features follow from its id."""
    return spark.range(rows, numPartitions=partitions).selectExpr(
        "id",
        "cast(array(sin(id), cos(3 * id), sin(7 * id + 1), cos(id * id)) as array<float>) as x",
        "cast(abs(hash(id)) % 3 as int) as label",
    )


# --- the test of truth ------------------------------------------------------------------------------------------

TRAIN = """
import keras
import numpy as np

optimizers = {"sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9), "adam": lambda: keras.optimizers.Adam(0.01)}
train = ctx.dataset(features="x", shuffle=False)
validation = ctx.dataset("validation", features="x")
found = {}
for name, optimizer in optimizers.items():
    keras.utils.set_random_seed(ctx.executor_id)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(10, "relu"), keras.layers.Dense(3, "softmax")])
    model.compile(optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    initial = model.get_weights()
    ctx.distribute(model)
    fit = model.fit(train, validation_data=validation, epochs=args.epochs)
    history = {key: [float(x) for x in values] for key, values in fit.history.items()}
    found[name] = {"initial": initial, "weights": model.get_weights(), "history": history}
found["steps"] = [batch["id"].numpy().tolist() for batch in ctx.dataset(raw=True, shuffle=False)]
found
"""


@dataclass(frozen=True)
class Table:
    """The rows as the driver has them."""

    x: np.ndarray[Any, Any]
    label: np.ndarray[Any, Any]

    @classmethod
    def of(cls, data: Any) -> Table:
        rows = sorted(data.collect())
        return cls(np.array([row.x for row in rows], "float32"), np.array([row.label for row in rows]))

    def batches(self, steps: Sequence[Sequence[int]]) -> Any:
        import tensorflow as tf

        def generate() -> Any:
            for ids in steps:
                yield self.x[list(ids)], self.label[list(ids)]

        spec = tf.TensorSpec((None, 4), "float32"), tf.TensorSpec((None,), "int64")
        data = tf.data.Dataset.from_generator(generate, output_signature=spec)
        return data.apply(tf.data.experimental.assert_cardinality(len(steps)))


def replay(name: str, found: dict[str, Any], train: Any, validation: Any) -> tuple[list[Any], dict[str, list[float]]]:
    """Train in this process, one whole batch per step; return weights and history."""
    import keras

    optimizer = keras.optimizers.SGD(0.1, momentum=0.9) if name == "sgd" else keras.optimizers.Adam(0.01)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(10, "relu"), keras.layers.Dense(3, "softmax")])
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.set_weights(found["initial"])
    fit = model.fit(train, validation_data=validation, epochs=EPOCHS, shuffle=False, verbose=0)
    return model.get_weights(), fit.history


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "nodes"), [(96, 2), (97, 3)], ids=["even", "two of three nodes run out earlier"])
def test_nodes_follow_one_process_on_the_same_rows(spark_local4: Any, rows: int, nodes: int) -> None:
    data = {"train": frame(spark_local4, rows, 1), "validation": frame(spark_local4, 37)}
    result = run_tf(spark_local4, TRAIN, nodes, data=data, epochs=EPOCHS, batch_size=BATCH)
    values = result.values
    steps_of_nodes = [value["steps"] for value in values]
    assert len({len(steps) for steps in steps_of_nodes}) == 1
    assert sorted(row for steps in steps_of_nodes for ids in steps for row in ids) == list(range(rows))
    if rows % nodes:
        assert [len(ids) for ids in (steps[-1] for steps in steps_of_nodes)].count(0) == nodes - 1
    steps = [[row for ids in parts for row in ids] for parts in zip(*steps_of_nodes, strict=True)]
    whole, validation = Table.of(data["train"]).batches(steps), Table.of(data["validation"]).batches([range(37)])
    for name in ("sgd", "adam"):
        first, *others = [value[name] for value in values]
        for other in others:
            assert [w.tobytes() for w in other["weights"]] == [w.tobytes() for w in first["weights"]]
            assert other["history"] == first["history"]
            assert not np.array_equal(other["initial"][0], first["initial"][0])
        weights, history = replay(name, first, whole, validation)
        for mine, theirs in zip(first["weights"], weights, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE)
        assert set(first["history"]) == set(history)
        for key, expected in history.items():
            assert first["history"][key] == pytest.approx(expected, abs=TOLERANCE), key
        assert np.abs(weights[0] - first["initial"][0]).max() > 100 * TOLERANCE
    last = values[0]["adam"]["history"]
    assert list(result.history["val_loss"])[-EPOCHS:] == pytest.approx(last["val_loss"])


# --- TensorFlow's strategies ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_custom_loop_under_multi_worker_mirrored_strategy(spark_local4: Any) -> None:
    body = """
    strategy = ctx.strategy()
    import tensorflow as tf

    with strategy.scope():
        weights = tf.Variable(tf.zeros((4, 3)))
    batches = strategy.distribute_datasets_from_function(lambda _: ctx.dataset(features="x", shuffle=False))

    def step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, x @ weights)
            loss = tf.reduce_sum(losses) / (ctx.num_nodes * args.batch_size)
        gradient = tf.distribute.get_replica_context().all_reduce("SUM", tape.gradient(loss, weights))
        weights.assign_sub(args.rate * gradient)
        return loss

    @tf.function
    def train_step(batch):
        return strategy.reduce("SUM", strategy.run(step, args=(batch,)), axis=None)

    losses = [float(train_step(batch)) for batch in batches]
    steps = [batch["id"].numpy().tolist() for batch in ctx.dataset(raw=True, shuffle=False)]
    type(strategy).__name__, strategy.num_replicas_in_sync, weights.numpy(), losses, steps
    """
    data = frame(spark_local4, 67, 1)
    values = run_tf(
        spark_local4, body, 2, data={"train": data}, batch_size=BATCH, args={"batch_size": BATCH, "rate": RATE}
    ).values
    names, replicas, weights, losses, steps = zip(*values, strict=True)
    assert names == ("CollectiveAllReduceStrategy",) * 2 or names == ("MultiWorkerMirroredStrategy",) * 2
    assert replicas == (2, 2)
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(weights[0], weights[1])
    table = Table.of(data)
    together = [[*one, *other] for one, other in zip(*steps, strict=True)]
    assert len(together) == 5
    np.testing.assert_allclose(weights[0], plain_loop(table, together, 2 * BATCH), rtol=0, atol=TOLERANCE)


def plain_loop(table: Table, steps: Sequence[Sequence[int]], divisor: int) -> Any:
    """Return the weights of softmax regression after these steps, computed by hand."""
    weights = np.zeros((4, 3))
    for ids in steps:
        x, y = table.x[list(ids)].astype("float64"), table.label[list(ids)]
        odds = np.exp(x @ weights)
        weights -= RATE * x.T @ (odds / odds.sum(1, keepdims=True) - np.eye(3)[y]) / divisor
    return weights


@pytest.mark.slow
def test_a_body_leads_a_parameter_server_and_a_worker(spark_local4: Any) -> None:
    body = """
    import tensorflow as tf

    strategy = ctx.strategy()
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        total = tf.Variable(0.0)

    @tf.function
    def step(x):
        total.assign_add(x)

    for number in range(1, 6):
        coordinator.schedule(step, args=(tf.constant(float(number)),))
    coordinator.join()
    import keras
    try:
        ctx.distribute(keras.Sequential())
        refusal = ""
    except Exception as error:
        refusal = str(error)
    type(strategy).__name__, total.device, float(total.numpy()), ctx.job_name, refusal
    """
    chief, worker, server = run_tf(spark_local4, body, 3, num_ps=1, serves_itself=False).values
    assert (worker, server) == (None, None)
    assert chief[0].startswith("ParameterServerStrategy")
    assert "/job:ps/" in chief[1]
    assert chief[2:4] == (15.0, "chief")
    assert "with --ps the workers only serve the chief" in chief[4]


def test_a_function_with_a_parameter_server_looks_at_its_role(spark_local4: Any) -> None:
    body = """
    def main_fun(args, ctx):
        if ctx.job_name == "ps":
            try:
                return ctx.get_data_feed()
            except Exception as error:
                return str(error)
        return ctx.job_name, ctx.task_index, ctx.num_nodes, len(ctx.get_data_feed().next_batch(100))
    """
    data = {"train": spark_local4.range(50)}
    chief, worker, server = run_cell(spark_local4, textwrap.dedent(body), 3, num_ps=1, data=data).values
    assert (chief[:3], worker[:3]) == (("chief", 0, 2), ("worker", 0, 2))
    assert chief[3] + worker[3] == 50
    assert "ps:0 gets no rows" in server


@pytest.mark.slow
def test_a_function_whose_ps_and_worker_serve_ends_with_its_chief(spark_local4: Any) -> None:
    body = """
    def main_fun(args, ctx):
        import tensorflow as tf
        from tfos_magic import training

        if ctx.job_name != "chief":
            training.serve(ctx)
        coordinator = tf.distribute.coordinator.ClusterCoordinator(ctx.strategy())
        with ctx.strategy().scope():
            total = tf.Variable(1.0)

        @tf.function
        def step(count):
            for _ in tf.range(count):  # AutoGraph must find the source
                total.assign_add(2.0)

        coordinator.schedule(step, args=(tf.constant(3),))
        coordinator.join()
        return float(total.numpy())
    """
    result = run_tf(spark_local4, body, 3, num_ps=1)
    assert result.values == [7.0, None, None]
    assert "AutoGraph" not in str(result.logs)


def test_an_evaluator_runs_the_function_and_gets_no_rows(spark_local4: Any) -> None:
    body = """
    import json, os
    task = json.loads(os.environ["TF_CONFIG"])["task"]["type"]
    try:
        rows = len(ctx.get_data_feed().next_batch(100))
    except Exception as error:
        rows = str(error)
    ctx.job_name, task, ctx.num_nodes, sorted(ctx.cluster_spec), rows
    """
    data = {"train": spark_local4.range(60)}
    values = run_cell(spark_local4, textwrap.dedent(body).strip(), 3, evaluator=True, data=data).values
    assert [value[:4] for value in values] == [
        (job, job, 2, ["chief", "worker"]) for job in ("chief", "worker", "evaluator")
    ]
    assert values[0][4] + values[1][4] == 60
    assert "evaluator:0 gets no rows" in values[2][4]


# --- what goes wrong --------------------------------------------------------------------------------------------

MODEL = """
import keras
import numpy as np

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
model.compile("sgd", "sparse_categorical_crossentropy")
ctx.distribute(model)
rows = args.rows + args.more * ctx.executor_id
x, y = np.zeros((rows, 4), "float32"), np.zeros(rows, "int64")
"""


@pytest.mark.slow
def test_a_node_killed_in_the_middle_of_fit_is_named_not_its_peers(spark_local4: Any) -> None:
    body = MODEL + textwrap.dedent("""
    import os, signal, time

    def kill(batch, logs):
        if ctx.executor_id == 1 and batch == 5:
            ctx.report(killed_at=time.time())
            os.kill(os.getpid(), signal.SIGKILL)

    model.fit(x, y, batch_size=8, epochs=1000, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=kill)])
    """)
    stamps: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, MetricsReported) and "killed_at" in event.values:
            stamps.append(event.values["killed_at"])

    with pytest.raises(NodeKilledError, match=r"worker:0 on .* was killed by signal 9 \(SIGKILL\)") as caught:
        run_tf(spark_local4, body, 3, args={"rows": 160, "more": 0}, on_event=note)
    assert time.time() - stamps[0] < 5
    assert caught.value.node == "worker:0"
    assert "went away" not in str(caught.value)
    assert run_cell(spark_local4, "ctx.executor_id", 3).values == [0, 1, 2]


def test_arrays_of_different_lengths_are_an_error_with_the_numbers(spark_local4: Any) -> None:
    with pytest.raises(NodeError, match="numbers of batches in fit: chief:0: 4, worker:0: 6") as caught:
        run_tf(spark_local4, f"{MODEL}\nmodel.fit(x, y, batch_size=16)", 2, args={"rows": 64, "more": 32})
    assert "ctx.dataset" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("others", ["return", "train on"])
def test_evaluating_on_the_chief_only_is_an_error_in_words(spark_local4: Any, others: str) -> None:
    body = MODEL + textwrap.dedent(f"""
    model.fit(x, y, batch_size=16)
    if ctx.is_chief:
        model.evaluate(x, y)
    elif {others == "train on"}:
        model.fit(x, y, batch_size=16)
    """)
    with pytest.raises(NodeError) as caught:
        run_tf(spark_local4, body, 2, args={"rows": 64, "more": 0})
    text = str(caught.value)
    words = (
        "not only the chief" if others == "return" else "different calls: chief:0: model.evaluate, worker:0: model.fit"
    )
    assert words in text


@pytest.mark.slow
def test_fit_without_distribute_is_remarked_upon(spark_local4: Any) -> None:
    body = """
import keras, numpy as np
model = keras.Sequential([keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
"""
    result = run_cell(spark_local4, body, 2)
    assert all("ctx.distribute(model)" in lines[-1] for lines in result.logs.values())


# --- tf_keras: Keras 2's own fit under TensorFlow's strategy ----------------------------------------------------

LEGACY = """
import tf_keras as keras

strategy = ctx.strategy()
with strategy.scope():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Dense(8, "relu", input_shape=(4,)), keras.layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"])
rows = ctx.dataset(features="x", batch_size=ctx.num_nodes * args.batch_size)  # tf_keras takes it apart for the nodes
history = model.fit(rows, epochs=args.epochs, verbose=2)
model.get_weights(), history.history
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", [200, 203])
def test_tf_keras_trains_under_tensorflows_strategy(spark_local4: Any, rows: int) -> None:
    data = frame(spark_local4, rows).selectExpr("x", "cast(x[0] > 0 as int) as label")
    first, second = run_tf(spark_local4, LEGACY, 2, data={"train": data}, epochs=3).values
    for mine, theirs in zip(first[0], second[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert first[1]["loss"][-1] < first[1]["loss"][0]
    assert np.isfinite(first[1]["loss"]).all()


@pytest.mark.slow
def test_a_tf_keras_model_is_sent_to_the_strategy(spark_local4: Any) -> None:
    body = "import tf_keras; ctx.distribute(tf_keras.Sequential([tf_keras.layers.Dense(1)]))"
    with pytest.raises(NodeError, match="needs a Keras 3 model, not tf_keras") as caught:
        run_tf(spark_local4, body, 1)
    assert "with ctx.strategy().scope()" in str(caught.value)
