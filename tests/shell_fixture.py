"""A real IPython shell inside the test process, in which a cell that fails fails the test.

It is not the global instance, keeps no history file, starts no thread, and gives ``__main__`` back afterwards.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config


class TestingShell(InteractiveShell):
    """Runs cells as a notebook does."""

    __test__ = False

    def cell(self, text: str) -> Any:
        """Run a cell and return its value; raise what it raised."""
        return self.output_of(text).value

    def output_of(self, text: str) -> Output:
        """Run a cell; return its value with all that it printed; raise what it raised."""
        output = self.outcome_of(text)
        if output.error is not None:
            raise output.error
        return output

    def error_of(self, text: str) -> Output:
        """Run a cell that must fail."""
        output = self.outcome_of(text)
        assert output.error is not None, f"the cell did not fail:\n{text}\n{output.stdout}"
        return output

    def outcome_of(self, text: str) -> Output:
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            result = self.run_cell(text, store_history=True)
        error = result.error_before_exec or result.error_in_exec
        return Output(result.result, error, stdout.getvalue(), stderr.getvalue())

    def completions(self, text: str) -> list[str]:
        """Return what Tab offers at the end of `text`, which may have several lines."""
        line = text.split("\n")[-1]
        completer = self.Completer
        found = completer._complete(
            cursor_line=text.count("\n"), cursor_pos=len(line), line_buffer=line, text=None, full_text=text
        )
        return [completion.text for result in found.values() for completion in result["completions"]]

    def object_inspect_text(self, name: str) -> str:
        """Return what ``name?`` shows."""
        return str(self.object_inspect_mime(name)["text/plain"])


@dataclass(frozen=True)
class Output:
    """What a cell left."""

    value: Any
    error: BaseException | None
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)

    @property
    def text(self) -> str:
        return self.stdout + self.stderr


@contextlib.contextmanager
def running_shell() -> Iterator[TestingShell]:
    """A shell with a ``__main__`` of its own; both are gone afterwards."""
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    config.IPCompleter.use_jedi = False
    before = {name: sys.modules.get(name) for name in ("__main__",)}
    hooks = sys.displayhook, sys.excepthook
    main = types.ModuleType("__main__")
    shell = TestingShell(config=config, user_module=main, user_ns=main.__dict__)
    sys.modules["__main__"] = main
    try:
        yield shell
    finally:
        shell.atexit_operations()
        atexit.unregister(shell.atexit_operations)
        sys.modules.update({name: module for name, module in before.items() if module is not None})
        sys.displayhook, sys.excepthook = hooks
