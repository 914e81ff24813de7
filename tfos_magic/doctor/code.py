"""What a function's code says without being run: its source as a tree, the names it reads, what it gives back.

Runs on: driver.
"""

from __future__ import annotations

import ast
import dis
import functools
import linecache
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

_MISSING = object()


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def definition(function: types.FunctionType) -> Definition | None:
    """Return the source of a function as a tree; None where there is none, or more than one that it could be."""
    code = function.__code__
    tree = _parse("".join(linecache.getlines(code.co_filename)))
    if tree is None:
        return None
    found = [node for node in ast.walk(tree) if isinstance(node, Definition) and _is_definition_of(node, code)]
    if len(found) > 1 and hasattr(code, "co_positions"):  # Python 3.11
        columns = [column for _, _, column, _ in code.co_positions() if column]
        first = min(columns, default=0)
        found = [node for node in found if node.col_offset <= first <= (node.end_col_offset or 0)] or found
        found = [max(found, key=lambda node: node.col_offset)]  # the innermost of lambdas in lambdas
    return found[0] if len(found) == 1 else None


def _is_definition_of(node: Definition, code: types.CodeType) -> bool:
    if isinstance(node, ast.Lambda):
        is_it = code.co_name == "<lambda>" and node.lineno == code.co_firstlineno
    else:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        is_it = node.name == code.co_name and first == code.co_firstlineno
    return is_it and [argument.arg for argument in _arguments(node)] == list(code.co_varnames[: _argument_count(code)])


def _arguments(node: Any) -> list[ast.arg]:
    spec = node.args
    rest = [each for each in (spec.vararg, spec.kwarg) if each is not None]
    return [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *rest]


def _argument_count(code: types.CodeType) -> int:
    flags = (code.co_flags & 0x04) // 0x04 + (code.co_flags & 0x08) // 0x08
    return code.co_argcount + code.co_kwonlyargcount + flags


def parameters(node: Definition) -> list[ast.arg]:
    """Return all parameters of a definition."""
    return _arguments(node)


def body(node: Definition) -> list[ast.AST]:
    """Return the statements of a definition; of a lambda, its expression."""
    return [node.body] if isinstance(node, ast.Lambda) else list(node.body)


def own_nodes(node: Definition) -> Iterator[ast.AST]:
    """Yield every node of a definition's body, those of functions and classes inside it left out."""
    todo: list[ast.AST] = list(body(node))
    while todo:
        each = todo.pop()
        yield each
        if not isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(each))


# --- what it gives back ------------------------------------------------------------------------------------


def given_back(node: Definition) -> Iterator[ast.expr]:
    """Yield the expressions that may be a call's value, or part of it: in containers, branches, local names."""
    assigned: dict[str, list[ast.expr]] = {}
    results: list[ast.expr] = [node.body] if isinstance(node, ast.Lambda) else []
    for each in own_nodes(node):
        if isinstance(each, ast.Assign):
            for target in each.targets:
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(each.value)
        elif isinstance(each, ast.Return | ast.Yield | ast.YieldFrom) and each.value is not None:
            results.append(each.value)
    seen: set[str] = set()
    while results:
        result = results.pop()
        yield result
        results += _inside(result)
        if isinstance(result, ast.Name) and result.id not in seen:
            seen.add(result.id)
            results += assigned.get(result.id, [])


def _inside(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return list(node.elts)
    if isinstance(node, ast.Dict):
        return list(node.values)
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.BoolOp):
        return list(node.values)
    if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
        return [node.elt]
    if isinstance(node, ast.DictComp):
        return [node.value]
    if isinstance(node, ast.Starred | ast.Await | ast.NamedExpr):
        return [node.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("iter", "list", "tuple"):
        return list(node.args)
    return []


def calls_given_back(node: Definition) -> set[str]:
    """Return the names of what is called for the value: ``P`` of ``return [P(x)]``."""
    return {each.func.id for each in given_back(node) if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)}


def names_given_back(node: Definition) -> set[str]:
    """Return the names that may be the value, or part of it."""
    return {each.id for each in given_back(node) if isinstance(each, ast.Name)}


# --- what it reads -----------------------------------------------------------------------------------------


def all_code(function: types.FunctionType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of everything defined inside it."""
    todo = [function.__code__]
    while todo:
        code = todo.pop()
        yield code
        todo += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def captured(function: types.FunctionType) -> dict[str, Any]:
    """Return name → value of the closure and of the globals that a function reads."""
    space = function.__globals__
    found = {name: space[name] for name in global_reads(function) if name in space}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


def global_reads(function: types.FunctionType) -> dict[str, None]:
    """Return the global names that a function reads, in order."""
    return {
        str(each.argval): None
        for code in all_code(function)
        for each in dis.get_instructions(code)
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def global_writes(function: types.FunctionType) -> dict[str, None]:
    """Return the global names that a function assigns."""
    return {
        str(each.argval): None
        for code in all_code(function)
        for each in dis.get_instructions(code)
        if each.opname == "STORE_GLOBAL"
    }


def closure_writes(function: types.FunctionType) -> set[str]:
    """Return the names of the enclosing function that a function assigns (``nonlocal``)."""
    code = function.__code__
    return {
        str(each.argval)
        for each in dis.get_instructions(code)
        if each.opname == "STORE_DEREF" and each.argval in code.co_freevars
    }


def attribute_chains(function: types.FunctionType) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what is read as ``name.a.b`` of a global or closure name: the name, and the attributes."""
    for code in all_code(function):
        name: str | None = None
        chain: list[str] = []
        for each in dis.get_instructions(code):
            if each.opname in ("LOAD_ATTR", "LOAD_METHOD") and name is not None:
                chain.append(str(each.argval))
                continue
            if each.opname in ("CACHE", "PUSH_NULL", "EXTENDED_ARG", "NOP", "PRECALL"):
                continue
            if name is not None and chain:
                yield name, tuple(chain)
            name, chain = (str(each.argval) if each.opname in _LOADS else None), []
        if name is not None and chain:
            yield name, tuple(chain)


_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"})


def step_to(function: types.FunctionType, name: str) -> str:
    """Return the words for the way from a function to what it captures under `name`."""
    return f"closure {name}" if name in function.__code__.co_freevars else f"global {name}"


def used_attributes(function: types.FunctionType, name: str) -> set[str]:
    """Return the first attributes that a function reads of its closure variable or parameter `name`."""
    found: set[str] = set()
    for code in all_code(function):
        previous: Any = None
        for each in dis.get_instructions(code):
            is_attribute = each.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
            if is_attribute and previous is not None and _loads(previous, name):
                found.add(str(each.argval))
            if each.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL"):
                previous = each
    return found


def _loads(instruction: dis.Instruction, name: str) -> bool:
    value = instruction.argval
    return instruction.opname.startswith("LOAD_") and (
        value == name or (isinstance(value, tuple) and value[-1] == name)
    )


def written_value(module: types.ModuleType, name: str) -> tuple[Any, ...]:
    """Return, in a tuple, the plain value that a module's source gives to `name`; an empty one if that is unclear."""
    file = str(getattr(module, "__file__", "") or "")
    linecache.checkcache(file)
    tree = _parse("".join(linecache.getlines(file)))
    if tree is None:
        return ()
    names = [each for each in ast.walk(tree) if isinstance(each, ast.Name) and each.id == name]
    stores = [each for each in names if not isinstance(each.ctx, ast.Load)]
    values = [
        each.value
        for each in tree.body
        if isinstance(each, ast.Assign | ast.AnnAssign)
        and stores == [each.targets[0] if isinstance(each, ast.Assign) else each.target]
    ]
    try:
        return tuple(ast.literal_eval(value) for value in values if value is not None)
    except ValueError:
        return ()


def resolve(value: Any, attributes: Iterable[str]) -> Any:
    """Return what a chain of attributes of a module leads to, without running any ``__getattr__``; None if nowhere."""
    for name in attributes:
        if not isinstance(value, types.ModuleType):
            return None
        value = _space(value).get(name, _MISSING)
        if value is _MISSING:
            return None
    return value


def _space(module: types.ModuleType) -> Mapping[str, Any]:
    # Not vars(): lazy modules load themselves when they are asked for anything.
    space: Mapping[str, Any] = object.__getattribute__(module, "__dict__")
    return space
