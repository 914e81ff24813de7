"""From what went wrong on several nodes at once to the one error worth showing.

Runs on: driver.

A node that dies takes others with it: their collectives fail, the feed finds a closed port, Spark reports a failed
stage. :func:`root_of` picks the failure that explains the rest, :func:`error_of` puts it in words.
"""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tfos_magic.errors import (
    EnvironmentMismatchError,
    GpuError,
    LaunchError,
    NodeError,
    NodeKilledError,
    NodeLostError,
    RemoteException,
    RendezvousError,
    RunStoppedError,
    TfosError,
)
from tfos_magic.node.launch import ERROR_MARK

_OTHERS_SHOWN = 3
_PYTHON_ERROR = re.compile(r"(?!py4j|pyspark|org\.|java\.|Caused)[\w.]*(Error|Exception|Interrupt|Warning): ")
# Messages of Keras that do not say what they mean here → the next thing to type.
_HINTS = (
    (
        r"expects 1 input\(s\), but it received \d+ input tensors",
        "Several feature columns come as a dict by column name, which takes a model with one named Input for each. "
        "For one tensor, name one column (--features x), or put them into one first: "
        'df.select(F.array("a", "b").alias("x"), "label"). A label not called label, y or target wants --label NAME.',
    ),
    (
        r"expected min_ndim=2, found ndim=1",
        "A column of plain numbers comes as a tensor of shape (rows,). For (rows, 1) make it a list: "
        'df.select(F.array("x").alias("x"), "label").',
    ),
    (
        r"None values not supported",
        "If the data have no label: it is the column called label, y or target, or the one that --label names.",
    ),
    (
        r"Attempt to convert a value \(PerReplica|Invalid reduction dimension 0 for input with 0 dimensions",
        "Keras 3's fit and evaluate do not run under MultiWorkerMirroredStrategy: make the model without a strategy, "
        "and call ctx.distribute(model) before fit.",
    ),
    (
        r"Could not locate class",
        "A Keras model with a class of your own does not travel by itself: build the model inside the cell.",
    ),
)


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong.

    Attributes
    ----------
    kind : str
        ``user`` (the function raised), ``import`` (TensorFlow cannot be imported), ``exited`` (no result and
        no exception), ``lost`` (the agent is gone), ``agent`` (a fault of this package), ``gpu`` (it cannot have those
        that it should), ``feed``, ``launch``.
    node : int or None
        Index of the node.
    code : int or None
        The child's exit code; negative for a signal.
    """

    kind: str
    node: int | None = None
    remote: RemoteException | None = None
    missing_module: str | None = None
    executable: str = ""
    code: int | None = None
    tail: tuple[str, ...] = ()
    error: TfosError | None = None

    @classmethod
    def from_report(cls, node: int, header: Mapping[str, object]) -> Failure:
        """Read a node's ``failure`` message."""
        data = json.loads(json.dumps(header))
        if data["kind"] == "gpu":
            return cls("gpu", node=node, error=GpuError(**data["error"]))
        return cls(
            kind=data["kind"],
            node=node,
            remote=RemoteException.from_json(data["exception"]),
            missing_module=data.get("missing_module"),
            executable=data.get("sys_executable", ""),
            tail=tuple(data.get("tail", ())),
        )

    @property
    def is_consequence(self) -> bool:
        """True when another failure most likely explains this one."""
        if self.kind in ("feed", "launch", "lost"):
            return self.kind != "feed" or type(self.error).__name__ == "FeedError"
        if self.remote is None:
            return False
        from tfos_magic import training

        return bool(training.is_consequence(self.remote.type_name, self.remote.message))


def root_of(failures: Sequence[Failure]) -> Failure:
    """Return the first failure that no other explains; the most telling of the others where there is none."""
    telling = ("user", "exited", "import", "agent", "lost", "feed", "launch")
    independent = [failure for failure in failures if not failure.is_consequence]
    return independent[0] if independent else min(failures, key=lambda failure: telling.index(failure.kind))


def error_of(
    root: Failure,
    failures: Sequence[Failure],
    nodes: Mapping[int, tuple[str, str]],
    cell_names: Mapping[str, str],
    points: Sequence[str] = (),
) -> TfosError:
    """Return the error to raise for `root`.

    Parameters
    ----------
    nodes : mapping of int to (str, str)
        Node index → (name, host).
    cell_names : mapping of str to str
        File name of a cell → what the notebook calls it.
    points : sequence of str, optional
        What is different on each node, in words.
    """
    if root.error is not None:
        return root.error
    told = {index: f"{name} ({points[index]})" if points else name for index, (name, _) in nodes.items()}
    index = root.node if root.node is not None else 0
    name, host = nodes[index]
    where = f"{told[index]} on {host}"
    others = [
        f"{told[other.node]} failed too, by itself: {summary(other)}"
        for other in failures
        if other is not root and other.node is not None and not other.is_consequence
    ][:_OTHERS_SHOWN]
    if root.kind == "import":
        return _import_error(root, name, host)
    if root.kind == "lost":
        return NodeLostError(
            f"{where} went away.",
            node=name,
            host=host,
            cause="Its executor or its machine was lost, or its Spark task was killed (Spark UI, cancelJobGroup).",
        )
    if root.kind == "exited":
        return NodeKilledError(
            f"{where} {exit_words(root.code)}.", node=name, host=host, log_lines=root.tail, others=others
        )
    what = root.remote.type_name if root.remote else root.kind
    return NodeError(
        f"{where} raised {what}." if root.kind == "user" else f"The agent of {where} failed: {what}.",
        node=name,
        host=host,
        remote=root.remote,
        log_lines=root.tail,
        cell_names=cell_names,
        others=others,
        hint=_module_hint(root.missing_module, name, root.executable) if root.missing_module else _known_hint(root),
    )


def is_worth_a_restart(error: TfosError) -> bool:
    """Tell whether a run that has failed with this may well go through when its nodes are started again.

    It is so where processes or machines were lost, and not where somebody's code or data are at fault: they would fail
    in the same way again.
    """
    if isinstance(error, NodeKilledError | NodeLostError | LaunchError):
        return True
    if not isinstance(error, NodeError) or error.remote is None:
        return False
    from tfos_magic import training

    return bool(training.is_consequence(error.remote.type_name, error.remote.message))


def summary(failure: Failure) -> str:
    """Return a failure in a line."""
    if failure.remote is not None:
        return f"{failure.remote.type_name}: {failure.remote.message}"[:200]
    return exit_words(failure.code) if failure.kind == "exited" else failure.kind


def exit_words(code: int | None) -> str:
    """Return how a process ended, e.g. ``was killed by signal 9 (SIGKILL)``."""
    if code is not None and code < 0:
        guess = " (out of memory?)" if -code == signal.SIGKILL else ""
        try:
            return f"was killed by signal {-code} ({signal.Signals(-code).name}){guess}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"exited with code {code} before the function returned"


def _import_error(root: Failure, name: str, host: str) -> EnvironmentMismatchError:
    message = root.remote.message if root.remote else "unknown"
    return EnvironmentMismatchError(
        f"{name} on {host} cannot import TensorFlow with {root.executable}: {message}",
        cause="The executors' Python is not the one that has TensorFlow.",
        hint=install_hint("tensorflow"),
    )


def install_hint(module: str) -> str:
    """Return what to do when the executors' Python lacks a module that this one has."""
    return (
        f"Install {module} there, or name an interpreter that has it before the session is made, e.g. this one: "
        f"os.environ['PYSPARK_PYTHON'] = {sys.executable!r}."
    )


def _known_hint(failure: Failure) -> str:
    message = failure.remote.message if failure.remote else ""
    return next((hint for pattern, hint in _HINTS if re.search(pattern, message)), "")


def _module_hint(module: str, name: str, executable: str) -> str:
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return f"The driver has no module {top!r} either: is the name right?"
    where = f" at {spec.origin}" if spec.origin else ""
    return (
        f"The driver has {top!r}{where}, but {name} ({executable}) does not: install it on the executors, or ship "
        f"your own file with sc.addPyFile(…)."
    )


def describe_launch_error(error: Exception) -> TfosError:
    """Return what Spark's exception means when the nodes' tasks failed."""
    text = str(error)
    marked = re.search(re.escape(ERROR_MARK) + r"(\{.*?\})(?=\s*$)", text, re.MULTILINE)
    if marked:
        answer = json.loads(marked.group(1))
        return _caused(
            RendezvousError(answer["error"], cause=answer.get("cause", ""), hint=answer.get("hint", "")), error
        )
    if "PYTHON_VERSION_MISMATCH" in text or "different version" in text:
        return _caused(
            EnvironmentMismatchError(
                "Driver and executors run different Python minor versions, and PySpark refuses to work so.",
                cause=_line_with(text, "version"),
                hint="Set spark.pyspark.python and spark.pyspark.driver.python to the same Python minor version.",
            ),
            error,
        )
    if "SPARK_JOB_CANCELLED" in text or re.search(r"Job \d+ cancelled", text):
        return _caused(
            RunStoppedError(
                "The nodes' Spark job was cancelled.",
                cause="Somebody used the Spark UI, cancelAllJobs or cancelJobGroup, or another notebook cell did.",
            ),
            error,
        )
    return _caused(
        LaunchError(
            f"Spark ended the nodes' tasks: {_line_with(text, 'exception:') or type(error).__name__}",
            cause="An executor was lost, the job was cancelled, or the executors' Python does not start.",
            hint="The Spark UI and the executors' stderr say more.",
        ),
        error,
    )


def _line_with(text: str, word: str) -> str:
    return next((line.strip() for line in text.splitlines() if word in line.lower()), "")


def _caused(error: TfosError, cause: Exception) -> TfosError:
    error.__cause__ = cause
    return error


def python_reason(text: str) -> str:
    """Return the line that says most: the last one of a Python traceback, else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    python = [line for line in lines if _PYTHON_ERROR.match(line)]
    return (python or lines or [""])[-1 if python else 0]
