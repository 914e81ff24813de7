"""TFManager: queues and values in a process of their own, reachable by who knows the key, gone without a trace."""

from __future__ import annotations

import gc
import os
import queue
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import leftovers
import pytest

from tfos_magic import TFManager, archive
from tfos_magic.errors import TfosError, UsageError
from tfos_magic.marker import EndPartition

ROOT = Path(__file__).resolve().parents[1]
QUEUES = ["input", "output", "error"]


@pytest.fixture
def manager() -> Iterator[TFManager.TFManager]:
    with TFManager.start("key", QUEUES) as made:
        yield made


def servers() -> int:
    return len(leftovers.processes_with("tfos_magic.queue_server"))


def run(code: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=check)


@pytest.mark.parametrize("key", ["key", b"key"])
@pytest.mark.parametrize("mode", ["local", "remote"])
def test_another_process_sees_the_same_queues_and_values(key: str | bytes, mode: str) -> None:
    with TFManager.start(key, QUEUES, mode) as manager:
        manager.set("state", "running")
        manager.get_queue("input").put((1, "a"))
        address = [manager.address] if isinstance(manager.address, str) else map(str, manager.address)
        said = run(
            """
            import sys
            from tfos_magic import TFManager
            address = sys.argv[1] if len(sys.argv) == 2 else sys.argv[1:]
            manager = TFManager.connect(address, "key")
            row = manager.get_queue("input").get()
            manager.get_queue("input").task_done()
            manager.get_queue("output").put({"row": row, "state": manager.get("state")})
            manager.set("state", "terminating")
            """,
            *address,
        )
        assert said.stderr == ""
        assert manager.get_queue("output").get(timeout=5) == {"row": (1, "a"), "state": "running"}
        assert manager.get("state") == "terminating"
        manager.get_queue("input").join()


def test_local_is_for_this_user_only_and_remote_has_a_host_and_port() -> None:
    with TFManager.start("key", QUEUES) as local, TFManager.start("key", QUEUES, mode="remote") as remote:
        assert Path(local.address).parent.stat().st_mode & 0o077 == 0
        host, port = remote.address
        assert host == os.environ["SPARK_LOCAL_IP"]
        with socket.create_connection((host, port), timeout=5):
            pass


def test_who_does_not_know_the_key_is_not_let_in(manager: TFManager.TFManager) -> None:
    with pytest.raises(AuthenticationError):
        TFManager.connect(manager.address, "another key")
    with socket.socket(socket.AF_UNIX) as silent:  # somebody who connects and says nothing holds up nobody
        silent.connect(manager.address)
        assert TFManager.connect(manager.address, b"key").get_queue("input") is not None


def test_queues_work_as_queues_do(manager: TFManager.TFManager) -> None:
    rows = manager.get_queue("input")
    assert rows is not None
    assert rows.empty()
    rows.put(1)
    rows.put_nowait(None)
    rows.put(EndPartition())
    assert (rows.qsize(), rows.empty(), rows.full()) == (3, False, False)
    assert rows.get() == 1
    assert rows.get(timeout=1) is None
    assert isinstance(rows.get_nowait(), EndPartition)
    with pytest.raises(queue.Empty):
        rows.get_nowait()
    with pytest.raises(queue.Empty):
        rows.get(timeout=0.1)
    for _ in range(3):
        rows.task_done()
    rows.join()
    with pytest.raises(ValueError, match="task_done"):
        rows.task_done()
    assert manager.get_queue("nobody's") is None
    with pytest.raises(KeyError, match="nobody's"):
        manager.get("nobody's")


def test_a_thread_that_waits_holds_up_no_other(manager: TFManager.TFManager) -> None:
    got: list[Any] = []
    rows = manager.get_queue("input")
    assert rows is not None
    reader = threading.Thread(target=lambda: got.append(rows.get()), daemon=True)
    reader.start()
    assert manager.get_queue("output") is not None
    rows.put("late")
    reader.join(10)
    assert got == ["late"]


class Notebooks:
    """A class that only this process has."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_the_server_needs_no_classes_of_what_it_holds(manager: TFManager.TFManager) -> None:
    manager.set("object", Notebooks(3))
    found = manager.get("object")
    assert type(found) is Notebooks
    assert found.value == 3


def test_shutdown_leaves_nothing_and_can_be_repeated() -> None:
    manager = TFManager.start("key", QUEUES)
    address = manager.address
    rows = manager.get_queue("input")
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            rows.get()
        except (EOFError, OSError) as error:
            ended.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert servers() == 1
    manager.shutdown()
    manager.shutdown()
    waiting.join(10)
    assert len(ended) == 1
    assert servers() == 0
    assert not Path(address).parent.exists()
    with pytest.raises(OSError, match="No such file"):
        TFManager.connect(address, "key")


def test_who_only_connected_ends_nothing(manager: TFManager.TFManager) -> None:
    TFManager.connect(manager.address, "key").shutdown()
    manager.set("still", "there")


def test_a_manager_that_nobody_holds_takes_its_server_along() -> None:
    manager = TFManager.start("key", QUEUES)
    rows = manager.get_queue("input")
    del manager
    gc.collect()
    rows.put(1)  # a queue holds its manager
    assert servers() == 1
    del rows
    gc.collect()
    assert servers() == 0


@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_server_ends_with_its_owner_however_that_ends(end: str) -> None:
    code = "from tfos_magic import TFManager\nmanager = TFManager.start('key', ['input'])\nprint(manager.address)\n"
    address = Path(run(code + end, check=False).stdout.strip())
    assert address.name == "manager"
    # That the process and its directory go is what the autouse fixture sees to, with some seconds' grace.


def test_a_fork_of_the_owner_does_not_end_it() -> None:
    code = """
    import os, sys
    from tfos_magic import TFManager
    manager = TFManager.start("key", ["input"])
    child = os.fork()
    if child == 0:
        sys.exit(0)
    os.waitpid(child, 0)
    manager.set("still", "there")
    child = os.fork()
    if child == 0:
        import time
        time.sleep(5)
        os._exit(0)
    manager.shutdown()  # although the fork has a copy of every pipe
    print(manager._stop_server.alive)
    os.kill(child, 9)
    os.waitpid(child, 0)
    """
    assert run(code).stdout == "False\n"


def test_it_starts_from_a_script_without_a_guard_and_from_the_package_that_a_run_brings_along(tmp_path: Path) -> None:
    code = (
        "from tfos_magic import TFManager\nwith TFManager.start('k', ['a']) as m:\n    m.set('x', 1); print(m.get('x'))"
    )
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"
    (tmp_path / "package.zip").write_bytes(archive.build())
    boot = f"import os, sys; fd = os.open('package.zip', os.O_RDONLY); sys.path[0] = f'/proc/self/fd/{{fd}}'\n{code}"
    boot += "\nprint(TFManager.__file__.startswith('/proc/self/fd/'))"
    command = [sys.executable, "-c", boot]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\nTrue\n"


def test_what_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="mode is 'both'"):
        TFManager.start("key", QUEUES, "both")
    monkeypatch.setenv("SPARK_LOCAL_IP", "192.0.2.7")
    with pytest.raises(TfosError, match=r"did not start: OSError: .*Cannot assign requested address"):
        TFManager.start("key", QUEUES, "remote")
    assert servers() == 0
    with monkeypatch.context() as patched:
        patched.setenv("TMPDIR", "/nowhere")
        patched.setattr(tempfile, "tempdir", None)
        patched.chdir("/")
        assert TFManager.start("key", QUEUES).shutdown() is None  # Python's own choice of another directory
