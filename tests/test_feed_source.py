"""The source: waiting, counting, mapping."""

from __future__ import annotations

import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from feed_cluster import fake_cluster, numbered

from tfos_magic.errors import FeedError, UsageError
from tfos_magic.feed.source import Feeds, FeedSource


def test_chunks_block_until_there_are_more_and_end_with_the_feed(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        source, seen = cluster.nodes[0].train, []
        reader = threading.Thread(target=lambda: seen.extend(b.num_rows for b in source.chunks()))
        reader.start()
        cluster.feed(numbered(10), 0)
        cluster.feed(numbered(20), 1)
        reader.join(0.2)
        assert reader.is_alive()
        cluster.end()
        reader.join(10)
        assert sum(seen) == 30
        assert source.row_count == 30
        assert [b.num_rows for b in source.chunks(start=1)] == seen[1:]


def test_big_chunks_are_views_of_the_spool_and_outlive_its_closing(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        cluster.feed([pa.RecordBatch.from_pydict({"y": pa.array(np.arange(300_000))})], 0)
        before = pa.total_allocated_bytes()
        cluster.end()
        batches = list(cluster.nodes[0].train.chunks())
        assert pa.total_allocated_bytes() - before < 10_000
        cluster.nodes[0].close()
        values = np.concatenate([b.column("y").to_numpy() for b in batches])
        assert (values == np.arange(300_000)).all()
        del batches


def test_file_that_grows_while_it_is_mapped(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        held = []
        for partition in range(5):
            cluster.feed([pa.RecordBatch.from_pydict({"y": pa.array(np.full(50_000, partition))})], partition)
            held += [b for b in cluster.nodes[0].train.next_chunks(len(held), 1 << 30)]
        cluster.end()
        assert [set(b.column("y").to_pylist()) for b in held] == [{n} for n in range(5)]
        del held


def test_waiting_time_counts_the_wait_that_still_goes_on(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        source = cluster.nodes[0].train
        assert source.wait_s == 0
        readers = [threading.Thread(target=lambda: source.steps(10)) for _ in range(2)]
        for reader in readers:
            reader.start()
        time.sleep(0.2)
        assert source.is_waiting
        assert 0.1 < source.wait_s < 1
        cluster.end()
        for reader in readers:
            reader.join(10)
        assert not source.is_waiting
        settled = source.wait_s
        assert 0.15 < settled < 1  # two readers at once count once
        assert source.wait_s == settled


def test_steps_are_those_of_the_node_with_most_rows():
    source = FeedSource("train", 1)
    source.end([101, 0, 100])
    assert source.steps(100) == 2
    assert source.steps(101) == 1
    assert list(source.chunks()) == []


def test_failure_reaches_readers_that_wait_and_those_that_come_later():
    source = FeedSource("train", 0)
    errors: list[str] = []

    def read() -> None:
        try:
            list(source.chunks())
        except FeedError as error:
            errors.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    source.fail("Spark gave up")
    reader.join(10)
    with pytest.raises(FeedError, match="Spark gave up"):
        source.steps(1)
    assert errors == ["Spark gave up"]


def test_rows_that_do_not_add_up_are_an_error_and_not_a_short_epoch():
    source = FeedSource("train", 0)
    source.end([5])
    with pytest.raises(FeedError, match="dealt 5 rows, 0 arrived"):
        list(source.chunks())


def test_closing_wakes_readers():
    source = FeedSource("train", 0)
    threading.Timer(0.1, source.close).start()
    with pytest.raises(FeedError, match="closed before it had ended"):
        source.steps(1)


def test_feeds_know_their_names():
    feeds = Feeds(["train", "validation"], 0)
    assert feeds.get("input") is feeds.get("train")
    with pytest.raises(UsageError, match=r"(?s)no feed 'validaton'.*Did you mean 'validation'"):
        feeds.get("validaton")
