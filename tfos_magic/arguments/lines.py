"""The magics' lines, checked.

Runs on: notebook.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tfos_magic.arguments.names import names_of_frames
from tfos_magic.arguments.parsers import infer_parser, parse_words, train_parser
from tfos_magic.arguments.values import Converter
from tfos_magic.arguments.words import split
from tfos_magic.errors import UsageError
from tfos_magic.training.options import WIRE_DTYPES, TrainingOptions

SAVE_MODES = ("error", "errorifexists", "overwrite", "append", "ignore")
"""Spark's, for ``--mode``."""


class HelpRequestedError(Exception):
    """``--help`` was given; not an error for the user. The message is the help text."""


@dataclass(frozen=True)
class Line:
    """What the lines of both magics have. Fields that RunOptions has too are called the same and mean the same."""

    FOR_ARGS: ClassVar[tuple[str, ...]] = ("batch_size", "features")
    """What the function finds in its ``args``."""

    executors: int
    function: str | None = None
    """Name of something in the notebook; only for the line magic."""
    data: Any = None
    batch_size: int = 64
    features: tuple[str, ...] | None = None
    args: Mapping[str, Any] | None = None
    out: str | None = None
    gpus_per_node: int | None = None
    timeout_s: float | None = None
    session: str | None = None
    is_dry_run: bool = False
    is_quiet: bool = False


@dataclass(frozen=True)
class TrainLine(Line):
    """The line of ``%%tfos_train``, checked."""

    FOR_ARGS = ("epochs", "batch_size", "label", "features", "weight", "shuffle", "seed")

    validation: Any = None
    epochs: int = 1
    label: str | None = None
    weight: str | None = None
    shuffle: bool = True
    seed: int | None = None
    tensorboard_dir: str | None = None
    is_background: bool = False
    ps: int = 0
    chief: bool = True
    evaluator: bool = False
    is_independent: bool = False
    grid: tuple[Mapping[str, Any], ...] | None = None
    """One point for each node."""
    max_restarts: int = 0
    training: TrainingOptions = field(default_factory=TrainingOptions)


@dataclass(frozen=True)
class InferLine(Line):
    """The line of ``%%tfos_infer``, checked; ``data`` and ``out`` are there."""

    out: str = ""
    batch_size: int = 1024
    schema: str | None = None
    keep: tuple[str, ...] | None = None
    save: str | None = None
    mode: str = "error"


def parse_train(line: str, namespace: Mapping[str, Any]) -> TrainLine:
    """Parse and check the line of ``%%tfos_train``.

    Parameters
    ----------
    line : str
        What follows the magic's name.
    namespace : mapping of str to object
        The notebook's globals.

    Raises
    ------
    UsageError
        One line, naming the option and, where one is close, what may have been meant.
    HelpRequestedError
        ``--help`` is among the options.
    """
    given = _read(train_parser(), line)
    values = Converter(given, namespace)
    grid = _grid(values)
    parsed = TrainLine(
        **_common(values, num_nodes=len(grid) if grid else None),
        validation=values.frame("validation"),
        epochs=values.integer("epochs", 1, least=1),
        batch_size=values.integer("batch_size", TrainLine.batch_size, least=1),
        label=values.text("label"),
        weight=values.text("weight"),
        shuffle=not given.no_shuffle,
        seed=values.integer_if_given("seed", least=0),
        out=values.variable("out"),
        tensorboard_dir=values.text("tensorboard"),
        is_background=given.background,
        ps=values.integer("ps", 0, least=0),
        chief=given.chief and not given.independent,
        evaluator=given.evaluator,
        is_independent=given.independent,
        grid=grid,
        max_restarts=values.integer("max_restarts", 0, least=0),
        training=_training(values),
    )
    _check_roles(parsed)
    return parsed


_NOT_FED = "independent nodes are not fed. Read files in the cell; what df.toPandas() gives travels by its name"
_SAME_DIRECTORY = (
    "independent nodes would overwrite each other's files. Write them in the cell, to a path with ctx.executor_id in it"
)
_NOT_INDEPENDENT = {
    "data": _NOT_FED,
    "validation": _NOT_FED,
    "ps": "independent nodes have nothing that others serve. Leave one of the two away",
    "evaluator": "independent nodes have nobody to watch: each evaluates by itself. Leave one of the two away",
    "checkpoint": _SAME_DIRECTORY,
    "save": _SAME_DIRECTORY,
    "max_restarts": "it starts all nodes again, also those that are done. Run the cell again for what is missing",
}
"""What ``--independent`` rules out → why, and what to do."""


def _grid(values: Converter) -> tuple[Mapping[str, Any], ...] | None:
    """Return the points of the grid, one for each node, after a look at what goes with it."""
    given = values.given
    if not given.independent:
        if given.grid is not None:
            raise UsageError("--grid needs --independent: each node works at one point of the grid, for itself.")
        return None
    for option, reason in _NOT_INDEPENDENT.items():
        if getattr(given, option):
            raise UsageError(f"{values.option(option)} does not go with --independent: {reason}.")
    grid = values.grid()
    count = values.integer_if_given("executors", least=1)
    if grid is not None and count not in (None, len(grid)):
        raise UsageError(
            f"--executors {count}: the grid has {len(grid)} points, and each is a node. Leave --executors away: "
            "as many nodes run at once as there are free slots."
        )
    return grid


def _training(values: Converter) -> TrainingOptions:
    given = values.given
    if given.checkpoint is None:
        for option in ("resume", "checkpoint_every", "keep_checkpoints"):
            if getattr(given, option):
                raise UsageError(f"{values.option(option)} needs --checkpoint DIR: where are the checkpoints?")
    steps, seconds = values.steps_or_time("checkpoint_every")
    return TrainingOptions(
        checkpoint_dir=values.directory("checkpoint"),
        checkpoint_every_steps=steps,
        checkpoint_every_s=seconds,
        keep_checkpoints=values.integer("keep_checkpoints", TrainingOptions.keep_checkpoints, least=1),
        resume=given.resume,
        save_dir=values.directory("save"),
        accumulate=values.integer("accumulate", 1, least=1),
        wire_dtype=values.choice("wire_dtype", WIRE_DTYPES) or TrainingOptions.wire_dtype,
    )


def parse_infer(line: str, namespace: Mapping[str, Any]) -> InferLine:
    """Parse and check the line of ``%%tfos_infer``; parameters and errors as in :func:`parse_train`."""
    given = _read(infer_parser(), line)
    values = Converter(given, namespace)
    common = _common(values)
    if given.data is None:
        frame = next(iter(names_of_frames(namespace)), "df")
        raise UsageError(f"--data is missing: which DataFrame? For example --data {frame}.")
    if given.out is None:
        raise UsageError("--out is missing: what is the DataFrame with the predictions to be called? --out preds.")
    if given.mode is not None and given.save is None:
        raise UsageError(f"--mode {given.mode} says how to write, but --save is missing: --save PATH.")
    return InferLine(
        **common,
        batch_size=values.integer("batch_size", InferLine.batch_size, least=1),
        out=values.variable("out") or "",
        schema=values.schema("schema"),
        keep=values.names("keep"),
        save=values.text("save"),
        mode=values.choice("mode", SAVE_MODES) or InferLine.mode,
    )


def _read(parser: argparse.ArgumentParser, line: str) -> argparse.Namespace:
    words = split(line)
    if "--help" in words or "-h" in words:
        raise HelpRequestedError(parser.format_help())
    return parse_words(parser, words)


def _common(values: Converter, num_nodes: int | None = None) -> dict[str, Any]:
    """Return what both magics have; `num_nodes` is what the other options say of --executors."""
    given = values.given
    if given.executors is None and num_nodes is None:
        raise UsageError("--executors is missing: on how many executors? For example --executors 2.")
    return {
        "executors": values.integer("executors", num_nodes or 1, least=1),
        "function": values.text("function"),
        "data": values.frame("data"),
        "features": values.names("features"),
        "args": values.arguments(),
        "gpus_per_node": values.integer_if_given("gpus_per_node", least=0),
        "timeout_s": values.duration("timeout"),
        "session": values.session(),
        "is_dry_run": given.dry_run,
        "is_quiet": given.quiet,
    }


def _check_roles(line: TrainLine) -> None:
    workers = line.executors - line.ps - line.evaluator
    if workers < 1:
        others = [f"--ps {line.ps}"] * bool(line.ps) + ["--evaluator"] * line.evaluator
        raise UsageError(
            f"--executors {line.executors} with {' and '.join(others)} leaves no node that trains: "
            f"at least --executors {line.ps + line.evaluator + 1}."
        )
