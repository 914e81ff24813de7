from __future__ import annotations

import math
import random
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
from fake_run import finished, machine, names, run_events

from tfos_magic.status import (
    GpuSample,
    MachineSample,
    MetricsReported,
    NodeBeat,
    NodeChanged,
    NodeLogged,
    NodeState,
    NodeView,
    PhaseChanged,
    RunEnded,
    RunPlanned,
    StatusBoard,
    clean_line,
)


def board_of(*events):
    board = StatusBoard()
    for event in events:
        board.apply(event)
    return board


def node_of(board, name="worker:0") -> NodeView:
    return next(node for node in board.view().nodes if node.name == name)


def running(name="worker:0", at=100.0):
    return NodeChanged(name, NodeState.RUNNING, "host", at=at)


# --- rates and waiting ------------------------------------------------------------------------------------


def test_rate_is_that_of_the_last_seconds_not_of_the_whole_run():
    beats = [NodeBeat("worker:0", rows_consumed=10 * second, at=100.0 + second) for second in range(60)]
    fast = [NodeBeat("worker:0", rows_consumed=590 + 1000 * second, at=159.0 + second) for second in range(1, 11)]
    assert node_of(board_of(running(), *beats)).rows_per_s == pytest.approx(10)
    assert node_of(board_of(running(), *beats, *fast)).rows_per_s == pytest.approx(1000)


def test_one_beat_tells_no_rate():
    assert node_of(board_of(running(), NodeBeat("worker:0", rows_consumed=5000, at=101))).rows_per_s == 0


def test_rate_of_a_node_that_has_ended_is_that_of_its_running_time():
    board = board_of(
        running(at=100),
        NodeBeat("worker:0", rows_consumed=400, at=104),
        NodeChanged("worker:0", NodeState.DONE, at=110),
    )
    assert node_of(board).rows_per_s == pytest.approx(40)
    board.apply(NodeBeat("worker:0", rows_consumed=500, at=111))  # the last beat may be overtaken by the state
    assert node_of(board).rows_per_s == pytest.approx(50)


@pytest.mark.parametrize(("wait_s", "percent"), [(0, 0), (5, 50), (10, 100), (30, 100), (-1, 0)])
def test_wait_percent_is_a_share_of_the_running_time(wait_s, percent):
    board = board_of(running(at=100), NodeBeat("worker:0", wait_s=wait_s, at=110))
    assert node_of(board).wait_percent == pytest.approx(percent)


@pytest.mark.parametrize("wait_s", [math.nan, math.inf])
def test_a_senseless_wait_changes_nothing(wait_s):
    board = board_of(running(), NodeBeat("worker:0", wait_s=5, at=110), NodeBeat("worker:0", wait_s=wait_s, at=111))
    assert node_of(board).wait_percent == pytest.approx(50)


@pytest.mark.parametrize(("wait_s", "percent"), [(0, 0), (4, 50), (100, 100), (-1, 0)])
def test_the_feeds_waiting_is_a_share_of_the_time_since_the_first_row(wait_s, percent):
    board = board_of(
        running(at=100),
        NodeBeat("worker:0", at=101),
        NodeBeat("worker:0", rows_received=5, at=102),
        NodeBeat("worker:0", rows_received=9, feed_wait_s=wait_s, at=110),
    )
    assert node_of(board).feed_wait_percent == pytest.approx(percent)


def test_without_a_row_the_feed_has_not_waited():
    assert node_of(board_of(running(), NodeBeat("worker:0", at=110))).feed_wait_percent is None


def test_the_small_lines_show_the_last_twenty_seconds():
    load = MachineSample(gpus=(GpuSample(0, utilization_percent=40.0), GpuSample(1, utilization_percent=60.0)))
    beats = [NodeBeat("worker:0", rows_consumed=10 * half, machine=load, at=100 + half / 2) for half in range(100)]
    node = node_of(board_of(running(), *beats))
    assert node.rate_history == pytest.approx([20.0] * 20)
    assert node.gpu_history == (50.0,) * 20


def test_no_rate_is_remembered_of_the_time_before_the_function_runs():
    states = NodeChanged("worker:0", NodeState.IMPORTING, at=50)
    assert node_of(board_of(states, NodeBeat("worker:0", at=60))).rate_history == ()


def test_what_lies_at_a_node_is_what_the_last_beat_said():
    beats = [NodeBeat("worker:0", queued_chunks=n, queued_bytes=n * 10, at=100.0 + n) for n in (1, 9, 2)]
    node = node_of(board_of(running(), *beats))
    assert (node.queued_chunks, node.queued_bytes) == (2, 20)


def test_the_rows_of_an_epoch_are_remembered_once_known():
    board = board_of(running(), NodeBeat("worker:0", rows_per_epoch=50, at=101), NodeBeat("worker:0", at=102))
    assert node_of(board).rows_per_epoch == 50


def test_time_before_the_function_runs_is_not_waiting():
    board = board_of(NodeChanged("worker:0", NodeState.IMPORTING, at=50), NodeBeat("worker:0", wait_s=0, at=60))
    assert node_of(board).wait_percent is None


def test_the_clock_of_waiting_starts_once():
    states = (NodeState.RUNNING, NodeState.WAITING, NodeState.RUNNING)
    board = board_of(*(NodeChanged("worker:0", state, at=100.0 + at) for at, state in enumerate(states)))
    assert node_of(board).running_since == 100


# --- states -----------------------------------------------------------------------------------------------


def test_planned_nodes_come_in_their_order_and_unknown_ones_after_them():
    board = board_of(running("worker:7"), RunPlanned("t", ("chief:0", "worker:0"), at=1), running("ps:0"))
    assert [node.name for node in board.view().nodes] == ["chief:0", "worker:0", "worker:7", "ps:0"]


def test_a_final_state_stays():
    board = board_of(running(), NodeChanged("worker:0", NodeState.FAILED, detail="ValueError", at=110))
    for state in NodeState:
        board.apply(NodeChanged("worker:0", state, at=120))
    assert node_of(board).state is NodeState.FAILED
    assert node_of(board).detail == "ValueError"
    assert node_of(board).ended_at == 110


def test_a_host_once_known_is_kept():
    assert node_of(board_of(running(), NodeChanged("worker:0", NodeState.WAITING))).host == "host"


@pytest.mark.parametrize(
    ("outcome", "state"), [("done", NodeState.DONE), ("failed", NodeState.STOPPED), ("stopped", NodeState.STOPPED)]
)
def test_no_node_runs_on_after_the_end(outcome, state):
    assert node_of(board_of(running(), RunEnded(outcome, at=120))).state is state


def test_the_first_outcome_is_the_one():
    board = board_of(running(), RunEnded("failed", "why", at=120), RunEnded("done", at=130), PhaseChanged("later"))
    view = board.view()
    assert (view.outcome, view.message, view.now, view.phase) == ("failed", "why", 120, "")


def test_late_events_of_a_finished_run_do_no_harm():
    board = finished()
    before = board.view()
    for event in list(run_events())[1:]:
        board.apply(event)
    after = board.view()
    assert replace(after, version=0) == replace(before, version=0)


def test_time_stands_still_after_the_end():
    board = board_of(RunPlanned("t", ("chief:0",), at=100), RunEnded("done", at=142))
    assert board.view().elapsed_s == 42
    assert board.view() == board.view()


def test_an_empty_board_has_no_age():
    assert StatusBoard().view().elapsed_s == 0


# --- metrics ----------------------------------------------------------------------------------------------


def epoch(number, node="chief:0", **values):
    return MetricsReported(node, values, epoch=number)


def test_history_is_the_mean_of_the_nodes_that_have_reported_an_epoch():
    board = board_of(
        MetricsReported("worker:1", {"loss": 9.0}, step=1),
        epoch(1, loss=2.0),
        epoch(1, "worker:0", loss=3.0),
        epoch(2, "worker:0", loss=3.0),
        epoch(2, loss=1.0),
    )
    assert board.view().history == {"loss": (2.5, 2.0)}
    assert board.view().epoch == 2


def test_what_a_node_tells_of_an_epoch_again_takes_the_place_of_the_first():
    told = [epoch(1, f"worker:{index}", loss=float(index)) for index in range(3)]
    later = [epoch(number, f"worker:{index}", loss=0.5) for number in range(2, 9) for index in range(3)]
    board = board_of(*told, *later, epoch(1, "worker:0", loss=6.0))  # as in a second fit
    assert board.view().history["loss"] == (3.0, *[0.5] * 7)
    board.apply(epoch(1, "worker:9", loss=math.nan))
    assert math.isnan(board.view().history["loss"][0])


@pytest.mark.parametrize("nodes", [3, 7, 10])
def test_the_mean_of_what_all_nodes_agree_on_is_exactly_that(nodes):
    board = board_of(*(epoch(1, f"worker:{index}", loss=0.1) for index in range(nodes)))
    assert board.view().history == {"loss": (0.1,)}


def report(step, node="worker:0", **values):
    return MetricsReported(node, values, step=step)


def test_a_trace_is_the_mean_of_what_every_node_reported_last():
    board = board_of(
        report(1, loss=4.0), report(1, "worker:1", loss=2.0), report(2, loss=2.0), report(9, "worker:1", loss=1.0)
    )
    assert board.view().trace == {"loss": ((1, 4.0), (2, 2.0))}


def test_a_trace_of_any_length_stays_small_and_keeps_both_ends():
    board = StatusBoard()
    for step in range(5000):
        board.apply(report(step, loss=float(step)))
    trace = board.view().trace["loss"]
    assert len(trace) <= 98
    assert (trace[0], trace[-1]) == ((0, 0.0), (4999, 4999.0))
    gaps = {second[0] - first[0] for first, second in pairwise(trace[:-1])}
    assert len(gaps) == 1  # evenly thinned


def test_a_trace_of_reports_without_steps_counts_them():
    board = board_of(*(MetricsReported("worker:0", {"loss": 1.0}) for _ in range(3)))
    assert [step for step, _ in board.view().trace["loss"]] == [1, 2, 3]


def test_a_second_fit_begins_the_trace_anew():
    board = board_of(report(1, loss=3.0), report(2, loss=2.0), report(1, loss=9.0))
    assert board.view().trace == {"loss": ((1, 9.0),)}


def test_rows_and_steps_at_an_epochs_end_are_remembered():
    board = board_of(
        running(), NodeBeat("worker:0", rows_consumed=100, at=101), report(7, loss=1.0), epoch(1, "worker:0", loss=1.0)
    )
    board.apply(NodeBeat("worker:0", rows_consumed=120, at=102))
    board.apply(epoch(1, "worker:1", loss=1.0))  # later, for the same epoch
    assert (board.view().marked_rows, board.view().marked_step) == (100, 7)


def test_a_metric_that_an_epoch_lacks_leaves_a_gap():
    history = board_of(epoch(1, loss=2.0), epoch(2, loss=1.0, val_loss=1.5)).view().history
    assert history["loss"] == (2.0, 1.0)
    assert math.isnan(history["val_loss"][0])
    assert history["val_loss"][1] == 1.5


def test_epochs_may_come_late_or_twice():
    board = board_of(epoch(2, loss=1.0), epoch(1, loss=2.0), epoch(2, loss=1.0))
    assert board.view().history == {"loss": (2.0, 1.0)}
    assert board.view().epoch == 2


def test_metrics_of_a_node_add_up():
    board = board_of(
        MetricsReported("worker:0", {"loss": 2.0, "lr": 0.1}, step=10), MetricsReported("worker:0", {"loss": 1.0})
    )
    assert node_of(board).metrics == {"loss": 1.0, "lr": 0.1}
    assert node_of(board).step == 10


# --- logs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("plain", "plain"),
        ("\x1b[1m\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("10%\r20%\r30%", "30%"),
        ("10%\r20%\r", "20%"),
        ("10%\r\x1b[K", "10%"),
        ("1/9 bar" + "\b" * 7 + "\r" + "2/9 bar", "2/9 bar"),
        ("1/9 bar" + "\b" * 7, "1/9 bar"),
        ("a\tb", "a       b"),
        ("nul\x00bell\x07", "nulbell"),
        ("turned \u202egnp.exe", "turned gnp.exe"),
        ("half \ud83d a surrogate", "half ? a surrogate"),
        ("windows\r\n", "windows"),
        ("", ""),
    ],
)
def test_a_log_line_is_what_a_terminal_would_show_at_its_end(raw, clean):
    assert clean_line(raw) == clean


def test_any_text_at_all_becomes_one_printable_line():
    chars = [*map(chr, range(0, 0x250)), "\x1b", "\r", "\b", "[", "]", "\ud800", "\u2028", "漢", "\U0001f600"]
    dice = random.Random(1)
    for _ in range(500):
        clean = clean_line("".join(dice.choices(chars, k=dice.randrange(60))))
        assert len(clean.splitlines()) <= 1
        assert not set(clean) & {"\x1b", "\r", "\b", "\x00"}
        clean.encode()


def test_a_very_long_line_is_cut():
    assert len(clean_line("x" * 10_000_000)) == 2000


def test_logs_are_bounded_and_say_what_is_missing():
    board = StatusBoard(log_lines_kept=3)
    board.apply(NodeLogged("worker:0", tuple(f"line {i}" for i in range(5)), dropped=1200))
    assert board.logs("worker:0") == ("… 1,202 earlier lines left out", "line 2", "line 3", "line 4")
    assert board.all_logs(last=1) == {"worker:0": ("… 1,204 earlier lines left out", "line 4")}


def test_a_flood_of_output_keeps_its_last_lines():
    board = StatusBoard()
    for block in range(100):
        board.apply(NodeLogged("worker:0", tuple(f"{block} {i}" for i in range(1000))))
    lines = board.logs("worker:0")
    assert len(lines) == 2001
    assert lines[-1] == "99 999"
    assert node_of(board).last_line == "99 999"


def test_the_last_line_is_the_last_that_says_something():
    board = board_of(NodeLogged("worker:0", ("hello", "  ", "")), NodeLogged("worker:0", ("\x1b[0m",)))
    assert node_of(board).last_line == "hello"


def test_logs_of_a_node_that_is_not_there():
    with pytest.raises(KeyError):
        StatusBoard().logs("worker:9")


def test_all_logs_leaves_out_silent_nodes():
    board = board_of(RunPlanned("t", ("chief:0", "worker:0")), NodeLogged("worker:0", ("hi",)))
    assert board.all_logs() == {"worker:0": ("hi",)}


# --- properties of the fold -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_order_of_events_the_board_stays_sane(seed):
    dice = random.Random(seed)
    events = [*run_events(nodes=5, epochs=3, fail="worker:1" if seed % 2 else ""), *run_events(nodes=2, epochs=1)]
    dice.shuffle(events)
    board = StatusBoard()
    fed: dict[str, int] = {}
    for version, event in enumerate(events, 1):
        board.apply(event)
        view = board.view()
        assert view.version == version
        assert len({node.name for node in view.nodes}) == len(view.nodes)
        for node in view.nodes:
            assert node.rows_consumed >= fed.get(node.name, 0)
            fed[node.name] = node.rows_consumed
            assert node.rows_per_s >= 0
            assert math.isfinite(node.rows_per_s)
            assert node.wait_percent is None or 0 <= node.wait_percent <= 100
        assert len({len(line) for line in view.history.values()}) <= 1
    assert board.view().outcome


def test_a_view_does_not_change_when_the_board_does():
    board = board_of(RunPlanned("t", ("chief:0",)), epoch(1, loss=1.0))
    view = board.view()
    board.apply(epoch(2, loss=0.5))
    board.apply(RunEnded("done"))
    assert view.history == {"loss": (1.0,)}
    assert view.outcome == ""


def test_peak_memory_outlives_the_process():
    beats = [NodeBeat("worker:0", machine=MachineSample(10.0, size), at=100.0 + size) for size in (5, 9, 2)]
    node = node_of(board_of(running(), *beats, NodeBeat("worker:0", at=200)))
    assert node.memory_peak_bytes == 9
    assert node.machine.memory_bytes is None


def test_many_threads_feed_one_board():
    board = StatusBoard()

    def feed(name):
        for row in range(200):
            board.apply(NodeBeat(name, rows_consumed=row, machine=machine(0), at=float(row)))
            board.apply(NodeLogged(name, (f"{row}",)))
            board.view()

    threads = [threading.Thread(target=feed, args=(name,)) for name in names(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    view = board.view()
    assert view.version == 8 * 400
    assert {node.rows_consumed for node in view.nodes} == {199}
    assert all(len(lines) == 200 for lines in board.all_logs().values())
