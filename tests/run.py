"""Runs all checks and tests, on any machine with Python 3.10 or newer.

    python3 tests/run.py                       everything: style, types, tests
    python3 tests/run.py -m 'not slow'         arguments go to pytest
    python3 tests/run.py tests/test_cell.py

Makes `.venv` in the repository and installs what is missing, also a Java and, with apt-get, a Chromium where the
machine has none; and, if the selected tests need them, `.venv-oldest` and `.venv-pyspark32` with old versions. The
last line is pytest's; the exit status is that of the first check that failed.
"""

import sys

if sys.version_info < (3, 10):  # before anything that an older Python cannot read
    sys.exit("Python 3.10 or newer is needed, and this is {} ({}).".format(sys.version.split()[0], sys.executable))

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "demo_notebooks")]

from environment import ROOT, Environment, SetupError, find_python, say, step, version_of

CHECKS = (
    ("style", ["-m", "ruff", "check"]),
    ("format", ["-m", "ruff", "format", "--check"]),
    ("types", ["-m", "mypy", "--strict"]),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(arguments: Sequence[str]) -> int:
    """Make the environments, run the checks, then pytest with `arguments`."""
    if {"-h", "--help"} & set(arguments):
        say(str(__doc__))
        return 0
    environment = Environment(ROOT / ".venv")
    try:
        environment.install_project({"test"})
        variables = environment.variables()
        statuses = [run_check(name, environment, command, variables) for name, command in CHECKS]
        prepare(needs(environment, variables, arguments), variables)
    except SetupError as error:
        sys.exit(f"\n{error}")
    failed = [status for status in statuses if status]
    if failed:
        say(f"\n{len(failed)} of the checks above failed, so this run fails whatever the tests say.")
    status = run([str(environment.python), "-m", "pytest", *arguments], variables)
    return failed[0] if failed else status


def run_check(name: str, environment: Environment, command: Sequence[str], variables: dict[str, str]) -> int:
    """Run one of the quick checks; return its exit status."""
    say(f"\n── {name}: {' '.join(command[1:])}")
    return run([str(environment.python), *command], variables)


def run(command: Sequence[str], variables: dict[str, str]) -> int:
    """Run in the repository's root; an interrupt is for the command, which knows how to end."""
    sys.stdout.flush()
    has_terminal = sys.stdin is not None and sys.stdin.isatty()  # for pytest --pdb
    stdin = None if has_terminal else subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdin=stdin) as process:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGINT, previous)


def needs(environment: Environment, variables: dict[str, str], arguments: Sequence[str]) -> set[str]:
    """Return what the selected tests need besides `.venv`; tests/conftest.py writes it after collecting them."""
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory, "needs.json")
        asking = {**variables, "TFOS_MAGIC_NEEDS_FILE": str(answer)}
        command = [str(environment.python), "-m", "pytest", "--collect-only", "-qq", *arguments]
        subprocess.run(command, cwd=ROOT, env=asking, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        with contextlib.suppress(FileNotFoundError):  # nothing could be collected: pytest will say why
            return set(json.loads(answer.read_text(encoding="utf-8")))
    return set()


def prepare(needed: set[str], variables: dict[str, str]) -> None:
    """Make what is needed; without it the tests concerned fail on CI and where the environment was to be had."""
    if needed:
        say(f"\nThe selected tests need: {', '.join(sorted(needed))}")
    if "chromium" in needed:
        get_browser()
    if needed & {"oldest_python", "pyspark32_python"}:
        variables["TFOS_MAGIC_REQUIRE_OLDEST"] = "1"
    for name in ("oldest", "pyspark32"):
        if f"{name}_python" in needed:
            base = oldest_base()
            Environment(ROOT / f".venv-{name}", base).install_list(HERE / "environments" / f"{name}.lock")


def oldest_base() -> str:
    """Return a Python for the old versions: 3.10 if there is one, else this one, else the oldest that has them."""
    this_minor = sys.version_info.minor
    order = [10, *([this_minor] if this_minor <= 12 else []), 11, 12]
    base = find_python(order)
    if base is None:
        say(f"No Python 3.10 to 3.12 here, so the old versions are the oldest for {version_of(sys.executable)}.")
    return base or sys.executable


def get_browser() -> None:
    """Install Chromium from the system's packages where that is possible; say so where it is not."""
    if any(map(shutil.which, BROWSERS)):
        return
    prefix = root_prefix()
    if shutil.which("apt-get") is None or prefix is None:
        say("No Chromium, and no way to install one (apt-get as root). The browser tests will be skipped.")
        say("To have them: install chromium with your system's package manager.")
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with step("Installing Chromium with apt-get for the browser tests"):
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            done = subprocess.run(
                [*prefix, "apt-get", *command], env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                say(f"apt-get {command[0]} failed; without Chromium the browser tests will be skipped.\n{done.stderr}")
                return


def root_prefix() -> "list[str] | None":
    """Return what makes a command run as root without a question, None where nothing does."""
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    can = shutil.which("sudo") and subprocess.run([*sudo, "true"], capture_output=True, check=False).returncode == 0
    return sudo if can else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
