"""Runs in the background: handles, boards and magics with a run that the test drives; the real ones below."""

from __future__ import annotations

import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_services import FakeServices
from jupyterlab_fixture import browser, jupyterlab, write_notebook
from runs import FILENAME, LABEL, pack_cell
from shell_fixture import TestingShell
from test_arguments import FRAME
from test_end_to_end import Notebook, nodes_alive

from tfos_magic import cluster, magics, widgets
from tfos_magic.background import BackgroundRun, Runs
from tfos_magic.errors import (
    DataError,
    NodeError,
    RunStoppedError,
    StillRunningError,
    TfosError,
    TooFewSlotsError,
    UsageError,
)
from tfos_magic.status import (
    Event,
    NodeChanged,
    NodeLogged,
    NodeState,
    PhaseChanged,
    RunEnded,
    RunPlanned,
    StatusBoard,
)

PATIENCE_S = 60.0


class DrivenRun:
    """Stands for cluster.run: goes on until the test, or a stop, ends it."""

    def __init__(self, title: str, board: StatusBoard, stop: threading.Event | None) -> None:
        self.board = board
        self.stop = stop
        self.outcome: Any = None
        self.is_over = threading.Event()
        board.apply(RunPlanned(title, ("chief:0", "worker:0")))
        for node in ("chief:0", "worker:0"):
            board.apply(NodeChanged(node, NodeState.RUNNING, "10.0.0.4"))
        board.apply(PhaseChanged("running"))

    def log(self, node: str, *lines: str) -> None:
        self.board.apply(NodeLogged(node, lines))

    def end(self, outcome: Any = "the result") -> None:
        self.outcome = outcome
        self.is_over.set()

    def go(self) -> Any:
        while self.stop is not None and not self.is_over.wait(0.01):
            if self.stop.is_set():
                self.board.apply(RunEnded("stopped", "The run was stopped."))
                raise RunStoppedError("The run was stopped.")
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome or "the result"


class DrivenServices(FakeServices):
    """Real boards; runs in the background as the test drives them, others end at once."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[DrivenRun] = []
        self.checked: list[Any] = []
        self.wrong: TfosError | None = None
        self.cluster.run = self._drive
        self.cluster.check = self._check
        self.widgets = SimpleNamespace(
            LiveBoard=self._board, BackgroundBoard=widgets.BackgroundBoard, show_record=widgets.show_record
        )

    def _drive(
        self, spark: Any, payload: Any, options: Any, *, board: StatusBoard, stop: Any = None, **more: Any
    ) -> Any:
        self.runs.append(DrivenRun(options.title, board, stop))
        return self.runs[-1].go()

    def _check(self, spark: Any, options: Any, data: Any) -> None:
        self.checked.append((spark, options, data))
        if self.wrong is not None:
            raise self.wrong

    def latest(self) -> DrivenRun:
        """Return the run that was started last; its thread may still be on its way."""
        wait_until(lambda: len(self.runs) >= len(self.checked))
        return self.runs[-1]


def wait_until(is_true: Callable[[], object]) -> None:
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not is_true():
        assert time.monotonic() < deadline, "it did not come true"
        pause.wait(0.01)


@pytest.fixture
def services() -> DrivenServices:
    return DrivenServices()


@pytest.fixture
def shell(shell: TestingShell) -> Iterator[TestingShell]:
    yield shell
    magics.unload(shell)


class Published:
    """What a kernel's shell has sent: (data, display id, whether it updates)."""

    is_publishing = False  # IPython asks

    def __init__(self) -> None:
        self.all: list[tuple[dict[str, str], str, bool]] = []

    def publish(self, data: Any, metadata: Any, *, transient: Any = None, update: bool = False, **more: Any) -> None:
        self.all.append((data, (transient or {}).get("display_id", ""), update))

    @property
    def new(self) -> list[str]:
        """Display ids of new outputs, in order."""
        return [display_id for _, display_id, update in self.all if not update]

    def last(self, display_id: str) -> dict[str, str]:
        return [data for data, found, _ in self.all if found == display_id][-1]

    def texts(self, display_id: str) -> str:
        return "\n".join(str(data) for data, found, _ in self.all if found == display_id)


@pytest.fixture
def published(shell: TestingShell) -> Published:
    """Let the shell look like a kernel's."""
    published = Published()
    shell.kernel = object()
    shell.display_pub = published  # type: ignore[assignment]
    return published


# --- the handle ----------------------------------------------------------------------------------------------


def test_the_cell_returns_at_once_with_a_handle_and_the_result_comes_later(
    shell: TestingShell, services: DrivenServices
) -> None:
    run = shell.cell("%%tfos_train -n 2 --background --out r\n1")
    assert isinstance(run, BackgroundRun)
    assert shell.user_ns["r"] is run
    driven = services.latest()
    assert (run.name, run.state, run.error) == ("r", "running", None)
    assert repr(run).startswith("<BackgroundRun r: running, 2 nodes, ")
    with pytest.raises(StillRunningError, match="r is still running"):
        run.result()
    with pytest.raises(TimeoutError, match=r"r has not ended in 0\.01 s; it goes on"):
        run.wait(0.01)
    driven.end()
    assert (run.wait(), run.result(), run.state, run.error) == ("the result", "the result", "done", None)
    assert repr(run).startswith("<BackgroundRun r: done in 0 s")
    run.stop()  # nothing to do
    assert run.state == "done"


def test_without_a_name_it_gets_one_that_the_notebook_does_not_have(
    shell: TestingShell, services: DrivenServices
) -> None:
    shell.cell("%%tfos_train -n 2\n1")  # a run like any other
    names = set(shell.user_ns)
    runs = [shell.cell("%%tfos_train -n 2 --background\n1") for _ in range(2)]
    assert [run.name for run in runs] == ["run2", "run3"]
    assert not {name for name in set(shell.user_ns) - names if not name.startswith("_")}
    assert shell.cell("%%tfos_train -n 2 --background\n1;") is None
    wait_until(lambda: len(services.runs) == 4)  # its thread may still be on its way
    assert services.runs[-1].board.view().title == "run4: Cell In[4] on 2 nodes"


def test_a_function_of_the_notebook_runs_in_the_background_too(shell: TestingShell, services: DrivenServices) -> None:
    shell.cell("def main_fun(args, ctx): return 1")
    shell.cell("%tfos_train -n 2 --background --out r main_fun")
    services.latest().end()
    assert shell.cell("r.wait()") == "the result"


def test_an_error_is_raised_by_those_who_ask_and_printed_nowhere(
    shell: TestingShell, services: DrivenServices, capfd: Any
) -> None:
    run = shell.cell("%%tfos_train -n 2 --background --out r --quiet\n1")
    services.latest().end(ValueError("too\nbad"))
    for ask in (run.wait, run.result, run.wait):
        with pytest.raises(ValueError, match="too") as caught:
            ask()
        assert len(caught.traceback) < 12  # it does not grow from call to call
    assert run.state == "failed"
    assert str(run.error) == "too\nbad"
    assert repr(run).endswith("too bad>")
    view = run.board.view()
    assert (view.outcome, view.message) == ("failed", "ValueError: too bad")
    told = capfd.readouterr()
    assert "Traceback" not in told.err + told.out
    failed = NodeError("worker:0 failed.", node="worker:0", host="h")
    again = shell.cell("%%tfos_train -n 2 --background --out r\n1")
    services.latest().end(failed)
    assert "NodeError" not in shell.error_of("r.wait()").stdout.split("worker:0 failed.")[0]
    assert again.error is failed


def test_stopping_ends_it_and_again_does_nothing(shell: TestingShell, services: DrivenServices) -> None:
    run = shell.cell("%%tfos_train -n 2 --background --out r\n1")
    services.latest()
    run.stop()
    run.stop()
    assert run.state == "stopped"
    with pytest.raises(RunStoppedError):
        run.wait()
    with pytest.raises(RunStoppedError):
        run.result()
    assert "stopped after" in repr(run)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a notebook; where pytest itself was started in the background, SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_waiting_that_is_interrupted_leaves_the_run_alone(shell: TestingShell, services: DrivenServices) -> None:
    run = shell.cell("%%tfos_train -n 2 --background --out r\n1")
    services.latest()
    main = threading.main_thread().ident or 0

    def interrupt() -> None:
        while BackgroundRun.wait.__code__ not in {
            frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames()[main])
        }:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert isinstance(shell.error_of("r.wait()").error, KeyboardInterrupt)
    thread.join()
    assert run.state == "running"
    services.latest().end()
    assert run.wait() == "the result"


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["%%tfos_train -n 2 --background --out r\n1", "%%tfos_train -n 2 --out r\n1"])
def test_the_name_of_a_run_that_goes_on_is_refused(shell: TestingShell, services: DrivenServices, again: str) -> None:
    run = shell.cell("%%tfos_train -n 2 --background --out r\n1")
    error = shell.error_of(again).error
    assert str(error).startswith("--out r: a run of this name goes on in the background.\n%tfos_stop r ends it")
    assert shell.user_ns["r"] is run
    services.latest().end()
    run.wait()
    shell.cell(again)  # free again


def test_runs_and_standing_inferences_do_not_take_each_other_s_names(
    shell: TestingShell, services: DrivenServices
) -> None:
    infer = "%%tfos_infer -n 2 --data df --out {}\nlambda batch: batch"
    shell.user_ns["df"] = FRAME
    shell.cell(infer.format("preds"))
    assert isinstance(shell.error_of("%%tfos_train -n 2 --background --out preds\n1").error, UsageError)
    shell.cell("%%tfos_train -n 2 --background --out r\n1")
    assert isinstance(shell.error_of(infer.format("r")).error, UsageError)
    assert [each.is_open for each in services.inferences] == [True]


# --- what is wrong is said in the cell -----------------------------------------------------------------------


def test_what_can_be_known_before_is_raised_in_the_cell_and_nothing_starts(
    shell: TestingShell, services: DrivenServices
) -> None:
    services.wrong = TooFewSlotsError("2 nodes need 2 slots", needed=2, available=1)
    assert shell.error_of("%%tfos_train -n 2 --background --out r\n1").error is services.wrong
    assert isinstance(shell.error_of("%%tfos_train -n 2 --background\nimport x as\n1").error, UsageError)
    assert services.runs == []
    assert "r" not in shell.user_ns
    assert shell.output_of("%tfos_status").stdout == "Nothing runs.\n"


def test_a_dry_run_and_help_start_nothing(shell: TestingShell, services: DrivenServices) -> None:
    assert "the plan" in shell.output_of("%%tfos_train -n 2 --background --dry-run --out r\n1").stdout
    assert "--background" in shell.output_of("%%tfos_train --background --help").stdout
    assert services.runs == [] and "r" not in shell.user_ns


# --- boards --------------------------------------------------------------------------------------------------


def test_two_boards_stay_live_when_their_cells_have_returned_and_are_never_mixed(
    shell: TestingShell, services: DrivenServices, published: Published
) -> None:
    first = shell.cell("%%tfos_train -n 2 --background --out a\n1")
    driven = services.latest()
    second = shell.cell("%%tfos_train -n 2 --background --out b\n1")
    one, two = published.new
    driven.log("worker:0", "a word of the first")
    wait_until(lambda: "a word of the first" in published.texts(one))
    driven.end()
    first.wait()
    assert "done in" in published.last(one)["text/plain"]
    assert "done in" not in published.texts(two)
    services.latest().log("worker:0", "a word of the second")
    wait_until(lambda: "a word of the second" in published.texts(two))
    services.latest().end(ValueError("too bad"))
    with pytest.raises(ValueError, match="too bad"):
        second.wait()
    assert "failed after" in published.last(two)["text/plain"]
    assert "too bad" in published.last(two)["text/plain"]
    assert "a word of the first" not in published.texts(two) and "a word of the second" not in published.texts(one)
    assert published.new == [one, two]


def test_a_board_is_not_caught_by_a_cell_that_captures(
    shell: TestingShell, services: DrivenServices, published: Published
) -> None:
    run = shell.cell("%%tfos_train -n 2 --background --out r\n1")
    driven = services.latest()
    caught = Published()
    shell.display_pub = caught  # type: ignore[assignment]  # as %%capture does
    driven.log("worker:0", "a word")
    wait_until(lambda: "a word" in published.texts(published.new[0]))
    driven.end()
    run.wait()
    assert caught.all == []
    assert "done in" in published.last(published.new[0])["text/plain"]


def test_status_shows_live_boards_once_more_and_records_of_those_that_ended(
    shell: TestingShell, services: DrivenServices, published: Published
) -> None:
    assert shell.output_of("%tfos_status").stdout == "Nothing runs.\n"
    run = shell.cell("%%tfos_train -n 2 --background --out r\n1")
    driven = services.latest()
    shell.cell("%tfos_status")
    one, again = published.new
    assert one == again  # one display id: updates reach both
    driven.end()
    run.wait()
    shell.cell("%tfos_status r")
    assert published.new == [one, one, ""]
    assert published.all[-1][0]["text/plain"].startswith("r: Cell In[2] on 2 nodes · done in")
    shell.cell("%%tfos_train -n 2 --out plain\n1")
    shell.cell("%tfos_status plain")
    assert published.all[-1][0]["text/plain"].startswith("plain: Cell In[5] on 2 nodes · done in")


def test_status_keeps_a_bounded_number_of_runs(shell: TestingShell, services: DrivenServices) -> None:
    for number in range(5):
        shell.cell(f"%%tfos_train -n 2 --out r{number}\n1")
    shown = shell.output_of("%tfos_status").stdout
    assert [name for name in ("r0", "r1", "r2", "r3", "r4") if f"{name}: " in shown] == ["r2", "r3", "r4"]


def test_a_quiet_run_is_a_line_until_its_board_is_asked_for(
    shell: TestingShell, services: DrivenServices, published: Published
) -> None:
    quiet = shell.cell("%%tfos_train -n 2 --background --quiet\n1")
    services.latest().end()
    quiet.wait()
    assert [update for _, _, update in published.all] == [False, True]
    assert all("\n" not in data["text/plain"] for data, _, _ in published.all)
    run = shell.cell("%%tfos_train -n 2 --background --quiet\n1")
    driven = services.latest()
    shell.cell("%tfos_status run2")
    driven.log("worker:0", "a word")
    wait_until(lambda: "a word" in published.texts(published.new[-1]))
    driven.end()
    run.wait()
    assert "worker:0" in published.last(published.new[-1])["text/plain"]


def test_a_terminal_gets_a_line_at_the_begin_and_one_at_the_end(
    shell: TestingShell, services: DrivenServices, capsys: Any
) -> None:
    output = shell.output_of("%%tfos_train -n 2 --background --out r\n1")
    assert output.stdout.splitlines()[0] == (
        "r: Cell In[1] on 2 nodes, in the background: %tfos_status shows it, %tfos_stop ends it."
    )
    driven = services.latest()
    capsys.readouterr()
    for number in range(50):
        driven.log("worker:0", f"line {number}")
    assert "worker:0" in shell.output_of("%tfos_status").stdout  # the table, when asked for
    driven.end()
    shell.user_ns["r"].wait()
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert told.startswith("r: Cell In[1] on 2 nodes · done in")


# --- the magics ----------------------------------------------------------------------------------------------


def test_logs_of_nodes_with_their_names(shell: TestingShell, services: DrivenServices) -> None:
    assert "nothing has run yet" in str(shell.error_of("%tfos_logs").error)
    run = shell.cell("%%tfos_train -n 2 --background --out r\n1")
    driven = services.latest()
    assert shell.output_of("%tfos_logs").stdout == "Nothing was written in r.\n"
    driven.log("chief:0", *(f"step {number} loss 0.{number}" for number in range(30)))
    driven.log("worker:0", "\x1b[31mred\x1b[0m loss")
    lines = shell.output_of("%tfos_logs").stdout.splitlines()
    assert lines[0] == "chief:0  │ … 10 earlier lines left out"
    assert lines[1] == "chief:0  │ step 10 loss 0.10"
    assert lines[-1] == "worker:0 │ red loss"
    assert len(lines) == 22
    assert shell.output_of("%tfos_logs worker:0").stdout == "red loss\n"
    assert shell.output_of("%tfos_logs worker").stdout == "red loss\n"
    assert shell.output_of("%tfos_logs chief:0 --tail 2 --grep 'step 2\\d'").stdout == (
        "… 8 earlier lines left out\nstep 28 loss 0.28\nstep 29 loss 0.29\n"
    )
    assert shell.output_of("%tfos_logs --grep nope").stdout == "No line matches 'nope' in r.\n"
    assert run.logs("worker:0") == {"worker:0": ("red loss",)}
    assert run.logs(grep="loss 0.1$") == {"chief:0": ("step 1 loss 0.1",)}
    assert "the result" in str(shell.cell("%%tfos_train -n 2 --out later\n1") or "the result")
    assert "red" not in shell.output_of("%tfos_logs").stdout  # the last one is another now
    assert "red" in shell.output_of("%tfos_logs --run r").stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%tfos_logs wrker:0", "The run has no node 'wrker:0'. Did you mean 'worker:0'?"),
        ("%tfos_logs x", "The run has no node 'x'. There are: chief:0, worker:0."),
        ("%tfos_logs --grep (", "The bracket in ( is never closed."),
        ("%tfos_logs --grep '('", "'(' is no regular expression: "),
        ("%tfos_logs --run rum1", "--run rum1: there is no such run. Did you mean 'run1'?"),
        ("%tfos_logs --tail 0", "--tail 0: 0 is too few; at least 1."),
        ("%tfos_logs --tial 3", "Unknown option --tial. Did you mean --tail?"),
        ("%tfos_status rn1", "%tfos_status rn1: there is no such run. Did you mean 'run1'?"),
        ("%tfos_stop rn1", "%tfos_stop rn1: nothing runs or waits under this name. Did you mean 'run1'?"),
    ],
)
def test_mistakes_are_one_line(shell: TestingShell, services: DrivenServices, text: str, message: str) -> None:
    shell.cell("%%tfos_train -n 2 --background\n1")
    services.latest()
    error = shell.error_of(text).error
    assert isinstance(error, UsageError)
    assert message in str(error)


def test_lines_that_are_gone_count_as_left_out_also_among_those_that_match() -> None:
    board = StatusBoard(log_lines_kept=10)
    board.apply(NodeLogged("worker:0", tuple(f"line {number}" for number in range(1200))))
    run = BackgroundRun("r", board, lambda stop: None, SimpleNamespace(), lambda run: None)  # type: ignore[arg-type,return-value]
    assert run.logs(grep="line") == board.all_logs()
    assert run.logs(grep="5", tail=1) == {"worker:0": ("… 1,190 earlier lines left out", "line 1195")}
    assert run.logs(grep="earlier") == {}


def test_stop_ends_what_is_named_or_all_of_both_kinds(shell: TestingShell, services: DrivenServices) -> None:
    shell.user_ns["df"] = FRAME
    runs = [shell.cell("%%tfos_train -n 2 --background\n1") for _ in range(3)]
    services.latest()
    shell.cell("%%tfos_infer -n 2 --data df --out preds\nlambda batch: batch")
    assert shell.output_of("%tfos_status").stdout.endswith("preds: 1 node waits for questions.\n")
    assert "run1: 2 nodes stopped.\n" in shell.output_of("%tfos_stop run1").stdout
    assert [run.state for run in runs] == ["stopped", "running", "running"]
    assert shell.output_of("%tfos_stop run1").stdout == "run1 has ended already: stopped.\n"
    services.runs[1].end()
    runs[1].wait()
    stopped = shell.output_of("%tfos_stop").stdout
    assert "run3: 2 nodes stopped.\n" in stopped and "preds: 2 nodes stopped.\n" in stopped
    assert [run.state for run in runs] == ["stopped", "done", "stopped"]
    assert not services.inferences[0].is_open
    assert "Nothing to stop" in shell.output_of("%tfos_stop").stdout


def test_unload_ends_what_runs(shell: TestingShell, services: DrivenServices) -> None:
    run = shell.cell("%%tfos_train -n 2 --background\n1")
    services.latest()
    magics.unload(shell)
    assert run.state == "stopped"


def test_names_and_nodes_complete(shell: TestingShell, services: DrivenServices) -> None:
    shell.cell("%%tfos_train -n 2 --background --out abc\n1")
    services.latest()
    assert shell.completions("%%tfos_train --ba") == ["--batch-size", "--background"]
    assert shell.completions("%tfos_stop ") == shell.completions("%tfos_status a") == ["abc"]
    assert shell.completions("%tfos_logs --run ") == shell.completions("%tfos_logs --run a") == ["abc"]
    assert shell.completions("%tfos_logs wo") == ["worker:0"]
    assert shell.completions("%tfos_logs worker:") == ["0"]
    assert shell.completions("%tfos_logs --run abc chi") == ["chief:0"]
    assert shell.completions("%tfos_logs --t") == ["--tail"]
    for magic in ("%tfos_logs", "%tfos_status", "%tfos_stop"):
        assert "NAME" in shell.output_of(f"{magic} --help").stdout
        assert "NAME" in shell.object_inspect_text(magic)


# --- real Spark ----------------------------------------------------------------------------------------------


class Watched:
    """Shows nothing; the run is what is looked at."""

    def open(self) -> None: ...
    def close(self) -> None: ...
    def show_again(self) -> bool:
        return False


STARTED: list[Started] = []


@pytest.fixture(autouse=True)
def all_forgotten() -> Iterator[None]:
    """Forget the real runs, as the notebook does that they belong to: their log files go."""
    yield
    while STARTED:
        STARTED.pop().runs.close()


class Started:
    """A real run in the background, and when its nodes run."""

    def __init__(self, spark: Any, body: str, nodes: int = 2, *, data: Any = None, **options: Any) -> None:
        self.running = threading.Event()
        self.board = StatusBoard()
        self.runs = Runs()
        STARTED.append(self)
        chosen = cluster.RunOptions(num_nodes=nodes, **options)
        payload = pack_cell(body, {}, {"epochs": 1, "batch_size": 64})
        self.run = self.runs.start(
            self.runs.name_for(None),
            self.board,
            lambda stop: cluster.run(
                spark,
                payload,
                chosen,
                data=data,
                on_event=self._note,
                board=self.board,
                cell_names={FILENAME: LABEL},
                stop=stop,
            ),
            Watched(),
        )

    def _note(self, event: Event) -> None:
        if isinstance(event, NodeChanged) and event.state is NodeState.RUNNING:
            self.running.set()

    def end_after(self, error: type[BaseException]) -> float:
        """Stop it, and return the seconds that took."""
        began = time.monotonic()
        self.run.stop()
        with pytest.raises(error):
            self.run.result()
        return time.monotonic() - began


SLEEP = "import time\ntime.sleep(120)"


def test_a_real_run_gives_its_result_and_logs(spark_local4: Any) -> None:
    started = Started(spark_local4, "print('a word')\nctx.task_index")
    assert started.run.wait(60).values == [0, 0]
    assert started.run.state == "done"
    assert started.run.logs("worker") == {"worker:0": ("a word",)}
    assert started.board.view().outcome == "done"


def test_a_real_run_is_stopped_while_it_runs_and_the_slots_are_free_again(spark_local4: Any) -> None:
    first, second = Started(spark_local4, SLEEP), Started(spark_local4, SLEEP)
    assert first.running.wait(60) and second.running.wait(60)
    assert first.end_after(RunStoppedError) < 10
    view = first.board.view()
    assert (view.outcome, {node.state for node in view.nodes}) == ("stopped", {NodeState.STOPPED})
    assert second.run.state == "running"
    second.end_after(RunStoppedError)
    assert Started(spark_local4, "1", 4).run.wait(60).values == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_stop_is_heard_at_any_time(spark_local4: Any) -> None:
    at_once = Started(spark_local4, SLEEP)
    at_once.end_after(RunStoppedError)  # before or while it starts
    holder = Started(spark_local4, SLEEP, 3)
    assert holder.running.wait(60)
    waiting = Started(spark_local4, SLEEP, 2)
    wait_until(lambda: "waiting for slots" in waiting.board.view().phase)
    assert waiting.end_after(RunStoppedError) < 10
    assert holder.run.state == "running"
    holder.run.stop()
    for number in range(4):  # a moment later each time
        started = Started(spark_local4, SLEEP, data={"train": spark_local4.range(100_000)})
        started.running.wait(0.4 * number)
        started.end_after(RunStoppedError)


@pytest.mark.slow
def test_a_stop_during_the_feed_ends_the_feed_too(spark_local4: Any) -> None:
    body = "for batch in ctx.dataset(raw=True):\n    print('fed', flush=True)\n    import time; time.sleep(120)"
    started = Started(spark_local4, body, data={"train": spark_local4.range(5_000_000, numPartitions=8)})
    wait_until(lambda: started.run.logs(grep="fed"))
    assert started.end_after(RunStoppedError) < 15
    tracker = spark_local4.sparkContext.statusTracker()
    wait_until(lambda: not tracker.getActiveJobsIds())


def test_two_stops_at_once_are_one(spark_local4: Any) -> None:
    started = Started(spark_local4, SLEEP)
    assert started.running.wait(60)
    others = [threading.Thread(target=started.run.stop) for _ in range(3)]
    for other in others:
        other.start()
    started.run.stop()
    for other in others:
        other.join()
    assert started.run.state == "stopped"


@pytest.mark.slow
def test_what_failed_before_the_stop_stays_the_error_and_what_fails_after_it_is_its_doing(spark_local4: Any) -> None:
    failing = Started(spark_local4, "raise ValueError('mine')")
    wait_until(lambda: any(node.state is NodeState.FAILED for node in failing.board.view().nodes))
    failing.end_after(NodeError)
    assert failing.run.state == "failed"
    body = "import signal, time\ntry:\n    time.sleep(120)\nfinally:\n    raise ValueError('in the way')"
    stopped = Started(spark_local4, body)
    assert stopped.running.wait(60)
    stopped.end_after(RunStoppedError)


def test_what_is_wrong_from_the_start_is_known_before_it(spark_local4: Any) -> None:
    options = cluster.RunOptions(num_nodes=5)
    with pytest.raises(TooFewSlotsError):
        cluster.check(spark_local4, options, {})
    frame = spark_local4.range(3).selectExpr("map(id, id) as m")
    with pytest.raises(DataError):
        cluster.check(spark_local4, cluster.RunOptions(num_nodes=2), {"train": frame})
    cluster.check(spark_local4, cluster.RunOptions(num_nodes=2), {"train": spark_local4.range(3)})


# --- a real kernel -------------------------------------------------------------------------------------------

START = """
import os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.sql import SparkSession
spark = SparkSession.builder.master("local[5]").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
%load_ext tfos_magic
"""
COUNT = """
import time
import traceback
for number in range(1000):
    print("counted to", number, flush=True)
    time.sleep(0.2)
"""


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    notebook = Notebook(tmp_path)
    yield notebook
    notebook.close()


@pytest.mark.slow
def test_in_a_notebook(notebook: Notebook) -> None:
    assert notebook.run(START).status == "ok"
    begun = notebook.run("%%tfos_train -n 2 --background --out r" + COUNT)
    assert begun.status == "ok", begun.traceback
    assert "<BackgroundRun r: running" in begun.text
    assert {"text/html", "text/plain"} <= begun.mimetypes

    # The notebook is free: other cells run, and one of them is interrupted.
    assert notebook.run("spark.range(5).count()").text.strip() == "5"
    for node in ("chief:0", "worker:0"):
        wait_until(lambda node=node: "counted" in notebook.run(f"%tfos_logs {node}").text)  # type: ignore[misc]
    sleeping = notebook.start("import time; print('he' 're'); time.sleep(60)")
    notebook.wait_for(sleeping, "here")
    notebook.manager.interrupt_kernel()
    assert "KeyboardInterrupt" in notebook.finish(sleeping).traceback
    assert "counted" in notebook.run("%tfos_logs worker:0 --tail 3").text
    shown = notebook.start("%tfos_status")
    assert "running" in notebook.finish(shown).text
    # Two at once; what runs meanwhile shows nothing of them, and the board goes on when no cell runs.
    assert notebook.run("%%tfos_train -n 2 --background\nraise ValueError('on purpose')").status == "ok"
    failed = notebook.run("handle = _\nhandle.wait()")
    assert "on purpose" in failed.traceback and "Cell In[" in failed.traceback
    assert notebook.run("r.state, handle.state, handle.name").text.strip() == "('running', 'failed', 'run1')"
    quiet = notebook.run("time.sleep(1.5); print('only this')")
    assert quiet.text == "only this\n"

    assert notebook.run("%tfos_stop").text.strip().endswith("r: 2 nodes stopped.")
    assert not nodes_alive()
    assert "stopped after" in notebook.run("%tfos_status").text
    assert "RunStoppedError" in notebook.run("r.wait()").traceback

    # Unloading ends what runs, and leaves nothing.
    assert notebook.run("%%tfos_train -n 2 --background --out r" + COUNT).status == "ok"
    wait_until(lambda: "counted" in notebook.run("%tfos_logs").text)
    assert notebook.run("%unload_ext tfos_magic").status == "ok"
    assert not nodes_alive()
    threads = "import threading\n[each.name for each in threading.enumerate() if 'tfos' in each.name]"
    assert notebook.run(threads).text.strip() == "[]"
    assert notebook.run("spark.sparkContext.statusTracker().getActiveJobsIds()").text.strip() == "[]"


@pytest.mark.slow
def test_the_kernel_s_end_is_the_run_s(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path)
    try:
        assert notebook.run(START).status == "ok"
        assert notebook.run("%%tfos_train -n 2 --background --out r" + COUNT).status == "ok"
        wait_until(lambda: "counted" in notebook.run("%tfos_logs").text)
        assert nodes_alive()
    finally:
        began = time.monotonic()
        notebook.close()
    assert time.monotonic() - began < 10
    wait_until(lambda: not nodes_alive())


@pytest.mark.slow
@pytest.mark.browser
def test_the_board_moves_when_its_cell_has_returned_and_in_every_cell_that_shows_it(
    tmp_path: Path, chromium: str
) -> None:
    cells = [
        f"""
        import sys, threading
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from fake_run import *
        from tfos_magic.background import Runs
        from tfos_magic.widgets import *
        board = StatusBoard()
        shown = BackgroundBoard(board, get_ipython())
        may_end = threading.Event()
        def work(stop):
            play(board, speed=8)
            may_end.wait(60)
        runs = Runs()
        """,
        "run = runs.start('r', board, work, shown)",
        "run.show_again()",
        "may_end.set(); run.wait(60)",
    ]
    with jupyterlab(tmp_path) as server, browser(server, chromium) as lab:
        write_notebook(server.root / "background.ipynb", [textwrap.dedent(cell).strip() for cell in cells])
        lab.open_notebook("background.ipynb")
        for index in (0, 1):
            lab.run_cell(index)
        assert lab.cell(1).locator(".jp-InputPrompt").first.inner_text() == "[2]:"
        first, again = (lab.output(index).locator(".tfos-board") for index in (1, 2))
        first.get_by_text("epoch 2 of 5").wait_for(timeout=30_000)
        lab.run_cell(2)
        again.get_by_text("epoch 4 of 5").wait_for(timeout=30_000)
        first.get_by_text("epoch 4 of 5").wait_for(timeout=30_000)
        lab.run_cell(3)
        for board in (first, again):
            board.get_by_text("done in").wait_for()
            assert board.count() == 1
        assert lab.output(3).locator(".tfos-board").count() == 0
