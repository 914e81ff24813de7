"""The notebook as the magics see it: its names, the cell that is running, its Spark session.

Runs on: notebook.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import IPython

from tfos_magic import arguments
from tfos_magic.cell import PARAMETERS, CellFunction, map_function
from tfos_magic.errors import UsageError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from tfos_magic.shipping import Payload


class Notebook:
    """What one shell has and runs.

    Parameters
    ----------
    shell : InteractiveShell
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell

    @property
    def namespace(self) -> dict[str, Any]:
        """Its globals."""
        return cast("dict[str, Any]", self._shell.user_ns)

    # --- the running cell ---

    @property
    def label(self) -> str:
        """What the running cell is called, e.g. ``Cell In[4]``."""
        return self._cell_name(self._running_filename()) or f"Cell In[{self._running_count}]"

    def cell_names(self, payload: Payload) -> dict[str, str]:
        """Map the file name of every cell whose code travels to how the notebook calls that cell."""
        names = {filename: self._cell_name(filename) for filename in payload.sources}
        return {filename: name for filename, name in names.items() if name}

    @property
    def _running_count(self) -> int:
        """Number of the running cell; IPython 9 counts up before a cell runs, older ones after."""
        return int(self._shell.execution_count) - (IPython.version_info[0] >= 9)

    def _running_filename(self) -> str:
        """Return the name under which IPython has compiled the cell that is running."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_globals is self._shell.user_global_ns:
                return frame.f_code.co_filename
            frame = frame.f_back
        return "<no cell>"

    def _cell_name(self, filename: str) -> str:
        return " ".join(self._shell.compile.format_code_name(filename) or ())

    # --- what is to run ---

    def cell_function(self, cell: str, *, predicts: bool = False) -> CellFunction:
        """Return the running cell as a function; UsageError when it is none, with the cell's own line."""
        label = self.label
        try:
            return map_function(
                cell,
                self.namespace,
                filename=self._running_filename(),
                label=label,
                flags=self._shell.compile.flags & _future_flags(),
                predicts=predicts,
            )
        except SyntaxError as error:
            raise _syntax_error(error, cell, label) from None

    def named_function(self, name: str) -> Callable[..., Any]:
        """Return the notebook's function of ``(args, ctx)`` of this name."""
        function = self._named(name, "function", arguments.names_of_functions(self.namespace))
        if not callable(function) or not _takes(function, 2):
            raise UsageError(f"NAME {name}: a function of (args, ctx) is needed, not {_signature(function)}.")
        return cast("Callable[..., Any]", function)

    def named_predictor(self, name: str) -> CellFunction:
        """Return a function of ``(args, ctx)`` that returns what predicts, under this name in the notebook.

        It is a cell of one line: the name, or its call where it is a function of ``(args, ctx)``.
        """
        value = self._named(name, "function or model", arguments.names_of_predictors(self.namespace))
        text = f"{name}(args, ctx)" if _follows_tfos(value) else name
        if text == name and not _predicts(value):
            raise UsageError(
                f"NAME {name}: a function of one batch or of (args, ctx), or a Keras model is needed, "
                f"not {_signature(value)}."
            )
        _require_stock_layers(name, value)
        label = f"%tfos_infer {name}"  # no cell's file: that one's source must stay the cell's
        return map_function(text, self.namespace, filename=f"<{label}>", first_line=1, label=label, predicts=True)

    def _named(self, name: str, kind: str, known: list[str]) -> Any:
        value = self.namespace.get(name)
        if value is None:
            raise UsageError(f"NAME {name}: the notebook has no such {kind}.{arguments.did_you_mean(name, known)}")
        return value


def _syntax_error(error: SyntaxError, cell: str, label: str) -> UsageError:
    """Return the error with the cell's own line: IPython would put the driver's frames above a plain SyntaxError."""
    number = error.lineno or 1
    lines = ["", *cell.split("\n")]  # the magic's line is line 1
    source = lines[number - 1] if number <= len(lines) else ""
    caret = " " * max(0, (error.offset or 1) - 1) + "^"
    is_return = "'return' outside function" in str(error.msg)
    return UsageError(
        f"{label}, line {number}\n    {source}\n    {caret}\nSyntaxError: {error.msg}",
        hint="The value of the cell's last expression comes back; no return is needed." if is_return else "",
    )


def _future_flags() -> int:
    import __future__

    return sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # made in C, without a signature: it must tell itself
        return True
    return True


def _is_model(value: Any) -> bool:
    return hasattr(type(value), "predict_on_batch")


def _require_stock_layers(name: str, value: Any) -> None:
    """Refuse a Keras model with classes of the notebook: it is pickled as a ``.keras`` file, which has only names."""
    layers = value._flatten_layers() if _is_model(value) and hasattr(value, "_flatten_layers") else ()
    own = sorted({type(layer).__name__ for layer in layers if type(layer).__module__ == "__main__"})
    if own:
        raise UsageError(
            f"NAME {name}: a Keras model travels without its classes, and {', '.join(own)} is the notebook's own.",
            hint=f"{name}.save(path) to where nodes can read; then a %%tfos_infer cell that has the class, "
            "and ends with keras.models.load_model(path).",
        )


def _follows_tfos(value: Any) -> bool:
    """Tell whether it is a function of ``(args, ctx)``: by the names, or because one argument would not do."""
    if not callable(value) or isinstance(value, type) or _is_model(value):
        return False
    try:
        named = tuple(inspect.signature(value).parameters)[:2] == PARAMETERS
    except (TypeError, ValueError):
        return False
    return named or (_takes(value, 2) and not _takes(value, 1))


def _predicts(value: Any) -> bool:
    """Tell whether it is a Keras model or a function of one batch."""
    if isinstance(value, type) or inspect.iscoroutinefunction(value):
        return False
    return _is_model(value) or (callable(value) and _takes(value, 1))


def _signature(value: Any) -> str:
    try:
        return f"{getattr(value, '__name__', type(value).__name__)}{inspect.signature(value)}"
    except (TypeError, ValueError):
        return type(value).__name__
