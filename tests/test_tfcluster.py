"""``TFCluster`` and ``TFParallel``: TFoS programs on a real Spark.

The functions travel with this file's text, and nodes import ahead what that text names; so it does not name it.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from leftovers import processes_with
from pyspark.sql import Row

from tfos_magic import TFCluster, TFParallel
from tfos_magic.errors import FeedError, NodeError, StalledError, TfosError, TooFewSlotsError, UsageError

SPARK, FILES = 1, 0  # TFCluster.InputMode


def by_value(function: Any) -> Any:
    """Let a function of this file travel as a notebook's do: nodes cannot import this file."""
    function.__module__ = "__main__"
    return function


@by_value
def read_all(args: Any, ctx: Any) -> list[Any]:
    """Return every row that this node is fed."""
    feed = ctx.get_data_feed()
    rows: list[Any] = []
    while not feed.should_stop():
        rows += feed.next_batch(64)
    return rows


@by_value
def times_ten(args: Any, ctx: Any) -> None:
    feed = ctx.get_data_feed(train_mode=False)
    while not feed.should_stop():
        feed.batch_results([row * 10 for row in feed.next_batch(64)])


@by_value
def sleeper(args: Any, ctx: Any) -> None:
    import time

    time.sleep(600)


def all_rows(cluster: TFCluster.TFCluster) -> list[Any]:
    assert cluster.result is not None
    return [row for rows in cluster.result.values for row in rows]


def start(spark: Any, function: Any, nodes: int = 2, args: Any = None, **options: Any) -> TFCluster.TFCluster:
    return TFCluster.run(spark.sparkContext, function, args, nodes, **{"input_mode": SPARK, **options})


# --- training ---------------------------------------------------------------------------------------------


def test_several_feeds_in_a_row_of_rdds_and_dataframes_arrive_once_each(spark_local4: Any) -> None:
    sc = spark_local4.sparkContext
    with start(spark_local4, read_all) as cluster:
        cluster.train(sc.parallelize([("a", n) for n in range(500)], 5), num_epochs=2)
        cluster.train(spark_local4.range(300).selectExpr("'b' as name", "id"), num_epochs=1)
        cluster.train(sc.parallelize([], 3), num_epochs=1)
        cluster.train(sc.parallelize([("c", 0)], 1), num_epochs=1)
    expected = Counter({("a", n): 2 for n in range(500)}) + Counter(("b", n) for n in range(300)) + Counter([("c", 0)])
    assert Counter(all_rows(cluster)) == expected
    assert cluster.result is not None
    sizes = [len(rows) for rows in cluster.result.values]
    assert max(sizes) - min(sizes) <= 16  # a row for each partition at most
    assert not processes_with("tfos_magic.node")


@pytest.mark.slow
def test_num_epochs_0_means_10_as_with_tfos(spark_local4: Any) -> None:
    with start(spark_local4, read_all, 1) as cluster:
        cluster.train(spark_local4.sparkContext.parallelize([7], 1))
    assert all_rows(cluster) == [7] * 10


@pytest.mark.slow
def test_rows_of_an_rdd_arrive_equal_and_of_the_same_type(spark_local4: Any) -> None:
    rows = [
        (1, "two", 3.0, None, b"four"),
        Row(name="x", value=1),
        {"a": [1, 2], "b": {"c": (3,)}},
        argparse.Namespace(k=1),
        {1, 2, 3},
        "text",
        None,
        [1, [2, [3]]],
        2**80,
    ]

    def types(args: Any, ctx: Any) -> list[Any]:
        return [(type(row).__name__, row) for row in read_all(args, ctx)]

    with start(spark_local4, types) as cluster:
        cluster.train(spark_local4.sparkContext.parallelize(rows, 4), 1)
    arrived = all_rows(cluster)
    assert len(arrived) == len(rows)
    for row in rows:
        assert (type(row).__name__, row) in arrived
    assert next(row.name for kind, row in arrived if kind == "Row") == "x"


@pytest.mark.slow
def test_numpy_arrays_in_rows_and_arrays_by_input_mapping(spark_local4: Any) -> None:
    rows = [(n, np.full(3, n, dtype=np.float32)) for n in range(100)]

    def arrays(args: Any, ctx: Any) -> list[Any]:
        feed = ctx.get_data_feed(input_mapping={"a_label": "y", "b_image": "x"})
        batches = []
        while not feed.should_stop():
            batch = feed.next_batch(30)
            batches.append((batch["y"].tolist(), batch["x"].shape, str(batch["x"].dtype), batch["x"][:, 0].tolist()))
        return batches

    with start(spark_local4, arrays, 1) as cluster:
        cluster.train(spark_local4.sparkContext.parallelize(rows, 3), 1)
    batches = all_rows(cluster)
    assert [shape for _, shape, _, _ in batches] == [(30, 3), (30, 3), (30, 3), (10, 3)]
    assert {kind for _, _, kind, _ in batches} == {"float32"}
    assert sorted(y for ys, _, _, _ in batches for y in ys) == list(range(100))
    assert all(ys == xs for ys, _, _, xs in batches)


@pytest.mark.slow
def test_vectors_of_a_dataframe_stay_vectors_and_nulls_none(spark_local4: Any) -> None:
    from pyspark.ml.linalg import Vectors

    with start(spark_local4, read_all, 1) as cluster:
        cluster.train(spark_local4.createDataFrame([(Vectors.dense([1.0, 2.0]), 1)], ["v", "n"]), 1)
        cluster.train(spark_local4.createDataFrame([(None, [1]), ("b", [2, 3])], "s string, l array<int>"), 1)
    vector, *others = all_rows(cluster)
    assert vector.v == Vectors.dense([1.0, 2.0])
    assert sorted(others, key=str) == [("b", [2, 3]), (None, [1])]


def test_terminate_on_one_node_ends_sparks_job_at_once_and_all_nodes_stop(spark_local4: Any) -> None:
    def until_100(args: Any, ctx: Any) -> tuple[int, bool]:
        feed, seen = ctx.get_data_feed(), 0
        while not feed.should_stop():
            seen += len(feed.next_batch(10))
            if ctx.worker_num == 0 and seen >= 100:
                feed.terminate()
        return seen, feed.should_stop()

    def slow(rows: Any) -> Any:
        import time

        for row in rows:
            time.sleep(0.001)
            yield row

    endless = spark_local4.sparkContext.parallelize(range(2_000_000), 400).mapPartitions(slow)
    with start(spark_local4, until_100) as cluster:
        began = time.monotonic()
        cluster.train(endless, 1)
        cluster.train(endless, 1)  # nobody wants it: returns at once
        assert time.monotonic() - began < 40  # of some 2000 s
        assert cluster.server.done
    assert cluster.result is not None
    assert all(stopped for _, stopped in cluster.result.values)
    assert 100 <= cluster.result.values[0][0] < 20_000


@pytest.mark.slow
def test_a_function_that_returns_early_ends_the_feed_instead_of_blocking_it(spark_local4: Any) -> None:
    def ten_rows(args: Any, ctx: Any) -> int:
        return len(ctx.get_data_feed().next_batch(10))

    with start(spark_local4, ten_rows, queue_limit_bytes=100_000) as cluster:
        cluster.train(spark_local4.sparkContext.parallelize(range(1_000_000), 8), 1)
    assert cluster.result is not None
    assert cluster.result.values[0] <= 10


@pytest.mark.slow
def test_a_slow_reader_holds_spark_back_and_loses_nothing(spark_local4: Any) -> None:
    limit = 200_000

    def slowly(args: Any, ctx: Any) -> int:
        import time

        feed, seen = ctx.get_data_feed(), 0
        while not feed.should_stop():
            seen += len(feed.next_batch(500))
            time.sleep(0.2)  # beats tell twice a second: what is taken between two must be little
        return seen

    rows = spark_local4.sparkContext.parallelize(range(50), 50).flatMap(lambda n: (bytes(1000) for _ in range(500)))
    waiting: list[int] = []
    with start(spark_local4, slowly, queue_limit_bytes=limit) as cluster:
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(0.05):
                waiting.extend(node.rows_received - node.rows_consumed for node in cluster._cluster.nodes)

        watcher = threading.Thread(target=look)
        watcher.start()
        cluster.train(rows, 1)
        stop.set()
        watcher.join()
    assert cluster.result is not None
    assert sum(cluster.result.values) == 25_000
    # At most the bound, one partition beyond it, and what was consumed since the last beat: not the 12 500 to come.
    assert max(waiting) < 2_500


@pytest.mark.slow
def test_feed_timeout_counts_only_time_without_progress_and_says_where_the_node_is(spark_local4: Any) -> None:
    def stuck(args: Any, ctx: Any) -> int:
        import time

        feed = ctx.get_data_feed()
        seen = len(feed.next_batch(10))
        time.sleep(args)  # THE LINE
        while not feed.should_stop():
            seen += len(feed.next_batch(10))
        return seen

    rows = spark_local4.sparkContext.parallelize(range(1000), 4)
    with start(spark_local4, stuck, 1, 7.0) as cluster:
        with pytest.raises(StalledError) as caught:
            cluster.train(rows, 1, feed_timeout=1.5)
        assert "test_tfcluster.py, line" in caught.value.cause and "stuck" in caught.value.cause
        cluster.train(rows, 1, feed_timeout=60)  # the cluster goes on
    assert cluster.result is not None
    assert cluster.result.values[0] >= 1000


# --- inference --------------------------------------------------------------------------------------------


def test_inference_is_lazy_in_order_and_can_be_repeated(spark_local4: Any) -> None:
    sc = spark_local4.sparkContext
    computed = sc.accumulator(0)

    def count(row: int) -> int:
        computed.add(1)
        return row

    with start(spark_local4, times_ten) as cluster:
        results = cluster.inference(sc.parallelize(range(1000), 7).map(count))
        assert computed.value == 0
        assert results.collect() == [10 * n for n in range(1000)]
        assert results.filter(lambda n: n < 50).collect() == [0, 10, 20, 30, 40]
        assert results.take(3) == [0, 10, 20]  # leaves the rest of the partition unread
        assert cluster.inference(sc.parallelize([1, 2], 5)).collect() == [10, 20]
        assert cluster.inference(spark_local4.range(10)).sum() == 450
        assert cluster.inference(sc.parallelize([], 2)).collect() == []
    with pytest.raises(UsageError, match="shut down"):
        cluster.inference(sc.parallelize([1]))


@pytest.mark.slow
def test_chunks_larger_than_the_bound_still_complete_a_batch(spark_local4: Any) -> None:
    def in_sevens(args: Any, ctx: Any) -> None:
        feed = ctx.get_data_feed(train_mode=False)
        while not feed.should_stop():
            feed.batch_results(feed.next_batch(7))

    with start(spark_local4, by_value(in_sevens), 1, queue_limit_bytes=1_000) as cluster:
        rows = spark_local4.sparkContext.parallelize(range(20_000), 2)
        assert cluster.inference(rows, feed_timeout=30).collect() == list(range(20_000))


def test_an_action_after_the_end_says_that_the_cluster_is_gone(spark_local4: Any) -> None:
    with start(spark_local4, times_ten, 1) as cluster:
        late = cluster.inference(spark_local4.sparkContext.parallelize(range(10), 1))
    with pytest.raises(Exception, match=r"could not connect|went away"):
        late.collect()


@pytest.mark.slow
def test_training_then_inference_in_one_cluster(spark_local4: Any) -> None:
    def both(args: Any, ctx: Any) -> int:
        feed = ctx.get_data_feed(train_mode=False)
        total = 0
        while not feed.should_stop():
            batch = feed.next_batch(16)
            if batch[0] < 1000:
                total += sum(batch)
            else:
                feed.batch_results([-row for row in batch])
        return total

    sc = spark_local4.sparkContext
    with start(spark_local4, both) as cluster:
        cluster.train(sc.parallelize(range(100), 3), 1)
        assert cluster.inference(sc.parallelize(range(1000, 1100), 4)).collect() == [-n for n in range(1000, 1100)]
        cluster.train(sc.parallelize(range(100), 3), 1)
    assert cluster.result is not None
    assert sum(cluster.result.values) == 2 * sum(range(100))


@pytest.mark.slow
def test_too_many_results_are_refused_with_the_numbers(spark_local4: Any) -> None:
    def twice(args: Any, ctx: Any) -> None:
        feed = ctx.get_data_feed(train_mode=False)
        feed.batch_results(feed.next_batch(5) * 2)

    cluster = start(spark_local4, twice, 1)
    with pytest.raises(Exception, match=r"went away|refused"):
        cluster.inference(spark_local4.sparkContext.parallelize(range(5), 1)).collect()
    with pytest.raises(NodeError, match="10 results; 5 rows"):
        cluster.shutdown()


# --- exactly once -----------------------------------------------------------------------------------------


def kill_once(marker: str, at: int) -> Any:
    """Return a function that kills the Python worker it runs in, the first time it meets row `at`."""

    def pass_on(rows: Any) -> Any:
        import os
        import signal

        for row in rows:
            if row == at:
                try:
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield row

    return pass_on


@pytest.mark.slow
def test_killed_feed_tasks_deliver_no_row_twice_and_lose_none(spark_script: Any, tmp_path: Any) -> None:
    done = spark_script(
        f"""
        import sys
        sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
        from collections import Counter
        from pyspark.sql import SparkSession
        from test_tfcluster import kill_once, read_all, start, times_ten, all_rows
        spark = SparkSession.builder.getOrCreate()
        sc = spark.sparkContext
        with start(spark, read_all, queue_limit_bytes=100_000) as cluster:  # four portions and more a partition
            # Killed in the middle of a partition, whose first rows the nodes have got but must not use.
            dies = kill_once({str(tmp_path / "a")!r}, 120_000)
            cluster.train(sc.parallelize(range(200_000), 4).mapPartitions(dies), 1)
        assert Counter(all_rows(cluster)) == Counter(range(200_000))
        assert __import__("os").path.exists({str(tmp_path / "a")!r})
        with start(spark, times_ten) as cluster:
            rows = sc.parallelize(range(100_000), 4).mapPartitions(kill_once({str(tmp_path / "b")!r}, 70_000))
            assert cluster.inference(rows).collect() == [10 * n for n in range(100_000)]
        assert __import__("os").path.exists({str(tmp_path / "b")!r})
        print("all well")
        """,
        master="local-cluster[2,2,1024]",
    )
    assert "all well" in done.stdout


# --- errors and ends --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_node_ends_the_feed_with_its_own_error_and_not_the_next_cluster(spark_local4: Any) -> None:
    def fails(args: Any, ctx: Any) -> None:
        ctx.get_data_feed().next_batch(10)
        if ctx.worker_num == 1:
            raise ValueError("the user's own")

    def endless(rows: Any) -> Any:
        import time

        for row in rows:
            time.sleep(0.001)
            yield row

    cluster = start(spark_local4, fails)
    with pytest.raises(NodeError, match="the user's own"):
        cluster.train(spark_local4.sparkContext.parallelize(range(10**6), 100).mapPartitions(endless), 1)
        cluster.train(spark_local4.sparkContext.parallelize(range(10**6), 100).mapPartitions(endless), 1)
        cluster.shutdown()
    with pytest.raises(NodeError, match="the user's own"):
        cluster.shutdown()
    assert not processes_with("tfos_magic.node")
    with start(spark_local4, read_all) as following:
        following.train(spark_local4.sparkContext.parallelize([1, 2, 3], 1), 1)
    assert sorted(all_rows(following)) == [1, 2, 3]


@pytest.mark.slow
def test_a_failure_that_nobody_waits_for_ends_all_nodes_and_is_told_later(spark_local4: Any) -> None:
    def fails(args: Any, ctx: Any) -> None:
        if ctx.worker_num == 0:
            raise RuntimeError("early")
        sleeper(args, ctx)

    cluster = start(spark_local4, fails)
    deadline = time.monotonic() + 20
    while processes_with("tfos_magic.node") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_with("tfos_magic.node")
    assert cluster.server.done
    with pytest.raises(NodeError, match="early"):
        cluster.train(spark_local4.sparkContext.parallelize([1]), 1)
    with pytest.raises(NodeError, match="early"):
        cluster.shutdown()


@pytest.mark.slow
def test_data_that_spark_cannot_compute_fail_the_call_and_not_the_cluster(spark_local4: Any) -> None:
    sc = spark_local4.sparkContext
    with start(spark_local4, read_all) as cluster:
        with pytest.raises(FeedError, match="ZeroDivisionError"):
            cluster.train(sc.parallelize([1, 0], 1).map(lambda n: 1 // n), 1)
        cluster.train(sc.parallelize([5], 1), 1)
    assert all_rows(cluster) == [5]


@pytest.mark.slow
def test_leaving_the_block_by_an_error_stops_everything(spark_local4: Any) -> None:
    with pytest.raises(KeyError), start(spark_local4, sleeper) as cluster:
        raise KeyError("mine")
    assert cluster.result is None
    assert not processes_with("tfos_magic.node")


@pytest.mark.slow
def test_shutdown_gives_up_after_its_timeout_and_leaves_nothing(spark_local4: Any) -> None:
    cluster = start(spark_local4, sleeper)
    with pytest.raises(TfosError, match="took more than 1 s"):
        cluster.shutdown(timeout=1)
    assert not processes_with("tfos_magic.node")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ps": 2}, "too few"),
        ({"driver_ps_nodes": True}, "driver_ps_nodes needs"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_started(
    spark_local4: Any, options: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        start(spark_local4, read_all, **options)


def test_what_a_call_needs_is_said(spark_local4: Any) -> None:
    with pytest.raises(TooFewSlotsError):
        start(spark_local4, read_all, 5)
    rdd = spark_local4.sparkContext.parallelize([1], 1)
    with start(spark_local4, read_all, 1) as cluster:
        with pytest.raises(UsageError, match="num_epochs is -1"):
            cluster.train(rdd, -1)
        with pytest.raises(UsageError, match="no queue 'inptu'; it has input"):
            cluster.train(rdd, 1, qname="inptu")
        with pytest.raises(UsageError, match="not list"):
            cluster.train([1, 2], 1)
    with (
        start(spark_local4, lambda args, ctx: 1, 1, input_mode=FILES) as cluster,
        pytest.raises(UsageError, match=r"InputMode\.SPARK"),
    ):
        cluster.train(rdd, 1)


# --- what programs read -----------------------------------------------------------------------------------


def test_roles_args_and_attributes_are_those_of_tfos(spark_local4: Any) -> None:
    def describe(args: Any, ctx: Any) -> Any:
        import sys

        return ctx.job_name, ctx.task_index, ctx.num_workers, sys.argv, sorted(ctx.cluster_spec)

    with start(
        spark_local4,
        describe,
        3,
        ["train.py", "--steps", "3"],
        input_mode=FILES,
        master_node="master",
        eval_node=True,
    ) as cluster:
        assert [node["job_name"] for node in cluster.cluster_info] == ["master", "worker", "evaluator"]
        assert cluster.cluster_meta["cluster_template"] == {"master": [0], "worker": [1], "evaluator": [2]}
        assert not any("authkey" in node for node in cluster.cluster_info)
        assert cluster.num_executors == 3 and cluster.input_mode == 0 and cluster.sc is spark_local4.sparkContext
        assert cluster.nodeRDD.collect() == [0, 1, 2]
        assert cluster.tensorboard_url() is None
    assert cluster.result is not None
    argv = ["train.py", "--steps", "3"]
    assert cluster.result.values[:2] == [
        ("master", 0, 2, argv, ["master", "worker"]),
        ("worker", 0, 2, argv, ["master", "worker"]),
    ]


@pytest.mark.slow
def test_parameter_servers_beside_the_driver_take_no_slot(spark_local4: Any) -> None:
    def roles(args: Any, ctx: Any) -> Any:
        import os

        if ctx.job_name == "ps":
            sleeper(args, ctx)
        return ctx.job_name, len(ctx.cluster_spec["ps"]), os.getppid() > 0

    with start(spark_local4, roles, 5, num_ps=1, driver_ps_nodes=True, input_mode=FILES) as cluster:
        assert [node["job_name"] for node in cluster.cluster_info] == ["worker"] * 4 + ["ps"]
    assert cluster.result is not None
    assert [value[:2] for value in cluster.result.values[:4]] == [("worker", 1)] * 4
    assert not processes_with("tfos_magic.node")


@pytest.mark.slow
def test_queues_of_ones_own(spark_local4: Any) -> None:
    def two(args: Any, ctx: Any) -> Any:
        first, second = ctx.get_data_feed(), ctx.get_data_feed(qname_in="control")
        return first.next_batch(100), second.next_batch(100)

    with start(spark_local4, two, 1, queues=["input", "control", "output", "error"]) as cluster:
        cluster.train(spark_local4.sparkContext.parallelize([1] * 100, 2), 1)
        cluster.train(spark_local4.sparkContext.parallelize([2] * 100, 2), 1, qname="control")
    assert cluster.result is not None
    assert cluster.result.values == [([1] * 100, [2] * 100)]


@pytest.mark.slow
def test_every_slot_taken_by_nodes_still_leaves_room_for_the_feed(spark_local4: Any) -> None:
    with start(spark_local4, read_all, 4) as cluster:
        cluster.train(spark_local4.sparkContext.parallelize(range(100), 8), 1)
    assert sorted(all_rows(cluster)) == list(range(100))


# --- streams ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_structured_streaming_query_feeds_by_foreachbatch(spark_script: Any, tmp_path: Any) -> None:
    done = spark_script(  # a process of its own: the callback server that foreachBatch starts stays for its life
        f"""
        import sys
        sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
        from pyspark.sql import SparkSession
        from test_tfcluster import all_rows, read_all, start
        spark = SparkSession.builder.getOrCreate()

        def feed(cluster):
            stream = spark.readStream.schema("id long").parquet("in")
            writer = stream.writeStream.foreachBatch(lambda frame, number: cluster.train(frame, 1))
            query = writer.option("checkpointLocation", "checkpoint").trigger(availableNow=True).start()
            assert query.awaitTermination(60)

        spark.range(100).coalesce(1).write.parquet("in")
        with start(spark, read_all) as cluster:
            feed(cluster)
            spark.range(100, 150).coalesce(1).write.mode("append").parquet("in")
            feed(cluster)
        assert sorted(all_rows(cluster)) == list(range(150))
        print("all well")
        """
    )
    assert "all well" in done.stdout


@pytest.mark.slow
def test_a_dstream_feeds_until_a_node_wants_no_more(spark_script: Any) -> None:
    done = spark_script(  # a process of its own, for the same reason
        f"""
        import sys
        sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
        from pyspark.sql import SparkSession
        from pyspark.streaming import StreamingContext
        from test_tfcluster import start

        def some(args, ctx):
            feed, seen = ctx.get_data_feed(), 0
            while not feed.should_stop():
                seen += len(feed.next_batch(5))
                if seen >= 30:
                    feed.terminate()
            return seen

        spark = SparkSession.builder.getOrCreate()
        sc = spark.sparkContext
        ssc = StreamingContext(sc, 0.5)
        cluster = start(spark, some, 1)
        cluster.train(ssc.queueStream([sc.parallelize(range(10), 2) for _ in range(100)]))
        ssc.start()
        cluster.shutdown(ssc)
        assert cluster.result.values == [30], cluster.result.values
        assert spark.range(3).count() == 3  # the SparkContext lives
        print("all well")
        """
    )
    assert "all well" in done.stdout


# --- TFParallel -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_independent_nodes_know_only_themselves(spark_local4: Any) -> None:
    def alone(args: Any, ctx: Any) -> Any:
        import os

        return ctx.worker_num, ctx.num_workers, ctx.num_nodes, "TF_CONFIG" in os.environ, args["grid"][ctx.worker_num]

    values = TFParallel.run(spark_local4.sparkContext, alone, {"grid": [0.1, 0.2, 0.3]}, 3)
    assert values == [(n, 3, 1, False, (0.1, 0.2, 0.3)[n]) for n in range(3)]


def test_more_independent_nodes_than_slots_take_turns(spark_local4: Any) -> None:
    assert TFParallel.run(spark_local4.sparkContext, lambda args, ctx: ctx.worker_num, None, 6, use_barrier=False) == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]
    with pytest.raises(TooFewSlotsError):
        TFParallel.run(spark_local4.sparkContext, lambda args, ctx: 1, None, 6)


@pytest.mark.slow
def test_a_failing_independent_node_is_the_error(spark_local4: Any) -> None:
    def fails(args: Any, ctx: Any) -> None:
        if ctx.worker_num == 2:
            raise ValueError("two")

    with pytest.raises(NodeError, match="two"):
        TFParallel.run(spark_local4.sparkContext, fails, None, 6, use_barrier=False)
    assert not processes_with("tfos_magic.node")
