"""Everything that can go wrong, on one page.

Runs on: driver and executors.

Each message is built the same way: the fact with its numbers, the likely cause, the next thing to type.
All errors derive from :class:`TfosError`, keep what they know as attributes, and survive pickling.

==============================  =========================================================================
error                           when
==============================  =========================================================================
UsageError                      the magic's line or an argument is wrong; nothing was started
SessionError                    no usable Spark session, or a kind that cannot run nodes
ShippingError                   something the function uses cannot travel; Spark was not asked
TooFewSlotsError                the nodes do not fit on the cluster
GpuError                        a node cannot have the GPUs that --gpus-per-node asks for
RendezvousError                 nodes and driver could not meet
EnvironmentMismatchError        Python or a module differs between driver and executors
DataError                       a DataFrame column cannot become a tensor
FeedError                       Spark failed while it delivered the data
NodeError                       the user's function raised on a node; shows that traceback
NodeKilledError                 a node's process was killed by a signal
NodeLostError                   an executor or its machine went away
LaunchError                     Spark has ended the tasks in which nodes were to run
StalledError                    nodes wait for each other and can never go on
RunTimeoutError                 ``--timeout`` passed
StillRunningError               a background run has no result yet; it goes on
RunStoppedError                 somebody stopped the run, or its Spark job
RunInterrupted                  the notebook was interrupted (■); a KeyboardInterrupt, not a TfosError
ResultError                     a node's return value could not be brought to the driver
==============================  =========================================================================
"""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_LOG_LINES_SHOWN = 20
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class TfosError(Exception):
    """Base of all errors of this package.

    Parameters
    ----------
    fact : str
        What happened, with the numbers.
    cause : str, optional
        The likely cause.
    hint : str, optional
        The next thing to type.

    Attributes
    ----------
    partial : RunResult or None
        What the points of a grid gave that were done before the run ended early.

    Notes
    -----
    Subclasses take their further fields as keyword arguments and keep them as attributes of the same name.
    """

    partial: Any = None  # a RunResult, which is a module further on

    def __init__(self, fact: str, *, cause: str = "", hint: str = "") -> None:
        super().__init__(fact)
        self.fact = fact
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        return "\n".join(part for part in (self.fact, self.cause, self.hint) if part)

    def add_hint(self, *lines: str) -> None:
        """Put more lines behind the hint; empty ones are left out."""
        self.hint = "\n".join(filter(None, [self.hint, *lines]))

    @property
    def headline(self) -> str:
        """The fact alone, for places that show the whole message beside it."""
        return self.fact

    def render(self) -> list[str]:
        """Return the message's lines."""
        return f"{type(self).__name__}: {self}".split("\n")

    def _render_traceback_(self) -> list[str]:
        """Let IPython show the message alone: the frames in between are this package's, not the user's."""
        return self.render()

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword-only fields come back corrupted by default: rebuild without __init__.
        state = {name: value for name, value in self.__dict__.items() if name != "partial"}  # is of this process
        return _rebuild, (type(self), self.args, state)


def _rebuild(cls: type[TfosError], args: tuple[Any, ...], state: dict[str, Any]) -> TfosError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(TfosError):
    """The line or an argument is wrong; nothing was started."""


class SessionError(TfosError):
    """There is no Spark session that can run nodes."""


class ShippingError(TfosError):
    """Something that the function uses cannot travel to the executors.

    Attributes
    ----------
    path : str
        How the object is reached from the function, e.g. ``train_step → cfg["opt"].lock``.
    """

    def __init__(self, fact: str, *, path: str = "", cause: str = "", hint: str = "") -> None:
        super().__init__(fact, cause=cause, hint=hint)
        self.path = path


class TooFewSlotsError(TfosError):
    """The nodes do not fit on the cluster.

    Attributes
    ----------
    needed, available : int
        Task slots.
    """

    def __init__(self, fact: str, *, needed: int, available: int, cause: str = "", hint: str = "") -> None:
        super().__init__(fact, cause=cause, hint=hint)
        self.needed = needed
        self.available = available


class GpuError(TfosError):
    """A node cannot have the GPUs that it was to have; nothing ran on it.

    Attributes
    ----------
    node : str
        ``chief:0``, ``worker:2``, …
    host : str
    """

    def __init__(self, fact: str, *, node: str = "", host: str = "", cause: str = "", hint: str = "") -> None:
        super().__init__(fact, cause=cause, hint=hint)
        self.node = node
        self.host = host

    def to_json(self) -> dict[str, str]:
        """Return what :class:`GpuError` takes, for the way to the driver."""
        return {"fact": self.fact, "node": self.node, "host": self.host, "cause": self.cause, "hint": self.hint}


class RendezvousError(TfosError):
    """Nodes and driver could not meet, or one end refused the other's credentials."""


class EnvironmentMismatchError(TfosError):
    """Python or a module differs between driver and executors."""


class DataError(TfosError):
    """A DataFrame column cannot become a tensor."""


class FeedError(TfosError):
    """Spark failed while it delivered the data; ``__cause__`` holds Spark's own error."""


class LaunchError(TfosError):
    """Spark has ended the tasks in which nodes were to run; ``__cause__`` holds Spark's own error."""


class StalledError(TfosError):
    """Nodes wait for each other and can never go on."""


class RunTimeoutError(TfosError):
    """The run took longer than its ``timeout``."""


class StillRunningError(TfosError, TimeoutError):
    """A background run has no result yet, or not in the time that was given; it goes on."""


class RunStoppedError(TfosError):
    """Somebody stopped the run."""


class RunInterrupted(KeyboardInterrupt):
    """The notebook was interrupted; everything of the run has been stopped.

    Attributes
    ----------
    partial : RunResult or None
        As in :class:`TfosError`.
    """

    partial: Any = None  # a RunResult, which is a module further on

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


class ResultError(TfosError):
    """A node's return value could not be brought to the driver."""


# As tracebacks spell it, which inside the shipped zip is not __file__.
_PACKAGE = os.path.dirname(TfosError.__init__.__code__.co_filename) + os.sep


@dataclass(frozen=True)
class RemoteFrame:
    """One line of a remote traceback."""

    filename: str
    lineno: int
    name: str
    source: str = ""


@dataclass(frozen=True)
class RemoteException:
    """An exception as it happened on a node: plain data that JSON can carry and nothing need unpickle.

    Attributes
    ----------
    type_name : str
        Qualified name, builtins without their module.
    message : str
        ``str(exception)``.
    frames : tuple of RemoteFrame
        Outermost first; frames of this package left out.
    cause : RemoteException, optional
        ``__cause__``, or ``__context__`` where it is not suppressed.
    is_explicit_cause : bool
        True for ``raise … from …``.
    notes : tuple of str
        PEP 678 notes.
    """

    type_name: str
    message: str
    frames: tuple[RemoteFrame, ...] = ()
    cause: RemoteException | None = None
    is_explicit_cause: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_exception(cls, error: BaseException, *, _depth: int = 0) -> RemoteException:
        """Describe `error`, leaving out this package's own outermost frames."""
        kind = type(error)
        name = (
            kind.__qualname__
            if kind.__module__ in ("builtins", "__main__")
            else f"{kind.__module__}.{kind.__qualname__}"
        )
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        try:
            message = str(error)
        except Exception as inner:  # a user's __str__ may raise anything
            message = f"<its __str__ raised {type(inner).__name__}>"
        return cls(
            type_name=name,
            message=_ESCAPES.sub("", message),  # Keras puts some words in bold
            frames=tuple(
                RemoteFrame(f.filename, f.lineno or 0, f.name, linecache.getline(f.filename, f.lineno or 0).strip())
                for f in traceback.extract_tb(error.__traceback__)
                if not f.filename.startswith(_PACKAGE)
            ),
            cause=cls.from_exception(cause, _depth=_depth + 1) if cause is not None and _depth < 8 else None,
            is_explicit_cause=error.__cause__ is not None,
            notes=tuple(map(str, getattr(error, "__notes__", ()))),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RemoteException:
        """Inverse of :meth:`to_json`."""
        cause = data.get("cause")
        return cls(
            type_name=data["type_name"],
            message=data["message"],
            frames=tuple(RemoteFrame(**frame) for frame in data.get("frames", ())),
            cause=cls.from_json(cause) if cause else None,
            is_explicit_cause=bool(data.get("is_explicit_cause")),
            notes=tuple(data.get("notes", ())),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and strings."""
        return asdict(self)

    def render(self, cell_names: Mapping[str, str] | None = None) -> list[str]:
        """Return the traceback's lines, the cells named as the notebook names them.

        Parameters
        ----------
        cell_names : mapping of str to str, optional
            File name of a compiled cell → what to show instead, e.g. ``Cell In[4]``.
        """
        names = cell_names or {}
        lines: list[str] = []
        if self.cause is not None:
            lines += self.cause.render(names)
            lines += [
                "",
                "The above exception was the direct cause of the following exception:"
                if self.is_explicit_cause
                else "During handling of the above exception, another exception occurred:",
                "",
            ]
        if self.frames:
            lines.append("Traceback (most recent call last):")
        for frame in self.frames:
            where = (
                f"{names[frame.filename]}, line {frame.lineno}"
                if frame.filename in names
                else (f'File "{frame.filename}", line {frame.lineno}')
            )
            lines.append(f"  {where}, in {frame.name}")
            if frame.source:
                lines.append(f"    {frame.source}")
        lines += f"{self.type_name}: {self.message}".rstrip(": ").split("\n")
        for note in self.notes:
            lines += note.split("\n")
        return lines


class NodeError(TfosError):
    """The user's function raised on a node.

    Attributes
    ----------
    node : str
        ``chief:0``, ``worker:2``, …
    host : str
    remote : RemoteException or None
        The exception as it happened there.
    log_lines : tuple of str
        The node's last output lines.
    cell_names : dict of str to str
        How the notebook calls the cells whose frames appear.
    others : tuple of str
        One line for each further node that failed by itself.
    """

    def __init__(
        self,
        fact: str,
        *,
        node: str,
        host: str,
        remote: RemoteException | None = None,
        log_lines: Sequence[str] = (),
        cell_names: Mapping[str, str] | None = None,
        others: Sequence[str] = (),
        cause: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(fact, cause=cause, hint=hint)
        self.node = node
        self.host = host
        self.remote = remote
        self.log_lines = tuple(log_lines)
        self.cell_names = dict(cell_names or {})
        self.others = tuple(others)

    def __str__(self) -> str:
        return "\n".join(self.render())

    @property
    def headline(self) -> str:
        """The fact, with what the remote exception says in its first line."""
        if self.remote is None:
            return self.fact
        said = self.remote.message.strip().partition("\n")[0]
        return f"{self.fact}\n{self.remote.type_name}: {said}" if said else self.fact

    def render(self) -> list[str]:
        """Return the message's lines: remote traceback, the node named, its last log lines, the hint."""
        lines = [*self.remote.render(self.cell_names), ""] if self.remote else []
        lines += TfosError.__str__(self).split("\n")
        if self.log_lines:
            shown = self.log_lines[-_LOG_LINES_SHOWN:]
            lines += ["", f"Last {len(shown)} lines of output of {self.node}:", *(f"  {line}" for line in shown)]
        if self.others:
            lines += ["", *self.others]
        return lines

    def _render_traceback_(self) -> list[str]:
        """Let IPython show the remote traceback in place of the driver's own frames."""
        return ["-" * 75, *self.render()]


class NodeKilledError(NodeError):
    """A node's process was killed by a signal, or exited without a result."""


class NodeLostError(NodeError):
    """A node's agent went silent: its executor or machine is gone."""
