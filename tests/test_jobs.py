"""Spark actions beside the main thread, and their end."""

from __future__ import annotations

import threading
import time
from typing import Any

from tfos_magic.jobs import SparkJob

PATIENCE_S = 20.0


def test_the_value_and_the_error_of_the_action(spark_local4: Any) -> None:
    context = spark_local4.sparkContext
    job = SparkJob(context, "tfos_magic-a", "sum", context.range(10).sum)
    assert job.finish()
    assert (job.value, job.error) == (45, None)
    failing = SparkJob(context, "tfos_magic-b", "fails", context.range(1).map(lambda _: 1 / 0).collect)
    assert failing.finish()
    assert "ZeroDivisionError" in str(failing.error)


def test_a_job_that_spark_has_not_begun_when_it_is_cancelled_is_killed_all_the_same(spark_local4: Any) -> None:
    context = spark_local4.sparkContext
    is_planning, may_begin = threading.Event(), threading.Event()

    def action() -> Any:
        is_planning.set()
        may_begin.wait(PATIENCE_S)
        return context.range(2).map(lambda _: time.sleep(60)).collect()

    job = SparkJob(context, "tfos_magic-c", "is cancelled before it begins", action)
    assert is_planning.wait(PATIENCE_S)
    job.cancel()
    may_begin.set()
    assert job.wait(PATIENCE_S)
    assert "cancelled" in str(job.error)


def test_waiting_for_others_does_not_kill_them(spark_local4: Any) -> None:
    context = spark_local4.sparkContext
    may_end = threading.Event()
    job = SparkJob(context, "tfos_magic-e", "waits", lambda: may_end.wait(PATIENCE_S) and context.range(5).count())
    assert not job.wait(0.3)
    may_end.set()
    assert job.finish(time.monotonic() + PATIENCE_S)
    assert job.value == 5


def test_what_does_not_end_in_time_is_cancelled(spark_local4: Any) -> None:
    context = spark_local4.sparkContext
    job = SparkJob(context, "tfos_magic-f", "slow", context.range(2).map(lambda _: time.sleep(60)).collect)
    assert not job.finish(time.monotonic() + 1.0)
    assert job.has_ended
    assert "cancelled" in str(job.error)
