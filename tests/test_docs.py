"""What the documentation says is there: examples that run, references that lead somewhere, options, files."""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from test_imports import LAYERS

from tfos_magic.arguments.parsers import PARSERS, option_strings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = re.compile(r":(?:func|class|meth|attr|data|mod|exc):`~?([\w.]+)`")
OPTIONS_OF_OTHERS = {"--nv", "--help"}  # --help is that of every magic


def path_of(module: str) -> Path:
    base = ROOT.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


# --- examples ----------------------------------------------------------------------------------------------


WITH_EXAMPLES = [module for module in LAYERS if ">>> " in path_of(module).read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_give_what_they_say(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0


# --- references --------------------------------------------------------------------------------------------


@dataclass
class Scope:
    """The names of a module or a class."""

    names: set[str] = field(default_factory=set)
    inner: dict[str, Scope] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)
    imports: dict[str, str] = field(default_factory=dict)
    docstrings: list[tuple[str, list[Scope]]] = field(default_factory=list)


@cache
def scope_of(module: str) -> Scope:
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    scope = Scope()
    fill(scope, tree.body, [scope], module)
    return scope


def fill(scope: Scope, body: list[ast.stmt], around: list[Scope], module: str) -> None:
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            around[0].docstrings.append((node.value.value, around))
        elif isinstance(node, ast.ClassDef):
            scope.names.add(node.name)
            inner = scope.inner[node.name] = Scope(bases=[ast.unparse(base) for base in node.bases])
            fill(inner, node.body, [*around, inner], module)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            scope.names.add(node.name)
            attributes = {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}
            scope.names |= attributes if scope is not around[0] else set()  # what methods set on self
            fill(Scope(), node.body, around, module)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            scope.names |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
        elif isinstance(node, ast.Import):
            scope.imports |= {(one.asname or one.name).partition(".")[0]: one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            scope.imports |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "handlers", "finalbody"):
                fill(scope, [one for one in getattr(node, part, []) if isinstance(one, ast.stmt)], around, module)


def leads_somewhere(name: str, around: list[Scope]) -> bool:
    """True if `name` is known where a docstring with these scopes around it stands, the module's first."""
    if name.startswith("tfos_magic"):
        return is_absolute(name)
    first, _, rest = name.partition(".")
    for scope in reversed(around):
        if has(scope, name, around[0]):
            return True
        if first in scope.imports:
            target = f"{scope.imports[first]}.{rest}".rstrip(".")
            return is_absolute(target) if target.startswith("tfos_magic") else True
    if hasattr(builtins, first) or first in sys.stdlib_module_names:
        return True
    return bool(rest) and importlib.util.find_spec(first) is not None


def has(scope: Scope, name: str, module: Scope) -> bool:
    first, _, rest = name.partition(".")
    if not rest:
        return first in scope.names or any(has_base(base, first, module) for base in scope.bases)
    return first in scope.inner and has(scope.inner[first], rest, module)


def has_base(base: str, name: str, module: Scope) -> bool:
    if base in module.inner:
        return has(module.inner[base], name, module)
    target = module.imports.get(base, "")
    return is_absolute(f"{target}.{name}") if target.startswith("tfos_magic") else False


def is_absolute(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if module in LAYERS:
            scope, rest = scope_of(module), ".".join(parts[count:])
            return not rest or has(scope, rest, scope) or rest.partition(".")[0] in scope.imports
    return False


@pytest.mark.parametrize("module", LAYERS)
def test_every_reference_in_a_docstring_leads_somewhere(module: str) -> None:
    lost = [
        name
        for text, around in scope_of(module).docstrings
        for name in REFERENCE.findall(text)
        if not leads_somewhere(name, around)
    ]
    assert lost == []


def test_a_reference_that_leads_nowhere_is_found() -> None:
    around = [scope_of("tfos_magic.status")]
    assert leads_somewhere("StatusBoard.view", around)
    assert leads_somewhere("tfos_magic.cluster.run", around)
    for wrong in ("StatusBoard.look", "tfos_magic.cluster.runs", "NoSuchClass", "no_such_package.thing"):
        assert not leads_somewhere(wrong, around)


# --- the README --------------------------------------------------------------------------------------------


def test_the_options_in_the_readme_exist() -> None:
    known = {option for magic in PARSERS for option in option_strings(magic)}
    known |= {"--driver"}  # of %tfos_namedtuple, which has no parser
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(named) > 15
    assert named - known - OPTIONS_OF_OTHERS == set()


def test_the_files_in_the_readme_exist() -> None:
    named = set(re.findall(r"(?:tfos_magic|tests|demo_notebooks)/[\w/]+(?:\.\w+)?", README))
    named |= {link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link}
    assert len(named) >= 8
    missing = {name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()}
    assert missing == set()


def test_every_benchmark_is_named_in_the_readme() -> None:
    paths = (ROOT / "tests" / "benchmarks").glob("*.py")
    usage = re.compile(r"^    python tests/benchmarks/", re.MULTILINE)
    programs = [path.name for path in paths if usage.search(path.read_text(encoding="utf-8"))]
    assert len(programs) > 8
    assert [name for name in programs if f"`{name}`" not in README] == []
