"""Checkpoints: a fit that was killed and resumed is the fit that was not; what is damaged or foreign is refused."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from feed_cluster import fake_cluster, numbered

from tfos_magic import training
from tfos_magic.errors import UsageError
from tfos_magic.feed.dataset import make_dataset
from tfos_magic.training.options import TrainingOptions

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from tfos_magic.training.checkpoint_files import Checkpoint, CheckpointError, Directory  # noqa: E402  # needs Keras

# Keras 3.15's ReduceLROnPlateau reads the learning rate in a way that NumPy 2 will not have for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROWS, BATCH, EPOCHS = 100, 8, 3
STEPS = -(-ROWS // BATCH)


class Killed(Exception):
    """Stands for the end of the process."""


class KilledAt(keras.callbacks.Callback):
    """Ends the fit in the middle, after so many batches have been trained on."""

    def __init__(self, batches: int | None) -> None:
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


@dataclass
class Context:
    """The part of NodeContext that training uses, of the only node."""

    training: TrainingOptions
    feeds: Any
    attempt: int = 0
    run_id: str = "the run"
    num_nodes: int = 1
    is_chief: bool = True
    job_name: str = "chief"
    task_index: int = 0
    epochs: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("tests"))

    @property
    def is_resuming(self) -> bool:
        return self.training.resume or self.attempt > 0

    def report(self, **metrics: Any) -> None:
        pass

    def report_epoch(self, epoch: int, logs: dict[str, float]) -> None:
        self.epochs.append((epoch, dict(logs)))

    def report_checkpoint(self, where: str, size_bytes: int) -> None:
        self.saved.append(where)

    def notice(self, text: str, level: int = logging.INFO) -> None:
        self.log.log(level, text)

    def saving(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def dense(*, dropout: float = 0.4, optimizer: Any = None, metrics: Any = ("mae",), units: int = 5) -> Any:
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(units, "tanh"), keras.layers.Dropout(dropout), keras.layers.Dense(1)]
    )
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse", metrics=list(metrics))
    return model


@dataclass
class Outcome:
    """What a fit has left."""

    weights: list[Any]
    history: dict[str, list[float]]
    epochs: list[int]
    reported: list[tuple[int, dict[str, float]]]


@dataclass
class Runs:
    """Runs of the same function, each as in a process of its own, with the same rows."""

    directory: Path
    tmp_path: Path
    options: dict[str, Any] = field(default_factory=dict)
    run_id: str = "the run"

    def run(
        self,
        build: Callable[[], Any] = dense,
        *,
        resume: bool = False,
        killed_after: int | None = None,
        epochs: int = EPOCHS,
        rows: int = ROWS,
        fit: dict[str, Any] | None = None,
        callbacks: Callable[[], list[Any]] = list,
        dataset: Callable[[Any], Any] = lambda data: data,
        attempt: int = 0,
    ) -> Outcome:
        options = TrainingOptions(checkpoint_dir=str(self.directory), resume=resume, **self.options)
        with fake_cluster(1, self.tmp_path, in_order=True) as cluster:
            for partition in (1, 0):
                cluster.feed(numbered(rows // 2, start=partition * rows // 2), partition)
            cluster.end()
            keras.utils.set_random_seed(7 if not resume else 8)  # a resumed run takes its streams from the file
            ctx = Context(options, cluster.nodes[0].feeds, attempt, self.run_id)
            model = build()
            training.distribute(model, ctx)
            data = dataset(make_dataset(cluster.nodes[0].train, batch_size=BATCH, seed=3, label="y").map(scaled))
            model.fit(data, epochs=epochs, verbose=0, callbacks=[*callbacks(), KilledAt(killed_after)], **(fit or {}))
            return Outcome(model.get_weights(), dict(model.history.history), model.history.epoch, ctx.epochs)


def scaled(x: Any, y: Any) -> Any:
    return x[:, None] / ROWS, tf.cast(y, tf.float32) / ROWS


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "checkpoints", tmp_path)


@pytest.fixture
def whole(tmp_path: Path) -> Callable[..., Outcome]:
    """Run the same without ever being killed."""

    def run(**options: Any) -> Outcome:
        return Runs(tmp_path / "never killed", tmp_path).run(**options)

    return run


def assert_same(found: Outcome, expected: Outcome) -> None:
    for mine, theirs in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert found.history == expected.history
    assert found.epochs == expected.epochs


# --- a run that was killed is the run that was not --------------------------------------------------------------


def slow(*values: Any) -> list[Any]:
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("killed_after", [STEPS + 5, *slow((4,), (STEPS - 1,), (STEPS,), (3 * STEPS - 1,))])
def test_killed_after_any_step_and_resumed_it_ends_with_the_same_bits(runs, whole, killed_after):
    runs.options = {"checkpoint_every_steps": 4}
    with pytest.raises(Killed):
        runs.run(killed_after=killed_after)
    assert_same(runs.run(resume=True), whole())


@pytest.mark.slow
def test_killed_again_and_again_at_random_steps(runs, whole):
    runs.options = {"checkpoint_every_steps": 3, "keep_checkpoints": 2}
    chosen = random.Random(5)
    for attempt in range(6):
        with contextlib.suppress(Killed):
            runs.run(killed_after=chosen.randrange(1, 12), resume=attempt > 0)
        assert len(Directory(str(runs.directory), 1).steps()) <= 2
    assert_same(runs.run(resume=True), whole())


@pytest.mark.slow
def test_without_steps_each_epoch_is_saved_and_an_epoch_is_lost_at_most(runs, whole):
    with pytest.raises(Killed):
        runs.run(killed_after=2 * STEPS + 3)
    assert Directory(str(runs.directory), 1).steps() == [STEPS, 2 * STEPS]
    assert_same(runs.run(resume=True), whole())


def test_killed_before_the_first_checkpoint_it_begins_anew(runs, caplog):
    with pytest.raises(Killed):
        runs.run(killed_after=3)
    caplog.set_level(logging.INFO, "tests")
    assert runs.run(resume=True, epochs=1).epochs == [0]
    assert "No checkpoint in" in caplog.text


def early(patience: int = 2) -> list[Any]:
    callbacks = keras.callbacks
    stop = callbacks.EarlyStopping("loss", patience=patience, restore_best_weights=True, min_delta=1.0)
    return [stop, callbacks.ReduceLROnPlateau("loss", patience=1, factor=0.5, min_delta=1.0)]


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [STEPS + 5, 2 * STEPS + 1])
def test_callbacks_remember_what_they_had_seen(runs, whole, killed_after):
    runs.options = {"checkpoint_every_steps": 5}
    with pytest.raises(Killed):
        runs.run(killed_after=killed_after, callbacks=early, epochs=6)
    expected = whole(callbacks=early, epochs=6)
    assert len(expected.epochs) == 3  # it stops early: the best epoch was the first
    assert_same(runs.run(resume=True, callbacks=early, epochs=6), expected)


class Counting(keras.callbacks.Callback):
    """A callback of the user's own, with a state."""

    seen: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.count += 1
        type(self).seen.append(self.count)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.slow
def test_a_callback_of_the_users_own_can_keep_a_state(runs, monkeypatch):
    monkeypatch.setattr(Counting, "seen", [])
    with pytest.raises(Killed):
        runs.run(killed_after=2 * STEPS + 3, callbacks=lambda: [Counting()])
    runs.run(resume=True, callbacks=lambda: [Counting()])
    assert Counting.seen == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("per_execution", [1, 3])
def test_one_iterator_for_all_epochs(runs, whole, per_execution):
    def build() -> Any:
        model = dense()
        model.steps_per_execution = per_execution
        return model

    how = {"build": build, "fit": {"steps_per_epoch": 9}, "dataset": lambda data: data.repeat()}
    runs.options = {"checkpoint_every_steps": 6}
    with pytest.raises(Killed):
        runs.run(killed_after=20 // per_execution, **how)
    assert_same(runs.run(resume=True, **how), whole(**how))


@pytest.mark.slow
@pytest.mark.parametrize("per_epoch", [STEPS, 5])
def test_steps_per_epoch_over_data_that_end(runs, whole, per_epoch):
    how = {"fit": {"steps_per_epoch": per_epoch}, "build": lambda: dense(dropout=0.0)}
    runs.options = {"checkpoint_every_steps": 3}
    with pytest.raises(Killed):
        runs.run(killed_after=per_epoch + 4, **how)
    assert_same(runs.run(resume=True, **how), whole(**how))


@pytest.mark.slow
def test_an_epochs_last_execution_may_be_a_part_of_one(runs, whole):
    def build() -> Any:
        model = dense()
        model.steps_per_execution = 4
        return model

    class KilledAtTheEnd(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise Killed

    data = {"dataset": lambda data: data.filter(lambda *_: True)}  # of which nobody knows how long it is
    runs.options = {"checkpoint_every_steps": 4}
    with pytest.raises(Killed):
        runs.run(build, callbacks=lambda: [KilledAtTheEnd()], **data)
    assert_same(runs.run(build, resume=True, **data), whole(build=build, **data))


class Decay(keras.callbacks.Callback):
    """Changes something after each batch."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 0.97 * float(self.model.optimizer.learning_rate.numpy())


@pytest.mark.slow
def test_callbacks_that_act_on_each_batch_do_not_act_twice(runs, whole, tmp_path):
    names: list[str] = []

    class Saving(keras.callbacks.ModelCheckpoint):
        def _save_model(self, *args: Any, **kwargs: Any) -> None:
            batch = kwargs.get("batch", args[1] if len(args) > 1 else None)
            names.append(f"{kwargs.get('epoch', args[0] if args else None)}/{batch}")

    def callbacks() -> list[Any]:
        return [Decay(), Saving(str(tmp_path / "x.keras"), save_freq=5)]

    runs.options = {"checkpoint_every_steps": 4}
    with pytest.raises(Killed):
        runs.run(killed_after=STEPS + 5, callbacks=callbacks)
    before = names.copy()
    names.clear()
    found = runs.run(resume=True, callbacks=callbacks)
    resumed = names.copy()
    names.clear()
    assert_same(found, whole(callbacks=callbacks))
    assert sorted({*before, *resumed}) == sorted(names)


@pytest.mark.slow
def test_metrics_that_are_vectors_and_averaged_weights(runs, whole):
    def build() -> Any:
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)])
        metric = keras.metrics.R2Score(class_aggregation=None)
        model.compile(keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9), "mse", metrics=[metric])
        return model

    swap = getattr(keras.callbacks, "SwapEMAWeights", None)
    two = {"dataset": lambda data: data.map(lambda x, y: (x, tf.stack([y, -y], 1)))}
    how = {"build": build, "callbacks": lambda: [swap(swap_on_epoch=True)] if swap else [], **two}
    runs.options = {"checkpoint_every_steps": 4}
    with pytest.raises(Killed):
        runs.run(killed_after=STEPS + 5, **how)
    found, expected = runs.run(resume=True, **how), whole(**how)
    for mine, theirs in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for name, values in expected.history.items():
        np.testing.assert_array_equal(found.history[name], values)


@pytest.mark.slow
def test_a_model_that_is_not_built_and_one_that_runs_eagerly(runs, whole):
    def build() -> Any:
        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dropout(0.3), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
        return model

    runs.options = {"checkpoint_every_steps": 4}
    with pytest.raises(Killed):
        runs.run(build, killed_after=STEPS + 5)
    assert_same(runs.run(build, resume=True), whole(build=build))


# --- what has ended is passed over ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fit_that_had_ended_is_passed_over_and_can_be_continued(runs, whole):
    first = runs.run(epochs=2)
    again = runs.run(epochs=2, resume=True, killed_after=0)  # not one batch is trained on
    assert_same(again, first)
    assert [epoch for epoch, _ in again.reported] == [1, 2]
    assert_same(runs.run(epochs=3, resume=True), whole(epochs=3))


@pytest.mark.slow
def test_each_call_of_fit_has_its_own_checkpoints(runs, tmp_path):
    def train(directory: Path, killed_in: int | None, *, resume: bool = False) -> list[Any]:
        options = TrainingOptions(checkpoint_dir=str(directory), checkpoint_every_steps=2, resume=resume)
        with fake_cluster(1, tmp_path, in_order=True) as cluster:
            cluster.feed(numbered(ROWS), 0)
            cluster.end()
            keras.utils.set_random_seed(1)
            ctx = Context(options, cluster.nodes[0].feeds)
            data = make_dataset(cluster.nodes[0].train, batch_size=BATCH, seed=3, label="y").map(scaled)
            models = [dense(), dense()]
            for number, model in enumerate([*models, models[0]]):
                training.distribute(model, ctx)
                killed = KilledAt(7) if number == killed_in else KilledAt(None)
                model.fit(data, epochs=2, verbose=0, callbacks=[killed])
            return [model.get_weights() for model in models]

    with pytest.raises(Killed):
        train(runs.directory, 2)
    assert sorted(path.name for path in runs.directory.iterdir()) == ["fit-1", "fit-2", "fit-3"]
    found, expected = train(runs.directory, None, resume=True), train(tmp_path / "never killed", None)
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory with checkpoints of two epochs."""
    directory = tmp_path_factory.mktemp("made")
    Runs(directory / "checkpoints", directory).run(epochs=2)
    return directory / "checkpoints"


@pytest.fixture
def saved(made, tmp_path, runs) -> Runs:
    """The same, to be spoilt."""
    import shutil

    shutil.copytree(made, runs.directory)
    runs.run_id = "another run"
    return runs


def newest(runs: Runs) -> Path:
    directory = Directory(str(runs.directory), 1)
    return Path(directory.file(directory.steps()[-1]))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_numpy(path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.arange(3))
    path.write_bytes(buffer.getvalue())


def replace_by_pickle(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}], object), allow_pickle=True)


def of_tomorrow(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data)
    with np.load(path) as archive:
        members = {name: archive[name] for name in archive.files}
    members["meta"] = np.frombuffer(members["meta"].tobytes().replace(b'"version": 1', b'"version": 2'), np.uint8)
    np.savez(path, **members)


@pytest.mark.parametrize("spoil", [cut_off, flip_a_bit, empty, replace_by_numpy, replace_by_pickle, of_tomorrow])
def test_what_is_no_whole_checkpoint_is_told_from_one(saved, spoil):
    Checkpoint.decode(newest(saved).read_bytes())
    spoil(newest(saved))
    with pytest.raises(CheckpointError):
        Checkpoint.decode(newest(saved).read_bytes())


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(saved, whole, caplog):
    caplog.set_level(logging.INFO, "tests")
    spoilt = newest(saved)
    cut_off(spoilt)
    assert_same(saved.run(resume=True), whole())
    assert f"Checkpoint refused: {spoilt}: it is cut off or damaged" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(saved):
    with pytest.raises(UsageError) as caught:
        saved.run(lambda: dense(units=6), resume=True)
    assert "None of 2 checkpoints" in caught.value.fact
    assert "it is of another model or optimizer" in caught.value.cause
    with pytest.raises(UsageError, match="another model or optimizer"):
        saved.run(lambda: dense(optimizer=keras.optimizers.SGD(0.1)), resume=True)


def test_checkpoints_of_another_run_are_not_mixed_with(saved):
    with pytest.raises(UsageError, match="holds 2 checkpoints of another run") as caught:
        saved.run()
    assert "--resume" in caught.value.hint


def test_a_restart_does_not_take_what_another_run_has_left(saved):
    with pytest.raises(UsageError, match="holds 2 checkpoints of another run"):
        saved.run(attempt=1)


def test_a_restart_takes_what_its_own_run_has_left(runs, whole):
    runs.options = {"checkpoint_every_steps": 4}
    with pytest.raises(Killed):
        runs.run(killed_after=6, epochs=1)
    assert_same(runs.run(attempt=1, epochs=1), whole(epochs=1))


def test_a_state_that_cannot_be_saved_is_named(runs):
    class Own(keras.callbacks.Callback):
        def state_dict(self) -> Any:
            return {"seen": np.float32(1)}

    with pytest.raises(UsageError, match=r"What Own\.state_dict\(\) returns cannot be saved"):
        runs.run(callbacks=lambda: [Own()], epochs=1)


def test_a_file_that_cannot_be_written_whole_is_removed(tmp_path):
    directory = Directory(str(tmp_path), 1)
    directory.prepare()
    with pytest.raises(ValueError, match="allow_pickle"):
        directory.write(1, Checkpoint({}, {"a": np.array([object()])}), keep=2)
    assert list((tmp_path / "fit-1").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        Runs(tmp_path / "file" / "below", tmp_path).run()


def test_data_that_came_otherwise_lets_the_epoch_begin_anew(runs, caplog):
    caplog.set_level(logging.INFO, "tests")
    runs.options = {"checkpoint_every_steps": 4}
    with pytest.raises(Killed):
        runs.run(killed_after=STEPS + 5)
    found = runs.run(resume=True, rows=ROWS + 20, epochs=2)
    assert "Epoch 2 begins anew: the data of 'train' is not what it was." in caplog.text
    assert found.epochs == [0, 1]


def test_data_that_only_its_batches_describe_cannot_be_resumed(saved):
    class Data(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return np.zeros((4, 1)), np.zeros(4)

    with pytest.raises(UsageError, match="could not be resumed"):
        saved.run(resume=True, dataset=lambda _: Data())


@pytest.mark.slow
def test_arrays_go_on_where_they_were_when_they_are_not_shuffled(runs, whole):
    x = np.linspace(0, 1, ROWS)[:, None]
    how = {"dataset": lambda _: x, "fit": {"y": x[:, 0] ** 2, "batch_size": BATCH, "shuffle": False}}
    runs.options = {"checkpoint_every_steps": 4}
    with pytest.raises(Killed):
        runs.run(killed_after=STEPS + 5, **how)
    assert_same(runs.run(resume=True, **how), whole(**how))


@pytest.mark.slow
def test_a_full_disk_does_not_end_training(runs, whole, monkeypatch, caplog):
    def no_room(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Directory, "write", no_room)
    found = runs.run()
    assert "No checkpoint of epoch 1: [Errno 28] No space left on device. Training goes on." in caplog.text
    monkeypatch.undo()
    assert_same(found, whole())


def test_half_written_files_are_removed_and_the_newest_kept(tmp_path):
    directory = Directory(str(tmp_path), 1)
    directory.prepare()
    (tmp_path / "fit-1" / "checkpoint-0000000009.npz.partial").write_text("half")
    (tmp_path / "fit-1" / "notes.txt").write_text("the user's")
    directory.prepare()
    for step in range(1, 6):
        directory.write(step, Checkpoint({"step": step}, {"a": np.arange(step)}), keep=2)
    assert directory.steps() == [4, 5]
    assert sorted(p.name for p in (tmp_path / "fit-1").iterdir()) == [
        "checkpoint-0000000004.npz",
        "checkpoint-0000000005.npz",
        "notes.txt",
    ]


@pytest.mark.parametrize("place", ["ram://checkpoints/a", "file://{}"])
def test_whatever_tensorflow_opens_can_be_the_directory(tmp_path, place):
    directory = Directory(place.format(tmp_path), 2)
    assert directory.steps() == []
    directory.prepare()
    array = np.ones((2, 3), tf.bfloat16.as_numpy_dtype)
    directory.write(7, Checkpoint({"a": [1.5, None]}, {"x": array, "y": np.float32(3), "z": np.zeros((0, 4))}), 1)
    found = Checkpoint.decode(directory.read(7))
    assert found.meta == {"a": [1.5, None]}
    assert found.arrays["x"].dtype == array.dtype
    assert found.arrays["x"].shape == (2, 3)
    assert found.arrays["z"].shape == (0, 4)
    assert float(found.arrays["y"]) == 3.0


def test_a_time_is_kept_by_steps_on_which_all_agree(monkeypatch):
    from tfos_magic.training import checkpointing

    now = [0.0]
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now[0])
    schedule = checkpointing._Schedule(TrainingOptions(checkpoint_dir="x", checkpoint_every_s=10.0), None)
    due = []
    for step in range(1, 4001):
        now[0] += 0.02 if step < 2000 else 0.005
        if schedule.is_due(step):
            due.append(now[0])
    gaps = np.diff([0.0, *due])
    assert all(10.0 <= gap < 15.0 for gap in gaps)
    assert len(due) == 4
