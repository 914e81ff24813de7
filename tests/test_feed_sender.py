"""The sender: even dealing, chunk sizes, what it refuses."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from feed_cluster import fake_cluster, numbered

from tfos_magic.errors import DataError, FeedError
from tfos_magic.feed import link
from tfos_magic.feed.cargo import FeedPlan
from tfos_magic.feed.sender import feed_partition
from tfos_magic.feed.staging import ChunkReady, FeedFailed


@pytest.fixture(autouse=True, params=["same host", "another host"])
def way(request, monkeypatch):
    """Each test twice: the task writes into the node's spool, or sends the chunks over TCP."""
    monkeypatch.setattr(link, "is_here", lambda host: request.param == "same host")
    return request.param


@pytest.mark.parametrize("sizes", [[1] * 10, [0, 0, 1, 0], [9999, 1, 0, 3], [7] * 30, [0] * 3])
def test_totals_of_nodes_differ_little_and_no_row_is_lost(tmp_path, sizes):
    with fake_cluster(3, tmp_path, chunk_bytes=2000) as cluster:
        start = 0
        for partition, size in enumerate(sizes):
            assert sum(cluster.feed(numbered(size, start), partition)) == size
            start += size
        totals = cluster.end()
        assert max(totals) - min(totals) <= 2
        assert sorted(cluster.rows()) == list(range(start)) if start else True


def test_many_partitions_of_any_size_stay_even(tmp_path):
    sizes = [random.Random(1).randrange(40) for _ in range(100)]
    with fake_cluster(4, tmp_path) as cluster:
        for partition, size in enumerate(sizes):
            cluster.feed(numbered(size), partition)
        totals = cluster.end()
        assert sum(totals) == sum(sizes)
        assert max(totals) - min(totals) <= 12


def test_chunks_have_about_the_size_asked_for_whatever_the_batches(tmp_path):
    with fake_cluster(2, tmp_path, chunk_bytes=100_000) as cluster:
        cluster.feed(numbered(50_000, batch_rows=50_000), 0)  # one big batch is split
        cluster.feed(numbered(50_000, batch_rows=50), 1)  # many tiny ones are joined
        sizes = [n.length_bytes for node in cluster.nodes for n in node.notices if isinstance(n, ChunkReady)]
        assert 12 <= len(sizes) <= 24
        assert max(sizes) < 200_000
        cluster.end()
        assert len(cluster.rows()) == 100_000


def test_every_node_learns_the_columns_even_without_a_row(tmp_path):
    with fake_cluster(3, tmp_path) as cluster:
        cluster.feed(numbered(1), 0)
        assert cluster.end() == [1, 0, 0]
        assert [node.train.schema.names for node in cluster.nodes] == [["x", "y"]] * 3
        assert [len(node.rows()) for node in cluster.nodes] == [1, 0, 0]


def test_empty_partition_asks_for_its_commit_too(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        asked: list[Any] = []
        nothing = iter([numbered(1)[0].slice(0, 0)])
        feed_partition(nothing, cluster.plan, 0, 1, lambda portion: asked.append(portion) or True)
        assert [(portion.rows_per_node, portion.is_last) for portion in asked] == [((0, 0), True)]


def test_slices_travel_without_the_rest_of_their_batch(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        lists = pa.array([[float(n)] * 100 for n in range(1000)], pa.list_(pa.float32()))
        cluster.feed([pa.RecordBatch.from_pydict({"x": lists, "y": pa.array(range(1000))})], 0)
        cluster.end()
        sizes = [n.length_bytes for n in cluster.nodes[1].notices if isinstance(n, ChunkReady)]
        assert sum(sizes) < 1.1 * 500 * 412
        assert [row[0] for row in cluster.rows("x")] == cluster.rows("y")


def test_dictionary_columns_arrive_written_out(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        words = pa.array(["a", "b", "a", "c"]).dictionary_encode()
        cluster.feed([pa.RecordBatch.from_pydict({"y": words})], 0)
        cluster.end()
        assert sorted(cluster.rows()) == ["a", "a", "b", "c"]


def test_nulls_are_refused_with_column_count_and_cure(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        batch = pa.RecordBatch.from_pydict({"x": pa.array([1.0, None, None]), "y": pa.array([1, 2, 3])})
        with pytest.raises(DataError) as caught:
            cluster.feed([batch], 0)
        assert "Column 'x' of feed 'train' holds 2 nulls in 3 rows." in str(caught.value)
        assert 'df.dropna(subset=["x"])' in caught.value.hint
        inside = pa.RecordBatch.from_pydict({"x": pa.array([[1.0, None], [2.0]]), "y": pa.array([1, 2])})
        with pytest.raises(DataError, match="1 nulls inside its lists in 2 rows"):
            cluster.feed([inside], 0)


def test_node_that_is_not_there_is_named():
    plan = FeedPlan("train", b"secret", (("127.0.0.1", 1),))
    with pytest.raises(FeedError, match=r"could not connect to node 0 at 127\.0\.0\.1:1"):
        feed_partition(iter(numbered(1)), plan, 0, 1, lambda rows: True)


def test_secret_is_not_in_the_repr():
    assert "hush" not in repr(FeedPlan("train", b"hush", ()))


def test_a_large_partition_becomes_visible_in_portions(tmp_path):
    with fake_cluster(2, tmp_path, chunk_bytes=1000) as cluster:
        for node in cluster.nodes:
            node.receiver.add_queue("train", 1 << 20)
        portions = []

        def commit(portion):
            portions.append((portion.number, sum(portion.rows_per_node), portion.is_last))
            for node, rows in zip(cluster.nodes, portion.rows_per_node, strict=True):
                node.receiver.publish("train", 0, 1, rows, is_last=portion.is_last)
                seen.append(node.receiver.rows_received)
            return True

        seen: list[int] = []
        plan = replace(cluster.plan, portion_bytes=4000)
        rows = feed_partition(iter(numbered(2000)), plan, 0, 1, commit)
        assert sum(rows) == 2000
        assert [number for number, _, _ in portions] == list(range(len(portions)))
        assert len(portions) > 3
        assert [is_last for _, _, is_last in portions] == [False] * (len(portions) - 1) + [True]
        assert sum(count for _, count, _ in portions) == 2000
        assert sum(node.receiver.rows_received for node in cluster.nodes) == 2000


def test_the_fingerprint_tells_another_order_and_not_another_attempt(tmp_path):
    def fingerprints(batches, attempt):
        found = []

        def commit(portion):
            found.append(portion.fingerprint)
            for node, rows in zip(cluster.nodes, portion.rows_per_node, strict=True):
                node.receiver.publish("train", attempt, attempt, rows, is_last=portion.is_last)
            return True

        feed_partition(iter(batches), replace(cluster.plan, portion_bytes=4000), 0, attempt, commit)
        return found

    with fake_cluster(1, tmp_path, chunk_bytes=1000) as cluster:
        cluster.nodes[0].receiver.add_queue("train", 1 << 20)
        rows = numbered(1000)
        first = fingerprints(rows, 0)
        assert first == fingerprints(rows, 0)
        assert first != fingerprints(rows[::-1], 0)


def test_a_portion_is_published_alone_though_the_next_is_there_already(tmp_path):
    """The driver's word reaches a node by another way than the rows, and may come later than they do."""
    with fake_cluster(1, tmp_path, chunk_bytes=1000) as cluster:
        receiver = cluster.nodes[0].receiver
        receiver.add_queue("train", 1 << 20)
        portions: list[Any] = []
        plan = replace(cluster.plan, portion_bytes=4000)
        feed_partition(iter(numbered(1000)), plan, 0, 1, lambda portion: portions.append(portion) or True)
        assert len(portions) > 2
        for portion in portions:
            receiver.publish("train", 0, 1, portion.rows_per_node[0], is_last=portion.is_last)
        assert not [notice for notice in cluster.nodes[0].notices if isinstance(notice, FeedFailed)]
        ready = [notice for notice in cluster.nodes[0].notices if isinstance(notice, ChunkReady)]
        assert sum(notice.row_count for notice in ready) == 1000


def test_a_portion_of_a_sender_that_died_can_still_be_published(tmp_path):
    class Died(Exception):
        pass

    def commit(portion):
        portions.append(portion)
        raise Died  # after the driver has heard of it

    with fake_cluster(1, tmp_path, chunk_bytes=1000) as cluster:
        receiver = cluster.nodes[0].receiver
        receiver.add_queue("train", 1 << 20)
        portions: list[Any] = []
        with pytest.raises(Died):
            feed_partition(iter(numbered(1000)), replace(cluster.plan, portion_bytes=4000), 0, 1, commit)
        while receiver._connections:
            time.sleep(0.01)
        receiver.publish("train", 0, 1, portions[0].rows_per_node[0], is_last=False)
        ready = [notice for notice in cluster.nodes[0].notices if isinstance(notice, ChunkReady)]
        assert sum(notice.row_count for notice in ready) == portions[0].rows_per_node[0] > 0
