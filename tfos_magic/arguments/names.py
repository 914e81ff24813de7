"""Which of the notebook's names fit where: for completion, and for "did you mean".

Runs on: notebook.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tfos_magic.arguments.values import why_no_frame

Chooser = Callable[[Mapping[str, Any]], list[str]]


def names_of_frames(namespace: Mapping[str, Any]) -> list[str]:
    """Return the notebook's names that ``--data`` accepts."""
    return [name for name, value in _visible(namespace) if not why_no_frame(value)]


def names_of_sessions(namespace: Mapping[str, Any]) -> list[str]:
    """Return the notebook's names that ``--session`` accepts."""
    return [name for name, value in _visible(namespace) if _is_session(value)]


def names_of_arguments(namespace: Mapping[str, Any]) -> list[str]:
    """Return the notebook's names that ``--args`` accepts."""
    return [name for name, value in _visible(namespace) if isinstance(value, dict | argparse.Namespace)]


def names_of_grids(namespace: Mapping[str, Any]) -> list[str]:
    """Return the notebook's names that ``--grid`` accepts, or nearly: the items of a dict are not looked at."""
    return [
        name
        for name, value in _visible(namespace)
        if (isinstance(value, dict) and value) or (isinstance(value, list | tuple) and value and _are_dicts(value))
    ]


def _are_dicts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def names_of_functions(namespace: Mapping[str, Any]) -> list[str]:
    """Return the functions that the notebook itself defines."""
    return [
        name
        for name, value in _visible(namespace)
        if getattr(value, "__module__", "") == "__main__" and callable(value)
    ]


def names_of_all(namespace: Mapping[str, Any]) -> list[str]:
    """Return all that the notebook has a name for."""
    return [name for name, _ in _visible(namespace)]


def names_of_predictors(namespace: Mapping[str, Any]) -> list[str]:
    """Return the notebook's functions and Keras models."""
    models = [name for name, value in _visible(namespace) if hasattr(type(value), "predict_on_batch")]
    return [*names_of_functions(namespace), *models]


def columns_of(text: str, namespace: Mapping[str, Any]) -> list[str]:
    """Return the columns of the DataFrame called `text`; empty when it is not a plain name of one."""
    value = namespace.get(text)
    return list(value.columns) if value is not None and not why_no_frame(value) else []


def _visible(namespace: Mapping[str, Any]) -> list[tuple[str, Any]]:
    hidden = {"In", "Out"}
    return [(name, value) for name, value in list(namespace.items()) if not name.startswith("_") and name not in hidden]


def _is_session(value: Any) -> bool:
    names = {kind.__name__ for kind in type(value).__mro__ if kind.__module__.startswith("pyspark")}
    return bool(names & {"SparkSession", "SparkContext"})
