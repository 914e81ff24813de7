"""The model zoo: what is known to train over N nodes as in one process, one row for each thing.

Run as ``python tests/training_zoo.py`` it trains all rows on two nodes and prints them as a Markdown table, each with
the largest distance from one process that was found.

The table is read where there is no TensorFlow, too: whatever needs Keras is a function of it. training_cases.py trains
the rows, training_harness.py starts its processes, test_training_zoo.py judges what they found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

COUNT = 150
Keras = Any
"""The module itself."""
Columns = Any
"""Nested tuples of arrays of equal length, as ``fit`` takes them: (x, y) or (x, y, sample_weight)."""


# --- rows of data ---------------------------------------------------------------------------------------------


def _noise(*shape: int, seed: int = 7) -> Any:
    return np.random.default_rng(seed).normal(size=(COUNT, *shape)).astype("float32")


def _classes(x: Any) -> Any:
    return (x.reshape(COUNT, -1)[:, :3] + _noise(3, seed=8)).argmax(1).astype("int64")


def vectors() -> Columns:
    x = _noise(6)
    return x, _classes(x)


def weighted_vectors() -> Columns:
    return *vectors(), np.random.default_rng(9).uniform(0.2, 2, COUNT).astype("float32")


def one_hot_vectors() -> Columns:
    x, y = vectors()
    return x, np.eye(3, dtype="float32")[y]


def binary_vectors() -> Columns:
    x, y = vectors()
    return x, (y == 1).astype("float32")[:, None]


def images() -> Columns:
    x = _noise(8, 8, 2)
    return x, _classes(x)


def sequences() -> Columns:
    x = _noise(5, 8)
    return x, _classes(x)


def words() -> Columns:
    x = np.random.default_rng(3).integers(0, 50, (COUNT, 4))
    return x, (x.sum(1) % 3).astype("int64")


def padded_sequences() -> Columns:
    """Steps of zeros at the end, more and more of them from row to row."""
    x, y = sequences()
    length = 1 + 4 * (COUNT - np.arange(COUNT)) // COUNT
    x[np.arange(5) >= length[:, None]] = 0
    return x, y


def tagged_words() -> Columns:
    """Each word has a class of its own; zero is padding, more and more of it from row to row."""
    x, _ = words()
    x[np.arange(4) >= 4 - 3 * np.arange(COUNT)[:, None] // COUNT] = 0
    return x, x % 3


def pairs() -> Columns:
    x = _noise(6)
    return (x[:, :4], x[:, 4:]), (x[:, :1] * 2, x[:, 1:3])


# --- models ---------------------------------------------------------------------------------------------------


def dense(k: Keras) -> Any:
    layers = k.layers
    return k.Sequential([k.Input((6,)), layers.Dense(10, "tanh"), layers.Dense(3, "softmax")])


def dense_binary(k: Keras) -> Any:
    return k.Sequential([k.Input((6,)), k.layers.Dense(10, "tanh"), k.layers.Dense(1, "sigmoid")])


def regularised(k: Keras) -> Any:
    hidden = k.layers.Dense(10, "tanh", kernel_regularizer=k.regularizers.L1L2(0.01, 0.01), bias_regularizer="l2")
    return k.Sequential([k.Input((6,)), hidden, k.layers.Dense(3, "softmax")])


def activity_regularised(k: Keras) -> Any:
    hidden = k.layers.Dense(10, "tanh", activity_regularizer="l2")
    return k.Sequential([k.Input((6,)), hidden, k.layers.Dense(3, "softmax")])


def conv(k: Keras) -> Any:
    layers = [k.layers.Conv2D(4, 3, activation="tanh"), k.layers.MaxPooling2D(), k.layers.Flatten()]
    return k.Sequential([k.Input((8, 8, 2)), *layers, k.layers.Dense(3, "softmax")])


def embedding(k: Keras) -> Any:
    layers = [k.layers.Embedding(50, 8), k.layers.Flatten(), k.layers.Dense(3, "softmax")]
    return k.Sequential([k.Input((4,), dtype="int64"), *layers])


def lstm(k: Keras) -> Any:
    return k.Sequential([k.Input((5, 8)), k.layers.LSTM(6), k.layers.Dense(3, "softmax")])


def attention(k: Keras) -> Any:
    # No bias: that of the keys has no effect, its gradient is rounding only, and Adam makes steps of that.
    inputs = k.Input((5, 8))
    seen = k.layers.LayerNormalization()(inputs + k.layers.MultiHeadAttention(2, 4, use_bias=False)(inputs, inputs))
    return k.Model(inputs, k.layers.Dense(3, "softmax")(k.layers.GlobalAveragePooling1D()(seen)))


def layer_norm(k: Keras) -> Any:
    layers = [k.layers.Dense(10), k.layers.LayerNormalization(), k.layers.Activation("tanh")]
    return k.Sequential([k.Input((6,)), *layers, k.layers.Dense(3, "softmax")])


def batch_norm(k: Keras) -> Any:
    layers = [k.layers.Dense(8), k.layers.BatchNormalization(momentum=0.5), k.layers.Activation("tanh")]
    return k.Sequential([k.Input((6,)), *layers, k.layers.Dense(3, "softmax")])


def synchronised_batch_norm(k: Keras) -> Any:
    first, second = (k.layers.BatchNormalization(momentum=0.5, synchronized=True) for _ in range(2))
    layers = [k.layers.Conv2D(4, 3), first, k.layers.Activation("tanh"), k.layers.Flatten(), k.layers.Dense(6), second]
    return k.Sequential([k.Input((8, 8, 2)), *layers, k.layers.Dense(3, "softmax")])


def masked_batch_norm(k: Keras) -> Any:
    norm = k.layers.BatchNormalization(momentum=0.5, synchronized=True)
    layers = [k.layers.Masking(), norm, k.layers.GlobalAveragePooling1D(), k.layers.Dense(3, "softmax")]
    return k.Sequential([k.Input((5, 8)), *layers])


def tagger(k: Keras) -> Any:
    return k.Sequential(
        [k.Input((4,), dtype="int64"), k.layers.Embedding(50, 8, mask_zero=True), k.layers.Dense(3, "softmax")]
    )


def several_ends(k: Keras) -> Any:
    left, right = k.Input((4,), name="left"), k.Input((2,), name="right")
    hidden = k.layers.Dense(8, "tanh")(k.layers.Concatenate()([left, right]))
    return k.Model([left, right], [k.layers.Dense(1, name="a")(hidden), k.layers.Dense(2, name="b")(hidden)])


# --- optimizers -----------------------------------------------------------------------------------------------


def momentum(k: Keras) -> Any:
    return k.optimizers.SGD(0.1, momentum=0.9)


def adam(k: Keras) -> Any:
    return k.optimizers.Adam(0.01)


def adagrad(k: Keras) -> Any:
    return k.optimizers.Adagrad(0.1)


# --- the table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One thing that N nodes do as one process does.

    Parameters
    ----------
    name : str
    shows : str
        What the row stands for, in words.
    callbacks : callable
        From Keras and a folder for files to callbacks; each node has a folder of its own.
    chief_only : bool
        Whether only the chief has those callbacks.
    validates : bool
        Whether there is validation, and an evaluation afterwards: not where nothing of the row would be in it.
    policy : str
        Keras's dtype policy.
    tolerance : float
        The largest distance of weights, after each epoch, and of all of history.
    by_shards : bool
        Whether the reference goes through each node's rows by themselves: a layer that looks at its node's batch only.
    differs : str
        Why it is known not to be as in one process; empty where it is.
    """

    name: str
    shows: str
    model: Callable[[Keras], Any] = dense
    columns: Callable[[], Columns] = vectors
    optimizer: Callable[[Keras], Any] = momentum
    loss: Any = "sparse_categorical_crossentropy"
    metrics: Callable[[Keras], Any] = lambda k: ["accuracy"]
    compile: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[Keras, Path], list[Any]] | None = None
    chief_only: bool = False
    epochs: int = 2
    validates: bool = True
    policy: str = "float32"
    tolerance: float = 1e-5
    by_shards: bool = False
    differs: str = ""


MODELS = (
    Row("dense", "dense layers"),
    Row("conv", "convolution, pooling", conv, images, validates=False),
    Row("embedding", "embedding: sparse gradients, Adam", embedding, words, adam),
    Row("embedding_sgd", "embedding: sparse gradients, SGD with momentum", embedding, words, validates=False),
    Row("embedding_adagrad", "embedding: sparse gradients, Adagrad", embedding, words, adagrad, validates=False),
    Row("lstm", "LSTM", lstm, sequences, adam, validates=False),
    Row(
        "batch_norm",
        "batch normalisation, each node its own batch, as one process that goes through it in those parts",
        batch_norm,
        by_shards=True,
    ),
    Row("synchronised", "batch normalisation, synchronized=True", synchronised_batch_norm, images),
    Row(
        "synchronised_masked",
        "batch normalisation, synchronized=True, masked, eager",
        masked_batch_norm,
        padded_sequences,
        compile={"run_eagerly": True},
    ),
    Row("layer_norm", "layer normalisation", layer_norm, validates=False),
    Row("attention", "multi-head attention, residual", attention, sequences, adam, validates=False),
    Row(
        "several_ends",
        "two inputs, two outputs, loss weights",
        several_ends,
        pairs,
        loss=["mse", "mae"],
        metrics=lambda k: [["mae"], ["mse"]],
        compile={"loss_weights": [1.0, 0.5]},
    ),
)

_OPTIMIZERS = (
    Row("sgd", "SGD", optimizer=lambda k: k.optimizers.SGD(0.1)),
    Row("nesterov", "SGD, Nesterov", optimizer=lambda k: k.optimizers.SGD(0.1, momentum=0.9, nesterov=True)),
    Row("adam", "Adam", optimizer=adam),
    Row("adamw", "AdamW, weight decay", optimizer=lambda k: k.optimizers.AdamW(0.01, weight_decay=0.1)),
    Row("rmsprop", "RMSprop", optimizer=lambda k: k.optimizers.RMSprop(0.01, momentum=0.5, centered=True)),
    Row("adagrad", "Adagrad", optimizer=adagrad),
    Row("lion", "Lion", optimizer=lambda k: k.optimizers.Lion(0.003)),
)
OPTIMIZERS = tuple(replace(row, validates=False) for row in _OPTIMIZERS)

_GRADIENTS = (
    Row("weight_decay", "weight decay", optimizer=lambda k: k.optimizers.SGD(0.1, weight_decay=0.05)),
    Row("clipnorm", "clipnorm", optimizer=lambda k: k.optimizers.SGD(0.5, clipnorm=0.05)),
    Row("clipvalue", "clipvalue", optimizer=lambda k: k.optimizers.SGD(0.5, clipvalue=0.02)),
    Row("global_clipnorm", "global_clipnorm", optimizer=lambda k: k.optimizers.Adam(0.01, global_clipnorm=0.1)),
    Row(
        "ema", "moving average of weights", optimizer=lambda k: k.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9)
    ),
    Row(
        "accumulation",
        "gradient accumulation",
        optimizer=lambda k: k.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    ),
    Row(
        "schedule",
        "learning-rate schedule",
        optimizer=lambda k: k.optimizers.SGD(k.optimizers.schedules.CosineDecay(0.2, 20), momentum=0.9),
    ),
)
GRADIENTS = tuple(replace(row, validates=row.name == "ema") for row in _GRADIENTS)

OPTIONS = (
    Row("regularisers", "regularisers of kernel and bias", regularised),
    Row(
        "masked_loss",
        "masked loss",
        tagger,
        tagged_words,
        differs="its divisor is the number of values left, by which nodes are not weighted",
    ),
    Row("activity_regulariser", "regulariser of activity", activity_regularised),
    Row("class_weight", "class weights", fit={"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}}),
    Row("sample_weight", "sample weights", columns=weighted_vectors, compile={"weighted_metrics": ["accuracy"]}),
    Row("run_eagerly", "run_eagerly", compile={"run_eagerly": True}),
    Row("jit_compile", "jit_compile (off where N > 1)", compile={"jit_compile": True}),
    Row("steps_per_execution", "steps_per_execution", compile={"steps_per_execution": 5}),
    Row(
        "float16", "mixed precision, float16 with loss scaling", optimizer=adam, policy="mixed_float16", tolerance=1e-3
    ),
    Row("bfloat16", "mixed precision, bfloat16", policy="mixed_bfloat16", tolerance=1e-2, validates=False),
)

METRICS = (
    Row(
        "means",
        "metrics: means",
        dense_binary,
        binary_vectors,
        loss="binary_crossentropy",
        metrics=lambda k: ["mse", "mae", k.metrics.RootMeanSquaredError(), k.metrics.BinaryAccuracy()],
    ),
    Row(
        "auc",
        "metrics: AUC, precision, recall",
        dense_binary,
        binary_vectors,
        loss="binary_crossentropy",
        metrics=lambda k: [k.metrics.AUC(name="auc"), k.metrics.Precision(name="p"), k.metrics.Recall(name="r")],
    ),
    Row("top_k", "metrics: top-k", metrics=lambda k: [k.metrics.SparseTopKCategoricalAccuracy(2)], validates=False),
    Row(
        "f1",
        "metrics: F1",
        columns=one_hot_vectors,
        loss="categorical_crossentropy",
        metrics=lambda k: [k.metrics.F1Score("macro"), k.metrics.CategoricalAccuracy()],
    ),
)


def _stopping(k: Keras, folder: Path) -> list[Any]:
    # Upside down, so that it stops early and the best weights are not the last.
    return [k.callbacks.EarlyStopping("val_loss", mode="max", patience=2, restore_best_weights=True)]


def _plateau(k: Keras, folder: Path) -> list[Any]:
    return [k.callbacks.ReduceLROnPlateau("loss", min_delta=10, patience=1, factor=0.5)]


def _checkpoints(k: Keras, folder: Path) -> list[Any]:
    saver = k.callbacks.ModelCheckpoint
    paths = [str(folder / "every-{epoch}.keras"), str(folder / "best.weights.h5")]
    return [saver(paths[0]), saver(paths[1], monitor="val_loss", save_best_only=True, save_weights_only=True)]


def _log(k: Keras, folder: Path) -> list[Any]:
    return [k.callbacks.CSVLogger(str(folder / "log.csv"))]


CALLBACKS = (
    Row("early_stopping", "EarlyStopping, best weights restored", callbacks=_stopping, epochs=6),
    Row("plateau", "ReduceLROnPlateau", callbacks=_plateau, epochs=3, validates=False),
    Row("checkpoint", "ModelCheckpoint", callbacks=_checkpoints, epochs=2),
    Row("csv_logger", "CSVLogger", callbacks=_log, epochs=2),
    Row(
        "scheduler",
        "LearningRateScheduler",
        callbacks=lambda k, folder: [k.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch))],
        epochs=3,
        validates=False,
    ),
    Row(
        "chief_decides",
        "EarlyStopping and ReduceLROnPlateau on the chief only",
        callbacks=lambda k, folder: [*_plateau(k, folder), *_stopping(k, folder)],
        chief_only=True,
        epochs=6,
    ),
)

TABLE = {row.name: row for row in (*MODELS, *OPTIMIZERS, *GRADIENTS, *OPTIONS, *METRICS, *CALLBACKS)}
FAST = ("dense", "embedding", "synchronised")
OLDEST = (
    "several_ends",
    "adamw",
    "top_k",
    "embedding",
    "lstm",
    "synchronised",
    "lion",
    "ema",
    "global_clipnorm",
    "sample_weight",
    "run_eagerly",
    "steps_per_execution",
    "f1",
    "float16",
    "checkpoint",
    "chief_decides",
)


# --- the table for people -------------------------------------------------------------------------------------


def markdown(results: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the table, with the largest distance of each row as `results` has it for each number of nodes."""
    lines = [f"| what | tolerance |{''.join(f' {count} |' for count in results)}", f"|---|---|{'---|' * len(results)}"]
    for row in TABLE.values():
        measured = "".join(f" {_largest(found[row.name])} |" for found in results.values())
        lines.append(f"| {row.shows}{f': {row.differs}' if row.differs else ''} | {row.tolerance:.0e} |{measured}")
    return "\n".join(lines)


def _largest(found: Mapping[str, Any]) -> str:
    return f"{found['largest']:.0e}" if "largest" in found else str(found.get("message", "failed"))


def main() -> None:
    """Print the table, all rows on one, two and four nodes; the tests have all on two, and some on one and four."""
    from training_harness import merged, run_nodes

    cases = [f"zoo:{name}" for name in TABLE]
    print(markdown({count: merged(run_nodes(cases, count, timeout_s=900)) for count in (1, 2, 4)}), file=sys.stdout)


if __name__ == "__main__":
    main()
