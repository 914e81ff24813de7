"""What stands behind ``%tfos_status``, ``%tfos_logs`` and ``%tfos_stop``, and behind ``%%tfos_train --background``.

Runs on: notebook.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from tfos_magic import arguments
from tfos_magic.background import BackgroundRun, Runs, lines_of, nodes_of
from tfos_magic.errors import UsageError
from tfos_magic.standing import StandingInferences, Stopped

if TYPE_CHECKING:
    import threading

    from IPython.core.interactiveshell import InteractiveShell

    from tfos_magic.result import RunResult
    from tfos_magic.status import StatusBoard

_LOG_LINES_IN_RECORD = 200


class RunsMagic:
    """Starts runs in the background, shows all runs, and stops what goes on.

    Parameters
    ----------
    shell : InteractiveShell
    services : Services
        ``widgets`` of them.
    standing : StandingInferences
        They have names of their own, which no run in the background takes.
    """

    def __init__(self, shell: InteractiveShell, services: Any, standing: StandingInferences) -> None:
        self._shell = shell
        self._services = services
        self._standing = standing
        self.runs = Runs()

    @property
    def stoppable(self) -> list[str]:
        """What ``%tfos_stop`` can stop."""
        return [*self.runs.running, *self._standing.names]

    @property
    def nodes_of_runs(self) -> Mapping[str, Sequence[str]]:
        """Name of each run, the last one last → its nodes."""
        boards = {name: self.runs.board(name) for name in self.runs.names}
        return {name: nodes_of(board) for name, board in boards.items() if board is not None}

    # --- what goes on ---

    def require_free(self, name: str | None, *, is_background: bool = False) -> None:
        """Refuse a name for something new that would make another thing unreachable."""
        self.runs.require_free(name)
        if is_background and name in self._standing.names:
            raise UsageError(
                f"--out {name}: nodes wait for questions under this name.",
                hint=f"%tfos_stop {name} ends them; or choose another name.",
            )

    def start(
        self, name: str, board: StatusBoard, work: Callable[[threading.Event], RunResult], *, quiet: bool
    ) -> BackgroundRun:
        """Start a run in the background; its board stays live in the running cell's output."""
        display = self._services.widgets.BackgroundBoard(
            board, self._shell, quiet=quiet, stop=lambda: self.runs.ask_to_stop(name)
        )
        return self.runs.start(name, board, work, display)

    def stop(self, words: Sequence[str]) -> None:
        """Do what ``%tfos_stop`` asks for."""
        stoppable = self.stoppable
        ended = [name for name in self.runs.names if name not in stoppable]
        if not stoppable and not {*words} & {*ended}:
            print("Nothing to stop: nothing runs, and no nodes wait for questions.")
            return
        rest = [word for word in words if word not in ended]
        names = arguments.parse_names("%tfos_stop", rest, stoppable, "nothing runs or waits under this name")
        for name in dict.fromkeys(words):
            if name in ended:
                print(f"{name} has ended already: {self._state(name)}.")
        raise_errors(self._stop(names if words else stoppable))

    def stop_all(self) -> None:
        """Stop all and forget all; what goes wrong is told, and no more."""
        try:
            tell_errors(self._stop(self.stoppable))
        finally:
            self.runs.close()

    def _stop(self, names: Sequence[str]) -> list[Stopped]:
        try:
            for run in self.runs.stop(names):
                count = len(run.board.view().nodes)  # none, if it was stopped before one had a place
                was_stopped = f"{count_nodes(count)} stopped" if count else "stopped"
                print(f"{run.name}: {was_stopped if run.state == 'stopped' else f'{run.state} before it was stopped'}.")
        finally:  # an interrupt ends the waiting; what was asked to stop does
            stopped = self._standing.stop(names)
            for each in stopped:
                if each.error is None:
                    print(f"{each.name}: {count_nodes(each.num_nodes)} stopped.")
        return stopped

    # --- what there is to see ---

    def show(self, words: Sequence[str]) -> None:
        """Do what ``%tfos_status`` asks for."""
        standing = self._standing.names
        known = [*self.runs.names, *standing]
        names = arguments.parse_names("%tfos_status", words, known, "there is no such run") or known
        if not names:
            print("Nothing runs.")
        for name in names:
            if (board := self.runs.board(name)) is not None:
                self._show_board(name, board)
        for name in names:
            if (inference := self._standing.find(name)) is not None:
                count = len(inference.nodes)
                print(f"{name}: {count_nodes(count)} {'waits' if count == 1 else 'wait'} for questions.")

    def _show_board(self, name: str, board: StatusBoard) -> None:
        run = self.runs.find(name)
        if run is not None and run.show_again():
            return
        view = board.view()
        if not view.title.startswith(f"{name}: "):
            view = replace(view, title=f"{name}: {view.title}")
        self._services.widgets.show_record(self._shell, view, board.all_logs(last=_LOG_LINES_IN_RECORD))

    def _state(self, name: str) -> str:
        board = self.runs.board(name)
        return board.view().outcome if board is not None else ""

    def print_logs(self, line: str, namespace: Mapping[str, Any]) -> None:
        """Do what ``%tfos_logs line`` asks for."""
        wanted = arguments.parse_logs(line, namespace)
        known = self.runs.names
        if not known:
            raise UsageError("%tfos_logs: nothing has run yet.", hint="%%tfos_train above a cell runs it.")
        arguments.parse_names("--run", [wanted.run] if wanted.run else [], known, "there is no such run")
        board = self.runs.board(wanted.run or known[-1])
        if board is None:  # dropped right now, for newer ones
            raise UsageError(f"--run {wanted.run}: its lines are not kept any more.")
        lines = lines_of(board, wanted.node, tail=wanted.tail, grep=wanted.grep)
        if not lines:
            what = f"No line matches {wanted.grep!r}" if wanted.grep else "Nothing was written"
            print(f"{what} in {wanted.run or known[-1]}.")
        are_several = len(nodes_of(board, wanted.node)) > 1
        width = max(map(len, lines), default=0)
        for name, written in lines.items():
            prefix = f"{name:<{width}} │ " if are_several else ""
            print("\n".join(f"{prefix}{each}" for each in written))


def tell_errors(stopped: Sequence[Stopped]) -> None:
    """Say what went wrong, in a line each."""
    for each in stopped:
        if each.error is not None:
            what = str(getattr(each.error, "headline", each.error))
            print(f"{each.name}: stopped, with an error: {what}", file=sys.stderr)


def raise_errors(stopped: Sequence[Stopped]) -> None:
    """Raise the first error; those after it are told."""
    failed = [each for each in stopped if each.error is not None]
    tell_errors(failed[1:])
    if failed:
        raise cast(BaseException, failed[0].error)


def count_nodes(count: int) -> str:
    """Return e.g. ``2 nodes``."""
    return "1 node" if count == 1 else f"{count} nodes"
