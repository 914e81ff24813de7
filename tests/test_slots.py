"""How nodes get their places: one-core executors, one GPU per task, dynamic allocation, dying executors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from leftovers import processes_with
from network_fixture import SparkHosts, spark_on_hosts, why_no_network

pytestmark = pytest.mark.slow

HERE = os.path.dirname(__file__)
Script = Callable[..., "subprocess.CompletedProcess[str]"]

BEGIN = """
import os, signal, sys, threading, time
from collections import Counter
from pyspark.sql import SparkSession
from leftovers import processes_with
from runs import run_cell
from tfos_magic import TFCluster, session
from tfos_magic.errors import TfosError
spark = SparkSession.builder.getOrCreate()
sc = spark.sparkContext

def read_or_negate(args, ctx):
    # Rows from 0 are to be learned, those below to be answered.
    import os
    from pathlib import Path
    feed = ctx.get_data_feed(train_mode=False)
    learned = []
    while not feed.should_stop():
        batch = feed.next_batch(50)
        if batch and batch[0] < 0:
            feed.batch_results([-row for row in batch])
        else:
            learned += batch
    born_with = dict(pair.partition("=")[::2] for pair in Path("/proc/self/environ").read_text().split("\\0"))
    return {"learned": learned, "executor": os.environ.get("SPARK_EXECUTOR_DIRS"),
            "gpu": born_with.get("CUDA_VISIBLE_DEVICES"), "growth": born_with.get("TF_FORCE_GPU_ALLOW_GROWTH"),
            "order": born_with.get("CUDA_DEVICE_ORDER")}

def start(nodes, function=read_or_negate, **options):
    return TFCluster.run(sc, function, None, nodes, input_mode=TFCluster.InputMode.SPARK, **options)

def use(cluster):
    cluster.train(sc.parallelize(range(300), 4), 2)
    assert cluster.inference(sc.parallelize(range(-200, 0), 3)).collect() == list(range(200, 0, -1))
    cluster.train(spark.range(300, 600), 1)

def endless():
    def slowly(rows):
        import time
        for row in rows:
            time.sleep(0.001)
            yield row
    return sc.parallelize(range(10**6), 100).mapPartitions(slowly)

def check(cluster):
    assert Counter(row for value in cluster.result.values for row in value["learned"]) == (
        Counter({n: 2 for n in range(300)}) + Counter(range(300, 600)))
    assert not ours(), ours()

def ours():
    return processes_with("tfos_magic.node")

def wait_until(is_so, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.05)
"""


@pytest.fixture
def script(spark_script: Script) -> Script:
    def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {"PYTHONPATH": HERE, **options.pop("env", {})}
        return spark_script(BEGIN + textwrap.dedent(code), env=env, **options)

    return run


# --- slots ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "held"), [(1, 1), (2, 0)])
def test_one_core_executors_are_given_to_the_feed_when_all_have_a_node(script: Script, nodes: int, held: int) -> None:
    done = script(
        f"""
        wait_until(lambda: session.slot_count(sc) == 2)
        with start({nodes}) as cluster:
            wait_until(lambda: session.busy_slot_count(sc) == {held})
            use(cluster)
            assert session.busy_slot_count(sc) == {held}
        check(cluster)
        assert session.busy_slot_count(sc) == 0
        print("executors", len({{value["executor"] for value in cluster.result.values}}))
        """,
        master="local-cluster[2,1,1024]",
    )
    assert f"executors {nodes}\n" in done.stdout


def test_two_clusters_leave_each_other_a_slot_to_be_fed_through(script: Script) -> None:
    done = script(
        """
        with start(2) as first:
            assert session.busy_slot_count(sc) == 2    # of four: they hold
            with start(2) as second:
                wait_until(lambda: session.busy_slot_count(sc) == 2)    # these cannot
                use(second)
                use(first)
            assert Counter(row for value in second.result.values for row in value["learned"])[0] == 2
        check(first)
        print("all well")
        """
    )
    assert "all well" in done.stdout


# --- GPUs -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(tmp_path: Path) -> dict[str, str]:
    """Settings by which each worker of a local cluster has two GPUs, each executor both, and each task one."""
    discovery = tmp_path / "discovery.sh"
    discovery.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["0", "1"]}'\n""")
    discovery.chmod(0o755)
    return {
        "spark.worker.resource.gpu.amount": "2",
        "spark.worker.resource.gpu.discoveryScript": str(discovery),
        "spark.executor.resource.gpu.amount": "2",
        "spark.task.resource.gpu.amount": "1",
    }


@pytest.mark.parametrize(("executors", "held"), [(1, 0), (2, 2)])
def test_nodes_have_a_gpu_each_and_are_fed_although_every_task_takes_one(
    script: Script, gpus: dict[str, str], executors: int, held: int
) -> None:
    done = script(
        f"""
        wait_until(lambda: session.slot_count(sc) == {2 * executors})
        with start(2) as cluster:
            wait_until(lambda: session.busy_slot_count(sc) == {held})
            use(cluster)
        check(cluster)
        places = [(value["executor"], value["gpu"]) for value in cluster.result.values]
        assert len(set(places)) == 2, places
        assert {{gpu for _, gpu in places}} <= {{"0", "1"}}, places
        assert {{value["order"] for value in cluster.result.values}} == {{"PCI_BUS_ID"}}    # as nvidia-smi counts
        print("all well")
        """,
        master=f"local-cluster[{executors},2,1024]",
        conf=gpus,
    )
    assert "all well" in done.stdout


def test_nodes_that_gave_their_gpus_back_share_them_with_those_of_the_next_cluster(
    script: Script, gpus: dict[str, str]
) -> None:
    done = script(
        """
        wait_until(lambda: session.slot_count(sc) == 2)
        with start(2) as first, start(2) as second:
            use(first)
            use(second)
        for cluster in first, second:
            check(cluster)
            assert [value["gpu"] for value in cluster.result.values] == ["0", "1"]
            assert {value["growth"] for value in cluster.result.values} == {"true"}    # so that there is room for both
        print("all well")
        """,
        master="local-cluster[1,2,1024]",
        conf=gpus,
    )
    assert "all well" in done.stdout


# --- dynamic allocation -----------------------------------------------------------------------------------

IDLE_S = 2
DYNAMIC = {
    "spark.dynamicAllocation.enabled": "true",
    "spark.dynamicAllocation.shuffleTracking.enabled": "true",
    "spark.dynamicAllocation.minExecutors": "0",
    "spark.dynamicAllocation.executorIdleTimeout": f"{IDLE_S}s",
    "spark.executor.cores": "1",
    "spark.executor.memory": "600m",
}


def test_under_dynamic_allocation_nodes_keep_their_executors_and_the_feed_gets_others(
    script: Script, standalone_cluster: Any
) -> None:
    done = script(
        """
        with start(2) as cluster:
            assert session.busy_slot_count(sc) == 2
            use(cluster)
            wait_until(lambda: session.slot_count(sc) == 2, 60)    # those of the feed were idle and have gone
            cluster.train(sc.parallelize(range(1000, 1100), 2), 1)
            wait_until(lambda: session.slot_count(sc) == 2, 60)
        learned = [row for value in cluster.result.values for row in value["learned"] if row >= 1000]
        assert sorted(learned) == list(range(1000, 1100))
        assert len({value["executor"] for value in cluster.result.values}) == 2
        wait_until(lambda: session.slot_count(sc) == 0, 60)
        assert run_cell(spark, "ctx.executor_id", 2).values == [0, 1]    # from none at all
        assert not ours(), ours()
        print("all well")
        """,
        master=standalone_cluster.master_url,
        conf=DYNAMIC,
    )
    assert "all well" in done.stdout


def test_more_slots_than_dynamic_allocation_can_ever_make_are_refused_at_once(
    script: Script, standalone_cluster: Any
) -> None:
    done = script(
        """
        from tfos_magic import launching, members, options
        began = time.monotonic()
        try:
            run_cell(spark, "1", 3)
        except TfosError as error:
            print(type(error).__name__, error.needed, error.available, error)
        chosen = options.RunOptions(num_nodes=2)
        nodes = [members.Member(index, role, print) for index, role in enumerate(chosen.roles())]
        try:
            launching.Launch(sc, chosen, nodes).require_slots(print, is_fed=True)
        except TfosError as error:
            print(type(error).__name__, error.needed, error.available, error)
        assert time.monotonic() - began < 20
        assert run_cell(spark, "ctx.executor_id", 2).values == [0, 1]    # unfed they fit
        """,
        master=standalone_cluster.master_url,
        conf={**DYNAMIC, "spark.dynamicAllocation.maxExecutors": "2"},
    )
    assert "TooFewSlotsError 3 2 3 nodes need 3 task slots; dynamic allocation can make 2." in done.stdout
    assert "TooFewSlotsError 3 2 2 nodes and the tasks that feed them need 3 task slots" in done.stdout
    assert done.stdout.count("spark.dynamicAllocation.maxExecutors is 2.") == 2


def test_dynamic_allocation_means_nothing_on_a_local_master(script: Script) -> None:
    done = script(
        """
        try:
            start(5)
        except TfosError as error:
            print(type(error).__name__)
        with start(4) as cluster:
            use(cluster)
        check(cluster)
        print("all well")
        """,
        conf=DYNAMIC,
    )
    assert "TooFewSlotsError" in done.stdout
    assert "all well" in done.stdout


SPECULATION = {
    "spark.executor.memory": "1g",
    "spark.speculation": "true",
    "spark.speculation.quantile": "0.5",
    "spark.speculation.multiplier": "1.01",
}


def test_a_second_copy_of_a_nodes_task_does_not_end_the_first(script: Script, standalone_cluster: Any) -> None:
    done = script(
        """
        from tfos_magic import TFParallel
        sc.setLogLevel("INFO")    # says when it starts a copy

        def some_are_slow(args, ctx):
            import time
            time.sleep(20 if ctx.worker_num == 3 else 0)
            return ctx.worker_num

        assert TFParallel.run(sc, some_are_slow, None, 4, use_barrier=False) == [0, 1, 2, 3]
        assert not ours(), ours()
        print("all well")
        """,
        conf=SPECULATION,
        master=standalone_cluster.master_url,  # a copy is started on another host only
    )
    assert "Starting task 3.1 " in done.stderr  # the copy
    assert "all well" in done.stdout


def test_copies_of_feed_tasks_deliver_no_row_twice_and_lose_none(script: Script, standalone_cluster: Any) -> None:
    done = script(
        """
        sc.setLogLevel("INFO")    # says when it starts a copy
        WHEN = {"nothing is published": 10, "half of the partition is": 30_000}

        def stalls(at):
            def pass_on(partition, rows):
                import time
                from pyspark import TaskContext
                for number, row in enumerate(rows):
                    if partition == 3 and number == at and TaskContext.get().attemptNumber() == 0:
                        time.sleep(60)
                    yield row
            return pass_on

        for when, at in WHEN.items():
            # Several portions a partition: the nodes have taken some of what the copy brings once more.
            with start(2, queue_limit_bytes=200_000) as cluster:
                began = time.monotonic()
                cluster.train(sc.parallelize(range(200_000), 4).mapPartitionsWithIndex(stalls(at)), 1)
                asked = sc.parallelize(range(-200_000, 0), 4).mapPartitionsWithIndex(stalls(at))
                assert cluster.inference(asked).collect() == list(range(200_000, 0, -1)), when
                assert time.monotonic() - began < 60, "the copies did not win"
            learned = Counter(row for value in cluster.result.values for row in value["learned"])
            assert learned == Counter(range(200_000)), when
            print(when, "- all well")
        """,
        conf=SPECULATION,
        master=standalone_cluster.master_url,  # a copy is started on another host only
    )
    assert done.stderr.count("Starting task 3.1 ") == 4  # the copies: for two feeds and two questions
    assert done.stdout.count("all well") == 2


# --- the lease of detached nodes --------------------------------------------------------------------------


KILL_AND_LOOK = """
import os, signal, sys, time
from leftovers import processes_with
driver, jvm = map(int, sys.argv[1:])
os.kill(jvm, signal.SIGSTOP)    # Spark hears nothing of the end
os.kill(driver, signal.SIGKILL)
began = time.monotonic()
while time.monotonic() < began + 10 and processes_with("tfos_magic.node"):
    time.sleep(0.1)
left, executors = processes_with("tfos_magic.node"), processes_with("CoarseGrainedExecutorBackend")
print("left", len(left), "executors", len(executors), "seconds", time.monotonic() - began)
os.kill(jvm, signal.SIGKILL)
"""


def test_detached_nodes_end_with_their_driver_although_their_executors_live_on(
    script: Script, standalone_cluster: Any, tmp_path: Path
) -> None:
    watch, seen = tmp_path / "watch.py", tmp_path / "seen"
    watch.write_text(KILL_AND_LOOK)
    done = script(
        f"""
        import subprocess

        def deaf(args, ctx):
            import signal, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)

        wait_until(lambda: session.slot_count(sc) == 4)
        start(4, deaf)
        wait_until(lambda: session.busy_slot_count(sc) == 0)
        assert len(ours()) == 8, ours()    # an agent and a child for each
        watch = [sys.executable, {str(watch)!r}, str(os.getpid()), str(sc._gateway.proc.pid)]
        with open({str(seen)!r}, "w") as seen:
            subprocess.Popen(watch, stdout=seen, stderr=seen, start_new_session=True)
        time.sleep(60)
        """,
        master=standalone_cluster.master_url,
        conf={"spark.executor.memory": "1g"},
        check=False,
    )
    executors = processes_with("CoarseGrainedExecutorBackend")
    psutil.wait_procs(executors, 10)  # they tidy up, now that Spark's driver is gone
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "left 0 executors 2 " in seen.read_text()


@pytest.mark.parametrize("is_feeding", [True, False])
def test_detached_nodes_end_with_their_executor_and_train_says_so(script: Script, is_feeding: bool) -> None:
    done = script(
        f"""
        def kill_one():
            global killed_at
            executor = processes_with("CoarseGrainedExecutorBackend")[0]
            killed_at = time.monotonic()
            executor.kill()

        wait_until(lambda: session.slot_count(sc) == 2)
        cluster = start(2)
        wait_until(lambda: session.busy_slot_count(sc) == 0)
        assert len(ours()) == 4
        if {is_feeding}:
            killer = threading.Timer(2, kill_one)
            killer.start()
        else:
            kill_one()
            wait_until(lambda: not ours(), 12)    # nobody waits for this cluster, and yet it ends
        try:
            cluster.train(endless(), 1)
        except TfosError as error:
            print(type(error).__name__, error)
        print("took", time.monotonic() - killed_at)
        assert time.monotonic() - killed_at < 12
        wait_until(lambda: not ours(), 1)
        try:
            cluster.shutdown()
        except TfosError as error:
            print("again", type(error).__name__)
        """,
        master="local-cluster[2,1,1024]",
    )
    assert "NodeLostError worker:" in done.stdout
    assert "again NodeLostError" in done.stdout


# --- several hosts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spark_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkHosts]:
    reason = why_no_network()
    if reason:
        pytest.skip(reason)
    with spark_on_hosts(tmp_path_factory) as hosts:
        yield hosts


@pytest.fixture
def host_script(script: Script, spark_hosts: SparkHosts) -> Script:
    """The script runs on a host of its own, and the executors on two others."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        with spark_hosts.driver.entered():
            return script(code, master=spark_hosts.master_url, conf=spark_hosts.conf, env=spark_hosts.environ)

    return run


def test_cells_and_clusters_run_over_several_hosts(host_script: Script) -> None:
    done = host_script(
        """
        body = '''
        import socket
        feed = ctx.get_data_feed()
        rows = []
        while not feed.should_stop():
            rows += feed.next_batch(100)
        socket.gethostname(), [address.rpartition(":")[0] for address in ctx.cluster_spec["worker"]], rows
        '''
        import textwrap
        wait_until(lambda: session.slot_count(sc) == 4)
        data = {"train": spark.range(1000, numPartitions=5)}
        result = run_cell(spark, textwrap.dedent(body), 3, chief=False, data=data)
        assert {host for host, _, _ in result.values} == {"one", "two"}, result.values
        assert {address for _, spec, _ in result.values for address in spec} == {"10.77.0.2", "10.77.0.3"}
        assert {node.host for node in result.nodes} == {"one", "two"}
        assert sorted(row for _, _, rows in result.values for row in rows) == list(range(1000))
        for nodes in 2, 4:    # holding and detached
            with start(nodes) as cluster:
                use(cluster)
                hosts = {node["host"] for node in cluster.cluster_info}
            check(cluster)
            assert nodes == 2 or hosts == {"one", "two"}, hosts
        print("all well")
        """
    )
    assert "all well" in done.stdout


def test_keras_fits_over_several_hosts(host_script: Script) -> None:
    done = host_script(
        """
        from pyspark.sql import functions as F
        body = '''
        import socket, keras
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        ctx.distribute(model)
        history = model.fit(ctx.dataset(), epochs=args.epochs, verbose=0).history["loss"]
        socket.gethostname(), [float(w.sum()) for w in model.get_weights()], history[-1] < history[0] / 10
        '''
        import textwrap
        data = spark.range(512, numPartitions=4).select(
            F.array((F.col("id") / 256 - 1).cast("float")).alias("x"), (F.col("id") / 128 - 2).alias("label"))
        # As many nodes as a host has slots and one more.
        result = run_cell(spark, textwrap.dedent(body), 3, data={"train": data}, epochs=10, preload=("tensorflow",))
        hosts, weights, is_better = zip(*result.values)
        assert set(hosts) == {"one", "two"}, hosts
        assert weights[0] == weights[1] == weights[2], weights
        assert all(is_better)
        print("all well")
        """
    )
    assert "all well" in done.stdout


def test_nodes_and_driver_hear_of_a_cut_cable_in_time(host_script: Script, spark_hosts: SparkHosts) -> None:
    cut = spark_hosts.workers[1]
    try:
        done = host_script(
            f"""
            import subprocess

            def cut():
                global cut_at
                cut_at = time.monotonic()
                subprocess.run("ip link set {cut.port} down".split(), check=True)
                there = [node.info["pid"] for node in cluster._cluster.nodes if node.host == "{cut.name}"]
                wait_until(lambda: not any(process.pid in there for process in ours()), 30)
                print("nodes there gone after", time.monotonic() - cut_at, flush=True)

            wait_until(lambda: session.slot_count(sc) == 4)
            cluster = start(4)
            wait_until(lambda: session.busy_slot_count(sc) == 0)
            cutter = threading.Timer(2, cut)
            cutter.start()
            try:
                cluster.train(endless(), 1)
            except TfosError as error:
                print(type(error).__name__, error)
            print("train raised after", time.monotonic() - cut_at, flush=True)
            wait_until(lambda: not ours(), 1)
            cutter.join()
            """
        )
    finally:
        with spark_hosts.driver.entered():
            subprocess.run(["ip", "link", "set", cut.port, "up"], check=True)
    # The kernels give up after 9 s, and a beat may have gone out half a second after the cut.
    assert float(re.search(r"nodes there gone after (\S+)", done.stdout)[1]) < 11, done.stdout
    assert float(re.search(r"train raised after (\S+)", done.stdout)[1]) < 15, done.stdout
    assert "NodeLostError" in done.stdout
    assert " on two went away." in done.stdout
