"""Who finds out why an object does not travel: our doctor, Ray's ``inspect_serializability``, ``dill.detect``.

    python tests/benchmarks/doctor.py [--details] [--tool ray] [--only "lock deep in a dict"]

All are shown the objects of ``tests/doctor_corpus.py``, one after the other, in one environment that is made for it
(``.venv-pickling``) and beside a real local Spark; each tool has a process of its own. The corpus is what our doctor is
tested with: that it knows these objects is no surprise, and says nothing of objects that nobody has thought of.

Ray and dill answer the question whether an object pickles, Ray with its copy of cloudpickle, dill with its own pickler;
neither claims to know what Spark's pickler does, nor what is silently wrong afterwards. dill pickles some objects that
Spark's does not, locks and open files among them: there it is right by its own standard, and Spark's job fails all the
same. Two healthy objects, a broadcast and a UDF that was used, travel only because Spark knows them: an alarm at these
is false in Spark, and right elsewhere. dill takes part twice: with its defaults, by which a notebook's function travels
without the globals that it uses, and with ``recurse=True``, by which it takes them along, as with Spark's pickler.

What is counted:

recognised
    Ours: a finding other than "fine". Ray: not serializable. dill: ``detect.errors`` has one, or ``dill.check``, its
    trip to a second Python, fails. (``dill.pickles`` is not asked: it also compares, and cannot compare arrays.)
    A healthy object that is recognised is a false alarm.
right cause
    Ours: exactly one finding, with the verdict and the trap that the corpus demands, as our tests demand it. The others
    know no traps. It is enough that they point at the culprit, the thing at the end of the corpus's path, or at
    something within it, however many other things they point at, too; or that the text of their error has its name,
    its type's or module's, or that of the type of something within it.
right path
    Ours: the corpus's path, word for word. The others: the names of a chain that they report are those of the
    corpus's path, or begin with them; or the chain ends at the culprit, by whatever names or none. Where the culprit
    is the object itself, the cause is enough.

Ray's chains are those of its failures and of its printed report, with its default depth (a deeper one finds no more
here). dill reports chains by ``badobjects`` and items by ``baditems``. It leaves to its user where to begin; so both
are asked about the object, and also about each variable of ``freevars`` and ``globalvars`` that has an error of its
own. ``detect.trace`` lists all that is pickled and points at nothing.

Seconds are those of the answer whether there is a problem. Ours and Ray's answers have everything; dill's search for
the culprit is not timed. Our second interpreter is started before, once, as a notebook's is; TensorFlow's import there
is in our longest answer, as it is in dill's.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "demo_notebooks"))

import psutil
from benchmarks.standalone import Installation, SideError
from benchmarks.tables import local_spark, median, print_machine, print_table
from doctor_corpus import BREAKS, BROKEN, CORPUS, COSTLY, FINE, WRONG, Entry, Made
from environment import ROOT, Environment, SetupError, find_python, say

from tfos_magic.doctor import Doctor, SecondInterpreter, Verdict
from tfos_magic.java import ensure_java

LOCK = ROOT / "tests" / "environments" / "pickling.lock"
START_TIMEOUT_S = 120
SILENCE_S = 60  # for one object
END_TIMEOUT_S = 20
DEPTHS = (1, 2)  # of badobjects; beyond the first step no path of the corpus has more attributes
WORDS = 300  # characters that are kept of what a tool said
Chain = tuple[tuple[str, ...], Any]
"""The names on the way, without the object's own, and what is there."""


@dataclass(frozen=True)
class Said:
    """What a tool said of one object.

    Attributes
    ----------
    seen, cause, path : bool
        Recognised, with the right cause, with the right path.
    seconds : float
    words : str
        Its own.
    trouble : str
        Where it raised, died or did not end.
    """

    seen: bool = False
    cause: bool = False
    path: bool = False
    seconds: float = 0.0
    words: str = ""
    trouble: str = ""


# --- what is to be found ----------------------------------------------------------------------------------------


class Culprit:
    """The thing at the end of an entry's path.

    Parameters
    ----------
    entry : Entry
    value : object
        The one that is asked about.
    """

    def __init__(self, entry: Entry, value: Any) -> None:
        names = []
        for step in entry.path.split(" → ")[1:]:
            value, name = follow(value, step)
            names.append(name)
        self.value = value
        self.names = tuple(names)
        self._words = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in _words(value, names)))

    def judge(self, said: Said, chains: Iterable[Chain], text: str) -> Said:
        """Return what is said with what it is worth.

        Parameters
        ----------
        said : Said
        chains : iterable of Chain
        text : str
            Of the errors.
        """
        leads = any(self._is_at_end_of(chain) for chain in chains)
        cause = said.cause or leads or bool(self._words.search(text))
        return replace(said, cause=cause, path=said.path or leads or (cause and not self.names))

    def _is_at_end_of(self, chain: Chain) -> bool:
        names, value = chain
        if not self.names:
            return value is self.value
        return names[: len(self.names)] == self.names or (bool(names) and value is self.value)


def follow(value: Any, step: str) -> tuple[Any, str]:
    """Return what a step of a path leads to, and the step's name as other tools would have it."""
    kind, _, name = step.partition(" ")
    match kind:
        case "closure":
            function = inspect.unwrap(value)
            return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))[name].cell_contents, name
        case "global":
            return inspect.unwrap(value).__globals__[name], name  # unwrapped, because Spark wraps a UDF's function
        case "attribute":
            return getattr(value, name), name
        case "key":
            key = ast.literal_eval(name)
            return value[key], str(key)
        case "item":
            return value[int(name)], name
        case "self":
            return value.__self__, "__self__"
        case "layer":
            return value.get_layer(name), name
        case "class":
            return type(value), "__class__"
        case "loss":
            return value.loss, "loss"
        case "function":
            return value, "__call__"
        case "value,":  # a broadcast's value and its class
            return type(value.value), "value"
    raise ValueError(f"The corpus has a step that this benchmark does not know: {step!r}.")


def _words(value: Any, names: Sequence[str]) -> set[str]:
    """Return the names by which an error may speak of `value`."""
    types_within = {type(each) for each in _within(value, 3)} - _PLAIN
    own = {getattr(value, "__name__", ""), *(name for name in names[-1:] if not name.isdigit())}
    module = getattr(value, "__module__", "")
    return {*(each.__name__ for each in types_within), *own, module} - {"", "__main__", "builtins", None}


_PLAIN = {
    *(object, type, type(None), bool, int, float, str, bytes, list, tuple, dict, set, frozenset),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType),
}


def _within(value: Any, depth: int) -> Iterator[Any]:
    """Yield an object and what it holds; of a long list only the beginning."""
    yield value
    if depth and not isinstance(value, (type, types.ModuleType)):
        held = value if isinstance(value, (list, tuple)) else getattr(value, "__dict__", value)
        values = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
        for _, each in zip(range(100), values, strict=False):
            yield from _within(each, depth - 1)


# --- the tools --------------------------------------------------------------------------------------------------


class Tool(Protocol):
    """One that is asked; entered before the first object."""

    def __enter__(self) -> Tool: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def answer(self, entry: Entry, made: Made, culprit: Culprit | None) -> Iterator[Said]:
        """Yield what it says, and again when there is more; no culprit in healthy objects."""
        ...


class Ours:
    """``tfos_magic.doctor``, with one second interpreter for all objects."""

    def __enter__(self) -> Ours:
        self._interpreter = SecondInterpreter()
        self._interpreter.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._interpreter.close()

    def answer(self, entry: Entry, made: Made, culprit: Culprit | None) -> Iterator[Said]:
        doctor = Doctor(made.namespace, self._interpreter)
        began = time.perf_counter()
        diagnosis = doctor.examine(made.value, entry.asked)
        seconds = time.perf_counter() - began
        bad = [finding for finding in diagnosis.findings if finding.verdict is not Verdict.FINE]
        told = [(finding.verdict.word, finding.trap, finding.words) for finding in bad]
        yield Said(
            seen=bool(told),
            cause=[(verdict, trap) for verdict, trap, _ in told] == [(entry.verdict, entry.trap)],
            path=told == [(entry.verdict, entry.trap, entry.path)],
            seconds=seconds,
            words=shortened(told),
        )


class Ray:
    """``ray.util.inspect_serializability``; it needs no Ray that runs, and starts none."""

    def __enter__(self) -> Ray:
        from ray.util import inspect_serializability  # type: ignore[import-not-found]

        self._inspect = inspect_serializability
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def answer(self, entry: Entry, made: Made, culprit: Culprit | None) -> Iterator[Said]:
        report, failures, trouble = io.StringIO(), set(), ""
        began = time.perf_counter()
        try:
            _, failures = self._inspect(made.value, name=entry.asked, print_file=report)
        except Exception as error:  # of a property that it reads, after it has printed what it knows
            trouble = f"raised {type(error).__name__}"
        seconds = time.perf_counter() - began
        printed = report.getvalue()
        errors = re.findall(r"!!! FAIL.*", printed)
        reported = [(failure.path[1:], failure.obj) for failure in failures]
        words = shortened([list(names) for names, _ in reported], errors)
        said = Said(seen=bool(errors), seconds=seconds, words=words, trouble=trouble)
        chains = [*reported, *printed_chains(printed)]
        yield culprit.judge(said, chains, "\n".join(errors)) if culprit and said.seen else said


def printed_chains(report: str) -> Iterator[Chain]:
    """Yield the chain to each thing that fails by Ray's report, which is indented by four for each step."""
    names: list[str] = []
    is_new = False
    for line in re.finditer(r"^(?P<indent> *)Serializing '(?P<name>[^']*)'|!!! FAIL", report, re.MULTILINE):
        if line["name"] is not None:
            names[len(line["indent"]) // 4 - 1 :] = [line["name"]]
            is_new = True
        elif is_new:
            yield tuple(names), None
            is_new = False


class Dill:
    """dill's own ways to find out.

    Parameters
    ----------
    recurse : bool
        dill's setting of that name.
    """

    def __init__(self, recurse: bool) -> None:
        self._recurse = recurse

    def __enter__(self) -> Dill:
        import dill  # type: ignore[import-not-found]
        import dill.detect  # type: ignore[import-not-found]

        dill.settings["recurse"] = self._recurse
        self._dill = dill
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def answer(self, entry: Entry, made: Made, culprit: Culprit | None) -> Iterator[Said]:
        self._dill._dill._main_module = sys.modules["__main__"]  # the notebook; dill has kept what was there before
        began = time.perf_counter()
        complaints = self._complaints(made.value)
        said = Said(bool(complaints), seconds=time.perf_counter() - began, words=shortened(complaints))
        if culprit is None or not said.seen:
            yield said
            return
        said = culprit.judge(said, [((), made.value)], "\n".join(complaints))
        yield said
        for chains, text in self._search(made.value):
            words = shortened([list(names) for names, _ in chains[:10]], complaints)
            said = culprit.judge(replace(said, words=words, trouble=said.trouble or text), chains, "")
            yield said
            if said.path:
                return

    def _complaints(self, value: Any) -> list[str]:
        error = self._dill.detect.errors(value)
        return ([f"{type(error).__name__}: {error}"] if error is not None else []) + self._check(value)

    def _check(self, value: Any) -> list[str]:
        """Return what `dill.check` prints of a failure; it hands the pickle over as an argument, which may be long."""
        with caught_output() as printed, contextlib.suppress(Exception):
            self._dill.check(value, verbose=True)
        failures = [line for line in printed if line in ("DUMP FAILED", "LOAD FAILED")]
        last_lines = [line for line in printed if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return [*failures, *last_lines[-1:]] if failures else []

    def _search(self, value: Any) -> Iterator[tuple[list[Chain], str]]:
        """Yield the chains of each call, or what it raised."""
        roots: list[Chain] = [((), value)]
        for variables in (self._dill.detect.freevars(value), self._dill.detect.globalvars(value)):
            roots += [((name,), each) for name, each in variables.items() if self._complaints(each)]
        yield roots[1:], ""
        for depth in DEPTHS:
            for names, root in roots:
                try:
                    found = self._dill.detect.badobjects(root, depth, safe=True)
                    yield list(dill_chains(found, names, root, depth)), ""
                except Exception as error:  # of an attribute that is listed and cannot be read
                    yield [], f"badobjects raised {type(error).__name__}"
        for names, root in roots:
            try:
                yield [((*names, "item"), item) for item in self._dill.detect.baditems(root, safe=True)], ""
            except Exception as error:
                yield [], f"baditems raised {type(error).__name__}"


def dill_chains(found: dict[str, Any], names: tuple[str, ...], root: Any, depth: int) -> Iterator[Chain]:
    """Yield the chains of what `badobjects` found."""
    for name, below in found.items():
        value = getattr(root, name)
        yield (*names, name), value
        if depth > 1:
            yield from dill_chains(below, (*names, name), value, depth - 1)


@contextlib.contextmanager
def caught_output() -> Iterator[list[str]]:
    """Catch what this process and its children print; the lines are there afterwards."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        with ExitStack() as stack:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                kept = os.dup(stream.fileno())
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, stream.fileno())
                stack.callback(stream.flush)
                os.dup2(file.fileno(), stream.fileno())
            yield lines
        file.seek(0)
        lines += file.read().decode(errors="replace").splitlines()


def shortened(*parts: Iterable[Any]) -> str:
    """Return the parts that are not empty, in one line."""
    text = "; ".join(" | ".join(map(str, part)) for part in parts if part)
    text = " ".join(re.sub(r"\x1b\[\d*m", "", text).split())
    return text if len(text) <= WORDS else text[: WORDS - 1] + "…"


TOOLS: dict[str, Callable[[], Tool]] = {
    "tfos_magic": Ours,
    "Ray": Ray,
    "dill": lambda: Dill(recurse=False),
    "dill, recurse=True": lambda: Dill(recurse=True),
}


def serve(name: str, descriptor: int, shared: str) -> None:
    """Be one tool's process: answer for each entry that is named, until the harness closes the connection.

    Parameters
    ----------
    name : str
        The tool's.
    descriptor : int
        Of the socket to the harness.
    shared : str
        The corpus's folder that was in PYTHONPATH from the beginning.
    """
    entries = {entry.name: entry for entry in CORPUS}
    ensure_java()
    spark = local_spark(3)
    with Connection(descriptor) as harness, TOOLS[name]() as tool, contextlib.suppress(EOFError):
        harness.send({})
        while True:
            entry = entries[harness.recv()]
            with entry.made(spark=spark, sc=spark.sparkContext, SHARED=shared) as made:
                culprit = Culprit(entry, made.value) if entry.trap else None
                for said in tool.answer(entry, made, culprit):
                    harness.send(asdict(said))
            harness.send({})
    spark.stop()


# --- the harness ------------------------------------------------------------------------------------------------


class Worker:
    """A tool's process; one that dies or does not end is replaced for the next object.

    Parameters
    ----------
    tool : str
    python : Path
        Of the environment.
    directory : Path
        For everything that is written; must exist.
    """

    def __init__(self, tool: str, python: Path, directory: Path) -> None:
        self._tool = tool
        self._python = python
        self._directory = directory
        self._shared = directory / "shared"
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Connection | None = None

    def __enter__(self) -> Worker:
        self._shared.mkdir()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    def ask(self, name: str) -> Said:
        """Return what the tool says of the entry of that name."""
        link = self._link or self._start()
        said = Said()
        try:
            link.send(name)
            while link.poll(SILENCE_S):
                heard = link.recv()
                if not heard:
                    return said
                said = Said(**heard)
        except (EOFError, OSError):
            self._end()
            return replace(said, trouble="died")
        self._end()
        return replace(said, trouble=f"said nothing for {SILENCE_S} s", seconds=said.seconds or SILENCE_S)

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        options = ["--serve", str(theirs.fileno()), "--shared", str(self._shared), "--tool", self._tool]
        with theirs, (self._directory / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._python), str(Path(__file__).resolve()), *options],
                env=self._environ(),
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        self._link = Connection(ours.detach())
        try:
            if self._link.poll(START_TIMEOUT_S):
                self._link.recv()
                return self._link
        except EOFError:
            pass
        self._end()
        log_text = (self._directory / "log.txt").read_text(encoding="utf-8", errors="replace")
        raise SideError(f"{self._tool} does not start:\n{log_text[-3000:]}")

    def _environ(self) -> dict[str, str]:
        path = [str(self._shared), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PYSPARK_PYTHON": str(self._python),
            "SPARK_LOCAL_DIRS": str(self._directory),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "TMPDIR": str(self._directory),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }

    def _end(self) -> None:
        """Close the connection, which tells the process to go, and see to it that it and all it started do."""
        if self._process is None or self._link is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            family = [process, *process.children(recursive=True)]
            self._link.close()
            _, alive = psutil.wait_procs(family, END_TIMEOUT_S)
            for each in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(alive, END_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # where it died, its children are no longer known as such
            os.killpg(self._process.pid, signal.SIGKILL)
        self._link.close()
        self._process.wait(END_TIMEOUT_S)
        self._process = self._link = None


Heard = Mapping[str, Mapping[str, Said]]
"""What each tool says of each entry."""


def hear(tools: Sequence[str], entries: Sequence[Entry], python: Path) -> Heard:
    """Ask the tools, one after the other."""
    heard: dict[str, dict[str, Said]] = {}
    for tool in tools:
        say(f"{tool}: {len(entries)} objects")
        with (
            tempfile.TemporaryDirectory(prefix="tfos-benchmark-") as directory,
            Worker(tool, python, Path(directory)) as worker,
        ):
            heard[tool] = {entry.name: worker.ask(entry.name) for entry in entries}
    return heard


def main_table(heard: Heard, entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """Return what all tools make of the objects, verdict by verdict."""
    table: list[tuple[str, ...]] = [("", *heard)]

    def add(title: str, figure: Callable[[Mapping[str, Said]], str]) -> None:
        table.append((title, *map(figure, heard.values())))

    def count(names: Sequence[str], attribute: str) -> Callable[[Mapping[str, Said]], str]:
        return lambda of: str(sum(bool(getattr(of[name], attribute)) for name in names))

    for verdict, words in ((BREAKS, "that break"), (WRONG, "that are silently wrong"), (COSTLY, "that are costly")):
        names = [entry.name for entry in entries if entry.verdict == verdict]
        add(f"{len(names)} {words}: recognised", count(names, "seen"))
        add("… with the right cause", count(names, "cause"))
        add("… with the right path", count(names, "path"))
    healthy = [entry.name for entry in entries if entry.verdict == FINE]
    add(f"{len(healthy)} healthy ones: false alarms", count(healthy, "seen"))
    add("s for an object, median", lambda of: f"{median([said.seconds for said in of.values()]):.3f}")
    add("s for an object, longest", lambda of: f"{max(said.seconds for said in of.values()):.3g}")
    return table


def print_exceptions(heard: Heard, entries: Sequence[Entry]) -> None:
    """Print what we miss, all false alarms, and what was no proper answer."""
    for name, said in heard.get("tfos_magic", {}).items():
        if name in {entry.name for entry in BROKEN} and not said.path:
            print(f"\nMISSED by tfos_magic: {name}: it said {said.words or 'nothing'}")
    for tool, of in heard.items():
        alarms = [entry.name for entry in entries if entry.verdict == FINE and of[entry.name].seen]
        if alarms:
            print(f"\nFalse alarms of {tool}: {'; '.join(alarms)}.")
        for trouble in sorted({said.trouble for said in of.values()} - {""}):
            print(f"\n{tool}: {trouble}: {'; '.join(name for name, said in of.items() if said.trouble == trouble)}.")


def print_details(heard: Heard, entries: Sequence[Entry]) -> None:
    """Print every answer, and what it counts for."""
    for entry in entries:
        print(f"\n{entry.name} [{entry.verdict}] {entry.path}")
        for tool, of in heard.items():
            said = of[entry.name]
            marks = [word for word in ("seen", "cause", "path") if getattr(said, word)]
            print(f"    {tool}, {said.seconds:.3f} s: {' '.join(marks) or '-'}: {said.words} {said.trouble}".rstrip())


def install() -> Installation:
    """Return the environment of all tools; it is made if it is missing."""
    base = find_python([11, 12])
    if base is None:
        raise SetupError("The versions of pickling.lock need Python 3.11, and there is none on PATH or in pyenv.")
    environment = Environment(ROOT / ".venv-pickling", base)
    environment.install_list(LOCK)
    return Installation.inspect(environment.python, ["tensorflow", "keras", "ray", "dill"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--details", action="store_true", help="print what each tool says of each object")
    parser.add_argument("--tool", action="append", choices=list(TOOLS), help="ask this one only")
    parser.add_argument("--only", action="append", metavar="NAME", help="of an object in the corpus")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shared", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Ask all tools about all objects, and print the table."""
    options = parse()
    if options.serve is not None:
        serve(options.tool[0], options.serve, options.shared)
        return
    entries = [entry for entry in CORPUS if not options.only or entry.name in options.only]
    try:
        installation = install()
    except SetupError as error:
        sys.exit(str(error))
    heard = hear(options.tool or list(TOOLS), entries, installation.executable)
    if options.details:
        print_details(heard, entries)
    print()
    print_machine()
    print(f"All tools have {installation}.")
    title = f"{len(entries)} objects of which {sum(entry.verdict != FINE for entry in entries)} do not travel well"
    print_table(title, main_table(heard, entries))
    print_exceptions(heard, entries)


if __name__ == "__main__":
    main()
