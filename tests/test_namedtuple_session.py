"""The namedtuple patch over driver, executors and nodes: asked, taken out and put back, on a real Spark."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from namedtuple_runs import ROOT, SCRIPTS, Run, make_run, run_with_pyspark32

from tfos_magic import namedtuple_session, namedtuple_worker, session
from tfos_magic.errors import SessionError
from tfos_magic.namedtuple_jobs import CleanJobs
from tfos_magic.namedtuple_patch import ENABLING_VARIABLE
from tfos_magic.widgets import namedtuple_table

Script = Callable[..., subprocess.CompletedProcess[str]]
TESTS = Path(__file__).resolve().parent
MODULE = ["shapes.Plain", "shapes.Circle", "shapes.Typed"]
BARE = ["collections.Plain", "collections.Circle", "collections.Typed"]
RIGHT = [True, True, True]


# --- where nothing is patched: this process's own session -----------------------------------------------------


@pytest.fixture
def jobs() -> Iterator[CleanJobs]:
    made = CleanJobs()
    yield made
    made.close()


def prepare_functions() -> list[Any]:
    name = "_prepare_for_python_RDD"
    return [vars(module)[name] for key, module in sys.modules.items() if key[:7] == "pyspark" and name in vars(module)]


def test_every_executor_is_asked_and_nothing_is_changed(spark_local4: Any, jobs: CleanJobs) -> None:
    jobs.start()
    status = namedtuple_session.survey(spark_local4, jobs=jobs)
    assert jobs.touched() == []  # to ask is no job of the user's
    assert status.executor_count == 1 and status.spark == "local[4]" and status.jobs_are_clean
    assert len(status.workers) >= 1 and not status.is_patched and status.notes == ()
    assert {worker.name for worker in status.workers} == {"executor driver"}
    assert all(worker.pid != os.getpid() and worker.since_s for worker in status.workers)
    assert status.driver.pid == os.getpid()
    assert json.loads(json.dumps(status.to_json())) == status.to_json()


def test_table_has_a_row_for_what_differs(spark_local4: Any) -> None:
    status = namedtuple_session.survey(spark_local4)
    lines = str(status).splitlines()
    assert lines[0] == status.summary
    assert lines[1].split() == " ".join(status.HEADINGS).split()
    assert len(lines) == 2 + len(status.rows())
    html = namedtuple_table.render_html(status)
    assert html.count("<tr") == 1 + len(status.rows()) and "jobs run as they are" in html


def test_without_a_session_the_driver_answers_alone() -> None:
    status = namedtuple_session.survey()
    assert status.workers == () and status.spark == "" and status.driver.state.startswith("off")
    assert "jobs" not in status.summary


def test_a_session_that_cannot_be_asked_is_an_error() -> None:
    with pytest.raises(SessionError):
        namedtuple_session.survey(object())


def test_busy_executors_are_not_waited_for_without_end(spark_local4: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"

    def wait(_: int) -> int:
        import os
        import threading

        pause = threading.Event()
        while not os.path.exists(path):
            pause.wait(0.05)
        return 1

    path = str(go)
    context = spark_local4.sparkContext
    begun = threading.Thread(target=context.parallelize(range(4), 4).map(wait).collect)
    begun.start()
    pause = threading.Event()
    try:
        while session.busy_slot_count(context) < 4:
            pause.wait(0.02)
        status = namedtuple_session.survey(spark_local4, timeout_s=2)
    finally:
        go.touch()
        begun.join(60)
    assert status.workers == ()
    assert status.notes == ("The executors have not answered in 2 s: their slots are taken.",)
    assert namedtuple_session.survey(spark_local4).workers


def test_pyspark_gets_its_own_function_back(spark_local4: Any, jobs: CleanJobs) -> None:
    before = prepare_functions()
    assert len(before) >= 1
    other = CleanJobs()
    jobs.start()
    jobs.start()
    other.start()
    during = set(map(id, prepare_functions()))
    assert len(during) == 1 and during != set(map(id, before))
    jobs.close()
    assert set(map(id, prepare_functions())) == during  # the other one still wants it
    other.close()
    other.close()
    assert [after is function for after, function in zip(prepare_functions(), before, strict=True)] == [True] * len(
        before
    )


def test_waiting_for_the_import_leaves_no_trace() -> None:
    found = make_run(sys.executable, {})(
        "import json, sys; from tfos_magic.namedtuple_jobs import CleanJobs\n"
        "paths = list(sys.meta_path); first, second, closed = CleanJobs(), CleanJobs(), CleanJobs()\n"
        "first.start(); second.start(); closed.start(); closed.close()\n"
        "import pyspark.sql.udf as udf\n"
        "home = sys.modules.get('pyspark.core.rdd') or sys.modules['pyspark.rdd']\n"
        "spec = home.__spec__\n"
        "loaders = type(spec.loader).__name__, home.__loader__ is spec.loader, home.__file__ == spec.origin\n"
        "same = sys.meta_path == paths; on = type(home._prepare_for_python_RDD).__name__\n"
        "first.close(); second.close(); off = type(home._prepare_for_python_RDD).__name__\n"
        "print(json.dumps([*loaders, same, on, off, closed.is_on]))"
    )
    assert found == ["SourceFileLoader", True, True, True, "_Carrier", "function", False]


def test_unpatched_workers_are_left_alone(spark_local4: Any, jobs: CleanJobs) -> None:
    jobs.start()
    context = spark_local4.sparkContext
    kept_as = namedtuple_worker.KEPT_AS
    found = context.parallelize(range(8), 8).map(lambda _: kept_as in __import__("sys").modules).collect()
    assert found == [False] * 8
    assert jobs.touched() == [context]


def test_a_thread_can_leave_its_own_jobs_as_they_are(spark_local4: Any, jobs: CleanJobs) -> None:
    jobs.start()
    prepare = prepare_functions()[0]
    context = spark_local4.sparkContext
    plain = len(prepare.original(context, len)[0])
    with jobs.left_as_is():
        assert len(prepare(context, len)[0]) == plain
        sizes: list[int] = []
        thread = threading.Thread(target=lambda: sizes.append(len(prepare(context, len)[0])))
        thread.start()
        thread.join()
    assert plain < 1000 and plain + 5000 < sizes[0] < plain + 9000
    assert len(prepare(context, len)[0]) == sizes[0]


def test_a_command_that_spark_broadcasts_is_carried_too(spark_local4: Any, jobs: CleanJobs) -> None:
    jobs.start()
    large = os.urandom(3_000_000)  # more than spark.broadcast.UDFCompressionThreshold
    found = spark_local4.sparkContext.parallelize(range(2), 2).map(lambda _: len(large)).collect()
    assert found == [3_000_000] * 2


def test_what_is_carried_is_the_same_bytes_each_time_and_the_same_command() -> None:
    command = (len, {"a": [1, 2]}, None)
    data = pickle.dumps(namedtuple_worker.carry(command))
    assert data == pickle.dumps(namedtuple_worker.carry(command))
    assert pickle.loads(data) == command


def test_jobs_that_fail_fail_as_they_did(spark_local4: Any, jobs: CleanJobs) -> None:
    jobs.start()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        spark_local4.sparkContext.parallelize([0], 1).map(lambda zero: 1 // zero).collect()
    lock = threading.Lock()
    with pytest.raises(pickle.PicklingError, match="lock"):
        spark_local4.sparkContext.parallelize([0], 1).map(lambda _: lock).collect()


LOAD = """
import json, sys, time
{imports}
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
began = time.thread_time()
shell.run_line_magic("load_ext", "tfos_magic")
print(json.dumps({{"seconds": time.thread_time() - began}}))
"""


def test_loading_costs_little_where_there_is_nothing_to_repair() -> None:
    # CPU time: it tells the same on a busy machine. The best of three, since the first one may have to compile.
    run = make_run(sys.executable, {ENABLING_VARIABLE: ""})
    assert min(run(LOAD.format(imports="import pyspark.sql"))["seconds"] for _ in range(3)) < 0.1


@pytest.mark.slow
def test_loading_costs_less_than_a_second_with_tensorflow_patched() -> None:
    run = make_run(sys.executable, {ENABLING_VARIABLE: "1"})
    assert run(LOAD.format(imports="import pyspark.sql, tensorflow"))["seconds"] < 1


# --- where PySpark patches ------------------------------------------------------------------------------------


class Executors:
    """What must hold for ordinary jobs wherever executors patch; subclasses say where."""

    driver_is_patched = True
    master = "local[2]"
    executor_env = ""
    modes: tuple[str, ...] = ("late", "early")

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls) -> Run:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def sessions(cls, run: Run) -> dict[str, dict[str, Any]]:
        """What was found in each mode. All run at once: for most of its time a session waits for one task or a JVM."""

        def run_script(mode: str) -> dict[str, Any]:
            return run("executors.py", mode, str(ROOT), cls.master, cls.executor_env, timeout=280)

        with ThreadPoolExecutor() as pool:
            return dict(zip(cls.modes, pool.map(run_script, cls.modes), strict=True))

    @pytest.fixture(scope="class", params=["late", "early"])
    @classmethod
    def found(cls, sessions: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
        return sessions[request.param]

    def test_every_kind_of_job_runs_unpatched(self, found: dict[str, Any]) -> None:
        assert len(found["after"]) >= 9
        assert {way: states for way, states in found["after"].items() if states != [[False, 0]]} == {}
        assert found["load imports pyspark"] is False

    def test_warm_workers_are_kept_and_were_patched(self, found: dict[str, Any]) -> None:
        if "before" in found:
            assert all(is_on and count > 10 for states in found["before"].values() for is_on, count in states)
            assert found["same workers"]

    def test_the_patch_does_harm_before(self, found: dict[str, Any]) -> None:
        if "ways before" in found:
            before = found["ways before"]
            assert before["shuffle"] == before["cached"] == [False] * 3
            assert "area" in before["methods"] or "Error" in before["methods"]
            if self.driver_is_patched:
                assert before["closure"] == before["broadcast"] == before["data"] == [False] * 3
                assert before["result"] == BARE
            else:
                assert "_restore" in before["result"]

    def test_types_hold_on_every_way(self, found: dict[str, Any]) -> None:
        assert found["ways after"] == {
            "closure": RIGHT,
            "data": RIGHT,
            "broadcast": RIGHT,
            "result": MODULE,
            "shuffle": RIGHT,
            "keys": [["shapes.Circle", 0, 12], ["shapes.Circle", 1, 16]],
            "methods": [3, 3],
            "cached": RIGHT,
            "udf": str(RIGHT),
            "rows": [[1, 2]],
        }

    def test_namedtuples_that_tasks_make_come_back(self, found: dict[str, Any]) -> None:
        assert found["made in tasks"] == [["Made"] * 4, [[0], [1], [2], [3]]]

    def test_the_magic_asks_restores_and_reverts_both_sides(self, found: dict[str, Any]) -> None:
        status, restore, after, again = found["magic"]
        assert status == again and "off" in status and status.endswith("every job reverts it first")
        assert restore == after and restore.endswith("jobs run as they are")
        assert ("driver on; " if self.driver_is_patched else "driver off; ") in restore
        assert re.search(r"\d Python workers on; ", restore)
        assert found["after again"] == found["after"]

    def test_unload_puts_everything_back(self, found: dict[str, Any]) -> None:
        assert found["pyspark as it was"]
        assert {is_on for states in found["unloaded"].values() for is_on, _ in states} == {True}
        settings = dict(found["nothing left in Spark"])
        assert set(settings) <= {"PYTHONHASHSEED", "PYTHONPATH", ENABLING_VARIABLE}

    def test_a_sitecustomize_of_the_users_is_run(self, found: dict[str, Any]) -> None:
        if self.executor_env:
            assert found["sitecustomize"] == [True]


@pytest.mark.slow
class TestVariable(Executors):
    """The variable is set for the driver, and in local mode so for executors."""

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls) -> Run:
        return make_run(sys.executable, {ENABLING_VARIABLE: "1"})


@pytest.mark.slow
class TestExecutorsOnly(Executors):
    """The variable is set for executors only, and these are processes of their own."""

    driver_is_patched = False
    master = "local-cluster[2,1,1024]"
    executor_env = "1"

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls) -> Run:
        return make_run(sys.executable, {ENABLING_VARIABLE: ""})


@pytest.mark.slow
class TestPySpark32(Executors):
    """PySpark 3.2, which patches always."""

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, pyspark32_python: Path) -> Run:
        return run_with_pyspark32(pyspark32_python)


@pytest.mark.slow
@pytest.mark.oldest
class TestOldest(Executors):
    """The oldest supported PySpark, with the variable."""

    modes = ("late",)

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, oldest_python: Path) -> Run:
        return make_run(str(oldest_python), {ENABLING_VARIABLE: "1"})

    @pytest.fixture(scope="class", params=modes)
    @classmethod
    def found(cls, sessions: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
        return sessions[request.param]


# --- status, revert and restore over all of it ------------------------------------------------------------------

WHOLE_SESSION = """
import collections, json
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from tfos_magic import namedtuple_session
from tfos_magic.namedtuple_jobs import CleanJobs
spark = SparkSession.builder.getOrCreate()
Mine = collections.namedtuple("Mine", "x")
class Sub(Mine):
    pass
jobs = CleanJobs()
spark.sparkContext.parallelize(range(8), 8).map(lambda _: __import__("shapes")).count()
spark.range(0, 4, 1, 4).select(udf(lambda i: str(i))("id")).collect()  # the other pool of workers
steps = {}
steps["before"] = namedtuple_session.survey(spark, jobs=jobs)
steps["reverted"] = namedtuple_session.revert(spark, jobs=jobs)
steps["again"] = namedtuple_session.revert(spark, jobs=jobs)
steps["seen"] = namedtuple_session.survey(spark, jobs=jobs)
steps["restored"] = namedtuple_session.restore(spark, jobs=jobs)
steps["after"] = namedtuple_session.survey(spark, jobs=jobs)
print(json.dumps({name: {**step.to_json(), "text": str(step)} for name, step in steps.items()}))
spark.stop()
"""


def counts(step: dict[str, Any]) -> dict[tuple[str, int], tuple[bool, int]]:
    every = [step["driver"], *step["workers"]]
    return {(each["host"], each["pid"]): (each["patch"]["is_patched"], each["patch"]["class_count"]) for each in every}


@pytest.mark.slow
def test_status_revert_and_restore_reach_every_worker_of_every_executor(spark_script: Script) -> None:
    done = spark_script(
        WHOLE_SESSION,
        master="local-cluster[2,2,1024]",
        env={ENABLING_VARIABLE: "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPTS}"},
    )
    steps = json.loads(done.stdout.splitlines()[-1])
    before = steps["before"]
    assert before["executor_count"] == 2 and before["notes"] == []
    assert {worker["name"] for worker in before["workers"]} == {"executor 0", "executor 1"}
    assert len(before["workers"]) >= 6  # of both pools
    assert before["is_patched"] and not before["jobs_are_clean"]
    assert all(is_on and count >= 10 for is_on, count in counts(before).values())
    assert before["driver"]["patch"]["owners"]["__main__.Sub"] == "yours"
    assert "yours: 1 (Sub)" in before["text"] and f"{ENABLING_VARIABLE}=1" in before["text"]
    assert "before CallSite was made" in before["text"] or "PySpark's import" in before["text"]
    matters = [worker["patch"] for worker in before["workers"] if "shapes.Circle" in worker["patch"]["downgraded"]]
    assert matters and all(patch["owners"]["shapes.Circle"] == "yours" for patch in matters)

    for name in ("reverted", "again", "seen"):
        step = steps[name]
        assert not step["is_patched"] and step["jobs_are_clean"], name
        assert set(counts(step)) == set(counts(before)), name
        assert {count for _, count in counts(step).values()} == {0}, name
        mended = {(each["host"], each["pid"]): each["patch"]["mended_count"] for each in step["workers"]}
        assert all(mended[key] >= count for key, (_, count) in counts(before).items() if key in mended)
        assert all(worker["since"].startswith("a job's start, ") for worker in step["workers"])
    assert "every job reverts it first" in steps["seen"]["text"]

    for name in ("restored", "after"):
        assert counts(steps[name]) == counts(before), name
        assert not steps[name]["jobs_are_clean"]


NODES = """
import json, sys
from pyspark.sql import SparkSession
from runs import pack_cell, run_cell
from tfos_magic import namedtuple_patch, namedtuple_session
from tfos_magic.inference import Inference
from tfos_magic.options import RunOptions
from tfos_magic.standing import StandingInferences
import shapes
namedtuple_patch.revert()
spark = SparkSession.builder.getOrCreate()
body = '''
import collections, pyspark.serializers, sys, shapes
Made = collections.namedtuple("Made", "x")
right = [type(mine) is type(value) for mine, value in zip(shapes.ALL, held)]
sys.imports, right, "_is_namedtuple_" in vars(Made), held
'''
result = run_cell(spark, body, 2, namespace={"held": shapes.ALL}, preload=("sched",))
found = {"values": [value[:3] for value in result.values], "nodes": [dict(n.namedtuple_patch) for n in result.nodes]}
found["back"] = [type(mine) is type(value) for v in result.values for mine, value in zip(shapes.ALL, v[3])]
options = RunOptions(num_nodes=1, chief=False, predicts=True, preload=())
predicting = pack_cell("def predict(batch): return {'y': batch['id']}\\npredict", {}, {})
inference = Inference(spark, predicting, options, spark.range(3), schema="y long", on_event=lambda event: None)
standing = StandingInferences()
standing.add("predictions", inference, 1)
found["status"] = namedtuple_session.survey(spark, nodes=standing.nodes).to_json()
inference.close()
found["closed"] = len(standing.nodes) + len(inference.nodes)
print(json.dumps(found))
spark.stop()
"""
# Runs in every Python process of the test before anything else: writes down what is imported, in what state.
RECORDER = """
import collections, sys
sys.imports = []
class Recorder:
    def find_spec(name, path, target=None):
        make = collections.namedtuple
        state = hasattr(make, "__hijack"), "_hack_namedtuple" in make.__code__.co_names
        sys.imports.append((name, *state))
sys.meta_path.insert(0, Recorder)
"""


@pytest.mark.slow
def test_nodes_revert_before_any_import_of_the_users(spark_script: Script, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(RECORDER, encoding="utf-8")
    path = os.pathsep.join(map(str, [tmp_path, ROOT, TESTS, SCRIPTS]))
    done = spark_script(NODES, env={ENABLING_VARIABLE: "1", "PYTHONPATH": path})
    found = json.loads(done.stdout.splitlines()[-1])
    for imports, is_right, is_marked in found["values"]:
        order = [name for name, *_ in imports]
        first = order.index("tfos_magic.namedtuple_patch")
        users = [order.index(name) for name in ("sched", "shapes", "pyspark.serializers")]
        assert first < min(users), order
        # From the first of them on the patch was prevented, and it never was on.
        assert all(is_prevented for _, is_prevented, _ in imports[min(users) :])
        assert not any(is_on for *_, is_on in imports)
        assert is_right == RIGHT and not is_marked
    assert found["back"] == RIGHT * 2
    for patch in found["nodes"]:
        assert not patch["is_patched"] and patch["is_prevented"] and patch["class_count"] == 0
        assert patch["cause"] == f"{ENABLING_VARIABLE}=1"
    (node,) = found["status"]["nodes"]
    assert (node["kind"], node["name"], node["state"]) == ("node", "worker:0", "off, kept off")
    assert node["since"].startswith("its birth, ")
    assert found["closed"] == 0


CONNECT = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
shell.run_line_magic("load_ext", "tfos_magic")
class SparkSession:
    pass
SparkSession.__module__ = "pyspark.sql.connect.session"
import pyspark
shell.user_ns["spark"] = SparkSession()
shell.run_line_magic("tfos_namedtuple", "status")
shell.run_line_magic("unload_ext", "tfos_magic")
"""


def test_spark_connect_is_said_to_be_out_of_reach(spark_script: Script) -> None:
    done = spark_script(CONNECT, env={"PYTHONPATH": str(ROOT)})
    assert "namedtuple patch: driver off" in done.stdout
    assert "spark is a Spark Connect session" in done.stdout.splitlines()[-1]
    assert "Only the driver was asked" in done.stdout
    assert "Error" not in done.stderr
