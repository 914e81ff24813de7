"""What nodes can be to each other but synchronous: points of a grid, parameter servers, an evaluator."""

from __future__ import annotations

import os
import pickle
import subprocess
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_services import FakeServices
from runs import FILENAME, LABEL, run_cell
from shell_fixture import TestingShell
from test_tensorboard import logged, scalars

from tfos_magic import cell, cluster, grid, shipping
from tfos_magic.errors import (
    NodeError,
    NodeKilledError,
    RunInterrupted,
    RunStoppedError,
    ShippingError,
    UsageError,
)
from tfos_magic.result import RunResult
from tfos_magic.status import (
    Event,
    MetricsReported,
    NodeChanged,
    NodeState,
    NodeView,
    PhaseChanged,
    RunPlanned,
    StatusBoard,
)
from tfos_magic.widgets.html import render_html
from tfos_magic.widgets.text import render_text

TENSORFLOW = ("tensorflow",)
README = Path(__file__).resolve().parents[1] / "README.md"


def readme_cell(first_line: str) -> str:
    """Return the body of the README's cell that begins so."""
    blocks = README.read_text(encoding="utf-8").split("```")[1::2]
    [block] = [block.strip() for block in blocks if block.strip().startswith(first_line)]
    return block.partition("\n")[2]


def run_grid(
    spark: Any,
    body: str,
    points: Sequence[dict[str, Any]],
    *,
    stop: threading.Event | None = None,
    on_event: Callable[[Event], None] | None = None,
    **options: Any,
) -> RunResult:
    """Run a cell's text at each point, as ``%%tfos_train --independent --grid`` does."""
    function = cell.map_function(textwrap.dedent(body).strip(), {}, filename=FILENAME, label=LABEL)
    payload = shipping.pack(function, args=SimpleNamespace(epochs=3, rate=0.5), grid=tuple(points))
    chosen = cluster.RunOptions(
        num_nodes=len(points),
        chief=False,
        is_independent=True,
        waits_for_all=False,
        grid=tuple(points),
        **{"preload": (), "timeout_s": 120.0, **options},
    )
    return cluster.run(spark, payload, chosen, cell_names={FILENAME: LABEL}, stop=stop, on_event=on_event)


def body_of(text: str) -> str:
    return textwrap.dedent(text).strip()


# --- a grid -------------------------------------------------------------------------------------------------------


def test_each_node_has_its_point_in_args_and_more_points_than_slots_take_turns(spark_local4: Any) -> None:
    points = [{"rate": number / 10, "what": {number, "b"}} for number in range(6)]
    result = run_grid(
        spark_local4,
        """
        for step in range(3):
            ctx.report(step=step, loss=step + args.rate)
        ctx.executor_id, args.rate, args.what, args.epochs, ctx.point == {"rate": args.rate, "what": args.what}
        """,
        points,
    )
    assert result.values == [(n, n / 10, {n, "b"}, 3, True) for n in range(6)]
    assert result.grid == tuple(points)
    assert result.histories == tuple({"loss": (n / 10, 1 + n / 10, 2 + n / 10)} for n in range(6))
    assert result.history == {}
    assert [node.point for node in result.board.view().nodes] == [grid.told(point) for point in points]


def test_the_node_that_fails_is_named_with_its_point(spark_local4: Any) -> None:
    body = """
    if args.units == 8:
        raise ValueError("eight")
    """
    with pytest.raises(NodeError, match=r"worker:1 \(rate=0.1, units=8\) on .* raised ValueError") as caught:
        run_grid(spark_local4, body, [{"rate": 0.1, "units": units} for units in (4, 8)])
    assert caught.value.node == "worker:1"
    assert run_cell(spark_local4, "ctx.executor_id", 2).values == [0, 1]


def test_a_point_that_fails_leaves_the_others_and_their_values(spark_local4: Any) -> None:
    body = """
    import os, signal, time
    if args.n == 1:
        raise ValueError("one")
    if args.n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    print("still here")
    {"n": args.n}
    """
    with pytest.raises(NodeError, match=r"worker:1 \(n=1\) on .* raised ValueError") as caught:
        run_grid(spark_local4, body, [{"n": n} for n in range(8)])
    assert "2 of 8 points failed; the others are done." in str(caught.value)
    assert "worker:2 (n=2) failed too" in str(caught.value)
    found = caught.value.partial
    assert found is not None
    assert found.values == [None if n in (1, 2) else {"n": n} for n in range(8)]
    assert found.missing == {
        "worker:1": "failed: ValueError: one",
        "worker:2": "failed: was killed by signal 9 (SIGKILL) (out of memory?)",
    }
    assert "n=1  →  (failed: ValueError: one)" in repr(found)
    assert found.logs["worker:7"][-1] == "still here"
    states = [node.state for node in found.board.view().nodes]
    assert states == [NodeState.FAILED if n in (1, 2) else NodeState.DONE for n in range(8)]
    assert pickle.loads(pickle.dumps(caught.value)).partial is None


def test_a_grid_that_is_stopped_leaves_what_was_done(spark_local4: Any) -> None:
    stop = threading.Event()

    def watch(event: Event) -> None:
        if isinstance(event, NodeChanged) and (event.node, event.state) == ("worker:0", NodeState.DONE):
            stop.set()

    body = "import time\ntime.sleep(60 if args.n else 0)\nargs.n"
    with pytest.raises(RunStoppedError) as caught:
        run_grid(spark_local4, body, [{"n": n} for n in range(6)], stop=stop, on_event=watch)
    found = caught.value.partial
    assert found is not None
    assert found.values == [0, *[None] * 5]
    assert set(found.missing) == {f"worker:{n}" for n in range(1, 6)}
    assert found.missing["worker:1"] == "stopped"
    assert set(found.missing.values()) == {"stopped", "not begun"}


def test_the_node_that_is_killed_is_named_with_its_point(spark_local4: Any) -> None:
    body = "import os, signal; os.kill(os.getpid(), signal.SIGKILL) if args.n else None"
    with pytest.raises(NodeKilledError, match=r"worker:1 \(n=1\) on .* was killed by signal 9"):
        run_grid(spark_local4, body, [{"n": 0}, {"n": 1}])


def test_a_point_that_cannot_travel_is_named_before_anything_starts() -> None:
    function = cell.map_function("args.lock", {}, filename=FILENAME, label=LABEL)
    with pytest.raises(ShippingError, match="lock") as caught:
        shipping.pack(function, args=SimpleNamespace(), grid=({"lock": 1}, {"lock": threading.Lock()}))
    assert caught.value.path.startswith("grid")


def test_a_grid_has_as_many_points_as_there_are_independent_nodes() -> None:
    points = ({"n": 1}, {"n": 2})
    with pytest.raises(UsageError, match="2 points for 3 independent nodes"):
        cluster.RunOptions(num_nodes=3, chief=False, is_independent=True, grid=points)
    with pytest.raises(UsageError, match="2 points for 2 nodes that train together"):
        cluster.RunOptions(num_nodes=2, grid=points)


@pytest.mark.slow
def test_distribute_on_an_independent_node_is_plain_keras(spark_local4: Any) -> None:
    body = """
    import keras, numpy as np

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(args.units), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(args.rate), "mse")
    ctx.distribute(model)
    fit = model.fit(np.ones((32, 4)), np.ones((32, 1)), epochs=args.epochs, verbose=0)
    ctx.num_nodes, ctx.is_chief, model.count_params(), fit.history["loss"]
    """
    points = [{"units": 2}, {"units": 3, "epochs": 2}, {"units": 4, "rate": 0.0}]
    result = run_grid(spark_local4, body, points, preload=TENSORFLOW)
    assert [value[:3] for value in result.values] == [(1, True, 13), (1, True, 19), (1, True, 25)]
    for value, history in zip(result.values, result.histories, strict=True):
        assert list(history["loss"]) == pytest.approx(value[3])
    assert [len(history["loss"]) for history in result.histories] == [3, 2, 3]
    flat = result.histories[2]["loss"]
    assert flat[0] == flat[2]
    assert result.history == {}


@pytest.mark.slow
def test_the_grid_of_the_readme(spark_local4: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.ones((64, 2), "float32"), y=np.ones((64, 1), "float32"))
    body = f"args.path = {str(tmp_path / 'rows.npz')!r}\n{readme_cell('%%tfos_train --independent')}"
    points = [{"rate": 0.1, "units": 16}, {"rate": 0.0, "units": 8}]
    result = run_grid(spark_local4, body, points, preload=TENSORFLOW)
    learned, stayed = result.values
    assert learned < stayed
    assert [len(history["loss"]) for history in result.histories] == [5, 5]


def independent_board() -> StatusBoard:
    board = StatusBoard()
    points = ("rate=0.1", "rate=<b>0.2")
    board.apply(RunPlanned("grid", ("worker:0", "worker:1"), epochs=2, is_independent=True, points=points))
    board.apply(PhaseChanged("running"))
    for node in ("worker:0", "worker:1"):
        board.apply(NodeChanged(node, NodeState.RUNNING, "host"))
    return board


def test_the_board_shows_the_points_and_no_mean_over_them() -> None:
    board = independent_board()
    for node, loss in (("worker:0", 1.0), ("worker:1", 3.0)):
        board.apply(MetricsReported(node, {"loss": loss}, step=1))
        board.apply(MetricsReported(node, {"loss": loss / 2, "val_loss": loss}, epoch=1))
    board.apply(MetricsReported("worker:0", {"loss": 0.25}, epoch=2))
    view = board.view()
    assert (view.history, view.trace, view.epoch) == ({}, {}, None)
    text, html = render_text(view), render_html(view)
    assert "rate=0.1  │  step 1  loss 0.2500" in text
    assert "<b>rate=0.1</b>" in html
    assert "rate=&lt;b&gt;0.2" in html
    first, second = board.histories().values()
    assert first["loss"] == (0.5, 0.25)
    assert first["val_loss"][0] == 1.0
    assert np.isnan(first["val_loss"][1])
    assert second == {"loss": (1.5,), "val_loss": (3.0,)}


def test_event_files_of_independent_nodes_are_apart(tmp_path: Path) -> None:
    nodes = ("worker:0", "worker:1")
    events: list[Event] = [RunPlanned("grid", nodes, epochs=2, is_independent=True)]
    for number, node in enumerate(nodes):
        events.append(MetricsReported(node, {"loss": number + 0.5, "val_loss": number + 0.25}, epoch=1))
    directory = logged(tmp_path, events)
    for number in range(2):
        assert scalars(directory / f"worker-{number}" / "train") == {"epoch_loss": [(0, number + 0.5)]}
        assert scalars(directory / f"worker-{number}" / "validation") == {"epoch_loss": [(0, number + 0.25)]}


def test_nodes_that_train_together_have_one_history() -> None:
    board = StatusBoard()
    board.apply(RunPlanned("together", ("chief:0", "worker:0")))
    board.apply(MetricsReported("chief:0", {"loss": 1.0}, epoch=1))
    assert board.histories() == {}
    assert RunResult((), board.view().history, {}, board).histories == ()
    assert NodeView("chief:0").point == ""


def test_the_result_shows_which_point_gave_what() -> None:
    values = [0.5, "<b>"]
    nodes: Any = tuple(SimpleNamespace(name=f"worker:{n}") for n in range(2))
    points = ({"rate": 0.1}, {"rate": 0.01, "units": 64})
    result = RunResult(nodes, {}, {"total": 2.0}, independent_board(), _values=values, grid=points)
    assert repr(result).split("\n") == [
        "<RunResult: 2 nodes, 2.0 s, grid:",
        "  rate=0.1             →  0.5",
        "  rate=0.01, units=64  →  '<b>'",
        ">",
    ]
    html = result._repr_html_()
    assert "<td>rate=0.01, units=64</td>" in html
    assert "<b>" not in html


# --- the magic's line ---------------------------------------------------------------------------------------------


LINE = '%%tfos_train --independent --grid {"rate": [0.1, 0.2], "units": [4, 8, 16]}'


def test_the_line_makes_a_node_for_each_point(shell: TestingShell, services: FakeServices) -> None:
    shell.output_of(f"{LINE} --epochs 7\nargs.rate")
    call = services.calls[-1]
    options = call.options
    assert (options.num_nodes, options.is_independent, options.waits_for_all, options.chief) == (6, True, False, False)
    assert options.grid[1] == {"rate": 0.1, "units": 8}
    _, args, point = shipping.unpack_for_node(call.payload.data, 5)
    assert (args.rate, args.units, args.epochs) == (0.2, 16, 7)
    assert point == {"rate": 0.2, "units": 16}


@pytest.mark.parametrize("kind", [NodeError, RunInterrupted])
@pytest.mark.parametrize("out", ["", "r"])
def test_what_is_done_of_a_grid_is_there_after_an_error(
    shell: TestingShell, services: FakeServices, kind: Any, out: str
) -> None:
    nodes: Any = tuple(SimpleNamespace(name=f"worker:{n}") for n in range(6))
    values, why = [1, 2, None, 4, 5, 6], {"worker:2": "failed: ValueError"}
    services.outcome = kind("It failed.") if kind is RunInterrupted else kind("It failed.", node="worker:2", host="h")
    services.outcome.partial = RunResult(nodes, {}, {}, independent_board(), _values=values, missing=why)
    shell.user_ns["r"] = "an older result"
    told = shell.error_of(f"{LINE} {'--out ' * bool(out)}{out}\nargs.rate")
    where = out or "sys.last_value.partial"
    assert f"{where} has the values of the 5 points that are done" in told.stdout + told.stderr
    assert f"{where}.missing says why" in told.stdout + told.stderr
    assert (shell.user_ns["r"] is services.outcome.partial) == bool(out)
    if not out:
        assert shell.cell("__import__('sys').last_value.partial.values") == values


def test_a_dry_run_names_the_points(shell: TestingShell, services: FakeServices) -> None:
    services.found = None
    told = shell.output_of(f"{LINE} --dry-run\nargs.rate").stdout
    assert "worker:4  rate=0.2, units=8" in told
    assert f"a local one would start with {min(6, os.cpu_count() or 1)} slots" in told
    assert not services.calls


def test_the_plan_says_that_nodes_take_turns(spark_local4: Any) -> None:
    options = {"num_nodes": 6, "chief": False, "is_independent": True}
    told = "\n".join(cluster.plan(spark_local4, cluster.RunOptions(**options, waits_for_all=False)))
    assert "4 task slots for 6 nodes: they start as slots come" in told
    assert "too few slots" in "\n".join(cluster.plan(spark_local4, cluster.RunOptions(**options)))


# --- an evaluator -------------------------------------------------------------------------------------------------


def test_an_evaluator_hears_when_training_is_over_and_misses_no_file(spark_local4: Any, tmp_path: Path) -> None:
    body = """
    import os
    from pathlib import Path

    there, seen = Path(args.there), []
    if ctx.job_name == "evaluator":
        is_over = False
        while not is_over:
            is_over = ctx.is_training_over(wait_s=0.05)  # asked before the look: what comes later was not written
            for path in sorted(there.glob("*.txt")):
                if path.name not in seen:
                    seen.append(path.name)
                    ctx.report(step=len(seen), seen=len(seen))
    elif ctx.is_chief:
        for number in range(5):
            (there / "part").write_text("x")
            os.replace(there / "part", there / f"{number}.txt")
    else:
        try:
            ctx.is_training_over()
        except Exception as error:
            seen = str(error)
    seen
    """
    result = run_cell(spark_local4, body_of(body), 3, evaluator=True, args={"there": str(tmp_path)}, timeout_s=60.0)
    chief, worker, evaluator = result.values
    assert evaluator == [f"{number}.txt" for number in range(5)]
    assert "worker:0 trains" in worker
    assert chief == []


@pytest.mark.slow
def test_an_evaluator_evaluates_each_checkpoint_of_the_chief(spark_local4: Any, tmp_path: Path) -> None:
    body = readme_cell("%%tfos_train --executors 3 --evaluator")
    rows = spark_local4.range(60).selectExpr(
        "array(float(id % 7), float(id % 3)) as x", "float(id % 7 + 2 * (id % 3)) as label"
    )
    folder = str(tmp_path)
    result = run_cell(
        spark_local4,
        f"{body}\nmodel.get_weights() if ctx.job_name != 'evaluator' else sorted(done)",
        3,
        namespace={"folder": folder},
        evaluator=True,
        epochs=3,
        data={"train": rows},
        preload=TENSORFLOW,
        timeout_s=120.0,
    )
    chief, worker, evaluator = result.values
    assert [w.tobytes() for w in chief] == [w.tobytes() for w in worker]
    assert [Path(path).name for path in evaluator][-1] == "3.weights.h5"
    row = next(node for node in result.board.view().nodes if node.role == "evaluator")
    assert (row.step, list(row.metrics)) == (3, ["loss"])
    x = np.array([[n % 7, n % 3] for n in range(64)], "float32")
    expected = float(np.mean((x @ chief[0] + chief[1] - (x @ [[1.0], [2.0]])) ** 2))
    assert row.metrics["loss"] == pytest.approx(expected, rel=1e-4)


# --- parameter servers --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_embedding_learns_asynchronously_and_the_run_ends_with_the_chief(spark_local4: Any) -> None:
    body = readme_cell("%%tfos_train --executors 4 --ps 1")
    result = run_cell(
        spark_local4,
        f"{body}\nlosses, model.layers[0].embeddings.value.device",
        4,
        num_ps=1,
        serves_itself=False,
        args={"steps": 200},
        preload=TENSORFLOW,
        timeout_s=120.0,
    )
    (losses, device), *others = result.values
    assert others == [None] * 3
    assert "/job:ps/" in device
    assert len(losses) == 10
    assert losses[-1] < 0.1 < 0.5 < losses[0]
    assert result.history["loss"] == pytest.approx(losses)
    assert {node.state for node in result.board.view().nodes} == {NodeState.DONE}


LOSES_A_SERVER = """
def main_fun(args, ctx):
    import os, signal, threading
    import tensorflow as tf
    from tfos_magic import training

    def die_when_told():
        open(args.fifo).read()
        os.kill(os.getpid(), signal.SIGKILL)

    if ctx.job_name != "chief":
        if f"{ctx.job_name}:{ctx.task_index}" == args.victim:
            threading.Thread(target=die_when_told, daemon=True).start()
        training.serve(ctx)
    strategy = ctx.strategy()
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        total = tf.Variable(0.0)

    @tf.function
    def step():
        total.assign_add(1.0)
        return tf.constant(1.0)

    coordinator.schedule(step)
    coordinator.join()
    with open(args.fifo, "w"):
        pass
    given = [coordinator.schedule(step) for _ in range(100)]
    coordinator.join()
    return sum(float(each.fetch()) for each in given), float(total.numpy())
"""


def lose(spark: Any, tmp_path: Path, victim: str, nodes: int, on_event: Callable[[Event], None]) -> RunResult:
    fifo = tmp_path / "now"
    os.mkfifo(fifo)
    options: dict[str, Any] = {"num_ps": 1, "preload": TENSORFLOW, "timeout_s": 60.0, "on_event": on_event}
    return run_cell(spark, LOSES_A_SERVER, nodes, args={"fifo": str(fifo), "victim": victim}, **options)


@pytest.mark.slow
def test_a_coordinator_goes_on_without_a_worker_that_was_killed(spark_local4: Any, tmp_path: Path) -> None:
    events: list[Event] = []
    result = lose(spark_local4, tmp_path, "worker:1", 4, events.append)
    done, total = result.values[0]
    assert done == 100
    assert total >= 101  # what the lost worker was at is done again
    assert (
        result.logs["worker:1"][-1] == "worker:1 was killed by signal 9 (SIGKILL) (out of memory?); the others go on."
    )
    states = {node.name: node.state for node in result.board.view().nodes}
    assert states.pop("worker:1") is NodeState.LOST
    assert set(states.values()) == {NodeState.DONE}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker:0", "ps:0"])
def test_without_its_last_worker_or_its_variables_a_coordinator_ends(
    spark_local4: Any, tmp_path: Path, victim: str
) -> None:
    with pytest.raises(NodeKilledError, match=f"{victim} on .* was killed by signal 9") as caught:
        lose(spark_local4, tmp_path, victim, 3, lambda event: None)
    assert caught.value.node == victim


# --- what Keras 3 cannot do ---------------------------------------------------------------------------------------


KERAS_UNDER_A_STRATEGY = """
strategy = ctx.strategy()
import keras, numpy as np

with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
x, y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")
said = {}
for name in ("fit", "evaluate", "train_on_batch", "test_on_batch"):
    try:
        getattr(model, name)(x, y)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
copy = keras.models.clone_model(model)
copy.set_weights(model.get_weights())
copy.compile("sgd", "mse")
"""


def require_refusals(said: dict[str, str], kind: str) -> None:
    for name in ("fit", "evaluate", "train_on_batch", "test_on_batch"):
        assert said[name].startswith(f"UsageError: Keras 3's model.{name} does not run under a {kind}")
        assert "ctx.distribute(model) before model.fit" in said[name]


@pytest.mark.slow
def test_keras_loops_refuse_a_multi_worker_strategy_in_words(spark_local4: Any) -> None:
    body = f"{KERAS_UNDER_A_STRATEGY}\nsaid, model.predict(x).shape, copy.evaluate(x, y)"
    for said, shape, loss in run_cell(spark_local4, body, 2, preload=TENSORFLOW, timeout_s=60.0).values:
        require_refusals(said, "MultiWorkerMirroredStrategy of several nodes")
        assert shape == (8, 1)
        assert loss >= 0


@pytest.mark.slow
def test_keras_loops_refuse_a_parameter_server_strategy_in_words(spark_local4: Any) -> None:
    options: dict[str, Any] = {"num_ps": 1, "serves_itself": False, "preload": TENSORFLOW, "timeout_s": 60.0}
    said, *_ = run_cell(spark_local4, f"{KERAS_UNDER_A_STRATEGY}\nsaid", 3, **options).values
    require_refusals(said, "ParameterServerStrategy")


@pytest.mark.slow
@pytest.mark.oldest
def test_keras_loops_refuse_strategies_in_the_oldest_versions_too(
    spark_script: Callable[..., subprocess.CompletedProcess[str]], oldest_python: Path
) -> None:
    done = spark_script(
        f"""
from pyspark.sql import SparkSession
from runs import run_cell

body = {KERAS_UNDER_A_STRATEGY + "said"!r}
spark = SparkSession.builder.getOrCreate()
for options in ({{}}, {{"num_ps": 1, "serves_itself": False}}):
    result = run_cell(spark, body, 2 + len(options) // 2, preload=("tensorflow",), timeout_s=60.0, **options)
    for name, text in result.values[0].items():
        print(name, "|", text.splitlines()[0])
spark.stop()
""",
        python=oldest_python,
        env={"PYTHONPATH": os.pathsep.join((str(README.parent), str(Path(__file__).parent)))},
    )
    said = [line.partition(" | ")[2] for line in done.stdout.splitlines() if " | UsageError" in line]
    assert len(said) == 8
    assert all("does not run under a MultiWorkerMirroredStrategy" in line for line in said[:4])
    assert all("does not run under a ParameterServerStrategy" in line for line in said[4:])


@pytest.mark.slow
def test_a_strategy_of_one_node_leaves_keras_alone(spark_local4: Any) -> None:
    body = f"{KERAS_UNDER_A_STRATEGY}\nsaid"
    assert run_cell(spark_local4, body, 1, preload=TENSORFLOW, timeout_s=60.0).values == [{}]


@pytest.mark.slow
def test_a_strategy_of_ones_own_making_gets_the_hint(spark_local4: Any) -> None:
    body = KERAS_UNDER_A_STRATEGY.replace(
        "ctx.strategy()", "__import__('tensorflow').distribute.MultiWorkerMirroredStrategy()"
    )
    body = body.partition("said = {}")[0] + "model.fit(x, y, verbose=0)"
    with pytest.raises(NodeError) as caught:
        run_cell(spark_local4, body, 2, preload=TENSORFLOW, timeout_s=60.0)
    assert "call ctx.distribute(model) before fit" in str(caught.value)
