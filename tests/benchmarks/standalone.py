"""A standalone Spark cluster of one-core executors from any environment's PySpark, and a driver that uses it.

Everything listens on loopback, at free ports, and lives in one temporary directory. All processes carry a mark in
their environment, so that they can be found whoever their parent is by then, for measuring and for ending them.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from tfos_magic.java import find_java, provide_java

MARK = "TFOS_BENCHMARK_SIDE"
START_TIMEOUT_S = 120
END_TIMEOUT_S = 20
EXECUTOR_MEMORY = "2g"

_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.executor.memory": EXECUTOR_MEMORY,
}
_LOGGING = """\
rootLogger.level = ${sys:benchmark.log.level:-warn}
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n%ex
"""
_VERSIONS = """\
import importlib.metadata as m, importlib.util as u, json, platform, sys
names = sys.argv[1:]
versions = {name: m.version(name) for name in names}
spark = u.find_spec("pyspark").submodule_search_locations[0]
print(json.dumps({"versions": versions, "python": platform.python_version(), "spark_home": spark}))
"""


class SideError(Exception):
    """A side could not do what it was asked for; the message ends with what it said last."""


@dataclass(frozen=True)
class Installation:
    """A Python, and what it has installed."""

    executable: Path
    version: str
    packages: Mapping[str, str]
    spark_home: Path

    @classmethod
    def inspect(cls, executable: Path, packages: Sequence[str]) -> Installation:
        """Ask a Python which versions it has of PySpark and of `packages`."""
        command = [str(executable), "-c", _VERSIONS, "pyspark", *packages]
        facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return cls(executable, facts["python"], facts["versions"], Path(facts["spark_home"]))

    def __str__(self) -> str:
        return ", ".join([f"Python {self.version}", *(f"{name} {number}" for name, number in self.packages.items())])


class Side:
    """A cluster with as many one-core executors as nodes, and a driver on it that answers requests.

    Parameters
    ----------
    installation : Installation
    command : sequence of str
        The driver's script and its arguments; ``--master URL --nodes N --descriptor FD`` are added.
    nodes : int
    directory : Path
        For everything that Spark writes; must exist.
    """

    def __init__(self, installation: Installation, command: Sequence[str], nodes: int, directory: Path) -> None:
        self.nodes = nodes
        self._installation = installation
        self._command = list(command)
        self._directory = directory
        self._mark = uuid.uuid4().hex
        self._closing = ExitStack()
        self._driver: subprocess.Popen[str] | None = None
        self._harness: Connection | None = None

    def __enter__(self) -> Side:
        with ExitStack() as stack:
            stack.callback(self._end_all)
            environ = self._environ()
            listening = r"Starting Spark master at (spark://\S+)"
            master = stack.enter_context(
                Daemon(self._spark("master.Master", "--host", "127.0.0.1", "--port", "0"), listening, environ)
            )
            worker = ["--host", "127.0.0.1", "--cores", str(self.nodes), "--memory", "64g"]
            arguments = [*worker, "--work-dir", str(self._directory / "work"), master.answer]
            stack.enter_context(
                Daemon(self._spark("worker.Worker", *arguments), r"(Successfully registered) with master", environ)
            )
            self._start_driver(master.answer, environ, stack)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.close()

    def ask(self, request: Mapping[str, Any], on_event: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Return the driver's reply; what it tells on the way goes to `on_event`.

        Raises
        ------
        SideError
            It failed, or it is gone.
        """
        if self._harness is None:
            raise SideError("the driver was not started")
        try:
            self._harness.send(dict(request))
            while True:
                reply: dict[str, Any] = self._harness.recv()
                if "event" not in reply:
                    break
                if on_event is not None:
                    on_event(reply["event"])
        except (EOFError, OSError) as error:
            raise SideError(f"the driver is gone\n{self.log()}") from error
        if "error" in reply:
            raise SideError(f"{self.log()}\n{reply['error']}")
        return reply

    def log(self) -> str:
        """Return the last lines that the driver wrote."""
        lines = (self._directory / "driver.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-30:])

    def processes(self) -> list[psutil.Process]:
        """Return all that are alive of the cluster, the driver and whatever they started."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for pid in psutil.pids():
            try:
                if mark in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(psutil.Process(pid))
            except (OSError, psutil.NoSuchProcess):  # gone, or not ours to read
                continue
        return found

    @property
    def driver_pid(self) -> int:
        """The driver's own."""
        if self._driver is None:
            raise SideError("the driver was not started")
        return self._driver.pid

    def _environ(self) -> dict[str, str]:
        installation = self._installation
        java = find_java(installation.packages["pyspark"]) or provide_java()
        settings, files = self._directory / "conf", self._directory / "files"
        settings.mkdir(exist_ok=True)
        files.mkdir(exist_ok=True)
        lines = {**_SETTINGS, "spark.sql.warehouse.dir": str(files / "warehouse")}
        text = "".join(f"{name} {value}\n" for name, value in lines.items())
        (settings / "spark-defaults.conf").write_text(text, encoding="utf-8")
        (settings / "log4j2.properties").write_text(_LOGGING, encoding="utf-8")
        return {
            **os.environ,
            **({"JAVA_HOME": str(java.home)} if java else {}),
            MARK: self._mark,
            "SPARK_HOME": str(installation.spark_home),
            "SPARK_CONF_DIR": str(settings),
            "SPARK_LOCAL_DIRS": str(files),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_DAEMON_MEMORY": "512m",
            "TMPDIR": str(files),
            "PYSPARK_PYTHON": str(installation.executable),
            "TFOS_SERVER_HOST": "127.0.0.1",  # TensorFlowOnSpark listens on all addresses, but is told this one
        }

    def _spark(self, name: str, *arguments: str) -> list[str]:
        script = self._installation.spark_home / "bin" / "spark-class"
        return [str(script), f"org.apache.spark.deploy.{name}", "--webui-port", "0", *arguments]

    def _start_driver(self, master: str, environ: Mapping[str, str], stack: ExitStack) -> None:
        ours, theirs = socket.socketpair()
        log = stack.enter_context((self._directory / "driver.log").open("w", encoding="utf-8"))
        added = ["--master", master, "--nodes", str(self.nodes), "--descriptor", str(theirs.fileno())]
        with theirs:
            driver = subprocess.Popen(
                [str(self._installation.executable), *self._command, *added],
                env=dict(environ),
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        stack.callback(end, driver)
        self._driver = driver
        self._harness = stack.enter_context(Connection(ours.detach()))  # closing it is what tells the driver to go

    def _end_all(self) -> None:
        """Kill what should have gone with its parents; TensorFlowOnSpark's managers may not."""
        for process in self.processes():
            try:
                process.kill()
                process.wait(END_TIMEOUT_S)
            except psutil.NoSuchProcess:
                continue


class Daemon:
    """A master or a worker; it is up when a line of its log matches.

    Parameters
    ----------
    command : sequence of str
    pattern : str
        Its first group is the `answer`.
    environ : mapping of str to str
    """

    def __init__(self, command: Sequence[str], pattern: str, environ: Mapping[str, str]) -> None:
        self.answer = ""
        self._command = list(command)
        self._pattern = re.compile(pattern)
        self._environ = {**environ, "SPARK_DAEMON_JAVA_OPTS": "-Dbenchmark.log.level=info"}
        self._lines: deque[str] = deque(maxlen=100)
        self._is_answered = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Daemon:
        self._process = subprocess.Popen(
            self._command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader.start()
        if not self._is_answered.wait(START_TIMEOUT_S) or not self.answer:
            self.__exit__()
            raise SideError(f"{self._command[1]} does not start:\n" + "".join(self._lines))
        return self

    def __exit__(self, *exc_info: object) -> None:
        end(self._process)
        self._reader.join(END_TIMEOUT_S)

    def _read(self) -> None:
        if self._process.stdout is None:
            return
        with self._process.stdout as lines:
            for line in lines:
                self._lines.append(line)
                match = self._pattern.search(line)
                if match and not self.answer:
                    self.answer = match[1]
                    self._is_answered.set()
        self._is_answered.set()  # it is over, whatever it said


def end(process: subprocess.Popen[str]) -> None:
    """Ask a process to go, and see to it that it does."""
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
