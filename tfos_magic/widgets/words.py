"""How the board's facts are put in words and numbers, the same in HTML and in text.

Runs on: anywhere. Pure functions of a :class:`~tfos_magic.status.BoardView`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tfos_magic.status import BoardView, GpuSample, MachineSample, NodeState, NodeView, beat_interval_s

NODES_SHOWN = 16
"""Of more nodes than this only the ones that need attention are shown, the rest is summed up."""
NOTHING = "–"
READY = "ready"
"""The outcome in the record of what goes on without the cell: its nodes wait for questions."""

_INPUT_BOUND_PERCENT = 40.0
_COMPUTE_BOUND_PERCENT = 10.0
_JUDGE_AFTER_S = 5.0
_LATE_AFTER_BEATS = 4
_SILENT_AFTER_S = 10.0
_FEED_HELD_PERCENT = 10.0
_FORETELL_AFTER_S = 5.0
_FORETELL_AFTER_SHARE = 0.02
_OTHER_ROWS = 0.1  # how far the rows that an epoch used may be off those that the feed has for one
_SPARK = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40
_SMALL = 10
_VALIDATION = "val_"
_ROLES = {"ps": "parameter server"}

MARKS = {
    NodeState.PLANNED: "○",
    NodeState.STARTING: "◔",
    NodeState.IMPORTING: "◔",
    NodeState.MEETING: "◔",
    NodeState.RUNNING: "●",
    NodeState.WAITING: "◐",
    NodeState.SAVING: "◑",
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
    NodeState.SAVING,
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


def gpu(samples: Sequence[GpuSample], history: Sequence[float] = ()) -> str:
    """Return e.g. ``2 × 87 % ▆▇▇ · 62/160 GiB``: mean utilisation, its last seconds, memory of all together."""
    if not samples:
        return NOTHING
    parts = [gpu_load(samples), *([load_line(history)] if history else [])]
    return " · ".join(filter(None, [" ".join(parts), gpu_memory(samples)]))


def gpu_load(samples: Sequence[GpuSample]) -> str:
    """Return e.g. ``2 × 87 %``: mean utilisation."""
    load = percent(MachineSample(gpus=tuple(samples)).gpu_percent)
    return f"{len(samples)} × {load}".removeprefix("1 × ")


def gpu_memory(samples: Sequence[GpuSample]) -> str:
    """Return e.g. ``62/160 GiB``: of all together; empty when unknown."""
    used = [sample.memory_used_bytes for sample in samples if sample.memory_used_bytes is not None]
    totals = [sample.memory_total_bytes for sample in samples if sample.memory_total_bytes is not None]
    if not used:
        return ""
    if len(totals) < len(samples):
        return size(sum(used))
    gib = sum(used) / 2**30
    return f"{f'{gib:.1f}' if gib < 10 else f'{gib:.0f}'}/{sum(totals) / 2**30:.0f} GiB"


def gpu_heat(samples: Sequence[GpuSample]) -> str:
    """Return e.g. ``310 W · 64 °C``: the power of all GPUs together, and the hottest one's temperature."""
    watts = [sample.power_watts for sample in samples if sample.power_watts is not None]
    degrees = [sample.temperature_celsius for sample in samples if sample.temperature_celsius is not None]
    parts = [f"{sum(watts):.0f} W"] if watts else []
    return " · ".join([*parts, *([f"{max(degrees):.0f} °C"] if degrees else [])])


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
    age_s = beat_age_s(node, view)
    if age_s is None or age_s < _LATE_AFTER_BEATS * beat_interval_s(len(view.nodes)):
        return node.state.value
    told = "silent for" if age_s >= _SILENT_AFTER_S else "not heard for"
    return f"{node.state.value}, {told} {duration(age_s)}"


def beat_age_s(node: NodeView, view: BoardView) -> float | None:
    """Return how old the node's last heartbeat is; None when none is due, or none has come."""
    if view.outcome or node.state.is_final or node.beat_at is None:
        return None
    return max(0.0, view.now - node.beat_at)


def queued(node: NodeView) -> str:
    """Return the chunks that lie at a node and their size, e.g. ``12 · 48 MiB``."""
    return f"{node.queued_chunks:,} · {size(node.queued_bytes)}" if node.queued_chunks else "0"


def has_feed(view: BoardView) -> bool:
    """Whether any node has got rows from Spark."""
    return any(node.rows_received or node.rows_consumed for node in view.nodes)


def has_gpus(view: BoardView) -> bool:
    """Whether any node has a GPU that can be seen."""
    return any(node.machine.gpus for node in view.nodes)


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
    judged = [node for node in view.nodes if _ran_s(node, view) >= _JUDGE_AFTER_S]
    waits = _mean(node.wait_percent for node in judged)
    if waits is None:
        return ""
    if waits >= _INPUT_BOUND_PERCENT:
        return f"input-bound: nodes {'waited' if view.outcome else 'wait'} {waits:.0f} % for data"
    held = _mean(node.feed_wait_percent for node in judged) or 0.0
    if held >= (_FEED_HELD_PERCENT if waits <= _COMPUTE_BOUND_PERCENT else _INPUT_BOUND_PERCENT):
        return f"compute-bound: the feed {'waited' if view.outcome else 'waits'} {held:.0f} % for the nodes"
    if waits > _COMPUTE_BOUND_PERCENT or not rows_used(view):
        return ""
    is_past = bool(view.outcome)
    return (
        f"compute-bound: data {'was' if is_past else 'is'} there in time "
        f"(nodes {'waited' if is_past else 'wait'} {waits:.0f} %)"
    )


def _ran_s(node: NodeView, view: BoardView) -> float:
    return (node.ended_at or view.now) - node.running_since if node.running_since is not None else 0.0


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    share: float
    """Of the whole run, 0 … 1."""
    epoch_share: float | None
    """Of the epoch that goes on; None where nobody can know."""
    left_s: float | None
    """Seconds to its end if it goes on as it has on average; None as long as that would be a guess."""


def progress(view: BoardView) -> Progress | None:
    """Return how far the run is; None when it is over, or nothing tells.

    Rows tell best: those used against those that the feed has for an epoch, or, where they differ, those that the
    epochs so far have used (a function need not use the validation rows). Without a feed the reported steps tell,
    from the second epoch on.
    """
    began = [node.running_since for node in view.nodes if node.running_since is not None]
    trained = view.epoch or 0
    if view.outcome or not began or trained > view.epochs or trained == view.epochs == 1:
        return None  # also when the function trains for longer than the line said
    of_rows = _epochs_by_rows(view)
    done = of_rows if of_rows is not None else _epochs_by_steps(view)
    if done is None and not trained:
        return None
    share = min(1.0, (done if done is not None else trained) / view.epochs)
    ran_s = view.now - min(began)
    is_clear = ran_s >= _FORETELL_AFTER_S and _FORETELL_AFTER_SHARE <= share < 1
    return Progress(
        share,
        None if done is None else min(1.0, done - min(view.epochs - 1, trained or int(done))),
        ran_s * (1 - share) / share if is_clear else None,
    )


def _epochs_by_rows(view: BoardView) -> float | None:
    """Return the epochs done as the rows tell, with a fraction; whole ones as they were reported, if they were."""
    fed = [node for node in view.nodes if node.rows_received]
    of_nodes = [node.rows_per_epoch for node in fed if node.rows_per_epoch]
    if not fed or len(of_nodes) < len(fed):
        return None
    per_epoch = float(sum(of_nodes))
    if not view.epoch:
        done = rows_used(view) / per_epoch
        return min(float(view.epochs), done) if done <= view.epochs * (1 + _OTHER_ROWS) else None
    seen = view.marked_rows / view.epoch
    if seen and abs(seen - per_epoch) > _OTHER_ROWS * per_epoch:
        per_epoch = seen
    return view.epoch + min(1.0, max(0.0, rows_used(view) / per_epoch - view.epoch))


def _epochs_by_steps(view: BoardView) -> float | None:
    steps = [node.step for node in view.nodes if node.step is not None]
    if not view.epoch or not view.marked_step or not steps:
        return None
    return view.epoch + min(1.0, max(0.0, max(steps) * view.epoch / view.marked_step - view.epoch))


def progress_told(view: BoardView, known: Progress) -> str:
    """Return e.g. ``47 % · epoch 3: 35 % · about 2 min left``."""
    parts = [f"{100 * known.share:.0f} %"]
    if known.epoch_share is not None and view.epochs > 1:
        number = min(view.epochs, (view.epoch if view.epoch else int(known.share * view.epochs)) + 1)
        parts.append(f"epoch {number}: {100 * known.epoch_share:.0f} %")
    if known.left_s is not None:
        parts.append(f"about {_roughly(known.left_s)} left")
    return " · ".join(parts)


def _roughly(seconds: float) -> str:
    """Return a time that nobody can know to the second."""
    if seconds < 57.5:
        return f"{max(5, 5 * round(seconds / 5))} s"
    return f"{round(seconds / 60)} min" if seconds < 3570 else f"{seconds / 3600:.1f} h"


def checkpoint(view: BoardView) -> str:
    """Return e.g. ``saved up to epoch 3, step 120 (12 MiB)``; empty where nothing is saved."""
    last = view.checkpoint
    return "" if last is None else f"saved up to {last.where} ({size(last.size_bytes)})"


def restarts(view: BoardView) -> str:
    """Return e.g. ``attempt 2, after 40 s: worker:0 on h was killed by …``; empty where the first one goes on."""
    if not view.restarts:
        return ""
    last = view.restarts[-1]
    left = "" if view.outcome else f" ({last.attempts_left} more allowed)"
    at = duration(max(0.0, last.at - view.started_at))
    return f"attempt {len(view.restarts) + 1}{left}, since {at}: {last.cause.rstrip('.')}"


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
        facts.append(checkpoint(view) if view.outcome != "done" else "")
    else:
        facts = [view.phase, epoch(view), duration(view.elapsed_s), speed, checkpoint(view)]
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
    return f"{len(nodes)} more node{'s' if len(nodes) > 1 else ''}: {told}{_speed(nodes)}"


def groups(nodes: Sequence[NodeView]) -> list[tuple[NodeState, str]]:
    """Return the states of nodes that are not shown one by one, worst first, each with e.g. ``45 more: running``."""
    found = sorted({node.state for node in nodes}, key=_ATTENTION.index)
    members = [(state, [node for node in nodes if node.state is state]) for state in found]
    return [(state, f"{len(those)} more: {state.value}{_speed(those)}{_waits(those)}") for state, those in members]


def _speed(nodes: Sequence[NodeView]) -> str:
    rate = sum(node.rows_per_s for node in nodes)
    return f" · {count(rate)} rows/s" if rate >= 0.5 else ""


def _waits(nodes: Sequence[NodeView]) -> str:
    waits = _mean(node.wait_percent for node in nodes)
    return f" · wait {waits:.0f} %" if waits is not None else ""


@dataclass(frozen=True)
class Curve:
    """One metric as it went; `validation` is empty when there was none."""

    name: str
    training: tuple[float, ...]
    validation: tuple[float, ...] = ()
    places: tuple[float, ...] = ()
    """Where the values of `training` belong: epochs, or steps."""
    validation_places: tuple[float, ...] = ()
    is_by_step: bool = False


def curves(view: BoardView) -> list[Curve]:
    """Return the metrics as curves, each with its validation twin: by epoch from the second one on, by step before.

    The loss comes first, the others in the order in which they were reported.
    """
    names = {name.removeprefix(_VALIDATION): None for name in (*view.history, *view.trace)}
    found = [_curve(name, view) for name in sorted(names, key=lambda name: name != "loss")]
    return [curve for curve in found if curve.training or curve.validation]


def _curve(name: str, view: BoardView) -> Curve:
    training, validation = view.history.get(name, ()), view.history.get(_VALIDATION + name, ())
    trace = view.trace.get(name, ())
    epochs = tuple(float(number) for number in range(1, 1 + max(len(training), len(validation))))
    if len(trace) > 1 and len(training) < 2:
        steps, values = zip(*trace, strict=True)
        at = float(view.marked_step or steps[-1])
        return Curve(name, values, validation, steps, (at,) * len(validation), is_by_step=True)
    known = progress(view) if training and trace else None
    places = epochs[: len(training)]
    if known is not None and known.epoch_share:  # the epoch that goes on, as far as it has come
        training, places = (*training, trace[-1][1]), (*places, len(training) + known.epoch_share)
    return Curve(name, training, validation, places, epochs[: len(validation)])


def sparkline(values: Sequence[float], low: float, high: float, width: int = _SPARK_WIDTH) -> str:
    """Return one character per value between `low` and `high`, a blank for NaN; above `width` values are thinned."""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    return "".join(_bar(value, low, high) for value in values)


def _bar(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return " "
    if not 0 < high - low < math.inf:
        return _SPARK[0]
    return _SPARK[min(7, max(0, int((value - low) / (high - low) * 8)))]


def rate_line(node: NodeView) -> str:
    """Return the last seconds' rows/s of a node as a small line, from nothing up to its own highest."""
    return sparkline(node.rate_history, 0.0, max(node.rate_history, default=0.0), _SMALL)


def load_line(history: Sequence[float]) -> str:
    """Return the last seconds' utilisation as a small line, from 0 to 100 %."""
    return sparkline(history, 0.0, 100.0, _SMALL)


def curve_range(curve: Curve) -> tuple[float, float]:
    """Return the lowest and highest finite value of both lines, which share one scale."""
    finite = [value for value in (*curve.training, *curve.validation) if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def last_finite(values: Sequence[float]) -> float | None:
    """Return the last value that is a number."""
    return next((value for value in reversed(values) if math.isfinite(value)), None)
