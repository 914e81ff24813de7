"""What people see: the board in a real JupyterLab in a real Chromium. Screenshots go to ``out/screenshots``."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import nbformat
import pytest
from jupyterlab_fixture import browser, jupyterlab, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TESTS = str(Path(__file__).parent)
SETUP = f"""
import sys; sys.path.insert(0, {TESTS!r})
from dataclasses import replace
from fake_run import *
from tfos_magic.widgets import *
from tfos_magic.widgets.html import render_html

def until(seconds, **options):
    board = StatusBoard()
    for event in run_events(**options):
        if event.at - 1000 > seconds:
            break
        board.apply(event)
    display({{"text/html": render_html(replace(board.view(), now=1000 + seconds), live=True)}}, raw=True)

def record(**options):
    board = finished(**options)
    display(static_bundle(board.view(), board.all_logs(200)), raw=True)
"""
LIVE = "board = StatusBoard()\nwith LiveBoard(board, get_ipython()):\n    play(board, speed={speed})"
PICTURES = {
    "running": "until(17.3, wait=0.63)",
    "starting": "until(2)",
    "gpu": "until(26, gpu=True, wait=0.03)",
    "64-nodes": "until(14, nodes=64)",
    "done": "record(epochs=8)",
    "failed": "record(fail='worker:1')",
    "long-output": "record(fail='chief:0', epochs=16)",
    "64-nodes-failed": "record(nodes=64, fail='worker:40')",
}


@pytest.fixture
def lab(tmp_path, chromium):
    with jupyterlab(tmp_path) as server, browser(server, chromium) as lab:
        yield lab
    with pytest.raises(OSError):
        urllib.request.urlopen(server.url, timeout=5)


def rows_used(text: str) -> int:
    """Return the first number of the column `rows used` of a board's text."""
    row = next(line for line in text.split("\n") if "chief:0" in line)
    return int(row.split("\t")[5].replace(",", ""))


def test_the_board_moves_while_the_cell_blocks_and_stays_as_a_record(lab):
    path = write_notebook(lab.server.root / "live.ipynb", [SETUP, LIVE.format(speed=5)])
    lab.open_notebook("live.ipynb")
    lab.run_cell(0)
    lab.start_cell(1)
    board = lab.output(1).locator(".tfos-board")
    board.get_by_text("epoch 2 of 5").wait_for(timeout=30_000)
    assert lab.cell(1).locator(".jp-InputPrompt").first.inner_text() == "[*]:"
    first = rows_used(board.inner_text())
    board.get_by_text("epoch 4 of 5").wait_for(timeout=30_000)
    assert rows_used(board.inner_text()) > first > 0
    assert "running" in board.inner_text()
    lab.wait_cell()
    board.get_by_text("done in").wait_for()
    assert lab.output(1).locator(".tfos-board").count() == 1

    lab.save()
    saved = nbformat.read(path, 4)
    (output,) = [one for one in saved.cells[1].outputs if one.data]  # the Stop button has left an empty one
    assert set(output.data) == {"text/html", "text/plain"}
    assert "widgets" not in saved.metadata


def test_the_stop_button_leaves_a_record_and_the_next_cell_works(lab):
    write_notebook(lab.server.root / "stop.ipynb", [SETUP, LIVE.format(speed=1), "6 * 7"])
    lab.open_notebook("stop.ipynb")
    lab.run_cell(0)
    lab.start_cell(1)
    board = lab.output(1).locator(".tfos-board")
    board.get_by_text("importing TensorFlow").first.wait_for(timeout=30_000)
    lab.interrupt()
    lab.wait_cell()
    board.get_by_text("stopped after").wait_for()
    lab.run_cell(2)
    assert "42" in lab.output(2).inner_text()


def gallery(lab) -> str:
    """Execute and save a notebook with every picture of the board in it, beside a copy that nobody trusts."""
    path = write_notebook(lab.server.root / "gallery.ipynb", [SETUP, *PICTURES.values()])
    lab.open_notebook(path.name)
    for index in range(1 + len(PICTURES)):
        lab.run_cell(index)
    lab.save()
    lab.shutdown_kernel()
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.source += "  # edited elsewhere"  # so that the server's signature does not fit
        cell.metadata.pop("trusted", None)
    nbformat.write(notebook, lab.server.root / "untrusted.ipynb")
    return path.name


def texts(lab) -> list[str]:
    return [lab.output(index).inner_text() for index in range(1, 1 + len(PICTURES))]


def shows_its_end(output) -> bool:
    """True if a node's output is longer than its window, and the window is at its last line."""
    return output.evaluate(
        """pre => {
            const [inner, outer] = [pre.getBoundingClientRect(), pre.parentElement.getBoundingClientRect()];
            return inner.height > outer.height && Math.abs(inner.bottom - outer.bottom) < 10;
        }"""
    )


def styles(locator, name: str) -> list[str]:
    """Return a computed style of all elements that the locator finds."""
    return locator.evaluate_all("(all, name) => all.map(one => getComputedStyle(one)[name])", name)


def test_the_record_is_there_when_the_notebook_is_opened_again_without_a_kernel(lab):
    lab.open_notebook(gallery(lab), kernel=False)
    assert lab.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session") is None
    assert "done in" in lab.output(5).inner_text()
    assert "failed after" in lab.output(6).inner_text()
    assert lab.output(6).locator("details[open] pre").inner_text().endswith("ValueError: <b>bad</b> shape & more")
    for theme in ("Light", "Dark"):
        lab.theme(f"JupyterLab {theme}")
        for index, name in enumerate(PICTURES, 1):
            lab.screenshot(f"board-{name}-{theme.lower()}", index)
        (page,) = styles(lab.page.locator(".jp-Notebook"), "backgroundColor")
        assert contrast(styles(lab.output(1).locator("td"), "color")[0], page) > 7
        assert contrast(styles(lab.output(1).locator("td span"), "color")[0], page) > 3  # a mark, WCAG 1.4.11
    trusted = texts(lab)
    assert shows_its_end(lab.output(7).locator("details[open] pre"))

    lab.open_notebook("untrusted.ipynb", kernel=False)
    assert lab.page.evaluate("() => jupyterapp.shell.currentWidget.content.model.cells.get(1).trusted") is False
    assert texts(lab) == trusted
    assert "rgb(220, 61, 69)" in styles(lab.output(6).locator("td span"), "color")
    assert set(styles(lab.output(6).locator("table"), "tableLayout")) == {"auto"}
    assert shows_its_end(lab.output(7).locator("details[open] pre"))
    lab.screenshot("board-failed-untrusted", 6)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two CSS colours after WCAG 2."""
    lights = sorted(map(luminance, (one, other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"[\d.]+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
