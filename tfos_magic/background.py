"""Runs of a notebook: those that go on in the background, and what is kept of those that have ended.

Runs on: driver. Knows nothing of IPython: what shows a run is given to it.

    %%tfos_train --background ──► Runs.start ──► BackgroundRun      the cell returns with it
                                                  │ a thread of its own: cluster.run(…, stop=its event)
    r.stop(), %tfos_stop ─────────── sets ───────►│ RunStoppedError, when all nodes are gone
    r.wait(), r.result() ◄────────────────────────┘ the result, or the run's error

What nodes print goes to the board, which keeps the last 2,000 lines of each, and to the run's log book: files that last
until the run is forgotten. The board hears of the end first, then it is drawn for the last time, then those who wait go
on. The thread is a daemon: it never keeps the kernel alive, and nodes whose driver is gone end at once.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import itertools
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from tfos_magic.errors import RunStoppedError, StillRunningError, TfosError, UsageError
from tfos_magic.logbook import LogBook, remove_abandoned
from tfos_magic.status import LEFT_OUT, RunEnded, StatusBoard, left_out_before

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from tfos_magic.result import RunResult

_KEPT = 3  # of the runs that have ended: their boards hold up to 2,000 lines of each node, their files 16 MiB
_LINES_IN_MEMORY = 2000
_ERROR_CHARS = 200


class Display(Protocol):
    """What shows a run; it never raises."""

    def open(self) -> None:
        """Begin; called by the thread that starts the run, before."""

    def show_again(self) -> bool:
        """Show the run in one more place; return False when it is over."""

    def close(self) -> None:
        """Show the end; called by the run's thread, after it."""


class BackgroundRun:
    """A training run that goes on while the notebook is free; ``%%tfos_train --background`` makes it.

    Its methods may be called from any thread. An interrupt (■) ends the waiting, not the run.
    """

    def __init__(
        self,
        name: str,
        board: StatusBoard,
        work: Callable[[threading.Event], RunResult],
        display: Display,
        on_end: Callable[[BackgroundRun], None],
    ) -> None:
        self._name = name
        self._board = board
        self._work: Callable[[threading.Event], RunResult] | None = work
        self._display = display
        self._on_end = on_end
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._result: RunResult | None = None
        self._error: BaseException | None = None
        self._traceback: TracebackType | None = None
        # With a copy of the cell's context IPython knows which cell output belongs to.
        context = contextvars.copy_context()
        self._thread = _thread_kind()(target=lambda: context.run(self._run), name=f"tfos_magic {name}", daemon=True)

    def start(self) -> None:
        """Begin; called once, by whoever made it."""
        self._display.open()
        try:
            self._thread.start()
        except BaseException as error:
            self._end(error)
            raise

    # --- what it is ---

    @property
    def name(self) -> str:
        """What ``%tfos_stop``, ``%tfos_status`` and ``%tfos_logs --run`` call it."""
        return self._name

    @property
    def board(self) -> StatusBoard:
        """All that is known of it."""
        return self._board

    @property
    def state(self) -> str:
        """``running``, ``done``, ``failed`` or ``stopped``."""
        if not self._ended.is_set():
            return "running"
        return end_of(self._error).outcome

    @property
    def error(self) -> BaseException | None:
        """What the run has failed with, or the RunStoppedError of one that was stopped; None while it runs."""
        return self._error if self._ended.is_set() else None

    def logs(
        self, node: str | None = None, *, tail: int | None = None, grep: str | None = None
    ) -> dict[str, tuple[str, ...]]:
        """Return lines that nodes wrote.

        They come from the log files as long as this is one of the notebook's last runs (:attr:`log_files`), after that
        from memory: then they are among the last 2,000 of each node.

        Parameters
        ----------
        node : str, optional
            Of this node alone, e.g. ``worker:1``, or of all nodes of this role, e.g. ``worker``.
        tail : int, optional
            No more than so many lines of each node, the last ones; without `grep` 2,000 by default.
        grep : str, optional
            Only lines in which this regular expression is found.

        Returns
        -------
        dict of str to tuple of str
            Node → its lines, oldest first; the first line says how many are left out, if any are.

        Raises
        ------
        UsageError
            There is no such node, or `grep` is no regular expression.
        """
        return lines_of(self._board, node, tail=tail, grep=grep)

    @property
    def log_files(self) -> dict[str, Path]:
        """Node → the file of its newest lines, older ones beside it as ``….log.1``; empty when they are gone.

        They last as long as the run is one that ``%tfos_status`` shows: until three newer ones have ended.
        """
        return self._board.store.paths if self._board.store is not None else {}

    def __repr__(self) -> str:
        view = self._board.view()
        nodes = "1 node" if len(view.nodes) == 1 else f"{len(view.nodes)} nodes"
        state = self.state
        if state == "running":
            facts = [state, nodes, *([view.phase] if view.phase not in ("", "running") else [])]
            facts.append(f"{view.elapsed_s:.0f} s")
        else:
            facts = [f"{state} {'in' if state == 'done' else 'after'} {view.elapsed_s:.0f} s"]
            facts += [nodes] if view.nodes else []
            facts += [_in_a_line(self._error)] if state == "failed" and self._error else []
        return f"<BackgroundRun {self._name}: {', '.join(facts)}>"

    # --- what one can do ---

    def wait(self, timeout_s: float | None = None) -> RunResult:
        """Wait for the end and return the result.

        Parameters
        ----------
        timeout_s : float, optional
            No longer than that; as long as it takes by default.

        Raises
        ------
        StillRunningError
            The time is over. The run goes on.
        NodeError, RunStoppedError, …
            What the run has failed with, or that it was stopped.
        """
        if not self._ended.wait(timeout_s):
            raise StillRunningError(f"{self._name} has not ended in {timeout_s:g} s; it goes on.")
        return self.result()

    def result(self) -> RunResult:
        """Return the result of a run that has ended; errors as in :meth:`wait`."""
        if not self._ended.is_set():
            raise StillRunningError(
                f"{self._name} is still running: there is no result yet.", hint=f"%tfos_status {self._name}, or wait()."
            )
        self._join()
        if self._error is not None:
            raise self._error.with_traceback(self._traceback)  # without the frames of earlier calls
        return cast("RunResult", self._result)

    def ask_to_stop(self) -> None:
        """Let it end soon; returns at once."""
        self._stop.set()

    def stop(self) -> None:
        """End all nodes, and return when they are gone; does nothing when the run has ended.

        What the run fails with on the way is not raised here: :attr:`error` has it.
        """
        self._stop.set()
        self._ended.wait()
        self._join()

    def show_again(self) -> bool:
        """Show its board in one more place; return False when it is over."""
        return self._display.show_again()

    # --- the run's thread ---

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._result = self._work(self._stop)
        except BaseException as error:  # for whoever waits; here nobody would hear of it
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        if isinstance(error, TfosError):
            error.__traceback__ = None  # the message says all; the frames hold the payload and the DataFrames
        self._traceback = error.__traceback__ if error is not None else None
        self._work = None
        self._board.apply(end_of(error))  # most often it knows
        try:
            self._display.close()
        finally:
            self._on_end(self)
            self._ended.set()

    def _join(self) -> None:
        """Let the thread of a run that has ended go: it has nothing more to do than to return."""
        if self._thread.ident is not None:
            self._thread.join()


def _thread_kind() -> Any:
    """Return what a thread must be that uses Spark: it inherits what the notebook has set, e.g. the scheduler pool."""
    pyspark = sys.modules.get("pyspark")
    if pyspark is None or pyspark.SparkContext._active_spark_context is None:
        return threading.Thread
    return pyspark.InheritableThread


def end_of(error: BaseException | None) -> RunEnded:
    """Return how a run has ended, for its board."""
    if error is None:
        return RunEnded("done")
    if isinstance(error, RunStoppedError | KeyboardInterrupt):
        return RunEnded("stopped", str(error))
    return RunEnded("failed", getattr(error, "headline", "") or f"{type(error).__name__}: {_in_a_line(error)}")


def _in_a_line(error: BaseException) -> str:
    try:
        text = str(getattr(error, "headline", "") or error)
    except Exception:  # a user's __str__ may raise anything
        text = type(error).__name__
    line = " ".join(text.split())
    return line if len(line) <= _ERROR_CHARS else f"{line[: _ERROR_CHARS - 1]}…"


class Runs:
    """The runs of one notebook; owner of those in the background, and of the files with the output of all.

    Of runs that have ended boards and files are kept, of the last three: results are their handles' business.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a run ends in its own thread
        self._numbers = itertools.count(1)
        self._boards: dict[str, StatusBoard] = {}  # in the order of their beginnings
        self._books: dict[str, LogBook] = {}
        self._running: dict[str, BackgroundRun] = {}

    @property
    def names(self) -> list[str]:
        """Of all runs that are known, in the order of their beginnings."""
        with self._lock:
            return list(self._boards)

    @property
    def running(self) -> list[str]:
        """Of those that go on in the background."""
        with self._lock:
            return list(self._running)

    def find(self, name: str) -> BackgroundRun | None:
        """Return the run of this name, if it goes on in the background."""
        with self._lock:
            return self._running.get(name)

    def board(self, name: str) -> StatusBoard | None:
        """Return the board of a run, if it is known."""
        with self._lock:
            return self._boards.get(name)

    def require_free(self, name: str | None) -> None:
        """Refuse the name of a run that goes on: whoever types it may have waited for that for hours."""
        if name is not None and self.find(name) is not None:
            raise UsageError(
                f"--out {name}: a run of this name goes on in the background.",
                hint=f"%tfos_stop {name} ends it; or choose another name.",
            )

    def name_for(self, wanted: str | None) -> str:
        """Return the name of a new run: what is wanted, or else one that no other has."""
        self.require_free(wanted)
        known = self.names
        return wanted or next(name for name in (f"run{number}" for number in self._numbers) if name not in known)

    @contextlib.contextmanager
    def recorded(self, name: str, board: StatusBoard) -> Iterator[None]:
        """Keep the board of a run that ends within the block."""
        self._add(name, board)
        try:
            yield
        except BaseException as error:
            board.apply(end_of(error))
            raise
        else:
            board.apply(end_of(None))
        finally:
            self._forget_old()

    def start(
        self, name: str, board: StatusBoard, work: Callable[[threading.Event], RunResult], display: Display
    ) -> BackgroundRun:
        """Start a run in a thread of its own, and return at once.

        Parameters
        ----------
        name : str
            From :meth:`name_for`.
        board : StatusBoard
            The one that `work` feeds.
        work : callable(threading.Event) -> RunResult
            Does the run; ends it soon after the event is set.
        display : Display
        """
        run = BackgroundRun(name, board, work, display, self._has_ended)
        self._add(name, board)
        with self._lock:
            self._running[name] = run
        run.start()
        return run

    def ask_to_stop(self, name: str) -> None:
        """Let the run of this name end soon, if it goes on; returns at once."""
        run = self.find(name)
        if run is not None:
            run.ask_to_stop()

    def stop(self, names: Iterable[str]) -> list[BackgroundRun]:
        """End those of `names` that go on, all at the same time; return them when their nodes are gone."""
        found = [run for name in names if (run := self.find(name)) is not None]
        for run in found:
            run.ask_to_stop()
        for run in found:
            run.stop()
        return found

    def close(self) -> None:
        """Forget all runs; none may go on."""
        with self._lock:
            for name in list(self._boards):
                self._forget(name)

    def _add(self, name: str, board: StatusBoard) -> None:
        with self._lock:
            if not self._books:
                remove_abandoned()
            if name in self._boards:
                self._forget(name)
            self._boards[name] = board
            board.store = self._books[name] = LogBook()

    def _has_ended(self, run: BackgroundRun) -> None:
        with self._lock:
            self._running.pop(run.name, None)
        self._forget_old()

    def _forget_old(self) -> None:
        with self._lock:
            ended = [name for name in self._boards if name not in self._running]
            for name in ended[:-_KEPT]:
                self._forget(name)

    def _forget(self, name: str) -> None:
        del self._boards[name]
        self._books.pop(name).close()


# --- lines ----------------------------------------------------------------------------------------------------


def lines_of(
    board: StatusBoard, node: str | None = None, *, tail: int | None = None, grep: str | None = None
) -> dict[str, tuple[str, ...]]:
    """Return kept lines of nodes; parameters and errors as in :meth:`BackgroundRun.logs`."""
    pattern = _compiled(grep)
    chosen = nodes_of(board, node)
    if board.store is not None:
        last = _LINES_IN_MEMORY if tail is None and pattern is None else tail
        read = {name: board.store.read(name, last, pattern) for name in chosen}
        kept = {name: _noted(*each) for name, each in read.items() if each is not None}
        if len(kept) == len(chosen):  # else the files are gone
            return {name: lines for name, lines in kept.items() if lines}
    if pattern is None:
        return {name: lines for name, lines in board.all_logs(tail).items() if name in chosen}
    found = {name: _matching(lines, pattern, tail) for name, lines in board.all_logs().items() if name in chosen}
    return {name: lines for name, lines in found.items() if lines}


def _noted(lines: Sequence[str], left_out: int) -> tuple[str, ...]:
    return (left_out_before(left_out), *lines) if lines and left_out else tuple(lines)


def nodes_of(board: StatusBoard, node: str | None = None) -> list[str]:
    """Return the names of a run's nodes: of all, of a role, or of the one.

    Raises
    ------
    UsageError
        There is none of this name.
    """
    names = [each.name for each in board.view().nodes]
    chosen = [name for name in names if node in (None, name, name.partition(":")[0])]
    if not chosen and node is not None:
        close = _close(node, names)
        there_are = f"There are: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}."
        raise UsageError(f"The run has no node {node!r}. {close or (there_are if names else 'It has no nodes yet.')}")
    return chosen


def _close(word: str, names: Sequence[str]) -> str:
    known = [*names, *dict.fromkeys(name.partition(":")[0] for name in names)]
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def _compiled(grep: str | None) -> re.Pattern[str] | None:
    if grep is None:
        return None
    try:
        return re.compile(grep)
    except re.error as error:
        raise UsageError(f"{grep!r} is no regular expression: {error}.") from None


def _matching(lines: Sequence[str], pattern: re.Pattern[str], tail: int | None) -> tuple[str, ...]:
    """Return the lines that match; lines that are gone may have matched, and count as left out."""
    notes = [LEFT_OUT.fullmatch(line) for line in lines]
    left_out = sum(int(note[1].replace(",", "")) for note in notes if note)
    found = [line for line, note in zip(lines, notes, strict=True) if not note and pattern.search(line)]
    shown = found if tail is None else found[max(0, len(found) - tail) :]
    return _noted(shown, left_out + len(found) - len(shown))
