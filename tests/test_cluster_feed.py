from __future__ import annotations

import time
from typing import Any

import pytest
from runs import run_cell

from tfos_magic import TFCluster
from tfos_magic.errors import DataError, FeedError, NodeError, UsageError
from tfos_magic.status import Event, NodeBeat

DRAIN = """
feed = ctx.get_data_feed()
rows = []
while not feed.should_stop():
    rows += feed.next_batch(100)
rows
"""


def ids(values: list[Any]) -> list[int]:
    return sorted(row if isinstance(row, int) else row[0] for value in values for row in value)


@pytest.mark.parametrize(("rows", "partitions"), [(1000, 1), (1000, 7), (1, 1), (3, 5), (10_000, 40)])
def test_every_row_reaches_one_node_exactly_once_and_evenly(spark_local4: Any, rows: int, partitions: int) -> None:
    frame = spark_local4.range(rows, numPartitions=partitions)
    values = run_cell(spark_local4, DRAIN, 3, data={"train": frame}).values
    assert ids(values) == list(range(rows))
    sizes = [len(value) for value in values]
    assert max(sizes) - min(sizes) <= partitions


def test_skewed_and_empty_partitions_are_dealt_evenly(spark_local4: Any) -> None:
    # 20 partitions: one has nearly all rows, most have none.
    frame = spark_local4.range(5000, numPartitions=20).where("id > 4700 or id < 10").coalesce(20)
    values = run_cell(spark_local4, DRAIN, 4, data={"train": frame}).values
    assert ids(values) == [*range(10), *range(4701, 5000)]
    assert max(map(len, values)) - min(map(len, values)) <= 20


def test_epochs_repeat_from_the_cache_without_asking_spark_again(spark_local4: Any) -> None:
    seen = spark_local4.sparkContext.accumulator(0)

    def count(batches: Any) -> Any:
        for batch in batches:
            seen.add(batch.num_rows)
            yield batch

    frame = spark_local4.range(300, numPartitions=3).mapInArrow(count, "id long")
    values = run_cell(spark_local4, DRAIN, 2, data={"train": frame}, epochs=4).values
    assert ids(values) == sorted(list(range(300)) * 4)
    assert seen.value == 300


def test_a_second_dataframe_is_the_validation_set(spark_local4: Any) -> None:
    body = "train = ctx.get_data_feed(); val = ctx.get_data_feed(qname_in='validation')\n"
    body += "[len(train.next_batch(10_000)), len(val.next_batch(10_000))]"
    data = {"train": spark_local4.range(1000), "validation": spark_local4.range(200)}
    values = run_cell(spark_local4, body, 2, data=data).values
    assert [sum(column) for column in zip(*values, strict=True)] == [1000, 200]


def test_nodes_that_take_every_slot_are_fed_too(spark_local4: Any) -> None:
    values = run_cell(spark_local4, DRAIN, 4, data={"train": spark_local4.range(777, numPartitions=9)}).values
    assert ids(values) == list(range(777))


def test_heartbeats_count_the_rows(spark_local4: Any) -> None:
    events: list[Event] = []
    body = DRAIN + "\nimport time; time.sleep(1.5); len(rows)"
    result = run_cell(spark_local4, body, 2, data={"train": spark_local4.range(1000)}, on_event=events.append)
    assert sum(result.values) == 1000
    beats = {event.node: event for event in events if isinstance(event, NodeBeat)}
    assert sum(beat.rows_received for beat in beats.values()) == 1000
    assert sum(beat.rows_consumed for beat in beats.values()) == 1000


def test_a_null_is_an_error_that_names_the_column(spark_local4: Any) -> None:
    frame = spark_local4.range(100).selectExpr("id", "if(id = 50, null, id) as hole")
    began = time.monotonic()
    with pytest.raises(DataError, match="hole"):
        run_cell(spark_local4, DRAIN, 2, data={"train": frame})
    assert time.monotonic() - began < 20


def test_an_empty_dataframe_is_an_error_in_words(spark_local4: Any) -> None:
    with pytest.raises(DataError, match="0 rows"):
        run_cell(spark_local4, DRAIN, 2, data={"train": spark_local4.range(10).where("id > 100")})


def test_an_unknown_column_is_refused_before_anything_is_fed(spark_local4: Any) -> None:
    with pytest.raises(UsageError, match="labl"):
        run_cell(spark_local4, DRAIN, 2, data={"train": spark_local4.range(10)}, label="labl")


def test_a_feed_that_fails_in_spark_shows_sparks_error(spark_local4: Any) -> None:
    frame = spark_local4.range(10).selectExpr("id", "cast(raise_error('bad row') as int) as y")
    with pytest.raises(FeedError, match="bad row"):
        run_cell(spark_local4, DRAIN, 2, data={"train": frame})


def test_a_node_that_fails_while_it_is_fed_is_the_error_not_the_feed(spark_local4: Any) -> None:
    frame = spark_local4.range(3_000_000, numPartitions=30)
    with pytest.raises(NodeError, match="my own mistake"):
        run_cell(spark_local4, "raise ValueError('my own mistake')", 2, data={"train": frame})


def test_a_feed_that_the_run_does_not_have_names_the_option(spark_local4: Any) -> None:
    with pytest.raises(NodeError, match="--data"):
        run_cell(spark_local4, "ctx.dataset()", 1)


def test_a_function_that_never_reads_its_data_still_ends(spark_local4: Any) -> None:
    assert run_cell(spark_local4, "7", 2, data={"train": spark_local4.range(100_000)}).values == [7, 7]


@pytest.mark.slow
def test_a_nodes_own_memory_does_not_grow_with_the_data(spark_local4: Any) -> None:
    # What grows is the page cache of an unlinked file, which the kernel gives back when it is needed.
    body = """
import os
feed = ctx.get_data_feed(input_mapping={"x": "x"})
rows, most = 0, {"child": 0, "agent": 0}

def own_memory(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) // 1024

while not feed.should_stop():
    rows += len(feed.next_batch(4096)["x"])
    for name, pid in (("child", os.getpid()), ("agent", os.getppid())):
        most[name] = max(most[name], own_memory(pid))
rows, most
"""
    pixels = "transform(sequence(1, 784), i -> cast((id * i) % 255 as float)) as x"
    frame = spark_local4.range(200_000, numPartitions=16).selectExpr(pixels)  # 630 MB
    rows, most = run_cell(spark_local4, body, 1, data={"train": frame}).values[0]
    assert rows == 200_000
    assert most["agent"] < 100, most
    assert most["child"] < 250, most


def test_a_dataset_over_a_queue_is_refused_in_words(spark_local4: Any) -> None:
    def wrong(args: Any, ctx: Any) -> None:
        ctx.dataset("input")

    cluster = TFCluster.run(spark_local4, wrong, None, 1, input_mode=TFCluster.InputMode.SPARK)
    with pytest.raises(NodeError, match="get_data_feed"):
        cluster.shutdown()
