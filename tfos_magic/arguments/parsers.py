"""What each magic's line may have, as argparse's parsers; their help texts are the magics' documentation.

Runs on: notebook. Every value stays text here.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
from collections.abc import Sequence
from typing import NoReturn

from tfos_magic.errors import UsageError

_TRAIN = """\
Run the cell on N Spark executors, one TensorFlow node on each.

The cell is the function: `args` and `ctx` are there, and the value of its last expression comes back from each node.
A cell that only defines a function of (args, ctx) is used as TensorFlowOnSpark's map_fun.
As a line, %tfos_train --executors 2 NAME runs a function of the notebook."""

_TRAIN_EXAMPLE = """\
{expr} and $name stand for values of the notebook. --data, --validation, --args and --grid are Python expressions.

example:
  %%tfos_train --executors 4 --data train_df --validation test_df --epochs 5 --out result
  import keras
  model = keras.Sequential([keras.layers.Dense(64, "relu"), keras.layers.Dense(10, "softmax")])
  model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
  ctx.distribute(model)
  model.fit(ctx.dataset(), validation_data=ctx.dataset("validation"), epochs=args.epochs)"""

_INFER = """\
Add predictions to a DataFrame: the cell runs once on each of N Spark executors, and what it ends with predicts.

That is a function of one batch (column name → NumPy array), or a Keras model. The function returns the new columns:
a dict (column name → one value per row), or one array, which is called prediction.
The result is lazy: rows and order are those of --data, and each action on it asks the nodes, which stay with their
models until %tfos_stop. With --save everything is computed once, and the nodes end.
As a line, %tfos_infer NAME takes a function of a batch, one of (args, ctx) that returns it, or a Keras model."""

_INFER_EXAMPLE = """\
{expr} and $name stand for values of the notebook. --data and --args are Python expressions.

example:
  %%tfos_infer --executors 2 --data df --out scored
  import keras
  model = keras.models.load_model(path)        # once per node
  def predict(batch):
      return {"score": model.predict_on_batch(batch["x"])[:, 0]}"""


_DOCTOR = """\
Say what happens to an object on its way to an executor and back: does it pickle, how large is it, what does it drag
along, what arrives. Each finding breaks, is silently wrong, or is costly; with the reason, and with what to type.

EXPR is a Python expression in the notebook: an object, a function, a class.
As %%tfos_doctor above a cell: what the cell takes from the notebook, as %%tfos_train would ship it."""

_DOCTOR_EXAMPLE = """\
example:
  %tfos_doctor train_step
  %tfos_doctor {"model": model, "rows": rows[:10]} --executors --out diagnosis"""


_LOGS = """\
Print what the nodes of a run wrote to stdout and stderr: of all nodes, of NODE (worker:1), or of a role (worker).

The driver keeps at least the last 8 MiB of each node in files, for the runs that %tfos_status shows; r.log_files says
where. In a flood a node sends its first and last lines, and counts those in between."""

_LOGS_EXAMPLE = """\
example:
  %tfos_logs worker:1 --tail 100
  %tfos_logs --grep 'loss|nan' --run run1"""


class _Parser(argparse.ArgumentParser):
    """An argparse parser that neither prints nor exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}.")


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of ``%%tfos_train``."""
    parser = _begin("tfos_train", "--executors N [options]", _TRAIN, _TRAIN_EXAMPLE)
    add = parser.add_argument
    add("function", nargs="?", metavar="NAME", help="line magic only: a notebook function of (args, ctx)")
    _add_executors(parser)
    add("--data", metavar="DF", help="a DataFrame: what ctx.dataset() reads, dealt over all nodes")
    add("--validation", metavar="DF", help='a second one, for ctx.dataset("validation")')
    add("--epochs", metavar="N", help="args.epochs (default 1)")
    add("--batch-size", metavar="N", help="args.batch_size, rows per step and node (default 64)")
    add("--label", metavar="COLUMN", help="the label (default: a column called label, y or target)")
    add("--features", metavar="A,B,…", help="the feature columns, in this order (default: all others)")
    add("--weight", metavar="COLUMN", help="the sample weights")
    add("--no-shuffle", action="store_true", help="keep the rows of a node in the order of their arrival")
    add("--seed", metavar="N", help="makes shuffling and dropout repeatable; nodes differ")
    _add_args(parser)
    add("--out", metavar="NAME", help="bind the result to this name")
    add("--tensorboard", metavar="DIR", help="write metrics, feed and GPU figures there; TensorBoard shows them")
    add("--background", action="store_true", help="return at once: the result is a handle with wait() and stop()")
    add("--ps", metavar="K", help="K of the nodes are parameter servers")
    chief = argparse.BooleanOptionalAction
    add("--chief", action=chief, default=True, help="node 0 is the chief (default), or a worker")
    add("--evaluator", action="store_true", help="one of the nodes is an evaluator")
    add("--independent", action="store_true", help="nodes know nothing of each other, and start as slots come")
    grid = "with --independent: a list of dicts, or a dict of lists for all combinations; one node for each, in args"
    add("--grid", metavar="EXPR", help=grid)
    _add_checkpoints(parser)
    add("--save", metavar="DIR", help="the chief leaves the trained model there: .keras and SavedModel")
    add("--accumulate", metavar="K", help="add up the gradients of K batches before nodes exchange them (default 1)")
    add("--wire-dtype", metavar="DTYPE", help="gradients on their way: float32 (default) or bfloat16")
    _add_the_rest(parser)
    return parser


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="save the state of training there, at the end of each epoch")
    add("--checkpoint-every", metavar="EVERY", help="and meanwhile: after so many steps (500), or a time (10m)")
    add("--keep-checkpoints", metavar="K", help="how many of the newest stay (default 3)")
    add("--resume", action="store_true", help="go on with the newest checkpoint in DIR")
    add("--max-restarts", metavar="N", help="start again so often when a node is lost (default 0)")


def infer_parser() -> argparse.ArgumentParser:
    """Return the parser of ``%%tfos_infer``."""
    parser = _begin("tfos_infer", "--executors N --data DF --out NAME [options]", _INFER, _INFER_EXAMPLE)
    add = parser.add_argument
    add("function", nargs="?", metavar="NAME", help="line magic only: a notebook function, or a Keras model")
    _add_executors(parser)
    add("--data", metavar="DF", help="the DataFrame to predict for")
    add("--out", metavar="NAME", help="bind the DataFrame with the predictions to this name")
    add("--features", metavar="A,B,…", help="the columns that nodes get (default: all)")
    add("--keep", metavar="A,B,…", help="the columns of --data that the result has too (default: all)")
    add("--schema", metavar="TYPES", help='the new columns, as in "score float" (default: asked with a few rows)')
    add("--batch-size", metavar="N", help="rows in a batch at most (default 1024)")
    add("--save", metavar="PATH", help="compute everything now, and write it as Parquet")
    add("--mode", metavar="MODE", help="if there is something at PATH: error (default), overwrite, append, ignore")
    _add_args(parser)
    _add_the_rest(parser)
    return parser


def doctor_parser() -> argparse.ArgumentParser:
    """Return the parser of ``%tfos_doctor``; the expression is taken out of the line before."""
    parser = _begin("tfos_doctor", "EXPR [options]", _DOCTOR, _DOCTOR_EXAMPLE)
    parser.usage = "%%tfos_doctor EXPR [options]"
    add = parser.add_argument
    add("--executors", action="store_true", help="send it to the session's executors, too")
    add("--session", metavar="NAME", help="the Spark session for --executors (default: spark, sc, or the active one)")
    add("--out", metavar="NAME", help="bind the diagnosis to this name")
    add("--help", "-h", action="store_true", help="this text")
    return parser


def logs_parser() -> argparse.ArgumentParser:
    """Return the parser of ``%tfos_logs``."""
    parser = _begin("tfos_logs", "[NODE] [options]", _LOGS, _LOGS_EXAMPLE)
    parser.usage = "%%tfos_logs [NODE] [options]"
    add = parser.add_argument
    add("node", nargs="?", metavar="NODE", help="a node or a role (default: all nodes)")
    add("--run", metavar="NAME", help="the run (default: the last one)")
    add("--tail", metavar="N", help="so many lines of each node (default 20)")
    add("--grep", metavar="RE", help="only lines in which this regular expression is found; in quotes")
    add("--help", "-h", action="store_true", help="this text")
    return parser


def _begin(name: str, usage: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return _Parser(
        f"%%{name}",
        usage=f"%%%%{name} {usage}",
        description=description,
        epilog=epilog,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=100),
        allow_abbrev=False,
        add_help=False,
    )


def _add_executors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--executors", "--nodes", "-n", metavar="N", help="how many nodes, all roles together")


def _add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--args", metavar="EXPR", help="a dict, a Namespace or JSON: further attributes of args")


def _add_the_rest(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    gpus = "GPUs of each node (default: those that Spark assigns to its task, else 1 where one is free)"
    add("--gpus-per-node", metavar="N", help=gpus)
    add("--timeout", metavar="TIME", help="give up after 90, 90s, 10m, 2h, 1h30m")
    add("--session", metavar="NAME", help="the Spark session (default: spark, sc, or the active one)")
    add("--dry-run", action="store_true", help="show what would be shipped and where nodes would run")
    add("--quiet", action="store_true", help="no board")
    add("--help", "-h", action="store_true", help="this text")


PARSERS = {
    "tfos_train": train_parser,
    "tfos_infer": infer_parser,
    "tfos_doctor": doctor_parser,
    "tfos_logs": logs_parser,
}
"""The name of each magic with options → what makes its parser."""


def option_strings(magic: str) -> dict[str, argparse.Action]:
    """Every option of a magic as typed → its argparse action; for completion."""
    return {text: action for action in PARSERS[magic]()._actions for text in action.option_strings}


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return which option has which text; UsageError for what is no option."""
    given, rest = parser.parse_known_args(_protect_negative_numbers(words))
    for word in rest:
        if not word.startswith("-"):
            raise UsageError(f"Unexpected {word!r}. Options begin with --; quote values that hold spaces.")
        name = word.partition("=")[0]
        known = [text for action in parser._actions for text in action.option_strings]
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"Did you mean {close[0]}?" if close else f"See {parser.prog[1:]} --help."
        raise UsageError(f"Unknown option {name}. {advice}")
    return given


def _protect_negative_numbers(words: Sequence[str]) -> list[str]:
    """Join ``--epochs -1`` to ``--epochs=-1``: the range check has the better words for it."""
    joined: list[str] = []
    for word in words:
        if re.fullmatch(r"-\d[\d.]*", word) and joined and joined[-1].startswith("-") and "=" not in joined[-1]:
            joined[-1] += ("=" if joined[-1].startswith("--") else "") + word
        else:
            joined.append(word)
    return joined
