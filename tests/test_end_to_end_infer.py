"""Inference as a person meets it: a real kernel, real Spark, real nodes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_end_to_end import Notebook, nodes_alive

pytestmark = pytest.mark.slow

START = """
import os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.sql import SparkSession, functions as F
spark = SparkSession.builder.master("local[3]").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
df = spark.range(1000, numPartitions=5).withColumn("x", F.array(F.col("id") * 1.0, F.col("id") * 2.0))
"""
PREDICT = """
import os, time
import numpy as np
open(os.path.join(loads, f"{ctx.task_index}-{time.time()}"), "x").close()   # the model is loaded here
weights = np.array([1.0, 10.0])

def predict(batch):
    return {"score": batch["x"] @ weights}
"""
IN_ORDER = "rows = preds.collect()\n[r.id for r in rows] == list(range(1000)), all(r.score == 21 * r.id for r in rows)"


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    notebook = Notebook(tmp_path)
    yield notebook
    notebook.close()


def value_of(notebook: Notebook, code: str) -> str:
    reply = notebook.run(code)
    assert reply.status == "ok", reply
    return reply.text.strip()


def ran(notebook: Notebook, code: str) -> str:
    """Run an inference cell that must succeed; return its text."""
    reply = notebook.run(code)
    assert reply.status == "ok", reply
    return reply.text


def wait_until_gone(timeout_s: float = 3) -> None:
    deadline = time.monotonic() + timeout_s
    while nodes_alive():
        assert time.monotonic() < deadline, nodes_alive()
        time.sleep(0.1)


def test_predictions_in_a_notebook(notebook: Notebook, tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.mkdir()
    ran(notebook, "%load_ext tfos_magic")
    ran(notebook, START + f"loads = {str(loads)!r}")

    # A cell that cannot predict costs a line and starts nothing.
    useless = notebook.run("%%tfos_infer -n 2 --data df --out preds\nmodel = 5\nimport os")
    assert re.search(r"UsageError: Cell In\[\d+\], line 3: the cell ends with an import", useless.traceback)
    assert not nodes_alive()

    # Lazy: every row once, in order, however often it is computed; the model is loaded once per node.
    said = ran(notebook, "%%tfos_infer --executors 2 --data df --out preds --batch-size 64 --keep id" + PREDICT)
    assert "ready after" in said
    assert said.endswith("preds is ready: 2 nodes wait for questions; %tfos_stop preds ends them.\n")
    assert value_of(notebook, "preds.columns, preds.count()") == "(['id', 'score'], 1000)"
    assert value_of(notebook, IN_ORDER) == "(True, True)"
    assert value_of(notebook, "preds.filter('score >= 20790').select('id').collect()[0].id") == "990"
    assert sorted(path.name[0] for path in loads.iterdir()) == ["0", "1"]
    standing = len(nodes_alive())
    assert standing >= 2

    # The same name again: the slots of the old nodes are the new nodes' slots.
    ran(notebook, "%%tfos_infer -n 2 --data df --out preds --schema 'score double' --quiet" + PREDICT)
    assert len(nodes_alive()) == standing
    assert value_of(notebook, IN_ORDER) == "(True, True)"
    assert len(list(loads.iterdir())) == 4

    # Stopped: the frame says so, and nothing else is there to stop.
    assert value_of(notebook, "%tfos_stop preds") == "preds: 2 nodes stopped."
    wait_until_gone()
    assert value_of(notebook, "%tfos_stop") == "Nothing to stop: nothing runs, and no nodes wait for questions."
    assert "The nodes that were to answer do not" in notebook.run("preds.collect()").traceback

    # A function of the notebook, computed and written at once.
    ran(notebook, "factor = 3\ndef triple(batch):\n    return batch['id'] * factor")
    said = ran(notebook, "%tfos_infer triple -n 2 --data df --out saved --save out.parquet")
    assert "done in" in said
    assert said.endswith("saved is saved, and read from out.parquet; the nodes have ended.\n")
    wait_until_gone()
    assert value_of(notebook, "saved.columns, saved.filter('prediction = 3 * id').count()") == (
        "(['id', 'x', 'prediction'], 1000)"
    )
    again = notebook.run("%tfos_infer triple -n 2 --data df --out saved --save out.parquet")
    assert "already exists" in again.traceback
    wait_until_gone()
    ran(notebook, "%tfos_infer triple -n 2 --data df --out saved --save out.parquet --mode overwrite")
    assert value_of(notebook, "saved.count()") == "1000"


def test_what_goes_wrong_is_shown_with_the_cell_s_lines_and_leaves_nothing(notebook: Notebook) -> None:
    ran(notebook, "%load_ext tfos_magic")
    ran(notebook, START)

    # While the nodes load.
    wrong = notebook.run("%%tfos_infer -n 2 --data df --out preds\nx = 1\nweights = {}['w']\nlambda batch: batch")
    assert re.search(r"Cell In\[\d+\], line 3", wrong.traceback)
    assert "KeyError: 'w'" in wrong.traceback
    assert "site-packages" not in wrong.traceback
    wait_until_gone()
    useless = notebook.run("%%tfos_infer -n 2 --data df --out preds\nprint('hello')")
    assert "The cell's last value is of type NoneType" in useless.traceback
    wait_until_gone()

    # In an action of the user's: Spark's own error, and the node's beside it.
    ran(
        notebook,
        "%%tfos_infer -n 2 --data df --out preds\n"
        "def predict(batch):\n    if 500 in batch['id']:\n        raise ValueError('no 500')\n    return batch['id']",
    )
    action = notebook.run("preds.collect()")
    assert action.status == "error"
    wait_until_gone()
    watching = "next((t.join() for t in threading.enumerate() if t.name == 'tfos_magic watch'), None)"
    later = notebook.run(f"import threading\n{watching}").text  # it may say what it knows in the next cell only
    assert re.search(r"Cell In\[\d+\], line 4, in predict\n.*\nValueError: no 500", action.text + later)
    assert value_of(notebook, "%tfos_stop") == "Nothing to stop: nothing runs, and no nodes wait for questions."

    # ■ while the nodes load, and --timeout.
    slow = "%%tfos_infer -n 2 --data df --out preds{}\nimport time\ntime.sleep(300)\nlambda batch: batch['id']"
    message = notebook.start(slow.format(""))
    notebook.wait_for(message, "running")
    notebook.manager.interrupt_kernel()
    assert "KeyboardInterrupt" in notebook.finish(message).traceback
    wait_until_gone()
    late = notebook.run(slow.format(" --timeout 8"))
    assert "The timeout of 8 s was not enough to load the model." in late.traceback
    wait_until_gone()

    # What is open when the extension goes, goes with it.
    ran(notebook, "%%tfos_infer -n 1 --data df --out one\nlambda batch: batch['id']")
    ran(notebook, "%%tfos_infer -n 1 --data df --out other --timeout 60\nlambda batch: batch['id']")
    assert value_of(notebook, "len(one.collect()), len(other.collect())") == "(1000, 1000)"
    ran(notebook, "%unload_ext tfos_magic")
    wait_until_gone()
    threads = "import threading\n[thread.name for thread in threading.enumerate() if 'tfos' in thread.name]"
    assert value_of(notebook, threads) == "[]"
    assert value_of(notebook, "spark.range(3).count()") == "3"


def test_a_keras_model_predicts_from_a_file_and_by_name_and_ends_with_the_kernel(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path)
    try:
        ran(notebook, "%load_ext tfos_magic")
        ran(notebook, START)
        ran(
            notebook,
            "import keras\nmodel = keras.Sequential("
            "[keras.Input((2,)), keras.layers.Dense(1, kernel_initializer='ones', use_bias=False)])\n"
            "path = os.path.abspath('model.keras'); model.save(path)",
        )
        ran(
            notebook,
            "%%tfos_infer -n 1 --data df --out preds --args {'path': path}\n"
            "import keras\nmodel = keras.models.load_model(args.path)\n\n"
            "def predict(batch):\n    return {'score': model.predict_on_batch(batch['x'])[:, 0]}",
        )
        right = ".filter('abs({} - 3 * id) < 0.01').count()"
        assert value_of(notebook, "preds" + right.format("score")) == "1000"
        ran(notebook, "%tfos_infer model -n 1 --data df --out named --features x --keep id")
        assert value_of(notebook, "named" + right.format("prediction[0]")) == "1000"
        ran(
            notebook,
            "class Twice(keras.layers.Layer):\n    def call(self, x): return 2 * x\n"
            "own = keras.Sequential([keras.Input((2,)), Twice()])",
        )
        refused = notebook.run("%tfos_infer own -n 1 --data df --out refused")
        assert "and Twice is the notebook's own." in refused.traceback
        assert nodes_alive()
    finally:
        notebook.close()
    wait_until_gone(20)
