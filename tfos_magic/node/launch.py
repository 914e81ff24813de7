"""The node's part inside Spark's task: ask the driver, start the agent, and stay or go.

Runs on: executor, in a Python worker that Spark reuses, so it leaves nothing behind there.

    driver ◄── "begin": may this node start? ── Python worker     (not while another task has it, nor once the run ends)
       ▲                                           │ Popen, own session
       └────────── the same connection ───────── agent ──► child
                                                   ▲ │
         Python worker ◄── one line: ready ────────┼─┘
              └─ lifeline: a pipe that only the worker holds; when the worker dies, the agent reads end-of-file

The agent inherits the connection, so to the driver it is open from before the node's first process until after its
last: a run that ends knows of every process that it must see gone, however young.

A node that *holds* its slot keeps the task until the agent exits: the Spark UI shows it, cancelling the job group
kills it. A *detached* node gives the slot back once it has met the driver (``local[4]`` with four nodes needs the
slots for the feed); its agent then lives on its connection to the driver and on its executor's life.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfos_magic.errors import RendezvousError
from tfos_magic.node import channel
from tfos_magic.node.agent import READY
from tfos_magic.rendezvous import Connection, connect

# Found in a Python worker's environment and wrong for a process that trains: one OpenMP thread, a fixed hash seed,
# and the credentials by which the executor's JVM knows its Python workers.
_LEAKED_BY_SPARK = ("OMP_NUM_THREADS", "PYTHONHASHSEED")
_PRIVATE_TO_SPARK = ("PYTHON_WORKER_FACTORY_", "SPARK_AUTH_", "SPARK_BUFFER_SIZE")
# Unless the user says otherwise: warnings but not which CPU instructions are used; GPU memory as it is needed, since a
# node that takes all of it at once leaves none to the next one on its host; and GPUs counted as nvidia-smi counts them,
# and so Spark's addresses, where CUDA by itself would put the fastest first.
_DEFAULTS = {
    "TF_CPP_MIN_LOG_LEVEL": "1",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}
# A detached agent must not stay the Python worker's child: when it ended it would be a zombie there.
_DETACH = "import os; os.fork() and os._exit(0); "
_BOOT = "import sys; sys.path[0] = '/proc/self/fd/{archive}'; from tfos_magic.node.agent import main; main({fds})"
ERROR_MARK = "tfos_magic:"
TAKEN, CLOSING = "taken", "closing"  # why the driver refuses a task its node


def launch(archive: bytes, config: dict[str, Any], payload: bytes, indices: Iterator[int]) -> Iterator[dict[str, Any]]:
    """Start the node of this task and yield one summary.

    Parameters
    ----------
    archive : bytes
        The package, for agent and child to import.
    config : dict
        From the cluster: address, secret (hex), hold, keep_env, …
    payload : bytes
        The user's function, packed.
    indices : iterator of int
        The node's index: one element.

    Raises
    ------
    RuntimeError
        The task could not meet the driver; the message carries :data:`ERROR_MARK` and JSON that the driver reads.
    """
    index = next(iter(indices))
    connection, refusal = _ask(config, index)
    if refusal:
        connection.close()
        if refusal == TAKEN:
            # A speculative copy: were it to end, Spark would take the node for finished and kill the task that has it.
            threading.Event().wait()  # until Spark kills this one
        return
    lifeline, worker_end = os.pipe()
    descriptors = [lifeline]
    try:
        inherited = {**config, **_surroundings(index), "connection": connection.hand_over()}
        for content in (payload, json.dumps(inherited).encode(), archive):
            descriptors.insert(0, channel.memory_file(content))
        agent = _start_agent(descriptors, connection.socket, config["keep_env"], detach=not config["hold"])
    finally:
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)
    try:
        yield _wait(agent, hold=config["hold"], lifeline=worker_end)
    finally:
        os.close(worker_end)


def _ask(config: dict[str, Any], index: int) -> tuple[Connection, str]:
    """Return a connection to the driver, and why it does not want this node; an empty string when it does."""
    try:
        host, port = config["address"]
        connection = connect((host, port), bytes.fromhex(config["secret"]))
        connection.send({"type": "begin", "index": index})
        return connection, str(connection.receive().header["refusal"])
    except RendezvousError as error:
        answer = {"error": error.fact, "cause": error.cause, "hint": error.hint}
    except (EOFError, OSError) as error:
        answer = {"error": f"The driver hung up before node {index} began: {error}.", "cause": "The run has ended."}
    raise RuntimeError(ERROR_MARK + json.dumps(answer))


def _surroundings(index: int) -> dict[str, Any]:
    from pyspark import TaskContext

    context = TaskContext.get()  # none for a node on the driver's machine
    resources = context.resources() if context is not None else {}
    gpus = resources["gpu"].addresses if "gpu" in resources else None
    return {
        "index": index,
        "sys_path": [entry for entry in sys.path if not entry.startswith("/proc/self/fd/")],
        "gpus": gpus,
        "executor_jvm": _jvm_pid() if context is not None else os.getpid(),  # whose end is the node's too
    }


def _jvm_pid() -> int:
    """Return the nearest ancestor that is no Python worker or daemon: the executor's JVM."""
    pid = os.getppid()
    while pid > 1:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if Path(f"/proc/{pid}/comm").read_text().strip() == "java":
            return pid
        pid = int(fields[1])
    return os.getppid()


def _start_agent(
    descriptors: list[int], connection: socket.socket, keep_env: list[str], *, detach: bool
) -> subprocess.Popen[bytes]:
    boot = (_DETACH if detach else "") + _BOOT.format(archive=descriptors[0], fds=", ".join(map(str, descriptors)))
    return subprocess.Popen(
        [sys.executable, "-c", boot],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        pass_fds=[*descriptors, connection.fileno()],
        start_new_session=True,
        env=clean_environment(dict(os.environ), keep_env),
    )


def clean_environment(environment: dict[str, str], keep: list[str]) -> dict[str, str]:
    """Return what a node's processes inherit: the worker's environment less what Spark leaked into it.

    Parameters
    ----------
    environment : dict of str to str
    keep : list of str
        Names that the user set through ``spark.executorEnv.*``.
    """
    cleaned = {
        name: value
        for name, value in environment.items()
        if name in keep or not (name in _LEAKED_BY_SPARK or name.startswith(_PRIVATE_TO_SPARK))
    }
    return {**_DEFAULTS, **cleaned}


def _wait(agent: subprocess.Popen[bytes], *, hold: bool, lifeline: int) -> dict[str, Any]:
    if agent.stdout is None:
        raise RuntimeError("the agent was started without a pipe")
    with agent.stdout as pipe:
        if pipe.readline() != READY:
            answer = {"error": f"the agent exited with {agent.wait()} at once"}
            raise RuntimeError(ERROR_MARK + json.dumps(answer))
        if not hold:
            os.write(lifeline, b"detached")  # tells the end of this task from the death of this worker
        return {"exit": agent.wait()}  # of a detached agent this is only the process that started it
