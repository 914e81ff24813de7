"""The output of real nodes: a flood of it, and Keras's progress bars."""

from __future__ import annotations

import gc
import re
import textwrap
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import FILENAME, LABEL, pack_cell, run_cell
from shell_fixture import running_shell
from test_background import DrivenServices, Watched

from tfos_magic import cluster, magics
from tfos_magic.background import Runs
from tfos_magic.errors import NodeError
from tfos_magic.result import RunResult
from tfos_magic.status import Event, NodeBeat, NodeLogged, StatusBoard

MIB = 1 << 20


class Recorded:
    """A real run in the record of a notebook that is not there, and when its nodes' heartbeats came."""

    def __init__(self, spark: Any, body: str, nodes: int = 2) -> None:
        self.board, self.runs = StatusBoard(), Runs()
        self.beats: dict[str, list[float]] = {}
        options = cluster.RunOptions(num_nodes=nodes)
        more: dict[str, Any] = {"on_event": self._note, "board": self.board, "cell_names": {FILENAME: LABEL}}
        payload = pack_cell(textwrap.dedent(body), {}, {})
        work = lambda stop: cluster.run(spark, payload, options, stop=stop, **more)  # noqa: E731
        self.run = self.runs.start("r", self.board, work, Watched())

    def _note(self, event: Event) -> None:
        if isinstance(event, NodeBeat):
            self.beats.setdefault(event.node, []).append(event.at)

    def close(self) -> None:
        self.run.stop()
        self.runs.close()


@pytest.fixture
def recorded(spark_local4: Any) -> Iterator[list[Recorded]]:
    made: list[Recorded] = []
    yield made
    for each in made:
        each.close()
    assert not any(files(each) for each in made)


def files(each: Recorded) -> list[Path]:
    return [path for path in each.run.log_files.values() if path.exists()]


FLOOD = """
for number in range(1_000_000):
    print("line", number)
if not ctx.is_chief:
    print("the last word", end="")
    raise ValueError("on purpose")
import time
time.sleep(60)
"""


@pytest.mark.slow
def test_a_flood_neither_freezes_the_run_nor_loses_the_last_lines(spark_local4: Any, recorded: list[Recorded]) -> None:
    gc.collect()
    before = psutil.Process().memory_info().rss
    cpu_before = time.process_time()
    flood = Recorded(spark_local4, FLOOD)
    recorded.append(flood)
    views = 0
    pause = threading.Event()
    while flood.run.state == "running":
        began = time.monotonic()
        flood.board.view()
        flood.run.logs(tail=5)
        assert time.monotonic() - began < 1  # the notebook can ask at any time
        views += 1
        pause.wait(0.05)
    assert views > 20
    with pytest.raises(NodeError, match="on purpose") as raised:
        flood.run.result()
    assert time.process_time() - cpu_before < 5  # 0.7 s where nothing else runs, for 1.9 million lines
    assert psutil.Process().memory_info().rss - before < 150 * MIB
    for node, beats in flood.beats.items():
        assert len(beats) >= 3
        assert max(late - early for early, late in pairwise(beats)) < 2, node

    last = (*(f"line {number}" for number in range(999_950, 1_000_000)), "the last word")
    assert flood.run.logs("worker:0", tail=51)["worker:0"] == ("… 999,950 earlier lines left out", *last)
    assert flood.board.logs("worker:0")[-51:] == last
    assert raised.value.log_lines[-20:] == last[-20:]
    # The files have the beginning too, and all lines are accounted for.
    for node, written in flood.run.logs(tail=10**7).items():
        written = written[:-1]  # the chief was stopped in the middle of one
        assert written[0] == "line 0", node
        assert len(written) > 20_000
        shown = [int(line.split()[1]) for line in written if line.startswith("line")]
        missing = sum(int(line.split()[1].replace(",", "")) for line in written if line.startswith("…"))
        assert shown == sorted(set(shown))
        assert len(shown) + missing == max(shown) + 1
    found = flood.run.logs("worker:0", grep="^line 100$")["worker:0"]
    assert found[-1] == "line 100"


@pytest.mark.slow
def test_the_last_lines_come_also_from_a_node_that_is_killed(spark_local4: Any, recorded: list[Recorded]) -> None:
    body = """
    import os, sys, threading
    for number in range(200_000):
        print("line", number)
    if ctx.is_chief:
        threading.Event().wait()
    os.kill(os.getpid(), 9)
    """
    run = Recorded(spark_local4, body)
    recorded.append(run)
    with pytest.raises(NodeError):
        run.run.wait(60)
    assert run.run.logs("worker:0", tail=1)["worker:0"][-1] == "line 199999"


def test_what_a_subprocess_floods_forever_does_not_keep_the_run_from_ending(
    spark_local4: Any, recorded: list[Recorded]
) -> None:
    body = """
    import subprocess, time
    subprocess.Popen(["yes", "and so on"])
    time.sleep(1)
    ctx.task_index
    """
    run = Recorded(spark_local4, body)
    recorded.append(run)
    assert run.run.wait(60).values == [0, 0]
    assert run.run.logs("chief:0", tail=1)["chief:0"][-1] == "and so on"


def test_files_reach_further_back_than_memory_and_go_when_the_run_is_forgotten(
    spark_local4: Any, recorded: list[Recorded]
) -> None:
    run = Recorded(spark_local4, "for number in range(30_000):\n    print('line', number)")
    recorded.append(run)
    result = run.run.wait(60)
    assert len(result.logs["chief:0"]) == 2001
    assert result.log_files == run.run.log_files and set(result.log_files) == {"chief:0", "worker:0"}
    whole = tuple(f"line {number}" for number in range(30_000))
    assert run.run.logs("chief:0", tail=100_000) == {"chief:0": whole}
    assert tuple(result.log_files["chief:0"].read_text().splitlines()) == whole
    assert len(run.run.logs("chief:0")["chief:0"]) == 2001
    in_memory = result.logs
    path = result.log_files["chief:0"]
    for number in range(3):
        with run.runs.recorded(f"later{number}", StatusBoard()):
            assert path.exists()
    assert run.runs.names == ["later0", "later1", "later2"]
    assert not path.parent.exists() and result.log_files == {}
    assert result.logs == in_memory
    assert run.run.logs() == in_memory


def test_the_magic_reads_the_files_and_unloading_removes_them() -> None:
    with running_shell() as shell:
        services = DrivenServices()
        magics.load(shell, services)
        handle = shell.cell("%%tfos_train -n 2 --background --out r\n1")
        run = services.latest()
        for start in range(0, 12_000, 1000):
            run.log("worker:0", *(f"step {number}" for number in range(start, start + 1000)))
        lines = shell.output_of("%tfos_logs worker:0 --tail 100000").stdout.splitlines()
        assert lines == [f"step {number}" for number in range(12_000)]
        assert shell.output_of("%tfos_logs worker:0 --tail 100000 --grep ' 1?7$'").stdout == "step 7\nstep 17\n"
        assert shell.output_of("%tfos_logs worker:0 --tail 1").stdout == (
            "… 11,999 earlier lines left out\nstep 11999\n"
        )
        path = handle.log_files["worker:0"]
        assert path.exists()
        magics.unload(shell)
        assert not path.parent.exists() and handle.log_files == {}
        assert handle.logs("worker:0")["worker:0"][-1] == "step 11999"


def test_runs_in_the_foreground_have_files_too() -> None:
    runs, board = Runs(), StatusBoard()
    with pytest.raises(ValueError, match="x"), runs.recorded("r", board):
        board.apply(NodeLogged("chief:0", ("word",)))
        raise ValueError("x")
    assert board.store is not None
    path = board.store.paths["chief:0"]
    assert path.exists()
    with runs.recorded("r", StatusBoard()):  # the name goes to another run
        assert not path.exists()
    runs.close()
    runs.close()
    assert runs.names == []


# --- progress bars --------------------------------------------------------------------------------------------

FIT = """
import time

import keras
import numpy as np

class Slowly(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.1)

x, y = np.ones((160, 2)), np.ones((160, 1))
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
{before}
model.fit(x, y, epochs=2, batch_size=16, validation_data=(x, y), callbacks=[Slowly()]{verbose})
print("then")
model.evaluate(x, y{verbose})
len(model.predict(x{verbose}))
"""
BAR = re.compile(r"(\d+)/(\d+) ━+ .*/step.*")


def fit(spark: Any, before: str, verbose: str) -> tuple[RunResult, list[str]]:
    """Return the result, and what the board's last line of the chief was while the bar moved."""
    live: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, NodeLogged) and event.node == "chief:0" and event.lines[-1:] and "\r" in event.lines[-1]:
            live.append(event.lines[-1].strip())

    body = FIT.format(before=before, verbose=verbose)
    return run_cell(spark, body, 2, preload=("tensorflow",), timeout_s=100.0, on_event=note), live


def assert_bars(lines: tuple[str, ...]) -> None:
    """Assert that a log has one bar for each epoch, and one for evaluate and predict."""
    assert [line for line in lines if not BAR.fullmatch(line)] == ["Epoch 1/2", "Epoch 2/2", "then"]
    bars = [found for line in lines if (found := BAR.fullmatch(line))]
    assert [found.group(1, 2) for found in bars] == [("10", "10")] * 2 + [("5", "5")] * 2
    assert all("val_loss" in found[0] for found in bars[:2])
    assert "loss" in bars[2][0]


@pytest.mark.parametrize("verbose", ["", ", verbose=1"])
def test_of_a_distributed_fit_the_chief_alone_shows_its_bars(spark_local4: Any, verbose: str) -> None:
    result, live = fit(spark_local4, "ctx.distribute(model)", verbose)
    assert_bars(result.logs["chief:0"])
    assert result.logs["worker:0"] == ("then",)
    states = {found[1] for line in live if (found := BAR.fullmatch(line))}
    assert len(states) >= 2, live  # it moves on the board
    assert not any(line in result.logs["chief:0"] for line in live if BAR.fullmatch(line) and line[:2] != "10")


@pytest.mark.slow
def test_what_the_user_says_is_what_the_chief_does_and_others_say_nothing(spark_local4: Any) -> None:
    logs = fit(spark_local4, "ctx.distribute(model)", ", verbose=2")[0].logs
    assert len([line for line in logs["chief:0"] if re.match(r"10/10 - \d+s", line)]) == 2
    assert logs["worker:0"] == ("then",)
    logs = fit(spark_local4, "ctx.distribute(model)", ", verbose=0")[0].logs
    assert logs["chief:0"] == logs["worker:0"] == ("then",)


@pytest.mark.slow
def test_without_distribution_each_node_has_its_own_bars(spark_local4: Any) -> None:
    result, _ = fit(spark_local4, "ctx.log.setLevel('ERROR')", ", verbose=1")
    assert_bars(result.logs["chief:0"])
    assert_bars(result.logs["worker:0"])


@pytest.mark.slow
def test_bars_of_the_oldest_keras(spark_script: Any, oldest_python: Path) -> None:
    code = f"""
    import sys
    sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
    from pyspark.sql import SparkSession
    spark = SparkSession.builder.getOrCreate()
    from runs import run_cell
    body = {FIT.format(before="ctx.distribute(model)", verbose="")!r}
    result = run_cell(spark, body, 2, preload=("tensorflow",))
    print(repr(result.logs))
    spark.stop()
    """
    logs = eval(spark_script(code, python=oldest_python).stdout.splitlines()[-1])
    assert_bars(logs["chief:0"])
    assert logs["worker:0"] == ("then",)
