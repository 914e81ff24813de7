"""A cell's text becomes one map function.

Runs on: driver, where the cell is read; executors, where it is run.

    cell text ──ast, symtable──► which names are free ──► CellFunction ──shipping──► child: fn(args, ctx)
    notebook  ─────────────────► their values, now ────────┘

Two forms are understood. *Body*: the cell runs as a cell does, with ``args`` and ``ctx`` there, and the value of its
last expression is returned. *Function*: a cell that only defines things, one of them a function of ``(args, ctx)``,
is TensorFlowOnSpark's ``map_fun``: that function is called. A body that predicts also returns what its last statement
defines or assigns: see :mod:`tfos_magic.ending`.

On the far side the cell and the notebook's own functions share one namespace, as they do in the notebook.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import importlib
import inspect
import io
import re
import symtable
import sys
import tokenize
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tfos_magic import ending
from tfos_magic.errors import UsageError

PARAMETERS = ("args", "ctx")
_VALUE = "__tfos_value__"  # what the last expression is bound to while the cell runs
_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT  # a notebook's cell may await; so may this one

# IPython plants these among the builtins of the kernel; they mean nothing on a node.
_NOTEBOOK_BUILTINS = frozenset({"display", "get_ipython", "__IPYTHON__"})
_MODULE_NAMES = frozenset(
    {"__annotations__", "__builtins__", "__doc__", "__loader__", "__name__", "__package__", "__spec__"}
)
_BUILTINS = (frozenset(dir(builtins)) - _NOTEBOOK_BUILTINS) | _MODULE_NAMES
# A cell that calls one of these may define names that nobody can see in its text.
_DEFINES_UNSEEN = frozenset({"exec", "globals"})


def map_function(
    body: str,
    namespace: Mapping[str, Any],
    *,
    filename: str,
    first_line: int = 2,
    label: str = "the cell",
    flags: int = 0,
    predicts: bool = False,
) -> CellFunction:
    """Turn a cell's text into a function of ``(args, ctx)``.

    Parameters
    ----------
    body : str
        The cell without its magic line.
    namespace : mapping of str to object
        The notebook's globals; nothing is run in it and nothing is written to it.
    filename : str
        The file name under which IPython compiled the cell: tracebacks then show the cell.
    first_line : int
        Line of the cell in which `body` begins; the magic's own line is 1.
    label : str
        How messages call the cell, e.g. ``Cell In[4]``.
    flags : int
        ``__future__`` flags that earlier cells have switched on.
    predicts : bool
        The cell is to leave something that predicts, be it an expression or a name.

    Returns
    -------
    CellFunction

    Raises
    ------
    SyntaxError
        The cell is not Python; file and line are those of the cell.
    UsageError
        IPython syntax, a name that exists nowhere, or a cell in which nothing would run, or predict.
    """
    text = "\n" * (first_line - 1) + body
    tree = _parse(text, filename, label, flags)
    compile(_with_value(tree, text), filename, "exec", flags | _AWAIT, dont_inherit=True)  # "'return' outside function"
    entry = _entry_point(tree, label, predicts)
    if predicts and entry is None:
        ending.require_predictor(tree, label)
    own = _compile_tree(text, filename, flags)  # the reader changes what it reads
    names = _NameReader(flags, _future_imports(tree)).read(own.body, entry)
    lines = _first_lines(tree)
    _check_names(names, lines, namespace, label)
    captured = tuple(name for name in names.reads if name in namespace and not _is_shadowed_builtin(name, namespace))
    return CellFunction(
        text=text,
        filename=filename,
        label=label,
        flags=flags,
        entry=entry,
        predicts=predicts,
        lines={name: lines[name] for name in captured if name in lines},
        optional=frozenset(captured) & names.bound,
        submodules=_submodules(tree, namespace),
        imports=_imports(tree),
        anchor=_anchor(captured, namespace),
    )


class CellFunction:
    """A cell as a picklable function of ``(args, ctx)``.

    Attributes
    ----------
    text : str
        The cell, its lines numbered as the notebook numbers them.
    filename, label : str
        Where IPython compiled it; how people call it.
    entry : str or None
        The function to call in function form; None in body form.
    predicts : bool
        In body form: the value is also what the last statement defines or assigns.
    lines : dict of str to int
        Captured name → the first line that uses it.
    optional : frozenset of str
        Captured names that the cell also assigns itself: it can perhaps do without the notebook's value.
    submodules : tuple of str
        Modules that are reached as attributes of captured ones, e.g. ``xml.etree`` of ``xml``.
    imports : tuple of str
        Top-level modules that the cell's own import statements name.
    """

    def __init__(
        self,
        *,
        text: str,
        filename: str,
        label: str,
        flags: int,
        entry: str | None,
        predicts: bool,
        lines: Mapping[str, int],
        optional: frozenset[str],
        submodules: tuple[str, ...],
        imports: tuple[str, ...],
        anchor: Callable[[], Any],
    ) -> None:
        self.text = text
        self.filename = filename
        self.label = label
        self.flags = flags
        self.entry = entry
        self.predicts = predicts
        self.lines = dict(lines)
        self.optional = optional
        self.submodules = submodules
        self.imports = imports
        # A function that reads the captured names and is never called: cloudpickle gives all functions of one
        # namespace one dict on the far side, and the anchor is how the cell gets hold of it.
        self._anchor = anchor
        self._has_travelled = False

    def __repr__(self) -> str:
        return f"<{self.label}: {self.entry or 'body'}(args, ctx)>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_has_travelled": True}

    def __call__(self, args: Any, ctx: Any) -> Any:
        """Run the cell, and return the value of its last expression or of its function."""
        namespace = self.namespace
        namespace.update(zip(PARAMETERS, (args, ctx), strict=True))
        for name in self.submodules:
            importlib.import_module(name)
        value = self._run(namespace)
        if self.entry:
            value = namespace[self.entry](args, ctx)
        return _finish(value)

    @property
    def captured(self) -> dict[str, Any]:
        """Name → value of everything that the cell takes from the notebook, in order of first use."""
        known = self._anchor.__globals__
        return {name: known[name] for name in self._anchor.__code__.co_names if name in known}

    @property
    def namespace(self) -> dict[str, Any]:
        """Where the cell runs: shared with the notebook's functions once it has travelled, else a fresh copy."""
        if not self._has_travelled:
            return {"__name__": "__main__", **self.captured}
        shared: dict[str, Any] = self._anchor.__globals__
        shared.setdefault("__name__", "__main__")
        return shared

    def without(self, names: Collection[str]) -> CellFunction:
        """Return the same function that leaves the notebook's `names` behind."""
        kept = [name for name in self.captured if name not in names]
        return CellFunction(
            text=self.text,
            filename=self.filename,
            label=self.label,
            flags=self.flags,
            entry=self.entry,
            predicts=self.predicts,
            lines=self.lines,
            optional=self.optional,
            submodules=self.submodules,
            imports=self.imports,
            anchor=_anchor(kept, self._anchor.__globals__),
        )

    def _run(self, namespace: dict[str, Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # already shown in the notebook
            flags = self.flags | _AWAIT
            tree = _compile_tree(self.text, self.filename, flags)
            code = compile(_with_value(tree, self.text, self.predicts), self.filename, "exec", flags, dont_inherit=True)
        _finish(eval(code, namespace))
        return namespace.pop(_VALUE, None)


def _finish(value: Any) -> Any:
    """Return `value`, or what comes of it when it is a coroutine."""
    if not inspect.iscoroutine(value):
        return value
    import asyncio

    return asyncio.run(value)


def install_as_main(namespace: dict[str, Any]) -> None:
    """Make `namespace` this process's ``__main__``, as the notebook's globals are the kernel's.

    A child process calls it once, before the cell runs. Classes of the cell can then be pickled by name and found by
    whoever looks in ``__main__``, and processes that the cell starts do not take this package's code for the user's.
    """
    sys.modules["__main__"] = _MainModule(namespace)


class _MainModule(types.ModuleType):
    """A module over an existing dict; Python's own always make their dict."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        super().__init__("__main__")
        super().__setattr__("_namespace", namespace)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # a read-only view of the same thing
        return super().__getattribute__("_namespace")  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module '__main__' has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        del self.__dict__[name]

    def __dir__(self) -> list[str]:
        return sorted(self.__dict__)


# --- reading the text ---------------------------------------------------------------------------------------


def _parse(text: str, filename: str, label: str, flags: int) -> ast.Module:
    try:
        return _compile_tree(text, filename, flags)
    except SyntaxError as error:
        _refuse_ipython_syntax(error, text, label)
        raise


def _compile_tree(text: str, filename: str, flags: int) -> ast.Module:
    # dont_inherit: this file's own __future__ imports are none of the cell's business.
    return cast(ast.Module, compile(text, filename, "exec", flags | _AWAIT | ast.PyCF_ONLY_AST, dont_inherit=True))


_IPYTHON_SYNTAX = re.compile(r"^\s*(?:[\w.,\s]+=\s*)?[%!][%!\w./~$]|^\s*\?\S|\S\?{1,2}\s*$")


def _refuse_ipython_syntax(error: SyntaxError, text: str, label: str) -> None:
    lines = text.splitlines()
    number = error.lineno or 0
    line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    if not _IPYTHON_SYNTAX.search(line):
        return
    raise UsageError(
        f"{label}, line {number}: {line} is IPython syntax.",
        cause="Magics, shell commands and ? do not exist on executors.",
        hint="Put it in a cell of its own, or write it in Python (subprocess.run for a shell command).",
    ) from None


def _with_value(tree: ast.Module, text: str, predicts: bool = False) -> ast.Module:
    """Bind the value of the last expression, unless a semicolon follows it; or of the last name, if it predicts."""
    last = tree.body[-1] if tree.body else None
    name = ending.bound_name(last) if predicts else None
    if isinstance(last, ast.Expr) and (predicts or not has_trailing_semicolon(text)):
        kept, value = tree.body[:-1], last.value
    elif last is not None and name is not None:
        kept, value = tree.body, ast.copy_location(ast.Name(name, ast.Load()), last)
    else:
        return tree
    assign = ast.Assign(targets=[ast.Name(_VALUE, ast.Store())], value=value)
    ast.copy_location(assign, last)
    ast.copy_location(assign.targets[0], last)
    return ast.Module([*kept, assign], tree.type_ignores)


_BLANK_TOKENS = frozenset(
    {tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT}
)


def has_trailing_semicolon(text: str) -> bool:
    """Tell whether the last thing in `text`, comments aside, is a semicolon."""
    last = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in _BLANK_TOKENS:
                last = token.string
    except (tokenize.TokenError, SyntaxError):
        return False
    return last == ";"


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Delete, ast.Pass)


def _entry_point(tree: ast.Module, label: str, predicts: bool = False) -> str | None:
    """Return the name of the cell's map function in function form, None in body form."""
    last = tree.body[-1] if tree.body else None
    if predicts and isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef) and _parameters(last) == PARAMETERS:
        return last.name  # whatever runs above it
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if not functions or not all(_only_defines(node) for node in _skip_docstring(tree.body)):
        return None
    candidates = [node.name for node in functions if _parameters(node) == PARAMETERS]
    if len(candidates) == 1 and candidates[0] not in _names_read_by_statements(tree.body):
        return candidates[0]
    if not predicts and all(isinstance(node, _DEFINITIONS) for node in _skip_docstring(tree.body)):
        raise UsageError(_nothing_runs(label, [node.name for node in functions], candidates))
    return None


def _nothing_runs(label: str, functions: list[str], candidates: list[str]) -> str:
    if len(candidates) > 1:
        return (
            f"{label}: both {' and '.join(candidates)} take (args, ctx): which one is meant? Call it in the last line."
        )
    defined = ", ".join(functions)
    return f"{label} only defines {defined}, and none takes (args, ctx): nothing would run. Call it in the last line."


def _only_defines(node: ast.stmt) -> bool:
    if isinstance(node, _DEFINITIONS + _ASSIGNMENTS):
        return True
    if isinstance(node, ast.If):
        return all(map(_only_defines, [*node.body, *node.orelse]))
    if isinstance(node, ast.Try):
        inner = [*node.body, *node.orelse, *node.finalbody, *(s for handler in node.handlers for s in handler.body)]
        return all(map(_only_defines, inner))
    return False


def _skip_docstring(body: Sequence[ast.stmt]) -> Sequence[ast.stmt]:
    first = body[0] if body else None
    is_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_docstring else body


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    return tuple(argument.arg for argument in [*node.args.posonlyargs, *node.args.args])


def _names_read_by_statements(body: Sequence[ast.stmt]) -> set[str]:
    """Names read by what is not a definition: ``history = train(args, ctx)`` calls, so the cell is a body."""
    statements = [node for node in body if not isinstance(node, _DEFINITIONS)]
    return {
        node.id
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def _future_imports(tree: ast.Module) -> tuple[str, ...]:
    return tuple(
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        for alias in node.names
    )


def _first_lines(tree: ast.Module) -> dict[str, int]:
    lines: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            lines[node.id] = min(node.lineno, lines.get(node.id, node.lineno))
    return lines


def _submodules(tree: ast.Module, namespace: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that the cell reaches by attribute from a captured one.

    ``import xml.etree.ElementTree`` binds ``xml`` alone; importing ``xml`` on a node would not bring the rest.
    """
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        chain = _attribute_chain(node)
        root = namespace.get(chain[0]) if chain else None
        if isinstance(root, types.ModuleType):
            for end in range(2, len(chain) + 1):
                found[".".join([root.__name__, *chain[1:end]])] = None
    return tuple(name for name in found if type(sys.modules.get(name)) is types.ModuleType)


def _imports(tree: ast.Module) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(dict.fromkeys(alias.name.partition(".")[0] for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found[node.module.partition(".")[0]] = None
    return tuple(name for name in found if name != "__future__")


def _attribute_chain(node: ast.AST) -> list[str]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if names and isinstance(node, ast.Name) else []


def _anchor(names: Iterable[str], namespace: Mapping[str, Any]) -> Callable[[], Any]:
    code = compile(f"lambda: ({''.join(f'{name}, ' for name in names)})", "<captured names>", "eval").co_consts[0]
    anchor = types.FunctionType(code, namespace if isinstance(namespace, dict) else dict(namespace), "captured_names")
    anchor.__module__ = "__main__"  # by value, whatever the namespace calls itself
    return anchor


def _is_shadowed_builtin(name: str, namespace: Mapping[str, Any]) -> bool:
    """IPython puts its own ``open``, ``exit`` and ``quit`` into the notebook; nodes take Python's."""
    return name in _BUILTINS and home_of(namespace[name]).startswith("IPython.")


def home_of(value: Any) -> str:
    """Return the module in which a function is defined, whatever it claims; for other objects, that of their class."""
    if isinstance(value, types.FunctionType):
        return str(value.__globals__.get("__name__", ""))
    return str(type(value).__module__)


def _check_names(names: _Names, lines: Mapping[str, int], namespace: Mapping[str, Any], label: str) -> None:
    if names.defines_unseen:
        return
    for name in names.reads:
        if name in namespace or name in names.bound or name in _BUILTINS or name in names.tolerated:
            continue
        where = f"{label}, line {lines[name]}" if name in lines else label
        if name in _NOTEBOOK_BUILTINS:
            raise UsageError(
                f"{where}: {name} exists only in the notebook.", hint="On a node, print(…) shows in its log."
            )
        known = [*namespace, *names.bound, *_BUILTINS]
        close = difflib.get_close_matches(name, [k for k in known if not k.startswith("_")], n=1)
        raise UsageError(
            f"{where}: name {name!r} is neither in the cell nor in the notebook."
            + (f" Did you mean {close[0]!r}?" if close else "")
        )


# --- which names are free ----------------------------------------------------------------------------------


@dataclass
class _Names:
    """What a cell does with the names of its namespace."""

    reads: dict[str, None] = field(default_factory=dict)
    """Names that may be read before the cell has assigned them, in order."""
    bound: set[str] = field(default_factory=set)
    """Names that the cell assigns somewhere."""
    tolerated: set[str] = field(default_factory=set)
    """Names read only where a NameError is caught."""
    defines_unseen: bool = False
    """A star import or an exec: the text does not show all names."""


class _NameReader:
    """Follows a cell's statements in order, and notes which names it needs from outside.

    ``model = build()`` followed by ``model.fit()`` needs no ``model`` from the notebook, however large the one
    there may be. What a function's body reads counts from the moment the function is first mentioned.
    """

    def __init__(self, flags: int, futures: Sequence[str]) -> None:
        import __future__

        known = [name for name in __future__.all_feature_names if flags & getattr(__future__, name).compiler_flag]
        names = sorted({*futures, *known})
        self._prelude = f"from __future__ import {', '.join(names)}\n" if names else ""
        self._deferred: dict[str, set[str]] = {}
        self._tolerant = 0
        self._names = _Names(bound=set(PARAMETERS))

    def read(self, body: Sequence[ast.stmt], entry: str | None) -> _Names:
        """Return what `body` does with names; `entry` is called after it. Comprehensions in `body` are rewritten."""
        assigned = set(PARAMETERS)
        self._block([_AsGenerators().visit(node) for node in body], assigned)
        if entry:
            self._load([entry], assigned)
        for pending in list(self._deferred.values()):  # nobody mentioned them: frameworks may still call them
            self._load(sorted(pending), assigned)
        self._names.tolerated -= self._certain
        return self._names

    @property
    def _certain(self) -> set[str]:
        return {name for name in self._names.reads if name not in self._names.tolerated}

    def _block(self, body: Iterable[ast.stmt], assigned: set[str]) -> bool:
        """Follow `body`, adding to `assigned`; return whether its end is reached."""
        for node in body:
            self._statement(node, assigned)
            if isinstance(node, ast.Raise | ast.Return | ast.Break | ast.Continue):
                return False
        return True

    def _statement(self, node: ast.stmt, assigned: set[str]) -> None:
        if isinstance(node, ast.If):
            self._expression(node.test, assigned)
            self._branches([node.body, node.orelse], assigned)
        elif isinstance(node, ast.For | ast.AsyncFor | ast.While):
            self._loop(node, assigned)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                self._expression(item.context_expr, assigned)
                self._bind(_targets(item.optional_vars), assigned)
            self._block(node.body, assigned)
        elif isinstance(node, ast.Try) or type(node).__name__ == "TryStar":  # TryStar: Python 3.11
            self._try(node, assigned)  # type: ignore[arg-type]
        elif isinstance(node, ast.Match):
            self._match(node, assigned)
        elif isinstance(node, ast.Delete):
            self._delete(node, assigned)
        else:
            self._simple(node, assigned)

    def _branches(self, blocks: Iterable[Sequence[ast.stmt]], assigned: set[str]) -> None:
        outcomes = []
        for block in blocks:
            inside = set(assigned)
            if self._block(block, inside):
                outcomes.append(inside)
        if outcomes:
            assigned |= set.intersection(*outcomes)

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While, assigned: set[str]) -> None:
        inside = set(assigned)
        if isinstance(node, ast.While):
            self._expression(node.test, assigned)
        else:
            self._expression(node.iter, assigned)
            self._bind(_targets(node.target), inside)
        self._block(node.body, inside)
        self._block(node.orelse, set(assigned))

    def _try(self, node: ast.Try, assigned: set[str]) -> None:
        before = set(assigned)
        tolerant = any(_catches_name_error(handler) for handler in node.handlers)
        self._tolerant += tolerant
        body = set(before)
        reached = self._block(node.body, body)
        self._tolerant -= tolerant
        outcomes = [body] if self._block(node.orelse, body) and reached else []
        for handler in node.handlers:
            inside = set(before)
            if handler.type is not None:
                self._expression(handler.type, inside)
            self._bind([handler.name] if handler.name else [], inside)
            if self._block(handler.body, inside):
                outcomes.append(inside - ({handler.name} if handler.name else set()))
        if outcomes:
            assigned |= set.intersection(*outcomes)
        self._block(node.finalbody, assigned)

    def _match(self, node: ast.Match, assigned: set[str]) -> None:
        self._expression(node.subject, assigned)
        for case in node.cases:
            inside = set(assigned)
            self._load([n.id for n in ast.walk(case.pattern) if isinstance(n, ast.Name)], inside)
            self._bind(_pattern_targets(case.pattern), inside)
            if case.guard is not None:
                self._expression(case.guard, inside)
            self._block(case.body, inside)

    def _delete(self, node: ast.Delete, assigned: set[str]) -> None:
        for target in node.targets:
            self._load([n.id for n in ast.walk(target) if isinstance(n, ast.Name)], assigned)
            assigned.difference_update(_targets(target))

    def _simple(self, node: ast.stmt, assigned: set[str]) -> None:
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            self._names.defines_unseen = True
            return
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            self._load([node.target.id], assigned)
        scope = _Scope.of(self._prelude + ast.unparse(node))
        self._load(scope.reads, assigned)
        self._names.bound |= scope.global_writes
        name = _defined_name(node)
        if name:
            self._deferred[name] = scope.deferred
        else:
            self._load(sorted(scope.deferred), assigned)  # a lambda handed on: it may be called at once
        if name and getattr(node, "decorator_list", None):
            self._load([name], assigned)  # decorators may call, or keep, what they are given
        self._bind(scope.writes, assigned)

    def _expression(self, node: ast.expr, assigned: set[str]) -> None:
        scope = _Scope.of(self._prelude + ast.unparse(node))
        self._load([*scope.reads, *sorted(scope.deferred)], assigned)
        self._bind(scope.writes, assigned)

    def _bind(self, names: Iterable[str], assigned: set[str]) -> None:
        names = list(names)
        self._names.bound.update(names)
        assigned.update(names)

    def _load(self, names: Iterable[str], assigned: set[str]) -> None:
        for name in names:
            pending = self._deferred.pop(name, None)
            if name in _DEFINES_UNSEEN:
                self._names.defines_unseen = True
            if name not in assigned and name != _VALUE and pending is None:
                self._note(name)
            if pending:
                self._load(sorted(pending), assigned | {name})

    def _note(self, name: str) -> None:
        if self._tolerant and name not in self._names.reads:
            self._names.tolerated.add(name)
        elif not self._tolerant:
            self._names.tolerated.discard(name)
        self._names.reads.setdefault(name)


@dataclass
class _Scope:
    """What one statement does with the names of the cell's namespace, told by Python's own symbol table."""

    reads: list[str] = field(default_factory=list)
    """Read when the statement runs."""
    deferred: set[str] = field(default_factory=set)
    """Read when a function that it makes is called."""
    writes: list[str] = field(default_factory=list)
    global_writes: set[str] = field(default_factory=set)
    """Assigned inside a function that says ``global``."""

    @classmethod
    def of(cls, source: str) -> _Scope:
        scope = cls()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            table = symtable.symtable(source, "<cell>", "exec")
        for symbol in table.get_symbols():
            if symbol.is_referenced():
                scope.reads.append(symbol.get_name())
            if symbol.is_assigned() or symbol.is_imported():
                scope.writes.append(symbol.get_name())
        for child in table.get_children():
            scope._descend(child, is_deferred=False)
        return scope

    def _descend(self, table: symtable.SymbolTable, *, is_deferred: bool) -> None:
        is_deferred = is_deferred or (table.get_type() == "function" and table.get_name() != "genexpr")
        for symbol in table.get_symbols():
            if not symbol.is_global():
                continue
            if symbol.is_referenced() and is_deferred:
                self.deferred.add(symbol.get_name())
            elif symbol.is_referenced():
                self.reads.append(symbol.get_name())
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
                self.global_writes.add(symbol.get_name())
        for child in table.get_children():
            self._descend(child, is_deferred=is_deferred)


class _AsGenerators(ast.NodeTransformer):
    """Writes every comprehension as a generator expression, for reading names only.

    From Python 3.12 on (PEP 709) the symbol table lists the variables of comprehensions as if they were those of the
    scope around; generator expressions keep a scope of their own.
    """

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp) -> ast.AST:
        """``[x for …]`` and ``{x for …}``."""
        self.generic_visit(node)
        return ast.GeneratorExp(node.elt, node.generators)

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> ast.AST:
        """``{k: v for …}``."""
        self.generic_visit(node)
        return ast.GeneratorExp(ast.Tuple([node.key, node.value], ast.Load()), node.generators)


def _defined_name(node: ast.stmt) -> str | None:
    """Return the name to which a statement binds a function or class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda) and len(node.targets) == 1:
        target = node.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _targets(node: ast.expr | None) -> Iterator[str]:
    for inner in ast.walk(node) if node is not None else ():
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load):
            yield inner.id


def _pattern_targets(pattern: ast.pattern) -> Iterator[str]:
    for node in ast.walk(pattern):
        name = getattr(node, "rest", None) if isinstance(node, ast.MatchMapping) else getattr(node, "name", None)
        if name:
            yield name


def _catches_name_error(handler: ast.ExceptHandler) -> bool:
    names = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else {"BaseException"}
    return bool(names & {"NameError", "Exception", "BaseException"})
