"""The whole way – notebook, cluster, feed, Keras – with the oldest versions that are supported."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.oldest]

HERE = os.path.dirname(__file__)
ROOT = os.path.dirname(HERE)
Old = Callable[..., dict[str, Any]]

BEGIN = """
import json, os, textwrap, time
import leftovers, psutil
from runs import run_cell

found = {}

def cell(text):
    return textwrap.dedent(text).strip()

def nodes_alive():
    mine = os.environ[leftovers.MARK]
    found = psutil.process_iter(["cmdline", "environ"])
    lines = [each.info["cmdline"] for each in found if (each.info["environ"] or {}).get(leftovers.MARK) == mine]
    return [line for line in lines if any("tfos_magic.node" in part for part in line)]

"""
END = """
assert not nodes_alive(), nodes_alive()
print("FOUND", json.dumps(found))
spark.stop()
"""


@pytest.fixture
def old(spark_script: Callable[..., subprocess.CompletedProcess[str]], oldest_python: Path) -> Old:
    """Return a function that runs a script with the oldest versions, and returns what it has put into ``found``."""

    def run(code: str, *, has_session: bool = True) -> dict[str, Any]:
        session = "from pyspark.sql import SparkSession\nspark = SparkSession.builder.getOrCreate()\n" * has_session
        done = spark_script(
            BEGIN + session + textwrap.dedent(code) + END,
            python=oldest_python,
            env={"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"},
        )
        line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
        assert line is not None, f"{done.stdout}\n{done.stderr}"
        found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
        return found

    return run


def test_these_are_the_oldest_versions(old: Old) -> None:
    # What the others here are worth hangs on it. Newer Pythons have newer "oldest" versions.
    found = old(
        """
        import platform
        import importlib.metadata as metadata
        found = {name: metadata.version(name) for name in ("pyspark", "tensorflow", "keras", "pyarrow", "ipython")}
        found["python"] = platform.python_version()
        """
    )
    assert found["pyspark"].startswith("3.5.")
    assert found["ipython"] == "8.18.1"
    if found["python"].startswith(("3.10.", "3.11.", "3.12.")):
        assert (found["tensorflow"][:5], found["keras"][:4], found["pyarrow"][:3]) == ("2.16.", "3.3.", "15.")


def test_values_errors_and_a_dataframe(old: Old) -> None:
    found = old(
        """
        from tfos_magic.errors import NodeError, NodeKilledError

        found["values"] = run_cell(spark, "ctx.job_name, ctx.task_index, ctx.num_nodes", 2).values

        def failure(kind, body, nodes):
            began = time.monotonic()
            try:
                run_cell(spark, cell(body), nodes)
            except kind as error:
                return {"text": str(error), "node": error.node, "took_s": time.monotonic() - began}
            return None

        found["raised"] = failure(NodeError, '''
            import time
            def inner(table):
                return table['boom']
            if ctx.executor_id == 1:
                print('about to fail')
                inner({})
            time.sleep(60)
        ''', 2)
        found["killed"] = failure(NodeKilledError, '''
            import os, time
            print('last words')
            if ctx.executor_id == 1:
                os.kill(os.getpid(), 9)
            time.sleep(60)
        ''', 2)

        rows = spark.range(1000, numPartitions=7)
        rows = rows.selectExpr("id", "cast(id as string) as text", "array(id, id) as pair")
        drain = '''
            feed = ctx.get_data_feed()
            rows = []
            while not feed.should_stop():
                rows += feed.next_batch(64)
            rows
        '''
        values = run_cell(spark, cell(drain), 3, data={"train": rows}).values
        found["rows"] = sorted((row[0], str(row[1]), [int(x) for x in row[2]]) for value in values for row in value)
        found["shares"] = [len(value) for value in values]
        """
    )
    assert found["values"] == [["chief", 0, 2], ["worker", 0, 2]]
    assert found["raised"]["node"] == "worker:0"
    assert "Cell In[1], line 7, in" in found["raised"]["text"]
    assert "Cell In[1], line 4, in inner" in found["raised"]["text"]
    assert "return table['boom']" in found["raised"]["text"]
    assert "about to fail" in found["raised"]["text"]
    assert found["killed"]["node"] == "worker:0"
    assert "was killed by signal 9 (SIGKILL)" in found["killed"]["text"]
    assert "last words" in found["killed"]["text"]
    assert max(found["raised"]["took_s"], found["killed"]["took_s"]) < 20
    assert found["rows"] == [[number, str(number), [number, number]] for number in range(1000)]
    assert max(found["shares"]) - min(found["shares"]) <= 7


def test_keras_fit_over_two_nodes(old: Old) -> None:
    found = old(
        """
        frame = spark.range(1200, numPartitions=5).selectExpr(
            "cast(array(sin(id), cos(id), sin(3 * id)) as array<float>) as x", "cast(sin(id) > cos(id) as int) as label"
        )
        body = '''
            import hashlib
            import keras
            keras.utils.set_random_seed(ctx.executor_id)
            model = keras.Sequential([keras.layers.Dense(16, "relu"), keras.layers.Dense(2, "softmax")])
            model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy", metrics=["accuracy"])
            ctx.distribute(model)
            fit = model.fit(ctx.dataset(), validation_data=ctx.dataset("validation"), epochs=args.epochs)
            weights = hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()
            weights, {name: [float(x) for x in values] for name, values in fit.history.items()}
        '''
        result = run_cell(
            spark, cell(body), 2, data={"train": frame, "validation": frame.limit(201)}, epochs=5, batch_size=32,
            preload=("tensorflow",), timeout_s=120.0,
        )
        (found["one"], found["history"]), (found["other"], found["others_history"]) = result.values
        found["reported"] = result.history
        found["logs"] = result.logs["worker:0"]
        """
    )
    assert found["one"] == found["other"]
    history = found["history"]
    assert history == found["others_history"]
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert history["accuracy"][-1] > max(0.9, history["accuracy"][0])
    assert history["val_accuracy"][-1] > 0.9
    assert found["reported"]["accuracy"] == pytest.approx(history["accuracy"])
    assert found["logs"] == []  # the chief alone prints, and TensorFlow says nothing that means nothing


def test_the_magics_in_ipython(old: Old) -> None:
    found = old(
        """
        from pyspark.sql import SparkSession
        from shell_fixture import running_shell

        with running_shell() as shell:
            found["loaded"] = shell.output_of("%load_ext tfos_magic").text
            shell.cell("scale = 3")
            train = "%%tfos_train --executors 2"
            body = "print(ctx.job_name)\\nscale * ctx.executor_id"
            found["ran"] = shell.output_of(f"{train} --out r\\n{body}").text
            spark = SparkSession.getActiveSession()
            found["values"] = shell.cell("r.values")
            found["shown"] = repr(shell.cell("r"))
            failed = shell.error_of(f"{train}\\nif ctx.executor_id == 1:\\n    dict()['boom']\\n")
            found["error"], found["text"] = type(failed.error).__name__, str(failed.error) + failed.text
            found["help"] = shell.output_of("%%tfos_train --help").text
            found["completions"] = shell.completions("%%tfos_train --exec")
            shell.cell("%unload_ext tfos_magic")
            found["unloaded"] = shell.find_cell_magic("tfos_train") is None
            found["matchers"] = len(shell.Completer.custom_matchers)
        """,
        has_session=False,
    )
    assert "TensorFlow 2." in found["loaded"]
    assert "starting a local one with 3 slots" in found["ran"]
    assert found["values"] == [0, 3]
    assert "values [0, 3]" in found["shown"]
    assert found["error"] == "NodeError"
    assert "line 3" in found["text"]
    assert "KeyError" in found["text"]
    assert "--executors" in found["help"]
    assert found["completions"] == ["--executors"]
    assert found["unloaded"]
    assert found["matchers"] == 0


def test_a_tfcluster_feeds_asks_and_shows_tensorboard(old: Old) -> None:
    found = old(
        """
        import urllib.request
        from tfos_magic import TFCluster

        def total(args, ctx):
            feed, seen = ctx.get_data_feed(), 0
            while not feed.should_stop():
                seen += sum(row[1] for row in feed.next_batch(64))
            return seen

        def negative(args, ctx):
            feed = ctx.get_data_feed(train_mode=False)
            while not feed.should_stop():
                feed.batch_results([-row for row in feed.next_batch(64)])

        sc, mode = spark.sparkContext, TFCluster.InputMode.SPARK
        with TFCluster.run(sc, total, None, 2, input_mode=mode, tensorboard=True) as cluster:
            cluster.train(sc.parallelize([("a", n) for n in range(1000)], 5), 2)
            cluster.train(spark.range(100).selectExpr("'b' as a", "id"), 1)
            url = cluster.tensorboard_url()
            found["page"] = urllib.request.urlopen(url, timeout=20).read().decode()[:5000]
        found["total"] = sum(cluster.result.values)
        with TFCluster.run(sc, negative, None, 2, input_mode=mode) as cluster:
            found["same"] = cluster.inference(sc.parallelize(range(100), 3)).collect() == [-n for n in range(100)]
        """
    )
    assert found["total"] == 2 * sum(range(1000)) + sum(range(100))
    assert found["same"]
    assert "TensorBoard" in found["page"]


def test_a_model_trained_without_distribute_is_named(old: Old) -> None:
    found = old(
        """
        result = run_cell(spark, cell('''
            import keras, numpy as np
            model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="lonely")
            model.compile("sgd", "mse")
            model.fit(np.zeros((4, 2)), np.zeros(4), verbose=0)
            int(model.optimizer.iterations.numpy())
        '''), 2, preload=("tensorflow",))
        found["values"] = result.values
        found["warned"] = ["lonely was trained on" in "".join(lines) for lines in result.logs.values()]
        """
    )
    assert found["values"] == [1, 1]
    assert found["warned"] == [True, True]


def test_a_child_is_killed_and_the_fit_resumed(old: Old, tmp_path: Path) -> None:
    found = old(
        f"""
        from resume_cell import assert_same, train
        whole = train(spark, "{tmp_path}/whole")
        killed = train(spark, "{tmp_path}/killed", kills=[(1, 19)], max_restarts=1)
        assert_same(killed, whole)
        found["attempts"] = [value["attempt"] for value in killed.values]
        """
    )
    assert found["attempts"] == [1, 1]
