"""The receiver: who may speak to it, and which rows become visible."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from feed_cluster import fake_cluster, numbered

from tfos_magic.errors import FeedError
from tfos_magic.feed import link, wire
from tfos_magic.feed.cargo import FeedPlan
from tfos_magic.feed.sender import feed_partition
from tfos_magic.feed.staging import ChunkReady, FeedFailed

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, params=["same host", "another host"])
def way(request, monkeypatch):
    """Each test twice: the task writes into the node's spool, or sends the chunks over TCP."""
    monkeypatch.setattr(link, "is_here", lambda host: request.param == "same host")
    return request.param


def stage_only(rows: list[int]) -> bool:
    return False


def test_staged_rows_are_invisible_until_published(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        feed_partition(iter(numbered(500)), cluster.plan, 0, 7, stage_only)
        assert not any(isinstance(n, ChunkReady) for node in cluster.nodes for n in node.notices)
        assert cluster.nodes[0].receiver.rows_received == 250
        assert cluster.commit(0, 7, [250, 250])
        cluster.end()
        assert sorted(cluster.rows()) == list(range(500))


def test_interleaved_attempts_deliver_each_row_once(tmp_path):
    """Two attempts that cut and order the rows differently stream at the same time; either may win."""
    with fake_cluster(3, tmp_path, chunk_bytes=1000) as cluster:
        barrier = threading.Barrier(2)

        def attempt(partition: int, number: int, batch_rows: int) -> None:
            def in_step():
                for batch in numbered(1000, partition * 1000, batch_rows):
                    barrier.wait(10)
                    yield batch

            cluster.feed(in_step(), partition, number)

        for partition in range(3):
            threads = [
                threading.Thread(target=attempt, args=(partition, n, 100)) for n in (2 * partition, 2 * partition + 1)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
        totals = cluster.end()
        assert sum(totals) == 3000
        assert sorted(cluster.rows()) == list(range(3000))


def test_attempt_that_comes_after_the_decision_changes_nothing(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        assert cluster.feed(numbered(100), 0, attempt=1) == [50, 50]
        assert cluster.feed(numbered(100), 0, attempt=2) == [0, 0]
        cluster.end()
        assert sorted(cluster.rows()) == list(range(100))


def test_repeated_publish_changes_nothing(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        cluster.feed(numbered(100), 0, attempt=1)
        cluster.nodes[0].receiver.publish("train", 0, 1, 100)
        cluster.end()
        assert cluster.rows() == list(range(100))


def test_loser_gives_its_disk_space_back(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        big = [pa.RecordBatch.from_pydict({"y": pa.array(range(200_000), pa.int64())})]
        feed_partition(iter(big), cluster.plan, 0, 1, stage_only)
        feed_partition(iter(numbered(10)[0:0]), cluster.plan, 0, 2, stage_only)
        spool = cluster.nodes[0].receiver._feeds["train"].spool
        before = os.fstat(spool.fd).st_blocks
        assert cluster.commit(0, 2, [0])
        assert os.fstat(spool.fd).st_blocks < before / 10
        assert cluster.nodes[0].receiver.rows_received == 0


def test_missing_rows_fail_the_feed_instead_of_training_on_part(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        feed_partition(iter(numbered(100)), cluster.plan, 0, 1, stage_only)
        cluster.nodes[0].receiver.publish("train", 0, 1, 101)
        with pytest.raises(FeedError, match="101 rows dealt, 100 arrived"):
            cluster.rows()


def test_nothing_is_published_after_a_failure(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        cluster.nodes[0].receiver.fail("train", "Spark gave up")
        cluster.feed(numbered(10), 0)
        cluster.nodes[0].receiver.end("train", [10])
        assert isinstance(cluster.nodes[0].notices[0], FeedFailed)
        assert not any(isinstance(n, ChunkReady) for n in cluster.nodes[0].notices)


def test_partition_with_other_columns_is_refused_with_both_named(tmp_path):
    with fake_cluster(2, tmp_path) as cluster:
        cluster.feed(numbered(10), 0)
        other = pa.RecordBatch.from_pydict({"x": pa.array([1, 2]), "y": pa.array([1, 2])})
        with pytest.raises(FeedError, match=r"node 0 .*\(x: double, y: int64\).*\(x: int64, y: int64\)"):
            cluster.feed([other], 1)


def test_full_disk_is_said_in_the_spark_task(tmp_path, monkeypatch):
    with fake_cluster(1, tmp_path) as cluster:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(FeedError, match=r"(?s)disk under .* is full.*spark\.local\.dir"):
            cluster.feed(numbered(100_000, batch_rows=10_000), 0)


# --- who may speak ------------------------------------------------------------------------------------------


def test_sender_without_the_secret_is_dropped_and_told_apart_from_a_crash(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        with pytest.raises(FeedError, match="do not share a secret"):
            feed_partition(iter(numbered(10)), replace(cluster.plan, secret=b"wrong"), 0, 1, stage_only)
        assert not cluster.nodes[0].notices


def test_sender_detects_a_receiver_without_the_secret():
    """The proof is mutual: rows are not given to whoever happens to listen on that port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def impostor() -> None:
            connection, _ = listener.accept()
            with connection:
                wire.prove_as_receiver(connection, b"wrong")

        thread = threading.Thread(target=impostor)
        thread.start()
        plan = FeedPlan("train", b"right", (("127.0.0.1", listener.getsockname()[1]),))
        with pytest.raises(FeedError, match="do not share a secret"):
            feed_partition(iter(numbered(10)), plan, 0, 1, stage_only)
        thread.join(10)


def test_secret_never_crosses_the_wire():
    ours, theirs = socket.socketpair()
    heard: list[bytes] = []
    secret = b"the-secret-of-this-run-0123456789"

    class Tapped(socket.socket):
        def sendall(self, data, *flags):  # type: ignore[override]
            heard.append(bytes(data))
            super().sendall(data, *flags)

    with Tapped(fileno=ours.detach()) as a, Tapped(fileno=theirs.detach()) as b:
        thread = threading.Thread(target=wire.prove_as_receiver, args=(a, secret))
        thread.start()
        assert wire.prove_as_sender(b, secret)
        thread.join(10)
    assert len(heard) == 3
    assert secret not in b"".join(heard)


def test_unproven_bytes_are_never_parsed(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        with socket.create_connection(("127.0.0.1", cluster.nodes[0].receiver.port)) as stranger:
            stranger.settimeout(10)
            stranger.sendall(b"O" + b"\xff" * 200)
            heard = b""
            with suppress(ConnectionResetError):
                while data := stranger.recv(4096):
                    heard += data
            assert len(heard) <= len(wire._MAGIC) + 32  # the greeting and nothing after it
        assert not cluster.nodes[0].notices


def test_silent_strangers_block_nobody_and_close_is_quick(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        strangers = [socket.create_connection(("127.0.0.1", cluster.nodes[0].receiver.port)) for _ in range(20)]
        assert cluster.feed(numbered(10), 0) == [10]
        began = time.monotonic()
        cluster.nodes[0].close()
        assert time.monotonic() - began < 0.5
        for stranger in strangers:
            stranger.close()


def test_close_in_mid_stream_is_quick_and_the_sender_is_told(tmp_path):
    with fake_cluster(1, tmp_path) as cluster:
        first_sent = threading.Event()

        def slow():
            yield from numbered(200_000, batch_rows=200_000)
            yield from numbered(200_000, batch_rows=200_000)
            first_sent.set()
            closed.wait(10)
            yield from numbered(400_000, batch_rows=200_000)

        closed = threading.Event()
        errors: list[Exception] = []

        def run() -> None:
            try:
                cluster.feed(slow(), 0)
            except FeedError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert first_sent.wait(10)
        began = time.monotonic()
        cluster.nodes[0].close()
        assert time.monotonic() - began < 0.5
        closed.set()
        thread.join(10)
        assert "lost node 0 at 127.0.0.1" in str(errors[0])


# --- real processes -----------------------------------------------------------------------------------------

RECEIVER = """
import json, sys
from dataclasses import asdict
from tfos_magic.feed.receiver import FeedReceiver
from tfos_magic.feed.staging import FeedOpened
def notify(notice):
    record = {"type": type(notice).__name__, **asdict(notice)}
    record.pop("schema_ipc", None)
    print(json.dumps(record), flush=True)
receiver = FeedReceiver("127.0.0.1", bytes.fromhex(sys.argv[1]), sys.argv[2], notify)
print(receiver.port, flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    getattr(receiver, name)(*arguments)
receiver.close()
assert "pyarrow" not in sys.modules
"""

SENDER = """
import json, sys, time
import pyarrow as pa
from tfos_magic.feed.cargo import FeedPlan
from tfos_magic.feed.sender import feed_partition
secret, ports, attempt, stall = bytes.fromhex(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def batches():
    for start in range(0, 40_000, 10_000):
        yield pa.RecordBatch.from_pydict({"y": pa.array(range(start, start + 10_000), pa.int64())})
        if stall == "stall" and start == 20_000:
            print("stalled", flush=True)
            time.sleep(60)
def commit(portion):
    print(json.dumps(portion.rows_per_node), flush=True)
    return sys.stdin.readline().strip() == "yes"
plan = FeedPlan("train", secret, tuple(("127.0.0.1", port) for port in ports), chunk_bytes=40_000)
print(json.dumps(feed_partition(batches(), plan, 0, attempt, commit)), flush=True)
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_killed_sender_leaves_nothing_visible_and_its_retry_everything_once(tmp_path):
    secret = os.urandom(32).hex()
    receivers = [python(RECEIVER, secret, str(tmp_path)) for _ in range(2)]
    ports = json.dumps([int(r.stdout.readline()) for r in receivers])
    killed = python(SENDER, secret, ports, "1", "stall")
    assert killed.stdout.readline() == "stalled\n"
    retry = python(SENDER, secret, ports, "2", "")
    assert json.loads(retry.stdout.readline()) == [20_000, 20_000]
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    for receiver in receivers:
        print(json.dumps(["publish", "train", 0, 2, 20_000]), file=receiver.stdin, flush=True)
        print(json.dumps(["end", "train", [20_000, 20_000], 7]), file=receiver.stdin, flush=True)
    assert json.loads(retry.communicate("yes\n", 10)[0]) == [20_000, 20_000]
    values: list[int] = []
    for receiver in receivers:
        opened = json.loads(receiver.stdout.readline())
        assert opened["type"] == "FeedOpened"
        with open(f"/proc/{receiver.pid}/fd/{opened['fd']}", "rb") as spool:
            while (notice := json.loads(receiver.stdout.readline()))["type"] == "ChunkReady":
                message = os.pread(spool.fileno(), notice["length_bytes"], notice["offset"])
                batch = pa.ipc.read_record_batch(pa.py_buffer(message), pa.schema({"y": pa.int64()}))
                assert batch.num_rows == notice["row_count"]
                values += batch.column("y").to_pylist()
        assert notice == {"type": "FeedEnded", "name": "train", "rows_per_node": [20_000, 20_000], "fingerprint": 7}
        receiver.communicate(timeout=10)
        assert receiver.returncode == 0
    assert sorted(values) == list(range(40_000))
    for process in (killed,):
        process.stdin.close()
        process.stdout.close()
