"""What it costs to watch: the driver's CPU and what the browser gets for up to 1,000 nodes, and an agent's own CPU.

    python tests/benchmarks/board.py [--seconds 20] [--nodes 8 64 1000]

The nodes are simulated by one other process: as many authenticated connections to a real rendezvous server as there are
nodes, each with heartbeats at the interval that the driver tells nodes, with a line of output for every beat and
metrics every five seconds. What arrives goes the way of a run, through members into the board, and a live board draws
it for a publisher that counts. The baseline, in the same run, is the same traffic into a server that only decodes it.
The agents are real ones, of two nodes that sleep.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

from benchmarks.tables import local_spark, median, print_machine, print_table
from runs import run_cell

from tfos_magic.members import Member
from tfos_magic.rendezvous import Message, Peer, RendezvousServer, connect
from tfos_magic.roles import assign
from tfos_magic.status import PhaseChanged, RunPlanned, StatusBoard, beat_interval_s
from tfos_magic.widgets import LiveBoard

SECRET = bytes(32)
SETTLE_S = 3.0
ROUNDS = 3


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--simulate", nargs=3, metavar=("NODES", "PORT", "INTERVAL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate:
        simulate(int(options.simulate[0]), int(options.simulate[1]), float(options.simulate[2]))
        return
    print_machine()
    rows = [("nodes", "beats/s", "decode only", "+ fold", "+ live board", "ratio", "updates/s", "KiB/s")]
    for nodes in options.nodes:
        rows.append(driver_row(nodes, options.seconds))
    print_table("The driver: CPU in percent of one core", rows)
    rows = [("agent of a node that sleeps", "percent of one core")]
    rows += [(name, f"{value:.2f}") for name, value in agents(options.seconds).items()]
    print_table("The nodes", rows)


# --- the driver's side -------------------------------------------------------------------------------------


@dataclass
class Counts:
    """A cell output that counts what it would send to the browser."""

    updates: int = 0
    sent_bytes: int = 0
    is_publishing: bool = field(default=False)

    def publish(self, data: dict[str, str], metadata: Any, **more: Any) -> None:
        """Take one frame."""
        self.updates += 1
        self.sent_bytes += sum(len(text.encode()) for text in data.values())


def driver_row(nodes: int, seconds: float) -> tuple[str, ...]:
    """Return one row of the table: medians of some rounds, in which the three ways take turns."""
    rounds = [
        [measure(nodes, seconds / ROUNDS, folds=folds, draws=draws) for folds, draws in ((0, 0), (1, 0), (1, 1))]
        for _ in range(ROUNDS)
    ]
    decode, fold, draw = (median([one[way]["percent"] for one in rounds]) for way in range(3))
    beats, updates, kib = (median([one[2][name] for one in rounds]) for name in ("beats", "updates", "kib"))
    shown = (f"{decode:.1f}", f"{fold:.1f}", f"{draw:.1f}", f"{draw / max(decode, 0.01):.1f}")
    return (f"{nodes:,}", f"{beats:.0f}", *shown, f"{updates:.1f}", f"{kib:.1f}")


def measure(nodes: int, seconds: float, *, folds: int, draws: int) -> dict[str, float]:
    """Return CPU, messages and frames of one way."""
    board, seen = StatusBoard(), SimpleNamespace(beats=0)
    members = [Member(index, role, board.apply) for index, role in enumerate(assign(nodes))]
    board.apply(RunPlanned("benchmark", tuple(member.name for member in members), 5))
    board.apply(PhaseChanged("running"))
    changed = threading.Condition()

    def on_message(peer: Peer, message: Message) -> None:
        with changed:
            seen.beats += message.type == "beat"
            if folds:
                report(members[message.header["index"]], peer, message)
            changed.notify_all()

    server = RendezvousServer("127.0.0.1", SECRET, on_message, lambda peer: None)
    interval = beat_interval_s(nodes)
    simulation = [sys.executable, __file__, "--simulate", str(nodes), str(server.port), str(interval)]
    process = subprocess.Popen(simulation, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    counts = Counts()
    shell: Any = SimpleNamespace(kernel=object(), display_pub=counts)
    live = LiveBoard(board, shell) if draws else None
    try:
        process.stdout.readline()  # all are connected
        if live is not None:
            live.__enter__()
        time.sleep(SETTLE_S)
        beats, updates, sent = seen.beats, counts.updates, counts.sent_bytes
        began, cpu = time.perf_counter(), time.process_time()
        time.sleep(seconds)
        cpu, passed = time.process_time() - cpu, time.perf_counter() - began
        return {
            "percent": 100 * cpu / passed,
            "beats": (seen.beats - beats) / passed,
            "updates": (counts.updates - updates) / passed,
            "kib": (counts.sent_bytes - sent) / passed / 1024,
        }
    finally:
        if live is not None:
            live.__exit__(None, None, None)
        process.communicate()
        server.close()


def report(member: Member, peer: Peer, message: Message) -> None:
    """Do what a cluster does with a node's message."""
    if member.peer is None:
        member.admit(peer)
        member.greet(peer, {"host": f"10.0.{member.index // 250}.{member.index % 250}"})
        member.report(Message({"type": "state", "state": "RUNNING"}))
    member.report(message)


# --- the nodes, simulated ----------------------------------------------------------------------------------


def simulate(nodes: int, port: int, interval_s: float) -> None:
    """Send what so many nodes send, evenly over the time, until standard input ends."""
    connections = [connect(("127.0.0.1", port), SECRET) for _ in range(nodes)]
    print("connected", flush=True)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    began, count = time.monotonic(), 0
    while not ended.wait(max(0.0, began + count * interval_s / nodes - time.monotonic())):
        turn, index = divmod(count, nodes)
        send_beat(connections[index], index, turn, interval_s)
        count += 1


def send_beat(connection: Any, index: int, turn: int, interval_s: float) -> None:
    """Send what an agent sends twice a second."""
    gpu = {"index": index % 8, "name": "NVIDIA A100-SXM4-40GB", "utilization_percent": 80.0 + turn % 15}
    gpu |= {"memory_used_bytes": 31 << 30, "memory_total_bytes": 40 << 30, "power_watts": 280.0 + turn % 20}
    machine = {"cpu_percent": 150.0 + turn % 40, "memory_bytes": (1 << 30) + turn, "gpus": [gpu]}
    rows = int(turn * interval_s * 3000)
    counters = {"rows_consumed": rows, "wait_s": 0.1 * turn * interval_s, "is_waiting": turn % 9 == index % 9}
    connection.send({"type": "beat", "index": index, **counters, "rows_received": rows + 9000, "machine": machine})
    connection.send({"type": "log", "index": index, "lines": [f"step {turn}: loss {1 / (turn + 1):.4f}"], "dropped": 0})
    if turn % max(1, int(5 / interval_s)) == 0:
        metrics = {"type": "metrics", "values": {"loss": 1 / (turn + 1)}, "step": None, "epoch": turn // 20 + 1}
        connection.send({**metrics, "index": index})


# --- real agents -------------------------------------------------------------------------------------------


def agents(seconds: float) -> dict[str, float]:
    """Return the CPU of the agents of two nodes that sleep, in percent of a core."""
    spark = local_spark(3)
    try:
        run = threading.Thread(target=run_cell, args=(spark, f"import time\ntime.sleep({seconds + 12})", 2))
        run.start()
        time.sleep(10)  # the nodes run
        found = [one for one in psutil.Process().children(recursive=True) if is_agent(one)]
        before = [busy_s(one) for one in found]
        time.sleep(seconds)
        after = [busy_s(one) for one in found]
        run.join()
    finally:
        spark.stop()
    return {f"node {n}": 100 * (b - a) / seconds for n, (a, b) in enumerate(zip(before, after, strict=True))}


def is_agent(process: psutil.Process) -> bool:
    """Return whether it is a node's agent; one that has just gone is none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("tfos_magic.node.agent" in word for word in process.cmdline())
    return False


def busy_s(process: psutil.Process) -> float:
    """Return its CPU seconds."""
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
