"""What a test left behind: processes, threads, ports, files, environment variables.

Every process that descends from this test run carries a mark in its environment, and every temporary file of the run
lies in a directory of its own. So what is found here is this run's, whatever else the machine is doing, and a process
that was given to init (as an agent whose Spark worker died) is found as well as a child.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "TFOS_MAGIC_TEST_RUN"

# What Spark itself makes in its spark.local.dir and java.io.tmpdir, and removes when the JVM ends. Anything else there
# is ours.
_SPARKS_FILES = re.compile(
    r"""(?x)
    spark-[0-9a-f-]{36} | blockmgr-[0-9a-f-]{36} | executor-[0-9a-f-]{36} | spark-artifacts-.* | artifacts-.*
    | warehouse | metastore_db | derby\.log | app-\d{14}-\d{4}
    | [0-9a-f-]{36}(_resources)?                              # session resources
    | \.[0-9a-f-]{36}\.sock | [0-9a-f-]{36}\.sock             # JVM ↔ Python workers
    | hsperfdata_.* | lib\w+-java-?\d*\.so(\.lck)? | snappy-.*-libsnappyjava\.so | libzstd-jni-.*\.so.* | liblz4-java.*
    | libnetty_.*\.so | jffi\d+\.so | libleveldbjni.*
    """
)
_SPARKS_COMMANDS = ("pyspark.daemon", "pyspark.worker", "pyspark/daemon.py", "pyspark/worker.py", "org.apache.spark.")

# Set in their own process by others, each the first time it is used.
_FOREIGN_VARIABLES = frozenset(
    {
        "PYTEST_CURRENT_TEST",  # pytest, for every test
        "SPARK_AUTH_SOCKET_TIMEOUT",  # SparkContext
        "SPARK_BUFFER_SIZE",  # SparkContext
        "TF2_BEHAVIOR",  # importing tensorflow
        "ENABLE_RUNTIME_UPTIME_TELEMETRY",
        "TPU_ML_PLATFORM",
        "TPU_ML_PLATFORM_VERSION",
        "HDF5_PLUGIN_PATH",  # importing keras
        "KMP_DUPLICATE_LIB_OK",  # importing scikit-learn's OpenMP
        "KMP_INIT_AT_FORK",
        "KMP_REGISTERED_LIB",
    }
)

_EXEC_S = 2.0
_owners: set[int] = set()


def allow_tree(pid: int) -> None:
    """Let this process and the Spark processes below it live from test to test; for session fixtures."""
    _owners.add(pid)


def forbid_tree(pid: int) -> None:
    """Undo `allow_tree`."""
    _owners.discard(pid)


@dataclass(frozen=True)
class Snapshot:
    """What there is at one moment."""

    processes: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]
    ports: frozenset[str]
    files: frozenset[str]
    environ: tuple[tuple[str, str], ...]

    @classmethod
    def take(cls, directory: Path) -> Snapshot:
        """Look around.

        Parameters
        ----------
        directory : Path
            The run's own directory for temporary files.
        """
        return cls(
            processes=frozenset(_processes()),
            threads=frozenset(_threads()),
            ports=frozenset(_ports()),
            files=frozenset(_files(directory)),
            environ=tuple(sorted((k, v) for k, v in os.environ.items() if k not in _FOREIGN_VARIABLES)),
        )

    def leftovers(self, directory: Path, grace_s: float) -> list[str]:
        """Return a line for each thing that is there now and was not then; what is on its way out has `grace_s`."""
        self._wait_for_ends(grace_s)
        now = Snapshot.take(directory)
        return [
            *(f"process {told}" for process in now.processes - self.processes if (told := _describe(process))),
            *(f"thread {thread!r} running {_target(thread)}" for thread in now.threads - self.threads),
            *(f"listening on {port}" for port in sorted(now.ports - self.ports)),
            *(f"file {file}" for file in sorted(now.files - self.files)),
            *_changes(dict(self.environ), dict(now.environ)),
        ]

    def _wait_for_ends(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        psutil.wait_procs([p for p in _processes() if p not in self.processes and not _is_zombie(p)], grace_s)
        for thread in set(_threads()) - self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def processes_with(word: str) -> list[psutil.Process]:
    """Return this run's processes whose command has `word` in it; others on the machine do not concern us."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for pid in psutil.pids():
        try:
            if mark in _environ(pid) and word in " ".join(psutil.Process(pid).cmdline()):
                found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return found


def kill_new(before: Snapshot) -> None:
    """End what a test left, so that the next one starts clean."""
    for process in set(_processes()) - before.processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _processes() -> Iterator[psutil.Process]:
    mark = f"{MARK}={os.environ[MARK]}".encode()
    me = psutil.Process()
    found = {process.pid: process for process in me.children(recursive=True)}
    for pid in psutil.pids():
        if pid != me.pid and pid not in found and mark in _environ(pid):
            try:
                found[pid] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                continue
    owners = _owners | _own_jvm()
    return (process for process in found.values() if not _is_allowed(process, owners, me.pid))


def _environ(pid: int) -> bytes:
    """Return a process's environment; empty if it is gone, or not ours to read, and so not of this run.

    While a process is in the midst of exec it shows neither environment nor arguments; on a busy machine that has been
    seen for 0.1 s after Popen had returned.
    """
    folder = Path(f"/proc/{pid}")
    deadline = time.monotonic() + _EXEC_S
    try:
        while time.monotonic() < deadline:
            found = (folder / "environ").read_bytes()
            if found or (folder / "cmdline").read_bytes():
                return found
            (folder / "exe").readlink()  # raises for the kernel's own threads and for zombies, which never have any
            time.sleep(0.001)
    except OSError:
        pass
    return b""


def _own_jvm() -> set[int]:
    """PySpark keeps one JVM per process and lets it live until exit, also without a session."""
    context = sys.modules.get("pyspark") and sys.modules["pyspark"].SparkContext
    gateway = context and context._gateway
    process = getattr(gateway, "proc", None)
    return {process.pid} if process else set()


def _is_allowed(process: psutil.Process, owners: set[int], me: int) -> bool:
    if process.pid in owners:
        return True
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return process.ppid() != me  # another parent has yet to reap its own
        command = " ".join(process.cmdline())
        if not command:  # it has been killed and has given its memory back: there is a moment before it is a zombie
            return True
        return any(name in command for name in _SPARKS_COMMANDS) and any(p.pid in owners for p in process.parents())
    except psutil.NoSuchProcess:
        return True


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _describe(process: psutil.Process) -> str:
    """Return what it is; empty if it has gone meanwhile, as the ``rm`` has with which Spark's worker tidies up."""
    try:
        with process.oneshot():
            what = "a zombie: nobody waited for it" if _is_zombie(process) else shlex.join(process.cmdline())[:300]
            return f"{process.pid} (parent {process.ppid()}): {what}"
    except psutil.NoSuchProcess:
        return ""


def _threads() -> Iterable[threading.Thread]:
    return (thread for thread in threading.enumerate() if not _is_foreign_thread(thread))


def _is_foreign_thread(thread: threading.Thread) -> bool:
    """Tell threads of PySpark's gateway, and native threads that merely called into Python, from ours."""
    if isinstance(thread, threading._DummyThread):
        return True
    owner = getattr(getattr(thread, "_target", None), "__self__", thread)
    return type(owner).__module__.split(".")[0] in ("py4j", "pyspark")


def _target(thread: threading.Thread) -> str:
    target = getattr(thread, "_target", None) or type(thread)
    return getattr(target, "__qualname__", repr(target))


def _ports() -> Iterator[str]:
    me = psutil.Process()
    list_connections = getattr(me, "net_connections", None) or me.connections  # its name before psutil 6
    spark = _sparks_own_ports()
    for connection in list_connections(kind="inet"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port not in spark:
            yield f"{connection.laddr.ip}:{connection.laddr.port}"


def _sparks_own_ports() -> set[int]:
    """The accumulator server of the session that is alive."""
    accumulators = sys.modules.get("pyspark.accumulators")
    server = accumulators and getattr(sys.modules["pyspark"], "SparkContext", None)
    context = server and server._active_spark_context
    address = getattr(getattr(context, "_accumulatorServer", None), "server_address", None)
    return {address[1]} if isinstance(address, tuple) else set()


def _files(directory: Path) -> Iterator[str]:
    spark = directory / "spark"
    mine = {getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "autograph" in name}
    for path in directory.iterdir():
        # AutoGraph keeps the code that it generated until the process ends; only this process's own is excused.
        if path != spark and str(path) not in mine:
            yield str(path)
    if spark.is_dir():
        yield from (str(path) for path in spark.iterdir() if not _SPARKS_FILES.fullmatch(path.name))


def _changes(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"environment variable {name}: {before.get(name)!r} became {after.get(name)!r}"
