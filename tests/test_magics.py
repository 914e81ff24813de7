from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from child_fixture import Child
from fake_services import FakeServices
from shell_fixture import TestingShell, running_shell

import tfos_magic
from tfos_magic import magics, shipping
from tfos_magic.errors import NodeError, RemoteException, RemoteFrame, SessionError, ShippingError, UsageError

PACKAGE_ROOT = Path(tfos_magic.__file__).parents[1]


def last_call(services: FakeServices) -> SimpleNamespace:
    return services.calls[-1]


# --- coming and going ----------------------------------------------------------------------------------------


def state_of(shell: TestingShell) -> tuple[Any, ...]:
    manager = shell.magics_manager
    return (
        {kind: dict(table) for kind, table in manager.magics.items()},
        list(shell.input_transformers_cleanup),
        list(shell.Completer.custom_matchers),
        {name: list(callbacks) for name, callbacks in shell.events.callbacks.items()},
        set(shell.user_ns),
        {name for name in vars(manager.user_magics) if name.startswith("tfos")},
        shell.custom_exceptions,
    )


def test_unload_takes_back_everything_that_load_has_put_there(services: FakeServices, capsys: Any) -> None:
    with running_shell() as shell:
        before = state_of(shell)
        magics.load(shell, services)  # type: ignore[arg-type]
        assert state_of(shell) != before
        magics.load(shell, services)  # type: ignore[arg-type]  # twice is once
        assert len(shell.Completer.custom_matchers) == len(before[2]) + 1
        magics.unload(shell)
        assert state_of(shell) == before
        assert services.said[-2:] == ["jobs as they are", "restore"]
        magics.unload(shell)  # nothing there: nothing happens


def test_jobs_are_kept_clean_until_unload_which_puts_workers_back(services: FakeServices, capsys: Any) -> None:
    with running_shell() as shell:
        magics.load(shell, services)  # type: ignore[arg-type]
        assert services.said == ["revert", "jobs clean"]
        services.touched = ["a context"]
        magics.unload(shell)
        assert services.said[2:] == ["jobs as they are", "restore", "restore workers"]


def test_load_says_in_one_line_what_is_ready(services: FakeServices, capsys: Any) -> None:
    services.found = SimpleNamespace(sparkContext=SimpleNamespace(master="local[4]"))
    with running_shell() as shell:
        magics.load(shell, services)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    session = r"(no Spark session yet|Spark session on local\[4\])"  # tests before this one may have imported PySpark
    pattern = rf"tfos_magic \S+: TensorFlow \d\S+, PySpark \d\S+; namedtuple patch: revert; {session}\n"
    assert re.fullmatch(pattern, said)


def test_loading_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
    import sys
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    before = set(sys.modules)
    shell.run_line_magic("load_ext", "tfos_magic")
    print(sorted({"pyspark", "tensorflow", "keras", "pyarrow", "numpy", "ipywidgets"} & (set(sys.modules) - before)))
    shell.run_line_magic("unload_ext", "tfos_magic")
    """
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- a run ---------------------------------------------------------------------------------------------------


def test_a_cell_is_packed_and_run_with_its_options(shell: TestingShell, services: FakeServices, tmp_path: Path) -> None:
    shell.cell("factor = 3\ndef times(x):\n    return x * factor")
    assert (
        shell.cell("%%tfos_train -n 2 --epochs 4 --args {'rate': factor}\ntimes(args.epochs), args.rate, ctx")
        == "the result"
    )
    call = last_call(services)
    assert (call.options.num_nodes, call.options.epochs, call.options.batch_size) == (2, 4, 64)
    assert (call.spark, call.data) == ("a session", {})
    assert Child(tmp_path).run_raw(call.payload)
    assert shipping.unpack_result(Child(tmp_path).run_raw(call.payload)) == (12, 3, "ctx")
    assert sorted(call.cell_names.values()) == ["Cell In[1]", "Cell In[2]"]


def test_args_of_the_user_win_over_options(shell: TestingShell, services: FakeServices) -> None:
    shell.cell("%%tfos_train -n 2 --epochs 4 --args {'epochs': 9, 'x': 1}\n1")
    _, args = shipping.unpack_call(last_call(services).payload.data)
    assert (args.epochs, args.x, args.batch_size) == (9, 1, 64)


def test_the_result_is_bound_or_shown_but_not_both(shell: TestingShell) -> None:
    names = set(shell.user_ns)
    assert shell.cell("%%tfos_train -n 2 --out r\n1") is None
    assert shell.cell("r") == "the result"
    assert shell.cell("%%tfos_train -n 2\n1;") is None
    assert shell.cell("%%tfos_train -n 2 --quiet\n1") is None
    assert shell.cell("%%tfos_train -n 2\n1") == "the result"
    assert {n for n in set(shell.user_ns) - names if not re.fullmatch(r"_+|_i+|_i?\d+", n)} == {"r"}


def test_the_board_is_told_to_be_quiet(shell: TestingShell, services: FakeServices) -> None:
    shell.cell("%%tfos_train -n 2 --quiet\n1")
    assert services.boards[-1] == (last_call(services).board, True)


def test_a_function_of_the_notebook_runs_by_name(shell: TestingShell, services: FakeServices, tmp_path: Path) -> None:
    shell.cell("k = 5\ndef main_fun(args, ctx):\n    return args.epochs * k")
    assert shell.cell("%tfos_train --executors 2 --epochs 3 main_fun") == "the result"
    assert shipping.unpack_result(Child(tmp_path).run_raw(last_call(services).payload)) == 15
    assert last_call(services).cell_names == {next(iter(last_call(services).payload.sources)): "Cell In[1]"}


def test_a_session_is_made_when_there_is_none(shell: TestingShell, services: FakeServices) -> None:
    services.found = None
    output = shell.output_of("%%tfos_train -n 3\n1")
    assert "No Spark session in the notebook: starting a local one with 4 slots (local[4])." in output.stdout
    assert last_call(services).spark == "local[4]"


def test_a_dry_run_shows_what_would_travel_and_starts_nothing(shell: TestingShell, services: FakeServices) -> None:
    shell.cell("import numpy as np\nblock = bytes(20_000)\ndef helper(): return block")
    output = shell.output_of("%%tfos_train -n 2 --dry-run\nhelper(), np.ones(2)")
    assert re.search(r"helper +function +20,\d{3} +by value", output.stdout)
    assert re.search(r"np +module +\d+ +by import of numpy", output.stdout)
    assert "the plan" in output.stdout
    assert services.calls == []
    services.found = None
    assert "a local one would start with 3 slots" in shell.output_of("%%tfos_train -n 2 --dry-run\n1").stdout


def test_costly_objects_are_warned_of_on_stderr(shell: TestingShell) -> None:
    shell.cell("block = bytes(20_000_000)")
    assert "warning: block adds 20 MB" in shell.output_of("%%tfos_train -n 2\nlen(block)").stderr


@pytest.mark.parametrize(
    ("line", "body", "serves_itself"),
    [
        ("-n 3 --ps 1", "1", False),
        ("-n 3 --ps 1 --no-chief", "1", True),
        ("-n 3 --ps 1", "def f(args, ctx): return 1", True),
        ("-n 3", "1", True),
    ],
)
def test_parameter_servers_of_a_body_only_serve(
    shell: TestingShell, services: FakeServices, line: str, body: str, serves_itself: bool
) -> None:
    shell.cell(f"%%tfos_train {line}\n{body}")
    assert last_call(services).options.serves_itself is serves_itself


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%%tfos_train --executor 2\n1", "Unknown option --executor. Did you mean --executors?"),
        ("%%tfos_train -n 2\n  \n", "The cell is empty: what should the nodes run?"),
        ("%%tfos_train -n 2 helper\n1", "Unexpected 'helper': with a cell, the cell is the function."),
        ("%tfos_train -n 2", "Nothing to run: give the name of a function"),
        ("%tfos_train -n 2 helpr", "NAME helpr: the notebook has no such function. Did you mean 'helper'?"),
        ("%tfos_train -n 2 helper", "NAME helper: a function of (args, ctx) is needed, not helper(x)."),
        ("%tfos_train -n 2 five", "NAME five: a function of (args, ctx) is needed, not int."),
        ("%tfos_namedtuple revrt", "%tfos_namedtuple revrt: no such action. Did you mean revert?"),
        ("%tfos_namedtuple --drivr", "%tfos_namedtuple --drivr: no such option. Did you mean --driver?"),
        ("%tfos_namedtuple --out", "--out: the name of a variable is needed."),
        ("%tfos_namedtuple --out 2x", "--out 2x: the name of a variable is needed."),
        ("%tfos_namedtuple revert restore", "%tfos_namedtuple revert restore: one action at a time."),
    ],
)
def test_mistakes_fail_the_cell_in_one_line_without_a_traceback(
    shell: TestingShell, services: FakeServices, text: str, message: str
) -> None:
    shell.cell("def helper(x): return x\nfive = 5")
    output = shell.error_of(text)
    assert isinstance(output.error, UsageError)
    assert message in str(output.error)
    assert output.text.strip() == f"UsageError: {output.error}"
    assert services.calls == []


def test_what_cannot_travel_is_said_before_spark_is_asked(shell: TestingShell, services: FakeServices) -> None:
    services.session.find_session = pytest.fail
    shell.cell("import threading\ncfg = {'opt': threading.Lock()}\ndef step(): return cfg")
    output = shell.error_of("%%tfos_train -n 2\n\nstep()")
    assert isinstance(output.error, ShippingError)
    assert 'Cell In[2], line 3: step → cfg["opt"] cannot travel' in output.text
    assert "Traceback" not in output.text


def test_a_syntax_error_shows_the_cell_s_own_line(shell: TestingShell) -> None:
    output = shell.error_of("%%tfos_train -n 2\nx = 1\ny = (1,\nz = 2")
    assert isinstance(output.error, UsageError)
    assert "Cell In[1], line 3\n    y = (1,\n" in output.text
    assert "SyntaxError: '(' was never closed" in output.text
    assert "map_function" not in output.text  # none of our frames


def test_return_in_a_cell_is_answered_with_what_to_do(shell: TestingShell) -> None:
    output = shell.error_of("%%tfos_train -n 2\nx = 1\nreturn x")
    assert "line 3\n    return x" in output.text
    assert "last expression" in output.text


def test_a_node_s_error_shows_its_own_traceback_alone(shell: TestingShell, services: FakeServices) -> None:
    remote = RemoteException("ValueError", "no", (RemoteFrame("f", 3, "<module>", "raise ValueError('no')"),))
    services.outcome = NodeError(
        "worker:0 failed.", node="worker:0", host="h", remote=remote, cell_names={"f": "Cell In[1]"}
    )
    output = shell.error_of("%%tfos_train -n 2\n1")
    assert "Cell In[1], line 3, in <module>\n    raise ValueError('no')" in output.text
    assert "run_cell_magic" not in output.text


def test_an_interrupt_stays_an_interrupt(shell: TestingShell, services: FakeServices) -> None:
    services.outcome = KeyboardInterrupt()
    assert isinstance(shell.error_of("%%tfos_train -n 2 --out r\n1").error, KeyboardInterrupt)
    assert "r" not in shell.user_ns
    services.outcome = "again"
    assert shell.cell("%%tfos_train -n 2\n1") == "again"


# --- help and completion -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["%tfos_train --help", "%%tfos_train --help", "%tfos_train", "%%tfos_train -n 2 --help\n1"]
)
def test_help_is_the_parser_s_text(shell: TestingShell, text: str) -> None:
    output = shell.output_of(text)
    assert "usage: %%tfos_train --executors N [options]" in output.stdout
    assert "--batch-size N" in output.stdout
    assert output.stderr == ""


def test_question_mark_shows_the_same_text(shell: TestingShell) -> None:
    for magic in ("%tfos_train", "%%tfos_train"):
        text = shell.object_inspect_text(magic)
        assert "--batch-size N" in text
    assert "[status | revert | restore] [--driver] [--out NAME]" in shell.object_inspect_text("%tfos_namedtuple")


def test_options_and_names_complete(shell: TestingShell) -> None:
    shell.cell("params = {'a': 1}\ndef main_fun(args, ctx): ...")
    assert shell.completions("%%tfos_train --ep") == ["--epochs"]
    assert shell.completions("%%tfos_train --args ") == ["params"]
    assert "main_fun" in shell.completions("%tfos_train -n 2 ma")
    assert shell.completions("%tfos_namedtuple st") == ["status"]
    assert shell.completions("%tfos_namedtuple revert --d") == ["--driver"]
    assert "params" in shell.completions("x = 1\npar")


def test_namedtuple_magic_is_thin(shell: TestingShell, services: FakeServices) -> None:
    for text, action in (("", "survey"), ("revert", "revert"), ("restore", "restore")):
        shown = shell.output_of(f"%tfos_namedtuple {text}").stdout
        assert shown.startswith("namedtuple patch: driver off, kept off; jobs run as they are\nprocess ")
        assert services.said[-1] == f"{action} of a session"
    assert set(services.asked[-1]) == {"jobs", "nodes"}
    shell.cell("%tfos_namedtuple status --out state")
    assert shell.user_ns["state"].driver.state == "off, kept off"


def test_namedtuple_magic_can_leave_spark_alone(shell: TestingShell, services: FakeServices) -> None:
    services.session.find_session = pytest.fail
    for text, action in (("--driver", "status"), ("revert --driver", "revert"), ("--driver restore", "restore")):
        assert shell.output_of(f"%tfos_namedtuple {text}").stdout == f"namedtuple patch: {action}\n"
        assert services.said[-1] == action


def test_namedtuple_magic_says_what_spark_connect_makes_impossible(shell: TestingShell, services: FakeServices) -> None:
    def refuse(namespace: Any) -> None:
        raise SessionError("spark is a Spark Connect session, which has no SparkContext to run nodes on.")

    services.session.find_session = refuse
    shown = shell.output_of("%tfos_namedtuple").stdout
    assert services.said[-1] == "survey of None"
    assert shown.splitlines()[-1].startswith("spark is a Spark Connect session")
    assert "Only the driver was asked" in shown


def test_namedtuple_table_is_escaped_html_and_text(shell: TestingShell, services: FakeServices) -> None:
    published: list[dict[str, str]] = []
    shell.display_pub.publish = lambda data, metadata, **more: published.append(data)
    shell.cell("%tfos_namedtuple")
    assert "&lt;why&gt;" in published[0]["text/html"] and "<why>" not in published[0]["text/html"]
    assert "<why>" in published[0]["text/plain"]


# --- a real kernel -------------------------------------------------------------------------------------------

_INJECT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_services import FakeServices
from tfos_magic import magics
services = FakeServices()
magics.load(get_ipython(), services)
"""


class Kernel:
    """A kernel in a process of its own, as notebooks have."""

    def __init__(self, directory: Path) -> None:
        from jupyter_client.manager import KernelManager

        self._manager = KernelManager()
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "IPYTHONDIR": str(directory)}
        self._manager.start_kernel(
            extra_arguments=["--HistoryManager.enabled=False"], env=environment, cwd=str(directory)
        )
        self.client = self._manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, text: str) -> SimpleNamespace:
        seen: dict[str, list[str]] = {"stream": [], "error": [], "execute_result": []}

        def note(message: dict[str, Any]) -> None:
            content = message["content"]
            kind = message["header"]["msg_type"]
            if kind == "error":
                seen["error"].append("\n".join(content["traceback"]))
            elif kind in seen:
                seen[kind].append(content.get("text") or content["data"]["text/plain"])

        reply = self.client.execute_interactive(text, timeout=60, output_hook=note)["content"]
        return SimpleNamespace(status=reply["status"], **{kind: "".join(parts) for kind, parts in seen.items()})

    def close(self) -> None:
        self.client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()
        self._manager.context.destroy(linger=0)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    running = Kernel(tmp_path)
    try:
        assert running.run(_INJECT).status == "ok"
        yield running
    finally:
        running.close()


@pytest.mark.slow
def test_in_a_real_kernel(kernel: Kernel) -> None:
    assert kernel.run("def helper():\n    return 1").status == "ok"

    wrong = kernel.run("%%tfos_train -n 2\nx = 1\nhelpr()")
    fact = "Cell In[3], line 3: name 'helpr' is neither in the cell nor in the notebook. Did you mean 'helper'?"
    assert (wrong.status, wrong.error) == ("error", f"UsageError: {fact}")

    assert kernel.run("%%tfos_train -n 2\nx = 1\nhelper()").execute_result == "'the result'"
    names = kernel.run("sorted(services.calls[-1].cell_names.values())")
    assert names.execute_result == "['Cell In[2]', 'Cell In[4]']"
    assert kernel.run("all('ipykernel' in name for name in services.calls[-1].cell_names)").execute_result == "True"

    syntax = kernel.run("%%tfos_train -n 2\nx = 1\ny = = 2")
    assert syntax.status == "error"
    assert "y = = 2" in syntax.error

    assert "--batch-size N" in kernel.run("%%tfos_train --help").stream
    completed = kernel.client.complete("%%tfos_train --ep\nx = 1", 17, reply=True, timeout=30)["content"]
    assert (completed["matches"], completed["cursor_start"]) == (["--epochs"], 13)
    inspected = kernel.client.inspect("%%tfos_train", 8, reply=True, timeout=30)["content"]
    assert "--batch-size N" in inspected["data"]["text/plain"]
    asked = kernel.client.execute("%tfos_train?", reply=True, timeout=30)["content"]
    assert "--batch-size N" in asked["payload"][0]["data"]["text/plain"]

    assert kernel.run("magics.unload(get_ipython())").status == "ok"
    assert "not found" in kernel.run("%tfos_train --help").stream


@pytest.mark.slow
def test_in_a_terminal(tmp_path: Path) -> None:
    """IPython on a pseudo-terminal, typed at."""
    startup = tmp_path / "startup.py"
    startup.write_text(_INJECT)
    options = [
        "--no-banner",
        "--colors=nocolor",
        "--HistoryManager.enabled=False",
        "--simple-prompt",
        "-i",
        str(startup),
    ]
    parent, end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "IPYTHONDIR": str(tmp_path), "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-m", "IPython", *options], stdin=end, stdout=end, stderr=end, env=environment, close_fds=True
    )
    os.close(end)
    try:
        read_until(parent, "In [1]:")
        os.write(parent, b"%%tfos_train --executor 2\nhelper()\n\n\n")
        assert "UsageError: Unknown option --executor. Did you mean --executors?" in read_until(parent, "In [2]:")
        os.write(parent, b"%%tfos_train -n 2\n1 + 1\n\n\n")
        assert "Out[2]: 'the result'" in read_until(parent, "In [3]:")
        os.write(parent, b"%tfos_train --help\n")
        assert "--batch-size N" in read_until(parent, "In [4]:")
        os.write(parent, b"exit\n")
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def read_until(descriptor: int, words: str, timeout_s: float = 60) -> str:
    text, deadline = "", time.monotonic() + timeout_s
    while words not in text:
        ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {words!r} in:\n{text}"
        text += os.read(descriptor, 4096).decode(errors="replace")
    return text
