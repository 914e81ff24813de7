"""The whole product as a person meets it: a real kernel, real Spark, real TensorFlow, and JupyterLab in Chromium."""

from __future__ import annotations

import os
import queue
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import KernelManager
from jupyterlab_fixture import browser, jupyterlab, write_notebook
from leftovers import processes_with

pytestmark = pytest.mark.slow

BODY = """
import keras
model = keras.Sequential([keras.layers.Dense(8, "relu"), keras.layers.Dense(2, "softmax")])
model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
ctx.distribute(model)
model.fit(ctx.dataset(), validation_data=ctx.dataset("validation"), epochs=args.epochs).history["accuracy"][-1]
"""
DATA = """
frame = spark.range(4000).selectExpr("array(float(id % 7), float(id % 3)) as x", "int(id % 7 > 3) as y")
test = frame.limit(500)
"""


@dataclass
class Reply:
    """What came of a cell."""

    status: str
    text: str = ""
    traceback: str = ""
    mimetypes: set[str] = field(default_factory=set)


class Notebook:
    """A kernel of one's own, driven cell by cell."""

    def __init__(self, folder: Path) -> None:
        self.manager = KernelManager()
        self.manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        env = {name: value for name, value in os.environ.items() if name != "PYSPARK_PYTHON"}
        self.manager.start_kernel(cwd=str(folder), env={**env, "IPYTHONDIR": str(folder / "ipython")})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=False)
        self.manager.cleanup_resources()

    def start(self, code: str) -> str:
        return str(self.client.execute(code))

    def finish(self, message: str, timeout_s: float = 180) -> Reply:
        reply, deadline = Reply("?"), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                event = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if event["parent_header"].get("msg_id") != message:
                continue
            content, kind = event["content"], event["msg_type"]
            if kind == "stream":
                reply.text += content["text"]
            elif kind in ("display_data", "update_display_data", "execute_result"):
                reply.text += content["data"].get("text/plain", "") + "\n"
                reply.mimetypes |= set(content["data"])
            elif kind == "error":
                reply.traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))
            elif kind == "status" and content["execution_state"] == "idle":
                reply.status = self._status(message)
                return reply
        raise TimeoutError(f"the cell did not end in {timeout_s} s; so far:\n{reply.text}")

    def _status(self, message: str) -> str:
        """Return how the cell ended; a kernel that was slow to start may still answer earlier questions."""
        while (answer := self.client.get_shell_msg(timeout=10))["parent_header"].get("msg_id") != message:
            pass
        return str(answer["content"]["status"])

    def run(self, code: str, timeout_s: float = 180) -> Reply:
        return self.finish(self.start(code), timeout_s)

    def wait_for(self, message: str, text: str, timeout_s: float = 60) -> None:
        """Wait until the running cell shows `text`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            event = self.client.get_iopub_msg(timeout=timeout_s)
            if event["parent_header"].get("msg_id") == message and text in str(event["content"]):
                return
        raise TimeoutError(f"{text!r} did not appear in {timeout_s} s")


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    notebook = Notebook(tmp_path)
    yield notebook
    notebook.close()


def nodes_alive() -> list[psutil.Process]:
    return processes_with("tfos_magic.node")


def test_a_persons_first_hour(notebook: Notebook) -> None:
    loaded = notebook.run("%load_ext tfos_magic")
    assert loaded.status == "ok"
    assert loaded.text.count("\n") == 1
    assert "namedtuple patch" in loaded.text

    # No session yet, and PYSPARK_PYTHON not set: the magic makes a local one that runs this very Python.
    first = notebook.run("%%tfos_train --executors 2 --out r\nimport sys\nsys.executable, ctx.task_index")
    assert first.status == "ok", first.traceback
    assert "local[3]" in first.text
    assert {"text/html", "text/plain"} <= first.mimetypes
    # Printed, not displayed: IPython folds what is wider than 80 columns, and the path may be long.
    assert notebook.run("print(r.values)").text.strip() == repr([(sys.executable, 0), (sys.executable, 0)])
    assert notebook.run("[name for name in dir() if 'tfos' in name.lower()]").text.strip() == "[]"

    # The session is there to stay, and has a SIGINT handler of the notebook's own.
    session = "from pyspark.sql import SparkSession; spark = SparkSession.getActiveSession()\nspark.range(7).count()"
    assert notebook.run(session).text.strip() == "7"
    assert notebook.run(DATA).status == "ok"

    # Typing mistakes cost one line and start nothing.
    typo = notebook.run("%%tfos_train --executers 2\n1")
    assert typo.status == "error"
    assert "did you mean" in typo.traceback.lower()
    unknown = notebook.run("%%tfos_train --executors 2 --data fram\nctx.dataset()")
    assert "frame" in unknown.traceback

    trained = notebook.run("%%tfos_train --executors 2 --data frame --validation test --epochs 3 --out r" + BODY)
    assert trained.status == "ok", trained.traceback
    assert notebook.run("sorted(r.history), len(r.history['loss'])").text.strip() == (
        "(['accuracy', 'loss', 'val_accuracy', 'val_loss'], 3)"
    )
    assert notebook.run("r.values[0] == r.values[1]").text.strip() == "True"

    # A mistake on the nodes is shown with this notebook's own line.
    wrong = notebook.run(
        "%%tfos_train --executors 2 --data frame\nfor batch in ctx.dataset(raw=True):\n    batch['nope']"
    )
    assert wrong.status == "error"
    assert re.search(r"Cell In\[\d+\], line 3", wrong.traceback)
    assert "KeyError" in wrong.traceback
    assert "site-packages" not in wrong.traceback

    # ■ stops the nodes; the next cell works.
    message = notebook.start("%%tfos_train --executors 2\nimport time\ntime.sleep(300)")
    notebook.wait_for(message, "running")
    began = time.monotonic()
    notebook.manager.interrupt_kernel()
    interrupted = notebook.finish(message)
    assert "KeyboardInterrupt" in interrupted.traceback
    assert time.monotonic() - began < 6
    assert not nodes_alive()
    after = notebook.run("%%tfos_train --executors 2 --out r\nctx.executor_id")
    assert after.status == "ok", after.traceback
    assert notebook.run("r.values, spark.range(3).count()").text.strip() == "([0, 1], 3)"

    # Everything is taken back.
    assert notebook.run("%unload_ext tfos_magic").status == "ok"
    assert "not found" in notebook.run("%tfos_train --help").text
    threads = "import threading\n[thread.name for thread in threading.enumerate() if 'tfos' in thread.name]"
    assert notebook.run(threads).text.strip() == "[]"
    assert notebook.run("spark.stop()").status == "ok"
    assert not nodes_alive()


@pytest.mark.browser
def test_a_training_run_watched_in_jupyterlab(tmp_path: Path, chromium: str) -> None:
    callback = "keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: time.sleep(0.6))"
    slow = "\nimport time" + BODY.replace("epochs=args.epochs)", f"epochs=args.epochs, callbacks=[{callback}])")
    cells = [
        "%load_ext tfos_magic",
        'from pyspark.sql import SparkSession\nspark = SparkSession.builder.master("local[3]").getOrCreate()\n' + DATA,
        "%%tfos_train --executors 2 --data frame --validation test --epochs 12 --out r" + slow,
        "%%tfos_train --executors 2\nraise ValueError('on purpose')",
        "spark.stop()",
    ]
    with jupyterlab(tmp_path) as server, browser(server, chromium) as lab:
        path = write_notebook(server.root / "training.ipynb", cells)
        lab.open_notebook("training.ipynb")
        for index in (0, 1):
            lab.run_cell(index, 120)
        lab.start_cell(2)
        board = lab.output(2).locator(".tfos-board").first
        board.get_by_text(re.compile(r"epoch [2-9] of 12")).first.wait_for(timeout=120_000)
        assert lab.cell(2).locator(".jp-InputPrompt").first.inner_text() == "[*]:"
        first = board.inner_text()
        lab.screenshot("end-to-end-running", 2)
        board.get_by_text(re.compile(r"epoch (10|11|12) of 12")).first.wait_for(timeout=120_000)
        assert board.inner_text() != first
        lab.wait_cell()
        board.get_by_text("done in").first.wait_for()
        lab.screenshot("end-to-end-done", 2)
        lab.run_cell(3, 120)
        assert "on purpose" in lab.output(3).inner_text()
        assert "Cell In[" in lab.output(3).inner_text()
        lab.screenshot("end-to-end-failed", 3)
        lab.run_cell(4, 60)
        lab.save()
        saved = nbformat.read(path, 4)
        assert "widgets" not in saved.metadata
        assert not any("widget" in mime for output in saved.cells[2].outputs for mime in output.get("data", {}))
        lab.shutdown_kernel()
        lab.open_notebook("training.ipynb", kernel=False)
        assert "done in" in lab.output(2).inner_text()
        assert "val_accuracy" in lab.output(2).inner_text() or "validation" in lab.output(2).inner_text()
        lab.screenshot("end-to-end-reopened", 2)
    assert not nodes_alive()
