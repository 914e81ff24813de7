"""``DataFeed``: TensorFlowOnSpark's documented behaviour."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feed_cluster import FakeCluster, fake_cluster, numbered

from tfos_magic.errors import UsageError
from tfos_magic.feed.datafeed import DataFeed


class Manager:
    """``ctx.mgr``."""

    def __init__(self, cluster: FakeCluster, epochs: int = 1) -> None:
        self.epochs = epochs
        self.results: list[tuple[str, Any]] = []
        self.terminated: list[str] = []
        self.get = cluster.nodes[0].feeds.get

    def put_results(self, name, results):
        self.results.append((name, list(results)))

    def terminate(self, name):
        self.terminated.append(name)


@pytest.fixture
def fed(tmp_path: Path):
    with fake_cluster(1, tmp_path, chunk_bytes=1000) as cluster:
        cluster.feed(numbered(100), 0)
        cluster.feed(numbered(50, 100), 1)
        cluster.end()
        yield cluster


def test_rows_come_as_tuples_and_only_the_last_batch_is_short(fed):
    feed = DataFeed(Manager(fed))
    batches = []
    while not feed.should_stop():
        batches.append(feed.next_batch(40))
    assert [len(b) for b in batches] == [40, 40, 40, 30]
    assert batches[0][1] == (0.5, 1)
    assert [row[1] for batch in batches for row in batch] == list(range(150))
    assert feed.next_batch(40) == []
    assert fed.nodes[0].train.rows_consumed == 150


def test_epochs_follow_each_other_without_a_gap(fed):
    feed = DataFeed(Manager(fed, epochs=3))
    batches = []
    while not feed.should_stop():
        batches.append(feed.next_batch(100))
    assert [len(b) for b in batches] == [100] * 4 + [50]
    assert [row[1] for batch in batches for row in batch] == list(range(150)) * 3


def test_input_mapping_gives_arrays_by_tensor_name(fed):
    feed = DataFeed(Manager(fed), input_mapping={"y": "label_tensor", "x": "image"})
    batch = feed.next_batch(120)
    assert list(batch) == ["label_tensor", "image"]
    assert batch["label_tensor"].dtype == np.int64
    assert batch["image"].tolist() == [n / 2 for n in range(120)]
    assert len(feed.next_batch(120)["image"]) == 30
    assert feed.should_stop()
    assert len(feed.next_batch(1)["image"]) == 0


def test_arrays_of_lists_text_and_nulls(tmp_path):
    with fake_cluster(1, tmp_path, allow_nulls=True) as cluster:
        columns = {"l": [[1.0, 2.0], [3.0, 4.0]], "t": ["a", "b"], "n": [1, None], "r": [[1], [2, 3]]}
        cluster.feed([pa.RecordBatch.from_pydict({k: pa.array(v) for k, v in columns.items()})], 0)
        cluster.end()
        batch = DataFeed(Manager(cluster), input_mapping={name: name for name in columns}).next_batch(2)
        assert batch["l"].tolist() == [[1, 2], [3, 4]]
        assert batch["l"].dtype == np.float64
        assert batch["t"].tolist() == ["a", "b"]
        assert batch["n"].tolist() == [1, None]
        assert batch["r"].tolist() == [[1], [2, 3]]
        assert DataFeed(Manager(cluster)).next_batch(2) == [([1.0, 2.0], "a", 1, [1]), ([3.0, 4.0], "b", None, [2, 3])]


def test_one_column_comes_as_plain_values(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        cluster.feed([pa.RecordBatch.from_pydict({"t": pa.array(["a", "b"])})], 0)
        cluster.end()
        assert DataFeed(Manager(cluster)).next_batch(5) == ["a", "b"]


def test_should_stop_waits_until_it_knows(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        feed = DataFeed(Manager(cluster))
        timer = threading.Timer(0.2, lambda: cluster.feed(numbered(10), 0))
        timer.start()
        assert not feed.should_stop()
        timer.join()
        assert len(feed.next_batch(10)) == 10
        timer = threading.Timer(0.2, cluster.end)
        timer.start()
        assert feed.should_stop()
        timer.join()


def test_node_without_rows_stops_at_once(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        cluster.end()
        assert DataFeed(Manager(cluster, epochs=5)).should_stop()


def test_terminate_stops_and_tells_the_manager(fed):
    manager = Manager(fed)
    feed = DataFeed(manager)
    feed.next_batch(10)
    feed.terminate()
    assert feed.should_stop()
    assert feed.next_batch(10) == []
    assert manager.terminated == ["input"]


def test_results_go_to_the_output_queue(fed):
    manager = Manager(fed)
    feed = DataFeed(manager, train_mode=False, qname_out="predictions")
    feed.batch_results([1, 2])
    assert manager.results == [("predictions", [1, 2])]


def test_unknown_names_are_said(fed):
    with pytest.raises(UsageError, match="no feed 'inputs'"):
        DataFeed(Manager(fed), qname_in="inputs")
    with pytest.raises(UsageError, match="no column 'X'"):
        DataFeed(Manager(fed), input_mapping={"X": "x"}).next_batch(1)
