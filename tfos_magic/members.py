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
    CheckpointSaved,
    Event,
    GpuSample,
    MachineSample,
    MetricsReported,
    NodeBeat,
    NodeChanged,
    NodeLogged,
    NodeState,
    Noticed,
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
    place : Peer or None
        The connection of its task, then of its agent: open while any process of the node may be alive.
    peer : Peer or None
        The same, once the agent has said hello.
    info : dict
        The hello: host, address, port, pids, Python version.
    times : dict of str to float
        When the child reached each stage, seconds since the epoch, by its own clock.
    namedtuple_patch : dict
        The state of PySpark's patch in the child before anything of the user's was imported.
    result : bytes or None
        What its function returned, packed.
    has_ended : bool
        It said hello, and its connection is closed: agent and child are gone.
    feed_port : int or None
        Where it takes rows.
    open_feeds : set of str
        The feeds that it expects.
    rows_received, rows_consumed : int
        Over all feeds, by its last beat.
    is_waiting : bool
        Whether its function waited for rows, by its last beat.
    is_predicting : bool
        Its function has returned what predicts, and it takes questions.
    tensorboard_url : str or None
        Where the TensorBoard beside it is.
    tensorboard_problem : str
        Why there is none although it was asked for.
    whereabouts : str
        What its function was doing when it was last asked.
    """

    def __init__(self, index: int, role: Role, emit: Callable[[Event], None]) -> None:
        self.index = index
        self.role = role
        self.place: Peer | None = None
        self.peer: Peer | None = None
        self.info: dict[str, Any] = {}
        self.times: dict[str, float] = {}
        self.namedtuple_patch: dict[str, Any] = {}
        self.state = NodeState.PLANNED
        self.feed_port: int | None = None
        self.open_feeds: set[str] = set()
        self.whereabouts = ""
        self.is_predicting = False
        self.tensorboard_url: str | None = None
        self.tensorboard_problem = ""
        self.rows_received = 0
        self.rows_consumed = 0
        self.is_waiting = False
        self.result: bytes | None = None
        self._emit = emit

    @property
    def name(self) -> str:
        """``worker:2``."""
        return self.role.name

    @property
    def has_ended(self) -> bool:
        """Whether its agent said hello, and its connection has been closed since."""
        return self.peer is not None and self.place is None

    @property
    def host(self) -> str:
        """Where it runs, as far as is known."""
        return str(self.info.get("host", "an unknown host"))

    @property
    def address(self) -> str:
        """``host:port`` for TensorFlow; it must have said hello."""
        return f"{self.info['address']}:{self.info['port']}"

    def describe(self) -> NodeInfo:
        """Return where it ran; little is known of one that has not said hello."""
        info = self.info
        if not info:
            return NodeInfo(self.name, "", "", 0, "", {})
        python = ".".join(map(str, info["python"]))
        patch = dict(self.namedtuple_patch)
        return NodeInfo(self.name, self.host, self.address, info["child_pid"], python, dict(self.times), patch)

    def admit(self, peer: Peer) -> bool:
        """Give the node to the task that asks for it; not to a second one, which Spark may start (False)."""
        if self.place is not None or self.peer is not None:
            return False
        self.place = peer
        peer.info["member"] = self
        return True

    def greet(self, peer: Peer, hello: dict[str, Any]) -> None:
        """Take the agent's hello."""
        self.peer, self.info = peer, hello
        self.change(NodeState.STARTING)

    def stop(self) -> None:
        """Tell the agent to end; one that has not said hello yet hears it then."""
        if self.place is not None:
            self.place.send({"type": "stop"})

    def leave(self) -> None:
        """Note that the connection is closed."""
        self.place = None

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
            self.namedtuple_patch.update(header.get("namedtuple_patch", {}))
            self.change(NodeState[header["state"]])
        elif message.type == "beat":
            self._beat(header)
        elif message.type == "log":
            self._emit(NodeLogged(self.name, tuple(header["lines"]), header["dropped"]))
        elif message.type == "metrics":
            self._emit(MetricsReported(self.name, header["values"], header["step"], header["epoch"]))
        elif message.type == "notice":
            self._emit(Noticed(header["text"]))
        elif message.type == "checkpoint":
            self._emit(CheckpointSaved(header["where"], header["size_bytes"]))
        elif message.type == "feed_port":
            self.feed_port = header["port"]
            self.open_feeds.add(header["feed"])
        elif message.type == "predicting":
            self.is_predicting = True
        elif message.type == "where":
            self.whereabouts = header["text"]
        elif message.type == "tensorboard":
            self.tensorboard_url, self.tensorboard_problem = header["url"], header["reason"]
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
        self.rows_received, self.rows_consumed = header["rows_received"], header.get("rows_consumed", 0)
        self.is_waiting = bool(header.get("is_waiting"))
        if self.state in (NodeState.RUNNING, NodeState.WAITING):
            self.change(NodeState.WAITING if header.get("is_waiting") else NodeState.RUNNING)
        self._emit(
            NodeBeat(
                self.name,
                rows_received=header["rows_received"],
                rows_consumed=header.get("rows_consumed", 0),
                wait_s=header.get("wait_s", 0.0),
                queued_chunks=header.get("queued_chunks", 0),
                queued_bytes=header.get("queued_bytes", 0),
                feed_wait_s=header.get("feed_wait_s", 0.0),
                rows_per_epoch=header.get("rows_per_epoch"),
                machine=MachineSample(**machine, gpus=gpus),
            )
        )
