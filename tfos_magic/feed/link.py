"""A Spark task's connection to one node: the handshake, chunks out, the node's word on them.

Runs on: executors (Spark's Python workers).

A chunk goes one of two ways, settled when the feed is opened::

    node on another host    task ──CHUNK, payload──► agent ──► spool
    node on this host       task ──ASK, size──► agent ──PLACE, offset──► task ──► spool ──WRITTEN──► agent

The second spares the kernel's network and the agent every byte; what is kept, and when, is decided as in the first.
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Mapping
from typing import Any

from tfos_magic.errors import FeedError
from tfos_magic.feed import wire
from tfos_magic.feed.cargo import FeedPlan
from tfos_magic.feed.spool import SpoolWriter


class Link:
    """The connection to one node.

    Parameters
    ----------
    index : int
        The node's place in the plan.
    plan : FeedPlan

    Attributes
    ----------
    socket : socket.socket
    writer : SpoolWriter or None
        The node's spool, once opened, if it is within reach.
    row_count : int
        Rows of the portion that is under way.

    Raises
    ------
    FeedError
        The node cannot be reached, or is none of this run.
    """

    def __init__(self, index: int, plan: FeedPlan) -> None:
        address = plan.nodes[index]
        self.row_count = 0
        self.writer: SpoolWriter | None = None
        self._is_here = is_here(address[0])
        self._who = f"node {index} at {address[0]}:{address[1]}"
        self._feed_name = plan.name
        try:
            self.socket = socket.create_connection(address, timeout=wire.HANDSHAKE_TIMEOUT_S)
        except OSError as error:
            raise self.lost(error, "could not connect to") from error
        try:
            self._shake_hands(plan)
        except BaseException:
            self.close()
            raise

    def open(self, opening: Mapping[str, Any], schema_ipc: bytes) -> None:
        """Say which rows will come."""
        self._say(wire.OPEN, json.dumps({**opening, "is_here": self._is_here}).encode())
        self._say(wire.SCHEMA, schema_ipc)
        if self._is_here:
            self.writer = SpoolWriter.open(json.loads(self._listen(wire.SPOOL)[1]))

    def send(self, payload: memoryview | bytes, row_count: int) -> None:
        """Send one chunk; waits while the node is slower."""
        if select.select([self.socket], [], [], 0)[0]:
            self.confirm()  # a node only speaks unasked to refuse
        if self.writer is None:
            self._say(wire.CHUNK, payload, row_count)
        else:
            self._say(wire.ASK, wire.pack_number(len(payload)), row_count)
            kind, answer = self._listen(wire.PLACE, wire.UNWANTED)
            if kind == wire.PLACE:
                self.writer.write(payload, wire.unpack_number(answer))
            self._say(wire.WRITTEN, b"", row_count)
        self.row_count += row_count

    def mark(self, *, is_last: bool) -> None:
        """Say that a portion is complete."""
        self._say(wire.END if is_last else wire.MARK, b"", self.row_count)

    def confirm(self) -> int:
        """Wait until the node has confirmed all rows of the portion; return how many, and begin the next."""
        header, payload = self._receive()
        if header.kind != wire.ACCEPTED or header.row_count != self.row_count:
            raise self._refused(payload)
        self.row_count = 0
        return header.row_count

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
        if self.writer is not None:
            self.writer.close()

    def _listen(self, *kinds: bytes) -> tuple[bytes, bytes]:
        """Wait for a frame of one of these kinds; return its kind and payload."""
        header, payload = self._receive()
        if header.kind not in kinds:
            raise self._refused(payload)
        return header.kind, payload

    def _receive(self) -> tuple[wire.Header, bytes]:
        try:
            header = wire.receive_header(self.socket)
            return header, wire.receive_payload(self.socket, header)
        except (OSError, wire.ConnectionEndedError) as error:
            raise self.lost(error, "lost") from error

    def _refused(self, reason: bytes) -> FeedError:
        return FeedError(f"Feed '{self._feed_name}': {self._who} refused the rows: {reason.decode()}")

    def _shake_hands(self, plan: FeedPlan) -> None:
        try:
            is_receiver = wire.prove_as_sender(self.socket, plan.secret)
        except (OSError, wire.ConnectionEndedError) as error:
            raise self.lost(error, "got no greeting from") from error
        if not is_receiver:
            raise FeedError(
                f"Feed '{plan.name}': {self._who} and this Spark task do not share a secret.",
                cause="That port now belongs to another run or another program.",
            )
        # Not TCP_USER_TIMEOUT: the kernel would give up on a node that is alive and only slower than Spark.
        wire.keep_open(self.socket)
        self.socket.settimeout(plan.timeout_s)

    def _say(self, kind: bytes, payload: memoryview | bytes, row_count: int = 0) -> None:
        try:
            wire.send_frame(self.socket, kind, payload, row_count)
        except OSError as error:
            self._explain_refusal()
            raise self.lost(error, "lost") from error

    def _explain_refusal(self) -> None:
        """Raise what the node said before it hung up, if it said anything."""
        try:
            readable = select.select([self.socket], [], [], 0)[0]
        except (OSError, ValueError):
            return
        if readable:
            self.confirm()

    def lost(self, error: Exception, what: str) -> FeedError:
        """Return the error that says which node went away, and when."""
        reason = "no progress for too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        return FeedError(
            f"Feed '{self._feed_name}': this Spark task {what} {self._who} after {self.row_count:,} rows ({reason}).",
            cause="The node ended, its machine is gone, or a firewall is between the executors.",
        )


def is_here(host: str) -> bool:
    """Return whether an address is this machine's: only then a socket can be bound to it."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
