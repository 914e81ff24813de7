"""What it costs to keep a session free of the namedtuple patch: at %load_ext, for each job, for each pickled object.

    python tests/benchmarks/namedtuple.py [--rounds 5]

Each figure of the first two tables is taken in fresh processes, with and without the patch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

from benchmarks.tables import median, print_machine, print_table, spread

ROOT = Path(__file__).resolve().parents[2]
ENABLING_VARIABLE = "PYSPARK_ENABLE_NAMEDTUPLE_PATCH"
BEGIN = """
import json, sys, time
def best(call, times):
    def one():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    return min(one() for _ in range(times))
"""
LOAD = """
import contextlib, io
{imports}
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
began = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    shell.run_line_magic("load_ext", "tfos_magic")
print(json.dumps(time.perf_counter() - began))
"""
LOADS = (
    ("nothing loaded before", "", ""),
    ("PySpark loaded, not patched", "import pyspark.sql", ""),
    ("PySpark and TensorFlow loaded, not patched", "import pyspark.sql, tensorflow", ""),
    ("PySpark loaded, patched", "import pyspark.sql", "1"),
    ("PySpark and TensorFlow loaded, patched", "import pyspark.sql, tensorflow", "1"),
)
PICKLE = """
import pickle, pyspark.serializers
{prepare}
{make}
rows = [Event(i, i, i, len, (), {{}}) for i in range(20_000)]
tuples = [tuple(row) for row in rows]
data = pickle.dumps(rows, 5)
print(json.dumps({{
    "dumps": best(lambda: pickle.dumps(rows, 5), 15) / 20_000,
    "loads": best(lambda: pickle.loads(data), 15) / 20_000,
    "tuples": best(lambda: pickle.dumps(tuples, 5), 15) / 20_000,
    "bytes": len(data) / 20_000,
}}))
"""
OF_A_MODULE = "from sched import Event"
OF_MAIN = "import collections; Event = collections.namedtuple('Event', 'time priority sequence action argument kwargs')"
REVERT = "from tfos_magic import namedtuple_patch; namedtuple_patch.revert()"
PICKLES = (
    ("of a module, never patched", "", OF_A_MODULE, ""),
    ("of a module, patched", "", OF_A_MODULE, "1"),
    ("of a module, made after %load_ext", REVERT, OF_A_MODULE, "1"),
    ("of a module, made before it", f"import sched; {REVERT}", OF_A_MODULE, "1"),
    ("of the notebook, never patched", "", OF_MAIN, ""),
    ("of the notebook, patched", "", OF_MAIN, "1"),
    ("of the notebook, made after %load_ext", REVERT, OF_MAIN, "1"),
)
JOBS = """
from benchmarks.tables import local_spark
from tfos_magic import namedtuple_patch
from tfos_magic.namedtuple_jobs import CleanJobs
spark = local_spark(2)
context = spark.sparkContext
jobs = CleanJobs()
def job():
    context.parallelize(range(2), 2).map(lambda number: number).collect()
def command(times):
    prepare = __import__("pyspark.core.rdd").core.rdd._prepare_for_python_RDD
    return best(lambda: prepare(context, (len, None, None, None)), times), len(prepare(context, (len, None))[0])
def timed(times):
    found = []
    for _ in range(times):
        began = time.perf_counter()
        job()
        found.append(time.perf_counter() - began)
    return sorted(found)[times // 2]
off, on = [], []
def measure_off():
    jobs.close()
    job()
    off.append(timed(20))
def measure_on():
    jobs.start()
    job()
    on.append(timed(20))
timed(100)
plain = command(200)
namedtuple_patch.revert()
for number in range({pairs}):  # taking turns in who begins: a JVM goes on getting faster for a long time
    for measure in (measure_off, measure_on)[:: 1 if number % 2 else -1]:
        measure()
jobs.start()
print(json.dumps({{"off": off, "on": on, "command off": plain, "command on": command(200)}}))
spark.stop()
"""


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as bytecode:  # which an installed package has
        os.environ["PYTHONPYCACHEPREFIX"] = bytecode
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        measure(options.rounds)


def measure(rounds: int) -> None:
    """Print the tables."""
    print_table("%load_ext tfos_magic", load_rows(rounds))
    print_table("Plain pickle of namedtuples, per object", pickle_rows(rounds))
    for variable, title in (("", "executors not patched"), ("1", "executors patched")):
        print_table(f"Ordinary Spark jobs of two tasks, {title}", job_rows(rounds, variable))


def load_rows(rounds: int) -> list[tuple[str, ...]]:
    """Return how long the extension takes to load, by what the kernel has loaded."""
    rows: list[tuple[str, ...]] = [("the kernel has", "ms", "min-max")]
    for name, imports, variable in LOADS:
        found = [1000 * run(LOAD.format(imports=imports), variable) for _ in range(rounds + 1)][1:]
        rows.append((name, f"{median(found):.0f}", spread(found)))
    return rows


def pickle_rows(rounds: int) -> list[tuple[str, ...]]:
    """Return what one object costs."""
    rows: list[tuple[str, ...]] = [("namedtuple is", "dumps ns", "min-max", "loads ns", "bytes", "a tuple's dumps ns")]
    for name, prepare, make, variable in PICKLES:
        found = [run(PICKLE.format(prepare=prepare, make=make), variable) for _ in range(rounds)]
        dumps, loads, tuples = ([1e9 * each[key] for each in found] for key in ("dumps", "loads", "tuples"))
        figures = (median(dumps), spread(dumps), median(loads), found[0]["bytes"], median(tuples))
        rows.append((name, *(text if isinstance(text, str) else f"{text:.0f}" for text in figures)))
    return rows


def job_rows(rounds: int, variable: str) -> list[tuple[str, ...]]:
    """Return what one job costs, with the revert and without, in turn."""
    found = run(JOBS.format(pairs=rounds), variable)
    ratios = [on / off for on, off in zip(found["on"], found["off"], strict=True)]
    rows: list[tuple[str, ...]] = [("jobs are", "ms a job", "ratio", "min-max", "ms to pickle a command", "its bytes")]
    for name, key in (("as they are", "off"), ("kept clean", "on")):
        seconds, size = found[f"command {key}"]
        ratio = ("1.00", "") if key == "off" else (f"{median(ratios):.2f}", spread(ratios))
        rows.append((name, f"{1000 * median(found[key]):.1f}", *ratio, f"{1000 * seconds:.2f}", f"{size:,}"))
    return rows


def run(code: str, variable: str) -> Any:
    """Run code in a fresh process and return the JSON of its last line."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environ = {**os.environ, ENABLING_VARIABLE: variable, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
