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
    delivery.commit(task, {"partition": partition, "attempt": attempt, "rows": rows})  # type: ignore[arg-type]
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
    assert nodes[1].sent[-1] == {"type": "feed_end", "feed": "train", "rows_per_node": [3, 3]}


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
