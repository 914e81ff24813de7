"""A run's numbers as TensorBoard's event files.

Runs on: driver.

    cluster ──events──► ScalarLog.take ──► DIR/<run>/train/events.out.tfevents.…     epoch_loss, epoch_…
                                           DIR/<run>/validation/…                    epoch_loss, epoch_…
                                           DIR/<run>/<role>-<index>/…                feed/…, machine/…, gpu0/…, reports

The names of epochs' numbers, their steps (from 0) and the two directories are those of ``keras.callbacks.TensorBoard``,
so that runs of both kinds lie in one chart. Of what is measured all the time the step is the second of the run.
TensorFlow is not imported: TensorBoard's own package writes the files.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tfos_magic.errors import UsageError
from tfos_magic.status import Event, GpuSample, MetricsReported, NodeBeat, NodeView, RunPlanned, StatusBoard

_log = logging.getLogger(__name__)
_BEAT_S = 1.0  # apart, per node: a chart shows no more
_VALIDATION = "val_"


def directory_for(wanted: str) -> Path:
    """Return the directory of event files as a path of this machine, made if it is not there.

    Raises
    ------
    UsageError
        It is on another file system, cannot be written to, or TensorBoard is not installed.
    """
    scheme = re.match(r"([a-z][a-z0-9+.-]*):/", wanted)
    if scheme is not None and scheme[1] != "file":
        raise UsageError(
            f"--tensorboard {wanted}: the driver writes to directories of its own machine, not to {scheme[1]}:.",
            hint="Name a local one; keras.callbacks.TensorBoard in the cell writes wherever TensorFlow can.",
        )
    path = Path(re.sub(r"^file:(//)?", "", wanted)).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--tensorboard {wanted}: the directory cannot be made: {error.strerror}.") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"--tensorboard {wanted}: this process may not write there.")
    try:
        import tensorboard.compat.proto.event_pb2  # noqa: F401  # asked for here, needed when the run has begun
    except ImportError:
        raise UsageError(
            "--tensorboard: the package tensorboard is not installed here; newer TensorFlows do not bring it.",
            hint="pip install tensorboard",
        ) from None
    return path


class ScalarLog:
    """Writes the numbers of one run; give :meth:`take` all its events, after the board has had them.

    A context manager; it never raises into the run: the first failure to write is logged, and writing stops.

    Parameters
    ----------
    directory : Path
        From :func:`directory_for`.
    run : str
        What the run is called; the time of its beginning is added.
    board : StatusBoard
        Knows the rates.
    """

    def __init__(self, directory: Path, run: str, board: StatusBoard) -> None:
        self._directory = directory / f"{time.strftime('%Y%m%d-%H%M%S')}-{run}"
        self._board = board
        self._lock = threading.Lock()  # events come from several threads
        self._files: dict[str, EventFile] = {}
        self._began = time.time()
        self._reporter = ""
        self._is_independent = False
        self._beats: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._is_over = False

    @property
    def directory(self) -> Path:
        """Of this run."""
        return self._directory

    def __enter__(self) -> ScalarLog:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._is_over = True
            for file in self._files.values():
                file.close()

    def take(self, event: Event) -> None:
        """Write what the event has of numbers; from any thread."""
        with self._lock:
            if self._is_over:
                return
            try:
                self._write(event)
            except OSError as error:
                self._is_over = True
                _log.warning("no more event files for TensorBoard: %s; the run goes on", error)

    def _write(self, event: Event) -> None:
        if isinstance(event, RunPlanned):
            self._began = event.at
            self._is_independent = event.is_independent
        elif isinstance(event, NodeBeat):
            self._write_beat(event)
        elif isinstance(event, MetricsReported) and event.epoch is not None:
            self._write_epoch(event, event.epoch)
        elif isinstance(event, MetricsReported):
            self._write_report(event)

    def _write_beat(self, event: NodeBeat) -> None:
        if event.at - self._beats.get(event.node, -math.inf) < _BEAT_S:
            return
        self._beats[event.node] = event.at
        view = next((node for node in self._board.view().nodes if node.name == event.node), None)
        if view is not None:
            self._file(_of_node(event.node)).add(_measured(view), int(event.at - self._began), event.at)

    def _write_epoch(self, event: MetricsReported, epoch: int) -> None:
        self._reporter = self._reporter or event.node
        if self._is_independent:
            place = f"{_of_node(event.node)}/"
        elif event.node == self._reporter:  # the nodes train one model: one of them tells of it
            place = ""
        else:
            return
        for name, is_validation in ((f"{place}train", False), (f"{place}validation", True)):
            values = {
                f"epoch_{key.removeprefix(_VALIDATION)}": value
                for key, value in event.values.items()
                if key.startswith(_VALIDATION) == is_validation
            }
            if values:
                self._file(name).add(values, epoch - 1, event.at)

    def _write_report(self, event: MetricsReported) -> None:
        step = self._steps.get(event.node, -1) + 1 if event.step is None else event.step
        self._steps[event.node] = step
        self._file(_of_node(event.node)).add(event.values, step, event.at)

    def _file(self, name: str) -> EventFile:
        if name not in self._files:
            self._files[name] = EventFile(self._directory / name)
        return self._files[name]


def _of_node(node: str) -> str:
    return node.replace(":", "-")


def _measured(node: NodeView) -> dict[str, float]:
    """Return what is known of a node now, by the names under which TensorBoard groups it."""
    machine = node.machine
    values: dict[str, float | None] = {
        "feed/rows_per_s": node.rows_per_s,
        "feed/rows_received": node.rows_received,
        "feed/wait_percent": node.wait_percent,
        "machine/cpu_percent": machine.cpu_percent,
        "machine/memory_bytes": machine.memory_bytes,
    }
    for gpu in machine.gpus:
        values.update(_of_gpu(gpu))
    return {name: value for name, value in values.items() if value is not None}


def _of_gpu(gpu: GpuSample) -> Iterator[tuple[str, float | None]]:
    for name in ("utilization_percent", "memory_used_bytes", "power_watts", "temperature_celsius"):
        yield f"gpu{max(gpu.index, 0)}/{name}", getattr(gpu, name)


class EventFile:
    """One event file: what TensorBoard shows as one line in each chart.

    Parameters
    ----------
    directory : Path
        Its name is the line's.
    """

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.tfos_magic"
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115  # closed with the run
        self._records = RecordWriter(self._file)
        self._records.write(self._event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def add(self, values: Mapping[str, float], step: int, at: float) -> None:
        """Append one number for each name, and let readers see them."""
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=values[tag]) for tag in values])
        self._records.write(self._event(wall_time=at, step=step, summary=summary).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
