"""TensorFlowOnSpark 2.2.5 itself against this package: rows per second, start and stop, memory, in one run.

    python tests/benchmarks/tensorflowonspark.py [--rounds 3] [--quick] [--oldest] [--only wide --only start]

Both sides have a standalone cluster of one-core executors, because TensorFlowOnSpark needs one, and run the same map
function (``tfos_side.py``): theirs in an environment made for it (``.venv-tensorflowonspark``: Python 3.10,
PySpark 3.5, TensorFlow 2.15), ours in this Python's, or with ``--oldest`` in ``.venv-oldest``, which has the same
PySpark as theirs. The two take turns case by case; every round has new clusters; ratios are taken round by round.

What is timed:

- Rows are cached in the executors beforehand, in the partitions that suit a side best. Theirs: one for each node,
  because TensorFlowOnSpark looks only once a second whether a partition has been read. Ours: several, because a node
  reads a partition when all of it is there. How many rows is chosen for each side to last some seconds.
- Theirs: the better of rows / (time of the ``train`` call) and of the rows after the first batch / (time from the first
  node's first to the last node's last batch). Ours: rows / (time from the call until it has returned and all is read).
- TensorFlowOnSpark imports TensorFlow in Spark's Python worker, which Spark keeps; so its second start is shown too.

While it runs TensorFlowOnSpark listens on all of this machine's addresses, and trusts whoever connects.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "demo_notebooks"))

from benchmarks.memory import MemoryWatch, Usage
from benchmarks.standalone import Installation, Side, SideError
from benchmarks.tables import median, print_machine, print_table, spread
from environment import ROOT, Environment, SetupError, find_python, say

SIDE_SCRIPT = Path(__file__).resolve().with_name("tfos_side.py")
THEIRS, OURS = "tensorflowonspark", "tfos_magic"
LOCK = ROOT / "tests" / "environments" / "tensorflowonspark.lock"
SHAPES = {"narrow": "4 floats + label", "wide": "784 floats + label"}
SHAPE_BYTES = {"narrow": 20, "wide": 784 * 4 + 4}
MIB = 2**20
Table = list[tuple[str, ...]]

# Rows of a measurement: some five to ten seconds of theirs; ours get more, or they would be over before they began.
THEIR_ROWS = {"narrow": 40_000, "wide": 12_000}
OUR_ROWS = {
    ("narrow", "rdd"): 2_000_000,
    ("narrow", "frame"): 16_000_000,
    ("wide", "rdd"): 40_000,
    ("wide", "frame"): 200_000,
}
PARTITIONS = {THEIRS: 1, OURS: 8}  # for each node
QUICK = 4  # how many times fewer
MEMORY_ROWS = 5_000  # wide ones, 15 MiB as Arrow: a hundred times that is far beyond what a node may keep
MEMORY_FACTORS = {THEIRS: (1, 10), OURS: (1, 10, 100)}
PAUSES, PAUSE_S = 5, 2.0


@dataclass(frozen=True)
class Case:
    """One way to bring rows to a function.

    Attributes
    ----------
    shape : str
        Of a row: ``narrow``, ``wide``.
    call : str
        ``train``, ``inference``.
    form : str
        Of a batch: ``tuples``, or ``arrays`` by ``input_mapping``.
    """

    shape: str
    call: str
    form: str

    def __str__(self) -> str:
        return f"{SHAPES[self.shape]}, {self.call}, {self.form}"


CASES = [
    Case(shape, call, form) for shape in SHAPES for call in ("train", "inference") for form in ("tuples", "arrays")
]


@dataclass
class Figures:
    """What was measured, by name; a name has one figure for each round in which it could be measured."""

    values: dict[tuple[str, ...], dict[int, float]] = field(default_factory=dict)

    def add(self, round_number: int, value: float, *name: str) -> None:
        """Note a figure."""
        self.values.setdefault(name, {})[round_number] = value

    def text(self, *name: str, digits: int = 0) -> str:
        """Return the median, or a dash."""
        values = self.values.get(name)
        return f"{median(list(values.values())):,.{digits}f}" if values else "-"

    def ratio(self, upper: Sequence[str], lower: Sequence[str]) -> str:
        """Return median and spread of the ratios of each round, or a dash."""
        above, below = self.values.get(tuple(upper), {}), self.values.get(tuple(lower), {})
        ratios = [above[number] / below[number] for number in sorted(above.keys() & below.keys())]
        return f"{median(ratios):,.3g} ({spread(ratios)})" if ratios else "-"


# --- pure -----------------------------------------------------------------------------------------------------


def whole_batches(rows: int, nodes: int, batch_size: int) -> int:
    """Return about `rows`, such that every node gets whole batches: TensorFlowOnSpark keeps back a short last one."""
    return max(1, round(rows / nodes / batch_size)) * nodes * batch_size


def our_rate(reply: Mapping[str, Any]) -> float:
    """Return rows per second from the call until it has returned and all nodes have read their last batch."""
    times, nodes = reply["times"], reply["nodes"]
    ended = max(times["called"], *(node["last"] for node in nodes))
    return float(sum(node["rows"] for node in nodes) / (ended - times["call"]))


def their_rate(reply: Mapping[str, Any]) -> float:
    """Return the better of the rate of the call and the rate between the first and the last batch."""
    times, nodes = reply["times"], reply["nodes"]
    rows, first_rows = sum(node["rows"] for node in nodes), sum(node["first_rows"] for node in nodes)
    reading = max(node["last"] for node in nodes) - min(node["first"] for node in nodes)
    within = (rows - first_rows) / reading if reading > 0 else 0.0
    return float(max(rows / (times["called"] - times["call"]), within))


def phases(reply: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of starting and stopping."""
    times, nodes = reply["times"], reply["nodes"]
    return {
        "`run` until it returns": times["returned"] - times["asked"],
        "`run` to the first line of the function on all nodes": max(n["began"] for n in nodes) - times["asked"],
        "`run` to TensorFlow imported in the function on all nodes": max(n["ready"] for n in nodes) - times["asked"],
        "`shutdown`": times["shut"] - times["called"],
    }


def mib(size: float) -> str:
    """Return a size in MiB."""
    return f"{size / MIB:,.0f}"


def memory(before: Usage, peak: Usage) -> list[str]:
    """Return each figure as ``before → peak``."""
    pairs = zip(astuple(before), astuple(peak), strict=True)
    return [f"{mib(low)} → {mib(high)}" for low, high in pairs]


# --- measuring ------------------------------------------------------------------------------------------------


class Bench:
    """Measures case by case, side by side.

    Parameters
    ----------
    installations : mapping of str to Installation
        The sides to measure.
    options : argparse.Namespace
    """

    def __init__(self, installations: Mapping[str, Installation], options: argparse.Namespace) -> None:
        self.figures = Figures()
        self.memory: Table = []
        self.failures: list[str] = []
        self._installations = installations
        self._options = options
        self._sides: dict[str, tuple[Side, ExitStack]] = {}
        self._nodes = options.nodes

    @contextmanager
    def clusters(self, nodes: int) -> Iterator[None]:
        """Have new clusters; they are started when they are first asked."""
        self._nodes = nodes
        try:
            yield
        finally:
            for package in list(self._sides):
                self._drop(package)

    def round(self, number: int) -> None:
        """Measure everything but memory once."""
        for package in self._installations:
            self._start_and_stop(number, package)
        for case in CASES:
            if self._is_wanted(case.shape, case.call, case.form):
                for package in self._installations:
                    self._stream(number, package, case)
        for shape in SHAPES:
            if OURS in self._installations and self._is_wanted(shape, "data"):
                self._data(number, shape)

    def watch_memory(self) -> None:
        """Measure memory: one node, so that all processes of a role belong to it."""
        if not self._is_wanted("memory"):
            return
        for package in self._installations:
            source = "frame" if package == OURS else "rdd"
            for factor in MEMORY_FACTORS[package][: 2 if self._options.quick else None]:
                self._watch(package, source, factor)

    def _start_and_stop(self, number: int, package: str) -> None:
        if not self._is_wanted("start"):
            return
        nothing = {"shape": "narrow", "form": "tuples", "source": "rdd", "rows": 0, "call": "train"}
        for when in ("first", "again"):
            reply = self._ask(package, f"start ({when})", {"do": "stream", **nothing, "tensorflow": True})
            for phase, seconds in phases(reply).items() if reply else ():
                self.figures.add(number, seconds, "start", phase, when, package)

    def _stream(self, number: int, package: str, case: Case) -> None:
        for source in ("rdd", "frame") if package == OURS else ("rdd",):
            rows = self._rows(OUR_ROWS[case.shape, source] if package == OURS else THEIR_ROWS[case.shape])
            request = {"do": "stream", "shape": case.shape, "call": case.call, "form": case.form, "source": source}
            reply = self._ask(package, f"{case}, {source}", {**request, "rows": rows})
            if reply:
                rate = our_rate(reply) if package == OURS else their_rate(reply)
                say(f"    {rate:,.0f} rows/s")
                self.figures.add(number, rate, "stream", str(case), package, source)

    def _data(self, number: int, shape: str) -> None:
        rows = self._rows(OUR_ROWS[shape, "frame"])
        for what in ("drop", "dataset"):
            reply = self._ask(OURS, f"{SHAPES[shape]}, {what}", {"do": what, "shape": shape, "rows": rows})
            if reply:
                say(f"    {rows / reply['seconds']:,.0f} rows/s")
                self.figures.add(number, rows / reply["seconds"], what, shape)

    def _watch(self, package: str, source: str, factor: int) -> None:
        rows = whole_batches(MEMORY_ROWS * factor, 1, self._options.batch_size)
        request = {"do": "stream", "shape": "wide", "call": "train", "form": "arrays", "source": source, "rows": rows}
        with ExitStack() as stack:
            watches: list[MemoryWatch] = []

            def begin(event: str) -> None:
                side = self._sides[package][0]
                watches.append(stack.enter_context(MemoryWatch(side.processes, side.driver_pid)))
                watches[-1].begin()

            wishes = {"tensorflow": True, "pauses": PAUSES, "pause_s": PAUSE_S}
            reply = self._ask(package, f"memory, {factor} × {MEMORY_ROWS} wide rows", {**request, **wishes}, begin)
        if reply and watches:
            before, peaks = watches[-1].before, watches[-1].peaks
            size = f"{factor} × {mib(MEMORY_ROWS * SHAPE_BYTES['wide'])}"
            columns = [text for role in ("node", "feeder") for text in memory(before[role], peaks[role])]
            self.memory.append((package, size, f"{our_rate(reply):,.0f}", *columns))

    def _rows(self, rows: int) -> int:
        return whole_batches(rows // (QUICK if self._options.quick else 1), self._nodes, self._options.batch_size)

    def _is_wanted(self, *words: str) -> bool:
        return not self._options.only or bool(set(words) & set(self._options.only))

    def _ask(
        self, package: str, what: str, request: dict[str, Any], on_event: Callable[[str], None] | None = None
    ) -> dict[str, Any] | None:
        """Return the side's reply; None if it failed, and then it gets a new cluster for what comes next."""
        say(f"{package}: {what}")
        request = {"partitions": self._options.partitions or PARTITIONS[package], **request}
        if request["do"] != "drop":
            request = {"batch_size": self._options.batch_size, **request}
        try:
            return self._side(package).ask(request, on_event)
        except SideError as error:
            say(f"    failed:\n{error}")
            self.failures.append(f"{package}: {what}: {str(error).splitlines()[-1]}")
            self._drop(package)
            return None

    def _side(self, package: str) -> Side:
        if package not in self._sides:
            with ExitStack() as stack:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tfos-benchmark-")))
                command = [str(SIDE_SCRIPT), "--package", package]
                side = stack.enter_context(Side(self._installations[package], command, self._nodes, directory))
                self._sides[package] = side, stack.pop_all()
        return self._sides[package][0]

    def _drop(self, package: str) -> None:
        if package in self._sides:
            self._sides.pop(package)[1].close()


# --- the report -----------------------------------------------------------------------------------------------


def report(bench: Bench, nodes: int, batch_size: int) -> None:
    """Print all tables that have something in them."""
    figures = bench.figures
    measured = {name[0] for name in figures.values}
    if "stream" in measured:
        print_table(f"`next_batch({batch_size})`, {nodes} nodes together, rows/s", stream_table(figures))
    if measured & {"drop", "dataset"}:
        print_table(f"The same rows through bare `mapInArrow`, {nodes} tasks, rows/s", data_table(figures))
    if "start" in measured:
        print_table(f"Start and stop of {nodes} nodes, s", start_table(figures))
    if bench.memory:
        figure_names = [f"{role} {name}" for role in ("node", "feeder") for name in ("RssAnon", "Pss", "files")]
        header = ("side", "data", "rows/s", *figure_names)
        print_table("Memory of one node, before the rows come → peak, MiB", [header, *bench.memory])
        print(f"\nWide rows; the function stops {PAUSES} times for {PAUSE_S:g} s, and rows/s count that time too.")
    for failure in bench.failures:
        print(f"\nFAILED {failure}")


def stream_table(figures: Figures) -> Table:
    """Return rows per second of both sides."""
    table: Table = [
        ("rows", "call", "batch", THEIRS, "ours, RDD", "ratio (min-max)", "ours, DataFrame", "ratio (min-max)")
    ]
    for case in CASES:
        name = "stream", str(case)
        theirs, rdd, frame = (*name, THEIRS, "rdd"), (*name, OURS, "rdd"), (*name, OURS, "frame")
        ours = [text for side in (rdd, frame) for text in (figures.text(*side), figures.ratio(side, theirs))]
        if {theirs, rdd, frame} & figures.values.keys():
            table.append((SHAPES[case.shape], case.call, case.form, figures.text(*theirs), *ours))
    return table


def data_table(figures: Figures) -> Table:
    """Return our rates as a share of what Spark does when nobody looks at the rows."""
    table: Table = [("rows", "mapInArrow", "ctx.dataset", "ratio (min-max)", "train, arrays", "ratio (min-max)")]
    for shape, words in SHAPES.items():
        drop = "drop", shape
        ways = [("dataset", shape), ("stream", str(Case(shape, "train", "arrays")), OURS, "frame")]
        columns = [text for way in ways for text in (figures.text(*way), figures.ratio(way, drop))]
        table.append((words, figures.text(*drop), *columns))
    return table


def start_table(figures: Figures) -> Table:
    """Return the seconds of each phase, on new Python workers and on those that have run a cluster before."""
    table: Table = [("", "run", THEIRS, OURS, "ours / theirs (min-max)")]
    for phase, when in dict.fromkeys(name[1:3] for name in figures.values if name[0] == "start"):
        theirs, ours = ("start", phase, when, THEIRS), ("start", phase, when, OURS)
        texts = figures.text(*theirs, digits=2), figures.text(*ours, digits=2)
        table.append((phase, when, *texts, figures.ratio(ours, theirs)))
    return table


def install(package: str, *, oldest: bool) -> Installation:
    """Return the environment of a side; theirs is made if it is missing."""
    if package == OURS:
        executable = ROOT / ".venv-oldest" / "bin" / "python" if oldest else Path(sys.executable)
        if not executable.exists():
            raise SetupError(f"{executable} is missing: python3 tests/run.py -m oldest makes it.")
        return Installation.inspect(executable, ["tensorflow", "pyarrow"])
    base = find_python([10])
    if base is None:
        raise SetupError("TensorFlowOnSpark's TensorFlow needs Python 3.10, and there is none on PATH or in pyenv.")
    environment = Environment(ROOT / f".venv-{THEIRS}", base)
    environment.install_list(LOCK)
    return Installation.inspect(environment.python, ["tensorflow", THEIRS])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--partitions", type=int, help="for each node; default: " + str(PARTITIONS))
    parser.add_argument("--quick", action="store_true", help=f"one round, {QUICK} times fewer rows")
    parser.add_argument("--oldest", action="store_true", help="our side with .venv-oldest: the same PySpark as theirs")
    parser.add_argument("--side", choices=(THEIRS, OURS), help="measure one side only")
    words = ["start", "data", "memory", *SHAPES, "train", "inference", "tuples", "arrays"]
    parser.add_argument("--only", action="append", choices=words, help="what bears one of these words")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main() -> None:
    """Measure and print the tables."""
    options = parse()
    sides = [options.side] if options.side else [THEIRS, OURS]
    try:
        installations = {side: install(side, oldest=options.oldest) for side in sides}
    except SetupError as error:
        sys.exit(str(error))
    bench = Bench(installations, options)
    for number in range(options.rounds):
        with bench.clusters(options.nodes):
            bench.round(number)
    with bench.clusters(1):
        bench.watch_memory()
    print()
    print_machine()
    for side, installation in installations.items():
        print(f"{side}: {installation}")
    report(bench, options.nodes, options.batch_size)
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
