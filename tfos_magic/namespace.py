"""TFoS's ``Namespace``: a map function's arguments as attributes, whatever they were given as.

Runs on: driver and executors.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from tfos_magic.errors import UsageError


class Namespace:
    """Arguments as attributes.

    Parameters
    ----------
    d : dict, argparse.Namespace, Namespace or list of str
        A list is a command line: it is kept as ``argv``, and iterating gives its words. Else iterating gives the names.

    Attributes
    ----------
    argv : list of str or None
    """

    argv: list[str] | None = None

    def __init__(self, d: Any) -> None:
        if isinstance(d, list):
            self.argv = list(d)
        elif isinstance(d, Mapping):
            self.__dict__.update(d)
        elif isinstance(d, (argparse.Namespace, Namespace)):
            self.__dict__.update(vars(d))
        else:
            raise UsageError(
                f"Arguments cannot be a {type(d).__name__}.",
                hint="Give a dict, an argparse.Namespace, or a list of words such as sys.argv.",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.argv if self.argv else list(vars(self)))

    def __repr__(self) -> str:
        if self.argv:
            return repr(self.argv)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in sorted(vars(self).items()))})"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, list):
            return self.argv == other
        if not hasattr(other, "__dict__"):
            return NotImplemented
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # it can change
