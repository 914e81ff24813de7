"""What a diagnosis is made of.

Runs on: driver. Plain records: no logic of pickling, no drawing.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class Verdict(enum.IntEnum):
    """How bad it is, in order."""

    FINE = 0
    COSTLY = 1
    WRONG = 2
    BREAKS = 3

    @property
    def word(self) -> str:
        """As people say it."""
        return ("fine", "costly", "silently wrong", "breaks")[self]


@dataclass(frozen=True)
class Finding:
    """One thing to know about the trip.

    Attributes
    ----------
    trap : str
        Its stable name, e.g. ``class-leak-back``.
    verdict : Verdict
        ``FINE`` for a remark: worth knowing, and nothing to do as long as the sentence does not apply.
    path : tuple of str
        The steps from the examined object to what the finding is about, the object's own name first.
    why : str
        One sentence.
    fix : str
        What to do, as something to type where that is possible.
    """

    trap: str
    verdict: Verdict
    path: tuple[str, ...]
    why: str
    fix: str

    @property
    def words(self) -> str:
        """The path in words: ``train_step → closure model → attribute lock``."""
        return " → ".join(self.path)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and strings."""
        return {**dataclasses.asdict(self), "verdict": self.verdict.word, "path": list(self.path), "words": self.words}


@dataclass(frozen=True)
class Part:
    """One object of the tree of what is dragged along.

    Attributes
    ----------
    step : str
        How it is reached from the part above, in words; of the root, its name.
    kind : str
        Its type in a word.
    how : str
        ``by value``, ``by import of <module>``, or why it stays behind.
    size_bytes : int
        With everything below it; what was met before counts where it was met first.
    parts : tuple of Part
        Below it, largest first.
    more : int
        Number of parts that are not listed.
    """

    step: str
    kind: str
    how: str
    size_bytes: int
    parts: tuple[Part, ...] = ()
    more: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return {**vars(self), "parts": [part.to_json() for part in self.parts]}


@dataclass(frozen=True)
class GlobalName:
    """One global that the code takes along.

    Attributes
    ----------
    name : str
        As the code calls it.
    kind : str
        Its type in a word.
    how : str
        ``by value`` or ``by import of <module>``.
    here : str
        The module's version, or its file where it has none; empty by value.
    there : str
        The same where it was unpickled; ``missing``; empty where nobody was asked.
    is_patched : bool
        It is not what an import of its module gives.
    """

    name: str
    kind: str
    how: str
    here: str = ""
    there: str = ""
    is_patched: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return dict(vars(self))


@dataclass(frozen=True)
class Ancestor:
    """One class of a namedtuple's MRO."""

    name: str
    defines: tuple[str, ...]
    """Which of the methods that decide about pickling it defines."""
    wins: bool
    """Its method is the one that pickle calls."""
    is_pysparks: bool
    """That method is PySpark's patch."""

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and strings."""
        return {**vars(self), "defines": list(self.defines)}


@dataclass(frozen=True)
class NamedtupleTable:
    """Why a namedtuple is pickled the way it is."""

    path: tuple[str, ...]
    name: str
    mro: tuple[Ancestor, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and strings."""
        return {"path": list(self.path), "name": self.name, "mro": [each.to_json() for each in self.mro]}


@dataclass(frozen=True)
class Trip:
    """What became of the value in one other interpreter.

    Attributes
    ----------
    where : str
        ``a clean second interpreter``, or an executor's host and process.
    outcome : str
        ``arrived``, ``failed``, ``timed out``, ``died`` or ``not asked``.
    error : str
        What went wrong, in a line.
    type_before, type_after : str
        Full names.
    is_instance : bool or None
        What arrived is an instance of all that the value is an instance of.
    is_equal : bool or None
        Equal to itself after one more trip; None where it was not compared: its ``__eq__`` may do anything.
    is_same : bool or None
        It is one and the same object each time it arrives, as what travels by import.
    lost_methods : tuple of str
        Public methods that it does not have any more.
    size_before, size_after : int
        Bytes of its pickle here, and of its pickle there.
    seconds : float
        To unpickle it there.
    python : str
        Version there.
    is_namedtuple_patched : bool or None
        PySpark's namedtuple patch is on there.
    modules : tuple of (str, str)
        Module that the value needs → version or file there, ``missing`` where there is none.
    """

    where: str
    outcome: str
    error: str = ""
    type_before: str = ""
    type_after: str = ""
    is_instance: bool | None = None
    is_equal: bool | None = None
    is_same: bool | None = None
    lost_methods: tuple[str, ...] = ()
    size_before: int = 0
    size_after: int = 0
    seconds: float = 0.0
    python: str = ""
    is_namedtuple_patched: bool | None = None
    modules: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return {**vars(self), "lost_methods": list(self.lost_methods), "modules": dict(self.modules)}


@dataclass(frozen=True)
class Diagnosis:
    """What happens to one object on its way to an executor and back.

    Attributes
    ----------
    name : str
        How the object was called.
    kind : str
        Its type, by full name.
    pickles : bool
        The cloudpickle that would be asked can pickle it.
    pickler : str
        Which one that is, with its version.
    size_bytes : int
        Of its pickle; of what was counted, where it does not pickle.
    seconds : float
        Time the whole examination took.
    findings : tuple of Finding
        Worst first.
    tree : Part
        What it drags along.
    names : tuple of GlobalName
        Globals of its code.
    namedtuples : tuple of NamedtupleTable
        Empty where there are none.
    trip : Trip or None
        The round trip in a clean second interpreter; None where it was not asked for.
    executors : tuple of Trip
        The same on executors.
    awaits : str
        Who has been asked and has not answered yet; empty once the diagnosis is complete.
    """

    name: str
    kind: str
    pickles: bool
    pickler: str
    size_bytes: int
    seconds: float
    findings: tuple[Finding, ...]
    tree: Part
    names: tuple[GlobalName, ...] = ()
    namedtuples: tuple[NamedtupleTable, ...] = ()
    trip: Trip | None = None
    executors: tuple[Trip, ...] = field(default=())
    awaits: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst of its findings."""
        return max((finding.verdict for finding in self.findings), default=Verdict.FINE)

    @property
    def is_fine(self) -> bool:
        """Nothing breaks, nothing is wrong, nothing costs much."""
        return self.verdict is Verdict.FINE

    def __repr__(self) -> str:
        worst = [finding for finding in self.findings if finding.verdict is not Verdict.FINE]
        told = f": {worst[0].trap} at {worst[0].words}" if worst else ""
        more = f" and {len(worst) - 1} more" if len(worst) > 1 else ""
        return f"<Diagnosis of {self.name}: {self.verdict.word}{told}{more}>"

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return {
            **vars(self),
            "verdict": self.verdict.word,
            "findings": _all(self.findings),
            "tree": self.tree.to_json(),
            "names": _all(self.names),
            "namedtuples": _all(self.namedtuples),
            "trip": self.trip.to_json() if self.trip else None,
            "executors": _all(self.executors),
        }


def _all(records: Sequence[Any]) -> list[dict[str, Any]]:
    return [record.to_json() for record in records]
