"""Distributed TensorFlow on Spark, from a notebook.

Runs on: anywhere. Imports nothing heavy: public names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__version__ = "0.1.0"
__all__ = [
    "TFCluster",
    "TFManager",
    "TFNode",
    "TFParallel",
    "cluster",
    "compat",
    "dfutil",
    "errors",
    "load_ipython_extension",
    "namedtuple_patch",
    "pipeline",
    "unload_ipython_extension",
]

_MODULES = frozenset(__all__) - {"load_ipython_extension", "unload_ipython_extension"}


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics; called by ``%load_ext tfos_magic``."""
    from tfos_magic.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take everything back; called by ``%unload_ext tfos_magic``."""
    from tfos_magic.magics import unload

    unload(shell)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tfos_magic.{name}")
    raise AttributeError(f"module 'tfos_magic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
