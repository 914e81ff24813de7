"""The line of ``%tfos_namedtuple``.

Runs on: notebook.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from tfos_magic.errors import UsageError

NAMEDTUPLE_ACTIONS = ("status", "revert", "restore")
NAMEDTUPLE_OPTIONS = ("--driver", "--out")


@dataclass(frozen=True)
class NamedtupleLine:
    """What the line asks for.

    Attributes
    ----------
    action : str
        One of :data:`NAMEDTUPLE_ACTIONS`.
    is_driver_only : bool
        Leave Spark alone.
    out : str or None
        The name to bind the status to.
    """

    action: str = "status"
    is_driver_only: bool = False
    out: str | None = None


def parse_namedtuple(words: Sequence[str]) -> NamedtupleLine:
    """Return what the words of the line ask for.

    Raises
    ------
    UsageError
        A word is none of those known, or one too many.
    """
    rest = [*words]
    out = _take_out(rest)
    for word in rest:
        if word not in (*NAMEDTUPLE_ACTIONS, *NAMEDTUPLE_OPTIONS):
            raise UsageError(f"%tfos_namedtuple {word}: no such {_kind(word)}. {_hint(word)}")
    actions = [word for word in rest if word in NAMEDTUPLE_ACTIONS]
    if len(actions) > 1:
        raise UsageError(f"%tfos_namedtuple {' '.join(actions)}: one action at a time.")
    return NamedtupleLine(actions[0] if actions else "status", "--driver" in rest, out)


def _take_out(words: list[str]) -> str | None:
    if "--out" not in words:
        return None
    place = words.index("--out")
    name = words[place + 1] if place + 1 < len(words) else ""
    if not name.isidentifier():
        raise UsageError(f"--out {name}".rstrip() + ": the name of a variable is needed.")
    del words[place : place + 2]
    return name


def _kind(word: str) -> str:
    return "option" if word.startswith("-") else "action"


def _hint(word: str) -> str:
    known = (*NAMEDTUPLE_ACTIONS, *NAMEDTUPLE_OPTIONS)
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"One of {', '.join(known)}."
