"""The board of a run in the background: it stays live when its cell has returned.

Runs on: notebook.

    cell's thread:   board.open()          the cell returns; its output goes on being updated, by its display id
    %tfos_status:    board.show_again()    the same output once more, in another cell; both are updated
    run's thread:    board.close()         all of them become the record

A terminal has one stream for all: there a line is printed at the begin and one at the end, and no more.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tfos_magic.status import BoardView, StatusBoard
from tfos_magic.widgets.html import one_line_html
from tfos_magic.widgets.live import CellOutput, LiveBoard, print_safely, static_bundle
from tfos_magic.widgets.outputs import publish
from tfos_magic.widgets.stop_button import NoButton, RunButton, is_watched
from tfos_magic.widgets.text import one_line, render_text

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_FRAME_S = 0.5


class QuietOutput(CellOutput):
    """A line of the cell, replaced by another at the end; a board from when somebody asks for it."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._is_line = True

    def open(self, view: BoardView) -> None:
        """Say that it runs."""
        self._publish(_line(view), update=False)

    def again(self, view: BoardView) -> None:
        """Show the board: the line becomes one, too."""
        self._is_line = False
        super().again(view)

    def update(self, view: BoardView) -> float:
        """Update the board, if it is one."""
        return _FRAME_S if self._is_line else super().update(view)

    def close(self, view: BoardView, logs: Mapping[str, Sequence[str]]) -> None:
        """Say how it ended."""
        if self._is_line:
            self._publish(_line(view), update=bool(self._shown))
        else:
            super().close(view, logs)


def _line(view: BoardView) -> dict[str, str]:
    line = one_line(view)
    return {"text/html": one_line_html(line), "text/plain": line}


class TerminalEnds:
    """A line at the begin, and one at the end."""

    def __init__(self, *, quiet: bool) -> None:
        self._is_quiet = quiet

    def open(self, view: BoardView) -> None:
        """Say what begins."""
        if not self._is_quiet:
            print_safely(f"{view.title}, in the background: %tfos_status shows it, %tfos_stop ends it.")

    def again(self, view: BoardView) -> None:
        """Print the table as it is now."""
        print_table(view)

    def update(self, view: BoardView) -> float:
        """Print nothing: somebody is typing, or another cell is printing."""
        return _FRAME_S

    def close(self, view: BoardView, logs: Mapping[str, Sequence[str]]) -> None:
        """Say how it ended."""
        print_safely(one_line(view))


def print_table(view: BoardView) -> None:
    """Print a board as wide as the terminal."""
    print_safely(render_text(view, width=min(120, shutil.get_terminal_size((120, 24)).columns)))


class BackgroundBoard(LiveBoard):
    """Shows a board from one thread, and leaves a record from another.

    Parameters
    ----------
    board : StatusBoard
        Knows of the run's end before :meth:`close`.
    shell : InteractiveShell
    quiet : bool
        Show one line, until the board is asked for.
    stop : callable, optional
        Ends the run, and returns at once: what the button does.

    Notes
    -----
    As a :class:`LiveBoard` it never raises into the run.
    """

    def __init__(
        self,
        board: StatusBoard,
        shell: InteractiveShell,
        *,
        quiet: bool = False,
        stop: Callable[[], None] | None = None,
    ) -> None:
        self._output = _output(shell, quiet)
        self._is_redrawn = isinstance(self._output, CellOutput)
        super().__init__(board, shell, quiet=quiet or not self._is_redrawn)
        self._surface = self._output
        self._button = NoButton() if stop is None or quiet or not is_watched(shell) else RunButton(shell, stop)
        self._ending = threading.Lock()
        self._is_closed = False

    def open(self) -> None:
        """Show it in the cell that runs now."""
        self.__enter__()

    def show_again(self) -> bool:
        """Show it in the cell that runs now, too, and as a board; False when the run is over: nothing is shown then."""
        with self._ending:
            if self._is_closed:
                return False
            with self._guard():
                self._button.show()
                self._output.again(self._board.view())
            if self._is_redrawn and self._thread is None and not self._is_broken:
                self._begin_to_draw()
        return True

    def close(self) -> None:
        """Leave the record in all outputs; nothing is drawn any more."""
        with self._ending:
            self._is_closed = True
            self.__exit__(None, None, None)


def _output(shell: InteractiveShell, quiet: bool) -> CellOutput | TerminalEnds:
    if not hasattr(shell, "kernel"):
        return TerminalEnds(quiet=quiet)
    return QuietOutput(shell) if quiet else CellOutput(shell)


def show_record(shell: InteractiveShell, view: BoardView, logs: Mapping[str, Sequence[str]]) -> None:
    """Show the board of a run that is over."""
    if hasattr(shell, "kernel"):
        publish(shell.display_pub, static_bundle(view, logs))
    else:
        print_table(view)
