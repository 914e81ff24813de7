"""How the board's facts are put in words and numbers, the same in HTML and in text.

Runs on: anywhere. Pure functions of a :class:`~tfos_magic.status.BoardView`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tfos_magic.status import BoardView, GpuSample, NodeState, NodeView

NODES_SHOWN = 16
"""Of more nodes than this only the ones that need attention are shown, the rest is summed up."""
NOTHING = "–"
READY = "ready"
"""The outcome in the record of what goes on without the cell: its nodes wait for questions."""

_INPUT_BOUND_PERCENT = 40.0
_COMPUTE_BOUND_PERCENT = 10.0
_JUDGE_AFTER_S = 5.0
_SILENT_AFTER_S = 10.0
_SPARK = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40
_VALIDATION = "val_"
_ROLES = {"ps": "parameter server"}

MARKS = {
    NodeState.PLANNED: "○",
    NodeState.STARTING: "◔",
    NodeState.IMPORTING: "◔",
    NodeState.MEETING: "◔",
    NodeState.RUNNING: "●",
    NodeState.WAITING: "◐",
    NodeState.FINISHED: "●",
    NodeState.DONE: "✓",
    NodeState.FAILED: "✗",
    NodeState.STOPPED: "■",
    NodeState.LOST: "✗",
}
"""One character for each state, told apart without colour."""

_ATTENTION = (
    NodeState.FAILED,
    NodeState.LOST,
    NodeState.STOPPED,
    NodeState.PLANNED,
    NodeState.STARTING,
    NodeState.IMPORTING,
    NodeState.MEETING,
    NodeState.WAITING,
    NodeState.RUNNING,
    NodeState.FINISHED,
    NodeState.DONE,
)


def count(number: float) -> str:
    """Return a count with thousands separated; from ten million on in millions."""
    return f"{number:,.0f}" if number < 1e7 else f"{number / 1e6:,.1f} M"


def percent(value: float | None) -> str:
    """Return e.g. ``63 %``, a dash when unknown."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.0f} %"


def size(size_bytes: int | None) -> str:
    """Return e.g. ``1.4 GiB``, a dash when unknown."""
    if size_bytes is None:
        return NOTHING
    if size_bytes < 2**20:
        return f"{size_bytes / 2**10:.0f} KiB"
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes < 1000 * 2**20 else f"{size_bytes / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """Return e.g. ``8 s``, ``2 min 05 s``, ``1 h 02 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float) -> str:
    """Return a metric's value with four significant digits, short enough for a table."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"
    return f"{value:.2e}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:,.0f}"


def gpu(samples: Sequence[GpuSample]) -> str:
    """Return e.g. ``2 × 87 % · 31.2 GiB``: mean utilisation and summed memory in use of a node's GPUs."""
    if not samples:
        return NOTHING
    loads = [sample.utilization_percent for sample in samples if sample.utilization_percent is not None]
    used = [sample.memory_used_bytes for sample in samples if sample.memory_used_bytes is not None]
    parts = [f"{len(samples)} × {percent(sum(loads) / len(loads) if loads else None)}".removeprefix("1 × ")]
    parts += [size(sum(used))] if used else []
    return " · ".join(parts)


def gpu_detail(samples: Sequence[GpuSample]) -> str:
    """Return one line per GPU with all that is known of it."""
    return "\n".join(_one_gpu(sample) for sample in samples)


def _one_gpu(sample: GpuSample) -> str:
    parts = [f"GPU {sample.index}" if sample.index >= 0 else "GPU", sample.name, percent(sample.utilization_percent)]
    parts.append(f"{size(sample.memory_used_bytes)} of {size(sample.memory_total_bytes)}")
    if sample.power_watts is not None:
        parts.append(f"{sample.power_watts:.0f} W")
    if sample.temperature_celsius is not None:
        parts.append(f"{sample.temperature_celsius:.0f} °C")
    return "  ".join(part for part in parts if part)


def look(node: NodeView, view: BoardView) -> NodeState:
    """Return the state whose mark and colour the node has: one that is ready looks like one that runs."""
    return NodeState.RUNNING if state(node, view) == READY else node.state


def role(node: NodeView) -> str:
    """Return the role as people say it."""
    return _ROLES.get(node.role, node.role)


def state(node: NodeView, view: BoardView) -> str:
    """Return the node's state, with a remark when nothing has been heard of it for a while."""
    if view.outcome == READY and not node.state.is_final:
        return READY
    silent_s = view.now - node.beat_at if node.beat_at is not None else 0.0
    if view.outcome or node.state.is_final or silent_s < _SILENT_AFTER_S:
        return node.state.value
    return f"{node.state.value}, silent for {duration(silent_s)}"


def metrics(node: NodeView) -> str:
    """Return the node's last metrics, e.g. ``loss 0.4120  accuracy 0.8800``."""
    parts = [f"{name} {number(value)}" for name, value in node.metrics.items()]
    if node.step is not None:
        parts.insert(0, f"step {node.step:,}")
    return "  ".join(parts)


def last_words(node: NodeView) -> str:
    """Return the node's last log line, or why it failed."""
    if node.detail and node.state in (NodeState.FAILED, NodeState.LOST):
        return node.detail.strip().splitlines()[0]
    return node.last_line


def epoch(view: BoardView) -> str:
    """Return ``epoch 3 of 5``, or how many were trained once the run is over; empty when nobody counts epochs."""
    if view.epoch is None:
        return ""
    if view.outcome:
        if view.epoch > view.epochs:  # the function trained for longer than the line said
            return f"{view.epoch} epochs"
        return f"{view.epoch} of {view.epochs} epochs" if view.epochs > 1 else "1 epoch"
    return f"epoch {min(view.epoch + 1, max(view.epochs, view.epoch))} of {max(view.epochs, view.epoch)}"


def total_rate(view: BoardView) -> float:
    """Return rows/s of all nodes: of the moment, after the run over each node's running time."""
    return sum(node.rows_per_s for node in view.nodes)


def rows_used(view: BoardView) -> int:
    """Return the rows that all nodes have used."""
    return sum(node.rows_consumed for node in view.nodes)


def bottleneck(view: BoardView) -> str:
    """Say which side is slow when it is clear, else return an empty string."""
    if view.outcome == READY:
        return ""
    waits = [
        node.wait_percent
        for node in view.nodes
        if node.wait_percent is not None
        and node.running_since is not None
        and (node.ended_at or view.now) - node.running_since >= _JUDGE_AFTER_S
    ]
    if not waits:
        return ""
    mean = sum(waits) / len(waits)
    if mean >= _INPUT_BOUND_PERCENT:
        return f"input-bound: nodes {'waited' if view.outcome else 'wait'} {mean:.0f} % for data"
    if mean <= _COMPUTE_BOUND_PERCENT and rows_used(view):
        return f"compute-bound: data {'was' if view.outcome else 'is'} there in time (nodes wait {mean:.0f} %)"
    return ""


def headline(view: BoardView) -> tuple[str, list[str]]:
    """Return the title and the facts that follow it."""
    title = view.title or "training"
    rate = total_rate(view)
    speed = f"{count(rate)} rows/s" if rate >= 0.5 else ""
    if view.outcome == READY:
        facts = ["nodes wait for questions"]
    elif view.outcome:
        used = rows_used(view)
        facts = [epoch(view), f"{count(used)} {'row' if used == 1 else 'rows'} used" if used else "", speed]
    else:
        facts = [view.phase, epoch(view), duration(view.elapsed_s), speed]
    return title, [fact for fact in facts if fact]


def outcome(view: BoardView) -> str:
    """Return e.g. ``done in 42 s``; empty while the run goes on."""
    words = {"done": "done in", "failed": "failed after", "stopped": "stopped after", READY: "ready after"}
    return f"{words.get(view.outcome, view.outcome + ' after')} {duration(view.elapsed_s)}" if view.outcome else ""


def by_attention(nodes: Iterable[tuple[int, NodeView]]) -> list[tuple[int, NodeView]]:
    """Return (index, node) pairs, what needs a person's eye first: failed, not there yet, waiting, slow."""
    return sorted(
        nodes,
        key=lambda pair: (_ATTENTION.index(pair[1].state), -(pair[1].wait_percent or 0.0), pair[1].rows_per_s, pair[0]),
    )


def split(view: BoardView) -> tuple[list[tuple[int, NodeView]], list[tuple[int, NodeView]]]:
    """Return the (index, node) pairs to show at once, and the rest."""
    pairs = list(enumerate(view.nodes))
    if len(pairs) <= NODES_SHOWN:
        return pairs, []
    ordered = by_attention(pairs)
    return ordered[:NODES_SHOWN], ordered[NODES_SHOWN:]


def summary(nodes: Sequence[NodeView]) -> str:
    """Return e.g. ``48 more nodes: 45 running, 3 waiting for data · 12,300 rows/s``."""
    states = Counter(node.state.value for node in nodes)
    told = ", ".join(f"{number} {name}" for name, number in states.most_common())
    rate = sum(node.rows_per_s for node in nodes)
    speed = f" · {count(rate)} rows/s" if rate >= 0.5 else ""
    return f"{len(nodes)} more node{'s' if len(nodes) > 1 else ''}: {told}{speed}"


@dataclass(frozen=True)
class Curve:
    """One metric over the epochs; `validation` is empty when there was none."""

    name: str
    training: tuple[float, ...]
    validation: tuple[float, ...] = ()


def curves(view: BoardView) -> list[Curve]:
    """Return the history as curves, each metric with its validation twin."""
    history = view.history
    names = {name.removeprefix(_VALIDATION): None for name in history}
    return [Curve(name, history.get(name, ()), history.get(_VALIDATION + name, ())) for name in names]


def sparkline(values: Sequence[float], low: float, high: float, width: int = _SPARK_WIDTH) -> str:
    """Return one character per value between `low` and `high`, a blank for NaN; above `width` values are thinned."""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    return "".join(_bar(value, low, high) for value in values)


def _bar(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return " "
    if high <= low:
        return _SPARK[0]
    return _SPARK[min(7, max(0, int((value - low) / (high - low) * 8)))]


def curve_range(curve: Curve) -> tuple[float, float]:
    """Return the lowest and highest finite value of both lines, which share one scale."""
    finite = [value for value in (*curve.training, *curve.validation) if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def last_finite(values: Sequence[float]) -> float | None:
    """Return the last value that is a number."""
    return next((value for value in reversed(values) if math.isfinite(value)), None)
