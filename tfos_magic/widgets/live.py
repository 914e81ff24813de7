"""The board while a cell runs, and the record it leaves.

Runs on: notebook.

    cell's thread:  with LiveBoard(board, shell): run…        blocked until the run is over
    drawing thread:      every 0.5 s, if something changed: board.view() → one update of the cell's output
    on the way out:      the same output becomes static HTML + text, the thread is gone

In a kernel the board is *one display output* that is updated in place by its display id. No widget is involved, so
there is none that could be missing in the front end, stay behind in the file, or be blank in a notebook that was saved
while the cell ran: every frame is itself a complete record. In a terminal, lines tell what changed.
"""

from __future__ import annotations

import contextvars
import logging
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from tfos_magic.errors import RunStoppedError
from tfos_magic.status import BoardView, NodeState, NodeView, StatusBoard
from tfos_magic.widgets import words
from tfos_magic.widgets.html import one_line_html, render_html
from tfos_magic.widgets.outputs import publish
from tfos_magic.widgets.stop_button import Button, InterruptButton, NoButton, is_watched
from tfos_magic.widgets.text import one_line, render_text

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_log = logging.getLogger(__name__)
_FRAME_S = 0.5
_BYTES_PER_S = 17 * 1024  # to the browser, whatever the size of the cluster: below 20 KiB with all that is around it
_LOG_LINES_IN_RECORD = 200
_NODES_NAMED = 4


def static_bundle(view: BoardView, logs: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """Return the board as a mime bundle of ``text/html`` and ``text/plain`` that needs no kernel."""
    return {"text/html": render_html(view, logs), "text/plain": render_text(view)}


class Surface(Protocol):
    """Where frames go. One for each kind of front end; called by one thread at a time."""

    def open(self, view: BoardView) -> None:
        """Show the first frame."""

    def update(self, view: BoardView) -> float:
        """Show the run as it stands; return the seconds until the next frame may come."""

    def close(self, view: BoardView, logs: Mapping[str, Sequence[str]]) -> None:
        """Leave the record."""


class CellOutput:
    """One output of the running cell, updated in place."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        # The cell's own, for as long as it is drawn: under %%capture, cells have others, and a run in the background
        # is drawn while they run.
        self._publisher = shell.display_pub
        self._display_id = uuid.uuid4().hex
        self._shown: dict[str, str] = {}

    def open(self, view: BoardView) -> None:
        """Make the output."""
        self._publish(_frame(view), update=False)

    def again(self, view: BoardView) -> None:
        """Show it in the cell that runs now, too: what has one display id is updated together."""
        self._shown = _frame(view)
        publish(self._shell.display_pub, self._shown, display_id=self._display_id)

    def update(self, view: BoardView) -> float:
        """Replace the output by a new frame, unless it would look the same."""
        frame = _frame(view)
        if frame == self._shown:
            return _FRAME_S
        self._publish(frame, update=bool(self._shown))
        return max(_FRAME_S, sum(len(text.encode()) for text in frame.values()) / _BYTES_PER_S)

    def close(self, view: BoardView, logs: Mapping[str, Sequence[str]]) -> None:
        """Replace the output by the record."""
        self._publish(static_bundle(view, logs), update=bool(self._shown))

    def _publish(self, bundle: dict[str, str], *, update: bool) -> None:
        publish(self._publisher, bundle, display_id=self._display_id, update=update)
        self._shown = bundle


def _frame(view: BoardView) -> dict[str, str]:
    return {"text/html": render_html(view, live=True), "text/plain": one_line(view)}


class TerminalLines:
    """A line for each change worth one, then the table."""

    def __init__(self) -> None:
        self._before = BoardView()

    def open(self, view: BoardView) -> None:
        """Say what begins."""
        self._tell(view, [f"{view.title or 'training'} · {len(view.nodes)} nodes"] if view.nodes else [])
        self._before = view

    def update(self, view: BoardView) -> float:
        """Say what has changed since the last call; one line per kind of change, however many nodes it met."""
        self._tell(view, _changes(self._before, view))
        self._before = view
        return _FRAME_S

    def close(self, view: BoardView, logs: Mapping[str, Sequence[str]]) -> None:
        """Print the table."""
        self.update(view)
        width = min(120, shutil.get_terminal_size((120, 24)).columns)
        print_safely(render_text(view, width=width))

    @staticmethod
    def _tell(view: BoardView, lines: Sequence[str]) -> None:
        for line in lines:
            print_safely(f"[{words.duration(view.elapsed_s):>10}] {line}")


def print_safely(text: str) -> None:
    """Print, without failing on a terminal that cannot show a sparkline."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _changes(before: BoardView, now: BoardView) -> list[str]:
    lines = []
    if now.phase and now.phase != before.phase:
        lines.append(now.phase)
    if len(now.restarts) > len(before.restarts):
        lines.append(words.restarts(now))
    lines += [notice for notice in now.notices if notice not in before.notices]
    lines += _state_changes(before, now)
    if now.epoch is not None and now.epoch != before.epoch:
        lines.append(_epoch_line(now, now.epoch))
    return lines


def _state_changes(before: BoardView, now: BoardView) -> list[str]:
    known = {node.name: node for node in before.nodes}
    met: dict[str, list[str]] = {}
    for node in now.nodes:
        state = _told_state(node)
        old = known.get(node.name)
        if state != (_told_state(old) if old is not None else NodeState.PLANNED.value):
            met.setdefault(state, []).append(node.name)
    failures_first = sorted(met, key=lambda state: not state.startswith((NodeState.FAILED.value, NodeState.LOST.value)))
    return [f"{_names(met[state], len(now.nodes))}: {state}" for state in failures_first]


def _told_state(node: NodeView) -> str:
    """Return the state in words; a node that waits for data, or saves, between two steps is running."""
    if node.state in (NodeState.WAITING, NodeState.SAVING):
        return NodeState.RUNNING.value
    why = words.last_words(node) if node.state in (NodeState.FAILED, NodeState.LOST) else ""
    return f"{node.state.value} ({why})" if why else node.state.value


def _names(names: Sequence[str], total: int) -> str:
    if len(names) == total > 1:
        return f"all {total} nodes"
    more = f" and {len(names) - _NODES_NAMED} more" if len(names) > _NODES_NAMED else ""
    return ", ".join(names[:_NODES_NAMED]) + more


def _epoch_line(view: BoardView, epoch: int) -> str:
    values = [
        f"{name} {words.number(line[-1])}" for name, line in view.history.items() if line and line[-1] == line[-1]
    ]
    facts = [f"epoch {epoch} of {max(view.epochs, epoch)}", "  ".join(values), words.bottleneck(view)]
    return " · ".join(fact for fact in facts if fact)


class SummaryOnly:
    """Nothing while it runs, one line at the end."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell

    def open(self, view: BoardView) -> None:
        """Show nothing."""

    def update(self, view: BoardView) -> float:
        """Show nothing."""
        return _FRAME_S

    def close(self, view: BoardView, logs: Mapping[str, Sequence[str]]) -> None:
        """Say in a line how it ended."""
        line = one_line(view)
        if hasattr(self._shell, "kernel"):
            publish(self._shell.display_pub, {"text/html": one_line_html(line), "text/plain": line})
        else:
            print_safely(line)


def _surface(shell: InteractiveShell, quiet: bool) -> Surface:
    if quiet:
        return SummaryOnly(shell)
    return CellOutput(shell) if hasattr(shell, "kernel") else TerminalLines()


class LiveBoard:
    """Shows a board while the calling thread is blocked, and leaves a record.

    Parameters
    ----------
    board : StatusBoard
        May be fed from any thread.
    shell : InteractiveShell
        IPython's shell; one with a ``kernel`` gets HTML, another one lines.
    quiet : bool
        Show nothing but one line at the end.
    lasting : bool
        What runs goes on after the block: the record says that it is ready.

    Notes
    -----
    It never raises into the run: the first failure to draw is logged, and drawing stops. Use it as a context manager;
    the record says ``failed`` or ``stopped`` if an exception leaves the block before the board knows of an end.
    """

    def __init__(
        self, board: StatusBoard, shell: InteractiveShell, *, quiet: bool = False, lasting: bool = False
    ) -> None:
        self._board = board
        self._is_lasting = lasting
        self._is_quiet = quiet
        self._surface = _surface(shell, quiet)
        self._button: Button = NoButton() if quiet or not is_watched(shell) else InterruptButton(shell)
        self._is_broken = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LiveBoard:
        with self._guard():
            self._button.show()
            self._surface.open(self._board.view())
        if not (self._is_quiet or self._is_broken):
            self._begin_to_draw()
        return self

    def _begin_to_draw(self) -> None:
        # IPython finds the cell that output belongs to in the context: without a copy of it, output of this thread
        # would land in whichever cell ran last. A daemon: the board of a background run does not keep the kernel alive.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._redraw,), name="tfos-live-board", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            if self._thread is not None:
                self._thread.join()  # at most one frame's time
        finally:  # also when ■ is pressed again right now
            with self._guard():  # after a failure too: the record is worth another try
                logs = self._board.all_logs(last=_LOG_LINES_IN_RECORD)
                self._surface.close(_ended(self._board.view(), error, is_lasting=self._is_lasting), logs)
            with self._guard():
                self._button.remove()

    def _redraw(self) -> None:
        drawn = (-1, -1)
        pause_s = _FRAME_S
        while not self._stop.wait(pause_s) and not self._is_broken:
            view = self._board.view()
            now = (view.version, int(view.elapsed_s))
            if now != drawn:
                with self._guard():
                    pause_s = self._surface.update(view)
                drawn = now

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Keep a failure to draw away from the run: it is logged once."""
        try:
            yield
        except Exception:  # front ends may raise anything
            if not self._is_broken:
                _log.warning("the board could not be drawn and is left alone; the run goes on", exc_info=True)
            self._is_broken = True


def _ended(view: BoardView, error: BaseException | None, *, is_lasting: bool) -> BoardView:
    """Return the view with an end that the board was not told of: an exception's, or that all is ready."""
    if view.outcome or (error is None and not is_lasting):
        return view
    if error is None:
        return replace(view, outcome=words.READY)
    outcome = "stopped" if isinstance(error, KeyboardInterrupt | RunStoppedError) else "failed"
    try:
        message = "" if outcome == "stopped" else f"{type(error).__name__}: {error}"
    except Exception:  # a user's __str__ may raise anything
        message = type(error).__name__
    return replace(view, outcome=outcome, message=message)
