"""``DataFeed``: TensorFlowOnSpark's documented behaviour, over everything that can give it rows."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feed_cluster import FakeCluster, fake_cluster, numbered

from tfos_magic import TFManager
from tfos_magic.errors import UsageError
from tfos_magic.feed import objects
from tfos_magic.feed.datafeed import DataFeed
from tfos_magic.feed.readers import QueueReader
from tfos_magic.feed.source import Feeds
from tfos_magic.feed.spool import ChunkRef
from tfos_magic.feed.stream import StreamSource
from tfos_magic.marker import EndPartition
from tfos_magic.node.manager import Manager

# --- --data: a cached feed ---------------------------------------------------------------------------------------


def manager_of(cluster: FakeCluster) -> Manager:
    """``ctx.mgr`` of the first node."""
    return Manager(cluster.nodes[0].feeds)


@pytest.fixture(params=[1])
def fed(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FakeCluster]:
    with fake_cluster(1, tmp_path, epochs=request.param, chunk_bytes=1000) as cluster:
        cluster.feed(numbered(100), 0)
        cluster.feed(numbered(50, 100), 1)
        cluster.end()
        yield cluster


def batches_of(feed: DataFeed, batch_size: int) -> list[Any]:
    batches = []
    while not feed.should_stop():
        batches.append(feed.next_batch(batch_size))
    return batches


def test_rows_come_as_tuples_and_only_the_last_batch_is_short(fed: FakeCluster) -> None:
    feed = DataFeed(manager_of(fed))
    batches = batches_of(feed, 40)
    assert [len(b) for b in batches] == [40, 40, 40, 30]
    assert batches[0][1] == (0.5, 1)
    assert [row[1] for batch in batches for row in batch] == list(range(150))
    assert feed.next_batch(40) == []
    assert fed.nodes[0].train.rows_consumed == 150


@pytest.mark.parametrize("fed", [3], indirect=True)
def test_epochs_follow_each_other_without_a_gap(fed: FakeCluster) -> None:
    batches = batches_of(DataFeed(manager_of(fed)), 100)
    assert [len(b) for b in batches] == [100] * 4 + [50]
    assert [row[1] for batch in batches for row in batch] == list(range(150)) * 3


def test_each_feed_over_the_same_data_starts_anew(fed: FakeCluster) -> None:
    manager = manager_of(fed)
    assert DataFeed(manager).next_batch(5) == DataFeed(manager).next_batch(5)


def test_input_mapping_gives_arrays_by_tensor_name(fed: FakeCluster) -> None:
    feed = DataFeed(manager_of(fed), input_mapping={"y": "label_tensor", "x": "image"})
    batch: Any = feed.next_batch(120)
    assert list(batch) == ["label_tensor", "image"]
    assert batch["label_tensor"].dtype == np.int64
    assert batch["image"].tolist() == [n / 2 for n in range(120)]
    assert len(feed.next_batch(120)["image"]) == 30  # type: ignore[call-overload]
    assert feed.should_stop()
    assert len(feed.next_batch(1)["image"]) == 0  # type: ignore[call-overload]


def test_arrays_of_lists_text_and_nulls(tmp_path: Path) -> None:
    with fake_cluster(1, tmp_path, allow_nulls=True) as cluster:
        columns = {"l": [[1.0, 2.0], [3.0, 4.0]], "t": ["a", "b"], "n": [1, None], "r": [[1], [2, 3]]}
        cluster.feed([pa.RecordBatch.from_pydict({k: pa.array(v) for k, v in columns.items()})], 0)
        cluster.end()
        batch: Any = DataFeed(manager_of(cluster), input_mapping={name: name for name in columns}).next_batch(2)
        assert batch["l"].tolist() == [[1, 2], [3, 4]]
        assert batch["l"].dtype == np.float64
        assert batch["t"].tolist() == ["a", "b"]
        assert batch["n"].tolist() == [1, None]
        assert batch["r"].tolist() == [[1], [2, 3]]
        rows = DataFeed(manager_of(cluster)).next_batch(2)
        assert rows == [([1.0, 2.0], "a", 1, [1]), ([3.0, 4.0], "b", None, [2, 3])]


def test_one_column_comes_as_plain_values(tmp_path: Path) -> None:
    with fake_cluster(1, tmp_path) as cluster:
        cluster.feed([pa.RecordBatch.from_pydict({"t": pa.array(["a", "b"])})], 0)
        cluster.end()
        assert DataFeed(manager_of(cluster)).next_batch(5) == ["a", "b"]


def test_should_stop_waits_until_it_knows(tmp_path: Path) -> None:
    with fake_cluster(1, tmp_path) as cluster:
        feed = DataFeed(manager_of(cluster))
        timer = threading.Timer(0.2, lambda: cluster.feed(numbered(10), 0))
        timer.start()
        assert not feed.should_stop()
        timer.join()
        assert len(feed.next_batch(10)) == 10
        timer = threading.Timer(0.2, cluster.end)
        timer.start()
        assert feed.should_stop()
        timer.join()


def test_node_without_rows_stops_at_once(tmp_path: Path) -> None:
    with fake_cluster(1, tmp_path, epochs=5) as cluster:
        cluster.end()
        assert DataFeed(manager_of(cluster)).should_stop()


def test_terminate_stops_this_feed_and_no_other(fed: FakeCluster) -> None:
    manager = manager_of(fed)
    feed, other = DataFeed(manager), DataFeed(manager)
    feed.next_batch(10)
    feed.terminate()
    assert feed.should_stop()
    assert feed.next_batch(10) == []
    assert len(other.next_batch(10)) == 10


def test_a_training_run_takes_no_results(fed: FakeCluster) -> None:
    with pytest.raises(UsageError, match=r"takes no results \(2 were given\)"):
        DataFeed(manager_of(fed), train_mode=False).batch_results([1, 2])


def test_unknown_names_are_said(fed: FakeCluster) -> None:
    with pytest.raises(UsageError, match="no feed 'inputs'"):
        DataFeed(manager_of(fed), qname_in="inputs")
    with pytest.raises(UsageError, match="no column 'X'"):
        DataFeed(manager_of(fed), input_mapping={"X": "x"}).next_batch(1)
    with pytest.raises(UsageError, match="batch_size is 0"):
        DataFeed(manager_of(fed)).next_batch(0)


# --- our stream --------------------------------------------------------------------------------------------------


class Wire:
    """The agent's side of a stream: keeps what the child says, and feeds what the tests say."""

    def __init__(self, path: Path) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.results: list[tuple[int, list[Any]]] = []
        self.stream = StreamSource("input", 0, self)
        self.manager = Manager(Feeds([], 0, queues=[self.stream]))
        self._file = path.open("w+b")
        self.stream.announce("input-1")
        self.stream.open("input-1", b"", os.dup(self._file.fileno()))

    def send(self, message_type: str, /, **fields: Any) -> None:
        self.said.append((message_type, fields))

    def send_blob(self, message_type: str, data: bytes, /, **fields: Any) -> None:
        assert message_type == "results"
        self.results.append((fields["session"], objects.loads(data)))

    def rows(self, rows: Sequence[Any], session: int | None = None) -> None:
        data = objects.dumps(list(rows))
        offset = self._file.tell()
        self._file.write(data)
        self._file.flush()
        self.stream.add("input-1", ChunkRef(offset, len(data), len(rows)), session)

    def end_partition(self, session: int | None = None) -> None:
        self.stream.end_partition("input-1", session)

    def names(self) -> list[str]:
        return [name for name, _ in self.said]

    def close(self) -> None:
        self.stream.close()
        self._file.close()


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path / "spool")
    yield made
    made.close()


def test_training_over_a_stream_runs_across_partitions(wire: Wire) -> None:
    wire.rows([(1, "a"), (2, "b")])
    wire.end_partition()
    wire.end_partition()
    wire.rows([(3, "c")])
    wire.stream.end_delivery("input-1", [3])
    wire.stream.finish()
    assert batches_of(DataFeed(wire.manager), 2) == [[(1, "a"), (2, "b")], [(3, "c")]]
    assert wire.names().count("drained") == 1


def test_inference_over_a_stream_stops_where_partitions_end(wire: Wire) -> None:
    feed = DataFeed(wire.manager, train_mode=False)
    wire.end_partition(1)  # an empty one
    wire.rows([1, 2, 3], session=2)
    wire.end_partition(2)
    wire.rows([4], session=3)
    wire.end_partition(3)
    wire.stream.finish()
    batches = []
    while not feed.should_stop():
        batch = feed.next_batch(2)
        feed.batch_results([10 * row for row in batch])
        batches.append(batch)
    assert batches == [[1, 2], [3], [4]]
    assert wire.results == [(2, [10, 20]), (2, [30]), (3, [40])]


def test_chunks_of_a_task_that_is_gone_give_their_space_back(wire: Wire) -> None:
    wire.rows([1, 2], session=1)
    wire.rows([3], session=2)
    wire.stream.lose(1)
    wire.rows([4, 5], session=1)  # it was on its way
    wire.stream.finish()
    assert DataFeed(wire.manager, train_mode=False).next_batch(9) == [3]
    assert wire.names().count("released") == 3


def test_objects_of_a_stream_become_arrays(wire: Wire) -> None:
    wire.rows([(1, [0.5, 1.0]), (2, [1.5, 2.0])])
    wire.rows([(3, [2.5, 3.0])])
    batch: Any = DataFeed(wire.manager, input_mapping={"label": "y", "z_image": "x"}).next_batch(3)
    assert batch["y"].tolist() == [1, 2, 3]
    assert batch["x"].tolist() == [[0.5, 1.0], [1.5, 2.0], [2.5, 3.0]]


def test_terminate_tells_the_stream(wire: Wire) -> None:
    wire.rows(range(10))
    feed = DataFeed(wire.manager)
    assert feed.next_batch(3) == [0, 1, 2]
    feed.terminate()
    assert feed.should_stop()
    assert feed.next_batch(3) == []
    assert wire.names()[-1] == "terminate"


# --- queues of anybody's -----------------------------------------------------------------------------------------


class HandMade:
    """The least that ``DataFeed`` needs."""

    def __init__(self) -> None:
        self.queues: dict[str, queue.Queue[Any]] = {"input": queue.Queue(), "output": queue.Queue()}
        self.values: dict[str, Any] = {}
        self.get_queue = self.queues.get
        self.get = self.values.get
        self.set = self.values.__setitem__

    def shutdown(self) -> None:
        """Nothing to end."""


@pytest.fixture(params=["hand-made", "TFManager"])
def mgr(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: Any = HandMade() if request.param == "hand-made" else TFManager.start("abc", ["input", "output"])
    yield made
    made.shutdown()


def put(mgr: Any, *items: Any) -> None:
    for item in items:
        mgr.get_queue("input").put(item)


def test_queue_rows_come_until_none(mgr: Any) -> None:
    put(mgr, *range(10), None)
    feed = DataFeed(mgr)
    assert not feed.done_feeding
    assert [feed.next_batch(2), feed.next_batch(4)] == [[0, 1], [2, 3, 4, 5]]
    assert not feed.done_feeding
    assert not feed.should_stop()
    assert feed.next_batch(10) == [6, 7, 8, 9]
    assert feed.done_feeding
    assert feed.should_stop()
    assert feed.next_batch(10) == []


def test_should_stop_takes_no_row_from_a_queue(mgr: Any) -> None:
    put(mgr, 1, EndPartition(), 2, EndPartition(), None)
    feed = DataFeed(mgr)
    assert [feed.should_stop(), feed.should_stop()] == [False, False]
    assert feed.next_batch(1) == [1]
    assert not feed.should_stop()
    assert feed.next_batch(1) == [2]
    assert feed.should_stop()


@pytest.mark.parametrize(
    ("train_mode", "expected"), [(True, [[1, 2, 3], [4, 5]]), (False, [[1, 2], [3], [4, 5]])], ids=["train", "infer"]
)
def test_batches_end_at_partitions_only_in_inference(mgr: Any, train_mode: bool, expected: list[list[int]]) -> None:
    end = EndPartition()
    put(mgr, end, 1, 2, end, end, 3, end, 4, 5, None)
    assert batches_of(DataFeed(mgr, train_mode), 3) == expected


def test_a_full_batch_at_a_partitions_end_is_not_followed_by_an_empty_one(mgr: Any) -> None:
    put(mgr, 1, 2, EndPartition(), 3, EndPartition(), None)
    feed = DataFeed(mgr, train_mode=False)
    assert [feed.next_batch(2), feed.next_batch(2), feed.next_batch(2)] == [[1, 2], [3], []]


def test_queue_rows_with_input_mapping(mgr: Any) -> None:
    put(mgr, (1, "a"), (2, "b"), (3, "c"), None)
    feed = DataFeed(mgr, input_mapping={"x_number": "n", "y_text": "t"})
    batch: Any = feed.next_batch(5)
    assert (batch["n"].tolist(), batch["t"].tolist(), batch["n"].dtype) == ([1, 2, 3], ["a", "b", "c"], np.int64)


def test_who_feeds_can_wait_until_all_is_taken_but_not_looked_at_only(mgr: Any) -> None:
    put(mgr, 1, 2)
    joined = threading.Event()

    def join() -> None:
        mgr.get_queue("input").join()
        joined.set()

    waiting = threading.Thread(target=join, daemon=True)
    waiting.start()
    feed = DataFeed(mgr)
    assert feed.next_batch(1) == [1]
    assert not feed.should_stop()
    assert not joined.wait(0.3)
    assert feed.next_batch(1) == [2]
    assert joined.wait(5)
    waiting.join()


def test_results_go_into_the_output_queue(mgr: Any) -> None:
    put(mgr, 1, 2, EndPartition())
    feed = DataFeed(mgr, train_mode=False)
    feed.batch_results([row + 0.5 for row in feed.next_batch(5)])
    out = mgr.get_queue("output")
    assert [out.get(timeout=1), out.get(timeout=1), out.qsize()] == [1.5, 2.5, 0]


def test_terminate_says_so_and_drops_what_is_on_its_way(mgr: Any) -> None:
    put(mgr, *range(5))
    feed = DataFeed(mgr)
    assert feed.next_batch(2) == [0, 1]
    assert not feed.should_stop()  # one row is looked at, and must be dropped too
    feeder = threading.Timer(0.3, put, [mgr, 5, 6, None])
    feeder.start()
    feed.terminate()
    feeder.join()
    assert mgr.get("state") == "terminating"
    mgr.get_queue("input").join()  # returns: everything that was put is done
    assert mgr.get_queue("input").empty()
    assert feed.should_stop()
    assert feed.next_batch(1) == []


def test_terminate_waits_for_latecomers_and_not_for_ever() -> None:
    made = HandMade()
    reader = QueueReader(made.queues["input"], made.queues["output"], made, quiet_s=0.3)
    feeder = threading.Timer(0.15, put, [made, 1])
    feeder.start()
    began = time.monotonic()
    reader.terminate()
    feeder.join()
    assert 0.4 < time.monotonic() - began < 3
    assert made.queues["input"].empty()
    assert reader.next_item() is None
    assert not reader.has_rows()


def test_missing_queues_are_said() -> None:
    made = HandMade()
    del made.queues["output"]
    with pytest.raises(UsageError, match=r"(?s)no queue 'rows'.*TFManager.start"):
        DataFeed(made, qname_in="rows")
    with pytest.raises(UsageError, match="There is no queue for 2 results"):
        DataFeed(made, False).batch_results([1, 2])


# --- the manager's queues ----------------------------------------------------------------------------------------


def test_a_streams_rows_can_be_got_one_by_one(wire: Wire) -> None:
    wire.rows([1, 2], session=5)
    wire.end_partition(5)
    wire.stream.finish()
    rows, out = wire.manager.get_queue("input"), wire.manager.get_queue("output")
    assert rows is wire.manager.get_queue("input")
    assert not rows.empty()
    assert [rows.get(), rows.qsize(), rows.get(timeout=1), rows.qsize()] == [1, 1, 2, 0]
    out.put("one")
    out.put("two")
    assert wire.results == [(5, ["one"]), (5, ["two"])]
    assert isinstance(rows.get_nowait(), EndPartition)
    assert rows.empty()
    assert rows.get() is None
    assert rows.get() is None
    with pytest.raises(queue.Empty):
        rows.get(timeout=1)
    rows.task_done()
    rows.join()


def test_wrong_directions_are_refused(wire: Wire) -> None:
    with pytest.raises(UsageError, match="'input' is filled by Spark"):
        wire.manager.get_queue("input").put(1)
    with pytest.raises(UsageError, match="'output' is emptied by Spark"):
        wire.manager.get_queue("output").get()


def test_other_names_are_queues_of_this_process(wire: Wire) -> None:
    mine = wire.manager.get_queue("mine")
    mine.put(1)
    assert wire.manager.get_queue("mine").get_nowait() == 1
    assert wire.manager.get_queue("error").empty()


def test_a_run_without_data_has_no_input_to_wait_for() -> None:
    with pytest.raises(UsageError, match="no feed 'input'"):
        Manager(Feeds([], 0)).get_queue("input")


def test_the_manager_keeps_values(wire: Wire) -> None:
    assert wire.manager.get("state") == "running"
    wire.manager.set("state", "stopped")
    wire.manager.set("mine", 1)
    assert (wire.manager.get("state"), wire.manager.get("mine")) == ("stopped", 1)
    with pytest.raises(KeyError):
        wire.manager.get("nobody's")
