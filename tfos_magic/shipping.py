"""Functions become bytes, and bytes functions; what cannot travel is named before Spark is asked.

Runs on: driver and executors.

    driver  function ──pack──► Payload(data, objects, sources, …)        ResultError, objects ◄──unpack_result── bytes
    ────────────────────────────────│──────────────────────────────────────────────────────────────────────▲────────
    child                       unpack ──► function, sources in linecache ──► value ──pack_result───────────┘

Everything of the notebook travels by value, modules and what they define by import. Each captured object is pickled
once by itself, which gives its size and, where it fails, tells whose fault it is.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import importlib.util
import io
import linecache
import pickle
import sys
import sysconfig
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import cloudpickle

from tfos_magic import cell, obstacles, tracing
from tfos_magic.errors import EnvironmentMismatchError, ResultError, ShippingError

LARGE_BYTES = 10 * 1000 * 1000
"""From this size on a captured object is worth a warning: it travels to every node."""

_REPR_CHARACTERS = 200
# What a notebook's open() is: it only guards the kernel's own descriptors, and nodes may have no IPython.
_NOTEBOOK_OPEN = "IPython.core.interactiveshell"


@dataclass(frozen=True)
class ShippedObject:
    """One object that the function takes along."""

    name: str
    kind: str
    """Its type in a word: ``function``, ``class``, ``module``, ``ndarray``, …"""
    size_bytes: int
    how: str
    """``by value`` or ``by import of <module>``."""


@dataclass(frozen=True)
class ShippedModule:
    """A module that nodes must be able to import."""

    name: str
    file: str
    """Where the driver has it; empty when built in or not found."""
    is_local: bool
    """True when it lies outside Python's own folders: executors probably do not have it."""


@dataclass(frozen=True)
class Payload:
    """A function, ready to travel.

    Attributes
    ----------
    data : bytes
        For :func:`unpack`.
    objects : tuple of ShippedObject
        What the function takes along, largest first; nested objects count in each that holds them.
    sources : mapping of str to str
        File name → text of every cell or script of which code is shipped by value.
    modules : tuple of ShippedModule
        Top-level modules that nodes will import.
    warnings : tuple of str
        What is costly or was left behind, one sentence each.
    """

    data: bytes = field(repr=False)
    objects: tuple[ShippedObject, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)
    modules: tuple[ShippedModule, ...] = ()
    left_out: tuple[str, ...] = ()
    """Captured names that stay behind, because the cell assigns its own."""
    warnings: tuple[str, ...] = ()


# --- function → bytes → function ---------------------------------------------------------------------------


def pack(function: Callable[..., Any], *, args: Any = None, grid: Sequence[Mapping[str, Any]] | None = None) -> Payload:
    """Pickle `function` and `args`, checking everything they take along.

    Parameters
    ----------
    function : callable
        A :class:`~tfos_magic.cell.CellFunction` or any function of ``(args, ctx)``.
    args : object, optional
        What the function will be called with.
    grid : sequence of mapping, optional
        What is different on each node, in node order: see :mod:`tfos_magic.grid`.

    Returns
    -------
    Payload

    Raises
    ------
    ShippingError
        Something cannot travel; the message has its path, the reason and what to do.
    """
    survey = _Survey()
    named = _captures(function)
    objects, left_out = _measure(function, named, survey)
    for each, value in (("args", args), ("grid", grid)):
        if value is not None:
            objects.append(_measure_one(each, value, survey, where=""))
    if left_out:
        function = cast(cell.CellFunction, function).without(left_out)
    name = _name_of(function)
    try:
        body = _dumps((function, args, grid), survey)
    except Exception as error:  # any __reduce__ may raise anything
        raise _explain(name, function, error) from None
    sources = {**_sources(survey.files), **_own_source(function)}
    data = pickle.dumps(_Envelope(sys.version_info[:2], sources, body), protocol=5)
    return Payload(
        data=data,
        objects=tuple(sorted(objects, key=lambda each: -each.size_bytes)),
        sources=sources,
        modules=_modules(function, survey),
        left_out=tuple(left_out),
        warnings=(*map(_left_out_warning, left_out), *_size_warnings(objects, {**named, "args": args, "grid": grid})),
    )


def unpack(data: bytes, *, as_main: bool = False) -> Callable[..., Any]:
    """Return the function that :func:`pack` was given; its sources are then in :mod:`linecache`.

    Parameters
    ----------
    data : bytes
        ``Payload.data``.
    as_main : bool
        Make the function's namespace this process's ``__main__``; for a child process, whose own is of no use.

    Raises
    ------
    EnvironmentMismatchError
        This Python is not the driver's.
    ModuleNotFoundError
        A module that the function needs is not here.
    """
    return unpack_call(data, as_main=as_main)[0]


def unpack_call(data: bytes, *, as_main: bool = False) -> tuple[Callable[..., Any], Any]:
    """Return function and args as :func:`pack` was given them; see :func:`unpack`."""
    function, args, _ = _unpack(data, as_main)
    return function, args


def unpack_for_node(data: bytes, index: int) -> tuple[Callable[..., Any], Any, Mapping[str, Any] | None]:
    """Return function, args and point of the grid (None where there is no grid) for the node with this index.

    The function's namespace is then this process's ``__main__``, and the point's keys are attributes of args; errors
    are those of :func:`unpack`.
    """
    from tfos_magic import grid

    function, args, points = _unpack(data, as_main=True)
    if points is None:
        return function, args, None
    grid.apply(points[index], args)
    return function, args, points[index]


def _unpack(data: bytes, as_main: bool) -> tuple[Callable[..., Any], Any, Sequence[Mapping[str, Any]] | None]:
    envelope: _Envelope = pickle.loads(data)
    here = sys.version_info[:2]
    if envelope.python != here:
        raise EnvironmentMismatchError(
            f"The driver runs Python {_dotted(envelope.python)}, this executor Python {_dotted(here)}.",
            cause="Code cannot travel between minor versions of Python.",
            hint="Set spark.pyspark.python (or PYSPARK_PYTHON) to the same version on both sides.",
        )
    for filename, text in envelope.sources.items():
        install_source(filename, text)
    function, args, grid = pickle.loads(envelope.body)
    if as_main:
        cell.install_as_main(_namespace_of(function))
    return function, args, grid


def install_source(filename: str, text: str) -> None:
    """Let :mod:`inspect`, tracebacks and AutoGraph find the lines of a file that is not on this machine."""
    if not Path(filename).exists():
        # Without a modification time linecache.checkcache() leaves the entry alone.
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)


def pack_result(value: Any) -> bytes:
    """Pickle what the user's function returned, on a node.

    A Keras ``History`` becomes its ``history`` dict: it holds the model, and the driver wants the figures.

    Raises
    ------
    ResultError
        The value cannot be pickled; the message has its type, its repr and the part at fault.
    """
    survey = _Survey()
    try:
        return _dumps(value, survey)
    except Exception as error:  # any __reduce__ may raise anything
        reason = _explain("value", value, error)
        raise ResultError(
            f"The function returned {_article(type(value).__name__)} that cannot travel to the driver: "
            f"{_short_repr(value)}.",
            cause=str(reason.fact if reason.path != "value" else reason.cause),
            hint="Return numbers, arrays, strings, or lists and dicts of them; save models to a file.",
        ) from None


def unpack_result(data: bytes) -> Any:
    """Unpickle a node's value on the driver, leaving the notebook's own classes as they are.

    Raises
    ------
    ResultError
        The driver cannot make the value, e.g. it lacks a module that the executors have.
    """
    try:
        return _ResultUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # any __setstate__ may raise anything
        raise ResultError(
            f"A node's value could not be unpickled on the driver: {type(error).__name__}: {error}.",
            cause="The driver may lack a module that the executors have." if isinstance(error, ImportError) else "",
            hint="Return plain numbers, arrays, lists or dicts.",
        ) from error


@dataclass(frozen=True)
class _Envelope:
    """What can be read before anything of the user's is unpickled."""

    python: tuple[int, ...]
    sources: Mapping[str, str]
    body: bytes


class _ResultUnpickler(pickle.Unpickler):
    """Unpickles without giving live classes the state of their copies.

    cloudpickle recognises a class that comes home, but then sets every attribute as it was on the node: the
    notebook's methods would lose their globals. Classes that exist here already keep what they are.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._at_home: set[int] = set()

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if module != "cloudpickle.cloudpickle":
            return found
        if name in ("_make_skeleton_class", "_make_skeleton_enum"):
            return functools.partial(self._make_skeleton, found)
        if name == "_class_setstate":
            return functools.partial(self._set_class_state, found)
        return found

    def _make_skeleton(self, make: Callable[..., type], *arguments: Any) -> type:
        # cloudpickle ≥ 2 passes the class's own id, and keeps the classes it knows by that id.
        known = getattr(cloudpickle.cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_ID", {})
        was_known = any(isinstance(argument, str) and argument in known for argument in arguments)
        made = make(*arguments)
        if was_known:
            self._at_home.add(id(made))
        return made

    def _set_class_state(self, set_state: Callable[..., Any], kind: type, state: Any) -> Any:
        return kind if id(kind) in self._at_home else set_state(kind, state)


# --- pickling ----------------------------------------------------------------------------------------------


@dataclass
class _Survey:
    """What the pickler met."""

    files: dict[str, None] = field(default_factory=dict)
    """Files of code that travels by value."""
    modules: dict[str, None] = field(default_factory=dict)
    """Modules that travel by import."""


class _Refusal(Exception):
    """Stops the pickler at an object that must not travel, although it might pickle."""


def reduce_for_nodes(obj: Any, default: Callable[[Any], Any]) -> Any:
    """Return what ``reducer_override`` of this module's picklers would.

    Parameters
    ----------
    obj : object
    default : callable(object)
        cloudpickle's own ``reducer_override``.
    """
    return _reduce(obj, _Survey(), default)


def _reduce(obj: Any, survey: _Survey, default: Callable[[Any], Any]) -> Any:
    """Pickle as cloudpickle does, but for the notebook's and Spark's own objects; note what is met."""
    if obstacles.find(obj, is_refused=True):
        raise _Refusal
    if isinstance(obj, types.ModuleType):
        return _reduce_module(obj, survey, default)
    if _is_of(obj, "keras", "History") and isinstance(getattr(obj, "history", None), dict):
        return dict, (obj.history,)
    if isinstance(obj, types.FunctionType) and obj.__name__ == "open" and cell.home_of(obj) == _NOTEBOOK_OPEN:
        return getattr, (builtins, "open")
    reduced = default(obj)
    if reduced is NotImplemented and isinstance(obj, type | types.FunctionType | types.BuiltinFunctionType):
        _note_module(obj.__module__, survey)
    elif isinstance(obj, types.FunctionType):
        survey.files.setdefault(obj.__code__.co_filename)
    return reduced


def _reduce_module(module: types.ModuleType, survey: _Survey, default: Callable[[Any], Any]) -> Any:
    name = module.__name__
    if name in sys.modules and name != "__main__":
        _note_module(name, survey)
        return importlib.import_module, (name,)
    return default(module)


def _note_module(name: str | None, survey: _Survey) -> None:
    if name:
        survey.modules.setdefault(name.partition(".")[0])


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle publishes no types
    def __init__(self, file: Any, survey: _Survey) -> None:
        super().__init__(file, protocol=5)
        self._survey = survey

    def reducer_override(self, obj: Any) -> Any:
        return _reduce(obj, self._survey, super().reducer_override)


class _ChainPickler(tracing.ChainPickler):
    """Leads to the object at fault."""

    def __init__(self) -> None:
        super().__init__(cloudpickle.Pickler)

    def reducer_override(self, obj: Any) -> Any:
        return reduce_for_nodes(obj, self.reduce_as_cloudpickle)


def _dumps(value: Any, survey: _Survey) -> bytes:
    file = io.BytesIO()
    _Pickler(file, survey).dump(value)
    return file.getvalue()


# --- what a function takes along ---------------------------------------------------------------------------


def _captures(function: Any) -> dict[str, Any]:
    """Name → object for everything that travels with `function` by value."""
    if isinstance(function, cell.CellFunction):
        return function.captured
    if isinstance(function, types.FunctionType) and not _travels_by_import(function):
        return _function_captures(function)
    return {_name_of(function): function}


def _function_captures(function: types.FunctionType) -> dict[str, Any]:
    space = function.__globals__
    found = {name: space[name] for name in tracing.global_names(function.__code__) if name in space}
    for name, holder in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = holder.cell_contents
        except ValueError:  # a variable of the outer function that is not assigned yet
            continue
    return {name: value for name, value in found.items() if value is not function}


def _travels_by_import(obj: Any) -> bool:
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or module.__name__ == "__main__":
        return False
    try:
        return functools.reduce(getattr, obj.__qualname__.split("."), module) is obj
    except AttributeError:
        return False


def _name_of(function: Any) -> str:
    if isinstance(function, cell.CellFunction):
        return function.label
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


def _measure(function: Any, named: Mapping[str, Any], survey: _Survey) -> tuple[list[ShippedObject], list[str]]:
    """Pickle each object by itself; return what travels, and the names that the cell can do without."""
    lines: Mapping[str, int] = getattr(function, "lines", {})
    optional: Collection[str] = getattr(function, "optional", ())
    objects: list[ShippedObject] = []
    left_out: list[str] = []
    is_plain = isinstance(function, types.FunctionType)
    for name, value in named.items():
        where = f"{function.label}, line {lines[name]}: " if name in lines else ""
        path = f"{_name_of(function)} → {name}" if is_plain and value is not function else name
        try:
            objects.append(_measure_one(name, value, survey, where=where, path=path))
        except ShippingError:
            if name not in optional:
                raise
            left_out.append(name)
    return objects, left_out


def _measure_one(name: str, value: Any, survey: _Survey, *, where: str, path: str = "") -> ShippedObject:
    counter = tracing.Counter()
    try:
        _Pickler(counter, survey).dump(value)
    except Exception as error:  # any __reduce__ may raise anything
        raise _explain(path or name, value, error, where) from None
    return ShippedObject(name, tracing.kind_of(value), counter.size_bytes, _how(value))


def _how(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"by import of {value.__name__}"
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) and _travels_by_import(value):
        return f"by import of {value.__module__}"
    return "by value"


def _size_warnings(objects: Sequence[ShippedObject], values: Mapping[str, Any]) -> Iterator[str]:
    for each in objects:
        if each.size_bytes <= LARGE_BYTES:
            continue
        path = _heaviest_path(each.name, values[each.name])
        yield (
            f"{path} adds {each.size_bytes / 1e6:.0f} MB to what every node is sent. "
            "Give rows to --data, or write it to a file that the nodes can read."
        )


def _heaviest_path(name: str, value: Any) -> str:
    """Follow the weight from a function to the object that has it."""
    path = name
    for _ in range(8):
        if not isinstance(value, types.FunctionType) or _travels_by_import(value):
            return path
        sizes = {}
        for inner, captured in _function_captures(value).items():
            counter = tracing.Counter()
            _Pickler(counter, _Survey()).dump(captured)
            sizes[inner] = counter.size_bytes
        heaviest = max(sizes, key=lambda inner: sizes[inner], default=None)
        if heaviest is None or sizes[heaviest] <= LARGE_BYTES:
            return path
        path, value = f"{path} → {heaviest}", _function_captures(value)[heaviest]
    return path


def _left_out_warning(name: str) -> str:
    return f"The notebook's {name} cannot travel and was left behind: the cell assigns its own."


# --- sources and modules -----------------------------------------------------------------------------------


def _sources(files: Collection[str]) -> dict[str, str]:
    own = [name for name in files if not Path(name).exists() or _is_local(name)]  # nodes have the libraries' files
    return {name: text for name in own if (text := "".join(linecache.getlines(name)))}


def _own_source(function: Any) -> dict[str, str]:
    return {function.filename: function.text} if isinstance(function, cell.CellFunction) else {}


def _namespace_of(function: Any) -> dict[str, Any]:
    if isinstance(function, cell.CellFunction):
        return function.namespace
    return cast("dict[str, Any]", getattr(function, "__globals__", {}))


def _modules(function: Any, survey: _Survey) -> tuple[ShippedModule, ...]:
    names = {*survey.modules, *(function.imports if isinstance(function, cell.CellFunction) else ())}
    names -= {"__main__", "cloudpickle", "tfos_magic", *sys.stdlib_module_names}
    return tuple(_describe_module(name) for name in sorted(names))


def _describe_module(name: str) -> ShippedModule:
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) or ""
    if module is None:
        file = _find_file(name)
    return ShippedModule(name, file, is_local=bool(file) and _is_local(file))


def _find_file(name: str) -> str:
    """Find a module that the cell itself will import, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ""
    return (spec.origin or "") if spec is not None and spec.has_location else ""


def _is_local(file: str) -> bool:
    path = Path(file).resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    folders = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(folder in path.parents for folder in folders)


# --- what went wrong, and where ----------------------------------------------------------------------------


def _explain(name: str, value: Any, error: Exception, where: str = "") -> ShippingError:
    """Find the object at fault, and say how it is reached, why it cannot travel and what to do."""
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        hint = "Make it flatter, or make it on the nodes, inside the cell."
        return ShippingError(f"{where}{name} is nested too deeply to be pickled.", path=name, hint=hint)
    chain, obstacle = _culprit(value)
    path = tracing.render_path(name, chain)
    if obstacle is None:
        reason = str(error) if not isinstance(error, _Refusal) else "it refuses to be pickled"
        return ShippingError(
            f"{where}{path} cannot travel to the executors ({type(chain[-1]).__name__}).",
            path=path,
            cause=f"Pickling it failed: {type(error).__name__}: {reason}",
            hint="Make it on the nodes, inside the cell.",
        )
    return ShippingError(
        f"{where}{path} cannot travel to the executors: it is {obstacle.what}.",
        path=path,
        cause=obstacle.why,
        hint=obstacle.fix,
    )


def _culprit(value: Any) -> tuple[list[Any], obstacles.Obstacle | None]:
    """Return the chain of objects down to the first known obstacle, else to where pickling stops."""
    pickler = _ChainPickler()
    with contextlib.suppress(Exception):  # the same failure again, now with its chain
        pickler.dump(value)
    chain = pickler.chain or [value]
    for position, obj in enumerate(chain):
        obstacle = obstacles.find(obj)
        if obstacle:
            return chain[: position + 1], obstacle
    return chain, None


def _is_of(obj: Any, package: str, name: str) -> bool:
    return type(obj).__name__ == name and str(type(obj).__module__).partition(".")[0] in (package, f"tf_{package}")


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def _short_repr(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # a user's __repr__ may raise anything
        return f"<its __repr__ raised {type(error).__name__}>"
    return text if len(text) <= _REPR_CHARACTERS else text[: _REPR_CHARACTERS - 1] + "…"


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
