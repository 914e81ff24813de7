"""Values of what was typed: numbers, durations, names, DataFrames; each complaint begins with the option.

Runs on: notebook.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from tfos_magic.arguments.expressions import EvaluationError, did_you_mean, evaluate, expand, is_variable, unwrapped
from tfos_magic.arguments.words import short
from tfos_magic.errors import UsageError


class Converter:
    """Makes values of options' texts; raises a UsageError of one line that begins with the option.

    Each method takes an option's name as argparse has it, and returns None when it was not given.

    Parameters
    ----------
    given : argparse.Namespace
        Option → text.
    namespace : mapping of str to object
        The notebook's globals.
    """

    def __init__(self, given: argparse.Namespace, namespace: Mapping[str, Any]) -> None:
        self.given = given
        self._namespace = namespace

    def option(self, name: str) -> str:
        """Return an option as it is typed."""
        return "NAME" if name == "function" else f"--{name.replace('_', '-')}"

    def _complain(self, name: str, complaint: str) -> NoReturn:
        raise UsageError(f"{self.option(name)} {short(getattr(self.given, name))}: {complaint}")

    def _expanded(self, name: str) -> Any:
        """Return the value of an option that takes text: None, a str, or whatever ``{expr}`` is."""
        text = getattr(self.given, name)
        if text is None:
            return None
        try:
            return expand(text, self._namespace)
        except EvaluationError as error:
            self._complain(name, str(error))

    def integer(self, name: str, default: int, *, least: int) -> int:
        """Return a whole number, no less than `least`."""
        value = self._expanded(name)
        if value is None:
            return default
        try:
            number = int(value) if isinstance(value, str) else value.__index__()
        except (ValueError, TypeError, AttributeError):
            self._complain(name, "a whole number is needed.")
        if number < least:
            self._complain(name, f"{number} is too few; at least {least}." if least else f"{number} is negative.")
        return int(number)

    def integer_if_given(self, name: str, *, least: int) -> int | None:
        """Return a whole number, no less than `least`."""
        return None if getattr(self.given, name) is None else self.integer(name, least, least=least)

    def text(self, name: str) -> str | None:
        """Return text."""
        value = self._expanded(name)
        if value is not None and not isinstance(value, str):
            self._complain(name, f"text is needed, not {type(value).__name__}.")
        return value

    def directory(self, name: str) -> str | None:
        """Return a path that means the same on another machine: absolute, or as it is where it names a file system."""
        value = self.text(name)
        if value is None or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value):
            return value
        if not value:
            self._complain(name, "the name of a directory is needed.")
        return os.path.abspath(os.path.expanduser(value))

    def names(self, name: str) -> tuple[str, ...] | None:
        """Return names of columns, at least one, each once."""
        value = self._expanded(name)
        if value is None:
            return None
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if (
            not isinstance(parts, list | tuple)
            or not all(isinstance(part, str) and part for part in parts)
            or not parts
        ):
            self._complain(name, "column names are needed, as in a,b,c or a list of str.")
        repeated = sorted({part for part in parts if parts.count(part) > 1})
        if repeated:
            self._complain(name, f"{repeated[0]} is there twice.")
        return tuple(parts)

    def variable(self, name: str) -> str | None:
        """Return the name of a variable, which need not be there."""
        value = self.text(name)
        if value is not None and not is_variable(value):
            self._complain(name, "a variable name is needed.")
        return value

    def choice(self, name: str, known: Sequence[str]) -> str | None:
        """Return one of `known`."""
        value = self.text(name)
        if value is not None and value not in known:
            self._complain(name, f"one of {', '.join(known)} is needed.{did_you_mean(value, known)}")
        return value

    def schema(self, name: str) -> str | None:
        """Return names and types as Spark's SQL writes them; ``{expr}`` may be a ``StructType``."""
        value = self._expanded(name)
        if value is not None and not isinstance(value, str) and hasattr(value, "simpleString"):
            return str(value.simpleString())
        return self.text(name)

    def session(self) -> str | None:
        """Return the name of something in the notebook."""
        name = self.text("session")
        if name is not None and name not in self._namespace:
            self._complain("session", f"the notebook has no such name.{did_you_mean(name, self._namespace)}")
        return name

    def duration(self, name: str) -> float | None:
        """Return seconds."""
        value = self._expanded(name)
        if value is None:
            return None
        seconds = parse_duration(value) if isinstance(value, str) else value
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
            self._complain(name, "a time is needed, as in 90, 90s, 10m, 2h or 1h30m.")
        return float(seconds)

    def steps_or_time(self, name: str) -> tuple[int | None, float | None]:
        """Return a number of steps or of seconds: a bare number is steps; (None, None) when it was not given."""
        value = self._expanded(name)
        if value is None:
            return None, None
        text = str(value).strip()
        if text.isdecimal() and int(text):
            return int(text), None
        seconds = None if re.fullmatch(r"[\d.]*", text) else parse_duration(text)
        if not seconds:
            self._complain(name, "a number of steps or a time is needed, as in 500, 90s or 10m.")
        return None, seconds

    def _object(self, name: str) -> Any:
        text = unwrapped(getattr(self.given, name))
        try:
            return evaluate(text, self._namespace)
        except EvaluationError as error:
            self._complain(name, str(error))

    def _object_or_json(self, name: str) -> Any:
        try:
            return json.loads(getattr(self.given, name))
        except ValueError:
            return self._object(name)

    def frame(self, name: str) -> Any:
        """Return a Spark DataFrame."""
        if getattr(self.given, name) is None:
            return None
        value = self._object(name)
        complaint = why_no_frame(value)
        if complaint:
            self._complain(name, complaint)
        return value

    def arguments(self) -> Mapping[str, Any] | None:
        """Return what ``--args`` holds, by attribute name."""
        if self.given.args is None:
            return None
        value = self._object_or_json("args")
        if not isinstance(value, Mapping):
            value = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else value
        if not isinstance(value, Mapping):
            self._complain("args", f"a dict, a Namespace or JSON is needed, not {type(value).__name__}.")
        self._require_attributes("args", value)
        return dict(value)

    def grid(self) -> tuple[Mapping[str, Any], ...] | None:
        """Return the points of ``--grid``: a list's items, or all combinations of a dict's, the last key fastest."""
        if self.given.grid is None:
            return None
        value = self._object_or_json("grid")
        points = self._combinations(value) if isinstance(value, Mapping) else self._points(value)
        if not points:
            self._complain("grid", "it has no points.")
        return points

    def _points(self, value: Any) -> tuple[dict[str, Any], ...]:
        if not isinstance(value, list | tuple):
            self._complain("grid", f"a list of dicts or a dict of lists is needed, not {type(value).__name__}.")
        for number, point in enumerate(value):
            if not isinstance(point, Mapping):
                self._complain("grid", f"item {number} is no dict, but {type(point).__name__}.")
            self._require_attributes("grid", point)
        return tuple(dict(point) for point in value)

    def _combinations(self, value: Mapping[Any, Any]) -> tuple[dict[str, Any], ...]:
        self._require_attributes("grid", value)
        lists = [self._values_of(key, values) for key, values in value.items()]
        return tuple(dict(zip(value, point, strict=True)) for point in itertools.product(*lists) if point)

    def _values_of(self, key: str, values: Any) -> Sequence[Any]:
        if callable(getattr(values, "tolist", None)):  # NumPy's: np.logspace(…) is what one writes here
            values = values.tolist()
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            self._complain("grid", f"{key} needs a list of values, not {type(values).__name__}.")
        if not values:
            self._complain("grid", f"{key} has no values.")
        return values

    def _require_attributes(self, name: str, value: Mapping[Any, Any]) -> None:
        wrong = [key for key in value if not (isinstance(key, str) and is_variable(key))]
        if wrong:
            self._complain(name, f"{wrong[0]!r} cannot be an attribute of args.")


def why_no_frame(value: Any) -> str:
    """Return what is wrong with a value that should be a Spark DataFrame; empty when it is one."""
    classes = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(value).__mro__}
    if "pyspark.DataFrame" in classes and "pyspark.GroupedData" not in classes and hasattr(value, "schema"):
        return ""
    if "pandas.DataFrame" in classes:
        return "it is a pandas DataFrame; spark.createDataFrame(…) makes a Spark DataFrame of it."
    if "pyspark.RDD" in classes:
        return "it is an RDD; rdd.toDF([…]) makes a DataFrame of it."
    return f"a Spark DataFrame is needed, not {type(value).__name__}."


def parse_duration(text: str) -> float | None:
    """Return seconds of ``90``, ``90s``, ``10m``, ``2h`` or ``1h30m``; None when it is no duration."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if match is None or not any(match.groups()):
        return None
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return hours * 3600 + minutes * 60 + seconds
