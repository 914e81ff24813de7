"""Runs the scripts of ``namedtuple_scripts/``, each in a process of its own: a process can be patched only once."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfos_magic.namedtuple_patch import ENABLING_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(__file__).resolve().parent / "namedtuple_scripts"
# What Spark 3.2 wants of Java 17; those after the first are for the partitions of a union.
JAVA_17_OPTIONS = " ".join(
    f"--add-{kind}=java.base/{package}=ALL-UNNAMED"
    for kind, package in (
        ("exports", "sun.nio.ch"),
        ("opens", "java.nio"),
        ("opens", "java.util"),
        ("opens", "java.lang"),
        ("opens", "java.lang.invoke"),
    )
)

Run = Callable[..., dict[str, Any]]


def make_run(python: str, environ: dict[str, str], *paths: Path) -> Run:
    """Return what runs a script or code with `python` and reads the JSON in its last line."""

    def run(script: str, *args: str, timeout: float = 100, with_package: bool = True) -> dict[str, Any]:
        command = [python, str(SCRIPTS / script)] if script.endswith(".py") else [python, "-c", script]
        path = os.pathsep.join(map(str, [*paths, ROOT] if with_package else paths))
        env = {**os.environ, "PYTHONPATH": path, "PYSPARK_PYTHON": python, **environ}
        done = subprocess.run([*command, *args], env=env, capture_output=True, text=True, timeout=timeout, cwd="/")
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    return run


def run_with_pyspark32(python: Path) -> Run:
    """Return the same for an environment with PySpark 3.2, which patches always."""
    environ = {"JDK_JAVA_OPTIONS": JAVA_17_OPTIONS, ENABLING_VARIABLE: ""}
    is_old = (python.parents[1] / "lib" / "python3.10").exists()
    return make_run(str(python), environ, *([] if is_old else [SCRIPTS / "with_cloudpickle3"]))
