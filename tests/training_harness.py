"""Starts the nodes of a training run as plain processes, without Spark.

Runs on: the machine of the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
CASES = Path(__file__).with_name("training_cases.py")


@dataclass(frozen=True)
class NodeOutcome:
    """How one node's process ended: its exit status, per case what it found, and all it printed."""

    returncode: int
    results: dict[str, dict[str, Any]]
    output: str


@contextlib.contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Reserve ports as a node's agent does: bound, not listening, to be bound again with SO_REUSEPORT."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(("127.0.0.1", 0))
            ports.append(holder.getsockname()[1])
        yield ports


def run_nodes(
    cases: Sequence[str],
    count: int,
    *,
    python: str = sys.executable,
    has_chief: bool = False,
    timeout_s: float = 240,
) -> list[NodeOutcome]:
    """Run `cases` of training_cases.py, one after the other, on `count` nodes at once.

    ``zoo:NAME`` is a row of training_zoo.py.

    Returns
    -------
    list of NodeOutcome
        In node order.
    """
    with held_ports(count) as ports, tempfile.TemporaryDirectory() as folder:
        addresses = [f"127.0.0.1:{port}" for port in ports]
        cluster = {"chief": addresses[:1], "worker": addresses[1:]} if has_chief else {"worker": addresses}
        tasks = [(job, index) for job in ("chief", "worker") for index in range(len(cluster.get(job, ())))]
        processes = [
            _start(python, cases, cluster, job, index, Path(folder) / f"{number}.json")
            for number, (job, index) in enumerate(tasks)
        ]
        deadline = time.monotonic() + timeout_s
        outputs = [_output_of(process, deadline) for process in processes]
        files = [Path(folder) / f"{number}.json" for number in range(count)]
        results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        return [
            NodeOutcome(process.returncode, found, output)
            for process, found, output in zip(processes, results, outputs, strict=True)
        ]


def side_by_side(request: pytest.FixtureRequest, runs: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Return what `runs` return that the selected tests of this module ask for, two at a time.

    Nodes wait for each other more than half of the time: that of one run is another's. All are done when this returns,
    for a test must not find the processes of a run that it knows nothing of.

    Parameters
    ----------
    request : pytest.FixtureRequest
        Of a fixture of the module.
    runs : mapping of str to callable
        By the name of the fixture that hands it out, the longest first.
    """
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = {name for item in items if item.module is request.module for name in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(run) for name, run in runs.items() if name in wanted}
        return {name: future.result() for name, future in futures.items()}


def one_of_runs(name: str) -> Any:
    """Return a fixture of a module that hands out one of what its fixture ``runs`` has from :func:`side_by_side`."""

    @pytest.fixture(scope="module", name=name)
    def hand_out(runs: dict[str, Any]) -> Any:
        return runs[name]

    return hand_out


def merged(nodes: Sequence[NodeOutcome]) -> dict[str, dict[str, Any]]:
    """Return the zoo's rows by their names: what the chief found, with the distances that one of the nodes measured."""
    found: dict[str, dict[str, Any]] = {}
    for node in reversed(nodes):
        for case, result in node.results.items():
            kind, _, name = case.rpartition(":")
            if kind:
                found[name] = found.get(name, {}) | result
    return found


def _output_of(process: subprocess.Popen[str], deadline: float) -> str:
    """Return all that the process prints; one that takes too long is killed, and shows it by its exit status."""
    try:
        return process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] + "\nkilled: it took too long"
    except BaseException:
        process.kill()
        process.communicate()
        raise


def _start(
    python: str, cases: Sequence[str], cluster: dict[str, list[str]], job: str, index: int, result: Path
) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": job, "index": index}}),
        "TF_GRPC_REUSE_PORT": "true",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),  # another Keras, say
        "TMPDIR": str(result.parent),  # AutoGraph's files go with the folder; the cases end without Python's clean-up
    }
    return subprocess.Popen(
        [python, "-u", str(CASES), str(result), *cases],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
