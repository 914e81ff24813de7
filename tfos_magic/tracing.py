"""How an object is reached: the steps of a path, and a pickler that remembers the way it goes.

Runs on: anywhere. Standard library only; which cloudpickle it follows is the caller's choice.
"""

from __future__ import annotations

import collections
import functools
import pickle
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One step from an object to what it holds."""

    words: str
    """As a person says it: ``key 'opt'``."""
    code: str
    """As a person types it: ``["opt"]``."""


def kind_of(value: Any) -> str:
    """Return the type of an object in a word."""
    if isinstance(value, type):
        return "class"
    if isinstance(value, types.ModuleType):
        return "module"
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return "function"
    return type(value).__name__


def render_path(name: str, chain: Sequence[Any]) -> str:
    """Return the way from a named object to the last of `chain` as code that a person could type.

    Parameters
    ----------
    name : str
        How the first object of `chain` is called.
    chain : sequence of object
        The pickler's nesting: each object was being pickled as part of the one before. Tuples and dicts that
        pickling made up on the way are skipped.

    Examples
    --------
    >>> render_path("cfg", [cfg := {"opt": [1]}, cfg["opt"]])
    'cfg["opt"]'
    """
    path, position = name, 0
    while position < len(chain) - 1:
        step, position = _next_step(chain, position)
        path += step
    return path


def _next_step(chain: Sequence[Any], position: int) -> tuple[str, int]:
    """Return the code of one step, and where it leads: the first later object that `chain[position]` holds."""
    parts = parts_by_id(chain[position])
    for later in range(position + 1, len(chain)):
        step = parts.get(id(chain[later]))
        if step is not None:
            return step.code, later
    return "", position + 1


# --- what an object holds ----------------------------------------------------------------------------------


def parts_by_id(holder: Any) -> dict[int, Step]:
    """Map the id of everything that `holder` holds to the step that leads there; the first one counts."""
    found: dict[int, Step] = {}
    for step, value in parts(holder):
        found.setdefault(id(value), step)
    return found


def parts(holder: Any) -> Iterator[tuple[Step, Any]]:
    """Yield what an object holds, without running any code of its class: no ``items()``, no properties."""
    if isinstance(holder, types.FunctionType):
        yield from _function_parts(holder)
    elif isinstance(holder, type):
        yield from _class_parts(holder)
    elif isinstance(holder, types.MethodType):
        yield Step("self", ".__self__"), holder.__self__
        yield Step("its function", ".__func__"), holder.__func__
    elif isinstance(holder, types.BuiltinMethodType):
        yield Step("self", ".__self__"), holder.__self__
    elif isinstance(holder, functools.partial):
        yield Step("its function", ".func"), holder.func
        for position, value in enumerate(holder.args):
            yield Step(f"argument {position}", f".args[{position}]"), value
        for name, value in holder.keywords.items():
            yield Step(f"argument {name}", f".keywords[{name!r}]"), value
    elif isinstance(holder, property):
        for name, words in (("fget", "getter"), ("fset", "setter"), ("fdel", "deleter")):
            yield Step(words, f".{name}"), getattr(holder, name)
    elif isinstance(holder, staticmethod | classmethod):
        yield Step("its function", ""), holder.__func__
    else:
        yield from _attributes(holder)
        yield from _items(holder)
        yield Step(f"class {type(holder).__name__}", ".__class__"), type(holder)


def _function_parts(function: types.FunctionType) -> Iterator[tuple[Step, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield Step(f"closure {name}", f" → {name}"), cell.cell_contents
        except ValueError:  # a variable of the outer function that is not assigned yet
            continue
    space = function.__globals__
    for name in dict.fromkeys(global_names(code)):
        if name in space:
            yield Step(f"global {name}", f" → {name}"), space[name]
    yield from _defaults(function)
    for name, value in vars(function).items():
        yield Step(f"attribute {name}", f".{name}"), value
    for name, value in getattr(function, "__annotations__", {}).items():
        yield Step(f"annotation of {name}", f".__annotations__[{name!r}]"), value


def _defaults(function: types.FunctionType) -> Iterator[tuple[Step, Any]]:
    defaults = function.__defaults__ or ()
    code = function.__code__
    names = code.co_varnames[: code.co_argcount][-len(defaults) :] if defaults else ()
    for position, (name, value) in enumerate(zip(names, defaults, strict=False)):
        yield Step(f"default of {name}", f".__defaults__[{position}]"), value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield Step(f"default of {name}", f".__kwdefaults__[{name!r}]"), value


def global_names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function's code, and that of functions inside it, may take from its globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from global_names(constant)


def _class_parts(cls: type) -> Iterator[tuple[Step, Any]]:
    for name, value in vars(cls).items():
        if name == "__slotnames__":  # pickle's own note
            continue
        kind = "method" if isinstance(value, types.FunctionType | staticmethod | classmethod) else "attribute"
        yield Step(f"{kind} {name}", f".{name}"), value
    for base in cls.__bases__:
        yield Step(f"base {base.__name__}", f" → {base.__name__}"), base
    if type(cls) is not type:
        yield Step(f"metaclass {type(cls).__name__}", ".__class__"), type(cls)


def _attributes(holder: Any) -> Iterator[tuple[Step, Any]]:
    try:
        attributes = object.__getattribute__(holder, "__dict__")
    except AttributeError:
        attributes = None
    if isinstance(attributes, dict):
        for name, value in list(attributes.items()):
            yield Step(f"attribute {name}", f".{name}"), value
    for name, member in _slots(type(holder)):
        try:
            yield Step(f"attribute {name}", f".{name}"), member.__get__(holder)
        except AttributeError:  # a slot that is empty
            continue


def _slots(cls: type) -> Iterator[tuple[str, Any]]:
    for base in cls.__mro__:
        for name, member in list(vars(base).items()):
            if isinstance(member, types.MemberDescriptorType) and not name.startswith("__"):
                yield name, member


def _items(holder: Any) -> Iterator[tuple[Step, Any]]:
    # The builtins' own methods: a subclass may have written others.
    if isinstance(holder, dict):
        for key, value in list(dict.items(holder)):
            yield Step(f"key {_short(key)}", _index(key)), value
        for key in list(dict.keys(holder)):
            yield Step(f"the key {_short(key)}", " → key"), key
    elif isinstance(holder, list | tuple):
        values: Any = list.__iter__(holder) if isinstance(holder, list) else tuple.__iter__(holder)
        for position, value in enumerate(values):
            yield Step(f"item {position}", f"[{position}]"), value
    elif isinstance(holder, set | frozenset):
        for value in set.__iter__(holder) if isinstance(holder, set) else frozenset.__iter__(holder):
            yield Step("an item", "{…}"), value
    elif isinstance(holder, collections.deque):
        for position, value in enumerate(collections.deque.__iter__(holder)):
            yield Step(f"item {position}", f"[{position}]"), value
    elif isinstance(holder, types.MappingProxyType):
        for key, value in holder.items():
            yield Step(f"key {_short(key)}", _index(key)), value
    elif isinstance(holder, BaseException):
        for position, value in enumerate(holder.args):
            yield Step(f"argument {position}", f".args[{position}]"), value
    elif type(holder).__name__ == "ndarray" and type(holder).__module__ == "numpy" and holder.dtype.hasobject:
        for position, value in enumerate(holder.ravel().tolist()):
            yield Step(f"item {position}", f".flat[{position}]"), value


def _short(key: Any) -> str:
    # Only what Python itself draws: a key of the user's may have any __repr__.
    if type(key) in (str, bytes, int, float, bool, type(None), complex):
        text = repr(key)
    elif type(key) is tuple:
        text = f"({', '.join(map(_short, key))})"
    else:
        text = f"a {type(key).__name__}"
    return text if len(text) <= 40 else f"{text[:39]}…"


def _index(key: Any) -> str:
    return f'["{key}"]' if isinstance(key, str) else f"[{_short(key)}]"


# --- the pickler -------------------------------------------------------------------------------------------


class Counter:
    """A file that only counts."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        """Count `data`."""
        size = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        self.size_bytes += size
        return size


class TracingPickler(pickle._Pickler):  # the pure Python one: its save() recurses
    """A cloudpickle whose every ``save`` can be seen: slow, and its output is only counted.

    Parameters
    ----------
    cloudpickle_pickler : type
        The cloudpickle to follow: its ``Pickler``.
    """

    def __init__(self, cloudpickle_pickler: Any) -> None:
        self.counter = Counter()
        super().__init__(self.counter, protocol=5)
        self._follows = cloudpickle_pickler
        self.dispatch_table = cloudpickle_pickler.dispatch_table
        self.globals_ref: dict[int, dict[str, Any]] = {}  # what cloudpickle's own __init__ makes

    def __getattr__(self, name: str) -> Any:
        # cloudpickle's reducers are plain methods of its pickler, which is a C type and cannot be a second base.
        follows = self.__dict__.get("_follows")
        method = vars(follows).get(name) if follows is not None else None
        if not isinstance(method, types.FunctionType):
            raise AttributeError(name)
        return types.MethodType(method, self)

    def reduce_as_cloudpickle(self, obj: Any) -> Any:
        """Return what cloudpickle's own ``reducer_override`` would."""
        return types.MethodType(self._follows.reducer_override, self)(obj)


class ChainPickler(TracingPickler):
    """Remembers the chain of objects it is in when something fails."""

    def __init__(self, cloudpickle_pickler: Any) -> None:
        super().__init__(cloudpickle_pickler)
        self.chain: list[Any] = []

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Pickle `obj`; on failure `chain` leads to the culprit."""
        self.chain.append(obj)
        super().save(obj, save_persistent_id)  # type: ignore[misc]  # not in typeshed
        self.chain.pop()  # not reached on failure
