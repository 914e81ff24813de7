"""Messages between a node's agent and its child: small JSON, and file descriptors for everything large.

Runs on: executor.

The two processes share a socket pair, so nobody else can speak here. One datagram is one message (SOCK_SEQPACKET);
what may be large (a result, a traceback) is put into a memory file whose descriptor travels with the message.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MAX_MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Note:
    """One message; whoever receives it owns `descriptor` and closes it."""

    header: Mapping[str, Any]
    descriptor: int | None = None

    @property
    def type(self) -> str:
        """The header's ``type`` field."""
        return str(self.header.get("type", ""))


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, header: Mapping[str, Any], descriptor: int | None = None) -> None:
    """Send one message, blocking while the other end's queue is full.

    Raises
    ------
    OSError
        The other process is gone.
    """
    socket.send_fds(sock, [json.dumps(header).encode()], [] if descriptor is None else [descriptor])


def receive(sock: socket.socket) -> Note:
    """Return the next message.

    Raises
    ------
    EOFError
        The other process is gone.
    """
    try:
        data, descriptors, _flags, _address = socket.recv_fds(sock, _MAX_MESSAGE_BYTES, 1)
    except ConnectionError as error:
        raise EOFError(str(error)) from error
    if not data:
        raise EOFError("the other process closed the channel")
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return Note(json.loads(data), descriptors[0] if descriptors else None)


def memory_file(data: bytes) -> int:
    """Return the descriptor of an anonymous file that holds `data`."""
    descriptor = os.memfd_create("tfos_magic")
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    return descriptor


def read_all(descriptor: int) -> bytes:
    """Return everything in the file; does not move its position, so several processes may share it."""
    size = os.fstat(descriptor).st_size
    parts, offset = [], 0
    while offset < size:
        part = os.pread(descriptor, min(size - offset, 1 << 30), offset)
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
