"""``--tensorboard``: the numbers of a run as event files, and a TensorBoard that shows them and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_run import run_events
from test_background import wait_until
from test_end_to_end import BODY, DATA, Notebook

from tfos_magic.errors import UsageError
from tfos_magic.scalars import ScalarLog, directory_for
from tfos_magic.status import MetricsReported, NodeBeat, RunPlanned, StatusBoard
from tfos_magic.tensorboard_server import TensorBoards

PATIENCE_S = 90


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files as TensorBoard does: name → (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def logged(directory: Path, events: Any) -> Path:
    board = StatusBoard()
    with ScalarLog(directory, "r", board) as log:
        for event in events:
            board.apply(event)
            log.take(event)
    log.take(MetricsReported("chief:0", {"late": 1.0}))  # after the end: no file is opened again
    return log.directory


def test_epochs_have_the_names_and_places_that_keras_gives_them(tmp_path):
    run = logged(tmp_path, run_events(epochs=3))
    assert run.name.endswith("-r")
    train, validation = scalars(run / "train"), scalars(run / "validation")
    assert set(train) == set(validation) == {"epoch_loss", "epoch_accuracy"}
    assert [step for step, _ in train["epoch_loss"]] == [0, 1, 2]
    assert train["epoch_loss"][0][1] == pytest.approx(1.9 * 2.718281828**-0.5, rel=1e-5)
    assert validation["epoch_loss"] != train["epoch_loss"]


def test_what_is_measured_of_each_node_is_there_by_the_second(tmp_path):
    run = logged(tmp_path, run_events(nodes=2, gpu=True))
    assert {path.name for path in run.iterdir()} == {"train", "validation", "chief-0", "worker-0"}
    found = scalars(run / "worker-0")
    assert {"feed/rows_per_s", "feed/wait_percent", "machine/cpu_percent", "machine/memory_bytes"} <= set(found)
    assert {name for name in found if name.startswith("gpu1/")} == {
        f"gpu1/{name}" for name in ("utilization_percent", "memory_used_bytes", "power_watts", "temperature_celsius")
    }
    steps = [step for step, _ in found["gpu1/power_watts"]]
    assert steps == sorted(set(steps))
    assert found["gpu1/power_watts"][-1][1] == 287.0


def test_beats_are_thinned_and_what_is_unknown_is_left_out(tmp_path):
    beats = [NodeBeat("chief:0", at=1000 + 0.1 * index) for index in range(50)]
    found = scalars(logged(tmp_path, [RunPlanned("t", ("chief:0",), at=1000), *beats]) / "chief-0")
    assert 4 <= len(found["feed/rows_per_s"]) <= 6
    assert "machine/cpu_percent" not in found


def test_reports_keep_their_steps_or_are_counted(tmp_path):
    reports = [MetricsReported("worker:0", {"loss": 1.0 / n}, step=10 * n) for n in (1, 2)]
    reports += [MetricsReported("chief:0", {"loss": float(n)}) for n in (5, 6)]
    run = logged(tmp_path, reports)
    assert scalars(run / "worker-0") == {"loss": [(10, 1.0), (20, 0.5)]}
    assert scalars(run / "chief-0") == {"loss": [(0, 5.0), (1, 6.0)]}


def test_a_full_disk_does_not_reach_the_run(tmp_path, caplog):
    blocker = tmp_path / "a-file"
    blocker.write_text("")
    log = ScalarLog(blocker, "r", StatusBoard())
    with log:
        for _ in range(3):
            log.take(MetricsReported("chief:0", {"loss": 1.0}))
    assert len([one for one in caplog.records if "no more event files" in one.message]) == 1


def test_a_directory_is_made_or_refused_in_words(tmp_path, monkeypatch):
    assert directory_for(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert directory_for(f"file:{tmp_path}/c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be made: (File exists|Not a directory)"):
        directory_for(str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"not to hdfs:") as caught:
        directory_for("hdfs://host/logs")
    assert "keras.callbacks.TensorBoard" in caught.value.hint
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(UsageError) as missing:
        directory_for(str(tmp_path))
    assert missing.value.hint == "pip install tensorboard"


class Told:
    """What was said of where a TensorBoard is."""

    def __init__(self) -> None:
        self.answer = ("", "")
        self._heard = threading.Event()

    def __call__(self, url: str, reason: str) -> None:
        self.answer = url, reason
        self._heard.set()

    def url(self) -> str:
        assert self._heard.wait(PATIENCE_S)
        assert self.answer[0], self.answer[1]
        return self.answer[0]


def runs_at(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}data/runs", timeout=PATIENCE_S) as page:
        found: list[str] = json.load(page)
    return found


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.slow
def test_a_server_shows_the_runs_is_used_again_and_ends(tmp_path):
    before, servers = children(), TensorBoards()
    run = logged(tmp_path / "logs", run_events(nodes=1, epochs=1))
    try:
        first, again, other = Told(), Told(), Told()
        servers.show(tmp_path / "logs", first)
        servers.show(tmp_path / "logs", again)
        url = first.url()
        assert url.startswith("http://127.0.0.1:")
        assert again.url() == url
        assert len(children() - before) == 1
        wait_until(lambda: {f"{run.name}/train", f"{run.name}/chief-0"} <= set(runs_at(url)))  # it looks now and then
        servers.show(tmp_path / "logs", other)
        assert other.answer[0] == url  # known: told at once
    finally:
        servers.close()
    assert children() == before
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=5)


@pytest.mark.slow
def test_a_server_ends_with_a_driver_that_is_killed(tmp_path):
    script = f"""
        import sys, tempfile, threading
        from pathlib import Path
        from tfos_magic.tensorboard_server import TensorBoards
        servers = TensorBoards()
        servers.show(Path({str(tmp_path / "logs")!r}), lambda *answer: print(*answer, flush=True))
        threading.Event().wait()
    """
    (tmp_path / "tmp").mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    assert driver.stdout is not None
    assert driver.stdout.readline().startswith("http://127.0.0.1:")
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len(family) == 1
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_tensorboard_that_somebody_else_runs_for_the_directory_is_used(tmp_path, monkeypatch):
    from tensorboard import manager, version

    infos = tmp_path / "tmp" / ".tensorboard-info"
    infos.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    logs = tmp_path / "logs"
    for pid, port, logdir in ((1, 6006, tmp_path), (os.getpid(), 6007, logs)):
        facts = {"version": version.VERSION, "start_time": 1, "db": "", "path_prefix": "/x", "cache_key": ""}
        info = manager.TensorBoardInfo(pid=pid, port=port, logdir=str(logdir), **facts)
        (infos / f"pid-{pid}.info").write_text(manager._info_to_string(info))
    servers, told = TensorBoards(), Told()
    servers.show(logs, told)
    assert told.url() == "http://localhost:6007/x/"
    servers.close()


def test_a_process_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("tfos_magic.node.tensorboard._BOOT", "raise SystemExit('no such thing')")
    servers, told = TensorBoards(), Told()
    servers.show(tmp_path, told)
    assert told._heard.wait(PATIENCE_S)
    assert told.answer == ("", "no such thing")
    servers.close()


def scratch_directories() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("tfos_magic-tensorboard-*"))


PYTHON = "import os, sys; os.environ['PYSPARK_PYTHON'] = sys.executable"
RUN = """%%tfos_train --executors 2 --data frame --validation test --epochs 2 --tensorboard logs --out r"""


@pytest.mark.slow
def test_in_a_notebook(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path)
    try:
        url = two_runs(notebook, tmp_path / "logs")
        sleeping = notebook.start("import time; print('he' 're'); time.sleep(60)")
        notebook.wait_for(sleeping, "here")
        notebook.manager.interrupt_kernel()
        notebook.finish(sleeping)
        assert runs_at(url)  # an interrupt is not for it
    finally:
        notebook.close()
    wait_until(lambda: not scratch_directories())
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=5)


def two_runs(notebook: Notebook, logs: Path) -> str:
    """Run twice with ``--tensorboard``; return the URL."""
    started = notebook.run("%load_ext tfos_magic\nfrom pyspark.sql import SparkSession\n" + PYTHON)
    assert started.status == "ok"
    session = "spark = SparkSession.builder.master('local[3]').config('spark.ui.enabled', False).getOrCreate()"
    assert notebook.run(session + DATA).status == "ok"
    for options in ("", " --background"):
        trained = notebook.run(RUN + options + BODY)
        assert trained.status == "ok", trained.traceback
    assert notebook.run("r = r.wait(); len(r.history['loss'])").text.strip() == "2"
    first, second = sorted(logs.iterdir())
    assert {path.name for path in first.iterdir()} == {"train", "validation", "chief-0", "worker-0"}
    for run in (first, second):
        assert [step for step, _ in scalars(run / "train")["epoch_loss"]] == [0, 1]
        assert scalars(run / "chief-0")["feed/rows_received"][-1][1] > 0
    url = re.search(r"TensorBoard: (http://127\.0\.0\.1:\d+/)", trained.text + notebook.run("1").text)
    assert url is not None  # the second cell asks a server that is there already
    wait_until(lambda: {f"{first.name}/train", f"{second.name}/validation"} <= set(runs_at(url[1])))
    refused = notebook.run("%%tfos_train --executors 2 --tensorboard hdfs://a/b\n1")
    assert "UsageError" in refused.traceback
    return url[1]
