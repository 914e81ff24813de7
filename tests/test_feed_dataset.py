"""``make_dataset``: shapes, epochs, order, ends, errors."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from feed_cluster import fake_cluster, numbered

from tfos_magic.errors import DataError, FeedError, UsageError
from tfos_magic.feed import dataset as dataset_module
from tfos_magic.feed.dataset import make_dataset

tf = pytest.importorskip("tensorflow")


def labels(dataset) -> list[list[int]]:
    return [batch[1].numpy().tolist() for batch in dataset]


def flat(batches: list[list[int]]) -> list[int]:
    return [value for batch in batches for value in batch]


@pytest.fixture
def fed(tmp_path):
    """Two nodes with 1001 rows, 501 and 500."""
    with fake_cluster(2, tmp_path) as cluster:
        cluster.feed(numbered(1001), 0)
        cluster.end()
        yield cluster


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 100, 500, 501, 4000])
def test_every_row_once_per_epoch_and_the_same_steps_on_every_node(fed, batch_size, shuffle):
    if batch_size == 1 and shuffle:
        pytest.skip("as long as the one without shuffling, and no further case")
    datasets = [make_dataset(n.train, batch_size=batch_size, shuffle=shuffle) for n in fed.nodes]
    for _ in range(2):
        batches = [labels(d) for d in datasets]
        assert sorted(flat(batches[0]) + flat(batches[1])) == list(range(1001))
        steps = -(-501 // batch_size)
        assert [len(b) for b in batches] == [steps, steps]
        assert all(len(b) == batch_size for b in batches[0][: 500 // batch_size])


def test_features_stay_with_their_labels(fed):
    for x, y in make_dataset(fed.nodes[0].train, batch_size=64):
        assert (x.numpy() == y.numpy() / 2).all()
        assert x.dtype == tf.float32


def test_orders(fed):
    source = fed.nodes[0].train
    ordered = make_dataset(source, batch_size=50, shuffle=False)
    assert flat(labels(ordered)) == list(range(501))
    shuffled = make_dataset(source, batch_size=50, seed=3)
    first, second = flat(labels(shuffled)), flat(labels(shuffled))
    assert sorted(first) == sorted(second) == list(range(501))
    assert first != second != list(range(501))


def test_order_repeats_with_the_seed_and_differs_between_nodes(tmp_path):
    orders = []
    for _ in range(2):
        with fake_cluster(2, tmp_path) as cluster:
            cluster.feed(numbered(200), 0)
            cluster.end()
            orders.append([flat(labels(make_dataset(n.train, batch_size=10, seed=5))) for n in cluster.nodes])
    assert orders[0] == orders[1]
    assert orders[0][0] != [value - 100 for value in orders[0][1]]


@pytest.mark.parametrize("shuffle", [False, True])
def test_in_order_rows_are_the_same_whichever_partition_comes_first(tmp_path, shuffle):
    orders = []
    for partitions in ([0, 1, 2], [2, 0, 1]):
        with fake_cluster(2, tmp_path, in_order=True) as cluster:
            for partition in partitions:
                cluster.feed(numbered(90, start=90 * partition), partition)
            cluster.end()
            orders.append(
                [flat(labels(make_dataset(n.train, batch_size=7, seed=5, shuffle=shuffle))) for n in cluster.nodes]
            )
    assert orders[0] == orders[1]
    assert sorted(flat(orders[0])) == list(range(270))
    assert shuffle or orders[0][0] == sorted(orders[0][0])


def test_in_order_readers_wait_for_the_end_of_the_feed(tmp_path):
    with fake_cluster(1, tmp_path, in_order=True) as cluster:
        source = cluster.nodes[0].train
        cluster.feed(numbered(50, start=50), 1)
        found: list[list[list[int]]] = []

        def read() -> None:
            found.append(labels(make_dataset(source, batch_size=50, shuffle=False)))

        reader = threading.Thread(target=read)
        reader.start()
        reader.join(0.3)
        assert reader.is_alive()
        assert source.is_waiting
        cluster.feed(numbered(50), 0)
        cluster.end()
        reader.join(30)
        assert found == [[list(range(50)), list(range(50, 100))]]


def test_a_pass_that_is_set_again_has_the_order_that_it_had(fed):
    source = fed.nodes[0].train
    dataset = make_dataset(source, batch_size=50, seed=3)
    passes = [flat(labels(dataset)) for _ in range(3)]
    source.passes = 1
    assert [flat(labels(dataset)) for _ in range(2)] == passes[1:]


def test_a_dataset_made_anew_each_epoch_is_shuffled_anew(fed):
    source = fed.nodes[0].train
    first, second = (flat(labels(make_dataset(source, batch_size=50, seed=3))) for _ in range(2))
    assert first != second


def test_node_without_rows_gives_empty_batches_of_the_right_shapes(tmp_path):
    with fake_cluster(3, tmp_path) as cluster:
        batch = pa.RecordBatch.from_pydict({"a": pa.array([[1.0, 2.0]]), "b": pa.array(["s"]), "label": pa.array([1])})
        cluster.feed([batch], 0)
        cluster.end()
        dataset = make_dataset(cluster.nodes[2].train, batch_size=8)
        ((features, label),) = list(dataset)
        assert features["a"].shape == (0, 2)
        assert features["b"].shape == (0,)
        assert label.shape == (0,)
        assert features["b"].dtype == tf.string
        assert dataset.element_spec == (
            {"a": tf.TensorSpec((None, 2), tf.float32), "b": tf.TensorSpec((None,), tf.string)},
            tf.TensorSpec((None,), tf.int64),
        )


def test_first_epoch_streams_while_the_feed_runs(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        source = cluster.nodes[0].train
        cluster.feed(numbered(100), 0)
        dataset = make_dataset(source, batch_size=40)
        iterator = iter(dataset)
        seen = [next(iterator)[1].numpy() for _ in range(2)]
        assert set(np.concatenate(seen)) <= set(range(100))
        waited = source.wait_s
        timer = threading.Timer(0.3, lambda: (cluster.feed(numbered(50, 100), 1), cluster.end()))
        timer.start()
        seen += [batch[1].numpy() for batch in iterator]
        timer.join()
        assert [len(b) for b in seen] == [40, 40, 40, 30]
        assert sorted(np.concatenate(seen)) == list(range(150))
        assert 0.2 < source.wait_s - waited < 5
        assert source.rows_consumed == 150
        assert sorted(flat(labels(dataset))) == list(range(150))
        assert source.rows_consumed == 300


def test_two_iterations_at_once_do_not_disturb_each_other(fed):
    dataset = make_dataset(fed.nodes[0].train, batch_size=10)
    pairs = list(zip(dataset, dataset, strict=True))
    assert sorted(v for a, _ in pairs for v in a[1].numpy()) == list(range(501))
    assert sorted(v for _, b in pairs for v in b[1].numpy()) == list(range(501))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_iterator_dropped_halfway_leaves_no_thread(fed, prefetch):
    before = set(threading.enumerate())
    dataset = make_dataset(fed.nodes[0].train, batch_size=10).prefetch(prefetch)
    iterator = iter(dataset)
    next(iterator)
    del iterator
    gc.collect()
    assert set(threading.enumerate()) <= before
    assert len(list(dataset.take(2))) == 2


def test_larger_share_than_a_window_is_shuffled_window_by_window(fed, monkeypatch):
    monkeypatch.setattr(dataset_module, "_WINDOW_BYTES", 2000)
    with_chunks = fed.nodes[0].train
    dataset = make_dataset(with_chunks, batch_size=32)
    for _ in range(2):
        batches = labels(dataset)
        assert sorted(flat(batches)) == list(range(501))
        assert [len(b) for b in batches] == [32] * 15 + [21]


def test_ragged_columns(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        lists = [list(range(n % 5)) for n in range(101)]
        words = [[f"w{v}" for v in row] for row in lists]
        cluster.feed(
            [pa.RecordBatch.from_pydict({"n": pa.array(range(101)), "l": pa.array(lists), "w": pa.array(words)})], 0
        )
        cluster.end()
        seen = {}
        for node in cluster.nodes:
            dataset = make_dataset(node.train, batch_size=25, label="n", ragged=["l", "w"])
            assert isinstance(dataset.element_spec[0]["l"], tf.RaggedTensorSpec)
            batches = list(dataset)
            assert len(batches) == 3
            for x, n in batches:
                rows = zip(x["l"].to_list(), x["w"].to_list(), n.numpy().tolist(), strict=True)
                seen.update({number: (row, text) for row, text, number in rows})
        assert seen == {n: (lists[n], [w.encode() for w in words[n]]) for n in range(101)}


def test_arrangements(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        table = {"b": [1.5, 2.5], "a": [1, 2], "y": [0, 1], "w": [0.5, 1.0], "t": ["p", "q"]}
        cluster.feed([pa.RecordBatch.from_pydict({k: pa.array(v) for k, v in table.items()})], 0)
        cluster.end()
        source = cluster.nodes[0].train

        def one(**options):
            return next(iter(make_dataset(source, batch_size=2, shuffle=False, **options)))

        x, y, w = one(features=["a", "b"], weight="w")
        assert list(x) == ["a", "b"]
        assert (y.numpy().tolist(), w.numpy().tolist()) == ([0, 1], [0.5, 1.0])
        x, y = one(features=["b"], label="a")
        assert (x.numpy().tolist(), y.numpy().tolist()) == ([1.5, 2.5], [1, 2])
        assert one(features=["y"]).numpy().tolist() == [0, 1]
        everything = one(raw=True)
        assert list(everything) == list(table)
        assert everything["b"].dtype == tf.float64
        assert everything["t"].numpy().tolist() == [b"p", b"q"]


def test_empty_feed_is_said_and_wrong_arguments_too(tmp_path, fed):
    with pytest.raises(UsageError, match="batch_size is 0"):
        make_dataset(fed.nodes[0].train, batch_size=0)
    with pytest.raises(UsageError, match="no column 'z'"):
        make_dataset(fed.nodes[0].train, batch_size=1, label="z")
    with fake_cluster(1, tmp_path) as cluster:
        cluster.feed([], 0)
        cluster.end()
        with pytest.raises(DataError, match=r"(?s)Feed 'train' has no rows.*df\.count"):
            make_dataset(cluster.nodes[0].train, batch_size=1)


def test_failure_of_the_feed_carries_its_text_and_keeps_the_original(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        cluster.feed(numbered(10), 0)
        source = cluster.nodes[0].train
        iterator = iter(make_dataset(source, batch_size=10))
        next(iterator)
        source.fail("Spark job 7 was cancelled")
        with pytest.raises(tf.errors.OpError, match="Spark job 7 was cancelled"):
            next(iterator)
        assert isinstance(source.error, FeedError)


def test_bad_rows_carry_the_cure(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        cluster.feed([pa.RecordBatch.from_pydict({"x": pa.array([[1.0, 2.0], [3.0]])})], 0)
        cluster.end()
        source = cluster.nodes[0].train
        with pytest.raises(tf.errors.OpError, match="lists of different lengths"):
            list(make_dataset(source, batch_size=10))
        assert isinstance(source.error, DataError)


def test_slow_consumers_get_small_superbatches(tmp_path):
    """So that rows_consumed follows what the training has really seen."""
    with fake_cluster(1, tmp_path) as cluster:
        cluster.feed(numbered(20_000), 0)
        cluster.end()
        source = cluster.nodes[0].train
        iterator = iter(make_dataset(source, batch_size=10))
        for step in range(1, 41):
            next(iterator)
            time.sleep(0.01)
            assert source.rows_consumed <= 10 * step + 2000
        del iterator


def test_length_is_known_once_the_feed_has_ended(fed):
    assert int(make_dataset(fed.nodes[1].train, batch_size=50).cardinality()) == 11


def test_keras_fits_on_it(fed):
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    rows = make_dataset(fed.nodes[0].train, batch_size=50).map(lambda x, y: (x[:, None] / 500, y / 1000))
    history = model.fit(rows, epochs=2, verbose=0, shuffle=False)
    assert len(history.history["loss"]) == 2
