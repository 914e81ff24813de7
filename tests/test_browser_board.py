"""What people see: the board in a real JupyterLab in a real Chromium. Screenshots go to ``out/screenshots``."""

from __future__ import annotations

import re
import time
import urllib.request
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import nbformat
import pytest
from fake_run import finished
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
    "gpu": "until(26, gpu=True, wait=0.03, held=0.71)",
    "64-nodes": "until(14, nodes=64)",
    "done": "record(epochs=8)",
    "failed": "record(fail='worker:1')",
    "long-output": "record(fail='chief:0', epochs=16)",
    "64-nodes-failed": "record(nodes=64, fail='worker:40')",
    "8-nodes-gpu": "until(21, nodes=8, gpu=True)",
    "first-epoch": "until(8.3, epochs=3)",
}
THEMES = ("Light", "Dark")


@pytest.fixture
def lab(tmp_path, chromium):
    with jupyterlab(tmp_path) as server, browser(server, chromium) as lab:
        yield lab
    with pytest.raises(OSError):
        urllib.request.urlopen(server.url, timeout=5)


def rows_used(text: str) -> int:
    """Return the first number of the column `rows` of a board's text."""
    row = next(line for line in text.split("\n") if "chief:0" in line)
    return int(row.split("\t")[3].replace(",", ""))


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
    lab.page.set_viewport_size({"width": 1400, "height": 2000})  # axe judges only what is not covered
    lab.open_notebook(gallery(lab), kernel=False)
    assert lab.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session") is None
    assert "done in" in lab.output(5).inner_text()
    assert "failed after" in lab.output(6).inner_text()
    assert lab.output(6).locator("details[open] pre").inner_text().endswith("ValueError: <b>bad</b> shape & more")
    for theme in THEMES:
        lab.theme(f"JupyterLab {theme}")
        for index, name in enumerate(PICTURES, 1):
            lab.screenshot(f"board-{name}-{theme.lower()}", index)
            assert violations(lab, index) == [], (name, theme)
            assert overflow(lab.output(index)) <= 0, name
        muted = over(styles(lab.output(1).locator("th").first, "color")[0], notebook_colour(lab), 0.7)
        assert contrast(muted, notebook_colour(lab)) > 4.5  # axe does not look through what is transparent
        page = notebook_colour(lab)
        assert contrast(styles(lab.output(1).locator("td"), "color")[0], page) > 7
        assert contrast(styles(lab.output(1).locator("td span"), "color")[0], page) > 3  # a mark, WCAG 1.4.11
    lab.page.set_viewport_size({"width": 1200, "height": 2000})
    lab.execute("application:toggle-left-area")
    assert [overflow(lab.output(index)) for index in range(1, 1 + len(PICTURES))] == [0] * len(PICTURES)
    trusted = texts(lab)
    assert shows_its_end(lab.output(7).locator("details[open] pre"))

    lab.open_notebook("untrusted.ipynb", kernel=False)
    assert lab.page.evaluate("() => jupyterapp.shell.currentWidget.content.model.cells.get(1).trusted") is False
    assert texts(lab) == trusted
    assert all(map(is_loaded, lab.output(5).locator("img").all()))
    assert lab.output(5).locator("img").count() == 2
    assert len(lab.output(1).locator("caption div div div").all()) == 1  # the bar
    assert "4px" not in styles(lab.output(1).locator("caption div div div"), "width")
    assert "rgb(220, 61, 69)" in styles(lab.output(6).locator("td span"), "color")
    assert set(styles(lab.output(6).locator("table"), "tableLayout")) == {"auto"}
    assert shows_its_end(lab.output(7).locator("details[open] pre"))
    lab.screenshot("board-failed-untrusted", 6)


def violations(lab, index: int) -> list[str]:
    """Return what axe-core finds wrong with a cell's output."""
    if not lab.page.evaluate("() => 'axe' in window"):
        lab.page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text())
    found = lab.output(index).evaluate(
        """async area => {
            area.scrollIntoView({block: 'center'});
            // JupyterLab's body has no height and hides what overflows: axe would take all that is in it for invisible.
            document.documentElement.style.height = document.body.style.height = '100%';
            const results = await axe.run(area.querySelector('.tfos-board'));
            const told = each => [each.id, each.help, ...each.nodes.map(node => node.html.slice(0, 200))].join('; ');
            return {violations: results.violations.map(told), passed: results.passes.map(each => each.id)};
        }"""
    )
    assert "color-contrast" in found["passed"] or found["violations"]  # it has seen the text
    return list(found["violations"])


def overflow(output) -> float:
    """Return by how many pixels a board is wider than its cell."""
    return output.locator(".tfos-board").first.evaluate("board => board.scrollWidth - board.clientWidth")


def is_loaded(image) -> bool:
    """True if the browser has a picture to show."""
    return image.evaluate("async image => { await image.decode(); return image.naturalWidth > 0; }")


def test_a_foldable_opens_by_keyboard_and_its_output_can_be_scrolled_by_it(lab):
    write_notebook(lab.server.root / "keys.ipynb", [SETUP, "record(epochs=16)"])
    lab.open_notebook("keys.ipynb")
    lab.run_cell(0)
    lab.run_cell(1)
    summary = lab.output(1).locator("summary").first
    summary.focus()
    lab.page.keyboard.press("Enter")
    written = lab.output(1).locator("details[open] pre")
    written.wait_for()
    lab.page.keyboard.press("Tab")
    top = written.bounding_box()["y"]
    lab.page.keyboard.press("PageUp")
    lab.page.wait_for_function(
        "([before]) => document.querySelector('details[open] pre').getBoundingClientRect().y > before", arg=[top]
    )
    assert violations(lab, 1) == []


def test_a_live_board_takes_no_focus_and_passes_the_same_rules(lab):
    write_notebook(lab.server.root / "focus.ipynb", [SETUP, LIVE.format(speed=3), "'here'"])
    lab.open_notebook("focus.ipynb")
    lab.run_cell(0)
    lab.start_cell(1)
    board = lab.output(1).locator(".tfos-board")
    board.get_by_text("running").first.wait_for(timeout=30_000)
    lab.cell(2).locator(".cm-content").click()
    lab.page.keyboard.type("  # typed")
    board.locator("img").first.wait_for(timeout=30_000)
    before = rows_used(board.inner_text())
    assert violations(lab, 1) == []
    lab.page.keyboard.type(" while it is redrawn")
    deadline = time.monotonic() + 30
    while rows_used(board.inner_text()) <= before:  # the browser gets about one picture a second, the rules take less
        assert time.monotonic() < deadline
        lab.page.wait_for_timeout(50)
    assert lab.cell(2).locator(".cm-content").inner_text() == "'here'  # typed while it is redrawn"
    lab.wait_cell()


@contextmanager
def offline(browser_page, html: str):
    """Show a page of which every request fails, and yield the addresses that it asked for."""
    asked: list[str] = []

    def refuse(route) -> None:
        asked.append(route.request.url)
        route.abort()

    page = browser_page.context.browser.new_page()
    try:
        page.route(lambda url: not url.startswith("data:"), refuse)
        page.set_content(html, wait_until="load")
        yield page, asked
    finally:
        page.close()


def test_the_exported_record_asks_the_network_for_nothing(lab):
    from nbconvert import HTMLExporter

    from tfos_magic.widgets import static_bundle

    board = finished(fail="worker:1")
    bundle = static_bundle(board.view(), board.all_logs(200))
    cell = nbformat.v4.new_code_cell("run", outputs=[nbformat.v4.new_output("display_data", bundle)])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    # The full page of nbconvert's asks for MathJax and others by itself; this is the notebook alone.
    html, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    with offline(lab.page, html) as (page, asked):
        assert "failed after 20 s" in page.locator(".tfos-board").inner_text()
        assert [is_loaded(image) for image in page.locator("img").all()] == [True, True]
        assert asked == []


def notebook_colour(lab) -> str:
    (colour,) = styles(lab.page.locator(".jp-Notebook"), "backgroundColor")
    return colour


def over(colour: str, ground: str, share: float) -> str:
    """Return the colour that one seen through another has."""
    pairs = zip(
        *([float(value) for value in re.findall(r"[\d.]+", each)[:3]] for each in (colour, ground)), strict=True
    )
    return f"rgb({', '.join(str(round(front * share + back * (1 - share))) for front, back in pairs)})"


def contrast(one: str, other: str) -> float:
    """Return the contrast of two CSS colours after WCAG 2."""
    lights = sorted(map(luminance, (one, other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"[\d.]+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_notebook_7_shows_the_same_and_obeys_the_stop_button(lab):
    cells = [SETUP, LIVE.format(speed=1), "6 * 7", PICTURES["gpu"], PICTURES["done"]]
    write_notebook(lab.server.root / "seven.ipynb", cells)
    lab.open_in_notebook_7("seven.ipynb")
    lab.run_cell(0)
    lab.start_cell(1)
    board = lab.output(1).locator(".tfos-board")
    board.get_by_text("training").first.wait_for(timeout=30_000)
    lab.output(1).get_by_role("button", name="Stop").click()
    lab.wait_cell()
    board.get_by_text("stopped after").wait_for()
    for index in (2, 3, 4):
        lab.run_cell(index)
    assert "42" in lab.output(2).inner_text()
    assert "done in" in lab.output(4).inner_text()
    for theme in ("Light", "Dark"):
        lab.theme(f"JupyterLab {theme}")
        lab.screenshot(f"notebook-7-{theme.lower()}", 3)
        assert violations(lab, 3) == violations(lab, 4) == []
        assert overflow(lab.output(3)) <= 0


TWO_RUNS = """
%load_ext tfos_magic
runs = get_ipython().magics_manager.magics["line"]["tfos_status"].__self__._runs.runs
def begin(name, nodes):
    board = StatusBoard()
    work = lambda stop: play(board, nodes=nodes, speed=1.5)
    return runs.start(name, board, work, BackgroundBoard(board, get_ipython()))
one, two = begin("one", 2), begin("two", 3)
"""


def test_after_a_reload_both_boards_are_live_again_and_never_mixed(lab):
    write_notebook(lab.server.root / "two.ipynb", [SETUP, TWO_RUNS, "%tfos_status", "one.stop(); two.stop()"])
    lab.open_notebook("two.ipynb")
    lab.run_cell(0)
    lab.run_cell(1)
    lab.output(1).locator(".tfos-board").nth(1).get_by_text("running").first.wait_for(timeout=30_000)
    lab.open_notebook("two.ipynb")  # the same kernel
    lab.run_cell(2)
    boards = lab.output(2).locator(".tfos-board")
    assert boards.count() == 2
    for index, nodes in enumerate((2, 3)):
        board = boards.nth(index)
        board.get_by_text(re.compile("epoch [45] of 5")).wait_for(timeout=60_000)
        assert f"{nodes} nodes" in board.inner_text()
        assert len(re.findall(r"\b(?:chief|worker):\d", board.inner_text())) == nodes
    lab.run_cell(3)
    assert boards.get_by_text("done in").count() == 2
