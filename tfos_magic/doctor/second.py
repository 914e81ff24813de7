"""The other end of a trip: what arrives, told as plain facts.

Runs on: the doctor's second interpreter, and executors' Python workers; the driver uses its fingerprints. Standard
library only, and one file that needs no other: executors get its text.

    driver                         │ second interpreter: nothing but Python and PySpark's cloudpickle
    pickle + question ──── pipe ──►│ serve() ── fork ──► answer(): unpickle, look, pickle again, compare
    facts             ◄─── pipe ───│            ◄─ pipe ─┘   killed at the deadline; nothing of it stays
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pickle
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

IDLE_S = 600.0
"""A server that nobody has asked for so long ends by itself."""

_ORPHAN_CHECK_S = 10.0
_PR_SET_PDEATHSIG = 1
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, type(...)})
_KNOWN_EQUALITY = frozenset({"datetime", "decimal", "fractions", "pathlib", "uuid", "re", "ipaddress", "zoneinfo"})
_COMPARED_ITEMS = 10_000
_COMPARED_BYTES = 10_000_000
_TEXT_CHARACTERS = 250

Tell = Callable[[dict[str, Any]], None]


# --- one question ------------------------------------------------------------------------------------------


def answer(blob: bytes, question: dict[str, Any], tell: Tell | None = None) -> dict[str, Any]:
    """Unpickle and look.

    Parameters
    ----------
    blob : bytes
        Pickle of the value; with ``has_exceptions`` of ``(value, [(exception, its args), …])``.
    question : dict
        ``pickler`` (module of a cloudpickle), ``path`` (folders to add to ``sys.path``), ``methods``, ``mro``,
        ``modules``, ``names``; see `arrival`.
    tell : callable(dict), optional
        Given what is known before anything is compared: comparing may take too long.

    Returns
    -------
    dict
        Plain facts; ``error`` when it cannot be unpickled here.
    """
    facts: dict[str, Any] = {"python": ".".join(map(str, sys.version_info[:3])), "pid": os.getpid()}
    sys.path[1:1] = question.get("path", ())
    started = time.perf_counter()
    try:
        loaded = pickle.loads(blob)
        value, exceptions = loaded if question.get("has_exceptions") else (loaded, ())
    except BaseException as error:  # whatever a __setstate__ raises, it is the answer
        facts["error"] = _describe_error(error)
        facts.update(_surroundings(question))
        return facts
    facts["seconds"] = time.perf_counter() - started
    facts.update(_describe(value, question))
    facts["exceptions"] = [_is_equal(list(error.args), list(args)) for error, args in exceptions]
    facts.update(_surroundings(question))
    if tell is not None:
        tell(facts)
    facts.update(_go_back(value, question))
    return facts


def _describe_error(error: BaseException) -> dict[str, Any]:
    text = str(error).strip().split("\n")[0]
    return {
        "type": type(error).__name__,
        "text": text if len(text) <= _TEXT_CHARACTERS else text[: _TEXT_CHARACTERS - 1] + "…",
        "module": getattr(error, "name", None) if isinstance(error, ImportError) else None,
    }


def _describe(value: Any, question: dict[str, Any]) -> dict[str, Any]:
    cls = type(value)
    here = [full_name(each) for each in cls.__mro__]
    return {
        "type": full_name(cls),
        "missing_classes": [name for name in question.get("mro", ()) if name not in here],
        "lost_methods": [name for name in question.get("methods", ()) if not hasattr(cls, name)],
    }


def _go_back(value: Any, question: dict[str, Any]) -> dict[str, Any]:
    """Pickle what arrived, as its way back would, and compare the two."""
    try:
        dumps = importlib.import_module(question.get("pickler", "pyspark.cloudpickle")).dumps
        back = dumps(value)
        if len(back) > _COMPARED_BYTES:
            return {"size_bytes": len(back)}
        again = pickle.loads(back)
    except BaseException as error:  # whatever it raises, it is the answer
        return {"back_error": _describe_error(error)}
    return {
        "size_bytes": len(back),
        "back_type": full_name(type(again)),
        "is_same": again is value,
        "is_equal": _is_equal(value, again),
    }


def _surroundings(question: dict[str, Any]) -> dict[str, Any]:
    import collections

    code = collections.namedtuple.__code__
    return {
        "is_namedtuple_patched": "_hack_namedtuple" in code.co_names,
        "modules": {name: describe_module(name) for name in question.get("modules", ())},
        "names": {name: look_up(name) for name in question.get("names", ())},
    }


def full_name(cls: type) -> str:
    """Return module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


# --- modules and names -------------------------------------------------------------------------------------


def describe_module(name: str) -> dict[str, Any] | None:
    """Return version and file of a module, None where it cannot be found; imports nothing but packages above it."""
    module = sys.modules.get(name)
    try:
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if module is None and spec is None:
        return None
    version = getattr(module, "__version__", None)
    if not isinstance(version, str):
        try:
            version = importlib.metadata.version(name)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            version = ""
    file = getattr(module, "__file__", None) or (spec.origin if spec is not None and spec.has_location else "") or ""
    return {"version": version, "file": file}


def look_up(name: str) -> str:
    """Return the fingerprint of ``module:attribute.of.it`` here; ``?`` when there is none."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for each in attribute.split("."):
            found = getattr(found, each)
    except Exception:  # a module may raise anything when it is imported
        return "?"
    return fingerprint(found)


def fingerprint(obj: Any) -> str:
    """Return a digest that is the same wherever the same code or the same plain value is; empty for other objects."""
    if isinstance(obj, types.FunctionType):
        return _digest(repr(list(_code_facts(obj.__code__))) + _plain(obj.__defaults__))
    if isinstance(obj, type):
        # Functions only: what else a class has may be made anew with each import.
        members = sorted((name, fingerprint(value)) for name, value in vars(obj).items() if _is_function(value))
        return _digest(repr([[full_name(base) for base in obj.__bases__], members]))
    if isinstance(obj, staticmethod | classmethod):
        return fingerprint(obj.__func__)
    return _plain(obj)


def _is_function(obj: Any) -> bool:
    return isinstance(obj, types.FunctionType | staticmethod | classmethod)


def _plain(obj: Any) -> str:
    if type(obj) in (str, bytes, int, float, bool, type(None)):
        return _digest(repr(obj))
    if type(obj) is tuple and all(type(each) in (str, bytes, int, float, bool, type(None)) for each in obj):
        return _digest(repr(obj))
    return ""


def _code_facts(code: types.CodeType) -> Iterator[Any]:
    yield code.co_code
    yield code.co_names
    yield code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield list(_code_facts(constant))
        elif isinstance(constant, frozenset):
            yield sorted(map(repr, constant))
        else:
            yield repr(constant)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# --- equality ----------------------------------------------------------------------------------------------


def _is_equal(first: Any, second: Any, left: list[int] | None = None) -> bool | None:
    """Compare where equality is known to be harmless; None where it might be anything."""
    left = [_COMPARED_ITEMS] if left is None else left
    left[0] -= 1
    if left[0] < 0:
        return None
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if type(first) in _ATOMS:
        return bool(first == second or first != first)  # the second: not a number
    if type(first) in (list, tuple) or (isinstance(first, tuple) and type(first).__eq__ is tuple.__eq__):
        return _all_equal(zip(first, second, strict=True), left) if len(first) == len(second) else False
    if isinstance(first, dict) and type(first).__eq__ in _DICT_EQUALITY:
        keys = _all_equal(zip(first, second, strict=True), left) if len(first) == len(second) else False
        return keys and _all_equal(zip(first.values(), second.values(), strict=True), left)
    return _is_equal_otherwise(first, second, left)


def _is_equal_otherwise(first: Any, second: Any, left: list[int]) -> bool | None:
    cls = type(first)
    package = cls.__module__.partition(".")[0]
    if cls.__module__ in _KNOWN_EQUALITY or (cls in (set, frozenset) and all(type(v) in _ATOMS for v in first)):
        return bool(first == second)
    if package == "numpy" and hasattr(first, "dtype") and hasattr(first, "tobytes"):
        if first.dtype.hasobject:
            return None
        return bool(first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes())
    if package == "pandas" and hasattr(first, "equals"):
        return bool(first.equals(second))
    if _has_generated_equality(cls):
        names = [name for name, each in cls.__dataclass_fields__.items() if each.compare]
        return _all_equal(((getattr(first, name), getattr(second, name)) for name in names), left)
    return None


def _all_equal(pairs: Any, left: list[int]) -> bool | None:
    outcomes = [_is_equal(first, second, left) for first, second in pairs]
    return False if False in outcomes else None if None in outcomes else True


def _has_generated_equality(cls: type) -> bool:
    equality = cls.__dict__.get("__eq__")
    return hasattr(cls, "__dataclass_fields__") and getattr(equality, "__qualname__", "") in (
        "__create_fn__.<locals>.__eq__",
        f"{cls.__qualname__}.__eq__",
    )


def _dict_equalities() -> tuple[Any, ...]:
    import collections

    return (dict.__eq__, collections.OrderedDict.__eq__, collections.Counter.__eq__)


_DICT_EQUALITY = _dict_equalities()


# --- the server --------------------------------------------------------------------------------------------


def serve(driver: int) -> None:
    """Answer the questions that come in on stdin, each in a process of its own; ends with its stdin.

    Parameters
    ----------
    driver : int
        Process that asks. It may have ended before this one has looked who its parent is.
    """
    questions, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what unpickling prints is nobody's business
        os.dup2(null, descriptor)
    os.close(null)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ImportError):
        importlib.import_module("pyspark.cloudpickle")
    _Server(questions, answers, driver).run()


class _Server:
    def __init__(self, questions: int, answers: int, driver: int) -> None:
        self._questions = questions
        self._answers = answers
        self._driver = driver

    def run(self) -> None:
        while self._wait():
            question = self._read()
            if question is None:
                return
            blob = _read_exactly(self._questions, question.pop("blob_bytes"))
            if blob is None:
                return
            started = time.perf_counter()
            self._preload(question.pop("preload", ()))
            reply = self._ask_fork(blob, question)
            if reply is None:
                return
            reply["preload_s"] = time.perf_counter() - started - reply.pop("fork_s", 0.0)
            self._write(reply)

    def _wait(self) -> bool:
        """Wait for a question; return False when there will be none any more."""
        until = time.monotonic() + IDLE_S
        while time.monotonic() < until:
            # The end of the pipe tells that the driver has gone; not where a fork of the driver still holds it.
            if select.select([self._questions], [], [], min(_ORPHAN_CHECK_S, IDLE_S))[0]:
                return True
            if os.getppid() != self._driver:
                return False
        return False

    def _read(self) -> dict[str, Any] | None:
        head = _read_exactly(self._questions, 4)
        body = _read_exactly(self._questions, struct.unpack("!I", head)[0]) if head is not None else None
        return dict(json.loads(body)) if body is not None else None

    def _write(self, reply: dict[str, Any]) -> None:
        body = json.dumps(reply).encode()
        _write_all(self._answers, struct.pack("!I", len(body)) + body)

    def _preload(self, names: list[str]) -> None:
        """Import large libraries once and for all forks; of the user's own nothing is imported here."""
        for name in names:
            with contextlib.suppress(Exception):  # then the fork will say so
                importlib.import_module(name)

    def _ask_fork(self, blob: bytes, question: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a fork says until its deadline; None when the driver has gone meanwhile."""
        started = time.perf_counter()
        mine, its = os.pipe()
        child = os.fork()
        if child == 0:
            self._be_the_fork(blob, question, its, mine)
        os.close(its)
        said, outcome = self._listen(mine, float(question["deadline_s"]))
        os.close(mine)
        if outcome != "ended":
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if outcome == "driver gone":
            return None
        reply = _last_line(said)
        if outcome == "too late":
            reply["timed_out"] = True
        elif os.WIFSIGNALED(status):
            reply["died_of"] = os.WTERMSIG(status)
        reply["fork_s"] = time.perf_counter() - started
        return reply

    def _be_the_fork(self, blob: bytes, question: dict[str, Any], its: int, mine: int) -> None:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            for descriptor in (self._questions, self._answers, mine):
                os.close(descriptor)

            def tell(facts: dict[str, Any]) -> None:
                _write_all(its, json.dumps(facts).encode() + b"\n")

            tell(answer(blob, question, tell))
        finally:
            os._exit(0)  # TensorFlow takes its time to end; nothing here needs to be tidied

    def _listen(self, descriptor: int, deadline_s: float) -> tuple[bytes, str]:
        said = io.BytesIO()
        until = time.monotonic() + deadline_s
        while True:
            ready = select.select([descriptor, self._questions], [], [], max(0.0, until - time.monotonic()))[0]
            if descriptor in ready:
                data = os.read(descriptor, 1 << 16)
                if not data:
                    return said.getvalue(), "ended"
                said.write(data)
            elif self._questions in ready:  # it is not asked twice at a time: this is the end of the pipe
                return said.getvalue(), "driver gone"
            else:
                return said.getvalue(), "too late"


def _last_line(said: bytes) -> dict[str, Any]:
    lines = said.split(b"\n")[:-1]  # what follows the last line end is incomplete
    return dict(json.loads(lines[-1])) if lines else {}


def _read_exactly(descriptor: int, count: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < count:
        data = os.read(descriptor, min(count - len(pieces), 1 << 20))
        if not data:
            return None
        pieces += data
    return bytes(pieces)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
