"""What in a line stands for a value of the notebook: ``{expr}``, ``$name``, and whole Python expressions.

Runs on: notebook.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfos_magic.arguments.words import closing_bracket
from tfos_magic.errors import UsageError


class EvaluationError(Exception):
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
        raise EvaluationError("this is no Python expression.") from None
    try:
        return eval(code, namespace if isinstance(namespace, dict) else dict(namespace))
    except NameError as error:
        name = error.name or ""
        raise EvaluationError(f"name {name!r} is not defined.{did_you_mean(name, namespace)}") from None
    except Exception as error:  # the user's expression may raise anything
        first = str(error).strip().split("\n")[0]
        raise EvaluationError(f"{type(error).__name__}: {first}") from error


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
        end = closing_bracket(text, match.start())
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


def unwrapped(text: str) -> str:
    """Take ``{expr}`` and ``$name`` for the expression inside; a dict display is an expression as it is."""
    text = text.strip()
    if re.fullmatch(r"\$[A-Za-z_]\w*", text):
        return text[1:]
    is_braced = text.startswith("{") and text.endswith("}") and text != "{}"
    if is_braced and _is_expression(text) and not isinstance(ast.parse(text, mode="eval").body, ast.Set):
        return text
    return text[1:-1] if is_braced and _is_expression(text[1:-1]) else text


def is_variable(name: str) -> bool:
    """Tell whether a variable may be called so."""
    import keyword

    return name.isidentifier() and not keyword.iskeyword(name)
