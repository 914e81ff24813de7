from __future__ import annotations

from typing import Any

import pytest

from tfos_magic.errors import DataError, FeedError
from tfos_magic.feeding import Delivery


class Recorder:
    """Stands where a connection would be and keeps what is sent."""

    feed_port = 1

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, header: dict[str, Any]) -> None:
        self.sent.append(dict(header))


class EndedJob:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


@pytest.fixture
def nodes() -> list[Any]:
    return [Recorder(), Recorder()]


def commit(delivery: Delivery, partition: int, attempt: int, rows: list[int]) -> bool:
    task = Recorder()
    about = {"number": 0, "is_last": True, "fingerprint": 0, "rows_per_node": rows}
    delivery.commit(task, {"partition": partition, "attempt": attempt, **about})  # type: ignore[arg-type]
    return bool(task.sent[0]["accepted"])


def test_the_first_attempt_of_a_partition_counts_and_a_twin_does_not(nodes: list[Any]) -> None:
    delivery = Delivery("train", nodes)
    assert commit(delivery, 0, 10, [3, 2])
    assert not commit(delivery, 0, 11, [3, 2])
    assert commit(delivery, 0, 10, [3, 2])  # it asks again: the answer was lost, the decision stands
    assert commit(delivery, 1, 12, [0, 1])
    delivery.end(EndedJob())  # type: ignore[arg-type]
    published = [(m["partition"], m["attempt"], m["rows"]) for m in nodes[0].sent if m["type"] == "publish"]
    assert published == [(0, 10, 3), (1, 12, 0)]
    said = nodes[1].sent[-1]
    assert said == {"type": "feed_end", "feed": "train", "rows_per_node": [3, 3], "fingerprint": said["fingerprint"]}


def test_the_fingerprint_is_that_of_the_rows_and_not_of_the_way_they_came(nodes: list[Any]) -> None:
    found = []
    for order, rows in (([0, 1], [3, 2]), ([1, 0], [3, 2]), ([0, 1], [2, 3])):
        delivery = Delivery("train", nodes)
        for attempt, partition in enumerate(order):
            assert commit(delivery, partition, attempt, rows)
        delivery.end(EndedJob())  # type: ignore[arg-type]
        found.append(nodes[0].sent[-1]["fingerprint"])
    assert found[0] == found[1] != found[2]


def portion(delivery: Delivery, attempt: int, number: int, fingerprint: int, *, is_last: bool = False) -> Any:
    task = Recorder()
    about = {"number": number, "is_last": is_last, "fingerprint": fingerprint, "rows_per_node": [4, 4]}
    delivery.commit(task, {"partition": 0, "attempt": attempt, **about})  # type: ignore[arg-type]
    return task.sent[0]


def test_a_repeated_partition_adds_only_the_portions_that_were_missing(nodes: list[Any]) -> None:
    delivery = Delivery("input/1", nodes, "input")
    assert portion(delivery, 10, 0, 111)["accepted"]
    assert portion(delivery, 10, 1, 222)["accepted"]  # and then its Python worker dies
    assert not portion(delivery, 11, 0, 111)["accepted"]
    assert not portion(delivery, 11, 1, 222)["accepted"]
    assert portion(delivery, 11, 2, 333, is_last=True)["accepted"]
    assert not portion(delivery, 12, 0, 999)["accepted"]  # a straggler, after all has been decided
    assert [m["type"] for m in nodes[0].sent] == ["publish", "publish", "discard", "discard", "publish"]
    assert delivery.row_count == 24


def test_a_partition_that_comes_in_another_order_is_refused_once_part_of_it_was_taken(nodes: list[Any]) -> None:
    delivery = Delivery("input/1", nodes, "input")
    assert portion(delivery, 10, 0, 111)["accepted"]
    answer = portion(delivery, 11, 0, 112)
    assert not answer["accepted"]
    assert "persist" in answer["refusal"]
    assert isinstance(delivery.error, FeedError)


def test_no_rows_at_all_is_an_error_and_nodes_are_not_told_to_go_on(nodes: list[Any]) -> None:
    delivery = Delivery("train", nodes)
    delivery.end(EndedJob())  # type: ignore[arg-type]
    assert isinstance(delivery.error, DataError)
    assert not nodes[0].sent


def test_what_a_task_found_in_the_data_outweighs_sparks_wrapping_of_it(nodes: list[Any]) -> None:
    delivery = Delivery("train", nodes)
    delivery.refuse({"fact": "nulls", "cause": "", "hint": "dropna"})
    delivery.end(EndedJob(RuntimeError("Job aborted")))  # type: ignore[arg-type]
    assert str(delivery.error) == "nulls\ndropna"


def test_sparks_own_failure_keeps_its_cause(nodes: list[Any]) -> None:
    delivery = Delivery("train", nodes)
    origin = RuntimeError("\n  Job aborted: disk full\n  at org.apache")
    delivery.end(EndedJob(origin))  # type: ignore[arg-type]
    assert isinstance(delivery.error, FeedError)
    assert "Job aborted: disk full" in str(delivery.error)
    assert delivery.error.__cause__ is origin


def test_of_a_failed_udf_the_python_error_is_shown(nodes: list[Any]) -> None:
    text = """An exception was thrown from the Python worker:
  File "<cell>", line 1, in <lambda>
ZeroDivisionError: division by zero

\tat org.apache.spark.api.python.BasePythonRunner
Caused by: org.apache.spark.api.python.PythonException: Traceback
"""
    delivery = Delivery("train", nodes)
    delivery.end(EndedJob(RuntimeError(text)))  # type: ignore[arg-type]
    assert "ZeroDivisionError: division by zero" in str(delivery.error)
    assert "df.count()" in str(delivery.error)
