"""The check for leftovers finds them, and the clusters of conftest.py are what they say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import leftovers
import psutil
import pytest
from conftest import LOCAL_CLUSTER

ORPHAN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid)
child.returncode = 0  # no warning: it is left on purpose
"""


@pytest.fixture
def place() -> Path:
    return Path(tempfile.gettempdir())


def test_an_orphan_in_a_session_of_its_own_is_found_and_ended(place: Path) -> None:
    before = leftovers.Snapshot.take(place)
    started = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=True)
    orphan = psutil.Process(int(started.stdout))
    (line,) = before.leftovers(place, grace_s=0)
    assert line.startswith(f"process {orphan.pid} ") and "time.sleep(100)" in line
    leftovers.kill_new(before)
    orphan.wait(10)
    assert before.leftovers(place, grace_s=0) == []


def test_a_child_that_nobody_waited_for_is_found(place: Path) -> None:
    before = leftovers.Snapshot.take(place)
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert ["a zombie" in line for line in before.leftovers(place, grace_s=0)] == [True]


def test_a_thread_a_port_a_file_and_a_variable_are_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = leftovers.Snapshot.take(place)
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="left over")
    thread.start()
    monkeypatch.setenv("LEFT_OVER", "1")
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile(prefix="left-") as file:
        found = before.leftovers(place, grace_s=0)
        port = server.getsockname()[1]
    go.set()
    thread.join()
    assert [line.split()[0] for line in found] == ["thread", "listening", "file", "environment"]
    assert "left over" in found[0] and found[1] == f"listening on 127.0.0.1:{port}" and file.name in found[2]
    assert found[3] == "environment variable LEFT_OVER: None became '1'"


def test_what_ends_within_the_grace_is_not_left(place: Path) -> None:
    before = leftovers.Snapshot.take(place)
    thread = threading.Timer(0.2, lambda: None)
    thread.start()
    assert before.leftovers(place, grace_s=10) == []


WHERE = """
    import os
    from pyspark.sql import SparkSession
    sc = SparkSession.builder.getOrCreate().sparkContext
    pairs = sc.parallelize(range(4), 4).barrier().mapPartitions(
        lambda rows: [(os.environ["SPARK_LOCAL_IP"], os.getcwd())]  # each executor has a directory of its own
    ).collect()
    print(sc.master, sorted(set(pairs)))
"""


@pytest.mark.slow
def test_a_script_runs_on_a_local_cluster_of_two_executors(spark_script: Callable[..., Any]) -> None:
    done = spark_script(WHERE, master=LOCAL_CLUSTER)
    assert done.stdout.startswith(LOCAL_CLUSTER) and done.stdout.count("('") == 2


@pytest.mark.slow
def test_a_script_runs_on_two_workers_of_a_standalone_cluster(
    spark_script: Callable[..., Any], standalone_cluster: Any
) -> None:
    done = spark_script(WHERE, master=standalone_cluster.master_url)
    assert all(f"('{host}'" in done.stdout for host in standalone_cluster.hosts)


@pytest.mark.slow
def test_a_script_that_hangs_fails_with_its_stacks(spark_script: Callable[..., Any]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)still running after 3 s.*in waits_for_ever"):
        spark_script("import time\ndef waits_for_ever():\n    time.sleep(60)\nwaits_for_ever()", timeout_s=3)
