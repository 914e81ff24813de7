from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from runs import run_cell

from tfos_magic import cluster
from tfos_magic.errors import (
    NodeError,
    NodeKilledError,
    ResultError,
    RunStoppedError,
    RunTimeoutError,
    TooFewSlotsError,
    UsageError,
)
from tfos_magic.status import Event, MetricsReported, NodeChanged, NodeLogged, NodeState, RunEnded, StatusBoard

HERE = os.path.dirname(__file__)
Script = Callable[..., "subprocess.CompletedProcess[str]"]


def test_every_node_returns_the_last_expression_in_node_order(spark_local4: Any) -> None:
    result = run_cell(spark_local4, "(ctx.job_name, ctx.task_index, ctx.executor_id, ctx.num_nodes, ctx.is_chief)", 3)
    assert result.values == [("chief", 0, 0, 3, True), ("worker", 0, 1, 3, False), ("worker", 1, 2, 3, False)]
    assert [node.name for node in result.nodes] == ["chief:0", "worker:0", "worker:1"]


def test_nodes_that_take_every_slot_still_run_and_leave_them_free(spark_local4: Any) -> None:
    events: list[Event] = []
    result = run_cell(spark_local4, "import os; os.getpid()", 4, on_event=events.append)
    assert len(set(result.values)) == 4
    assert spark_local4.range(100, numPartitions=8).count() == 100
    assert events[-1] == RunEnded("done", at=events[-1].at)


def test_tf_config_and_port_are_there_and_differ(spark_local4: Any) -> None:
    body = "import json, os\nctx.cluster_spec, json.loads(os.environ['TF_CONFIG'])"
    values = run_cell(spark_local4, body, 3, chief=False).values
    spec = values[0][0]
    assert len(set(spec["worker"])) == 3
    for index, (own, config) in enumerate(values):
        assert own == spec
        assert config == {"cluster": spec, "task": {"type": "worker", "index": index}}


def test_captured_names_args_and_output_arrive(spark_local4: Any) -> None:
    events: list[Event] = []

    def double(x: int) -> int:
        return 2 * x

    body = "print('line', factor)\nctx.report(loss=0.5, step=3)\nfactor * args.extra + ctx.executor_id"
    result = run_cell(
        spark_local4, body, 2, namespace={"factor": 7}, args={"extra": 3}, on_event=events.append, epochs=1
    )
    assert result.values == [21, 22]
    assert all("line 7" in lines for lines in result.logs.values())
    assert any(isinstance(event, NodeLogged) for event in events)
    reported = [event for event in events if isinstance(event, MetricsReported)]
    assert {(event.step, event.values["loss"]) for event in reported} == {(3, 0.5)}


def test_a_failing_node_shows_the_cells_line_and_its_output(spark_local4: Any) -> None:
    body = "\n".join(
        [
            "import time",
            "def inner(table):",
            "    return table['boom']",
            "if ctx.executor_id == 1:",
            "    print('about to fail')",
            "    inner({})",
            "time.sleep(60)",
        ]
    )
    began = time.monotonic()
    with pytest.raises(NodeError) as caught:
        run_cell(spark_local4, body, 3)
    assert time.monotonic() - began < 20
    error = caught.value
    assert error.node == "worker:0"
    assert error.remote is not None
    assert error.remote.type_name == "KeyError"
    text = str(error)
    assert "Cell In[1], line 7, in" in text  # the magic's line is line 1 of the cell
    assert "Cell In[1], line 4, in inner" in text
    assert "return table['boom']" in text
    assert "about to fail" in text
    assert "tfos_magic/node" not in text
    assert run_cell(spark_local4, "1", 2).values == [1, 1]


def test_the_cause_chain_is_shown(spark_local4: Any) -> None:
    body = "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('no such row') from error"
    with pytest.raises(NodeError, match="direct cause") as caught:
        run_cell(spark_local4, body, 1)
    assert caught.value.remote is not None
    assert caught.value.remote.cause is not None
    assert caught.value.remote.cause.type_name == "KeyError"


def test_others_are_stopped_within_two_seconds_of_a_failure(spark_local4: Any) -> None:
    stamps: dict[str, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, NodeChanged) and event.state is NodeState.FAILED:
            stamps["failed"] = time.monotonic()

    body = "import time\nif ctx.executor_id == 2: raise RuntimeError('x')\ntime.sleep(60)"
    with pytest.raises(NodeError):
        run_cell(spark_local4, body, 3, on_event=note)
    assert time.monotonic() - stamps["failed"] < 2


def test_a_killed_child_is_named_with_its_signal_and_last_lines(spark_local4: Any) -> None:
    body = (
        "import os, signal, time\nprint('last words')\nif ctx.executor_id == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    with pytest.raises(
        NodeKilledError, match=r"worker:0 on .* was killed by signal 9 \(SIGKILL\) \(out of memory\?\)"
    ) as caught:
        run_cell(spark_local4, body, 2)
    assert "last words" in str(caught.value)


def test_a_child_that_exits_by_itself_is_an_error_too(spark_local4: Any) -> None:
    with pytest.raises(NodeKilledError, match="exited with code 3 before the function returned"):
        run_cell(spark_local4, "import os\nos._exit(3)", 1)


def test_sys_exit_zero_is_a_return_and_nonzero_an_error(spark_local4: Any) -> None:
    assert run_cell(spark_local4, "import sys\nsys.exit(0)", 1).values == [None]
    with pytest.raises(NodeError, match="SystemExit"):
        run_cell(spark_local4, "import sys\nsys.exit(4)", 1)


def test_a_missing_module_says_whether_the_driver_has_it(spark_local4: Any) -> None:
    with pytest.raises(NodeError, match="The driver has no module 'no_such_module_here' either"):
        run_cell(spark_local4, "import no_such_module_here", 1)


def test_descendants_of_the_function_do_not_survive(spark_local4: Any) -> None:
    body = "\n".join(
        [
            "import subprocess, sys",
            "quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)",
            "sleep = [sys.executable, '-c', 'import time; time.sleep(300)']",
            "own = subprocess.Popen(sleep, **quiet)",
            # One that hides: its parent is gone and it has a session of its own.
            "hide = f'import subprocess as s; p = s.Popen({sleep!r}, start_new_session=True, stdout=-3, stderr=-3)'",
            "hidden = subprocess.run([sys.executable, '-c', hide + '; print(p.pid)'], capture_output=True, text=True)",
            "own.pid, int(hidden.stdout)",
        ]
    )
    pids = [pid for value in run_cell(spark_local4, body, 2).values for pid in value]
    assert len(pids) == 4
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_the_child_is_a_fresh_interpreter_with_the_patch_prevented(spark_local4: Any) -> None:
    body = "\n".join(
        [
            "import sys, collections",
            "before = 'pyspark' in sys.modules",
            "import pyspark.serializers",
            "P = collections.namedtuple('P', 'x')",
            "before, '_is_namedtuple_' in vars(P)",
        ]
    )
    assert run_cell(spark_local4, body, 2).values == [(False, False)] * 2


def test_sparks_leaks_are_not_in_the_childs_environment(spark_local4: Any) -> None:
    body = "import os\n{name for name in os.environ if name.startswith(('PYTHON_WORKER_FACTORY', 'PYTHONHASHSEED'))}"
    assert run_cell(spark_local4, body, 1).values == [set()]


THREADS = "import os\n(len(os.sched_getaffinity(0)), os.environ.get('TF_NUM_INTRAOP_THREADS'))"


def test_nodes_of_one_host_divide_its_cores(spark_local4: Any) -> None:
    (alone,) = run_cell(spark_local4, THREADS, 1).values
    assert alone[1] is None, "TensorFlow knows best"
    for cores, threads in run_cell(spark_local4, THREADS, 3).values:
        assert int(threads) == -(-cores // 3)


def test_threads_of_a_node_let_each_other_finish(spark_local4: Any) -> None:
    request = "import os; os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))"
    if subprocess.run([sys.executable, "-c", request], check=False, capture_output=True).returncode:
        pytest.skip("this container forbids it, and then nodes do without")
    body = """
    import contextlib, os
    policies = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            policies.add(os.sched_getscheduler(int(thread)))
    policies
    """
    assert run_cell(spark_local4, textwrap.dedent(body), 1, preload=("tensorflow",)).values == [{os.SCHED_BATCH}]


@pytest.mark.slow
def test_the_user_says_on_how_many_cores_nodes_compute(spark_script: Script) -> None:
    code = f"""
    from pyspark.sql import SparkSession
    from runs import run_cell
    print(run_cell(SparkSession.builder.getOrCreate(), {THREADS!r}, 2).values)
    """
    conf = {"spark.executorEnv.TF_NUM_INTRAOP_THREADS": "7"}
    assert spark_script(textwrap.dedent(code), conf=conf, env={"PYTHONPATH": HERE}).stdout.count("'7'") == 2


def test_too_few_slots_is_an_error_at_once_with_numbers(spark_local4: Any) -> None:
    began = time.monotonic()
    with pytest.raises(TooFewSlotsError, match=r"9 nodes need 9 task slots; the cluster local\[4\] has 4") as caught:
        run_cell(spark_local4, "1", 9)
    assert time.monotonic() - began < 5
    assert (caught.value.needed, caught.value.available) == (9, 4)
    assert "local[9]" in str(caught.value)


def test_a_timeout_says_what_each_node_did(spark_local4: Any) -> None:
    with pytest.raises(RunTimeoutError, match="chief:0 is running") as caught:
        run_cell(spark_local4, "import time\ntime.sleep(60)", 1, timeout_s=3.0)
    assert "--timeout" in str(caught.value)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": -1}, {"timeout_s": 0.0}])
def test_nonsense_is_refused_before_anything_starts(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        cluster.RunOptions(num_nodes=2, **options)


def test_large_results_come_back_whole(spark_local4: Any) -> None:
    value = run_cell(spark_local4, "bytes(range(256)) * 40_000", 1).values[0]
    assert value == bytes(range(256)) * 40_000


def test_a_flood_of_output_neither_stalls_the_run_nor_loses_the_last_lines(spark_local4: Any) -> None:
    body = "for number in range(300_000): print('line', number)\nprint('the end')"
    result = run_cell(spark_local4, body, 1)
    lines = result.logs["chief:0"]
    assert lines[-1] == "the end"
    assert "earlier lines" in lines[0]
    assert len(lines) < 3000


def test_a_job_cancelled_from_outside_ends_the_run_with_an_error(spark_local4: Any) -> None:
    context = spark_local4.sparkContext
    running = threading.Event()

    def note(event: Event) -> None:
        if isinstance(event, NodeChanged) and event.state is NodeState.RUNNING:
            running.set()

    def cancel() -> None:
        running.wait(60)
        context.cancelAllJobs()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(RunStoppedError, match="Spark job was cancelled"):
        run_cell(spark_local4, "import time\ntime.sleep(60)", 2, on_event=note)
    thread.join()


def test_two_runs_at_once_do_not_meet(spark_local4: Any) -> None:
    values: dict[int, list[Any]] = {}

    def go(number: int) -> None:
        values[number] = run_cell(spark_local4, f"import time\ntime.sleep(1)\n{number}", 1).values

    threads = [threading.Thread(target=go, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {1: [1], 2: [2]}


@pytest.mark.slow
def test_the_function_sees_modules_that_addpyfile_brought(spark_script: Script, tmp_path: Any) -> None:
    (tmp_path / "brought_along.py").write_text("ANSWER = 42\n")
    code = f"""
        from pyspark.sql import SparkSession
        from runs import run_cell
        spark = SparkSession.builder.getOrCreate()
        spark.sparkContext.addPyFile({str(tmp_path / "brought_along.py")!r})
        print("value", run_cell(spark, "import brought_along; brought_along.ANSWER", 1).values)
        spark.stop()
    """
    assert "value [42]" in spark_script(code, env={"PYTHONPATH": os.path.dirname(__file__)}).stdout


def test_a_value_that_cannot_travel_back_does_not_fail_the_run(spark_local4: Any) -> None:
    result = run_cell(spark_local4, "import threading\nctx.report(loss=1.0)\nthreading.Lock()", 1)
    assert "lock" in repr(result.logs)
    with pytest.raises(ResultError, match="lock"):
        _ = result.values
    assert "lock" in result._repr_html_()


def test_the_results_table_is_escaped_and_short(spark_local4: Any) -> None:
    html = run_cell(spark_local4, "'<script>' + 'x' * 10_000", 1)._repr_html_()
    assert "<script>" not in html
    assert "chief:0" in html
    assert len(html) < 1000


def test_no_agent_ever_blocks_on_its_childs_output(spark_local4: Any) -> None:
    # The failure and the output that came with it are often ready in the same round of the agent's loop.
    body = "print('about to fail')\nraise ValueError(1)"
    for _ in range(8):
        began = time.monotonic()
        with pytest.raises(NodeError):
            run_cell(spark_local4, body, 2)
        assert time.monotonic() - began < 5


def test_the_last_counts_reach_the_board(spark_local4: Any) -> None:
    body = "feed = ctx.get_data_feed()\nwhile not feed.should_stop(): feed.next_batch(10)"
    result = run_cell(spark_local4, body, 2, data={"train": spark_local4.range(1003)}, epochs=2)
    assert sum(node.rows_consumed for node in result.board.view().nodes) == 2006


def test_a_run_without_epochs_has_what_one_node_reported_as_its_history(spark_local4: Any) -> None:
    result = run_cell(spark_local4, "for step in range(5): ctx.report(step=step, loss=1.0 / (step + 1))", 2)
    assert result.history == {"loss": [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]}


def test_a_refused_run_has_a_title_and_no_rows(spark_local4: Any) -> None:
    board = StatusBoard()
    with pytest.raises(TooFewSlotsError):
        run_cell(spark_local4, "1", 9, on_event=board.apply, title="Cell In[7]")
    assert board.view().title == "Cell In[7]"
    assert board.view().outcome == "failed"
    assert not board.view().nodes


def test_a_parameter_server_that_never_returns_ends_with_the_others(spark_local4: Any) -> None:
    body = """
def main_fun(args, ctx):
    if ctx.job_name == "ps":
        import threading
        threading.Event().wait()
    return ctx.job_name
"""
    result = run_cell(spark_local4, body, 3, num_ps=1)
    assert result.values == ["chief", "worker", None]
    assert [node.state.name for node in result.board.view().nodes] == ["DONE"] * 3
