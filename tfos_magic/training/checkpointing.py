"""One call of ``fit``: saved while it goes on, and brought back.

Runs on: executors.

    a step ─► due? ─► random states of all nodes to the chief ─► copies of all variables ─► a thread writes the file
    resume ─► chief: the newest good file ─► its bytes to all nodes ─► weights, optimizer, metrics, random states,
              history, callbacks ─► the epoch, in which batches up to the step are drawn once more and not trained on

Only the chief touches files. All nodes take the same decisions at the same steps, so a save costs two short messages.
Calls of ``fit`` are numbered as the function makes them: one that had ended before the run was killed is passed over
with its results, and the function goes on behind it.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from tfos_magic.errors import UsageError
from tfos_magic.training.callback_states import restore_states, states_of
from tfos_magic.training.checkpoint_files import Array, Checkpoint, CheckpointError, Directory, array_of
from tfos_magic.training.ring import Ring
from tfos_magic.training.shared_step import unique

_LOOK_AT_FIRST = 4  # steps after which a rate is known well enough to say when the clock is to be looked at again


@dataclass(frozen=True)
class Position:
    """Where in a fit something is: how much has been done.

    Attributes
    ----------
    epoch : int
        Epochs completed.
    step : int
        Executions of the train function within the epoch after that.
    drawn : int
        Executions' worth of batches taken from the iterator that the epoch reads: more than `step` where one iterator
        serves several epochs (``steps_per_epoch``).
    total : int
        Batches since the beginning.
    """

    epoch: int = 0
    step: int = 0
    drawn: int = 0
    total: int = 0


class FitCheckpoints:
    """Saves one call of ``fit`` and brings it back.

    Parameters
    ----------
    model : keras.Model
    ring : Ring or None
    ctx : NodeContext
    number : int
        Which call of ``fit`` in this process, from 1.
    variables : callable
        Returns what is the same on all nodes, weights first; see
        :meth:`tfos_magic.training.keras_fit.KerasFit.shared_variables`.
    """

    def __init__(
        self, model: Any, ring: Ring | None, ctx: Any, number: int, variables: Callable[[], list[Any]]
    ) -> None:
        self._model = model
        self._ring = ring
        self._ctx = ctx
        self._options = ctx.training
        self._number = number
        self._variables = variables
        self._directory = Directory(self._options.checkpoint_dir, number)
        self._schedule = _Schedule(self._options, ring)
        self._writer = _Writer(ctx)
        self._callbacks: list[Any] = []
        self._position = Position()
        self._iterator: Any = None
        self._spans_epochs = False
        self._batch_count: int | None = None
        self._reported: list[dict[str, Any]] = []
        self._save_freqs: list[tuple[Any, int]] = []
        self._passes: dict[str, int] = {}  # of each feed, when the iterator began
        self._next_passes: dict[str, int] = {}
        self._restored: Checkpoint | None = None
        self._to_discard = 0
        self._to_replay = 0
        self._is_used_up = False
        self._logs: dict[str, float] = {}

    # --- before the first step ----------------------------------------------------------------------------------

    def find(
        self,
        epochs: int,
        build: Callable[[], None],
        callbacks: Sequence[Any],
        *,
        spans_epochs: bool,
        batch_count: int | None = None,
    ) -> int | None:
        """Bring back the newest good checkpoint, if the run is to resume and there is one.

        Parameters
        ----------
        epochs : int
            As passed to ``fit``.
        build : callable
            Makes every variable that training makes, on all nodes.
        callbacks : sequence of Callback
            Those of the fit.
        spans_epochs : bool
            Whether one iterator over the data serves all epochs, as with ``steps_per_epoch``.
        batch_count : int, optional
            How many batches an iterator has, where that is known.

        Returns
        -------
        int or None
            The epoch with which to go on; None at the beginning.

        Raises
        ------
        UsageError
            There are checkpoints and the run is not to resume; or it is, and none can be used.
        """
        self._callbacks = list(callbacks)
        self._spans_epochs = spans_epochs
        self._batch_count = batch_count
        if not self._from_chief(np.array([self._has_files()], np.int64), "checkpoints")[0]:
            return None
        build()
        data, checkpoint = self._newest_good() if self._ctx.is_chief else (b"", None)
        data = self._from_chief(np.frombuffer(data, np.uint8), "checkpoint").tobytes()
        self._restored = checkpoint or Checkpoint.decode(data)
        return self._restore(self._restored, epochs)

    def _has_files(self) -> bool:
        """Return whether the chief finds something to go on with."""
        if not self._ctx.is_chief:
            return False
        self._directory.prepare()
        steps = self._directory.steps()
        if steps and not self._options.resume and not (self._ctx.attempt and self._are_of_this_run(steps)):
            raise UsageError(
                f"{self._directory.path} holds {_counted(len(steps))} of another run already, the newest of step "
                f"{steps[-1]}.",
                hint="--resume goes on with it; or give this run another directory, or remove that one.",
            )
        if not steps and self._ctx.is_resuming:
            self._say(f"No checkpoint in {self._directory.path} yet: training starts at the beginning.")
        return bool(steps)

    def _are_of_this_run(self, steps: Sequence[int]) -> bool:
        """Tell whether an earlier attempt of this run has left the files: the newest that can be read says so."""
        for step in reversed(steps):
            try:
                return bool(Checkpoint.decode(self._directory.read(step)).meta.get("run") == self._ctx.run_id)
            except CheckpointError:
                continue
        return False

    def _newest_good(self) -> tuple[bytes, Checkpoint]:
        """Return the newest file that is whole and of this model, as bytes and what is in them."""
        refused = []
        for step in reversed(self._directory.steps()):
            try:
                data = self._directory.read(step)
                checkpoint = Checkpoint.decode(data)
                self._require_this_model(checkpoint)
            except CheckpointError as error:
                refused.append(f"{self._directory.file(step)}: {error}")
                self._say(f"Checkpoint refused: {refused[-1]}.", logging.WARNING)
            else:
                return data, checkpoint
        raise UsageError(
            f"None of {_counted(len(refused))} in {self._directory.path} can be used.",
            cause=";\n".join(refused),
            hint="If the model has changed, build and compile it as it was; or begin anew: --checkpoint ANOTHER_DIR.",
        )

    def _require_this_model(self, checkpoint: Checkpoint) -> None:
        mine, theirs = self._structure(), checkpoint.meta["structure"]
        if mine != theirs:
            counts = [f"{len(each)} variables with {_numbers_in(each):,} numbers" for each in (theirs, mine)]
            raise CheckpointError(f"it is of another model or optimizer: {counts[0]}, here are {counts[1]}")

    def _structure(self) -> list[list[Any]]:
        return [[list(v.shape), keras.backend.standardize_dtype(v.dtype)] for v in self._variables()]

    def _restore(self, checkpoint: Checkpoint, epochs: int) -> int:
        meta = checkpoint.meta
        position = Position(**meta["position"])
        if position.step and (why := self._why_no_position(checkpoint)):
            self._say(f"Epoch {position.epoch + 1} begins anew: {why}.", logging.WARNING)
            position = Position(position.epoch, 0, 0, position.total)
        before = self._learning_rate()
        self._put_back(checkpoint)
        if before != (now := self._learning_rate()):
            self._say(f"The learning rate is {now:g}, as in the checkpoint; the cell says {before:g}.")
        self._position = position
        self._passes = dict(meta["passes"])
        self._to_discard, self._to_replay = position.drawn - position.step, position.step
        self._logs = {name: _unplain(value) for name, value in meta["logs"].items()}
        self._schedule.begin(position.total)
        if position.step:
            self._hold_back_files()
        self._reported = list(meta["reported"])
        for epoch in self._reported:
            self._ctx.report_epoch(epoch["epoch"], epoch["logs"])
        is_over = meta["is_complete"] and meta["epochs"] == epochs
        path = self._directory.file(position.total)
        if is_over or position.epoch >= epochs:
            self._set_passes()
            more = "" if is_over else f", with {position.epoch} epochs instead of {epochs}"
            self._say(f"Fit {self._number} had ended{more}: nothing is left to train ({path}).")
            return max(epochs, position.epoch)
        self._say(f"Resumed after {_told(position)} ({path}).")
        return position.epoch

    def _put_back(self, checkpoint: Checkpoint) -> None:
        """Set what training and its callbacks change."""
        for number, variable in enumerate(self._variables()):
            variable.assign(checkpoint.arrays[f"variable-{number:04}"])
        if checkpoint.meta["nodes"] == self._size:
            self._restore_random(self._own_state(checkpoint))
        restore_states(self._callbacks, checkpoint.meta["callbacks"], checkpoint.arrays)

    def _own_state(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what this node had told when the checkpoint was made."""
        state: dict[str, Any] = json.loads(checkpoint.arrays[f"random-{self._rank}"].tobytes())
        return state

    def _hold_back_files(self) -> None:
        """Let no ModelCheckpoint write in the middle of the batches that are passed over: its weights are others."""
        for callback in self._callbacks:
            freq = getattr(callback, "save_freq", None)
            if isinstance(callback, keras.callbacks.ModelCheckpoint) and isinstance(freq, int):
                self._save_freqs.append((callback, freq))
                callback.save_freq = "epoch"

    def _why_no_position(self, checkpoint: Checkpoint) -> str:
        """Return why the place within the epoch means nothing here; empty when it does. The same on all nodes."""
        count = checkpoint.meta["nodes"]
        if count != self._size:
            return f"the checkpoint is of {count} nodes, there are {self._size} now"
        now, then = self._data(), self._own_state(checkpoint)["data"]
        why = next((f"{name} is not what it was" for name in then if name in now and now[name] != then[name]), "")
        if self._ring is None:
            return why
        differing = int(self._ring.all_reduce(np.array([bool(why)], np.int64), "place in the epoch")[0])
        return why or ("on another node the data are not what they were" if differing else "")

    def _data(self) -> dict[str, Any]:
        """Return what says which rows come when."""
        feeds = [feed for feed in self._ctx.feeds.cached if feed.is_ended]
        rows = {f"the data of '{feed.name}'": feed.fingerprint for feed in feeds}
        batches = {f"the batch size, the shuffling or the seed of '{feed.name}'": feed.reading for feed in feeds}
        return {**rows, **batches, "steps_per_execution": int(self._model.steps_per_execution)}

    @property
    def batches_before_epoch(self) -> int:
        """How many batches were trained on before the epoch that goes on."""
        return self._position.total - self._position.step * int(self._model.steps_per_execution)

    # --- while it goes on ---------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int) -> None:
        """Take note that an epoch begins; in the first one after a resume, be where it was."""
        if self._restored is not None:
            self._set_passes()
            self._restore_history()
            if self._to_replay:
                self._restore_metrics(self._restored)
            else:
                self._restored = None
        else:
            self._position = replace(self._position, epoch=epoch, step=0)
        self._next_passes = self._current_passes()

    def step(self, function: Callable[[Any], Any], iterator: Any) -> Any:
        """Run the train function once, or instead draw what it has had before; then save if it is time."""
        if iterator is not self._iterator:
            self._iterator = iterator
            self._passes = self._next_passes
            if not (self._to_discard or self._to_replay):
                self._position = replace(self._position, drawn=0)
        if self._is_used_up:
            raise StopIteration
        batches = int(self._model.steps_per_execution)
        self._draw(iterator, self._to_discard * batches)
        self._to_discard = 0
        if self._to_replay:
            return self._pass_over(iterator, batches)
        logs = function(iterator)
        at = self._position
        self._position = Position(at.epoch, at.step + 1, at.drawn + 1, at.total + batches)
        # Within a group of accumulated batches nodes hold sums of their own; each epoch begins a new group. After the
        # last step comes the epoch's own checkpoint.
        is_whole = (at.step + 1) * batches % self._options.accumulate == 0
        is_last = self._batch_count is not None and (at.drawn + 1) * batches >= self._batch_count
        if is_whole and not is_last and self._schedule.is_due(at.total + batches):
            self._save(logs={name: _plain(value) for name, value in dict(logs).items()})
        return logs

    def _pass_over(self, iterator: Any, batches: int) -> dict[str, Any]:
        """Draw what was trained on before, and return what that step had returned."""
        self._to_replay -= 1
        try:
            self._draw(iterator, batches)
        except StopIteration:  # an epoch's last execution may be a part of one
            self._is_used_up = True
        if not self._to_replay and self._restored is not None:
            # Callbacks have seen the ends of these batches, and may have acted on what had just been put back.
            self._put_back(self._restored)
            self._restored = None
            for callback, freq in self._save_freqs:
                callback.save_freq = freq
        return dict(self._logs)

    @staticmethod
    def _draw(iterator: Any, count: int) -> None:
        for _ in range(count):
            next(iterator)

    def end_epoch(self, epoch: int, logs: Any, reported: Mapping[str, float], *, is_stopping: bool) -> None:
        """Save at the end of an epoch; `reported` is what of its metrics the board has been told."""
        self._position = replace(self._position, epoch=epoch + 1, step=0)
        self._to_discard, self._to_replay, self._is_used_up = 0, 0, False
        self._restored = None
        self._reported.append({"epoch": epoch + 1, "logs": dict(reported)})
        drawn = self._position.drawn * int(self._model.steps_per_execution)
        is_used_up = self._batch_count is not None and drawn >= self._batch_count
        if not self._spans_epochs or is_used_up:  # the next epoch begins a new iterator
            self._position = replace(self._position, drawn=0)
            self._passes = self._current_passes()
        if not is_stopping:  # else the end of the fit follows at once
            self._save(ended=(epoch, {name: _plain(value) for name, value in dict(logs or {}).items()}))

    def end(self, epochs: int) -> None:
        """Save the fit as complete, and wait until that is written."""
        if self._restored is not None:  # nothing was left to do
            self._restore_history()
            return
        self._save(epochs=epochs)
        self._writer.wait()

    def close(self) -> None:
        """Wait for the file that is being written."""
        self._writer.wait()
        self._iterator = None

    # --- saving -------------------------------------------------------------------------------------------------

    def _save(self, **more: Any) -> None:
        states = self._gather_random()
        if not self._ctx.is_chief:
            return
        self._writer.wait()  # or there would be two copies of everything
        checkpoint = self._snapshot(states, **more)
        text = "the end" if "epochs" in more else _told(self._position)
        total = self._position.total
        self._writer.submit(self._directory, total, checkpoint, self._options.keep_checkpoints, text)

    def _snapshot(
        self,
        states: Sequence[bytes],
        *,
        logs: Mapping[str, Any] | None = None,
        ended: tuple[int, Mapping[str, Any]] | None = None,
        epochs: int | None = None,
    ) -> Checkpoint:
        """Return all that is to be saved.

        Parameters
        ----------
        states : sequence of bytes
            Random states, by rank.
        logs : mapping, optional
            What the step has returned, in the middle of an epoch.
        ended : (int, mapping), optional
            The epoch that ends, and its metrics: the history does not have them yet.
        epochs : int, optional
            The fit has ended, and these were its epochs.
        """
        arrays = {f"variable-{i:04}": array_of(v) for i, v in enumerate(self._variables())}
        arrays |= {f"metric-{i:04}": array_of(v) for i, v in enumerate(_metric_variables(self._model))}
        arrays |= {f"random-{i}": np.frombuffer(state, np.uint8) for i, state in enumerate(states)}
        meta = {
            "position": asdict(self._position),
            "epochs": epochs,
            "is_complete": epochs is not None,
            "nodes": self._size,
            "run": self._ctx.run_id,
            "reported": list(self._reported),  # the writer reads it while training goes on
            "passes": self._passes,
            "structure": self._structure(),
            "logs": dict(logs or {}),
            "history": self._history(ended),
            "callbacks": states_of(self._callbacks, arrays),
            "keras": keras.__version__,
            "written_at": time.time(),
        }
        return Checkpoint(meta, arrays)

    def _say(self, message: str, level: int = logging.INFO) -> None:
        """Tell what is so on all nodes: once."""
        if self._ctx.is_chief:
            self._ctx.notice(message, level)

    # --- parts of the state -------------------------------------------------------------------------------------

    def _set_passes(self) -> None:
        for feed in self._ctx.feeds.cached:
            feed.passes = self._passes.get(feed.name, feed.passes)

    def _learning_rate(self) -> float:
        rate = getattr(self._model.optimizer, "learning_rate", np.nan)
        return float(rate.numpy()) if hasattr(rate, "numpy") else 0.0

    def _current_passes(self) -> dict[str, int]:
        return {feed.name: feed.passes for feed in self._ctx.feeds.cached}

    def _history(self, ended: tuple[int, Mapping[str, Any]] | None) -> dict[str, Any]:
        known = getattr(self._model, "history", None)
        epochs = [int(epoch) for epoch in getattr(known, "epoch", ())]
        history = {name: [_plain(x) for x in values] for name, values in getattr(known, "history", {}).items()}
        if ended is not None and ended[0] not in epochs:
            epochs.append(ended[0])
            for name, value in ended[1].items():
                history.setdefault(name, []).append(value)
        return {"epoch": epochs, "history": history}

    def _restore_history(self) -> None:
        if self._restored is not None and getattr(self._model, "history", None) is not None:
            history = self._restored.meta["history"]
            self._model.history.epoch = list(history["epoch"])
            self._model.history.history = {
                name: [_unplain(value) for value in values] for name, values in history["history"].items()
            }

    def _restore_metrics(self, checkpoint: Checkpoint) -> None:
        variables = _metric_variables(self._model)
        arrays = [checkpoint.arrays.get(f"metric-{number:04}") for number in range(len(variables))]
        if any(a is None or a.shape != tuple(v.shape) for a, v in zip(arrays, variables, strict=True)):
            self._say("The metrics are not those of the checkpoint: they begin anew within the epoch.", logging.WARNING)
            return
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)

    def _gather_random(self) -> list[bytes]:
        """Return the random states of all nodes, by rank."""
        mine = np.frombuffer(json.dumps({**self._random_state(), "data": self._data()}).encode(), np.uint8)
        parts = [mine] if self._ring is None else self._ring.collect(mine, "random states")
        return [part.tobytes() for part in parts]

    def _random_state(self) -> dict[str, Any]:
        kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
        return {
            "seeds": [array_of(v).tolist() for v in seed_states(self._model)],
            "python": random.getstate(),
            "numpy": [kind, keys.tolist(), *rest],
        }

    def _restore_random(self, state: Mapping[str, Any]) -> None:
        for variable, value in zip(seed_states(self._model), state["seeds"], strict=False):
            variable.assign(np.asarray(value, keras.backend.standardize_dtype(variable.dtype)))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))

    # --- the other nodes ----------------------------------------------------------------------------------------

    @property
    def _size(self) -> int:
        return 1 if self._ring is None else self._ring.plan.size

    @property
    def _rank(self) -> int:
        return 0 if self._ring is None else self._ring.plan.rank

    def _from_chief(self, values: Array, label: str) -> Array:
        """Return the chief's values on every node; the lengths may differ."""
        if self._ring is None:
            return values
        return self._ring.concatenate(values if self._ctx.is_chief else values[:0], label)


class _Schedule:
    """When to save within an epoch: the same answer on all nodes."""

    def __init__(self, options: Any, ring: Ring | None) -> None:
        self._every_steps = options.checkpoint_every_steps
        self._every_s = options.checkpoint_every_s
        self._ring = ring
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start counting at a step."""
        self._saved_at_step = self._looked_at_step = step
        self._look_at_step = step + _LOOK_AT_FIRST
        self._saved_at = self._looked_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether to save after this step; each node asks after each."""
        is_due = False
        if self._every_steps is not None:
            is_due = bool(step // self._every_steps > self._saved_at_step // self._every_steps)
        elif self._every_s is not None and step >= self._look_at_step:
            is_due = self._ask_the_clock(step, self._every_s)
        if is_due:
            self._saved_at_step, self._saved_at = step, time.monotonic()
        return is_due

    def _ask_the_clock(self, step: int, every_s: float) -> bool:
        """Return what the chief's clock says, and agree on the step at which to look again."""
        now = time.monotonic()
        steps = step - self._looked_at_step
        is_due = now - self._saved_at >= every_s
        left_s = every_s if is_due else every_s - (now - self._saved_at)
        ahead = left_s * steps / max(now - self._looked_at, 1e-6)
        row = np.array([is_due, max(1, min(int(ahead), 2 * steps))], np.int64)
        if self._ring is not None:
            row = self._ring.gather(row, "checkpoint due?")[0]
        self._looked_at_step, self._looked_at = step, now
        self._look_at_step = step + int(row[1])
        return bool(row[0])


class _Writer:
    """Writes one checkpoint at a time, beside training."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self._thread: threading.Thread | None = None

    def submit(self, directory: Directory, step: int, checkpoint: Checkpoint, keep: int, text: str) -> None:
        """Begin to write; waits for the one before."""
        self.wait()
        work = threading.Thread(
            target=self._write, args=(directory, step, checkpoint, keep, text), name="tfos-checkpoint", daemon=True
        )
        self._thread = work
        work.start()

    def wait(self) -> None:
        """Wait until nothing is being written; the board says so where that takes a while."""
        if self._thread is None:
            return
        if self._thread.is_alive():
            with self._ctx.saving():
                self._thread.join()
        self._thread = None

    def _write(self, directory: Directory, step: int, checkpoint: Checkpoint, keep: int, text: str) -> None:
        try:
            size_bytes = directory.write(step, checkpoint, keep)
        except Exception as error:  # be it a full disk or anything: hours of training are not lost for it
            reason = getattr(error, "message", "") or error
            self._ctx.notice(f"No checkpoint of {text}: {reason}. Training goes on.", logging.WARNING)
        else:
            self._ctx.report_checkpoint(text, size_bytes)


# --- pieces of a model -----------------------------------------------------------------------------------------


def seed_states(model: Any) -> list[Any]:
    """Return the variables in which a model's layers keep their random streams, e.g. those of Dropout."""
    others = {id(v) for v in (*model.weights, *_metric_variables(model))}
    return [v for v in model.variables if id(v) not in others and tf.as_dtype(v.dtype).is_integer]


def _metric_variables(model: Any) -> list[Any]:
    return unique([v for metric in model.metrics for v in metric.variables])


def _told(position: Position) -> str:
    """Return what is done at a position, in words."""
    if not position.step:
        return f"epoch {position.epoch}"
    return f"epoch {position.epoch + 1}, step {position.step}"


def _plain(value: Any) -> Any:
    """Return a metric's value as JSON has it: most are numbers, some are vectors."""
    array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    return float(array) if array.ndim == 0 else array.tolist()


def _unplain(value: Any) -> Any:
    return np.asarray(value, np.float32) if isinstance(value, list) else value


def _counted(count: int) -> str:
    return "1 checkpoint" if count == 1 else f"{count} checkpoints"


def _numbers_in(structure: Sequence[Sequence[Any]]) -> int:
    return sum(int(np.prod(shape)) for shape, _ in structure)
