"""The whole way from a DataFrame: ``prepare``, real Spark tasks, receivers, datasets."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from feed_cluster import FakeCluster, fake_cluster

from tfos_magic.errors import DataError, UsageError
from tfos_magic.feed.dataset import make_dataset
from tfos_magic.feed.prepare import prepare

ROOT = str(Path(__file__).parent.parent)


@contextmanager
def driver_of(cluster: FakeCluster) -> Iterator[tuple[str, int]]:
    """Answers the tasks' question whether their attempt counts."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            question = json.loads(self.rfile.readline())
            self.wfile.write(json.dumps(cluster.commit(*question)).encode() + b"\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address  # type: ignore[misc]
        finally:
            server.shutdown()
            thread.join()


def feed_from_spark(df: Any, cluster: FakeCluster, on_the_way: Any = iter) -> list[int]:
    """Run the feed job, each task's batches passed through `on_the_way`; return the nodes' totals."""
    plan, root = cluster.plan, ROOT
    with driver_of(cluster) as address:

        def deal(batches):
            import json
            import socket
            import sys

            import pyarrow as pa

            sys.path.insert(0, root)
            from pyspark import TaskContext

            from tfos_magic.feed.sender import feed_partition

            context = TaskContext.get()
            partition, attempt = context.partitionId(), context.taskAttemptId()

            def commit(portion):
                with socket.create_connection(address) as connection, connection.makefile("rw") as lines:
                    print(json.dumps([partition, attempt, portion.rows_per_node]), file=lines, flush=True)
                    return json.loads(lines.readline())

            rows = feed_partition(on_the_way(batches), plan, partition, attempt, commit)
            yield pa.RecordBatch.from_pydict({"rows": [sum(rows)]})

        df.mapInArrow(deal, "rows long").collect()
    return cluster.end()


def dealt_labels(cluster: FakeCluster, **options: Any) -> list[int]:
    return [
        int(v) for n in cluster.nodes for b in make_dataset(n.train, batch_size=64, **options) for v in b[1].numpy()
    ]


@pytest.mark.parametrize("shape", ["even", "skewed", "empty ones", "one row", "many"])
def test_each_row_arrives_once_whatever_the_partitions(spark_local4, tmp_path, shape):
    spark = spark_local4
    rows = 1 if shape == "one row" else 5000
    df = spark.range(rows).selectExpr(
        "id * 0.5 as x", "array(id, id + 1) as pair", "cast(id as string) as text", "id as label"
    )
    df = {
        "even": lambda: df.repartition(4),
        "skewed": lambda: df.repartition(4, (df.label < 4990).cast("int")),
        "empty ones": lambda: df.where("label % 7 = 0").coalesce(1).repartition(8, "label").where("label % 3 = 0"),
        "one row": lambda: df.coalesce(1),
        "many": lambda: df.repartition(50),
    }[shape]()
    with fake_cluster(2, tmp_path) as cluster:
        totals = feed_from_spark(prepare(df), cluster)
        expected = sorted(row.label for row in df.select("label").collect())
        assert sum(totals) == len(expected)
        assert abs(totals[0] - totals[1]) <= 10
        assert sorted(dealt_labels(cluster)) == expected
        for features, label in make_dataset(cluster.nodes[0].train, batch_size=100):
            assert features["pair"].shape[1:] == (2,)
            assert (features["pair"].numpy()[:, 0] == label.numpy()).all()
            assert [int(text) for text in features["text"].numpy()] == label.numpy().tolist()


def test_ml_vectors_travel_as_arrays(spark_local4, tmp_path):
    from pyspark.ml.linalg import Vectors

    rows = [(Vectors.dense([1.0, 2.0, 3.0]), 0), (Vectors.sparse(3, [1], [5.0]), 1)]
    df = prepare(spark_local4.createDataFrame(rows, ["features", "label"]))
    assert df.dtypes == [("features", "array<float>"), ("label", "bigint")]
    with fake_cluster(1, tmp_path) as cluster:
        feed_from_spark(df.coalesce(1), cluster)
        ((x, y),) = list(make_dataset(cluster.nodes[0].train, batch_size=2, shuffle=False))
        assert x.numpy().tolist() == [[1, 2, 3], [0, 5, 0]]
        assert y.numpy().tolist() == [0, 1]


def test_kinds_of_columns_from_spark(spark_local4, tmp_path):
    df = spark_local4.sql(
        "select cast(1.25 as decimal(10,2)) as dec, true as flag, date'1970-01-03' as day, binary('ab') as blob,"
        " timestamp_micros(5) as at, cast(7 as byte) as small, array(array(1, 2), array(3, 4)) as grid, 3 as target"
    )
    with fake_cluster(1, tmp_path) as cluster:
        feed_from_spark(prepare(df), cluster)
        ((x, y),) = list(make_dataset(cluster.nodes[0].train, batch_size=2))
        found = {name: (tensor.dtype.name, tensor.numpy().tolist()) for name, tensor in x.items()}
        assert found == {
            "dec": ("float32", [1.25]),
            "flag": ("bool", [True]),
            "day": ("int32", [2]),
            "blob": ("string", [b"ab"]),
            "at": ("int64", [5]),
            "small": ("int8", [7]),
            "grid": ("int32", [[[1, 2], [3, 4]]]),
        }
        assert y.numpy().tolist() == [3]


def test_prepare_takes_only_what_is_used_in_the_order_asked(spark_local4):
    df = spark_local4.range(1).selectExpr("1 as `a.b`", "2 as c", "3 as y", "4 as w", "5 as unused")
    assert prepare(df, ["c", "a.b"], weight="w").columns == ["c", "a.b", "y", "w"]
    assert prepare(df, ["c", "a.b"]).first().asDict() == {"c": 2, "a.b": 1, "y": 3}
    assert prepare(df, label="c").columns == ["a.b", "y", "w", "unused", "c"]


def test_prepare_refuses_before_any_job_runs(spark_local4):
    spark = spark_local4
    df = spark.range(1).selectExpr(
        "struct(id) as s", "map('a', 1) as m", "null as n", "array(struct(id)) as a", "id as label"
    )
    jobs = set(spark.sparkContext.statusTracker().getJobIdsForGroup(None))
    for name, cure in [("s", r"s\.\*"), ("m", 'df\\["m"\\]'), ("n", "cast"), ("a", "Cast or drop|fields")]:
        with pytest.raises(DataError, match=rf"(?s)Column '{name}' has the type.*{cure}"):
            prepare(df, [name])
    with pytest.raises(UsageError, match=r"Did you mean 'label'\?"):
        prepare(df, label="labels")
    with pytest.raises(DataError, match="more than one column named 'id'"):
        prepare(spark.range(1).join(spark.range(1)))
    assert set(spark.sparkContext.statusTracker().getJobIdsForGroup(None)) == jobs


def test_nulls_end_the_spark_job_with_our_text(spark_local4, tmp_path):
    df = spark_local4.sql("select if(id = 3, null, id) as x, id as label from range(10)")
    with (
        fake_cluster(1, tmp_path) as cluster,
        pytest.raises(Exception, match=r"(?s)Column 'x' of feed 'train' holds 1 nulls"),
    ):
        feed_from_spark(prepare(df).coalesce(1), cluster)


KILLED = """
import sys
sys.path[:0] = {paths!r}
import os, signal
from pathlib import Path
import pyarrow as pa
from pyspark.sql import SparkSession
from feed_cluster import fake_cluster
import test_feed_spark

spark = SparkSession.builder.getOrCreate()
flag = Path({directory!r}) / "killed"

def kill_first_attempt(batches):
    import os, signal
    from pyspark import TaskContext
    context = TaskContext.get()
    for index, batch in enumerate(batches):
        if context.partitionId() == 1 and context.attemptNumber() == 0 and index == 30:
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

if __name__ == "__main__":
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 1000)
    df = spark.range(100_000, numPartitions=2).selectExpr("id as x", "id as label")
    with fake_cluster(2, Path({directory!r}), chunk_bytes=20_000) as cluster:
        totals = test_feed_spark.feed_from_spark(df, cluster, kill_first_attempt)
        assert flag.exists()
        assert totals == [50_000, 50_000], totals
        assert sorted(cluster.rows("label")) == list(range(100_000))
    print("all rows once")
"""


@pytest.mark.slow
def test_python_worker_killed_in_mid_stream_costs_no_row_and_doubles_none(spark_script, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    code = KILLED.format(paths=[ROOT, str(Path(__file__).parent)], directory=str(spool))
    assert "all rows once" in spark_script(code, master="local[2,4]").stdout
