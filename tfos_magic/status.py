"""What is known of a run: events, and the board they fold into.

Runs on: driver and executors.

    node agents ──heartbeats──► cluster ──events──► StatusBoard.apply ──► view() ──► widgets (HTML, text, live)

An event is a frozen record of one thing that happened; a board is a pure fold of events, knows nothing of Spark
or of drawing, and can be fed from any thread. :meth:`StatusBoard.view` returns an immutable picture to draw.
"""

from __future__ import annotations

import math
import re
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain, islice
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

_WINDOW_S = 5.0  # rows/s is taken over this much of the near past: long enough to be calm, short enough to be now
_LINE_CHARS_KEPT = 2000
_REPORTS_KEPT = 10_000
_SAMPLES_KEPT = 20  # of what the board draws as a small line in a node's row
_SAMPLE_EVERY_S = 0.9  # nearly every second beat: the line shows twenty seconds
_TRACE_POINTS = 96
_NOTICES_KEPT = 4
_BEAT_S = 0.5
_BEATS_PER_S = 300  # of all nodes together: the driver gives a few percent of a core to them
LEFT_OUT = re.compile(r"… ([\d,]+) (?:earlier lines left out|lines left out here)")
"""A line that stands for others; as the first of a node's log: it is not the first that the node wrote."""


class NodeState(str, Enum):
    """Where a node is in its life; the value is what people read."""

    PLANNED = "waiting for a slot"
    STARTING = "starting"
    IMPORTING = "importing TensorFlow"
    MEETING = "meeting the others"
    RUNNING = "running"
    WAITING = "waiting for data"
    SAVING = "saving"
    FINISHED = "finished, waiting for the others"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"

    @property
    def is_final(self) -> bool:
        """True when the node will not change any more."""
        return self in _FINAL


_FINAL = frozenset({NodeState.DONE, NodeState.FAILED, NodeState.STOPPED, NodeState.LOST})


@dataclass(frozen=True)
class GpuSample:
    """One GPU as NVML sees it; None where the driver does not say."""

    index: int
    name: str = ""
    utilization_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True)
class MachineSample:
    """CPU and memory of a node's process tree, and its GPUs; None where nothing on the host can tell."""

    cpu_percent: float | None = None
    """100 is one core kept busy."""
    memory_bytes: int | None = None
    gpus: tuple[GpuSample, ...] = ()

    @property
    def gpu_percent(self) -> float | None:
        """Mean utilisation of the GPUs; None where none says."""
        loads = [gpu.utilization_percent for gpu in self.gpus if gpu.utilization_percent is not None]
        return sum(loads) / len(loads) if loads else None


def beat_interval_s(num_nodes: int) -> float:
    """Return the seconds between two heartbeats of a node: half a second, more where there are so many to listen to."""
    return max(_BEAT_S, num_nodes / _BEATS_PER_S)


# --- events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunPlanned:
    """A run begins: which nodes there will be."""

    title: str
    nodes: tuple[str, ...]
    """Node names in node order, e.g. ``("chief:0", "worker:0")``."""
    epochs: int = 1
    at: float = field(default_factory=time.time)
    is_independent: bool = False
    """Each node does something else: no mean over nodes says anything, and there is no epoch of the run."""
    points: tuple[str, ...] = ()
    """What is different on each node, in words; empty where nothing is."""


@dataclass(frozen=True)
class PhaseChanged:
    """What the run as a whole is doing, in words for the header."""

    phase: str
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class RunRestarted:
    """All nodes are started again: what they did since the last checkpoint is done once more."""

    cause: str
    """Why, in a line."""
    attempts_left: int = 0
    """How often that may happen again."""
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class CheckpointSaved:
    """The state of training is in a file now: what comes after it would be lost with the nodes."""

    where: str
    """In words: ``epoch 3, step 120``."""
    size_bytes: int
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Noticed:
    """Something that whoever looks at the run should know: where it resumed, what could not be saved."""

    text: str
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class NodeChanged:
    """A node got a host or a new state."""

    node: str
    state: NodeState
    host: str = ""
    detail: str = ""
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class NodeBeat:
    """A heartbeat: totals since the node started. Rates are the board's business."""

    node: str
    rows_received: int = 0
    """Rows that Spark has delivered to this node."""
    rows_consumed: int = 0
    """Rows that the user's function has taken, all epochs counted."""
    wait_s: float = 0.0
    """Seconds that the user's function has waited for data."""
    machine: MachineSample = field(default_factory=MachineSample)
    at: float = field(default_factory=time.time)
    queued_chunks: int = 0
    """Chunks that lie at the node and have not been used yet."""
    queued_bytes: int = 0
    feed_wait_s: float = 0.0
    """Seconds in which at least one Spark task could not go on because as much as may waited for this node."""
    rows_per_epoch: int | None = None
    """Rows of this node in its cached feeds, validation too; None before all have ended."""


@dataclass(frozen=True)
class NodeLogged:
    """Lines that a node wrote to stdout or stderr, oldest first; raw, the board cleans them."""

    node: str
    lines: tuple[str, ...]
    """A last one that ends in a carriage return is not finished, e.g. a progress bar: it is shown, and not kept."""
    dropped: int = 0
    """Lines left out before these because there were too many."""
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class MetricsReported:
    """``ctx.report(…)`` or an epoch's end under ``ctx.distribute``."""

    node: str
    values: Mapping[str, float]
    step: int | None = None
    epoch: int | None = None
    """1-based, set when `values` are those of a whole epoch."""
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class RunEnded:
    """The run is over: ``outcome`` is ``done``, ``failed`` or ``stopped``; `message` says why in a line or more."""

    outcome: str
    message: str = ""
    at: float = field(default_factory=time.time)


Event = (
    RunPlanned
    | RunRestarted
    | CheckpointSaved
    | Noticed
    | PhaseChanged
    | NodeChanged
    | NodeBeat
    | NodeLogged
    | MetricsReported
    | RunEnded
)


# --- the board --------------------------------------------------------------------------------------------


class LineStore(Protocol):
    """Where a board puts the lines it takes in, beside the last ones that it keeps: see tfos_magic.logbook."""

    def append(self, node: str, lines: Sequence[str], dropped: int = 0) -> None:
        """Add lines of a node, `dropped` of which were left out before them; called under the board's lock."""

    def read(
        self, node: str, last: int | None = None, pattern: re.Pattern[str] | None = None
    ) -> tuple[list[str], int] | None:
        """Return lines of a node, and how many more it wrote; None when the store is closed."""

    @property
    def paths(self) -> dict[str, Path]:
        """Node → the file of its newest lines."""


@dataclass(frozen=True)
class NodeView:
    """One row of the board."""

    name: str
    state: NodeState = NodeState.PLANNED
    host: str = ""
    detail: str = ""
    rows_received: int = 0
    rows_consumed: int = 0
    rows_per_s: float = 0.0
    """Rows consumed per second over the last few seconds; over the whole running time once the node is done."""
    wait_percent: float | None = None
    """Share of the running time that the function waited for data."""
    machine: MachineSample = field(default_factory=MachineSample)
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None
    epoch: int | None = None
    last_line: str = ""
    memory_peak_bytes: int | None = None
    beat_at: float | None = None
    running_since: float | None = None
    """When the user's function began; None before."""
    ended_at: float | None = None
    rate_history: tuple[float, ...] = ()
    """`rows_per_s` about every second, the last twenty of them."""
    gpu_history: tuple[float, ...] = ()
    """Mean utilisation of the node's GPUs about every second, the last twenty of them."""
    queued_chunks: int = 0
    """Chunks that lie at the node and have not been used yet."""
    queued_bytes: int = 0
    feed_wait_percent: float | None = None
    """Share of the time since the first row came in which the feed had to wait for this node."""
    rows_per_epoch: int | None = None
    fed_since: float | None = None
    """When the first row was seen to be here."""
    point: str = ""
    """What is different on this node, in words."""

    @property
    def role(self) -> str:
        """``chief``, ``worker``, ``ps`` or ``evaluator``."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class BoardView:
    """An immutable picture of a run, ready to be drawn."""

    title: str = ""
    phase: str = ""
    started_at: float = 0.0
    now: float = 0.0
    epochs: int = 1
    epoch: int | None = None
    """Epochs completed; None as long as nothing was reported by epoch."""
    nodes: tuple[NodeView, ...] = ()
    history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Per metric its value after each epoch: the plain mean over the nodes that have reported that epoch, each node
    counted once. Under ``ctx.distribute`` all report the same, which is that of all rows. NaN where an epoch has none.
    """
    trace: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Per metric what ``ctx.report`` gave, as (step, value), thinned: at each report of the first node that reports,
    the mean of what every node had reported last. The steps are that node's, or count its reports."""
    marked_rows: int = 0
    """Rows that all nodes had used when epoch `epoch` ended, as far as their beats had told."""
    marked_step: int | None = None
    """The highest step reported until then."""
    restarts: tuple[RunRestarted, ...] = ()
    """How often, when and why the nodes were started again."""
    notices: tuple[str, ...] = ()
    """What should be known of the run, the latest last."""
    checkpoint: CheckpointSaved | None = None
    """The last one that was saved."""
    outcome: str = ""
    """Empty while the run goes on, then ``done``, ``failed`` or ``stopped``."""
    message: str = ""
    version: int = 0
    """Grows with every event: equal versions, equal pictures (but for `now`)."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return max(0.0, self.now - self.started_at)


class StatusBoard:
    """Fold of a run's events; safe to use from any thread.

    The times of events are those of one clock, the driver's: whoever receives a node's message stamps it.
    Events may come late or twice: counters never go back, a final state stays, the outcome is the first one told.

    Parameters
    ----------
    log_lines_kept : int
        Output lines kept per node; older ones are counted and dropped.
    """

    def __init__(self, log_lines_kept: int = 2000) -> None:
        self._lock = threading.Lock()
        self._view = BoardView()
        self._nodes: dict[str, NodeView] = {}
        self.store: LineStore | None = None
        """Where lines go too when they are cleaned; whoever sets it closes it."""
        self._logs: dict[str, deque[str | int]] = {}  # a number stands for so many lines left out
        self._dropped: dict[str, int] = {}
        self._beats: dict[str, deque[tuple[float, int]]] = {}
        self._sampled_at: dict[str, float] = {}
        self._reporter = ""
        self._reports: dict[str, deque[float]] = {}
        self._latest: dict[str, dict[str, float]] = {}  # metric → node → what it reported last
        self._traces: dict[str, _Trace] = {}
        self._epochs: dict[int, dict[str, _Mean]] = {}  # epoch → metric → over the nodes
        self._indices: dict[str, int] = {}  # of the nodes that have reported epochs
        self._is_history_stale = False
        self._is_independent = False
        self._own_epochs: dict[str, dict[str, dict[int, float]]] = {}  # of independent nodes: node → metric → epoch
        self._own_reports: dict[str, dict[str, deque[float]]] = {}
        self._log_lines_kept = log_lines_kept

    def apply(self, event: Event) -> None:
        """Take one event in."""
        with self._lock:
            self._fold(event)
            self._view = replace(self._view, version=self._view.version + 1)

    def view(self) -> BoardView:
        """Return the run as it stands now."""
        with self._lock:
            now = self._view.now if self._view.outcome else time.time()
            started_at = self._view.started_at or now
            if self._is_history_stale:
                self._view = replace(self._view, history=self._history())
                self._is_history_stale = False
            # A run that was refused before any node had a place has no rows to show.
            is_refused = bool(self._view.outcome) and not any(node.host for node in self._nodes.values())
            nodes = () if is_refused else tuple(self._nodes.values())
            return replace(self._view, nodes=nodes, now=now, started_at=started_at)

    def logs(self, node: str) -> tuple[str, ...]:
        """Return the kept output lines of `node`, oldest first; KeyError if there is no such node."""
        with self._lock:
            return self._kept_lines(node)

    def reports(self) -> dict[str, tuple[float, ...]]:
        """Return per metric what the first node to call ``ctx.report`` has reported, oldest first."""
        with self._lock:
            return {name: tuple(values) for name, values in self._reports.items()}

    def histories(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """Return per independent node its metrics: after each epoch, or as it reported them if it counts no epochs."""
        with self._lock:
            return {name: self._history_of(name) for name in self._nodes} if self._is_independent else {}

    def _history_of(self, node: str) -> dict[str, tuple[float, ...]]:
        epochs = self._own_epochs.get(node)
        if epochs is None:
            return {name: tuple(values) for name, values in self._own_reports.get(node, {}).items()}
        numbers = sorted({number for values in epochs.values() for number in values})
        return {name: tuple(values.get(number, math.nan) for number in numbers) for name, values in epochs.items()}

    def all_logs(self, last: int | None = None) -> dict[str, tuple[str, ...]]:
        """Return the output of every node that wrote any, in node order.

        Parameters
        ----------
        last : int, optional
            No more than so many lines per node, the latest.
        """
        with self._lock:
            return {name: self._kept_lines(name, last) for name in self._nodes if self._logs[name]}

    def _kept_lines(self, node: str, last: int | None = None) -> tuple[str, ...]:
        kept = self._logs[node]
        skipped = max(0, len(kept) - last) if last is not None else 0
        left_out = self._dropped[node] + _count_lines(islice(kept, skipped))
        lines = tuple(left_out_here(line) if isinstance(line, int) else line for line in islice(kept, skipped, None))
        return (left_out_before(left_out), *lines) if left_out else lines

    # The fold. Each method takes one kind of event in; all run under the lock.

    def _fold(self, event: Event) -> None:
        match event:
            case RunPlanned():
                self._plan(event)
            case RunRestarted():
                self._restart(event)
            case Noticed():
                known = [text for text in self._view.notices if text != event.text]
                self._view = replace(self._view, notices=(*known, event.text)[-_NOTICES_KEPT:])
            case CheckpointSaved():
                self._view = replace(self._view, checkpoint=event)
            case PhaseChanged():
                self._view = replace(self._view, phase=self._view.phase if self._view.outcome else event.phase)
            case NodeChanged():
                self._change(event)
            case NodeBeat():
                self._beat(event)
            case NodeLogged():
                self._log(event)
            case MetricsReported():
                self._measure(event)
            case RunEnded():
                self._end(event)

    def _node(self, name: str) -> NodeView:
        """Return the node's row, a new one if it was not known."""
        if name not in self._nodes:
            self._nodes[name] = NodeView(name)
            self._logs[name] = deque(maxlen=self._log_lines_kept)
            self._dropped[name] = 0
            self._beats[name] = deque()
        return self._nodes[name]

    def _plan(self, event: RunPlanned) -> None:
        for name, point in zip(event.nodes, event.points, strict=False):
            self._nodes[name] = replace(self._node(name), point=point)
        planned = {name: self._node(name) for name in event.nodes}
        self._is_independent = event.is_independent
        self._nodes = planned | self._nodes  # nodes heard of before they were planned come last
        self._view = replace(self._view, title=event.title, epochs=event.epochs, started_at=event.at)

    def _restart(self, event: RunRestarted) -> None:
        """Begin anew with all that counts from a node's start; output, history and curves go on."""
        attempt = len(self._view.restarts) + 2
        for name, node in self._nodes.items():
            self._nodes[name] = NodeView(name, point=node.point, last_line=node.last_line)
            self._beats[name].clear()
            self._add_lines(name, [f"─── attempt {attempt}: {event.cause}"], 0)
        self._sampled_at.clear()
        self._view = replace(self._view, restarts=(*self._view.restarts, event), marked_rows=0)

    def _change(self, event: NodeChanged) -> None:
        node = self._node(event.node)
        if node.state.is_final:
            return
        started = node.running_since
        if started is None and event.state in (NodeState.RUNNING, NodeState.WAITING):
            started = event.at
        self._nodes[node.name] = replace(
            node, state=event.state, host=event.host or node.host, detail=event.detail, running_since=started
        )
        if event.state.is_final:
            self._settle(node.name, event.at)

    def _settle(self, name: str, at: float) -> None:
        """Give a node that has ended its final figures."""
        node = self._nodes[name]
        seconds = at - node.running_since if node.running_since is not None else 0.0
        rate = node.rows_consumed / seconds if seconds > 0 else 0.0
        self._nodes[name] = replace(node, ended_at=at, rows_per_s=rate)

    def _beat(self, event: NodeBeat) -> None:
        node = self._node(event.node)
        node = replace(
            node,
            rows_received=max(node.rows_received, event.rows_received),
            rows_consumed=max(node.rows_consumed, event.rows_consumed),
            beat_at=max(node.beat_at or event.at, event.at),
            rows_per_epoch=node.rows_per_epoch if event.rows_per_epoch is None else event.rows_per_epoch,
            fed_since=event.at if node.fed_since is None and event.rows_received else node.fed_since,
        )
        self._nodes[node.name] = node
        if node.state.is_final:  # the last beat may come after the state: its counters count, the rest is past
            self._settle(node.name, node.ended_at or event.at)
            return
        peak = max(node.memory_peak_bytes or 0, event.machine.memory_bytes or 0) or None
        node = replace(
            node,
            machine=event.machine,
            memory_peak_bytes=peak,
            rows_per_s=self._rate(node, event.at),
            wait_percent=_share(event.wait_s, node.running_since, event.at, node.wait_percent),
            queued_chunks=event.queued_chunks,
            queued_bytes=event.queued_bytes,
            feed_wait_percent=_share(event.feed_wait_s, node.fed_since, event.at, node.feed_wait_percent),
        )
        self._nodes[node.name] = self._sampled(node, event.at)

    def _sampled(self, node: NodeView, at: float) -> NodeView:
        """Return the node with its small lines continued, if it is time."""
        if at - self._sampled_at.get(node.name, -math.inf) < _SAMPLE_EVERY_S:
            return node
        self._sampled_at[node.name] = at
        rates, loads = node.rate_history, node.gpu_history
        if node.running_since is not None and len(self._beats[node.name]) > 1:
            rates = (*rates, node.rows_per_s)[-_SAMPLES_KEPT:]
        load = node.machine.gpu_percent
        if load is not None:
            loads = (*loads, load)[-_SAMPLES_KEPT:]
        return replace(node, rate_history=rates, gpu_history=loads)

    def _rate(self, node: NodeView, at: float) -> float:
        """Return rows/s over the window that ends at `at`."""
        beats = self._beats[node.name]
        if not beats or at > beats[-1][0]:
            beats.append((at, node.rows_consumed))
        while len(beats) > 2 and beats[1][0] <= at - _WINDOW_S:
            beats.popleft()
        (first_at, first_rows), (last_at, last_rows) = beats[0], beats[-1]
        return (last_rows - first_rows) / (last_at - first_at) if last_at > first_at else 0.0

    def _log(self, event: NodeLogged) -> None:
        node = self._node(event.node)
        lines = [clean_line(line) for line in event.lines]
        last = next((line for line in reversed(lines) if line.strip()), node.last_line)
        self._nodes[node.name] = replace(node, last_line=last.strip())
        if event.lines and event.lines[-1].endswith("\r"):
            lines.pop()
        self._add_lines(node.name, lines, event.dropped)

    def _add_lines(self, name: str, lines: Sequence[str], dropped: int) -> None:
        self._keep_lines(name, lines, dropped)
        if self.store is not None:
            self.store.append(name, lines, dropped)

    def _keep_lines(self, name: str, lines: Sequence[str], dropped: int) -> None:
        kept = self._logs[name]
        new: list[str | int] = [dropped, *lines] if dropped else [*lines]
        overflow = max(0, len(kept) + len(new) - self._log_lines_kept)
        self._dropped[name] += _count_lines(islice(chain(kept, new), overflow))
        kept.extend(new)
        while kept and isinstance(kept[0], int):  # nothing is left before these lines: they are earlier ones
            self._dropped[name] += _count_lines([kept.popleft()])

    def _measure(self, event: MetricsReported) -> None:
        node = self._node(event.node)
        self._nodes[node.name] = replace(
            node,
            metrics={**node.metrics, **event.values},
            step=node.step if event.step is None else event.step,
            epoch=max(node.epoch or 0, event.epoch or 0) or None,
        )
        if self._is_independent:
            self._measure_alone(event)
        elif event.epoch is not None:
            self._measure_epoch(event, event.epoch)
        else:
            self._measure_report(event)

    def _measure_alone(self, event: MetricsReported) -> None:
        for name, value in event.values.items():
            if event.epoch is not None:
                self._own_epochs.setdefault(event.node, {}).setdefault(name, {})[event.epoch] = value
            else:
                kept = deque[float](maxlen=max(100, _REPORTS_KEPT // len(self._nodes)))
                self._own_reports.setdefault(event.node, {}).setdefault(name, kept).append(value)

    def _measure_report(self, event: MetricsReported) -> None:
        self._reporter = self._reporter or event.node
        for name, value in event.values.items():
            self._latest.setdefault(name, {})[event.node] = value
        if event.node != self._reporter:
            return
        for name, value in event.values.items():
            self._reports.setdefault(name, deque(maxlen=_REPORTS_KEPT)).append(value)
        if not self._view.outcome:
            self._trace(event)

    def _trace(self, event: MetricsReported) -> None:
        for name in event.values:
            trace = self._traces.setdefault(name, _Trace())
            trace.add(trace.reports + 1 if event.step is None else event.step, _mean(self._latest[name].values()))
        self._view = replace(self._view, trace={name: trace.points for name, trace in self._traces.items()})

    def _measure_epoch(self, event: MetricsReported, epoch: int) -> None:
        means = self._epochs.setdefault(epoch, {})
        index = self._indices.setdefault(event.node, len(self._indices))
        for name, value in event.values.items():
            means.setdefault(name, _Mean()).add(index, value)
        self._is_history_stale = True
        if epoch > (self._view.epoch or 0):
            rows = sum(node.rows_consumed for node in self._nodes.values())
            steps = [node.step for node in self._nodes.values() if node.step is not None]
            self._view = replace(self._view, epoch=epoch, marked_rows=rows, marked_step=max(steps, default=None))

    def _history(self) -> dict[str, tuple[float, ...]]:
        epochs = [self._epochs[number] for number in sorted(self._epochs)]
        names = {name: None for means in epochs for name in means}
        return {name: tuple(means[name].value if name in means else math.nan for means in epochs) for name in names}

    def _end(self, event: RunEnded) -> None:
        if self._view.outcome:
            return
        self._view = replace(self._view, outcome=event.outcome, message=event.message, now=event.at)
        rest = NodeState.DONE if event.outcome == "done" else NodeState.STOPPED
        for name, node in list(self._nodes.items()):
            if not node.state.is_final:
                self._nodes[name] = replace(node, state=rest)
                self._settle(name, event.at)


class _Trace:
    """A line that grows: past a bound every second point goes, and from then on so many fewer are kept."""

    def __init__(self) -> None:
        self.reports = 0
        self._kept: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None
        self._stride = 1

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """What is kept, and the latest point."""
        last = () if self._last is None or self._last in self._kept[-1:] else (self._last,)
        return (*self._kept, *last)

    def add(self, step: float, value: float) -> None:
        """Take one more point in; one that goes back begins the line anew."""
        if self._last is not None and step < self._last[0]:
            self._kept, self._stride, self.reports = [], 1, 0
        self._last = (step, value)
        if self.reports % self._stride == 0:
            self._kept.append(self._last)
        self.reports += 1
        if len(self._kept) > _TRACE_POINTS:
            self._kept = self._kept[::2]
            self._stride *= 2


class _Mean:
    """The mean of one metric over the nodes, each with what it told last.

    One more node costs no look at the others, and eight bytes: there are as many of these as epochs and metrics.
    """

    def __init__(self) -> None:
        self.value = math.nan
        self._told = array("d")
        self._has_told = bytearray()
        self._count = 0
        self._total = 0.0
        self._are_equal = True

    def add(self, index: int, value: float) -> None:
        """Take in what the node with this index tells."""
        more = index + 1 - len(self._told)
        if more > 0:
            self._told.extend([0.0] * more)
            self._has_told.extend(bytes(more))
        is_new = not self._has_told[index]
        self._told[index], self._has_told[index] = value, 1
        if is_new:
            self._are_equal &= not self._count or value == self.value
            self._count += 1
            self._total += value
            self.value = value if self._are_equal else self._total / self._count
        else:
            told = [each for each, has_told in zip(self._told, self._has_told, strict=True) if has_told]
            self.value, self._total, self._are_equal = _mean(told), sum(told), len({*told}) == 1


def _mean(values: Iterable[float]) -> float:
    """Return the plain mean, exactly the value where all are the same; NaN of nothing."""
    known = list(values)
    if len(set(known)) <= 1:
        return known[0] if known else math.nan
    return sum(known) / len(known)


def _count_lines(kept: Iterable[str | int]) -> int:
    """Return for how many lines entries of a log stand."""
    return sum(entry if isinstance(entry, int) else 1 for entry in kept)


def left_out_before(count: int) -> str:
    """Return the first line of a log of which `count` lines are missing before it."""
    return f"… {count:,} earlier lines left out"


def left_out_here(count: int) -> str:
    """Return the line that stands in a log in place of `count` others."""
    return f"… {count:,} lines left out here"


def _share(wait_s: float, since: float | None, now: float, known: float | None) -> float | None:
    """Return `wait_s` in percent of the time since `since`, or what was `known` when there is no such time."""
    if since is None or now <= since or not math.isfinite(wait_s):
        return known
    return min(100.0, max(0.0, 100.0 * wait_s / (now - since)))


# Colours, cursor movements, window titles, in their 7-bit forms (ECMA-48).
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_]|[ -/]+[0-~])")
_REWRITE = re.compile("\r|\b{2,}")  # Keras goes back by backspaces, the others by carriage return
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean_line(line: str) -> str:
    """Return `line` as it would stand on a terminal at its end, without escapes, at most 2,000 characters.

    Of text overwritten by carriage returns (progress bars) the last part stays.
    """
    if line.isprintable() and len(line) <= _LINE_CHARS_KEPT:  # nearly all
        return line
    parts = _REWRITE.split(_ESCAPE.sub("", line))
    text = next((part for part in reversed(parts) if part.strip()), "").rstrip("\n")
    text = _CONTROL.sub("", text.expandtabs().replace("\n", " "))
    text = text.encode("utf-8", "replace").decode()  # lone surrogates cannot travel
    return text if len(text) <= _LINE_CHARS_KEPT else text[: _LINE_CHARS_KEPT - 1] + "…"
