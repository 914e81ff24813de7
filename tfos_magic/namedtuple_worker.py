"""What Spark's ordinary Python workers do about the namedtuple patch: revert it first, tell of it, put it back.

Runs on: driver (:func:`carry`) and executors (all else).

    driver                                     │ Python worker, warm or new
    carry(command) ─ pickled ──────────────────┼─► unpickling: 1. the revert     2. the command
        what PySpark would have sent, and      │        nothing to do: a look at one attribute, some microseconds
        7 KB before it                         │        patched: once per process, namedtuple_patch.revert()

The top of a task's body would be too late: to unpickle a closure that holds anything of TensorFlow's is to import
TensorFlow. Pickle builds the parts of a tuple in their order, so what stands before the command is done before it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import marshal
import operator
import os
import socket
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tfos_magic import namedtuple_patch

KEPT_AS = "_tfos_magic_namedtuple_patch"
"""Name in a worker's ``sys.modules`` of its own copy of `namedtuple_patch`, which can put back what it has changed."""


# --- on the driver ----------------------------------------------------------------------------------------


def carry(command: Any) -> Any:
    """Return what unpickles as `command`, the revert being done before any of it is unpickled."""
    return _Sequence(_Revert(), command)


class _Sequence:
    """Pickles as ``(first, then)[1]``."""

    def __init__(self, first: Any, then: Any) -> None:
        self.parts = first, then

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, (self.parts, 1)


class _Revert:
    """Pickles as a call of :func:`_revert_once`, with globals that hold all it needs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (_Code(marshal.dumps(_revert_once.__code__)), {"source": _packed_source(), "kept_as": KEPT_AS})


class _Code:
    """Pickles as a call that makes the code object; before that PySpark has compared the versions of Python."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return marshal.loads, (self.data,)


@functools.cache
def _packed_source() -> bytes:
    """Return the source of `namedtuple_patch`, compressed; without docstrings and comments it is a third as long."""
    loader: Any = namedtuple_patch.__loader__
    tree = ast.parse(loader.get_source(namedtuple_patch.__name__))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return zlib.compress(ast.unparse(tree).encode(), 9)


def once(ask: Callable[[Iterator[int]], Iterator[str]]) -> Callable[[int], str]:
    """Return a function of one number, for a UDF, from one for ``mapPartitions``; it travels by value."""
    copy = types.FunctionType(_ask_once.__code__, {"__name__": "__main__", "__builtins__": __builtins__})
    copy.__module__ = "__main__"
    return functools.partial(copy, ask)


def _ask_once(ask: Callable[[Iterator[int]], Iterator[str]], number: int) -> str:
    (answer,) = ask(iter([number]))
    return answer


# --- in a Python worker -----------------------------------------------------------------------------------


def _revert_once() -> None:
    # Runs as bare code: no name of this module is known there, only `source`, `kept_as` and what is imported here.
    import collections
    import sys

    make = collections.namedtuple
    if not hasattr(make, "__hijack"):
        return  # PySpark has not patched this process
    patch = sys.modules.get(kept_as)  # type: ignore[name-defined] # noqa: F821
    if patch is not None and "_hack_namedtuple" not in make.__code__.co_names:
        return
    if patch is None:
        import types
        import zlib

        name = "tfos_magic.namedtuple_patch"
        patch = types.ModuleType(name)
        displaced = sys.modules.get(name)
        sys.modules[name] = patch  # dataclasses look there for the module that they are made in
        try:
            exec(zlib.decompress(source), patch.__dict__)  # type: ignore[name-defined] # noqa: F821
        finally:
            del sys.modules[name]
            if displaced is not None:
                sys.modules[name] = displaced
        sys.modules[kept_as] = patch  # type: ignore[name-defined] # noqa: F821
    try:
        patch.revert()
    except Exception as error:  # a job that ran before must run now, too; the status tells of it
        patch.__dict__["problem"] = f"{type(error).__name__}: {error}"


def report(archive: bytes, numbers: Iterator[int]) -> Iterator[str]:
    """Yield what this Python worker is and the patch's state in it, as JSON; changes nothing."""
    yield json.dumps(_describe(list(numbers)))


def restore(archive: bytes, numbers: Iterator[int]) -> Iterator[str]:
    """Put back what :func:`carry` has changed in this Python worker, and yield what :func:`report` yields."""
    patch = sys.modules.pop(KEPT_AS, None)
    if patch is not None:
        patch.restore()
    yield json.dumps(_describe(list(numbers)))


def _describe(numbers: list[int]) -> dict[str, Any]:
    patch: Any = sys.modules.get(KEPT_AS, namedtuple_patch)
    parents = _parents()
    parent = parents[os.getpid()]
    has_daemon = not _is_java(parent)
    jvm = parents.get(parent, 0) if has_daemon else parent
    return {
        "task": numbers[0],
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "executor": _executor_id(jvm),
        "jvm_pid": jvm,
        "daemon": parent if has_daemon else None,
        "pools": _pools(jvm, parents),
        # Workers are forks of Spark's daemon, which imports PySpark when it starts: they are born with the patch.
        "born_at": started_at(parent if has_daemon else os.getpid()),
        "patch": patch.status().to_json(),
        "problem": getattr(patch, "problem", ""),
    }


def _parents() -> dict[int, int]:
    """Return the parent of every process that can be seen."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile
                found[int(path.name)] = int(_stat(path)[1])
    return found


def _pools(jvm: int, parents: dict[int, int]) -> dict[str, list[int]]:
    """Return the Python workers of an executor by the daemon that forked them.

    There is a pool for each environment that Spark gives to its workers: RDDs have one, SQL another.
    """
    daemons = [pid for pid, parent in parents.items() if parent == jvm and _is_sparks(pid)]
    return {str(daemon): [pid for pid, parent in parents.items() if parent == daemon] for daemon in daemons}


def _is_sparks(pid: int) -> bool:
    try:
        return b"PYTHON_WORKER_FACTORY_" in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or another user's
        return False


def _is_java(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "java"


def _stat(path: Path) -> list[str]:
    """Return the fields of a process's ``stat`` from the third on."""
    return (path / "stat").read_text().rpartition(")")[2].split()


def started_at(pid: int) -> float:
    """Return when a process began, in seconds since the epoch."""
    since_boot_s = int(_stat(Path(f"/proc/{pid}"))[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s


def _executor_id(jvm: int) -> str:
    """Return Spark's name for the executor whose JVM this is; in local mode that is the driver's."""
    words = Path(f"/proc/{jvm}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return words[words.index("--executor-id") + 1] if "--executor-id" in words else "driver"
