"""A real JupyterLab, and a real Notebook 7, in a real Chromium, for tests that look at what people see.

    with jupyterlab(folder) as server, browser(server, chromium) as lab:
        lab.open_notebook("a.ipynb")
        lab.run_cell(0)
        lab.output(0).inner_text()

Server, kernels and browser live in temporary folders of their own and are gone after the block.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
SCREENSHOTS = REPOSITORY / "out" / "screenshots"
_BROWSER_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_START_S = 90
_SETTINGS = {
    # Nothing may ask the network, and every cell stays in the DOM.
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',
}


@dataclass(frozen=True)
class LabServer:
    url: str
    token: str
    root: Path


@contextmanager
def jupyterlab(folder: Path, *, env: dict[str, str] | None = None) -> Iterator[LabServer]:
    """Run a JupyterLab server on ``folder/notebooks``, with a token, and end it with all its kernels."""
    root = folder / "notebooks"
    root.mkdir(parents=True, exist_ok=True)
    for name, text in _SETTINGS.items():
        setting = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        setting.parent.mkdir(parents=True, exist_ok=True)
        setting.write_text(text)
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += ["--ServerApp.port=0", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    command += ["--JupyterNotebookApp.expose_app_in_browser=True"]  # Notebook 7 comes from the same server
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    process = subprocess.Popen(
        command,
        env=_environment(folder, token) | (env or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    reader = _LogReader(process)
    try:
        yield LabServer(reader.wait_for_url(), token, root)
    finally:
        _end(process)
        reader.close()


def _environment(folder: Path, token: str) -> dict[str, str]:
    own = {
        name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "HOME")
    }
    for path in own.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        **own,
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_TOKEN": token,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
    }


class _LogReader:
    """Reads the server's log to its end, so that the server never blocks, and finds its address in it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: list[str] = []
        self._url = ""
        self._found = threading.Event()
        self._thread = threading.Thread(target=self._read, name="jupyterlab-log")
        self._thread.start()

    def wait_for_url(self) -> str:
        self._found.wait(_START_S)
        if not self._url:
            raise RuntimeError("JupyterLab did not start:\n" + "".join(self._lines[-40:]))
        return self._url

    def close(self) -> None:
        self._thread.join(10)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            match = re.search(r"(http://127\.0\.0\.1:\d+)/lab\?token=", line)
            if match and not self._url:
                self._url = match[1]
                self._found.set()
        self._found.set()


def _end(process: subprocess.Popen[str]) -> None:
    """End the server; it shuts its kernels down. What is left of them after that is killed."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    for straggler in alive:
        straggler.kill()
    psutil.wait_procs(alive, timeout=5)


@contextmanager
def browser(server: LabServer, chromium: str, *, width: int = 1400, height: int = 900) -> Iterator[Lab]:
    """Open the Chromium at the path `chromium` with one page in it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium, args=_BROWSER_ARGS)
        try:
            yield Lab(server, window.new_page(viewport={"width": width, "height": height}))
        finally:
            window.close()


class Lab:
    """What a person does in JupyterLab; ``page`` is Playwright's page for everything else."""

    def __init__(self, server: LabServer, page: Any) -> None:
        self.server = server
        self.page = page

    def open_notebook(self, path: str, *, kernel: bool = True) -> None:
        """Open a notebook of the server's root in a fresh JupyterLab.

        With `kernel` wait until one is ready; without, none is started (one that runs for this notebook is taken).
        """
        tree = f"/tree/{path}" if kernel else ""
        self.page.goto(f"{self.server.url}/lab{tree}?reset&token={self.server.token}")
        self.page.wait_for_function("() => window.jupyterapp && jupyterapp.shell", timeout=60_000)
        self.page.evaluate("() => jupyterapp.restored")
        if not kernel:
            self.execute("docmanager:open", path=path, kernelPreference={"shouldStart": False, "canStart": False})
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.page.evaluate("() => jupyterapp.shell.currentWidget.context.ready")
        if kernel:
            self._wait_for_kernel()

    def open_in_notebook_7(self, path: str) -> None:
        """Open a notebook in Notebook 7; wait until its kernel is ready."""
        self.page.goto(f"{self.server.url}/notebooks/{path}?token={self.server.token}")
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext", timeout=60_000)
        self._wait_for_kernel()

    def _wait_for_kernel(self) -> None:
        self.page.evaluate("async () => { await jupyterapp.shell.currentWidget.sessionContext.ready; }")
        self.page.wait_for_function(
            "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=60_000,
        )

    def execute(self, command: str, **args: Any) -> None:
        """Run one of JupyterLab's commands to its end."""
        self.page.evaluate(
            "async ([name, args]) => { await jupyterapp.commands.execute(name, args); }", [command, args]
        )

    def start_cell(self, index: int) -> None:
        """Run a cell, without waiting for it."""
        self.page.evaluate(
            """index => {
                const panel = jupyterapp.shell.currentWidget;
                panel.content.activeCellIndex = index;
                window.tfosTestRun = jupyterapp.commands.execute('notebook:run-cell');
            }""",
            index,
        )

    def wait_cell(self, timeout_s: float = 120) -> None:
        """Wait until the cell started last has run; TimeoutError after `timeout_s`."""
        is_over = self.page.evaluate(
            """timeout_ms => Promise.race([
                window.tfosTestRun.then(() => true),
                new Promise(resolve => setTimeout(() => resolve(false), timeout_ms)),
            ])""",
            timeout_s * 1000,
        )
        if not is_over:
            raise TimeoutError(f"the cell still runs after {timeout_s:.0f} s")

    def run_cell(self, index: int, timeout_s: float = 120) -> None:
        """Run a cell to its end."""
        self.start_cell(index)
        self.wait_cell(timeout_s)

    def interrupt(self) -> None:
        """Press ■."""
        self.page.evaluate(
            "async () => { await jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt(); }"
        )

    def cell(self, index: int) -> Any:
        """Return the locator of a cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def output(self, index: int) -> Any:
        """Return the locator of a cell's output area."""
        return self.cell(index).locator(".jp-Cell-outputArea")

    def save(self) -> None:
        """Save the notebook."""
        self.execute("docmanager:save")

    def shutdown_kernel(self) -> None:
        """End the kernel and leave the notebook open, as the menu does."""
        self.page.evaluate("async () => { await jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")

    def theme(self, name: str) -> None:
        """Switch the theme, e.g. ``JupyterLab Dark``."""
        self.execute("apputils:change-theme", theme=name)
        is_light = "false" if "Dark" in name else "true"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{is_light}']", state="attached")
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")

    def screenshot(self, name: str, index: int | None = None) -> Path:
        """Save a picture of the page, or of one cell, under ``out/screenshots`` and return its path."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        target = self.page if index is None else self.cell(index)
        path.write_bytes(target.screenshot())  # Playwright would write it from threads that stay
        return path


def write_notebook(path: Path, cells: Sequence[str]) -> Path:
    """Write a notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path
