"""A cell that trains with checkpoints and can be killed at any step, and what it takes to compare its runs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import run_cell

from tfos_magic.result import RunResult
from tfos_magic.training.options import TrainingOptions

ROWS, BATCH, EPOCHS, EVERY = 400, 16, 3, 4
STEPS = 13  # of two nodes: 200 rows each

CELL = textwrap.dedent(
    """
    import os, signal, time
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(8, "relu"), layers.Dropout(0.3), layers.Dense(3, "softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    ctx.distribute(model)

    class Kill(keras.callbacks.Callback):
        count = 0

        def on_train_batch_end(self, batch, logs=None):
            self.count += 1
            if ctx.attempt < len(args.kills) and (ctx.executor_id, self.count) == tuple(args.kills[ctx.attempt]):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(args.pause_s if ctx.attempt == 0 else 0)  # time to be killed in, not for what comes after

    history = model.fit(
        ctx.dataset(), validation_data=ctx.dataset("validation"), epochs=args.epochs, callbacks=[Kill()]
    )
    {"attempt": ctx.attempt, "weights": model.get_weights(), "history": history.history}
    """
).strip()


def frame(spark: Any, rows: int = ROWS, partitions: int = 5) -> Any:
    """Return rows of two features and a label of three classes."""
    return spark.range(rows, numPartitions=partitions).selectExpr(
        "cast(array(sin(id), cos(id)) as array<float>) as x", "cast(id % 3 as int) as label"
    )


def train(
    spark: Any,
    directory: Path | str,
    *,
    kills: Sequence[tuple[int, int]] = (),
    pause_s: float = 0.0,
    nodes: int = 2,
    epochs: int = EPOCHS,
    every: int | None = EVERY,
    resume: bool = False,
    **options: Any,
) -> RunResult:
    """Run the cell; `kills` says, attempt by attempt, which node is killed after how many batches."""
    training = TrainingOptions(checkpoint_dir=str(directory), checkpoint_every_steps=every, resume=resume)
    return run_cell(
        spark,
        CELL,
        nodes,
        data={"train": frame(spark), "validation": frame(spark, 90)},
        args={"kills": list(kills), "pause_s": pause_s},
        epochs=epochs,
        batch_size=BATCH,
        preload=("tensorflow",),
        timeout_s=240.0,
        seed=3,  # two runs begin with the same weights
        training=training,
        **options,
    )


def assert_same(found: RunResult, expected: RunResult) -> None:
    """Compare to the bit: weights of all nodes, history, and what the board has of it."""
    import numpy as np

    for value in found.values:
        for mine, theirs in zip(value["weights"], expected.values[0]["weights"], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert found.values[0]["history"] == expected.values[0]["history"]
    assert found.history == expected.history
