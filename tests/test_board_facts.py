"""From the node to the board: what heartbeats and states say of a real run."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from feed_cluster import fake_cluster, numbered
from runs import run_cell

from tfos_magic import TFCluster
from tfos_magic.feed.sender import feed_partition
from tfos_magic.status import Event, MetricsReported, NodeBeat, NodeChanged, NodeState, NodeView
from tfos_magic.widgets import words


def states(events: list[Event]) -> list[NodeState]:
    """Return the states of a run's only node."""
    return [event.state for event in events if isinstance(event, NodeChanged)]


# --- the feed's counters ----------------------------------------------------------------------------------


def test_chunks_are_queued_until_their_rows_have_been_used_once(tmp_path):
    with fake_cluster(1, tmp_path, chunk_bytes=1000) as cluster:
        node = cluster.nodes[0]
        cluster.feed(numbered(1000))
        cluster.end()
        refs = node.train.chunk_refs
        assert len(refs) > 4
        assert node.feeds.queued == (len(refs), sum(ref.length_bytes for ref in refs))
        node.train.count_consumed(refs[0].row_count + refs[1].row_count + 1)
        assert node.feeds.queued == (len(refs) - 2, sum(ref.length_bytes for ref in refs[2:]))
        node.train.count_consumed(5000)  # epochs later
        assert node.feeds.queued == (0, 0)


def test_rows_per_epoch_are_known_when_every_feed_has_ended(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        cluster.feed(numbered(1000))
        cluster.end()
        feeds = cluster.nodes[0].feeds
        assert feeds.rows_per_epoch is None  # the validation rows are still to come
        feeds.get("validation").end((0, 0))
        assert feeds.rows_per_epoch == 500


def test_chunks_that_wait_for_the_drivers_word_are_counted(tmp_path):
    with fake_cluster(1, tmp_path, chunk_bytes=1000) as cluster:
        receiver = cluster.nodes[0].receiver
        assert receiver.staged == (0, 0)
        feed_partition(iter(numbered(1000)), cluster.plan, 0, 7, lambda portion: False)
        chunks, size_bytes = receiver.staged
        assert chunks > 4
        assert size_bytes > 8 * 1000
        assert cluster.commit(0, 7, [1000])
        assert receiver.staged == (0, 0)


def test_only_a_task_that_has_to_wait_for_room_counts_as_waiting(tmp_path):
    with fake_cluster(1, tmp_path, chunk_bytes=1000) as cluster:
        node = cluster.nodes[0]
        node.receiver.add_queue("train", 4000)
        cluster.feed(numbered(500))  # one by itself has room, however much it is; nobody takes it
        assert node.receiver.wait_s == 0
        second = threading.Thread(
            target=lambda: feed_partition(iter(numbered(500)), cluster.plan, 1, 2, lambda _: True)
        )
        second.start()
        deadline = time.monotonic() + 20
        while node.receiver.wait_s < 0.3 and time.monotonic() < deadline:
            time.sleep(0.01)
        held_s = node.receiver.wait_s
        node.receiver.end("train", [500])  # nothing more is wanted: it goes on, for nothing
        second.join(20)
        assert held_s >= 0.3
        stood_at = node.receiver.wait_s
        time.sleep(0.05)
        assert node.receiver.wait_s == stood_at


# --- the whole way ----------------------------------------------------------------------------------------


def test_a_beat_tells_the_rows_of_an_epoch_and_what_lies_at_the_node(spark_local4: Any) -> None:
    body = """
import time
feed = ctx.get_data_feed()
while ctx.feeds.rows_per_epoch is None:
    time.sleep(0.05)
time.sleep(1.6)
rows = 0
while not feed.should_stop():
    rows += len(feed.next_batch(100))
time.sleep(1.5)
rows
"""
    events: list[Event] = []
    result = run_cell(spark_local4, body, 2, data={"train": spark_local4.range(1000)}, epochs=2, on_event=events.append)
    assert sum(result.values) == 2000
    beats = [event for event in events if isinstance(event, NodeBeat) and event.node == "worker:0"]
    assert max(beat.queued_chunks for beat in beats) > 0
    assert max(beat.queued_bytes for beat in beats) > 100
    assert beats[-1].queued_chunks == beats[-1].queued_bytes == 0
    assert beats[-1].rows_per_epoch == 500
    assert all(beat.feed_wait_s == 0 for beat in beats)  # a cache has room


def test_a_feed_that_waits_for_the_nodes_is_said_to(spark_local4: Any) -> None:
    def slowly(args: Any, ctx: Any) -> int:
        import time

        feed, seen = ctx.get_data_feed(), 0
        while not feed.should_stop():
            seen += len(feed.next_batch(500))
            time.sleep(0.4)
        return seen

    rows = spark_local4.sparkContext.parallelize(range(16), 16).flatMap(lambda n: (bytes(1000) for _ in range(500)))
    cluster = TFCluster.run(
        spark_local4, slowly, None, 1, input_mode=TFCluster.InputMode.SPARK, queue_limit_bytes=200_000
    )
    seen: list[NodeView] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            seen.extend(cluster.board.view().nodes)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        cluster.train(rows, 1)
    finally:
        stop.set()
        watcher.join()
        cluster.shutdown()
    assert max(node.queued_chunks for node in seen) > 0
    assert max(node.feed_wait_percent or 0 for node in seen) > 40
    node = cluster.board.view().nodes[0]
    shares = (node.wait_percent, node.feed_wait_percent)
    assert "compute-bound: the feed waited" in words.bottleneck(cluster.board.view()), shares


def test_a_node_that_saves_says_so(spark_local4: Any) -> None:
    events: list[Event] = []
    body = "with ctx.saving():\n    with ctx.saving():\n        pass\n    import time; time.sleep(1.2)\n7"
    assert run_cell(spark_local4, body, 1, on_event=events.append).values == [7]
    told = states(events)
    assert told.count(NodeState.SAVING) == 1
    at = told.index(NodeState.SAVING)
    assert told[at - 1] is NodeState.RUNNING
    assert told[at + 1] is NodeState.RUNNING


@pytest.mark.slow
def test_a_keras_model_that_is_saved_shows_it_and_is_saved_as_before(spark_local4: Any) -> None:
    body = """
import keras, numpy as np, os, tempfile
model = ctx.distribute(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
model.compile("sgd", "mse")
x = np.ones((64, 3), "float32")
folder = tempfile.mkdtemp()
path = os.path.join(folder, "best.keras")
model.fit(x, x[:, :1], epochs=2, verbose=0, callbacks=[keras.callbacks.ModelCheckpoint(path)])
model.save(path)
model.save_weights(os.path.join(folder, "a.weights.h5"))
model.export(os.path.join(folder, "exported"))
same = np.array_equal(keras.models.load_model(path).predict(x, verbose=0), model.predict(x, verbose=0))
sorted(os.listdir(folder)), bool(same)
"""
    events: list[Event] = []
    result = run_cell(spark_local4, body, 1, on_event=events.append)
    assert result.values == [(["a.weights.h5", "best.keras", "exported"], True)]
    told = states(events)
    assert told.count(NodeState.SAVING) >= 3
    assert told[-2:] == [NodeState.FINISHED, NodeState.DONE]
    assert [event.epoch for event in events if isinstance(event, MetricsReported) and event.epoch] == [1, 2]
