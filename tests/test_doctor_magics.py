"""``%tfos_doctor`` at the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_services import FakeServices
from shell_fixture import TestingShell
from test_magics import Kernel

from tfos_magic import magics
from tfos_magic.arguments import parse_doctor
from tfos_magic.errors import ShippingError, UsageError


@pytest.fixture
def services() -> FakeServices:
    return FakeServices(found=None)


@pytest.fixture
def shell(shell: TestingShell) -> Iterator[TestingShell]:
    yield shell
    magics.unload(shell)  # ends the second interpreter; nothing_left looks


LOCK = "import threading\ncfg = {'opt': threading.Lock()}\ndef step(x): return cfg"


def test_an_expression_is_examined_in_the_notebook(shell: TestingShell) -> None:
    shell.cell(LOCK)
    output = shell.output_of("%tfos_doctor step")
    assert output.value is None
    assert "✗ step: breaks" in output.stdout
    assert "step → global cfg → key 'opt'   [lock]" in output.stdout


def test_out_binds_the_object(shell: TestingShell) -> None:
    shell.cell("import collections\nP = collections.namedtuple('P', 'x y')")
    shell.output_of("%tfos_doctor --out found [P(1, 2), P(3, 4)]")
    found = shell.user_ns["found"]
    assert (found.name, found.verdict.word) == ("[P(1, 2), P(3, 4)]", "fine")
    assert found.trip.outcome == "arrived"
    assert found.trip.is_equal is True


def test_classes_of_the_notebook_are_looked_up_in_it(shell: TestingShell) -> None:
    shell.cell("class P: pass")
    shell.cell("old = P()")
    shell.cell("class P: pass")
    assert "[class-defined-again]" in shell.output_of("%tfos_doctor old").stdout


def test_a_cell_is_examined_as_it_would_be_shipped(shell: TestingShell) -> None:
    shell.cell(f"{LOCK}\nfactor = 3")
    output = shell.output_of("%%tfos_doctor --out found\ny = factor\nstep(y)")
    assert "global step → global cfg → key 'opt'   [lock]" in output.stdout
    assert shell.user_ns["found"].pickler.startswith("cloudpickle ")
    assert "found" in shell.user_ns
    assert "y" not in shell.user_ns  # it is not run
    fine = shell.output_of("%%tfos_doctor\nimport json\njson.dumps(factor)").stdout
    assert "fine" in fine.splitlines()[0]


def test_html_comes_with_the_text(shell: TestingShell, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(shell.display_pub, "publish", lambda data, **_: shown.append(data))
    shell.cell("%tfos_doctor [1, 2]")
    assert set(shown[0]) == {"text/html", "text/plain"}
    assert shown[0]["text/html"].startswith('<div class="tfos-doctor')


class Publisher:
    """What a kernel's display publisher is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, bool]] = []

    def publish(self, data: dict[str, str], metadata: Any, transient: dict[str, str], update: bool) -> None:
        self.sent.append((data["text/plain"], transient["display_id"], update))


@pytest.fixture
def kernel(shell: TestingShell, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    publisher = Publisher()
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    monkeypatch.setattr(shell.display_pub, "publish", publisher.publish)
    return publisher


def test_what_is_known_is_shown_while_a_large_library_is_imported_elsewhere(
    shell: TestingShell, kernel: Publisher
) -> None:
    shell.cell("import tensorflow as tf\nlayer = tf.keras.layers.Dense(1)")
    shell.cell("%tfos_doctor layer")
    (first, display, is_update), (last, same_display, is_another) = kernel.sent
    assert (display, is_update, is_another) == (same_display, False, True)
    head, waiting = first.splitlines()[:2]
    assert "layer: so far " in head
    assert waiting.startswith("asking a clean second interpreter, which imports ")
    assert "keras" in waiting
    assert "a clean second interpreter  arrived in" in last
    assert "asking" not in last
    assert "so far" not in last

    kernel.sent.clear()
    shell.cell("%tfos_doctor layer")  # it is imported now
    assert [update for _, _, update in kernel.sent] == [False]


def test_an_interrupt_leaves_what_was_known(
    shell: TestingShell, kernel: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("tfos_magic.doctor.arrival.ask_second", interrupted)
    shell.cell("import pandas\nframe = pandas.DataFrame({'a': [1]})")
    assert isinstance(shell.error_of("%tfos_doctor frame").error, KeyboardInterrupt)
    last = kernel.sent[-1][0]
    assert "asking" not in last
    assert "not asked: interrupted" in last


def test_a_terminal_is_told_in_a_line_what_is_waited_for(shell: TestingShell) -> None:
    shell.cell("import pandas\nframe = pandas.DataFrame({'a': [1]})")
    lines = shell.output_of("%tfos_doctor frame").stdout.splitlines()
    assert lines[0].startswith("asking a clean second interpreter, which imports numpy, pandas")
    assert "frame: fine" in lines[1]


@pytest.mark.parametrize(
    ("line", "expression", "out"),
    [
        ("step", "step", None),
        ("lambda x: x + 1 --out d", "lambda x: x + 1", "d"),
        ("--out d [1, 2]", "[1, 2]", "d"),
        ("--out=d  f('a  b') + 'c'", "f('a  b') + 'c'", "d"),
        ("a - -b", "a - -b", None),
        ("{'a': 1}", "{'a': 1}", None),
        ("'--out'", "'--out'", None),
        ("a --out d + 1", "a + 1", "d"),
    ],
)
def test_options_may_stand_anywhere_and_the_expression_stays_as_typed(
    line: str, expression: str, out: str | None
) -> None:
    namespace: dict[str, Any] = {"step": 1, "a": 2, "b": 3, "f": str}
    wanted = parse_doctor(line, namespace, has_cell=False)
    assert (wanted.expression, wanted.out) == (expression, out)
    if "lambda" not in expression:
        assert wanted.value == eval(expression, namespace)


def test_braces_and_dollars_are_the_same_as_the_name() -> None:
    for line in ("x", "{x}", "$x"):
        assert parse_doctor(line, {"x": 5}, has_cell=False).value == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%tfos_doctor stp", "%tfos_doctor stp: name 'stp' is not defined. Did you mean 'step'?"),
        ("%tfos_doctor 1 +", "%tfos_doctor 1 +: this is no Python expression."),
        ("%tfos_doctor 1 / 0", "%tfos_doctor 1 / 0: ZeroDivisionError: division by zero"),
        ("%tfos_doctor step --executor", "Unknown option --executor. Did you mean --executors?"),
        ("%tfos_doctor step --executors", "--executors: there is no Spark session in the notebook."),
        ("%tfos_doctor step --out 3", "--out 3: a variable name is needed."),
        ("%tfos_doctor --executors", "Nothing to examine: %tfos_doctor EXPR, or %%tfos_doctor above a cell."),
        ("%%tfos_doctor step\n1", "Unexpected 'step': with a cell, the cell is examined."),
        ("%%tfos_doctor\n \n", "The cell is empty: what should be examined?"),
        ("%%tfos_doctor\nnobody_knows", "name 'nobody_knows' is neither in the cell nor in the notebook."),
    ],
)
def test_mistakes_fail_the_cell_in_one_line(shell: TestingShell, text: str, message: str) -> None:
    shell.cell("def step(x): return x")
    output = shell.error_of(text)
    assert isinstance(output.error, UsageError)
    assert message in str(output.error)
    assert "Traceback" not in output.text


@pytest.mark.parametrize("text", ["%tfos_doctor", "%tfos_doctor --help", "%%tfos_doctor --help", "%tfos_doctor x -h"])
def test_help_is_the_parser_s_text(shell: TestingShell, text: str) -> None:
    output = shell.output_of(text)
    assert "usage: %tfos_doctor EXPR [options]" in output.stdout
    assert "--executors" in output.stdout


def test_question_mark_shows_it_too(shell: TestingShell) -> None:
    assert "--executors" in shell.object_inspect_text("%tfos_doctor")


def test_names_and_options_complete(shell: TestingShell) -> None:
    shell.cell("rate_of_change = 3\nclass Rates: pass")
    assert shell.completions("%tfos_doctor rate_") == ["rate_of_change"]
    assert shell.completions("%tfos_doctor Rat") == ["Rates"]
    assert shell.completions("%tfos_doctor --ex") == ["--executors"]
    assert "rate_of_change" not in shell.completions("%%tfos_doctor ")


def test_the_second_interpreter_is_kept_between_questions_and_ends_with_the_extension(shell: TestingShell) -> None:
    owner = shell.magics_manager.magics["line"]["tfos_doctor"].__self__._doctor
    assert owner._doctor is None  # loading starts nothing
    shell.output_of("%tfos_doctor [1]")
    pid = owner._doctor.interpreter.pid
    shell.output_of("%tfos_doctor [2]")
    assert pid is not None
    assert owner._doctor.interpreter.pid == pid
    magics.unload(shell)
    assert owner._doctor is None


@pytest.mark.slow
def test_in_a_real_kernel_which_is_then_killed(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    try:
        assert kernel.run("%load_ext tfos_magic").status == "ok"
        kernel.run("import threading\ncfg = {'opt': threading.Lock()}\ndef step(x): return cfg")
        said = kernel.run("%tfos_doctor step")
        assert said.status == "ok"
        assert kernel.run("%tfos_doctor [1, 2] --out found").status == "ok"
        assert kernel.run("found").execute_result == "<Diagnosis of [1, 2]: fine>"
        owner = "get_ipython().magics_manager.magics['line']['tfos_doctor'].__self__._doctor._doctor"
        second = psutil.Process(int(kernel.run(f"{owner}.interpreter.pid").execute_result))
        wrong = kernel.run("%tfos_doctor stp")
        assert wrong.error == "UsageError: %tfos_doctor stp: name 'stp' is not defined. Did you mean 'step'?"
    finally:
        kernel.close()  # at once, as by kill -9
    gone, _ = psutil.wait_procs([second], 20)
    assert gone


# --- before anything is shipped -----------------------------------------------------------------------------


@pytest.fixture
def training(services: FakeServices, shell: TestingShell) -> TestingShell:
    services.found = "a session"
    return shell


def test_what_pickles_and_breaks_on_a_node_is_refused_before_spark_is_asked(
    services: FakeServices, training: TestingShell
) -> None:
    training.cell("import functools\n@functools.lru_cache\ndef slow(n): return n * n")
    with pytest.raises(ShippingError, match=r"(?s)global slow: this breaks on a node.*Take slow\.__wrapped__"):
        training.cell("%%tfos_train --executors 2\nslow(3)")
    assert services.calls == []


def test_what_would_be_silently_wrong_is_a_warning_with_the_cure(
    services: FakeServices, training: TestingShell
) -> None:
    training.cell("import random\nrng = random.Random(1)")
    warned = training.output_of("%%tfos_train --executors 2\nrng.random()").stderr
    assert "global rng: silently wrong." in warned
    assert len(services.calls) == 1


def test_healthy_cells_and_what_stays_behind_get_no_word(services: FakeServices, training: TestingShell) -> None:
    training.cell("import threading, numpy as np\nweights = np.ones(3)\nlock = threading.Lock()")
    output = training.output_of("%%tfos_train --executors 2\nlock = None\nweights.sum()")
    assert "silently" not in output.stderr
    assert "costly" not in output.stderr
    assert len(services.calls) == 1


def test_named_functions_are_looked_at_too(services: FakeServices, training: TestingShell) -> None:
    training.cell("import random\nrng = random.Random(1)\ndef main_fun(args, ctx): return rng.random()")
    assert "main_fun → global rng: silently wrong." in training.output_of("%tfos_train main_fun --executors 2").stderr
