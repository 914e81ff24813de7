"""The line of ``%tfos_doctor``: an expression, and options around it.

Runs on: notebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tfos_magic.arguments.expressions import EvaluationError, evaluate, unwrapped
from tfos_magic.arguments.lines import HelpRequestedError
from tfos_magic.arguments.parsers import doctor_parser, option_strings, parse_words
from tfos_magic.arguments.values import Converter
from tfos_magic.arguments.words import raw_words, short
from tfos_magic.errors import UsageError


@dataclass(frozen=True)
class DoctorLine:
    """The line of ``%tfos_doctor``, checked."""

    expression: str = ""
    """As typed; empty above a cell."""
    value: Any = None
    """What it is in the notebook."""
    asks_executors: bool = False
    session: str | None = None
    out: str | None = None


def parse_doctor(line: str, namespace: Mapping[str, Any], *, has_cell: bool) -> DoctorLine:
    """Parse and check the line of ``%tfos_doctor`` or, with `has_cell`, of ``%%tfos_doctor``.

    Parameters
    ----------
    line : str
        What follows the magic's name.
    namespace : mapping of str to object
        The notebook's globals.
    has_cell : bool
        There is a cell, which is what is examined.

    Raises
    ------
    UsageError
        One line: an unknown option, an expression that cannot be evaluated, none where one is needed.
    HelpRequestedError
        ``--help`` is among the options.
    """
    expression, options = _separate(line)
    parser = doctor_parser()
    if "--help" in options or "-h" in options:
        raise HelpRequestedError(parser.format_help())
    given = parse_words(parser, options)
    values = Converter(given, namespace)
    if has_cell and expression:
        raise UsageError(f"Unexpected {short(expression)!r}: with a cell, the cell is examined.")
    if not has_cell and not expression:
        raise UsageError("Nothing to examine: %tfos_doctor EXPR, or %%tfos_doctor above a cell.")
    return DoctorLine(
        expression=expression,
        value=_evaluated(expression, namespace) if expression else None,
        asks_executors=given.executors or given.session is not None,
        session=values.session(),
        out=values.variable("out"),
    )


def _separate(line: str) -> tuple[str, list[str]]:
    """Return the expression, as it was typed, and the words of the options."""
    actions = option_strings("tfos_doctor")
    words = raw_words(line)
    kept: list[tuple[int, int]] = []
    options: list[str] = []
    is_value = False
    for start, end in words:
        word = line[start:end]
        name = word.partition("=")[0]
        if is_value:
            options.append(word.strip("\"'"))
            is_value = False
        elif name in actions or (word.startswith("--") and name[2:].isidentifier()):
            options.append(word)
            is_value = name in actions and actions[name].nargs != 0 and "=" not in word
        else:
            kept.append((start, end))
    expression = line[kept[0][0] : kept[-1][1]] if kept else ""
    for start, end in reversed(words):  # options in the middle of an expression
        if kept and kept[0][0] < start < kept[-1][1] and (start, end) not in kept:
            expression = " ".join(line[first:last] for first, last in kept)
            break
    return expression, options


def _evaluated(expression: str, namespace: Mapping[str, Any]) -> Any:
    try:
        return evaluate(unwrapped(expression), namespace)
    except EvaluationError as error:
        raise UsageError(f"%tfos_doctor {short(expression)}: {error}") from error.__cause__
