"""One point of a grid for each independent node: how it comes into ``args``, and how it is told.

Runs on: driver and executors.

    --grid ──► points ──shipping.pack──► child: point of this node ──► args.lr, ctx.point
                  └───────► told ──► board, errors, dry run, result
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 40


def told(point: Mapping[str, Any]) -> str:
    """Return a point in words.

    Examples
    --------
    >>> told({"lr": 0.1, "units": 64, "activation": abs})
    'lr=0.1, units=64, activation=abs'
    """
    return ", ".join(f"{name}={_word(value)}" for name, value in point.items())


def _word(value: Any) -> str:
    """Return a value in short: of a function or class its name, not where it lies in memory."""
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else _SHORT.repr(value)


def apply(point: Mapping[str, Any], args: Any) -> None:
    """Make the keys of a point attributes of `args`, in place of those that it has by the same name."""
    for name, value in point.items():
        setattr(args, name, value)
