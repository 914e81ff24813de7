"""TFNode: what TensorFlowOnSpark documents, sentence by sentence, and its TensorFlow 1 functions at work."""

from __future__ import annotations

import getpass
import logging
import os
import socket
import subprocess
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import run_cell

from tfos_magic import TFManager, TFNode, compat
from tfos_magic.errors import UsageError
from tfos_magic.feed.source import Feeds
from tfos_magic.marker import EndPartition
from tfos_magic.node.context import NodeContext

ROOT = Path(__file__).resolve().parents[1]
USER = getpass.getuser()


def context(job: str = "worker", index: int = 0, default_fs: str = "file:///", **start: Any) -> NodeContext:
    """``ctx`` as the child makes it, of a cluster whose ports nobody listens on."""
    config = {"index": index, "default_fs": default_fs, "node_secret": ""}
    spec = {"worker": ["127.0.0.1:0", "127.0.0.1:0"], "ps": ["127.0.0.1:0"]}
    full = {
        "job_name": job,
        "task_index": index,
        "cluster_spec": spec,
        "num_workers": 2,
        "is_chief": index == 0,
        "is_server": False,
        "is_coordinator": False,
        "data_options": {},
        "training": {},
        **start,
    }
    return NodeContext(config, full, None, types.SimpleNamespace(feeds=Feeds([], 0)))  # type: ignore[arg-type]


# --- paths -------------------------------------------------------------------------------------------------------


def paths(default_fs: str) -> Any:
    return types.SimpleNamespace(defaultFS=default_fs, working_dir="/home/me/dir")


@pytest.mark.parametrize(
    "scheme", ["adl", "file", "hdfs", "oss", "s3", "s3a", "s3n", "swift", "viewfs", "wasb", "gs", "abfss", "https"]
)
@pytest.mark.parametrize("default_fs", ["file://", "hdfs://name:8020", "s3a://bucket"])
def test_a_path_with_a_scheme_is_absolute_already(scheme: str, default_fs: str) -> None:
    assert TFNode.hdfs_path(paths(default_fs), f"{scheme}://foo/bar") == f"{scheme}://foo/bar"


@pytest.mark.parametrize(
    ("default_fs", "absolute", "relative"),
    [
        ("file://", "file:///foo/bar", "file:///home/me/dir/foo/bar"),
        ("file:///", "file:///foo/bar", "file:///home/me/dir/foo/bar"),
        ("hdfs://", "hdfs:///foo/bar", f"hdfs:///user/{USER}/foo/bar"),
        ("hdfs://name:8020", "hdfs://name:8020/foo/bar", f"hdfs://name:8020/user/{USER}/foo/bar"),
        ("hdfs://name:8020/", "hdfs://name:8020/foo/bar", f"hdfs://name:8020/user/{USER}/foo/bar"),
        ("viewfs://", "viewfs:///foo/bar", f"viewfs:///user/{USER}/foo/bar"),
        ("viewfs://cluster", "viewfs://cluster/foo/bar", f"viewfs://cluster/user/{USER}/foo/bar"),
    ],
)
def test_a_path_without_a_scheme_goes_under_the_default_file_system(
    default_fs: str, absolute: str, relative: str
) -> None:
    assert TFNode.hdfs_path(paths(default_fs), "/foo/bar") == absolute
    assert TFNode.hdfs_path(paths(default_fs), "foo/bar") == relative


def test_a_relative_path_on_another_file_system_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert TFNode.hdfs_path(paths("s3a://bucket"), "/foo") == "s3a://bucket/foo"
        assert not caplog.records
        assert TFNode.hdfs_path(paths("s3a://bucket"), "foo/bar") == "s3a://bucket/foo/bar"
    assert "s3a://bucket has no home for the relative path foo/bar" in caplog.text


def test_ctx_has_the_same_function() -> None:
    ctx = context(default_fs="file:///")
    assert ctx.absolute_path("a/b") == TFNode.hdfs_path(ctx, "a/b") == f"file://{os.getcwd()}/a/b"
    assert context(default_fs="hdfs://n:1").absolute_path("a") == f"hdfs://n:1/user/{USER}/a"


# --- the port ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def can_bind(port: int) -> bool:
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_release_port_closes_the_socket_that_holds_the_nodes_port(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    ctx = context(release_port=False, cluster_spec={"worker": [f"127.0.0.1:{port}"]})
    holder = ctx.tmp_socket
    assert holder is not None
    assert holder.getsockname() == ("127.0.0.1", port)
    assert not can_bind(port)
    TFNode.release_port(ctx)
    assert ctx.tmp_socket is None
    assert holder.fileno() == -1
    assert can_bind(port)
    assert not caplog.records
    ctx.release_port()
    assert "release_port() has nothing to do" in caplog.text


@pytest.mark.parametrize("start", [{}, {"release_port": True}, {"release_port": None}])
def test_no_port_is_held_unless_asked_for(start: dict[str, Any]) -> None:
    assert context(**start).tmp_socket is None


def test_the_evaluator_is_no_part_of_the_cluster_and_holds_no_port() -> None:
    assert context("evaluator", release_port=False).tmp_socket is None


# --- the deprecated functions ------------------------------------------------------------------------------------


@pytest.fixture
def mgr() -> Iterator[TFManager.TFManager]:
    with TFManager.start("key", ["input", "output", "other"]) as manager:
        yield manager


def test_the_functions_that_were_before_datafeed_work_and_warn_at_the_users_line(mgr: TFManager.TFManager) -> None:
    rows = mgr.get_queue("input")
    assert rows is not None
    for item in (1, 2, 3, EndPartition(), 4, None):
        rows.put(item)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = []
        for _ in range(4):
            batch = TFNode.next_batch(mgr, 2)
            TFNode.batch_results(mgr, [10 * row for row in batch])
            batches.append(batch)
    assert batches == [[1, 2], [3], [4], []]
    out = mgr.get_queue("output")
    assert out is not None
    assert [out.get(timeout=1) for _ in range(4)] == [10, 20, 30, 40]
    assert {warning.category for warning in caught} == {DeprecationWarning}
    assert {warning.filename for warning in caught} == {__file__}
    assert "ctx.get_data_feed()" in str(caught[0].message)


def test_the_old_functions_take_other_queues(mgr: TFManager.TFManager) -> None:
    rows = mgr.get_queue("other")
    assert rows is not None
    rows.put("row")
    rows.put(None)
    with pytest.warns(DeprecationWarning):
        assert TFNode.next_batch(mgr, 5, qname="other") == ["row"]
    with pytest.warns(DeprecationWarning):
        TFNode.batch_results(mgr, ["result"], qname="other")
    assert rows.get(timeout=1) == "result"


def test_the_old_terminate_ends_the_feed(mgr: TFManager.TFManager) -> None:
    rows = mgr.get_queue("input")
    assert rows is not None
    for item in (1, 2, 3, None):
        rows.put(item)
    with pytest.warns(DeprecationWarning, match="TFNode.terminate"):
        TFNode.terminate(mgr)
    assert mgr.get("state") == "terminating"
    assert rows.empty()
    with pytest.warns(DeprecationWarning):
        assert TFNode.next_batch(mgr, 5) == []


# --- the server: what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("worker", {"rdma": True}, r"(?s)rdma=True cannot be had.*Leave it out"),
        ("worker", {"num_gpus": -1}, "num_gpus is -1"),
        ("evaluator", {}, "evaluator:0 is no part of the cluster"),
    ],
)
def test_servers_that_cannot_be_are_refused(job: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.warns(DeprecationWarning, match=r"ctx.distribute\(model\)"), pytest.raises(UsageError, match=message):
        TFNode.start_cluster_server(context(job), **arguments)


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"])
    with (
        pytest.warns(DeprecationWarning) as caught,
        pytest.raises(UsageError, match="num_gpus is 2, and worker:0 sees 1"),
    ):
        context().start_cluster_server(num_gpus=2)
    assert caught[0].filename == __file__  # not that of ctx's method


# --- the server and the export, at work --------------------------------------------------------------------------

TRAIN = """
import time

import numpy as np

def main_fun(args, ctx):
    import tensorflow as tf

    v1 = tf.compat.v1
    if args.holds_port:
        held = "%s:%d" % ctx.tmp_socket.getsockname()
        assert held == ctx.cluster_spec[ctx.job_name][ctx.task_index], held
        ctx.release_port()
    assert ctx.tmp_socket is None
    cluster, server = ctx.start_cluster_server(num_gpus=1)
    if ctx.job_name == "ps":
        server.join()
    random = np.random.default_rng(ctx.task_index)
    with tf.Graph().as_default():
        device = v1.train.replica_device_setter(worker_device=f"/job:worker/task:{ctx.task_index}", cluster=cluster)
        with v1.device(device):
            step = v1.train.get_or_create_global_step()
            x = v1.placeholder(tf.float32, (None, 2), name="x")
            target = v1.placeholder(tf.float32, (None, 1), name="target")
            w = v1.get_variable("w", (2, 1))
            b = v1.get_variable("b", (1,))
            y = tf.add(tf.matmul(x, w), b, name="y")
            loss = tf.reduce_mean((y - target) ** 2)
            minimize = v1.train.GradientDescentOptimizer(0.1).minimize(loss, global_step=step)
        is_chief = ctx.task_index == 0
        # Not MonitoredTrainingSession: its workers look for the chief's variables only every 30 s.
        sessions = v1.train.SessionManager(recovery_wait_secs=1, ready_op=v1.report_uninitialized_variables())
        initialize = v1.global_variables_initializer()
        start = sessions.prepare_session if is_chief else sessions.wait_for_session
        with start(server.target, **({"init_op": initialize} if is_chief else {})) as sess:
            for _ in range(200):
                batch = random.normal(size=(16, 2)).astype("float32")
                sess.run(minimize, {x: batch, target: batch @ [[2.0], [-3.0]] + 1.0})
            if not is_chief:
                return "trained"
            while sess.run(step) < 400:  # until the other worker is done, too
                time.sleep(0.05)
            probe = np.array([[1.0, 1.0], [0.5, -2.0]], "float32")
            found = {"y": sess.run(y, {x: probe}), "w": sess.run(w), "on": w.device}
            ctx.export_saved_model(sess, args.export_dir, "serve,train", {
                "predict": {"inputs": {"x": "x"}, "outputs": {"y": y}, "method_name": "tensorflow/serving/predict"},
                "named_like_its_key": {"inputs": {"x": x}, "outputs": {"y": "y:0"}},
            })
            return found
"""


def check_export(values: list[Any], export_dir: Path) -> None:
    first, second, ps = values
    assert (second, ps) == ("trained", None)
    assert first["on"] == "/job:ps/task:0"
    assert np.allclose(first["w"], [[2], [-3]], atol=0.05)
    import tensorflow as tf

    loaded = tf.saved_model.load(str(export_dir), tags=["serve", "train"])
    assert set(loaded.signatures) == {"predict", "named_like_its_key"}
    probe = tf.constant([[1.0, 1.0], [0.5, -2.0]])
    for name in loaded.signatures:
        assert np.array_equal(loaded.signatures[name](x=probe)["y"], first["y"])


@pytest.mark.slow
def test_a_tensorflow_1_program_trains_over_ps_and_workers_and_exports(spark_local4: Any, tmp_path: Path) -> None:
    export_dir = tmp_path / "export"
    args = {"export_dir": str(export_dir), "holds_port": True}
    options: dict[str, Any] = {"num_ps": 1, "chief": False, "serves_itself": True, "preload": ("tensorflow",)}
    result = run_cell(spark_local4, TRAIN, 3, args=args, timeout_s=100.0, release_port=False, **options)
    check_export(result.values, export_dir)
    warned = "\n".join(result.logs["worker:0"])
    assert "DeprecationWarning: TFNode.start_cluster_server is TensorFlowOnSpark's way for TensorFlow 1" in warned
    assert "DeprecationWarning: TFNode.export_saved_model" in warned


@pytest.mark.slow
@pytest.mark.oldest
def test_the_same_with_the_oldest_versions(
    spark_script: Callable[..., subprocess.CompletedProcess[str]], oldest_python: Path, tmp_path: Path
) -> None:
    code = f"""
import pickle
from pathlib import Path
from pyspark.sql import SparkSession
from runs import run_cell
options = dict(num_ps=1, chief=False, serves_itself=True, preload=("tensorflow",), timeout_s=150.0)
spark = SparkSession.builder.getOrCreate()
result = run_cell(spark, {TRAIN!r}, 3, args={{"export_dir": "export", "holds_port": False}}, **options)
Path("values.pkl").write_bytes(pickle.dumps(result.values))
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    spark_script(
        code.replace('"export"', repr(str(tmp_path / "export"))), python=oldest_python, env={"PYTHONPATH": path}
    )
    import pickle

    check_export(pickle.loads((tmp_path / "values.pkl").read_bytes()), tmp_path / "export")


@pytest.fixture
def session() -> Iterator[Any]:
    import tensorflow as tf

    v1 = tf.compat.v1
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, (None,), name="x")
        weight = v1.get_variable("weight", initializer=3.0)
        tf.multiply(x, weight, name="y")
        initialize = v1.global_variables_initializer()
    sess = v1.Session(graph=graph)
    sess.run(initialize)
    yield sess
    sess.close()


@pytest.mark.parametrize("is_finalized", [True, False])
def test_export_leaves_the_graph_as_it_was(session: Any, tmp_path: Path, is_finalized: bool) -> None:
    if is_finalized:
        session.graph.finalize()
    signature = {"serving_default": {"inputs": {"a": "x"}, "outputs": {"b": "y"}}}
    with pytest.warns(DeprecationWarning, match=r"model.export\(path\)") as caught:
        TFNode.export_saved_model(session, str(tmp_path / "export"), "serve", signature)
    assert caught[0].filename == __file__
    assert session.graph.finalized is is_finalized
    import tensorflow as tf

    found = tf.saved_model.load(str(tmp_path / "export")).signatures["serving_default"](a=tf.constant([1.0, 2.0]))
    assert found["b"].numpy().tolist() == [3.0, 6.0]


# --- compat ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    import keras

    made = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    return made


def test_the_chief_exports_and_no_other_node_writes_anything(model: Any, tmp_path: Path) -> None:
    import tensorflow as tf

    rows = np.array([[1.0, 2.0]], "float32")
    for name in ("export", "model.keras"):
        compat.export_saved_model(model, str(tmp_path / name))
        assert not list(tmp_path.iterdir())
    compat.export_saved_model(model, str(tmp_path / "export"), is_chief=True)
    loaded = tf.saved_model.load(str(tmp_path / "export"))
    assert np.allclose(loaded.serve(tf.constant(rows)), model(rows))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # Keras
def test_a_name_that_says_so_becomes_a_keras_file(model: Any, tmp_path: Path) -> None:
    import keras

    rows = np.array([[1.0, 2.0]], "float32")
    compat.export_saved_model(model, str(tmp_path / "model.keras"), is_chief=True)
    assert np.allclose(keras.saving.load_model(tmp_path / "model.keras")(rows), model(rows))


def test_sharding_is_turned_off() -> None:
    import tensorflow as tf

    options = tf.data.Options()
    compat.disable_auto_shard(options)
    assert options.experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.OFF


def test_gpus_are_those_that_tensorflow_sees() -> None:
    import tensorflow as tf

    assert compat.is_gpu_available() is bool(tf.config.list_physical_devices("GPU"))
