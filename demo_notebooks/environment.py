"""Makes the virtual environments that the README's two commands use.

Only the standard library, and only what Python 3.10 has: this runs before anything is installed.

    requirements.lock ─► pins ─┐
    pyproject.toml ─► extras ──┴─► .venv ─► its Python ─► the notebooks, the tests

An environment carries a stamp: what was installed into it, from which files. While the stamp is right nothing is
installed and no network is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PROJECT = ROOT / "pyproject.toml"
OLDEST_PYTHON = (3, 10)
UV = "uv==0.13.9"  # installs these packages several times faster than pip, and compiles them on all cores
_STAMP = "installed.txt"
_CACHE = "uv-cache"
_IMPLIED = {"test": {"demo", "java", "tensorboard"}}  # extras that bring others, as pyproject.toml says


class SetupError(Exception):
    """The environment could not be made; the message says what to do."""


def say(text: str) -> None:
    """Print a line at once, also where the output is a file."""
    print(text, flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what begins, and afterwards how long it took."""
    say(f"{text} …")
    start = time.monotonic()
    yield
    say(f"    done in {time.monotonic() - start:.1f} s")


def check_python() -> None:
    """Stop with one line on a Python that is too old."""
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        sys.exit(f"Python {wanted} or newer is needed, and this is {sys.version.split()[0]} ({sys.executable}).")


@dataclass(frozen=True)
class Stamp:
    """What was installed: a hash over the files that say it, and the extras."""

    fingerprint: str
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """A virtual environment in the repository.

    Parameters
    ----------
    directory : Path
    base : str
        The Python to make it with.
    """

    directory: Path
    base: str = sys.executable

    @property
    def python(self) -> Path:
        """Its Python."""
        return self.directory / "bin" / "python"

    def install_project(self, extras: Iterable[str]) -> None:
        """Have the project in it, editable, with `extras`, at the versions of the lock file."""
        fingerprint = _fingerprint([LOCK, PROJECT])
        stamp = self._read_stamp()
        has = set(stamp.extras) if stamp.fingerprint == fingerprint and self._works() else set()
        wanted = has | set(extras)
        if has and wanted == has.union(*(_IMPLIED.get(extra, set()) for extra in has)) & wanted:
            return
        self._make()
        size = "" if stamp.fingerprint else " (about 3 GB on disk, once)"
        project = f"{ROOT}[{','.join(sorted(wanted))}]"
        with step(f"Installing tfos_magic[{','.join(sorted(wanted))}] into {self.directory.name}{size}"):
            self._install(["--editable", project, "--constraint", str(LOCK)])
        self._write_stamp(Stamp(fingerprint, tuple(sorted(wanted))))

    def install_list(self, requirements: Path) -> None:
        """Have exactly the versions of `requirements` in it, and the project itself without its own wishes."""
        fingerprint = _fingerprint([requirements, PROJECT])
        if self._works() and self._read_stamp().fingerprint == fingerprint:
            return
        self._make()
        with step(f"Installing {requirements.name} into {self.directory.name} with Python {version_of(self.base)}"):
            self._install(["--requirement", str(requirements)])
            self._install(["--editable", str(ROOT), "--no-deps"])
        self._write_stamp(Stamp(fingerprint))

    def variables(self) -> dict[str, str]:
        """Return this process's environment as it is after ``source bin/activate``."""
        variables = {**os.environ, "VIRTUAL_ENV": str(self.directory)}
        variables["PATH"] = os.pathsep.join([str(self.directory / "bin"), os.environ.get("PATH", os.defpath)])
        variables.pop("PYTHONHOME", None)
        return variables

    def _works(self) -> bool:
        version = version_of(str(self.python))
        return version is not None and tuple(map(int, version.split(".")[:2])) >= OLDEST_PYTHON

    def _make(self) -> None:
        if self._works():
            return
        if self.directory.exists():
            say(f"{self.directory.name} does not work any more: making it anew")
            shutil.rmtree(self.directory)
        with step(f"Making the virtual environment {self.directory.name} with Python {version_of(self.base)}"):
            done = _run([self.base, "-m", "venv", str(self.directory)])
        if done.returncode != 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise SetupError(
                f"{done.stdout}Python could not make it. On Debian and Ubuntu: apt-get install python3-venv"
            )

    def _install(self, arguments: Sequence[str]) -> None:
        """Install with uv, or with pip where uv cannot be had or fails; both leave byte code behind.

        Without it TensorFlow's first import would take 11 to 17 seconds in every process that may not write any.
        What uv downloads and builds is thrown away afterwards, unless the person chose a place for it: PySpark comes
        as source, and from a mirror that does not allow caching uv keeps another 1.5 GB of it for every checkout.
        """
        cache = Path(os.environ.get("UV_CACHE_DIR") or self.directory / _CACHE)  # beside the target: hard links
        uv = [str(self.directory / "bin" / "uv"), "--cache-dir", str(cache)]
        commands = [
            [*uv, "pip", "install", "--python", str(self.python), "--compile-bytecode"],
            [str(self.python), "-m", "pip", "install", "--compile"],
        ]
        problem = "" if self._get_uv() else f"{UV} could not be installed"
        for command in commands[1:] if problem else commands:
            try:
                done = _run([*command, "--quiet", *arguments], **_INSTALL_VARIABLES)
            finally:
                shutil.rmtree(self.directory / _CACHE, ignore_errors=True)
            if done.returncode == 0:
                return
            problem = done.stdout.strip()
            if command is commands[0]:
                say(f"    uv failed, so pip has a try. uv said:\n{problem}")
        raise SetupError(f"{problem}\nNothing could be installed: is there a network, and does pip work otherwise?")

    def _get_uv(self) -> bool:
        if (self.directory / "bin" / "uv").exists():
            return True
        if _run([str(self.python), "-m", "pip", "--version"]).returncode != 0:  # made by a tool that leaves pip out
            _run([str(self.python), "-m", "ensurepip", "--default-pip"])
        done = _run([str(self.python), "-m", "pip", "install", "--quiet", UV], **_INSTALL_VARIABLES)
        return done.returncode == 0

    def _read_stamp(self) -> Stamp:
        try:
            fingerprint, *extras = (self.directory / _STAMP).read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            return Stamp("")
        return Stamp(fingerprint, tuple(extras))

    def _write_stamp(self, stamp: Stamp) -> None:
        (self.directory / _STAMP).write_text(" ".join([stamp.fingerprint, *stamp.extras]) + "\n", encoding="utf-8")


_INSTALL_VARIABLES = {
    "PYTHONDONTWRITEBYTECODE": "",  # compiling is the point here
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}


def version_of(python: str) -> str | None:
    """Return ``3.11.7`` for a Python that runs, None for one that does not."""
    try:
        done = subprocess.run(
            [python, "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_python(minors: Iterable[int]) -> str | None:
    """Return the first ``python3.N`` that runs, of PATH and of pyenv, by the order of `minors`."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in minors:
        name = f"python3.{minor}"
        candidates = [shutil.which(name), *sorted(map(str, pyenv.glob(f"3.{minor}.*/bin/{name}")), reverse=True)]
        for candidate in filter(None, candidates):
            if version_of(candidate) is not None:  # a shim of pyenv may stand there for a version that is not chosen
                return candidate
    return None


def _run(command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip


def _fingerprint(files: Iterable[Path]) -> str:
    """Hash what decides the contents; the place counts, because an environment cannot be moved."""
    parts = [os.fsencode(ROOT), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
