"""TensorFlow and Keras: what is kept outside Python, and what is found by its name.

Runs on: driver. Imports neither.
"""

from __future__ import annotations

import ast
import io
import json
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfos_magic.doctor import code
from tfos_magic.doctor.case import Case
from tfos_magic.doctor.dialects import is_of
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Node

_TENSOR_FREE_CALLS = frozenset({"isinstance", "len", "hasattr", "callable", "range", "bool", "int", "issubclass"})
_TENSOR_FREE_ATTRIBUTES = frozenset({"shape", "dtype", "ndim", "rank", "name", "training"})
_PLAIN_ANNOTATIONS = frozenset({"bool", "int", "float", "str"})


def look(case: Case) -> Iterator[Finding]:
    """Yield what is known of TensorFlow's and Keras' objects."""
    for node in case.graph:
        if is_of(node.value, "keras", "KerasSaveable") and node.is_by_value:
            yield from _own_classes(case, node)
        if not case.is_nodes and _is_tf_function(node.value) and node.is_by_value:
            yield from _without_source(case, node)


# --- Keras: classes by name --------------------------------------------------------------------------------


def _own_classes(case: Case, node: Node) -> Iterator[Finding]:
    """Keras pickles a model as its file, which has only the names of classes and functions."""
    told: set[str] = set()
    for path, kind, name in _named_in(_config(case, node)):
        if name in told:
            continue
        told.add(name)
        why = f"Keras pickles it as a file, which has only the names of classes, and {name} is the notebook's."
        fix = f"Define {name} in a module that executors have; or save the weights, and build the model in the task."
        if case.is_nodes:
            fix = f"Build the model inside the cell, with {name} defined there; or define {name} in a module."
        yield case.finding(node, "keras-main-layer", Verdict.BREAKS, why, fix, *path, f"{kind} {name}")


def _config(case: Case, node: Node) -> Any:
    try:
        reduced = case.dialect.reduce(node.value, lambda obj: obj.__reduce_ex__(5))
        (file,) = reduced[1]
        with zipfile.ZipFile(io.BytesIO(file.getvalue())) as archive:
            return json.loads(archive.read("config.json"))
    except Exception:  # it does not pickle, or another Keras has another format: nothing is known then
        return None


def _named_in(
    config: Any, path: tuple[str, ...] = (), is_top: bool = True
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield (path, kind, name) for what a Keras config has under a name of the notebook."""
    if isinstance(config, list | tuple):
        for each in config:
            yield from _named_in(each, path, is_top=False)
    if not isinstance(config, dict):
        return
    if isinstance(config.get("class_name"), str) and "config" in config and "registered_name" in config:
        inner = config["config"]
        label = inner.get("name") if isinstance(inner, dict) else None
        if not is_top and isinstance(label, str):
            path = (*path, f"layer {label}")
        if config.get("module") in (None, "__main__"):
            yield path, "class", config["class_name"]
        elif config.get("class_name") == "function" and config.get("module") == "builtins" and isinstance(inner, str):
            yield path, "function", inner
    for key, each in config.items():
        words = _CONFIG_STEPS.get(key)
        yield from _named_in(each, (*path, words) if words else path, is_top=False)


_CONFIG_STEPS = {"loss": "loss", "metrics": "metrics", "optimizer": "optimizer", "activation": "activation"}


# --- tf.function -------------------------------------------------------------------------------------------


def _is_tf_function(value: Any) -> bool:
    cls = type(value)
    return cls.__name__ == "Function" and cls.__module__.startswith("tensorflow.python.eager.polymorphic_function")


def _without_source(case: Case, node: Node) -> Iterator[Finding]:
    """AutoGraph turns `if tensor:` into a graph from the source, and executors have no cell to read it from."""
    function = getattr(node.value, "_python_function", None)
    if not isinstance(function, types.FunctionType) or function.__module__ != "__main__":
        return
    if Path(function.__code__.co_filename).exists() and case.is_on_this_machine:
        return
    tree = code.definition(function)
    line = _tensor_branch(tree, function) if tree is not None else 0
    if line:
        why = f"Line {line} branches on a tensor: AutoGraph needs its source, and executors do not have the cell's."
        fix = "tf.cond or tf.while_loop in place of it, or a module for it; %%tfos_train sends the source along."
        yield case.finding(node, "tf-function-no-source", Verdict.BREAKS, why, fix)


def _tensor_branch(tree: code.Definition, function: types.FunctionType) -> int:
    """Return the line of the first branch or loop over what is probably a tensor; 0 when there is none."""
    tensors = _tensor_parameters(tree, function)
    statements = sorted((each for each in ast.walk(tree) if hasattr(each, "lineno")), key=lambda each: each.lineno)
    for each in statements:
        if isinstance(each, ast.Assign) and _has_tensor(each.value, tensors):
            for target in each.targets:
                tensors.update(name.id for name in ast.walk(target) if isinstance(name, ast.Name))
        elif (isinstance(each, ast.If | ast.While | ast.IfExp | ast.Assert) and _has_tensor(each.test, tensors)) or (
            isinstance(each, ast.For) and _has_tensor(each.iter, tensors)
        ):
            return each.lineno
    return 0


def _tensor_parameters(tree: code.Definition, function: types.FunctionType) -> set[str]:
    with_default = {*(function.__kwdefaults__ or {})}
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    with_default.update(positional[len(positional) - len(function.__defaults__ or ()) :])
    found = set()
    for each in code.parameters(tree):
        annotation = getattr(each.annotation, "id", "")
        if (
            each.arg not in with_default
            and each.arg not in ("self", "training")
            and annotation not in _PLAIN_ANNOTATIONS
        ):
            found.add(each.arg)
    return found


def _has_tensor(node: ast.AST, tensors: set[str]) -> bool:
    """Tell whether a value is probably a tensor: a parameter, or made of one, or what ``tf.…(…)`` gives."""
    if isinstance(node, ast.Name):
        return node.id in tensors
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        root = _root(node.func)
        return name not in _TENSOR_FREE_CALLS and (root == "tf" or _any_tensor(ast.iter_child_nodes(node), tensors))
    if isinstance(node, ast.Attribute):
        return node.attr not in _TENSOR_FREE_ATTRIBUTES and _has_tensor(node.value, tensors)
    if isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return False
    return _any_tensor(ast.iter_child_nodes(node), tensors)


def _any_tensor(nodes: Iterator[ast.AST], tensors: set[str]) -> bool:
    return any(_has_tensor(each, tensors) for each in nodes)


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
