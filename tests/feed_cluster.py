"""Receivers and sources as a run has them, without agents and children; for the feed's tests."""

from __future__ import annotations

import gc
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from tfos_magic.feed.cargo import FeedPlan, Portion
from tfos_magic.feed.receiver import FeedReceiver
from tfos_magic.feed.sender import feed_partition
from tfos_magic.feed.source import Feeds, FeedSource
from tfos_magic.feed.spool import ChunkRef
from tfos_magic.feed.staging import ChunkReady, FeedEnded, FeedFailed, FeedNotice, FeedOpened


class FakeNode:
    """A receiver whose notices go straight to the sources, as agent and child do it over their channel."""

    def __init__(self, index: int, secret: bytes, directory: Path, epochs: int = 1, *, in_order: bool = False) -> None:
        self.feeds = Feeds(["train", "validation"], index, epochs, in_order=in_order)
        self.notices: list[FeedNotice] = []
        self.receiver = FeedReceiver("127.0.0.1", secret, str(directory), self._notify)

    @property
    def train(self) -> FeedSource:
        return self.feeds.get("train")

    def rows(self, column: str = "y") -> list[Any]:
        return [value for batch in self.train.chunks() for value in batch.column(column).to_pylist()]

    def close(self) -> None:
        self.receiver.close()
        self.feeds.close()

    def _notify(self, notice: FeedNotice) -> None:
        self.notices.append(notice)
        source = self.feeds.get(notice.name)
        if isinstance(notice, FeedOpened):
            source.open(notice.schema_ipc, os.dup(notice.fd))
        elif isinstance(notice, ChunkReady):
            source.add(ChunkRef(notice.offset, notice.length_bytes, notice.row_count), notice.partition)
        elif isinstance(notice, FeedEnded):
            source.end(notice.rows_per_node, notice.fingerprint)
        elif isinstance(notice, FeedFailed):
            source.fail(notice.message)


@dataclass
class FakeCluster:
    """The driver's part: decides which attempt counts."""

    nodes: list[FakeNode]
    plan: FeedPlan
    totals: list[int] = field(default_factory=list)
    winners: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, partition: int, attempt: int, rows: Sequence[int]) -> bool:
        with self.lock:
            if self.winners.setdefault(partition, attempt) != attempt:
                return False
            for node, row_count in zip(self.nodes, rows, strict=True):
                node.receiver.publish(self.plan.name, partition, attempt, row_count)
            self.totals = [a + b for a, b in zip(self.totals, rows, strict=True)]
            return True

    def feed(self, batches: Iterable[pa.RecordBatch], partition: int = 0, attempt: int | None = None) -> list[int]:
        number = 1000 + partition if attempt is None else attempt

        def commit(portion: Portion) -> bool:
            return self.commit(partition, number, portion.rows_per_node)

        return feed_partition(iter(batches), self.plan, partition, number, commit)

    def end(self) -> list[int]:
        for node in self.nodes:
            node.receiver.end(self.plan.name, self.totals, fingerprint=sum(self.totals))
        return self.totals

    def rows(self, column: str = "y") -> list[Any]:
        return [value for node in self.nodes for value in node.rows(column)]


@contextmanager
def fake_cluster(
    count: int, directory: Path, *, epochs: int = 1, in_order: bool = False, **plan: Any
) -> Iterator[FakeCluster]:
    """`count` nodes that are gone afterwards, with every thread and descriptor."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    secret = secrets.token_bytes(32)
    nodes = [FakeNode(index, secret, directory, epochs, in_order=in_order) for index in range(count)]
    addresses = tuple(("127.0.0.1", node.receiver.port) for node in nodes)
    try:
        yield FakeCluster(nodes, FeedPlan("train", secret, addresses, **plan), [0] * count)
    finally:
        for node in nodes:
            node.close()
    assert {t for t in threading.enumerate() if t.name.startswith("tfos")} <= threads
    deadline = time.monotonic() + 5
    while not _spools() <= descriptors:  # TensorFlow lets go of a dropped iterator's arrays a little later
        assert time.monotonic() < deadline, "a spool is still open"
        gc.collect()
        time.sleep(0.01)
    assert not list(directory.glob("tfos-feed-*"))


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _spools() -> set[str]:
    found = set()
    for number in _descriptors():
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if "tfos-feed-" in target:
            found.add(number)
    return found


def numbered(row_count: int, start: int = 0, batch_rows: int = 100) -> list[pa.RecordBatch]:
    """Batches with a feature `x` and the row's number `y`."""
    batches = []
    for first in range(start, start + row_count, batch_rows):
        numbers = range(first, min(first + batch_rows, start + row_count))
        batches.append(
            pa.RecordBatch.from_pydict({"x": pa.array([n / 2 for n in numbers]), "y": pa.array(numbers, pa.int64())})
        )
    return batches
