"""The package as one zip, so that executors need not have it installed.

Runs on: driver (:func:`build`, :func:`by_value`) and executors (the function that `by_value` returns).

    driver                                    │ executor
    build() ─► zip bytes ─┐                   │
    by_value("module:function", zip) ─ pickled┼─► mounts the zip from memory for the length of one call
                                              │   (a memfd: nothing on disk, nothing left behind)

The zip holds this package and the two pure-Python packages that it needs on executors and Spark does not bring:
cloudpickle and NVIDIA's pynvml. pyarrow, pandas and TensorFlow are the cluster's to provide.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import py_compile
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_COMPANIONS = ("cloudpickle", "pynvml")
# Spark broadcasts what is larger than 1 MiB; so nothing travels in vain.
_LEFT_OUT = frozenset(
    {
        "arguments",
        "completion",
        "doctor",
        "doctor_magic",
        "dry_run",
        "magics",
        "notebook",
        "runs_magic",
        "standing",
        "tensorboard_magic",
        "widgets",
    }
)
"""Modules and folders of the notebook's side, and the doctor, who sends what he needs there himself."""
_SOURCE_ONLY = frozenset(
    {"TFCluster", "TFParallel", "cluster", "dfutil", "failures", "feeding", "inference", "java", "jobs", "launching"}
    | {"members", "namedtuple_jobs", "namedtuple_session", "pipeline", "pipeline_files", "pipeline_params", "pynvml"}
    | {"queues", "result", "roles", "session", "background", "logbook", "scalars", "tensorboard_server"}
    | {"briefing", "prepare", "tasks"}
)
"""What an executor imports seldom or never goes without bytecode."""


@functools.cache
def build() -> bytes:
    """Return the zip: sources, and bytecode of this Python, which another version ignores in favour of the sources."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        tempfile.TemporaryDirectory(prefix="tfos_magic-") as scratch,
    ):
        for source, name in _files():
            archive.write(source, name)
            if source.stem in _SOURCE_ONLY:
                continue
            compiled = Path(scratch) / "module.pyc"
            py_compile.compile(
                str(source),
                str(compiled),
                name,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                optimize=2,  # without docstrings, which are a good part of it, and in the sources beside it
            )
            archive.write(compiled, name + "c")
    return stream.getvalue()


def _files() -> Iterator[tuple[Path, str]]:
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.with_suffix("").parts[0] not in _LEFT_OUT:
            yield path, f"{package.name}/{name}"
    for companion in _COMPANIONS:
        spec = importlib.util.find_spec(companion)
        if spec is None or spec.origin is None:
            continue  # pynvml is optional where there is no GPU
        origin = Path(spec.origin)
        if origin.name != "__init__.py":
            yield origin, origin.name
            continue
        for path in sorted(origin.parent.rglob("*.py")):
            yield path, f"{companion}/{path.relative_to(origin.parent)}"


def by_value(entry: str, archive: bytes) -> Callable[..., Any]:
    """Return a function that Spark can ship, which runs `entry` from `archive` wherever it arrives.

    Parameters
    ----------
    entry : str
        ``module:generator_function``, e.g. ``tfos_magic.feed.task:feed_batches``.
    archive : bytes
        From :func:`build`.

    Returns
    -------
    callable
        Takes what the entry takes and yields what it yields. It is pickled by value: the executor unpickles it
        without having this package.
    """
    # cloudpickle sends a function by value when its module is __main__; everything it needs is in its arguments.
    copy = types.FunctionType(_call_in_archive.__code__, {"__name__": "__main__", "__builtins__": __builtins__})
    copy.__module__ = "__main__"
    return functools.partial(copy, entry, archive)


def _call_in_archive(entry: str, archive: bytes, *args: Any) -> Iterator[Any]:
    # Self-contained, because it travels by value: no name from this module may be used here.
    import importlib
    import os
    import sys

    def is_ours(name: str) -> bool:
        return name == "tfos_magic" or name.startswith("tfos_magic.")

    module_name, _, function_name = entry.partition(":")
    descriptor = os.memfd_create("tfos_magic")
    path = f"/proc/self/fd/{descriptor}"
    # A version that the executor has installed must neither be used nor be lost.
    displaced = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(archive)
        sys.path.insert(0, path)
        function = getattr(importlib.import_module(module_name), function_name)
        yield from function(archive, *args)
    finally:
        for name in [name for name in sys.modules if is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(displaced)
        if path in sys.path:
            sys.path.remove(path)
        os.close(descriptor)
        # The next memfd may get the same number, so no listing of this one may outlive it: neither the package's nor
        # those of the packages inside. Closed first, or they would be read again instead of forgotten.
        for place in [place for place in sys.path_importer_cache if place == path or place.startswith(path + "/")]:
            invalidate = getattr(sys.path_importer_cache.pop(place), "invalidate_caches", None)
            if invalidate is not None:
                invalidate()
