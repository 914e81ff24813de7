"""What a node does in the tests of training: each case is a function that returns what it found, as JSON can hold it.

Run as ``python training_cases.py RESULT_FILE CASE…`` with TF_CONFIG set, by training_harness.py.

Node 0 also trains the *reference*, a plain Keras model in one process on whole batches, and reports how far the
distributed model is from it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import training_zoo

from tfos_magic import training
from tfos_magic.training.options import TrainingOptions

BATCH = 8
CLASSES = 3
WIDTH = 6


@dataclass
class Context:
    """The part of NodeContext that training uses."""

    job_name: str
    task_index: int
    cluster_spec: dict[str, list[str]]
    reports: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    secret: bytes = b"known to the nodes"
    training: TrainingOptions = field(default_factory=TrainingOptions)

    @classmethod
    def from_environment(cls) -> Context:
        config = json.loads(os.environ["TF_CONFIG"])
        return cls(config["task"]["type"], config["task"]["index"], config["cluster"])

    @property
    def num_nodes(self) -> int:
        return sum(len(addresses) for addresses in self.cluster_spec.values())

    @property
    def rank(self) -> int:
        return self.task_index + (len(self.cluster_spec.get("chief", ())) if self.job_name == "worker" else 0)

    @property
    def is_chief(self) -> bool:
        return self.rank == 0

    def report(self, **metrics: Any) -> None:
        self.reports.append(metrics)

    def report_epoch(self, epoch: int, logs: dict[str, float]) -> None:
        self.epochs.append((epoch, dict(logs)))

    def saving(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


# --- data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Columns of equal length."""

    columns: tuple[Any, ...]

    def take(self, rows: Any) -> tuple[Any, ...]:
        return tuple(column[rows] for column in self.columns)

    def dataset(self, batches: list[Any], *, knows_size: bool = True) -> tf.data.Dataset:
        def generate() -> Iterator[tuple[Any, ...]]:
            for batch in batches:
                yield self.take(batch)

        spec = tuple(tf.TensorSpec((None, *c.shape[1:]), c.dtype) for c in self.columns)
        dataset = tf.data.Dataset.from_generator(generate, output_signature=spec)
        return dataset.apply(tf.data.experimental.assert_cardinality(len(batches))) if knows_size else dataset


def classification(count: int = 150) -> Rows:
    random = np.random.default_rng(7)
    x = random.normal(size=(count, WIDTH)).astype("float32")
    y = (x[:, :CLASSES] + random.normal(size=(count, CLASSES))).argmax(1).astype("int64")
    return Rows((x, y))


def uneven(count: int, nodes: int) -> list[list[Any]]:
    """Deal rows as unfairly as can be: each node has its own number of rows and goes on with empty batches.

    Returns
    -------
    list of list of array of int
        Per step, per node, which rows. The last node runs out first.
    """
    shares = np.cumsum(np.arange(nodes, 0, -1) + 0.5)
    bounds = [0, *np.round(shares / shares[-1] * count).astype(int)]
    own = [np.arange(a, b) for a, b in itertools.pairwise(bounds)]
    steps = -(-max(map(len, own)) // BATCH)
    return [[rows[step * BATCH : (step + 1) * BATCH] for rows in own] for step in range(steps)]


# --- the test of truth ----------------------------------------------------------------------------------------


class Snapshots(keras.callbacks.Callback):
    """The weights after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[list[Any]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.weights.append([np.array(w) for w in self.model.get_weights()])


def digest(model: Any) -> str:
    arrays = [np.asarray(v.value) for v in (*model.weights, *model.optimizer.variables)]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def distance(left: Any, right: Any) -> float:
    """Return the largest difference, infinite where one is not a number."""
    gaps = [np.abs(np.asarray(a) - np.asarray(b)).max(initial=0) for a, b in zip(left, right, strict=True)]
    return float(np.nan_to_num(max(gaps), nan=np.inf))


def follow(ctx: Context, build: Callable[[], Any], *, has_reference: bool = True) -> dict[str, Any]:
    """Train `build()` over the nodes, and on node 0 also the same in one process; say how they differ."""
    rows = classification()
    layout = uneven(len(rows.columns[0]), ctx.num_nodes)
    keras.utils.set_random_seed(100 + ctx.rank)  # different initial weights: node 0's must win
    model = build()
    initial = model.get_weights() if model.built else None
    training.distribute(model, ctx)
    seen = Snapshots()
    mine = [step[ctx.rank] for step in layout]
    share = rows.dataset(mine)
    fit = model.fit(share, epochs=2, validation_data=share, callbacks=[seen])
    evaluated = model.evaluate(share, return_dict=True, verbose=0)
    found = {
        "digest": digest(model),
        "history": {k: [float(x) for x in v] for k, v in fit.history.items()},
        "evaluated": {k: float(v) for k, v in evaluated.items()},
        "empty_batches": sum(len(batch) == 0 for batch in mine),
    }
    if has_reference and ctx.is_chief:
        found |= compare(build, initial, rows.dataset([np.concatenate(s) for s in layout]), seen, found)
    return found


def compare(
    build: Callable[[], Any], initial: Any, whole: Any, seen: Snapshots, found: dict[str, Any]
) -> dict[str, Any]:
    """Train the reference."""
    keras.utils.set_random_seed(100)
    model = build()
    if initial is not None:
        model.set_weights(initial)
    reference = Snapshots()
    epochs = len(seen.weights)
    history = model.fit(whole, epochs=epochs, validation_data=whole, verbose=0, callbacks=[reference]).history
    evaluated = model.evaluate(whole, return_dict=True, verbose=0)
    assert set(history) == set(found["history"]), (set(history), set(found["history"]))
    return {
        "weights_off": [distance(a, b) for a, b in zip(seen.weights, reference.weights, strict=True)],
        "history_off": {k: distance([found["history"][k]], [v]) for k, v in history.items()},
        "evaluated_off": distance([found["evaluated"][k] for k in evaluated], list(evaluated.values())),
        "moved": distance(reference.weights[0], reference.weights[-1]),
    }


# --- models ---------------------------------------------------------------------------------------------------


def dense(optimizer: Any, **compile_arguments: Any) -> Any:
    model = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            keras.layers.Dense(10, "relu", kernel_regularizer="l2"),
            keras.layers.Dense(CLASSES, "softmax"),
        ]
    )
    arguments: dict[str, Any] = {"metrics": ["accuracy"], **compile_arguments}
    model.compile(optimizer, "sparse_categorical_crossentropy", **arguments)
    return model


def sgd() -> Any:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def case_sgd(ctx: Context) -> dict[str, Any]:
    found = follow(ctx, lambda: dense(sgd()))
    return found | {"reported": ctx.epochs[-3:], "steps": ctx.reports}


def case_unbuilt(ctx: Context) -> dict[str, Any]:
    def build() -> Any:
        model = keras.Sequential([keras.layers.Dense(10, "relu"), keras.layers.Dense(CLASSES)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"])
        return model

    return follow(ctx, build)


def case_batch_norm(ctx: Context) -> dict[str, Any]:
    def build() -> Any:
        layers = [keras.Input((WIDTH,)), keras.layers.Dense(8), keras.layers.BatchNormalization(momentum=0.5)]
        model = keras.Sequential([*layers, keras.layers.Dropout(0.2), keras.layers.Dense(CLASSES, "softmax")])
        model.layers[0].trainable = False
        model.compile(sgd(), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    # Each node normalises with its own rows and drops its own units, so that only the equality of nodes is exact.
    return follow(ctx, build, has_reference=False)


class Custom(keras.Model):
    """A model with its own train_step, its own trackers and a name for them that is not the metric's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = keras.layers.Dense(5, "tanh")
        self.outer = keras.layers.Dense(WIDTH)
        self.total_tracker = keras.metrics.Mean(name="total_loss")

    def call(self, x: Any) -> Any:
        return self.outer(self.inner(x))

    @property
    def metrics(self) -> list[Any]:
        return [self.total_tracker]

    def train_step(self, data: Any) -> dict[str, Any]:
        x = data[0]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - x))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.total_tracker.update_state(loss)
        return {"loss": self.total_tracker.result(), "batch_loss": loss}

    def test_step(self, data: Any) -> dict[str, Any]:
        self.total_tracker.update_state(tf.reduce_mean(tf.square(self(data[0]) - data[0])))
        return {"loss": self.total_tracker.result()}


def custom() -> Any:
    model = Custom()
    model.compile(keras.optimizers.Adam(0.01))
    return model


def case_custom_step(ctx: Context) -> dict[str, Any]:
    return follow(ctx, custom)


# --- how gradients travel ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def options(ctx: Context, **changes: Any) -> Iterator[None]:
    """Let the run have been started with other options."""
    before, ctx.training = ctx.training, TrainingOptions(**changes)
    try:
        yield
    finally:
        ctx.training = before


def accumulated(
    ctx: Context,
    build: Callable[[], Any],
    rows: Rows | None = None,
    *,
    every: int = 5,
    reference: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Train with `every` batches per update; on node 0 also in one process, with batches as large as all of those."""
    rows = rows or classification()
    layout = uneven(len(rows.columns[0]), ctx.num_nodes)
    assert len(layout) % every, "an epoch must leave something over"
    keras.utils.set_random_seed(100 + ctx.rank)
    model = build()
    initial = model.get_weights() if model.built else None
    seen = Snapshots()
    share = rows.dataset([step[ctx.rank] for step in layout])
    with options(ctx, accumulate=every):
        training.distribute(model, ctx)
        fit = model.fit(share, epochs=2, validation_data=share, verbose=0, callbacks=[seen])
        evaluated = model.evaluate(share, return_dict=True, verbose=0)
    found = {
        "digest": digest(model),
        "history": {k: [float(x) for x in v] for k, v in fit.history.items()},
        "evaluated": {k: float(v) for k, v in evaluated.items()},
        "empty_batches": sum(len(step[ctx.rank]) == 0 for step in layout),
        "updates": int(model.optimizer.iterations.numpy()),
        "expected_updates": 2 * -(-len(layout) // every),
    }
    if ctx.is_chief:
        groups = [layout[start : start + every] for start in range(0, len(layout), every)]
        whole = rows.dataset([np.concatenate([rows for step in group for rows in step]) for group in groups])
        found |= compare(reference or build, initial, whole, seen, found)
    return found


def case_accumulate(ctx: Context) -> dict[str, Any]:
    return accumulated(ctx, lambda: dense(sgd()))


def case_accumulate_clipped(ctx: Context) -> dict[str, Any]:
    """What acts on gradients acts once per update: clipping, decay, a schedule."""

    def build() -> Any:
        rate = keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.5)
        return dense(keras.optimizers.AdamW(rate, weight_decay=0.1, global_clipnorm=0.1))

    return accumulated(ctx, build)


def case_accumulate_embedding(ctx: Context) -> dict[str, Any]:
    x = np.random.default_rng(3).integers(0, 50, (150, 4))

    def build() -> Any:
        layers = [keras.Input((4,)), keras.layers.Embedding(50, 8), keras.layers.Flatten()]
        model = keras.Sequential([*layers, keras.layers.Dense(1, "sigmoid")])
        model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
        return model

    return accumulated(ctx, build, Rows((x, (x.sum(1) % 2).astype("float32"))))


def case_accumulate_eager(ctx: Context) -> dict[str, Any]:
    return accumulated(ctx, lambda: dense(sgd(), run_eagerly=True))


def case_accumulate_several_steps(ctx: Context) -> dict[str, Any]:
    # Keras 3.3 by itself cannot do with fewer steps in an epoch than in an execution: not in the reference.
    return accumulated(ctx, lambda: dense(sgd(), steps_per_execution=4), reference=lambda: dense(sgd()))


def case_accumulate_custom_step(ctx: Context) -> dict[str, Any]:
    return accumulated(ctx, custom)


def case_accumulate_mixed_precision(ctx: Context) -> dict[str, Any]:
    """A loss scale of 32,768 on float16: the sums are kept in float32, or they would overflow."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with options(ctx, accumulate=5):
            model, share = distributed(ctx)
            fit = model.fit(share, epochs=2, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    iterations = model.optimizer.inner_optimizer.iterations
    return {
        "digest": digest(model),
        "loss": [float(x) for x in fit.history["loss"]],
        "updates": int(iterations.numpy()),
    }


def case_accumulate_twice(ctx: Context) -> dict[str, Any]:
    """A fit that broke off in the middle of a group leaves nothing to the next one."""
    rows = classification()
    share = rows.dataset([step[ctx.rank] for step in uneven(150, ctx.num_nodes)])

    def train(*, breaks_off: bool) -> Any:
        keras.utils.set_random_seed(7)
        model = training.distribute(dense(sgd()), ctx)

        def interrupt(batch: int, logs: Any) -> None:
            if batch == 2:
                raise KeyboardInterrupt

        if breaks_off:
            callback = keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                model.fit(share, epochs=1, verbose=0, callbacks=[callback])
        model.fit(share, epochs=1, verbose=0)
        return model

    with options(ctx, accumulate=5):
        models = [train(breaks_off=False), train(breaks_off=True)]
    return {"digest": digest(models[1]), "off": distance(*(model.get_weights() for model in models))}


def case_wire(ctx: Context) -> dict[str, Any]:
    """Gradients as bfloat16, against float32; with a rate of 0 nothing may differ, whatever is not a gradient."""
    rows = classification()
    share = rows.dataset([step[ctx.rank] for step in uneven(150, ctx.num_nodes)])

    def train(wire_dtype: str, rate: float) -> tuple[Any, list[Any], list[float]]:
        keras.utils.set_random_seed(100 + ctx.rank)  # node 0's weights travel to the others
        with options(ctx, wire_dtype=wire_dtype):
            model = training.distribute(dense(keras.optimizers.SGD(rate)), ctx)
            initial = model.get_weights()
            fit = model.fit(share, epochs=2, verbose=0)
        return model, initial, fit.history["loss"]

    (exact, _, _), (rounded, initial, _) = (train(wire_dtype, 0.1) for wire_dtype in ("float32", "bfloat16"))
    (_, _, losses), (still, unmoved, same_losses) = (train(wire_dtype, 0.0) for wire_dtype in ("float32", "bfloat16"))
    found = {"digest": digest(rounded) + digest(still), "losses_off": distance([losses], [same_losses])}
    if ctx.is_chief:
        moved = distance(rounded.get_weights(), initial)
        found["off"] = distance(rounded.get_weights(), exact.get_weights()) / moved
        found["changed_without_rate"] = distance(still.get_weights(), unmoved)
    return found


# --- behaviour ------------------------------------------------------------------------------------------------


def distributed(ctx: Context, optimizer: Any = None, **compile_arguments: Any) -> tuple[Any, tf.data.Dataset]:
    """Return a distributed dense model and this node's share of the rows."""
    rows = classification()
    model = training.distribute(dense(optimizer or sgd(), **compile_arguments), ctx)
    return model, rows.dataset([step[ctx.rank] for step in uneven(len(rows.columns[0]), ctx.num_nodes)])


def case_lifecycle(ctx: Context) -> dict[str, Any]:
    """Distribute before compile, twice; fit, compile again, fit again; predict; copy and save."""
    keras.utils.set_random_seed(ctx.rank)
    model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(CLASSES, "softmax")])
    assert training.distribute(model, ctx) is model
    hooked = model.fit
    assert training.distribute(model, ctx) is model
    assert model.fit == hooked
    rows = classification()
    share = rows.dataset([step[ctx.rank] for step in uneven(150, ctx.num_nodes)])
    model.compile("adam", "sparse_categorical_crossentropy")
    model.evaluate(share, verbose=0)
    model.fit(share, epochs=1, verbose=0)
    model.fit(share, epochs=1, verbose=0)
    model.compile(sgd(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x=share, epochs=2, verbose=0, callbacks=keras.callbacks.CallbackList([], add_history=True, model=model))
    model.train_on_batch(*rows.take(slice(ctx.rank, ctx.rank + 3)))
    copies = [keras.models.clone_model(model), pickle.loads(pickle.dumps(model))]
    x = rows.columns[0]
    return {
        "digest": digest(model),
        "copies_are_plain": [type(copy.fit.__self__) is not type(model.fit.__self__) for copy in copies],
        "predicts_own_rows": list(model.predict(x[: 5 + ctx.rank], verbose=0).shape) == [5 + ctx.rank, CLASSES],
        "copy_predicts_alike": distance([copies[1].predict(x, verbose=0)], [model.predict(x, verbose=0)]),
        "leftovers": sorted(set(vars(model.optimizer)) & {"apply"}),
    }


def case_stop(ctx: Context) -> dict[str, Any]:
    """Only the last node wants to stop; one weights file, one decision."""
    model, share = distributed(ctx)

    def maybe(epoch: int, logs: Any) -> None:
        if epoch == 1 and ctx.rank == ctx.num_nodes - 1:
            model.stop_training = True

    stop = keras.callbacks.LambdaCallback(on_epoch_end=maybe)
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", min_delta=10, patience=1, factor=0.5)
    fit = model.fit(share, epochs=9, callbacks=[plateau, stop])
    return {"digest": digest(model), "epochs": len(fit.epoch), "rate": float(model.optimizer.learning_rate.numpy())}


def case_no_rows_anywhere(ctx: Context) -> dict[str, Any]:
    """A step in which no node has a row changes nothing."""
    model, share = distributed(ctx, keras.optimizers.AdamW(0.01))
    rows = classification()
    model.fit(share, epochs=1)
    before, iterations = digest(model), int(model.optimizer.iterations.numpy())
    empty = rows.dataset([np.arange(0), np.arange(0)])
    if ctx.num_nodes == 1:
        return {"digest": before, "unchanged": True}
    model.fit(empty, epochs=1)
    return {
        "digest": digest(model),
        "unchanged": digest(model) == before and int(model.optimizer.iterations.numpy()) == iterations,
    }


def case_arrays(ctx: Context) -> dict[str, Any]:
    """NumPy arrays of equal length per node, validation_split."""
    keras.utils.set_random_seed(ctx.rank)
    model = training.distribute(dense("adam"), ctx)
    x, y = classification(64).columns
    fit = model.fit(x, y, batch_size=16, epochs=2, validation_split=0.25, verbose=0)
    return {"digest": digest(model), "history": {k: [float(v) for v in vs] for k, vs in fit.history.items()}}


def case_jit(ctx: Context) -> dict[str, Any]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tfos_magic").addHandler(handler)
    model, share = distributed(ctx, jit_compile=True)
    model.fit(share, epochs=1, verbose=0)
    return {"digest": digest(model), "warned": any("jit_compile is off" in text for text in records)}


# --- mistakes -------------------------------------------------------------------------------------------------


def case_different_steps(ctx: Context) -> dict[str, Any]:
    model = training.distribute(dense("adam"), ctx)
    x, y = classification(64 + 32 * ctx.rank).columns
    model.fit(x, y, batch_size=16)
    return {}


def case_different_models(ctx: Context) -> dict[str, Any]:
    model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(CLASSES + ctx.rank)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    training.distribute(model, ctx).fit(*classification(32).columns)
    return {}


def case_different_unbuilt_models(ctx: Context) -> dict[str, Any]:
    model = keras.Sequential([keras.layers.Dense(CLASSES + ctx.rank)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    training.distribute(model, ctx).fit(*classification(32).columns)
    return {}


def case_not_a_model(ctx: Context) -> dict[str, Any]:
    training.distribute([1, 2], ctx)
    return {}


def case_late_strategy(ctx: Context) -> dict[str, Any]:
    tf.constant(1)
    training.strategy(ctx)
    return {}


def case_uneven_loop(ctx: Context) -> dict[str, Any]:
    """Batches run out on one node, and nothing could tell so beforehand. Ends the ring."""
    model = training.distribute(dense("adam"), ctx)
    rows = classification()
    batches = [np.arange(BATCH)] * (3 + ctx.rank)
    model.fit(rows.dataset(batches, knows_size=False), epochs=1, verbose=0)
    return {}


def case_chief_evaluates_alone(ctx: Context) -> dict[str, Any]:
    """The other nodes are done. Ends the ring."""
    model, share = distributed(ctx)
    model.fit(share, epochs=1, verbose=0)
    if ctx.is_chief:
        model.evaluate(share, verbose=0)
    else:
        training.close(ctx)
    return {}


def case_peer_raises(ctx: Context) -> dict[str, Any]:
    """A user's bug on the last node, in the middle of an epoch."""
    model, share = distributed(ctx)

    def bug(batch: int, logs: Any) -> None:
        if ctx.rank == ctx.num_nodes - 1 and batch == 3:
            training.close(ctx)  # as the end of its process does
            raise KeyError("a bug")

    model.fit(share, epochs=3, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=bug)])
    return {}


# --- custom loop ----------------------------------------------------------------------------------------------


def case_second_model(ctx: Context) -> dict[str, Any]:
    """Two models in one process, trained in turns."""
    first, share = distributed(ctx)
    second, _ = distributed(ctx, keras.optimizers.Adam(0.01))
    first.fit(share, epochs=1, verbose=0)
    second.fit(share, epochs=1, verbose=0)
    first.fit(share, epochs=1, verbose=0)
    return {"digest": digest(first) + digest(second)}


def case_strategy(ctx: Context) -> dict[str, Any]:
    """A loop of one's own under MultiWorkerMirroredStrategy, by the recipe in its docstring."""
    strategy = training.strategy(ctx)
    assert training.strategy(ctx) is strategy
    rows = classification(96)
    x, y = rows.columns
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(CLASSES)])
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
    initial = [np.array(w) for w in model.get_weights()]
    mine = [np.arange(s + ctx.rank * BATCH, s + (ctx.rank + 1) * BATCH) for s in range(0, 96, BATCH * ctx.num_nodes)]
    batches = strategy.distribute_datasets_from_function(lambda _: rows.dataset(mine))

    def step(batch: Any) -> Any:
        inputs, labels = batch
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_sum(losses) / (ctx.num_nodes * BATCH)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    @tf.function
    def train_step(batch: Any) -> Any:
        return strategy.reduce("SUM", strategy.run(step, args=(batch,)), axis=None)

    losses = [float(train_step(batch)) for batch in batches]
    weights = [np.array(w) for w in model.get_weights()]
    return {"losses": losses, "weights_off": distance(weights, plain_loop(initial, x, y, BATCH * ctx.num_nodes))}


def plain_loop(weights: list[Any], x: Any, y: Any, batch: int) -> list[Any]:
    kernel, bias = (np.array(w, "float64") for w in weights)
    for start in range(0, len(x), batch):
        rows = x[start : start + batch].astype("float64")
        logits = rows @ kernel + bias
        odds = np.exp(logits - logits.max(1, keepdims=True))
        error = (odds / odds.sum(1, keepdims=True) - np.eye(CLASSES)[y[start : start + batch]]) / batch
        kernel, bias = kernel - 0.1 * rows.T @ error, bias - 0.1 * error.sum(0)
    return [kernel, bias]


# --- the zoo --------------------------------------------------------------------------------------------------


class NestedRows(Rows):
    """Rows as nested as the model's inputs and outputs are."""

    def __init__(self, columns: Any) -> None:
        super().__init__(tuple(tf.nest.flatten(columns)))
        object.__setattr__(self, "nested", columns)

    def dataset(self, batches: list[Any], *, knows_size: bool = True) -> tf.data.Dataset:
        flat = super().dataset(batches, knows_size=knows_size)
        return flat.map(lambda *columns: tf.nest.pack_sequence_as(self.nested, columns))  # type: ignore[attr-defined]


class Watch(keras.callbacks.Callback):
    """What a fit has done, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[list[Any]] = []
        self.digests: list[str] = []
        self.rates: list[float] = []
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        self._rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.weights.append([np.array(w) for w in self.model.get_weights()])
        self.digests.append(hashlib.sha256(b"".join(w.tobytes() for w in self.weights[-1])).hexdigest())
        self.rates.append(self._rate)


def build_row(row: training_zoo.Row) -> Any:
    keras.config.set_dtype_policy(row.policy)
    try:
        model = row.model(keras)
        model.compile(row.optimizer(keras), row.loss, metrics=row.metrics(keras), **row.compile)
    finally:
        keras.config.set_dtype_policy("float32")
    return model


def fit_row(row: training_zoo.Row, model: Any, data: Any, *, has_callbacks: bool) -> tuple[Watch, dict[str, Any]]:
    """Train, and say what has come of it: all but the weights, which are with the Watch."""
    folder = Path(tempfile.mkdtemp())
    watch = Watch()
    callbacks = row.callbacks(keras, folder) if row.callbacks and has_callbacks else []
    validation = data if row.validates else None
    callbacks = [*callbacks, watch]
    fit = model.fit(data, epochs=row.epochs, validation_data=validation, verbose=0, callbacks=callbacks, **row.fit)
    evaluated = model.evaluate(data, return_dict=True, verbose=0) if row.validates else {"none": 0}
    watch.weights.append([np.array(w) for w in model.get_weights()])
    return watch, {
        "history": {name: [float(x) for x in values] for name, values in fit.history.items()},
        "evaluated": {name: float(np.mean(value)) for name, value in evaluated.items()},
        "digests": [*watch.digests, digest(model)],
        "rates": watch.rates,
        "batches": watch.batches,
        "files": {file.name: read_file(file) for file in sorted(folder.iterdir())},
    }


def read_file(file: Path) -> list[list[float]]:
    """Return the numbers of a log, the largest and the sum of each weight of a model."""
    if file.suffix == ".csv":
        return [[float(x) for x in line.split(",")] for line in file.read_text().splitlines()[1:]]
    if file.suffix == ".keras":
        return [[float(w.max()), float(w.sum())] for w in keras.models.load_model(file).get_weights()]
    return []


def train_row(name: str, ctx: Context) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Train a row of the zoo over the nodes.

    Returns
    -------
    found : dict
    refer : callable
        Trains it in one process, too, and returns the distances between the two.
    """
    row = training_zoo.TABLE[name]
    rows = NestedRows(row.columns())
    layout = uneven(training_zoo.COUNT, ctx.num_nodes)
    mine = [step[ctx.rank] for step in layout]
    keras.utils.set_random_seed(100 + ctx.rank)
    model = training.distribute(build_row(row), ctx)
    watch, found = fit_row(row, model, rows.dataset(mine), has_callbacks=ctx.is_chief or not row.chief_only)
    found["empty_batches"] = sum(len(batch) == 0 for batch in mine)

    def refer() -> dict[str, Any]:
        keras.utils.set_random_seed(100)
        reference = build_row(row)
        if row.by_shards:
            sizes = itertools.cycle([[len(share) for share in step] for step in layout])
            reference.train_step = functools.partial(step_by_shards, reference, sizes)
            reference.run_eagerly = True
        whole = rows.dataset([np.concatenate(step) for step in layout])
        return distances(watch, found, *fit_row(row, reference, whole, has_callbacks=True))

    return found, refer


def distances(watch: Watch, found: dict[str, Any], other: Watch, expected: dict[str, Any]) -> dict[str, Any]:
    """Say how far from the reference all has stayed."""
    names = set(expected["history"]) - {"learning_rate"}  # where only the chief has the callback; see the rates
    assert names == set(found["history"]) - {"learning_rate"}, (names, set(found["history"]))
    off = {
        "weights_off": [distance(a, b) for a, b in zip(watch.weights, other.weights, strict=True)],
        "history_off": {k: distance([found["history"][k]], [expected["history"][k]]) for k in names},
        "evaluated_off": distance(
            [found["evaluated"][k] for k in expected["evaluated"]], expected["evaluated"].values()
        ),
        "rates_off": distance([found["rates"]], [expected["rates"]]),
    }
    largest = max([*off["weights_off"], *off["history_off"].values(), off["evaluated_off"]])
    return off | {
        "largest": largest,
        "moved": distance(other.weights[0], other.weights[len(other.digests) - 1]),
        "expected": {name: expected[name] for name in ("batches", "files", "rates")},
    }


def step_by_shards(model: Any, sizes: Iterator[list[int]], data: Any) -> dict[str, Any]:
    """Train on each node's rows by themselves, then average as the nodes do: gradients, moving statistics, the loss."""
    x, y = data
    shards = zip(
        *(tf.split(part, next_sizes) for part, next_sizes in zip((x, y), [next(sizes)] * 2, strict=True)), strict=True
    )
    statistics = model.non_trainable_variables
    before = [tf.identity(v.value) for v in statistics]
    totals = [tf.zeros_like(v.value) for v in (*model.trainable_variables, *statistics)]
    mean_loss = tf.constant(0.0)
    for own_x, own_y in shards:
        if not len(own_x):
            continue
        for variable, value in zip(statistics, before, strict=True):
            variable.assign(value)
        with tf.GradientTape() as tape:
            predicted = model(own_x, training=True)
            loss = model.compute_loss(x=own_x, y=own_y, y_pred=predicted)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        share = len(own_x) / len(x)
        parts = [*gradients, *(v.value for v in statistics)]
        totals = [total + share * part for total, part in zip(totals, parts, strict=True)]
        mean_loss += share * loss
        model.compute_metrics(own_x, own_y, predicted)
    count = len(model.trainable_variables)
    for variable, total in zip(statistics, totals[count:], strict=True):
        variable.assign(total)
    model.optimizer.apply(totals[:count], model.trainable_variables)
    model.metrics[0].update_state(mean_loss, sample_weight=len(x))
    return dict(model.get_metrics_result())


def refer_all(found: dict[str, dict[str, Any]], pending: dict[str, Callable[[], dict[str, Any]]], ctx: Context) -> None:
    """Train the references, each on one node only: they are the longer half of the work."""
    for number, (name, refer) in enumerate(pending.items()):
        if number % ctx.num_nodes == ctx.rank and "error" not in found[name]:
            found[name] |= guarded(f"reference of {name}", refer)


# --- callbacks that decide --------------------------------------------------------------------------------------


def case_resume(ctx: Context) -> dict[str, Any]:
    """BackupAndRestore with a folder that only the chief has: all go on at its epoch, with its weights and slots."""
    folder = Path(tempfile.mkdtemp())
    rows = classification()
    layout = uneven(150, ctx.num_nodes)
    share, whole = rows.dataset([step[ctx.rank] for step in layout]), rows.dataset([np.concatenate(s) for s in layout])
    seen = []

    def fit(model: Any, data: Any, epochs: int) -> Any:
        backup = keras.callbacks.BackupAndRestore(str(folder / "backup"), delete_checkpoint=False)
        model.fit(data, epochs=epochs, verbose=0, callbacks=[backup])
        seen.append(model.history.epoch)
        return model

    keras.utils.set_random_seed(100 + ctx.rank)
    fit(training.distribute(dense(keras.optimizers.Adam(0.01)), ctx), share, 2)
    keras.utils.set_random_seed(200 + ctx.rank)
    model = fit(training.distribute(dense(keras.optimizers.Adam(0.01)), ctx), share, 4)
    keras.utils.set_random_seed(100)
    reference = dense(keras.optimizers.Adam(0.01))
    reference.fit(whole, epochs=4, verbose=0)
    return {
        "digest": digest(model),
        "epochs": seen,
        "off": distance(model.get_weights(), reference.get_weights()),
        "files": sorted(file.name for file in folder.iterdir()),
    }


def case_nan(ctx: Context) -> dict[str, Any]:
    """One node's rows make the loss no number: all stop after that step, as one process does."""
    x, y = classification().columns
    layout = uneven(150, ctx.num_nodes)
    x[layout[4][-1][0]] = np.nan
    rows = Rows((x, y))
    share, whole = rows.dataset([step[ctx.rank] for step in layout]), rows.dataset([np.concatenate(s) for s in layout])
    watches = []

    def fit(model: Any, data: Any) -> Any:
        watches.append(Watch())
        model.fit(data, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN(), watches[-1]])
        return model

    model = fit(training.distribute(dense(sgd()), ctx), share)
    fit(dense(sgd()), whole)
    return {"digest": digest(model), "batches": [watch.batches for watch in watches]}


class OwnCheckpoint(keras.callbacks.ModelCheckpoint):
    """Made of Keras's."""


def case_writers(ctx: Context) -> dict[str, Any]:
    """Which callbacks are left out, on which nodes."""
    folder = Path(tempfile.mkdtemp())
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tfos_magic.training.keras_fit")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model, share = distributed(ctx)
    own = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: (folder / "own").touch())
    writers = [OwnCheckpoint(folder / "own.keras"), keras.callbacks.TensorBoard(str(folder / "board"))]
    model.fit(share, epochs=1, verbose=0, callbacks=[own, *writers])
    listed = keras.callbacks.CallbackList([keras.callbacks.CSVLogger(folder / "log.csv"), own], model=model)
    model.fit(share, epochs=1, verbose=0, callbacks=listed)
    model.evaluate(share, verbose=0, callbacks=[keras.callbacks.TensorBoard(str(folder / "evaluated"))])
    logger.removeHandler(handler)
    files = sorted(file.name for file in folder.iterdir())
    return {"digest": digest(model), "files": files, "said": [text for text in records if "Left out" in text]}


def case_different_first_epochs(ctx: Context) -> dict[str, Any]:
    model, share = distributed(ctx)
    model.fit(share, epochs=3, initial_epoch=ctx.rank, verbose=0)
    return {}


def case_stops_alone(ctx: Context) -> dict[str, Any]:
    """One node would stop in the middle of an epoch. Ends the ring."""
    model, share = distributed(ctx)

    def stop(batch: int, logs: Any) -> None:
        model.stop_training |= ctx.rank == 1 and batch == 3

    try:
        model.fit(share, epochs=1, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=stop)])
    finally:
        training.close(ctx)
    return {}


def case_different_schedules(ctx: Context) -> dict[str, Any]:
    """Ends the ring."""
    rates = keras.optimizers.schedules.ExponentialDecay(0.1 + 0.1 * ctx.rank, 10, 0.9)
    model, share = distributed(ctx, keras.optimizers.SGD(rates))
    try:
        model.fit(share, epochs=1, verbose=0)
    finally:
        training.close(ctx)
    return {}


# --- running --------------------------------------------------------------------------------------------------


def guarded(name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `action` returns, or its error; say how long it took."""
    started = time.monotonic()
    try:
        found = action()
    except Exception as error:
        traceback.print_exc()
        kind = type(error)
        found = {"error": f"{kind.__module__}.{kind.__qualname__}", "message": str(error)}
    print(f"case {name}: {time.monotonic() - started:.1f} s", flush=True)
    return found


def run(name: str, ctx: Context, pending: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    kind, _, row = name.rpartition(":")
    if not kind:
        return guarded(name, lambda: globals()[f"case_{name}"](ctx))

    def train() -> dict[str, Any]:
        found, pending[name] = train_row(row, ctx)
        return found

    return guarded(name, train)


def main(result: Path, cases: list[str]) -> None:
    ctx = Context.from_environment()
    pending: dict[str, Callable[[], dict[str, Any]]] = {}
    found = {name: run(name, ctx, pending) for name in cases}
    refer_all(found, pending, ctx)
    found["versions"] = {"keras": keras.__version__, "tensorflow": tf.__version__}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # TensorFlow takes a second to take itself apart
