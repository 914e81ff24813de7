"""The same round trip on real executors, through an ordinary Spark job.

Runs on: driver. What the tasks run is the text of `second`, sent with them: executors need not have this package.
"""

from __future__ import annotations

import time
import types
import uuid
from collections.abc import Mapping
from json.decoder import JSONDecoder  # not json.loads: see round_trip
from json.encoder import JSONEncoder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfos_magic.doctor import second
from tfos_magic.errors import SessionError
from tfos_magic.jobs import SparkJob

if TYPE_CHECKING:
    from pyspark import SparkContext

_BROADCAST_BYTES = 1_000_000
_CANCEL_S = 5.0
TIMEOUT_S = 60.0
"""For the whole job: executors may be busy, and may have to import what the object needs."""


def ask_executors(spark: Any, blob: bytes, question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each executor says, of those that tasks reach.

    Parameters
    ----------
    spark : SparkSession or SparkContext
    blob : bytes
    question : mapping
        See `second.answer`.

    Raises
    ------
    SessionError
        Spark Connect, or no answer in time.
    """
    context = _context(spark)
    text = Path(second.__file__).read_text(encoding="utf-8")
    tasks = max(1, context.defaultParallelism)
    sent = context.broadcast(blob) if len(blob) > _BROADCAST_BYTES else blob
    ask = _by_value(text, JSONEncoder().encode(dict(question)), sent)
    rows = context.parallelize(range(tasks), tasks).mapPartitions(ask)
    job = SparkJob(context, f"tfos_doctor-{uuid.uuid4().hex[:8]}", "%tfos_doctor --executors", rows.collect)
    if not job.finish(time.monotonic() + TIMEOUT_S, cancel_s=_CANCEL_S):
        raise SessionError(
            f"The executors have not answered in {TIMEOUT_S:.0f} s.",
            cause="They may be busy with other jobs, or still importing what the object needs.",
            hint="Ask again when they are free, or without --executors.",
        )
    if job.error is not None:
        raise SessionError(
            f"The job on the executors failed: {type(job.error).__name__}: {str(job.error).strip().splitlines()[0]}",
            hint="Does sc.parallelize([1]).collect() work in this session?",
        ) from job.error
    said = [dict(JSONDecoder().decode(each)) for each in job.value]
    return list({each["executor"]: each for each in said}.values())


def _context(spark: Any) -> SparkContext:
    try:
        context: SparkContext = getattr(spark, "sparkContext", spark)
    except Exception:  # Spark Connect's sessions raise where classic ones have it
        context = None  # type: ignore[assignment]
    if context is None or not hasattr(context, "parallelize"):
        raise SessionError(
            "A Spark Connect session has no SparkContext, through which executors are asked.",
            hint="Without --executors the clean second interpreter of this machine is asked.",
        )
    return context


def _by_value(text: str, question: str, blob: Any) -> Any:
    """Return the task's function, such that pickle takes its code along."""
    # cloudpickle sends a function by value when its module is __main__; its closure has everything it needs.
    made = _make_task(text, question, blob)
    copy = types.FunctionType(
        made.__code__, {"__name__": "__main__", "__builtins__": __builtins__}, "ask", None, made.__closure__
    )
    copy.__module__ = "__main__"
    return copy


def _make_task(text: str, question: str, blob: Any) -> Any:
    def ask(_: Any) -> Any:
        # Self-contained, because it travels by value: no name from this module may be used here.
        import json
        import os
        import socket
        import types

        module = types.ModuleType("tfos_magic_doctor_second")
        exec(compile(text, "<tfos_magic doctor>", "exec"), module.__dict__)
        facts = module.answer(blob if isinstance(blob, bytes) else blob.value, json.loads(question))
        with open(f"/proc/{os.getppid()}/stat") as file:  # the daemon's; its parent is the executor's JVM
            process = file.read().rpartition(")")[2].split()[1]
        facts["executor"] = f"{socket.gethostname()}, process {process}"
        yield json.dumps(facts)

    return ask
