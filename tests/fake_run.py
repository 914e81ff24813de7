"""Synthetic events of a run, for tests of the board and of how it is drawn."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

from tfos_magic.status import (
    GpuSample,
    MachineSample,
    MetricsReported,
    NodeBeat,
    NodeChanged,
    NodeLogged,
    NodeState,
    PhaseChanged,
    RunEnded,
    RunPlanned,
    StatusBoard,
)

GIB = 2**30
ROWS_PER_EPOCH = 18_510  # six seconds of the slowest node


def names(nodes: int) -> tuple[str, ...]:
    return ("chief:0", *(f"worker:{index}" for index in range(nodes - 1)))


def machine(index: int, *, gpu: bool = False, load: float = 1.0) -> MachineSample:
    gpus = (GpuSample(index % 8, "NVIDIA A100", 87.0 * load, int(31.2 * GIB), 40 * GIB, 287.0, 64.0),) if gpu else ()
    return MachineSample(172.0 * load + index % 7, int(1.31 * GIB) + index * 2**21, gpus)


def run_events(
    nodes: int = 4,
    epochs: int = 5,
    *,
    gpu: bool = False,
    wait: float = 0.2,
    held: float = 0.0,
    fail: str = "",
    start: float = 1000.0,
) -> Iterator[object]:
    """Yield the events of a run of about 40 s on a clock that begins at `start`."""
    nodes_named = names(nodes)
    at = start
    yield RunPlanned("tfos_train · 4 nodes" if nodes == 4 else f"tfos_train · {nodes} nodes", nodes_named, epochs, at)
    yield PhaseChanged("waiting for Spark", at)
    for delay, state in ((0.4, NodeState.STARTING), (0.3, NodeState.IMPORTING), (3.0, NodeState.MEETING)):
        at += delay
        yield PhaseChanged("starting the nodes", at)
        for index, name in enumerate(nodes_named):
            yield NodeChanged(name, state, f"10.0.0.{index // 2 + 4}", at=at + index * 0.01)
    at += 0.5
    yield PhaseChanged("training", at)
    for name in nodes_named:
        yield NodeChanged(name, NodeState.RUNNING, at=at)
    began = at
    for second in range(1, epochs * 6 + 1):
        at += 1
        for index, name in enumerate(nodes_named):
            rows = int(second * 3085 * (1 + index % 5 / 40))
            waited = (at - began) * wait * (1 + index % 3 / 10)
            yield NodeBeat(
                name,
                min(rows * 2, ROWS_PER_EPOCH),
                rows,
                waited,
                queued_chunks=max(0, 12 - second),
                queued_bytes=max(0, 12 - second) * 4 * 2**20,
                feed_wait_s=(at - began) * held,
                rows_per_epoch=ROWS_PER_EPOCH if rows * 2 >= ROWS_PER_EPOCH else None,
                machine=machine(index, gpu=gpu, load=1 - (second + index) % 4 / 12),
                at=at,
            )
            yield MetricsReported(name, {"loss": 2 * math.exp(-second / 12)}, step=second * 40, at=at)
            bar = f"\x1b[1m{second * 8}/240\x1b[0m ━━━━━━━━━━ 1s 4ms/step - loss: 0.41\b\b\b\b\r"
            yield NodeLogged(
                name, (bar + f"{second * 8}/240 ━━━━━━━━━━ 1s 4ms/step - accuracy: 0.9{second % 10}",), 0, at
            )
        if second % 6 == 0:
            epoch = second // 6
            values = {"loss": 1.9 * math.exp(-epoch / 2), "accuracy": 1 - 0.6 * math.exp(-epoch / 2)}
            values |= {
                "val_loss": 2.0 * math.exp(-epoch / 2.4) + 0.05,
                "val_accuracy": 0.98 - 0.6 * math.exp(-epoch / 2),
            }
            for name in nodes_named:
                yield MetricsReported(name, values, step=epoch * 240, epoch=epoch, at=at)
        if fail and second == epochs * 3:
            yield NodeLogged(
                fail, ("Traceback (most recent call last):", "  ValueError: <b>bad</b> shape & more"), 0, at
            )
            yield NodeChanged(fail, NodeState.FAILED, detail="ValueError: shapes (64, 10) and (64, 12) differ", at=at)
            for name in nodes_named:
                if name != fail:
                    yield NodeChanged(name, NodeState.STOPPED, at=at + 0.8)
            message = (
                f"ValueError: shapes (64, 10) and (64, 12) differ\n{fail} on 10.0.0.5 failed in Cell In[4], line 9"
            )
            yield RunEnded("failed", message, at + 1)
            return
    for name in nodes_named:
        yield NodeChanged(name, NodeState.DONE, at=at + 0.2)
    yield RunEnded("done", "", at + 0.5)


def finished(**options: object) -> StatusBoard:
    """Return the board of a run that is over."""
    board = StatusBoard()
    for event in run_events(**options):  # type: ignore[arg-type]
        board.apply(event)  # type: ignore[arg-type]
    return board


def play(board: StatusBoard, *, speed: float = 1.0, **options: object) -> None:
    """Apply a run's events at their times, `speed` times as fast; blocks until the run is over."""
    start = time.time()
    pause = threading.Event()
    for event in run_events(start=start, **options):  # type: ignore[arg-type]
        due = start + (event.at - start) / speed  # type: ignore[attr-defined]
        pause.wait(max(0.0, due - time.time()))
        board.apply(event)  # type: ignore[arg-type]
