"""How a cell of ``%%tfos_infer`` ends: with what predicts.

Runs on: driver, where the cell is read; executors, where it is run.

    predict                       an expression: its value
    def predict(batch): …         the function
    model = load_model(path)      what has the name
    def main_fun(args, ctx): …    TensorFlowOnSpark's convention: called once, and what it returns predicts
    pass, import, for, …          nothing: said before Spark is asked

The text is only looked at, never changed: lines, tracebacks and AutoGraph are those of the cell as it was typed.
"""

from __future__ import annotations

import ast
from typing import NoReturn

from tfos_magic.errors import UsageError

_HINT = "End it with a function of one batch (def predict(batch): …), with the name of one, or with a Keras model."
_STATEMENTS: tuple[tuple[type[ast.stmt] | tuple[type[ast.stmt], ...], str], ...] = (
    (ast.Pass, "pass"),
    ((ast.Import, ast.ImportFrom), "an import"),
    ((ast.For, ast.AsyncFor, ast.While), "a loop"),
    (ast.If, "an if"),
    ((ast.With, ast.AsyncWith), "a with block"),
    (ast.Try, "a try block"),
    (ast.Delete, "a del"),
    (ast.Assign, "an assignment to something else than one name"),
    (ast.AugAssign, "an assignment to something else than one name"),
    (ast.AnnAssign, "an annotation without a value"),
)
_VALUES: tuple[tuple[type[ast.expr] | tuple[type[ast.expr], ...], str], ...] = (
    (ast.JoinedStr, "a text"),
    ((ast.List, ast.ListComp), "a list"),
    (ast.Tuple, "a tuple"),
    ((ast.Dict, ast.DictComp), "a dict"),
    ((ast.Set, ast.SetComp), "a set"),
    (ast.GeneratorExp, "a generator"),
    (ast.Compare, "a comparison"),
)


def bound_name(node: ast.stmt | None) -> str | None:
    """Return the name that a statement gives to a function, a class or a value; None when it gives none."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.AnnAssign) and node.value is not None):
        targets = [node.target]
    else:
        return None
    return next((target.id for target in targets if isinstance(target, ast.Name)), None)


def require_predictor(tree: ast.Module, label: str) -> None:
    """Refuse a cell whose last statement cannot leave anything that predicts.

    Parameters
    ----------
    tree : ast.Module
        The cell.
    label : str
        How messages call it.

    Raises
    ------
    UsageError
        It ends with a loop, an import, a number, …; or with a function that does not take one batch.
    """
    if not tree.body:
        raise UsageError(f"{label} is empty: what should predict?", hint=_HINT)
    last = tree.body[-1]
    where = f"{label}, line {last.lineno}"
    value = last.value if isinstance(last, ast.Expr | ast.Assign | ast.AnnAssign) else None
    if isinstance(last, ast.ClassDef) and not last.decorator_list:
        _refuse_class(last, where)
    if isinstance(last, ast.AsyncFunctionDef):
        raise UsageError(
            f"{where}: {last.name} is async, and nodes await nothing for a batch.",
            hint="Write def; what has to be awaited once can be, above it.",
        )
    if isinstance(last, ast.FunctionDef) and not last.decorator_list:
        _require_one_parameter(last.name, last.args, where)
    elif isinstance(value, ast.Lambda):
        _require_one_parameter("the lambda", value.args, where)
    elif value is not None and (what := _what_never_predicts(value)):
        raise UsageError(f"{where}: the cell ends with {what}, and that does not predict.", hint=_HINT)
    elif bound_name(last) is None and not isinstance(last, ast.Expr):
        raise UsageError(f"{where}: the cell ends with {_what(last)}: nothing there predicts.", hint=_HINT)


def _refuse_class(node: ast.ClassDef, where: str) -> NoReturn:
    raise UsageError(
        f"{where}: the cell ends with class {node.name}; a class does not predict, an object of it may.",
        hint=f"Make one in the last line, e.g. {node.name}(): with a method __call__(self, batch), or a Keras model.",
    )


def _require_one_parameter(name: str, arguments: ast.arguments, where: str) -> None:
    positional = [*arguments.posonlyargs, *arguments.args]
    needed = len(positional) - len(arguments.defaults)
    has_place = bool(positional or arguments.vararg)
    if needed <= 1 and has_place and all(arguments.kw_defaults):
        return
    raise UsageError(
        f"{where}: {name}({ast.unparse(arguments)}) cannot be called with one batch.",
        hint="A function of (batch) is called for each batch; one of (args, ctx) once, and what it returns predicts.",
    )


def _what_never_predicts(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        return repr(value.value) if len(repr(value.value)) < 20 else "a text"
    return next((what for kinds, what in _VALUES if isinstance(value, kinds)), "")


def _what(node: ast.stmt) -> str:
    return next((what for kinds, what in _STATEMENTS if isinstance(node, kinds)), type(node).__name__.lower())
