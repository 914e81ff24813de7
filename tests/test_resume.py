"""Runs that are killed and resumed on a real Spark: children, executors, the driver; and what else happens to them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resume_cell import EPOCHS, STEPS, assert_same, frame, train
from runs import run_cell

from tfos_magic.errors import NodeError, NodeKilledError, RunInterrupted
from tfos_magic.status import CheckpointSaved, Event, RunRestarted
from tfos_magic.training.options import TrainingOptions
from tfos_magic.widgets import words

pytestmark = pytest.mark.slow

HERE = os.path.dirname(__file__)


@pytest.fixture(scope="module")
def whole(spark_local4: Any, tmp_path_factory: Any) -> Any:
    """The run that nobody kills."""
    return train(spark_local4, tmp_path_factory.mktemp("whole"))


def test_children_that_are_killed_at_any_step_and_restarted(spark_local4: Any, tmp_path: Path, whole: Any) -> None:
    events: list[Event] = []
    kills = [(1, STEPS + 6), (0, 7), (1, 2)]
    found = train(spark_local4, tmp_path, kills=kills, max_restarts=3, on_event=events.append)
    assert_same(found, whole)
    assert [value["attempt"] for value in found.values] == [3, 3]
    restarts = [event for event in events if isinstance(event, RunRestarted)]
    assert [event.attempts_left for event in restarts] == [2, 1, 0]
    assert ["worker:0" in event.cause for event in restarts] == [True, False, True]
    assert all("was killed by signal 9" in event.cause for event in restarts)
    assert any(isinstance(event, CheckpointSaved) and event.where == "epoch 2, step 3" for event in events)
    told = words.restarts(found.board.view())
    assert told.startswith("attempt 4, since ")
    assert "worker:0" in told
    assert "signal 9" in told


def test_without_a_restart_the_error_says_how_to_go_on(spark_local4: Any, tmp_path: Path, whole: Any) -> None:
    with pytest.raises(NodeKilledError) as caught:
        train(spark_local4, tmp_path, kills=[(0, 6)])
    assert "--resume goes on from there" in caught.value.hint
    assert "saved up to epoch 1, step 4" in caught.value.hint
    assert_same(train(spark_local4, tmp_path, resume=True), whole)


def test_an_error_of_the_users_own_is_no_reason_to_start_again(spark_local4: Any) -> None:
    events: list[Event] = []
    with pytest.raises(NodeError, match="my own mistake"):
        run_cell(spark_local4, "raise ValueError('my own mistake')", 2, max_restarts=5, on_event=events.append)
    assert not any(isinstance(event, RunRestarted) for event in events)


def test_another_number_of_nodes_goes_on_with_the_epoch(spark_local4: Any, tmp_path: Path) -> None:
    with pytest.raises(NodeKilledError):
        train(spark_local4, tmp_path, kills=[(0, STEPS + 6)])
    found = train(spark_local4, tmp_path, resume=True, nodes=1)
    lines = "\n".join(found.logs["chief:0"])
    assert "Epoch 2 begins anew: the checkpoint is of 2 nodes, there are 1 now." in lines
    assert len(found.history["loss"]) == EPOCHS


def test_an_interrupt_says_what_is_saved(spark_local4: Any, tmp_path: Path, whole: Any) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.where.startswith("epoch 2"):
            signal.pthread_kill(main, signal.SIGINT)

    import threading

    main = threading.main_thread().ident or 0
    with pytest.raises(RunInterrupted, match="--resume goes on from there"):
        train(spark_local4, tmp_path, on_event=interrupt, pause_s=0.1)
    assert_same(train(spark_local4, tmp_path, resume=True), whole)


BEGIN = """
import os, pickle, types
from pyspark.sql import SparkSession
from leftovers import processes_with
from resume_cell import assert_same, train
from tfos_magic.status import CheckpointSaved, RunRestarted
spark = SparkSession.builder.getOrCreate()
"""


def test_an_executor_that_is_lost_with_all_it_had(
    spark_script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, whole: Any
) -> None:
    expected = tmp_path / "whole.pickle"
    expected.write_bytes(pickle.dumps((whole.values, whole.history)))
    done = spark_script(
        BEGIN
        + f"""
restarts, saved = [], []
def kill_one(event):
    if isinstance(event, RunRestarted):
        restarts.append(event)
    if isinstance(event, CheckpointSaved):
        saved.append(event)
        if len(saved) == 4:
            processes_with("CoarseGrainedExecutorBackend")[0].kill()
with open("{expected}", "rb") as file:
    values, history = pickle.load(file)
found = train(spark, "{tmp_path}/killed", on_event=kill_one, pause_s=0.1, max_restarts=2)
assert_same(found, types.SimpleNamespace(values=values, history=history))
print("restarted", [event.cause for event in restarts])
assert len(restarts) == 1, restarts
assert not processes_with("tfos_magic.node")
print("all well")
""",
        master="local-cluster[2,2,1024]",
        env={"PYTHONPATH": HERE},
    )
    assert "all well" in done.stdout


def test_a_driver_that_is_killed_and_the_run_resumed_by_another(
    spark_script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, spark_local4: Any, whole: Any
) -> None:
    done = spark_script(
        BEGIN
        + f"""
def die(event):
    if isinstance(event, CheckpointSaved) and event.where.startswith("epoch 2, step"):
        os.kill(os.getpid(), 9)
train(spark, "{tmp_path}/killed", on_event=die, pause_s=0.1)
""",
        env={"PYTHONPATH": HERE},
        check=False,
    )
    assert done.returncode == -9
    assert_same(train(spark_local4, tmp_path / "killed", resume=True), whole)


# --- seeds ------------------------------------------------------------------------------------------------------

SEEDED = """
import keras, numpy as np
if args.fixed:
    keras.utils.set_random_seed(5)
dropout = keras.layers.Dropout(0.5)
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(16, "relu"), dropout, keras.layers.Dense(3)])
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
ctx.distribute(model)
model.fit(ctx.dataset(), epochs=2)
mask = np.array(dropout(np.ones((1, 64), "float32"), training=True)) > 0
first = next(iter(ctx.dataset()))[0].numpy()
{"weights": model.get_weights(), "mask": mask, "first": first}
"""


def seeded(spark: Any, seed: int, *, fixed: bool = False) -> Any:
    how: dict[str, Any] = {"data": {"train": frame(spark)}, "seed": seed, "preload": ("tensorflow",)}
    return run_cell(spark, SEEDED.strip(), 2, args={"fixed": fixed}, **how).values


def test_a_seed_in_the_cell_is_not_the_same_stream_on_all_nodes(spark_local4: Any) -> None:
    first, second = seeded(spark_local4, 3, fixed=True)
    assert (first["mask"] != second["mask"]).any()
    assert (first["first"] != second["first"]).any()


def test_a_seed_repeats_everything_and_nodes_differ(spark_local4: Any) -> None:
    first, again, other = seeded(spark_local4, 3), seeded(spark_local4, 3), seeded(spark_local4, 4)
    for mine, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine["mask"], theirs["mask"])
        np.testing.assert_array_equal(mine["first"], theirs["first"])
        for a, b in zip(mine["weights"], theirs["weights"], strict=True):
            np.testing.assert_array_equal(a, b)
    assert (first[0]["mask"] != first[1]["mask"]).any()
    assert (first[0]["first"] != other[0]["first"]).any()
    assert any((a != b).any() for a, b in zip(first[0]["weights"], other[0]["weights"], strict=True))


# --- --save -----------------------------------------------------------------------------------------------------

SAVING = """
import keras
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "softmax")])
model.compile("adam", "sparse_categorical_crossentropy")
ctx.distribute(model)
model.fit(ctx.dataset())
model.get_weights()
"""


def saving(directory: Path) -> TrainingOptions:
    return TrainingOptions(save_dir=str(directory))


def test_the_chief_saves_what_keras_and_serving_load(spark_local4: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": {"train": frame(spark_local4)}, "preload": ("tensorflow",)}
    before = tmp_path / "out" / "model" / "1"
    before.mkdir(parents=True)
    (before / "of the last run").write_text("")
    found = run_cell(spark_local4, SAVING.strip(), 2, training=saving(tmp_path / "out"), **how)
    assert not (before / "of the last run").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "model.keras"]
    script = f"""
import json, sys
import keras, numpy as np, tensorflow as tf
x = np.array([[0.5, -1.0], [2.0, 0.1]], "float32")
model = keras.models.load_model("{tmp_path}/out/model.keras")
served = tf.saved_model.load("{tmp_path}/out/model/1").signatures["serving_default"]
(answer,) = served(tf.constant(x)).values()
print(json.dumps([model.predict(x, verbose=0).tolist(), answer.numpy().tolist(), model.get_weights()[0].tolist()]))
"""
    import json

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    predicted, served, weights = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(predicted, served, rtol=1e-6)
    np.testing.assert_array_equal(np.array(weights, "float32"), found.values[0][0])
    assert any("Saved to" in line for line in found.logs["chief:0"])


def test_a_directory_that_cannot_be_written_is_known_before_training(spark_local4: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    with pytest.raises(NodeError, match="Models cannot be saved to"):
        run_cell(
            spark_local4,
            "import time; time.sleep(60)",
            1,
            training=saving(tmp_path / "file" / "x"),
            preload=("tensorflow",),
        )
    assert time.monotonic() - began < 40


def test_without_a_model_the_log_says_what_would_be_saved(spark_local4: Any, tmp_path: Path) -> None:
    found = run_cell(spark_local4, "1 + 1", 1, training=saving(tmp_path / "out"), preload=("tensorflow",))
    assert found.values == [2]
    assert "there is no model to be saved" in "\n".join(found.logs["chief:0"])
