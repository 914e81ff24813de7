"""The nodes of a run as the driver knows them, and what their reports mean.

Runs on: driver. No locks of its own: the cluster that owns the nodes calls under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tfos_magic.failures import Failure
from tfos_magic.rendezvous import Message, Peer
from tfos_magic.result import NodeInfo
from tfos_magic.roles import Role
from tfos_magic.status import (
    Event,
    GpuSample,
    MachineSample,
    MetricsReported,
    NodeBeat,
    NodeChanged,
    NodeLogged,
    NodeState,
)


class Member:
    """One node: its role, its connection, its state, and in the end its result.

    Parameters
    ----------
    index : int
        Place in node order.
    role : Role
    emit : callable(Event)
        Told whatever becomes known of this node.

    Attributes
    ----------
    peer : Peer or None
        Its agent's connection, once it has said hello.
    info : dict
        The hello: host, address, port, pids, Python version.
    times : dict of str to float
        When the child reached each stage, seconds since the epoch, by its own clock.
    result : bytes or None
        What its function returned, packed.
    has_ended : bool
        Its connection is closed: agent and child are gone.
    """

    def __init__(self, index: int, role: Role, emit: Callable[[Event], None]) -> None:
        self.index = index
        self.role = role
        self.peer: Peer | None = None
        self.info: dict[str, Any] = {}
        self.times: dict[str, float] = {}
        self.state = NodeState.PLANNED
        self.feed_port: int | None = None
        self.result: bytes | None = None
        self.has_ended = False
        self._emit = emit

    @property
    def name(self) -> str:
        """``worker:2``."""
        return self.role.name

    @property
    def host(self) -> str:
        """Where it runs, as far as is known."""
        return str(self.info.get("host", "an unknown host"))

    def describe(self) -> NodeInfo:
        """Return where it ran; it must have said hello."""
        info = self.info
        address, python = f"{info['address']}:{info['port']}", ".".join(map(str, info["python"]))
        return NodeInfo(self.name, self.host, address, info["child_pid"], python, dict(self.times))

    def greet(self, peer: Peer, hello: dict[str, Any]) -> None:
        """Take the agent's hello; a second one, from a task that Spark ran twice, is sent away."""
        if self.peer is not None:
            peer.close()
            return
        self.peer, self.info = peer, hello
        peer.info["member"] = self
        self.change(NodeState.STARTING)

    def send(self, header: Mapping[str, Any]) -> None:
        """Send the agent a message; harmless before its hello and after its end."""
        if self.peer is not None:
            self.peer.send(header)

    def change(self, state: NodeState) -> None:
        """Enter a state and tell; a final one is never left."""
        if state is not self.state and not self.state.is_final:
            self.state = state
            self._emit(NodeChanged(self.name, state, self.info.get("host", "")))

    def report(self, message: Message) -> Failure | None:
        """Take one report; return the failure that it tells of, if it does."""
        header = message.header
        if message.type == "state":
            self.times.update(header.get("times", {}))
            self.change(NodeState[header["state"]])
        elif message.type == "beat":
            self._beat(header)
        elif message.type == "log":
            self._emit(NodeLogged(self.name, tuple(header["lines"]), header["dropped"]))
        elif message.type == "metrics":
            self._emit(MetricsReported(self.name, header["values"], header["step"], header["epoch"]))
        elif message.type == "feed_port":
            self.feed_port = header["port"]
        elif message.type == "result":
            self.result = message.blob
            self.change(NodeState.FINISHED)
        elif message.type == "failure":
            return Failure.from_report(self.index, header)
        elif message.type == "exited" and not header["answered"]:
            return Failure("exited", node=self.index, code=header["code"], tail=tuple(header["tail"]))
        return None

    def _beat(self, header: Mapping[str, Any]) -> None:
        machine = dict(header["machine"])
        gpus = tuple(GpuSample(**gpu) for gpu in machine.pop("gpus", ()))
        if self.state in (NodeState.RUNNING, NodeState.WAITING):
            self.change(NodeState.WAITING if header.get("is_waiting") else NodeState.RUNNING)
        self._emit(
            NodeBeat(
                self.name,
                rows_received=header["rows_received"],
                rows_consumed=header.get("rows_consumed", 0),
                wait_s=header.get("wait_s", 0.0),
                machine=MachineSample(**machine, gpus=gpus),
            )
        )
