"""The button that ends a run, above its board; gone with the run's end.

Runs on: notebook.

    a cell that blocks     InterruptButton   JupyterLab and Notebook 7 interrupt the kernel at a click, by themselves: a
                                             kernel that is busy answers no widget
    in the background      RunButton         an ipywidgets button: the kernel is free, and ends this run alone

Other front ends, as far as they can be told from here, show how to interrupt the kernel in place of the first. A
notebook that nobody watches (nbclient, papermill) gets neither. The button is an output of its own: the board is drawn
anew twice a second, and whatever has the keyboard's focus there would lose it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from tfos_magic.widgets.outputs import publish

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_ROOT = '<div class="tfos-stop" style="font-size:12px">'
# Lab's and Notebook's own classes; data-commandlinker-* is their way for a page to name a command of theirs.
_BUTTON = (
    '<button type="button" class="jp-mod-styled jp-mod-reject" style="height:24px;line-height:24px;padding:0 10px" '
    'data-commandlinker-command="notebook:interrupt-kernel" data-commandlinker-args="{}" '
    'title="Ends all nodes of this cell, as interrupting the kernel does">■ Stop</button>'
)
_HINT = "Interrupting the kernel (■) stops all nodes."


class Button(Protocol):
    """Something that can be shown, and taken away."""

    def show(self) -> None:
        """Show it in the cell that runs now."""

    def remove(self) -> None:
        """Take it away wherever it is shown."""


class NoButton:
    """Where there is nobody to press one, or nothing to show it."""

    def show(self) -> None:
        """Show nothing."""

    def remove(self) -> None:
        """Do nothing."""


class InterruptButton:
    """For a cell that blocks the kernel.

    Parameters
    ----------
    shell : InteractiveShell
        One with a ``kernel``.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._publisher = shell.display_pub
        self._display_id = uuid.uuid4().hex
        self._is_shown = False

    def show(self) -> None:
        """Show the button, or the hint."""
        # A Jupyter server tells its kernels so; what shows the notebook is then Lab or Notebook, most likely.
        shown = _BUTTON if os.environ.get("JPY_SESSION_NAME") else _HINT
        bundle = {"text/html": f"{_ROOT}{shown}</div>", "text/plain": _HINT}
        publish(self._publisher, bundle, display_id=self._display_id)
        self._is_shown = True

    def remove(self) -> None:
        """Leave an empty output."""
        if self._is_shown:
            publish(self._publisher, {}, display_id=self._display_id, update=True)


class RunButton:
    """For a run in the background.

    Parameters
    ----------
    shell : InteractiveShell
        One with a ``kernel``.
    stop : callable
        Ends the run; returns at once.
    """

    def __init__(self, shell: InteractiveShell, stop: Callable[[], None]) -> None:
        self._publisher = shell.display_pub
        self._stop = stop
        self._display_id = uuid.uuid4().hex
        self._widget: Any = None

    def show(self) -> None:
        """Show the button in one more place."""
        if self._widget is None:
            self._widget = self._make()
        publish(self._publisher, self._widget._repr_mimebundle_(), display_id=self._display_id)

    def _make(self) -> Any:
        import ipywidgets  # here: it costs 0.2 s, and many a session has no use for it

        widget = ipywidgets.Button(
            description="Stop", icon="stop", tooltip="Ends all nodes of this run", layout={"width": "auto"}
        )
        widget.on_click(self._on_click)
        return widget

    def _on_click(self, widget: Any) -> None:
        widget.disabled, widget.description = True, "stopping…"
        self._stop()

    def remove(self) -> None:
        """Leave empty outputs, and no widget."""
        if self._widget is not None:
            publish(self._publisher, {}, display_id=self._display_id, update=True)
            for widget in (self._widget, self._widget.layout, self._widget.style):
                widget.close()
            self._widget = None


def is_watched(shell: InteractiveShell) -> bool:
    """Return whether a person can press a button: whoever runs a cell says whether it could answer a question."""
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    request = kernel.get_parent("shell") if hasattr(kernel, "get_parent") else {}
    return bool(request.get("content", {}).get("allow_stdin"))
