"""What all tests share: real Spark clusters, second environments, and the check that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import leftovers
import pytest

from tfos_magic.java import ensure_java

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 5.0  # for what was told to go and is still going; an agent that is not told goes on for longer
LOCAL_CLUSTER = "local-cluster[2,2,1024]"  # two executors of two slots, each a JVM of its own
REQUIRE = "TFOS_MAGIC_REQUIRE_OLDEST"  # set by tests/run.py: a missing environment is a failure, not a skip
NEEDS = "TFOS_MAGIC_NEEDS_FILE"  # set by tests/run.py: write what the selected tests need, and run nothing
_NEEDS = ("oldest_python", "pyspark32_python", "chromium")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


# ── the run's own place ──────────────────────────────────────────────────────────────────────────────────────────────


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a mark for its processes, a directory for temporary files, and Spark its settings."""
    place = RunPlace.make()
    config.stash[_PLACE] = place
    os.environ.update(place.environ)
    tempfile.tempdir = str(place.directory)
    if NEEDS not in os.environ:
        ensure_java()
    config.add_cleanup(place.close)


_PLACE = pytest.StashKey["RunPlace"]()


@dataclass
class RunPlace:
    """A directory of this run's own, and the environment that leads everything there."""

    directory: Path
    environ: dict[str, str]
    before: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def make(cls) -> RunPlace:
        original = tempfile.gettempdir()
        directory = Path(tempfile.mkdtemp(prefix="tfos-tests-"))
        environ = {
            "TMPDIR": str(directory),
            "PYTEST_DEBUG_TEMPROOT": original,  # tmp_path stays where pytest keeps the last three for looking at
            leftovers.MARK: uuid.uuid4().hex,
            "SPARK_CONF_DIR": str(_write_spark_settings(directory)),
            "SPARK_LOCAL_IP": "127.0.0.1",  # no look-up of the host's name, nothing reachable from outside
            "PYSPARK_PYTHON": sys.executable,  # else workers run whatever python3 is first on PATH
        }
        return cls(directory, environ, {name: os.environ.get(name) for name in (*environ, "JAVA_HOME")})

    def close(self) -> None:
        tempfile.tempdir = None
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(self.directory, ignore_errors=True)


def _write_spark_settings(directory: Path) -> Path:
    """Write the settings of every Spark process of the run: quiet, no UI, loopback only, all files in one place."""
    files, settings = directory / "spark", directory / "spark-conf"
    files.mkdir()
    settings.mkdir()
    # The first compiler only: tests run for seconds, and on two cores the second one takes what they need.
    java_options = f"-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Djava.io.tmpdir={files} -Dderby.system.home={files}"
    defaults = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.local.dir": files,
        "spark.sql.warehouse.dir": files / "warehouse",
        "spark.driver.extraJavaOptions": java_options,
        "spark.executor.extraJavaOptions": java_options,
        "spark.sql.shuffle.partitions": "4",
    }
    text = "".join(f"{name} {value}\n" for name, value in defaults.items())
    (settings / "spark-defaults.conf").write_text(text, encoding="utf-8")
    (settings / "log4j2.properties").write_text(_LOGGING, encoding="utf-8")
    return settings


_LOGGING = """\
rootLogger.level = ${sys:tests.log.level:-warn}
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n%ex
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell tests/run.py what the selected tests need, if it asks."""
    if NEEDS in os.environ:
        needed = {name for item in session.items for name in _NEEDS if name in getattr(item, "fixturenames", ())}
        if any(item.get_closest_marker("browser") for item in session.items):
            needed.add("chromium")
        Path(os.environ[NEEDS]).write_text(json.dumps(sorted(needed)), encoding="utf-8")


# ── nothing is left behind ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def nothing_left(pytestconfig: pytest.Config) -> Iterator[None]:
    """Fail a test that leaves a process, a thread, a listening port, a temporary file or a changed environment."""
    directory = pytestconfig.stash[_PLACE].directory
    before = leftovers.Snapshot.take(directory)
    yield
    left = before.leftovers(directory, GRACE_S)
    leftovers.kill_new(before)
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


# ── Spark ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def services() -> Any:
    """What stands behind the magics in `shell`; a file whose magics need other things has its own."""
    from fake_services import FakeServices

    return FakeServices()


@pytest.fixture
def shell(services: Any) -> Iterator[Any]:
    """An IPython shell of this process with the magics loaded."""
    from shell_fixture import running_shell

    from tfos_magic import magics

    with running_shell() as running:
        magics.load(running, services)
        yield running


@pytest.fixture(scope="session")
def spark_local4() -> Iterator[Any]:
    """One ``local[4]`` session for all tests of this process; a test that needs another kind uses `spark_script`."""
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.master("local[4]").appName("tests").getOrCreate()
    yield spark
    spark.stop()


@dataclass(frozen=True)
class StandaloneCluster:
    """A Spark master and two workers of two slots each, on three addresses of this host."""

    master_url: str
    hosts: tuple[str, ...]


@pytest.fixture(scope="session")
def standalone_cluster(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StandaloneCluster]:
    """Two machines, as far as Spark can tell: its workers listen on 127.0.0.2 and 127.0.0.3.

    In tasks ``SPARK_LOCAL_IP`` tells which; the addresses of ``getTaskInfos`` do not, they are those of connections.
    """
    hosts = ("127.0.0.2", "127.0.0.3")
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(SparkDaemon("master.Master", ["--host", "127.0.0.1", "--port", "0"]))
        url = master.wait_for(r"Starting Spark master at (spark://\S+)")
        for host in hosts:
            work = tmp_path_factory.mktemp("spark-work")
            arguments = ["--host", host, "--cores", "2", "--memory", "3g", "--work-dir", str(work), url]
            worker = stack.enter_context(SparkDaemon("worker.Worker", arguments, {"SPARK_LOCAL_IP": host}))
            worker.wait_for(r"Successfully registered with master")
        yield StandaloneCluster(url, hosts)


class SparkDaemon:
    """A process of a standalone cluster, from the installed PySpark; its log is read as it comes."""

    def __init__(self, name: str, arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        import pyspark

        home = Path(pyspark.__file__).parent
        command = [
            str(home / "bin" / "spark-class"),
            f"org.apache.spark.deploy.{name}",
            "--webui-port",
            "0",
            *arguments,
        ]
        settings = {"SPARK_HOME": str(home), "SPARK_DAEMON_MEMORY": "512m", **(environ or {})}
        self._lines: deque[str] = deque(maxlen=200)
        self._changed = threading.Condition()
        self._is_over = False
        options = f"-Dtests.log.level=info {os.environ.get('SPARK_DAEMON_JAVA_OPTS', '')}"
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "SPARK_DAEMON_JAVA_OPTS": options, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"log of {name}", daemon=True)

    def __enter__(self) -> SparkDaemon:
        leftovers.allow_tree(self._process.pid)
        self._reader.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(20)
        leftovers.forbid_tree(self._process.pid)

    def wait_for(self, pattern: str, timeout_s: float = 60) -> str:
        """Return the last group of the first line that matches; fail with the log if there is none in time."""

        def found() -> re.Match[str] | bool | None:
            return next((m for line in self._lines if (m := re.search(pattern, line))), None) or self._is_over

        with self._changed:
            match = self._changed.wait_for(found, timeout_s)
        if not isinstance(match, re.Match):
            pytest.fail(f"no line {pattern!r} in {timeout_s:.0f} s from {self._process.args}:\n" + "".join(self._lines))
        return match.group(match.re.groups)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


@pytest.fixture
def spark_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a script in a fresh process: one SparkContext is all that a process can have.

    ``spark_script(code, master="local[4]", conf={}, env={}, python=None, args=(), timeout_s=180, check=True)``

    The script's first session gets `master` and `conf`. `env` adds to the environment; a value of None removes.
    Past `timeout_s` every thread's stack is dumped and the test fails with all output, as it does with `check` when
    the exit status is not 0.
    """
    count = 0

    def run(
        code: str,
        *,
        master: str = "local[4]",
        conf: Mapping[str, str] | None = None,
        env: Mapping[str, str | None] | None = None,
        python: str | Path | None = None,
        args: Sequence[str] = (),
        timeout_s: float = 180,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        nonlocal count
        count += 1
        script = tmp_path / f"script{count}.py"
        script.write_text(textwrap.dedent(code), encoding="utf-8")
        interpreter = str(python or sys.executable)
        return run_with_stacks(
            [interpreter, "-X", "faulthandler", str(script), *args],
            environ=_script_environ(interpreter, master, conf or {}, env or {}),
            directory=tmp_path,
            timeout_s=timeout_s,
            check=check,
        )

    return run


def _script_environ(python: str, master: str, conf: Mapping[str, str], env: Mapping[str, str | None]) -> dict[str, str]:
    options = " ".join(f"--conf '{name}={value}'" for name, value in conf.items())
    wanted: dict[str, str | None] = {
        **os.environ,
        "PYSPARK_PYTHON": python,
        "PYSPARK_DRIVER_PYTHON": python,
        "PYSPARK_SUBMIT_ARGS": f"--master {master} {options} pyspark-shell",
        "PYTHONUNBUFFERED": "1",
        **env,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def run_with_stacks(
    command: Sequence[str], *, environ: Mapping[str, str], directory: Path, timeout_s: float, check: bool
) -> subprocess.CompletedProcess[str]:
    """Run a Python command that has faulthandler on; past `timeout_s`, fail with its stacks and output."""
    process = subprocess.Popen(
        command,
        env=dict(environ),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))  # the abort below is for its stacks only
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler writes every thread's stack
        stdout, stderr = _last_words(process)
        pytest.fail(f"still running after {timeout_s:.0f} s{_output(stdout, stderr)}", pytrace=False)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if check and process.returncode != 0:
        pytest.fail(f"exit status {process.returncode}{_output(stdout, stderr)}", pytrace=False)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _last_words(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Read to the end: a JVM that the script started may hold the pipes, so it goes first."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()


def _output(stdout: str, stderr: str) -> str:
    return f"\n─── stdout ───\n{stdout}\n─── stderr ───\n{stderr}"


# ── second environments ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def oldest_python() -> Path:
    """The Python of an environment with the oldest supported versions: PySpark 3.5.9, TensorFlow 2.16, Keras 3.3."""
    return _second_python(".venv-oldest")


@pytest.fixture(scope="session")
def pyspark32_python() -> Path:
    """The Python of an environment with PySpark 3.2.4, which always patches ``collections.namedtuple``."""
    return _second_python(".venv-pyspark32")


def _second_python(name: str) -> Path:
    python = ROOT / name / "bin" / "python"
    if python.exists():
        return python
    reason = f"{name} is missing; python3 tests/run.py makes it"
    return pytest.fail(reason) if os.environ.get(REQUIRE) == "1" else pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium for the browser tests."""
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path:
        return path
    reason = f"no browser: none of {', '.join(_BROWSERS)} is on PATH (Debian: apt-get install chromium)"
    return pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
