"""The magics' lines: from what a person typed to checked values.

Runs on: notebook.

    "--executors {n} --data df.limit(9) --label y"
        │ split        whitespace, quotes as in a shell; brackets hold together
        ▼ parse        argparse: which option has which text
        ▼ expand       {expr} and $name, option by option, in the notebook's namespace
        ▼ convert      numbers, durations, names; ranges checked
    TrainLine

**What is expanded.** In options that take text or a number, ``{expr}`` and ``$name`` stand for the value of a Python
expression; alone they keep its type (``--features {columns}`` may be a list), inside text they become ``str(value)``.
``{{``, ``}}`` and ``$$`` are the characters themselves, and braces around something that is no Python expression stay
as they are. Options that take an object (``--data``, ``--validation``, ``--args``) are Python expressions already, so
``df``, ``{df}`` and ``$df`` are the same there, and ``{"lr": 0.1}`` is a dict, quoted or not.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from tfos_magic.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class TrainLine:
    """The line of ``%%tfos_train``, checked."""

    executors: int
    function: str | None = None
    """Name of a notebook function to run; only for the line magic."""
    data: Any = None
    validation: Any = None
    epochs: int = 1
    batch_size: int = 64
    label: str | None = None
    features: tuple[str, ...] | None = None
    weight: str | None = None
    shuffle: bool = True
    seed: int | None = None
    args: Mapping[str, Any] | None = None
    out: str | None = None
    ps: int = 0
    chief: bool = True
    evaluator: bool = False
    timeout_s: float | None = None
    session: str | None = None
    is_dry_run: bool = False
    is_quiet: bool = False


class HelpRequestedError(Exception):
    """``--help`` was given; not an error for the user."""


_DESCRIPTION = """\
Run the cell on N Spark executors, one TensorFlow node on each.

The cell is the function: `args` and `ctx` are there, and the value of its last expression comes back from each node.
A cell that only defines a function of (args, ctx) is used as TensorFlowOnSpark's map_fun.
As a line, %tfos_train --executors 2 NAME runs a function of the notebook."""

_EPILOG = """\
{expr} and $name stand for values of the notebook. --data, --validation and --args are Python expressions.

example:
  %%tfos_train --executors 4 --data train_df --validation test_df --epochs 5 --out result
  import keras
  model = keras.Sequential([keras.layers.Dense(64, "relu"), keras.layers.Dense(10, "softmax")])
  model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
  ctx.distribute(model)
  model.fit(ctx.dataset(), validation_data=ctx.dataset("validation"), epochs=args.epochs)"""


class _Parser(argparse.ArgumentParser):
    """An argparse parser that neither prints nor exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}.")


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of ``%%tfos_train``; every value stays text."""
    parser = _Parser(
        "%%tfos_train",
        usage="%%%%tfos_train --executors N [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=100),
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "function", nargs="?", metavar="NAME", help="line magic only: a notebook function of (args, ctx)"
    )
    add = parser.add_argument
    add("--executors", "--nodes", "-n", metavar="N", help="how many nodes, all roles together")
    add("--data", metavar="DF", help="a DataFrame: what ctx.dataset() reads, dealt over all nodes")
    add("--validation", metavar="DF", help='a second one, for ctx.dataset("validation")')
    add("--epochs", metavar="N", help="args.epochs (default 1)")
    add("--batch-size", metavar="N", help="args.batch_size, rows per step and node (default 64)")
    add("--label", metavar="COLUMN", help="the label (default: a column called label, y or target)")
    add("--features", metavar="A,B,…", help="the feature columns, in this order (default: all others)")
    add("--weight", metavar="COLUMN", help="the sample weights")
    add("--no-shuffle", action="store_true", help="keep the rows of a node in the order of their arrival")
    add("--seed", metavar="N", help="makes shuffling repeatable")
    add("--args", metavar="EXPR", help="a dict, a Namespace or JSON: further attributes of args")
    add("--out", metavar="NAME", help="bind the result to this name")
    add("--ps", metavar="K", help="K of the nodes are parameter servers")
    add(
        "--chief",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="node 0 is the chief (default), or a worker",
    )
    add("--evaluator", action="store_true", help="one of the nodes is an evaluator")
    add("--timeout", metavar="TIME", help="give up after 90, 90s, 10m, 2h, 1h30m")
    add("--session", metavar="NAME", help="the Spark session (default: spark, sc, or the active one)")
    add("--dry-run", action="store_true", help="show what would be shipped and where nodes would run")
    add("--quiet", action="store_true", help="no board")
    add("--help", "-h", action="store_true", help="this text")
    return parser


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
    parser = train_parser()
    words = split(line)
    if "--help" in words or "-h" in words:
        raise HelpRequestedError
    given = _parse_words(parser, words)
    return _Converter(given, namespace).train_line()


def option_strings() -> dict[str, argparse.Action]:
    """Every option as typed → its argparse action; for completion."""
    return {text: action for action in train_parser()._actions for text in action.option_strings}


# --- splitting ---------------------------------------------------------------------------------------------

_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def split(line: str) -> list[str]:
    """Split a line as a shell would, but keep brackets together.

    Quotes hold words together and disappear, except within brackets, where they belong to the expression.

    Examples
    --------
    >>> split('--data df.filter("x > 1") --label "my label"')
    ['--data', 'df.filter("x > 1")', '--label', 'my label']
    """
    words: list[str] = []
    position = 0
    while position < len(line):
        if line[position].isspace():
            position += 1
            continue
        word, position = _word(line, position)
        words.append(word)
    return words


def _word(line: str, position: int) -> tuple[str, int]:
    pieces: list[str] = []
    while position < len(line) and not line[position].isspace():
        character = line[position]
        if character in "\"'":
            end = _closing_quote(line, position)
            pieces.append(_unescape(line[position + 1 : end - 1], character))
        elif character in _BRACKETS:
            end = _closing_bracket(line, position)
            pieces.append(line[position:end])
        elif character == "\\" and position + 1 < len(line):
            end = position + 2
            pieces.append(line[position + 1])
        else:
            end = position + 1
            pieces.append(character)
        position = end
    return "".join(pieces), position


def _closing_quote(line: str, start: int) -> int:
    """Return the position after the quote that closes the one at `start`."""
    position = start + 1
    while position < len(line):
        if line[position] == "\\" and line[start] == '"':
            position += 2
        elif line[position] == line[start]:
            return position + 1
        else:
            position += 1
    raise UsageError(f"The quote in {_short(line[start:])} is never closed.")


def _unescape(text: str, quote: str) -> str:
    return re.sub(r'\\(["\\$`])', r"\1", text) if quote == '"' else text


def _closing_bracket(line: str, start: int) -> int:
    """Return the position after the bracket that closes the one at `start`."""
    open_brackets: list[str] = []
    position = start
    while position < len(line):
        character = line[position]
        if character in "\"'":
            position = _closing_quote(line, position)
            continue
        if character in _BRACKETS:
            open_brackets.append(_BRACKETS[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
            if not open_brackets:
                return position + 1
        position += 1
    raise UsageError(f"The bracket in {_short(line[start:])} is never closed.")


# --- argparse ----------------------------------------------------------------------------------------------


def _parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    given, rest = parser.parse_known_args(_protect_negative_numbers(words))
    for word in rest:
        if not word.startswith("-"):
            raise UsageError(f"Unexpected {word!r}. Options begin with --; quote values that hold spaces.")
        name = word.partition("=")[0]
        known = [text for action in parser._actions for text in action.option_strings]
        close = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"Unknown option {name}. Did you mean {close[0]}?"
            if close
            else f"Unknown option {name}. See %tfos_train --help."
        )
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


# --- values ------------------------------------------------------------------------------------------------


class _Converter:
    """Makes values of an option's text, so that every complaint begins with the option."""

    def __init__(self, given: argparse.Namespace, namespace: Mapping[str, Any]) -> None:
        self._given = given
        self._namespace = namespace

    def train_line(self) -> TrainLine:
        given = self._given
        if given.executors is None:
            raise UsageError("--executors is missing: on how many executors? For example --executors 2.")
        line = TrainLine(
            executors=self._integer("executors", 1, least=1),
            function=self._text("function"),
            data=self._frame("data"),
            validation=self._frame("validation"),
            epochs=self._integer("epochs", 1, least=1),
            batch_size=self._integer("batch_size", 64, least=1),
            label=self._text("label"),
            features=self._names("features"),
            weight=self._text("weight"),
            shuffle=not given.no_shuffle,
            seed=None if given.seed is None else self._integer("seed", 0, least=0),
            args=self._arguments(),
            out=self._out(),
            ps=self._integer("ps", 0, least=0),
            chief=given.chief,
            evaluator=given.evaluator,
            timeout_s=self._duration(),
            session=self._session(),
            is_dry_run=given.dry_run,
            is_quiet=given.quiet,
        )
        _check_roles(line)
        return line

    def _option(self, name: str) -> str:
        return "NAME" if name == "function" else f"--{name.replace('_', '-')}"

    def _complain(self, name: str, complaint: str) -> NoReturn:
        raise UsageError(f"{self._option(name)} {_short(getattr(self._given, name))}: {complaint}")

    def _expanded(self, name: str) -> Any:
        """Return the value of an option that takes text: None, a str, or whatever ``{expr}`` is."""
        text = getattr(self._given, name)
        if text is None:
            return None
        try:
            return expand(text, self._namespace)
        except _EvaluationError as error:
            self._complain(name, str(error))

    def _integer(self, name: str, default: int, *, least: int) -> int:
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

    def _text(self, name: str) -> str | None:
        value = self._expanded(name)
        if value is not None and not isinstance(value, str):
            self._complain(name, f"text is needed, not {type(value).__name__}.")
        return value

    def _names(self, name: str) -> tuple[str, ...] | None:
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

    def _out(self) -> str | None:
        name = self._text("out")
        if name is not None and not _is_variable(name):
            self._complain("out", "a variable name is needed.")
        return name

    def _session(self) -> str | None:
        name = self._text("session")
        if name is not None and name not in self._namespace:
            self._complain("session", f"the notebook has no such name.{did_you_mean(name, self._namespace)}")
        return name

    def _duration(self) -> float | None:
        value = self._expanded("timeout")
        if value is None:
            return None
        seconds = parse_duration(value) if isinstance(value, str) else value
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
            self._complain("timeout", "a time is needed, as in 90, 90s, 10m, 2h or 1h30m.")
        return float(seconds)

    def _object(self, name: str) -> Any:
        text = _unwrapped(getattr(self._given, name))
        try:
            return evaluate(text, self._namespace)
        except _EvaluationError as error:
            self._complain(name, str(error))

    def _frame(self, name: str) -> Any:
        if getattr(self._given, name) is None:
            return None
        value = self._object(name)
        complaint = _why_no_frame(value)
        if complaint:
            self._complain(name, complaint)
        return value

    def _arguments(self) -> Mapping[str, Any] | None:
        text = self._given.args
        if text is None:
            return None
        try:
            value = json.loads(text)
        except ValueError:
            value = self._object("args")
        if not isinstance(value, Mapping):
            value = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else value
        if not isinstance(value, Mapping):
            self._complain("args", f"a dict, a Namespace or JSON is needed, not {type(value).__name__}.")
        wrong = [key for key in value if not (isinstance(key, str) and _is_variable(key))]
        if wrong:
            self._complain("args", f"{wrong[0]!r} cannot be an attribute of args.")
        return dict(value)


def _check_roles(line: TrainLine) -> None:
    workers = line.executors - line.ps - line.evaluator
    if workers < 1:
        others = [f"--ps {line.ps}"] * bool(line.ps) + ["--evaluator"] * line.evaluator
        raise UsageError(
            f"--executors {line.executors} with {' and '.join(others)} leaves no node that trains: "
            f"at least --executors {line.ps + line.evaluator + 1}."
        )


def _why_no_frame(value: Any) -> str:
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


# --- expressions of the notebook ---------------------------------------------------------------------------


class _EvaluationError(Exception):
    """An expression in a line could not be evaluated; the message is one line."""


def expand(text: str, namespace: Mapping[str, Any]) -> Any:
    """Replace ``{expr}`` and ``$name`` in a text; one that stands alone keeps its value's type."""
    pieces = list(_pieces(text, namespace))
    if len(pieces) == 1:
        return pieces[0]
    return "".join(map(str, pieces))


def evaluate(expression: str, namespace: Mapping[str, Any]) -> Any:
    """Evaluate a Python expression that the user has typed, in the notebook's namespace."""
    try:
        code = compile(expression.strip(), "<argument>", "eval", dont_inherit=True)
    except (SyntaxError, ValueError):
        raise _EvaluationError("this is no Python expression.") from None
    try:
        return eval(code, namespace if isinstance(namespace, dict) else dict(namespace))
    except NameError as error:
        name = error.name or ""
        raise _EvaluationError(f"name {name!r} is not defined.{did_you_mean(name, namespace)}") from None
    except Exception as error:  # the user's expression may raise anything
        first = str(error).strip().split("\n")[0]
        raise _EvaluationError(f"{type(error).__name__}: {first}") from error


def did_you_mean(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return ``" Did you mean 'x'?"``, or nothing."""
    close = difflib.get_close_matches(name, [each for each in known if not each.startswith("_")], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


_SPECIAL = re.compile(r"\{\{|\}\}|\$\$|\$(?P<name>[A-Za-z_]\w*)|\{")


def _pieces(text: str, namespace: Mapping[str, Any]) -> Iterator[Any]:
    """Yield literal text and values, in order; never an empty literal unless the whole text is."""
    position, literal, has_yielded = 0, "", False
    while match := _SPECIAL.search(text, position):
        literal += text[position : match.start()]
        expression, position = _expression_at(text, match)
        if expression is None:
            literal += text[match.start()] if position - match.start() <= 2 else text[match.start() : position]
            continue
        if literal:
            yield literal
        literal, has_yielded = "", True
        yield evaluate(expression, namespace)
    literal += text[position:]
    if literal or not has_yielded:
        yield literal


def _expression_at(text: str, match: re.Match[str]) -> tuple[str | None, int]:
    """Return the expression that begins at `match`, None for literal text, and the position after it."""
    if match["name"]:
        return match["name"], match.end()
    if match.group() != "{":
        return None, match.end()
    try:
        end = _closing_bracket(text, match.start())
    except UsageError:
        return None, match.end()
    inside = text[match.start() + 1 : end - 1]
    return (inside, end) if _is_expression(inside) else (None, match.end())


def _is_expression(text: str) -> bool:
    try:
        compile(text.strip(), "<argument>", "eval", ast.PyCF_ONLY_AST, dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def _unwrapped(text: str) -> str:
    """Take ``{expr}`` and ``$name`` for the expression inside; a dict display is an expression as it is."""
    text = text.strip()
    if re.fullmatch(r"\$[A-Za-z_]\w*", text):
        return text[1:]
    is_braced = text.startswith("{") and text.endswith("}") and text != "{}"
    if is_braced and _is_expression(text) and not isinstance(ast.parse(text, mode="eval").body, ast.Set):
        return text
    return text[1:-1] if is_braced and _is_expression(text[1:-1]) else text


def _is_variable(name: str) -> bool:
    import keyword

    return name.isidentifier() and not keyword.iskeyword(name)


def _short(text: Any) -> str:
    text = str(text)
    return text if len(text) <= 60 else f"{text[:59]}…"


# --- what the magics share with completion -----------------------------------------------------------------

Chooser = Callable[[Mapping[str, Any]], list[str]]


def names_of_frames(namespace: Mapping[str, Any]) -> list[str]:
    """Return the notebook's names that ``--data`` accepts."""
    return [name for name, value in _visible(namespace) if not _why_no_frame(value)]


def names_of_sessions(namespace: Mapping[str, Any]) -> list[str]:
    """Return the notebook's names that ``--session`` accepts."""
    return [name for name, value in _visible(namespace) if _is_session(value)]


def names_of_arguments(namespace: Mapping[str, Any]) -> list[str]:
    """Return the notebook's names that ``--args`` accepts."""
    return [name for name, value in _visible(namespace) if isinstance(value, dict | argparse.Namespace)]


def names_of_functions(namespace: Mapping[str, Any]) -> list[str]:
    """Return the functions that the notebook itself defines."""
    return [
        name
        for name, value in _visible(namespace)
        if getattr(value, "__module__", "") == "__main__" and callable(value)
    ]


def columns_of(text: str, namespace: Mapping[str, Any]) -> list[str]:
    """Return the columns of the DataFrame called `text`; empty when it is not a plain name of one."""
    value = namespace.get(text)
    return list(value.columns) if value is not None and not _why_no_frame(value) else []


def _visible(namespace: Mapping[str, Any]) -> list[tuple[str, Any]]:
    hidden = {"In", "Out"}
    return [(name, value) for name, value in list(namespace.items()) if not name.startswith("_") and name not in hidden]


def _is_session(value: Any) -> bool:
    names = {kind.__name__ for kind in type(value).__mro__ if kind.__module__.startswith("pyspark")}
    return bool(names & {"SparkSession", "SparkContext"})
