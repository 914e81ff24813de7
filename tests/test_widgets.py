from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from fake_run import finished, names, run_events
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from tfos_magic.errors import RunStoppedError
from tfos_magic.status import (
    BoardView,
    GpuSample,
    MachineSample,
    NodeBeat,
    NodeChanged,
    NodeLogged,
    NodeState,
    NodeView,
    RunEnded,
    RunPlanned,
    StatusBoard,
)
from tfos_magic.widgets import LiveBoard, one_line, render_html, render_text, static_bundle, words
from tfos_magic.widgets.text import cells_wide

TESTS = Path(__file__).parent
EVIL = "<script>alert('1')</script> & \"quoted\" \ud83d $a$ \x1b[31m"
NOW = 1030.0


def view_at(seconds: float, **options) -> BoardView:
    """The board of a run `seconds` after its beginning."""
    board = StatusBoard()
    for event in run_events(**options):
        if isinstance(event, RunEnded) or event.at - 1000 > seconds:
            break
        board.apply(event)
    return replace(board.view(), now=1000 + seconds)


class Tree(HTMLParser):
    """Checks that tags are balanced, and collects what is in them."""

    VOID = frozenset({"br", "hr", "img", "meter", "progress"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


# --- the same facts in both forms -------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [render_html, render_text])
def test_every_fact_of_a_run_is_drawn(draw):
    drawn = draw(view_at(17.3, wait=0.63, gpu=True)).replace("\N{NO-BREAK SPACE}", " ")
    for fact in ("tfos_train · 4 nodes", "training", "epoch 3 of 5", "17 s", "rows/s", "input-bound: nodes wait 68 %"):
        assert fact in drawn
    for fact in ("45 % · epoch 3: 25 % · about 15 s left", "chief:0", "worker:2", "10.0.0.4", "running", "158 %"):
        assert fact in drawn
    for fact in ("40,105", "1.3 GiB", "80 %", "▇▆▇▇▆▇▇▆▇▇", "31/40 GiB", "287 W · 64 °C"):
        assert fact in drawn
    for fact in ("step 520", "loss 0.6769", "104/240", "validation"):
        assert fact in drawn


@pytest.mark.parametrize("draw", [render_html, lambda view: render_text(view, width=120)])
def test_what_the_feed_does_is_drawn(draw):
    drawn = draw(view_at(10.3, wait=0.02, held=0.595)).replace("\N{NO-BREAK SPACE}", " ")
    assert "compute-bound: the feed waits 71 % for the nodes" in drawn
    for fact in ("6 · 24 MiB", "71 %", "2 %", "████"):
        assert fact in drawn


@pytest.mark.parametrize("draw", [render_html, render_text])
def test_a_failed_run_says_so_with_time_and_reason(draw):
    drawn = draw(finished(fail="worker:1").view())
    assert "failed after 20 s" in drawn
    assert "ValueError: shapes (64, 10) and (64, 12) differ" in drawn
    assert drawn.count("stopped") == 3


@pytest.mark.parametrize("draw", [render_html, render_text])
def test_a_node_that_goes_silent_is_told(draw):
    view = view_at(17)
    assert "silent" not in draw(view)
    assert "running, silent for 1 min 00 s" in draw(replace(view, now=view.now + 60))


@pytest.mark.parametrize("draw", [render_html, render_text])
def test_a_heartbeat_that_is_late_is_told_before_it_is_alarming(draw):
    view = view_at(17)
    assert "heard" not in re.sub(r'title="[^"]*"', "", draw(view))
    assert "running, not heard for 4 s" in draw(replace(view, now=view.now + 4))


@pytest.mark.parametrize("draw", [render_html, render_text])
def test_of_a_thousand_nodes_none_is_late_after_four_seconds(draw):
    board = StatusBoard()
    for index in range(1000):
        board.apply(NodeChanged(f"worker:{index}", NodeState.RUNNING, "host", at=100))
        board.apply(NodeBeat(f"worker:{index}", at=100))
    view = replace(board.view(), now=104)
    assert "not heard for" not in draw(view)
    assert "silent for 14 s" in draw(replace(view, now=114))


def test_the_age_of_the_heartbeat_can_always_be_looked_up():
    assert render_html(view_at(17.3), live=True).count('title="last heartbeat 0 s ago"') == 4
    assert "heartbeat" not in render_html(finished().view())


@pytest.mark.parametrize("draw", [render_html, render_text])
@pytest.mark.parametrize("view", [BoardView(), BoardView(outcome="failed", message="no Spark"), view_at(0)])
def test_a_run_that_has_hardly_begun_can_be_drawn(draw, view):
    assert draw(view)


@pytest.mark.parametrize("draw", [render_html, render_text])
def test_the_worst_of_many_nodes_come_first_and_the_rest_is_summed_up(draw):
    view = view_at(14, nodes=64)
    nodes = [replace(node, state=NodeState.WAITING) if node.name == "worker:50" else node for node in view.nodes]
    drawn = draw(replace(view, nodes=tuple(nodes)))
    assert drawn.index("worker:50") < drawn.index("worker:4")
    assert "48 more nodes: 48 running" in drawn or "48 more: running" in drawn


def test_the_many_that_need_no_attention_are_one_line_for_each_state():
    view = view_at(14, nodes=64)
    nodes = [
        replace(node, state=NodeState.WAITING) if 20 <= index < 40 else node for index, node in enumerate(view.nodes)
    ]
    drawn = Tree(render_html(replace(view, nodes=tuple(nodes)), live=True)).text
    assert "4 more: waiting for data" in drawn
    assert "44 more: running" in drawn


def test_sixteen_nodes_stay_in_their_order():
    shown, rest = words.split(view_at(14, nodes=16))
    assert [index for index, _ in shown] == list(range(16))
    assert rest == []


# --- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0.0000"), (0.41234, "0.4123"), (12.3456, "12.346"), (1234.5678, "1234.6"), (12345.6, "12,346"),
     (1.5e7, "1.50e+07"), (0.00012, "1.20e-04"), (-0.5, "-0.5000"), (math.nan, "NaN"), (math.inf, "∞"),
     (-math.inf, "-∞"), ("text", "text")],
)  # fmt: skip
def test_numbers_are_short(value, shown):
    assert words.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.9, "59 s"), (125, "2 min 05 s"), (3720, "1 h 02 min"), (90000, "25 h 00 min")],
)
def test_durations_are_told_as_people_tell_them(seconds, shown):
    assert words.duration(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(None, "–"), (0, "0 KiB"), (900 * 2**20, "900 MiB"), (1000 * 2**20, "1.0 GiB"), (31 * 2**30, "31.0 GiB")],
)
def test_sizes(size, shown):
    assert words.size(size) == shown


@pytest.mark.parametrize(
    ("samples", "shown"),
    [
        ((), "–"),
        ((GpuSample(0),), "–"),
        ((GpuSample(0, "A", 87.4, 2**31, 2**34),), "87 % · 2.0/16 GiB"),
        ((GpuSample(0, "A", 87.4, 31 * 2**30, 80 * 2**30),), "87 % · 31/80 GiB"),
        ((GpuSample(0, "A", 87.4),), "87 %"),
        ((GpuSample(0, "A", 80.0, 2**30), GpuSample(1, "A", 90.0, 2**30)), "2 × 85 % · 2.0 GiB"),
        ((GpuSample(0, "MIG", None, 2**30),), "– · 1.0 GiB"),
    ],
)
def test_gpus_are_told_as_far_as_they_are_known(samples, shown):
    assert words.gpu(samples) == shown


def test_power_is_of_all_gpus_and_temperature_of_the_hottest():
    samples = (GpuSample(0, power_watts=300.4, temperature_celsius=64), GpuSample(1, power_watts=10))
    assert words.gpu_heat(samples) == "310 W · 64 °C"
    assert words.gpu_heat((GpuSample(0, temperature_celsius=64),)) == "64 °C"
    assert words.gpu_heat((GpuSample(0),)) == ""


def test_which_side_is_slow_is_told_only_when_it_is_clear():
    assert words.bottleneck(view_at(17, wait=0.6)).startswith("input-bound")
    assert words.bottleneck(view_at(17, wait=0.2)) == ""
    assert words.bottleneck(view_at(17, wait=0.01)) == "compute-bound: data is there in time (nodes wait 1 %)"
    assert words.bottleneck(view_at(17, wait=0.25, held=0.3)) == ""
    assert words.bottleneck(view_at(17, wait=0.25, held=0.6)).startswith("compute-bound")  # it waited at the begin
    assert words.bottleneck(view_at(17, wait=0.01, held=0.6)) == "compute-bound: the feed waits 65 % for the nodes"
    assert words.bottleneck(view_at(6, wait=0.6)) == ""  # too early to judge


def test_epochs_are_told_only_if_somebody_counts_them():
    assert words.epoch(view_at(8)) == ""
    assert words.epoch(view_at(11)) == "epoch 2 of 5"
    assert words.epoch(finished().view()) == "5 of 5 epochs"
    assert words.epoch(BoardView(epochs=1, epoch=3)) == "epoch 3 of 3"


def told(view: BoardView) -> str:
    known = words.progress(view)
    return words.progress_told(view, known) if known else ""


def test_progress_is_that_of_the_rows_and_needs_an_epochs_length():
    assert told(view_at(6.3)) == ""  # the feed goes on: nobody knows how many rows there will be
    assert told(view_at(8.3)) == "14 % · epoch 1: 69 %"  # too early to foretell
    assert told(view_at(20.3)) == "55 % · epoch 3: 77 % · about 15 s left"
    assert told(finished().view()) == ""


def test_the_time_left_is_about_right():
    for second in (12.3, 18.3, 24.3, 30.3):
        left = words.progress(view_at(second)).left_s
        assert left == pytest.approx(34.2 - second, abs=3)


def test_rows_that_nobody_uses_do_not_slow_an_epoch_down():
    """The validation rows are in the feed, too; a function need not use them."""
    view = view_at(17.3)
    nodes = tuple(replace(node, rows_per_epoch=2 * node.rows_per_epoch) for node in view.nodes)
    known = words.progress(replace(view, nodes=nodes))
    assert known.share == pytest.approx(words.progress(view).share, abs=0.03)


def test_without_a_feed_steps_tell_how_far_an_epoch_is():
    nodes = (NodeView("chief:0", NodeState.RUNNING, step=250, running_since=100.0),)
    view = BoardView(epochs=4, epoch=2, marked_step=200, nodes=nodes, now=130.0)
    assert told(view) == "62 % · epoch 3: 50 % · about 20 s left"
    assert told(replace(view, epoch=None, marked_step=None)) == ""
    assert told(replace(view, epoch=5)) == ""  # more epochs than the line said: nobody knows how many


def test_no_progress_is_made_up_when_more_is_trained_than_the_line_said():
    view = view_at(17.3)
    assert told(replace(view, epoch=None, epochs=3, history={})) == "75 % · epoch 3: 25 % · about 5 s left"
    assert told(replace(view, epoch=None, epochs=1, history={})) == ""
    assert told(replace(view, epochs=1, epoch=1)) == ""


def test_a_sparkline_spans_its_range_and_shows_gaps():
    assert words.sparkline((0, 1, 2, math.nan, 7), 0, 7) == "▁▂▃ █"
    assert words.sparkline((5, 5), 5, 5) == "▁▁"
    thinned = words.sparkline([float(i) for i in range(1000)], 0, 999, width=40)
    assert len(thinned) == 40
    assert (thinned[0], thinned[-1]) == ("▁", "█")


def test_every_state_has_a_mark_a_place_and_words():
    for state in NodeState:
        view = BoardView(nodes=(NodeView("chief:0", state),))
        assert state.value in render_html(view)
        assert state.value[:20] in render_text(view)


# --- HTML -------------------------------------------------------------------------------------------------


def evil_view() -> tuple[BoardView, dict[str, tuple[str, ...]]]:
    gpu = MachineSample(1.0, 2, (GpuSample(0, EVIL, 1.0, 1, 1),))
    values = {EVIL: 1.0, "b": 2.0, "c": 3.0, "d": 1.0, "e": 1.0, "f": 1.0}
    node = NodeView(EVIL, NodeState.FAILED, EVIL, EVIL, 1, 1, 1.0, 1.0, gpu, values, last_line=EVIL)
    view = BoardView(EVIL, EVIL, nodes=(node, replace(node, state=NodeState.RUNNING)), history={EVIL: (1.0, 2.0)})
    return replace(view, outcome="failed", message=EVIL), {EVIL: (EVIL, EVIL)}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("outcome", ["", "failed", "<b>"])
def test_nothing_from_outside_becomes_markup(live, outcome):
    view, logs = evil_view()
    html = render_html(replace(view, outcome=outcome), logs, live=live)
    assert "<script" not in html
    html.encode()  # no lone surrogates: the transport would stumble over them
    tree = Tree(html)
    assert {tag for tag, _ in tree.tags} <= {
        "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "b", "pre", "details", "summary", "img"
    }  # fmt: skip
    assert {name for _, attrs in tree.tags for name in attrs} <= {
        "class", "style", "scope", "title", "open", "rowspan", "colspan", "aria-hidden", "tabindex",
        "alt", "src", "width", "height",
    }  # fmt: skip
    assert all(attrs["src"].startswith("data:image/svg+xml;base64,") for tag, attrs in tree.tags if tag == "img")


@pytest.mark.parametrize("view", [view_at(17), finished(fail="worker:1").view(), finished(nodes=64).view()])
def test_html_is_well_formed_and_its_tables_have_heads(view):
    tree = Tree(render_html(view, {"chief:0": ("a", "b")}))
    columns = [attrs for tag, attrs in tree.tags if tag == "th"]
    assert all(attrs["scope"] in ("col", "row") for attrs in columns)
    assert "caption" in [tag for tag, _ in tree.tags]
    assert not any("var(" in (attrs.get("style") or "") for _, attrs in tree.tags)


@pytest.mark.parametrize("view", [view_at(2), view_at(17), view_at(17, gpu=True), finished().view()])
def test_every_row_has_a_cell_for_every_column(view):
    html = render_html(view)
    table = html[: html.index("</table>")]
    columns = table.count('scope="col"')
    rows = [row for row in table.split("<tr ")[2:] if row]
    widths = []
    for row in rows:
        spans = [int(span) for span in re.findall(r'colspan="(\d+)"', row)]
        widths.append(row.count("<td ") + row.count("<th ") + sum(spans) - len(spans) + ("colspan" in row))
    assert set(widths) == {columns}
    assert len(rows) == 4 * (1 + ('rowspan="2"' in table))


def test_a_column_of_which_there_is_nothing_to_say_is_not_there():
    assert ">GPU</th>" not in render_html(view_at(17))
    assert ">GPU</th>" in render_html(view_at(17, gpu=True))
    assert ">queued</th>" not in render_html(view_at(2))
    assert ">queued</th>" in render_html(view_at(17))
    assert ">queued</th>" not in render_html(finished().view())


def test_a_long_line_is_cut_and_whole_in_its_title():
    line = "x" * 1500
    html = render_html(BoardView(nodes=(NodeView("chief:0", last_line=line),)))
    assert html.count(line) == 1
    assert f'title="{line}"' in html


def test_output_is_folded_but_for_the_first_node_that_failed():
    board = finished(fail="worker:1")
    tree = Tree(render_html(board.view(), board.all_logs()))
    folds = [attrs for tag, attrs in tree.tags if tag == "details"]
    assert ["open" in attrs for attrs in folds] == [True, False, False, False]
    assert "ValueError: <b>bad</b> shape & more" in tree.text


def test_the_output_of_64_nodes_is_one_fold_and_bounded():
    lines = tuple(f"line {i} " + "x" * 1900 for i in range(200))
    html = render_html(finished(nodes=64).view(), {name: lines for name in names(64)})
    assert "Output of 64 nodes" in html
    assert len(html) < 700_000
    assert "line 199 " in html


def test_nothing_folds_in_a_live_frame():
    assert "<details" not in render_html(view_at(14, nodes=64), live=True)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_live_frame_of_8_nodes_is_small(gpu):
    assert len(render_html(view_at(17, nodes=8, gpu=gpu), live=True).encode()) < 20 * 1024  # one a second at least


# --- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120])
@pytest.mark.parametrize(
    "view",
    [
        view_at(2),
        view_at(17, gpu=True, wait=0.9),
        view_at(14, nodes=64),
        finished(fail="worker:1").view(),
        evil_view()[0],
    ],
)
def test_text_stays_within_its_width(view, width):
    lines = render_text(view, width=width).split("\n")
    assert max(map(cells_wide, lines)) <= max(width, 40)
    assert all(line == line.rstrip() for line in lines)


def test_text_columns_are_aligned_also_for_wide_characters():
    nodes = (NodeView("chief:0", host="東京"), NodeView("worker:0", host="a.b.c.d"))
    lines = render_text(BoardView(nodes=nodes)).split("\n")
    rows = [line for line in lines if "waiting for a slot" in line]
    positions = {cells_wide(row[: row.index("waiting")]) for row in rows}
    assert len(positions) == 1


def test_one_line_sums_a_run_up():
    assert one_line(finished().view()).startswith("tfos_train · 4 nodes · done in 34 s · 5 of 5 epochs · 384,081 rows")
    assert "\n" not in one_line(evil_view()[0]).replace(EVIL, "")


def test_the_bundle_needs_no_kernel():
    board = finished()
    bundle = static_bundle(board.view(), board.all_logs())
    assert set(bundle) == {"text/html", "text/plain"}


# --- live, without a front end ----------------------------------------------------------------------------


class Publisher:
    """Takes what a kernel would publish."""

    def __init__(self) -> None:
        self.published: list[tuple[dict[str, str], dict[str, str], bool]] = []
        self.arrived = threading.Condition()

    def publish(self, data, metadata, *, transient, update):
        with self.arrived:
            self.published.append((data, transient, update))
            self.arrived.notify_all()

    def wait_for(self, count: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.published) >= count, timeout=20)


def kernel_shell(publisher=None):
    return SimpleNamespace(kernel=object(), display_pub=publisher or Publisher())


def test_one_output_is_made_updated_and_left_as_a_record():
    publisher, board = Publisher(), StatusBoard()
    with LiveBoard(board, kernel_shell(publisher)):
        publisher.wait_for(1)
        board.apply(RunPlanned("title", ("chief:0",)))
        publisher.wait_for(2)
        board.apply(RunEnded("done"))
    assert len({transient["display_id"] for _, transient, _ in publisher.published}) == 1
    assert [update for _, _, update in publisher.published] == [False] + [True] * (len(publisher.published) - 1)
    assert "done in" in publisher.published[-1][0]["text/html"]
    assert not [thread for thread in threading.enumerate() if thread.name == "tfos-live-board"]


def test_frames_come_at_most_twice_a_second():
    publisher, board = Publisher(), StatusBoard()
    with LiveBoard(board, kernel_shell(publisher)):
        until = time.monotonic() + 1.7
        while time.monotonic() < until:
            board.apply(NodeLogged("chief:0", (f"{time.monotonic()}",)))
    assert 3 <= len(publisher.published) <= 2 + 1.7 * 2


@pytest.mark.parametrize(
    ("error", "words_"),
    [
        (KeyboardInterrupt(), "stopped after"),
        (RunStoppedError("stopped"), "stopped after"),
        (ValueError("<no> slots"), "ValueError: &lt;no&gt; slots"),
    ],
)
def test_an_exception_that_the_board_was_not_told_of_is_in_the_record(error, words_):
    publisher = Publisher()
    with pytest.raises(type(error)), LiveBoard(StatusBoard(), kernel_shell(publisher)):
        raise error
    assert words_ in publisher.published[-1][0]["text/html"]


def ready_board() -> StatusBoard:
    """A board of nodes that have loaded, one of which waits for data, as nodes without questions do."""
    board = StatusBoard()
    board.apply(RunPlanned("Cell In[4] on 2 nodes", ("worker:0", "worker:1")))
    for name in ("worker:0", "worker:1"):
        board.apply(NodeChanged(name, NodeState.RUNNING, "host", at=time.time() - 60))
        board.apply(NodeBeat(name, 4, 4, 59.0, MachineSample(1.0, 2**30)))
    board.apply(NodeChanged("worker:1", NodeState.WAITING))
    return board


@pytest.mark.parametrize("shell", ["kernel", "terminal", "quiet"])
def test_what_goes_on_after_the_cell_leaves_a_record_that_it_is_ready(shell, capsys):
    publisher = Publisher()
    with LiveBoard(
        ready_board(),
        SimpleNamespace() if shell == "terminal" else kernel_shell(publisher),
        quiet=shell == "quiet",
        lasting=True,
    ):
        pass
    bundle = publisher.published[-1][0] if publisher.published else {"text/plain": capsys.readouterr().out}
    for drawn in bundle.values():
        assert "ready after" in drawn
        assert "nodes wait for questions" in drawn
        for wrong in ("waiting for data", "input-bound", "◐", "stopped", "failed", "done"):
            assert wrong not in drawn
    if shell != "quiet":
        assert all(drawn.count("●") >= 2 for drawn in bundle.values())


def test_a_run_that_is_not_to_last_is_not_called_ready():
    publisher = Publisher()
    with LiveBoard(ready_board(), kernel_shell(publisher)):
        pass
    assert "ready" not in publisher.published[-1][0]["text/html"]
    with pytest.raises(KeyboardInterrupt), LiveBoard(ready_board(), kernel_shell(publisher), lasting=True):
        raise KeyboardInterrupt
    assert "stopped after" in publisher.published[-1][0]["text/html"]
    board = ready_board()
    with LiveBoard(board, kernel_shell(publisher), lasting=True):
        board.apply(RunEnded("failed", "no"))
    assert "failed after" in publisher.published[-1][0]["text/html"]


def test_a_front_end_that_fails_is_logged_once_and_does_not_reach_the_run(caplog):
    class Broken(Publisher):
        def publish(self, *args, **kwargs):
            raise OSError("gone")

    board = finished()
    with caplog.at_level(logging.WARNING), LiveBoard(board, kernel_shell(Broken())):
        pass
    assert [record.message for record in caplog.records] == [
        "the board could not be drawn and is left alone; the run goes on"
    ]


def test_quiet_is_one_line_at_the_end():
    publisher = Publisher()
    with LiveBoard(finished(), kernel_shell(publisher), quiet=True):
        assert publisher.published == []
        assert not [thread for thread in threading.enumerate() if thread.name == "tfos-live-board"]
    ((bundle, transient, update),) = publisher.published
    assert "done in 34 s" in bundle["text/plain"]
    assert (transient, update) == ({}, False)


def test_a_terminal_gets_a_line_per_change_and_no_flood():
    board, out = StatusBoard(), io.StringIO()
    board.apply(RunPlanned("training", names(64), epochs=2))
    with contextlib.redirect_stdout(out), LiveBoard(board, SimpleNamespace()) as live:
        for event in list(run_events(nodes=64, epochs=2, fail="worker:3"))[1:]:
            board.apply(event)
            if isinstance(event, NodeLogged) and event.node == "worker:62":
                live._surface.update(board.view())
        for flip in range(100):
            pause = NodeState.SAVING if flip % 4 == 1 else NodeState.WAITING
            board.apply(NodeChanged("chief:0", pause if flip % 2 else NodeState.RUNNING))
            live._surface.update(board.view())
    said = out.getvalue()
    lines, table = said[: said.index("\n\n")].split("\n"), said[said.index("\n\n") :]
    assert len(lines) < 20
    assert any("all 64 nodes: running" in line for line in lines)
    assert any(re.search(r"epoch 1 of 2 · loss 1\.1524  accuracy 0\.6361", line) for line in lines)
    assert any("worker:3: failed (ValueError: shapes" in line for line in lines)
    assert table.count("worker:") >= 15


def test_a_terminal_that_knows_only_ascii_is_no_failure(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with LiveBoard(finished(), SimpleNamespace()):
        pass
    sys.stdout.flush()
    assert b"done in 34 s" in raw.getvalue()


# --- live, in a real kernel -------------------------------------------------------------------------------

PLAY = """
import sys; sys.path.insert(0, {tests!r})
from fake_run import play
from tfos_magic.status import StatusBoard
from tfos_magic.widgets import LiveBoard
import threading
board = StatusBoard()
with LiveBoard(board, get_ipython()):
    play(board, speed={speed}, epochs=2{options})
    {then}
[thread.name for thread in threading.enumerate() if "tfos" in thread.name]
"""


def play_cell(speed=8, options="", then="pass"):
    return PLAY.format(tests=str(TESTS), speed=speed, options=options, then=then)


@pytest.fixture
def jupyter_dirs(tmp_path, monkeypatch):
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))


def messages_until_idle(client, msg_id, timeout=60):
    """Yield (seconds, type, content) of what a cell publishes."""
    start = time.monotonic()
    while True:
        message = client.get_iopub_msg(timeout=timeout)
        if message["parent_header"].get("msg_id") != msg_id:
            continue
        content = message["content"]
        yield time.monotonic() - start, message["msg_type"], content
        if message["msg_type"] == "status" and content["execution_state"] == "idle":
            return


@pytest.fixture
def kernel(jupyter_dirs):
    manager, client = start_new_kernel(kernel_name="python3")
    yield client, manager
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_updates_leave_the_kernel_while_the_cell_blocks(kernel):
    client, _ = kernel
    msg_id = client.execute(play_cell(speed=6))
    seen = list(messages_until_idle(client, msg_id))
    drawn = [message for message in seen if "tfos-board" in message[2].get("data", {}).get("text/html", "")]
    shown = [content for _, kind, content in drawn if kind == "display_data"]
    updates = [(at, content) for at, kind, content in drawn if kind == "update_display_data"]
    assert len(shown) == 1
    assert len(updates) >= 4
    assert updates[-1][0] - updates[0][0] > 1  # not all at once at the end
    assert {content["transient"]["display_id"] for _, content in updates} == {shown[0]["transient"]["display_id"]}
    assert "running" in updates[len(updates) // 2][1]["data"]["text/html"]
    assert "done in" in updates[-1][1]["data"]["text/html"]
    (result,) = [content for _, kind, content in seen if kind == "execute_result"]
    assert result["data"]["text/plain"] == "[]"  # no thread left
    assert not [kind for _, kind, _ in seen if kind.startswith("comm")]


def test_an_interrupt_leaves_the_record_and_the_next_cell_works(kernel):
    client, manager = kernel
    msg_id = client.execute(play_cell(speed=1))
    bundle = {}
    for _, kind, content in messages_until_idle(client, msg_id):
        if kind == "update_display_data" and "tfos-board" in content["data"].get("text/html", ""):
            bundle = content["data"]
            if "importing" in bundle["text/html"]:
                manager.interrupt_kernel()
    assert "stopped after" in bundle["text/html"]
    msg_id = client.execute("print([t.name for t in threading.enumerate() if 'tfos' in t.name])")
    assert [c["text"] for _, kind, c in messages_until_idle(client, msg_id) if kind == "stream"] == ["[]\n"]


@pytest.mark.parametrize("then", ["pass", "raise ValueError('on purpose')"])
def test_a_notebook_run_without_a_front_end_keeps_the_record_and_nothing_else(jupyter_dirs, then):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(play_cell(then=then))])
    NotebookClient(notebook, timeout=60, allow_errors=True, kernel_name="python3").execute()
    (output,) = [output for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    assert set(output.data) == {"text/html", "text/plain"}
    assert "done in" in output.data["text/html"]
    assert "done in" in output.data["text/plain"]
    assert "widgets" not in notebook.metadata


def test_nbconvert_shows_the_record(jupyter_dirs):
    from nbconvert import HTMLExporter

    bundle = static_bundle(finished(fail="worker:1").view(), {"worker:1": ("its $last$ line",)})
    cell = nbformat.v4.new_code_cell("run", outputs=[nbformat.v4.new_output("display_data", bundle)])
    html, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert "failed after 20 s" in html
    assert "its $last$ line" in html


# --- live, in a real terminal -----------------------------------------------------------------------------


def test_in_a_terminal_ipython(tmp_path):
    script = tmp_path / "cell.py"
    script.write_text(play_cell(speed=4))
    master, slave = pty.openpty()
    env = {**os.environ, "IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(TESTS.parent), "TERM": "dumb", "COLUMNS": "120"}
    command = [
        sys.executable,
        "-m",
        "IPython",
        "--no-banner",
        "--no-confirm-exit",
        "--colors=nocolor",
        "--simple-prompt",
    ]
    process = subprocess.Popen(
        [*command, "-i", "-c", f"%run -i {script}"], stdin=slave, stdout=slave, stderr=slave, env=env
    )
    os.close(slave)
    try:
        said = read_until(master, "In [", timeout=60)
        os.write(master, b"exit\n")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    lines = said.replace("\r\n", "\n").split("\n")
    told = [line for line in lines if line.startswith("[")]
    assert 4 <= len(told) < 20
    assert any("all 4 nodes: importing TensorFlow" in line for line in told)
    assert any("epoch 1 of 2" in line for line in told)
    assert any(re.match(r"✓ +2  worker:1 ", line) for line in lines)


def read_until(fd: int, text: str, timeout: float) -> str:
    """Return what the terminal shows until `text` appears."""
    said, deadline = b"", time.monotonic() + timeout
    while text.encode() not in said and time.monotonic() < deadline:
        if select.select([fd], [], [], 0.5)[0]:
            try:
                said += os.read(fd, 65536)
            except OSError:  # the other end has closed
                break
    return said.decode()


def test_drawing_is_cheap():
    view = view_at(17, nodes=64)
    began = time.process_time()
    for _ in range(20):
        render_html(view, live=True)
    assert (
        time.process_time() - began
    ) / 20 < 0.02  # at two frames a second: a few percent of a core at the very worst
