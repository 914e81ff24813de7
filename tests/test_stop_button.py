"""The button above the board: a click ends the run, and nothing of it stays."""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from jupyterlab_fixture import browser, jupyterlab, write_notebook

from tfos_magic.status import StatusBoard
from tfos_magic.widgets import LiveBoard
from tfos_magic.widgets.stop_button import InterruptButton, RunButton, is_watched

TESTS = str(Path(__file__).parent)
HINT = "Interrupting the kernel (■) stops all nodes."


class Publisher:
    """Takes what a kernel would send: (data, display id, whether it updates)."""

    def __init__(self) -> None:
        self.all: list[tuple[dict[str, Any], str, bool]] = []

    def publish(self, data: Any, metadata: Any, *, transient: Any = None, update: bool = False) -> None:
        self.all.append((data, (transient or {}).get("display_id", ""), update))


def kernel_shell(request: dict[str, Any]) -> Any:
    """A kernel's shell, in which a cell runs that was asked for by `request`."""
    kernel = SimpleNamespace(get_parent=lambda channel: request)
    return SimpleNamespace(kernel=kernel, display_pub=Publisher())


WATCHED = {"content": {"allow_stdin": True}}
UNWATCHED = {"content": {"allow_stdin": False}}


def test_who_can_press_a_button():
    assert is_watched(kernel_shell(WATCHED))
    for request in (UNWATCHED, {"content": {}}, {}):
        assert not is_watched(kernel_shell(request))
    assert not is_watched(SimpleNamespace(kernel=object()))
    assert not is_watched(SimpleNamespace())


def test_under_a_jupyter_server_there_is_a_button_elsewhere_the_hint(monkeypatch):
    for session, expected in (("a.ipynb", "notebook:interrupt-kernel"), (None, HINT)):
        shell = kernel_shell(WATCHED)
        if session:
            monkeypatch.setenv("JPY_SESSION_NAME", session)
        else:
            monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
        button = InterruptButton(shell)
        button.remove()
        assert not shell.display_pub.all
        button.show()
        button.remove()
        (shown, first, is_update), (left, second, _) = shell.display_pub.all
        assert expected in shown["text/html"]
        assert shown["text/plain"] == HINT
        assert not is_update
        assert (left, second) == ({}, first)


@pytest.mark.parametrize(
    "request_, options, outputs", [(WATCHED, {}, 2), (UNWATCHED, {}, 1), (WATCHED, {"quiet": True}, 1)]
)
def test_a_board_that_nobody_watches_has_none(request_, options, outputs):
    shell = kernel_shell(request_)
    with LiveBoard(StatusBoard(), shell, **options):
        pass
    assert len([one for one in shell.display_pub.all if not one[2]]) == outputs


def test_the_button_of_a_run_stops_it_and_leaves_no_widget():
    import ipywidgets

    shell, calls = kernel_shell(WATCHED), []
    button = RunButton(shell, lambda: calls.append("stop"))
    made: list[Any] = []
    ipywidgets.Widget.on_widget_constructed(made.append)
    button.show()
    button.show()
    shown = [data for data, _, update in shell.display_pub.all if not update]
    assert len(shown) == 2
    assert shown[0] == shown[1]  # one widget in two places
    widget = button._widget
    widget.click()
    assert calls == ["stop"]
    assert (widget.disabled, widget.description) == (True, "stopping…")
    button.remove()
    button.remove()
    assert [data for data, _, update in shell.display_pub.all if update] == [{}]
    ipywidgets.Widget.on_widget_constructed(None)
    assert widget in made
    assert [one for one in made if one.comm is not None] == []  # its layout and its style are widgets, too


SETUP = f"""
import sys; sys.path.insert(0, {TESTS!r})
from fake_run import *
from tfos_magic.widgets import *
"""
BLOCKS = """
try:
    board = StatusBoard()
    with LiveBoard(board, get_ipython()):
        play(board)
except KeyboardInterrupt:
    print("interrupted")
"""
BACKGROUND = """
from tfos_magic.background import Runs
runs, board = Runs(), StatusBoard()

def work(stop):
    from tfos_magic.errors import RunStoppedError
    for event in run_events():
        if event.at > 1005:
            break
        board.apply(event)
    stop.wait(60)
    raise RunStoppedError("stopped")

shown = BackgroundBoard(board, get_ipython(), stop=lambda: runs.ask_to_stop("r"))
run = runs.start("r", board, work, shown)
"""


@pytest.mark.browser
@pytest.mark.slow
def test_a_click_ends_the_run_in_jupyterlab(tmp_path, chromium):
    cells = [SETUP, BLOCKS, "6 * 7", BACKGROUND, "run.show_again()", "run.state"]
    with jupyterlab(tmp_path) as server, browser(server, chromium) as lab:
        path = write_notebook(server.root / "stop.ipynb", [textwrap.dedent(cell).strip() for cell in cells])
        lab.open_notebook("stop.ipynb")
        lab.run_cell(0)
        lab.start_cell(1)
        button = lab.output(1).get_by_role("button", name="Stop")
        board = lab.output(1).locator(".tfos-board")
        board.get_by_text("importing TensorFlow").first.wait_for(timeout=30_000)
        button.focus()
        board.get_by_text("running").first.wait_for(timeout=30_000)  # drawn anew, more than once
        assert button.evaluate("one => one === document.activeElement")
        lab.screenshot("stop-button", 1)
        lab.page.keyboard.press("Enter")
        lab.wait_cell()
        board.get_by_text("stopped after").wait_for()
        assert "interrupted" in lab.output(1).inner_text()
        assert button.count() == 0

        lab.run_cell(2)
        assert "42" in lab.output(2).inner_text()

        lab.run_cell(3)
        lab.run_cell(4)
        for index in (3, 4):
            lab.output(index).get_by_role("button", name="Stop").wait_for()
        lab.screenshot("stop-button-background", 3)
        lab.output(4).get_by_role("button", name="Stop").click()
        lab.output(3).locator(".tfos-board").get_by_text("stopped after").wait_for()
        lab.page.locator(".jp-OutputArea-output .widget-button").first.wait_for(state="detached")
        lab.run_cell(5)
        assert "stopped" in lab.output(5).inner_text()
        lab.save()
    saved = nbformat.read(path, 4)
    shown = [set(output.get("data", ())) for cell in saved.cells for output in cell.outputs]
    assert {"text/html", "text/plain"} in shown
    assert not any("widget" in kind for kinds in shown for kind in kinds)
    assert "widgets" not in saved.metadata
