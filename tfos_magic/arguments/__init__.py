"""The magics' lines: from what a person typed to checked values.

Runs on: notebook.

    "--executors {n} --data df.limit(9) --label y"
        │ words         whitespace, quotes as in a shell; brackets hold together
        ▼ parsers       argparse: which option has which text
        ▼ expressions   {expr} and $name, option by option, in the notebook's namespace
        ▼ values        numbers, durations, names; ranges checked
    lines: TrainLine, InferLine; doctor: DoctorLine; runs: LogsLine

**What is expanded.** In options that take text or a number, ``{expr}`` and ``$name`` stand for the value of a Python
expression; alone they keep its type (``--features {columns}`` may be a list), inside text they become ``str(value)``.
``{{``, ``}}`` and ``$$`` are the characters themselves, and braces around something that is no Python expression stay
as they are. Options that take an object (``--data``, ``--validation``, ``--args``, ``--grid``) are Python expressions
already, so ``df``, ``{df}`` and ``$df`` are the same there, and ``{"lr": 0.1}`` is a dict, quoted or not.
"""

from __future__ import annotations

from tfos_magic.arguments.doctor import DoctorLine, parse_doctor
from tfos_magic.arguments.expressions import did_you_mean, expand
from tfos_magic.arguments.lines import (
    SAVE_MODES,
    HelpRequestedError,
    InferLine,
    Line,
    TrainLine,
    parse_infer,
    parse_train,
)
from tfos_magic.arguments.namedtuple import (
    NAMEDTUPLE_ACTIONS,
    NAMEDTUPLE_OPTIONS,
    NamedtupleLine,
    parse_namedtuple,
)
from tfos_magic.arguments.names import (
    Chooser,
    columns_of,
    names_of_all,
    names_of_arguments,
    names_of_frames,
    names_of_functions,
    names_of_grids,
    names_of_predictors,
    names_of_sessions,
)
from tfos_magic.arguments.parsers import (
    PARSERS,
    doctor_parser,
    infer_parser,
    logs_parser,
    option_strings,
    train_parser,
)
from tfos_magic.arguments.runs import LogsLine, parse_logs, parse_names
from tfos_magic.arguments.values import parse_duration
from tfos_magic.arguments.words import split

__all__ = [
    "NAMEDTUPLE_ACTIONS",
    "NAMEDTUPLE_OPTIONS",
    "PARSERS",
    "SAVE_MODES",
    "Chooser",
    "DoctorLine",
    "HelpRequestedError",
    "InferLine",
    "Line",
    "LogsLine",
    "NamedtupleLine",
    "TrainLine",
    "columns_of",
    "did_you_mean",
    "doctor_parser",
    "expand",
    "infer_parser",
    "logs_parser",
    "names_of_all",
    "names_of_arguments",
    "names_of_frames",
    "names_of_functions",
    "names_of_grids",
    "names_of_predictors",
    "names_of_sessions",
    "option_strings",
    "parse_doctor",
    "parse_duration",
    "parse_infer",
    "parse_logs",
    "parse_namedtuple",
    "parse_names",
    "parse_train",
    "split",
    "train_parser",
]
