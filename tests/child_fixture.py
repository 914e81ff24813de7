"""A clean interpreter that does what a node's child does with a payload: unpack, run, send the value back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tfos_magic
from tfos_magic import cell, shipping

_CHILD = """
import pathlib, sys
from tfos_magic import shipping
function, args = shipping.unpack_call(pathlib.Path(sys.argv[1]).read_bytes(), as_main=True)
pathlib.Path(sys.argv[2]).write_bytes(shipping.pack_result(function(args, "ctx")))
"""


class Child:
    """Runs functions in processes of their own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def run(self, function: Callable[..., Any], *, args: Any = None, python: str = sys.executable) -> Any:
        """Return what ``function(args, "ctx")`` returns there."""
        return shipping.unpack_result(self.run_raw(shipping.pack(function, args=args), python=python))

    def run_raw(self, payload: shipping.Payload, *, python: str = sys.executable) -> bytes:
        source, target = self._directory / "payload", self._directory / "result"
        source.write_bytes(payload.data)
        done = subprocess.run(
            [python, "-c", _CHILD, str(source), str(target)],
            env={"PYTHONPATH": str(Path(tfos_magic.__file__).parents[1]), "TF_CPP_MIN_LOG_LEVEL": "3"},
            cwd=self._directory,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return target.read_bytes()

    def run_cell(self, body: str, namespace: dict[str, Any], *, args: Any = None) -> Any:
        """Return the value of a cell run there."""
        return self.run(cell.map_function(body, namespace, filename="<cell 7>", label="Cell In[7]"), args=args)


def notebook(*cells: str) -> dict[str, Any]:
    """Return the globals of a notebook in which these cells have run, each findable as IPython's are."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    for number, text in enumerate(cells, 1):
        filename = f"<notebook cell {number}>"
        shipping.install_source(filename, text)
        exec(compile(text, filename, "exec", dont_inherit=True), namespace)
    return namespace
