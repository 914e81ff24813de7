"""The lines of ``%tfos_logs``, ``%tfos_status`` and ``%tfos_stop``.

Runs on: notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfos_magic.arguments.expressions import did_you_mean
from tfos_magic.arguments.lines import HelpRequestedError
from tfos_magic.arguments.parsers import logs_parser, parse_words
from tfos_magic.arguments.values import Converter
from tfos_magic.arguments.words import split
from tfos_magic.errors import UsageError


@dataclass(frozen=True)
class LogsLine:
    """The line of ``%tfos_logs``, checked."""

    node: str | None = None
    run: str | None = None
    """The last one if it is not named."""
    tail: int = 20
    """Lines of each node."""
    grep: str | None = None
    """As typed: braces and dollars are the regular expression's own."""


def parse_logs(line: str, namespace: Mapping[str, Any]) -> LogsLine:
    """Parse the line of ``%tfos_logs``; parameters and errors as in :func:`tfos_magic.arguments.parse_train`."""
    words = split(line)
    parser = logs_parser()
    if "--help" in words or "-h" in words:
        raise HelpRequestedError(parser.format_help())
    given = parse_words(parser, words)
    values = Converter(given, namespace)
    return LogsLine(
        node=values.text("node"),
        run=values.text("run"),
        tail=values.integer("tail", LogsLine.tail, least=1),
        grep=given.grep,
    )


def parse_names(magic: str, words: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Return the names on a line, each once.

    Parameters
    ----------
    magic : str
        For the message, e.g. ``%tfos_stop``.
    words : sequence of str
        The line's.
    known : sequence of str
    what : str
        What is wrong with a name that is not among them.

    Raises
    ------
    UsageError
    """
    unknown = next((word for word in words if word not in known), None)
    if unknown is not None:
        others = f" There are: {', '.join(known)}." if known else ""
        raise UsageError(f"{magic} {unknown}: {what}.{did_you_mean(unknown, known) or others}")
    return list(dict.fromkeys(words))
