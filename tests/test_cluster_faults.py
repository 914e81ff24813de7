"""What happens when processes die: on real executors, each a JVM of its own, and real signals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from leftovers import processes_with

pytestmark = pytest.mark.slow

HERE = os.path.dirname(__file__)
Script = Callable[..., "subprocess.CompletedProcess[str]"]

BEGIN = """
import os, signal, sys, threading, time
from pyspark.sql import SparkSession
from leftovers import processes_with
from runs import run_cell
from tfos_magic.errors import TfosError
from tfos_magic.status import NodeChanged, NodeState
spark = SparkSession.builder.getOrCreate()

def when_running(nodes, action):
    running = set()
    def note(event):
        if isinstance(event, NodeChanged) and event.state is NodeState.RUNNING:
            running.add(event.node)
            if len(running) == nodes:
                threading.Timer(0.3, action).start()
    return note

def ours():
    return processes_with("tfos_magic.node")
"""


@pytest.fixture
def script(spark_script: Script) -> Script:
    def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {"PYTHONPATH": HERE, **options.pop("env", {})}
        return spark_script(BEGIN + textwrap.dedent(code), env=env, **options)

    return run


def test_nodes_on_several_executors_use_the_shipped_package_and_are_fed(script: Script) -> None:
    done = script(
        """
        body = '''
        import os, tfos_magic
        feed = ctx.get_data_feed()
        rows = []
        while not feed.should_stop():
            rows += feed.next_batch(100)
        tfos_magic.__file__, rows
        '''
        import textwrap
        result = run_cell(spark, textwrap.dedent(body), 3, data={"train": spark.range(1000, numPartitions=5)})
        assert all(file.startswith("/proc/self/fd/") for file, _ in result.values), result.values
        assert sorted(row for _, rows in result.values for row in rows) == list(range(1000))
        again = run_cell(spark, "ctx.executor_id", 4)   # every slot: detached nodes
        assert again.values == [0, 1, 2, 3]
        assert not ours(), ours()
        print("all well")
        """,
        master="local-cluster[2,2,1024]",
    )
    assert "all well" in done.stdout


def test_executors_without_the_package_or_anything_else_run_a_node(script: Script) -> None:
    base = getattr(sys, "_base_executable", sys.executable)
    if subprocess.run([base, "-c", "import tfos_magic"], capture_output=True, cwd="/").returncode == 0:
        pytest.skip("the base interpreter has the package installed")
    done = script(
        """
        print("values", run_cell(spark, "import sys; sys.executable", 2).values)
        """,
        master="local-cluster[2,1,1024]",
        env={"PYSPARK_PYTHON": base, "PYSPARK_DRIVER_PYTHON": sys.executable},
    )
    assert "values" in done.stdout


@pytest.mark.parametrize("nodes", [3, 4])  # holding their slots, and detached; some on each executor
def test_a_lost_executor_is_named_at_once(script: Script, nodes: int) -> None:
    done = script(
        f"""
        def kill_one():
            # An executor is a JVM of its own; only those of this very cluster concern us.
            global killed_at
            killed_at = time.monotonic()
            processes_with("CoarseGrainedExecutorBackend")[0].kill()
        try:
            run_cell(spark, "import time; time.sleep(120)", {nodes}, on_event=when_running({nodes}, kill_one))
        except TfosError as error:
            print("took", time.monotonic() - killed_at)
            print(type(error).__name__, error)
            assert time.monotonic() - killed_at < 12
        assert not ours(), ours()
        """,
        master="local-cluster[2,2,1024]",
    )
    assert "NodeLostError" in done.stdout


def test_a_killed_agent_takes_its_child_with_it(script: Script) -> None:
    done = script(
        """
        def kill_agent():
            agents = [process for process in ours() if "node.agent" in " ".join(process.cmdline())]
            agents[0].kill()
        try:
            run_cell(spark, "import time; time.sleep(120)", 2, on_event=when_running(2, kill_agent))
        except TfosError as error:
            print(type(error).__name__)
        time.sleep(0.5)
        assert not ours(), ours()
        """
    )
    assert "NodeLostError" in done.stdout


@pytest.mark.parametrize("nodes", [2, 4])
def test_nothing_survives_the_death_of_the_driver(script: Script, nodes: int) -> None:
    done = script(
        f"""
        run_cell(spark, "import time; time.sleep(120)", {nodes},
                 on_event=when_running({nodes}, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        """,
        check=False,
    )
    assert done.returncode in (-9, 137)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and processes_with("tfos_magic.node"):
        time.sleep(0.1)
    assert not processes_with("tfos_magic.node")


def test_an_interrupt_stops_everything_and_the_next_run_works(script: Script) -> None:
    done = script(
        """
        for nodes in (2, 4):
            began = None
            def interrupt():
                global began
                began = time.monotonic()
                os.kill(os.getpid(), signal.SIGINT)
            try:
                run_cell(spark, "import time; time.sleep(120)", nodes, on_event=when_running(nodes, interrupt))
            except KeyboardInterrupt:
                print("interrupted", time.monotonic() - began)
                assert time.monotonic() - began < 5
            assert not ours(), ours()
            assert run_cell(spark, "ctx.executor_id", 2).values == [0, 1]
            assert spark.range(10).count() == 10
        print("all well", [thread.name for thread in threading.enumerate() if "tfos" in thread.name])
        """
    )
    assert "all well []" in done.stdout
    assert done.stdout.count("interrupted") == 2


SLOW_AGENT = """
import sys, time
if "node.agent" in sys.orig_argv[-1]:
    time.sleep(4)
"""


def test_an_interrupt_while_nodes_are_being_started_waits_for_their_end(script: Script, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_AGENT, encoding="utf-8")
    done = script(
        """
        def interrupt():
            while len(ours()) < 2:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a notebook: PySpark's own cancels all jobs
        for nodes in (2, 4):  # they hold their slots; they give them back
            threading.Thread(target=interrupt).start()
            try:
                run_cell(spark, "import time; time.sleep(120)", nodes)
            except KeyboardInterrupt:
                print("interrupted")
            assert not ours(), ours()
        print("all well")
        """,
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{HERE}"},
    )
    assert done.stdout.count("interrupted") == 2
    assert "all well" in done.stdout


def test_two_hosts_of_a_standalone_cluster(script: Script, standalone_cluster: Any) -> None:
    done = script(
        """
        body = "import os\\nfeed = ctx.get_data_feed()\\nos.environ.get('SPARK_LOCAL_IP'), len(feed.next_batch(10**6))"
        values = run_cell(spark, body, 3, data={"train": spark.range(999, numPartitions=4)}).values
        print("hosts", sorted({host for host, _ in values}), "rows", sum(rows for _, rows in values))
        """,
        master=standalone_cluster.master_url,
        conf={"spark.executor.memory": "1g"},
    )
    assert "hosts ['127.0.0.2', '127.0.0.3'] rows 999" in done.stdout


def test_another_python_minor_version_on_executors_is_named(script: Script) -> None:
    other = next(filter(None, map(_find_python, {10, 11, 12, 13} - {sys.version_info.minor})), None)
    if other is None:
        pytest.skip("no second Python on this machine")
    done = script(
        """
        began = time.monotonic()
        try:
            run_cell(spark, "1", 2)
        except TfosError as error:
            print(type(error).__name__, error)
        assert time.monotonic() - began < 60
        """,
        env={"PYSPARK_PYTHON": other},
    )
    assert "EnvironmentMismatchError" in done.stdout
    assert "spark.pyspark.python" in done.stdout


def test_a_driver_that_executors_cannot_reach_is_named_with_its_address(script: Script) -> None:
    done = script(
        """
        from tfos_magic import session
        session.driver_address = lambda context: ("127.0.0.1", "127.0.0.77")
        began = time.monotonic()
        try:
            run_cell(spark, "1", 2)
        except TfosError as error:
            print(type(error).__name__, error)
        assert time.monotonic() - began < 30
        assert not ours(), ours()
        """
    )
    assert "RendezvousError" in done.stdout
    assert "127.0.0.77" in done.stdout
    assert "spark.driver.host" in done.stdout


def test_tensorflow_missing_on_executors_is_an_environment_error(script: Script) -> None:
    base = getattr(sys, "_base_executable", sys.executable)
    if subprocess.run([base, "-c", "import tensorflow"], capture_output=True).returncode == 0:
        pytest.skip("the base interpreter has TensorFlow")
    done = script(
        """
        try:
            run_cell(spark, "1", 2, preload=("tensorflow",))
        except TfosError as error:
            print(type(error).__name__, error)
        """,
        env={"PYSPARK_PYTHON": base},
    )
    assert "EnvironmentMismatchError" in done.stdout
    assert "PYSPARK_PYTHON" in done.stdout


def _find_python(minor: int) -> str | None:
    name = f"python3.{minor}"
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    for path in (shutil.which(name), *map(str, pyenv.glob(f"versions/*/bin/{name}"))):
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


def test_pyarrow_missing_on_executors_is_an_environment_error(script: Script) -> None:
    base = getattr(sys, "_base_executable", sys.executable)
    if subprocess.run([base, "-c", "import pyarrow"], capture_output=True).returncode == 0:
        pytest.skip("the base interpreter has pyarrow")
    done = script(
        """
        try:
            run_cell(spark, "len(ctx.get_data_feed().next_batch(5))", 2, data={"train": spark.range(10)})
        except TfosError as error:
            print(type(error).__name__, error)
        assert not ours(), ours()
        """,
        env={"PYSPARK_PYTHON": base},
    )
    assert "EnvironmentMismatchError" in done.stdout
    assert "'pyarrow'" in done.stdout
    assert "PYSPARK_PYTHON" in done.stdout
