"""How nodes meet the driver, report to it, and are told what to do: authenticated messages over TCP.

Runs on: driver (:class:`RendezvousServer`) and executors (:func:`connect`).

        driver                                  │  executor
        RendezvousServer ── one thread, asyncio │
          listens on Spark's driver address     │
             ◄──────────── connect ─────────────┼── agent, or feed task
             ───── challenge: nonce_s ─────────►│
             ◄── nonce_c, HMAC(secret, client) ─┼── (deadline: a silent stranger costs one socket for 10 s)
             ───── HMAC(secret, server) ───────►│   both ends are known to hold the run's secret
             ◄═ frames, each with an HMAC ═════►│   JSON header + optional bytes; a counter stops replays

The secret is made for one run, reaches the executors inside Spark's own task data, and never crosses this wire.
A header is JSON; the bytes beside it are opaque here and nothing in this module unpickles anything. Frames are
authenticated, not encrypted: on a network where Spark itself needs ``spark.network.crypto.enabled``, so does this.

A dead peer is noticed by the kernel (TCP keep-alive, about 9 s), not by a busy Python process that missed a ping.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tfos_magic.errors import RendezvousError

_PREFIX = struct.Struct(">IQ")  # bytes of the header, bytes of the blob
_TAG_BYTES = 32
_NONCE_BYTES = 32
_MAX_HEADER_BYTES = 64 << 20
_MAX_BLOB_BYTES = 8 << 30
HANDSHAKE_TIMEOUT_S = 10.0

Header = dict[str, Any]


@dataclass(frozen=True)
class Message:
    """A JSON object and the bytes that travel beside it."""

    header: Mapping[str, Any]
    blob: bytes = b""

    @property
    def type(self) -> str:
        """The header's ``type`` field."""
        return str(self.header.get("type", ""))


class FrameCodec:
    """Messages ↔ bytes, in one direction each, without any input or output of its own.

    Parameters
    ----------
    send_key, receive_key : bytes
        Different for the two directions, so that a frame cannot be reflected.
    """

    def __init__(self, send_key: bytes, receive_key: bytes) -> None:
        self._send_key = send_key
        self._receive_key = receive_key
        self._sent = 0
        self._received = 0
        self._buffer = bytearray()

    def encode(self, header: Mapping[str, Any], blob: bytes = b"") -> bytes:
        """Return the frame of one message."""
        body = json.dumps(header, separators=(",", ":")).encode()
        frame = _PREFIX.pack(len(body), len(blob)) + body + blob
        tag = _tag(self._send_key, self._sent, frame)
        self._sent += 1
        return frame + tag

    def state(self) -> Header:
        """Return what :meth:`resume` needs, in JSON's types; it holds the keys."""
        return {
            "keys": [self._send_key.hex(), self._receive_key.hex()],
            "counts": [self._sent, self._received],
            "buffer": self._buffer.hex(),
        }

    @classmethod
    def resume(cls, state: Mapping[str, Any]) -> FrameCodec:
        """Return a codec that goes on where another one, in another process maybe, was left."""
        codec = cls(*map(bytes.fromhex, state["keys"]))
        codec._sent, codec._received = state["counts"]
        codec._buffer += bytes.fromhex(state["buffer"])
        return codec

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take bytes in; yield the messages that are now complete.

        Raises
        ------
        RendezvousError
            A frame is forged, damaged or absurdly large: the connection must be closed.
        """
        self._buffer += data
        while (message := self._next()) is not None:
            yield message

    def _next(self) -> Message | None:
        if len(self._buffer) < _PREFIX.size:
            return None
        header_bytes, blob_bytes = _PREFIX.unpack_from(self._buffer)
        if header_bytes > _MAX_HEADER_BYTES or blob_bytes > _MAX_BLOB_BYTES:
            raise RendezvousError(
                f"A frame announces {header_bytes + blob_bytes:,} bytes, which no peer of ours sends."
            )
        end = _PREFIX.size + header_bytes + blob_bytes
        if len(self._buffer) < end + _TAG_BYTES:
            return None
        frame = bytes(self._buffer[:end])
        tag = bytes(self._buffer[end : end + _TAG_BYTES])
        del self._buffer[: end + _TAG_BYTES]
        if not hmac.compare_digest(tag, _tag(self._receive_key, self._received, frame)):
            raise RendezvousError(f"Frame {self._received} is not from the peer that this connection began with.")
        self._received += 1
        body = frame[_PREFIX.size : _PREFIX.size + header_bytes]
        return Message(json.loads(body), frame[_PREFIX.size + header_bytes :])


def _tag(key: bytes, count: int, frame: bytes) -> bytes:
    return hmac.digest(key, count.to_bytes(8, "big") + frame, "sha256")


def _proof(secret: bytes, purpose: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, purpose + b"\0" + nonces, "sha256")


def _codec(secret: bytes, nonces: bytes, *, is_server: bool) -> FrameCodec:
    to_client, to_server = _proof(secret, b"to client", nonces), _proof(secret, b"to server", nonces)
    return FrameCodec(to_client, to_server) if is_server else FrameCodec(to_server, to_client)


def set_keep_alive(sock: socket.socket) -> None:
    """Let the kernel notice within about 9 s that the other machine is gone, and send small frames at once."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 9000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- executor side ----------------------------------------------------------------------------------------


def connect(address: tuple[str, int], secret: bytes, *, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> Connection:
    """Return an authenticated connection to the driver.

    Raises
    ------
    RendezvousError
        Nobody answers at `address`, or whoever answers does not hold the run's secret.
    """
    where = f"{address[0]}:{address[1]}"
    try:
        sock = socket.create_connection(address, timeout=timeout_s)
    except OSError as error:
        raise RendezvousError(
            f"{socket.gethostname()} cannot reach the driver at {where}: {error}.",
            cause="The address is the one that Spark gave for its driver: a firewall, or a wrong spark.driver.host.",
            hint="Set spark.driver.host (and spark.driver.bindAddress) to an address that the executors can reach.",
        ) from error
    try:
        set_keep_alive(sock)
        codec = _client_handshake(sock, secret)
    except (OSError, EOFError, RendezvousError) as error:
        sock.close()
        raise RendezvousError(
            f"{where} answered, but not as this run's driver: {error or type(error).__name__}.",
            cause="Another program listens there, or the run has ended.",
        ) from error
    sock.settimeout(None)
    return Connection(sock, codec)


def _client_handshake(sock: socket.socket, secret: bytes) -> FrameCodec:
    server_nonce = _receive_exactly(sock, _NONCE_BYTES)
    client_nonce = os.urandom(_NONCE_BYTES)
    nonces = server_nonce + client_nonce
    sock.sendall(client_nonce + _proof(secret, b"client", nonces))
    if not hmac.compare_digest(_receive_exactly(sock, _TAG_BYTES), _proof(secret, b"server", nonces)):
        raise RendezvousError("it does not hold the run's secret")
    return _codec(secret, nonces, is_server=False)


def _receive_exactly(sock: socket.socket, byte_count: int) -> bytes:
    data = b""
    while len(data) < byte_count:
        part = sock.recv(byte_count - len(data))
        if not part:
            raise EOFError("the connection was closed during the handshake")
        data += part
    return data


class Connection:
    """The client's end: blocking, one reader, any number of sending threads."""

    def __init__(self, sock: socket.socket, codec: FrameCodec) -> None:
        self.socket = sock
        self._codec = codec
        self._send_lock = threading.Lock()
        self._waiting: list[Message] = []

    def send(self, header: Mapping[str, Any], blob: bytes = b"") -> None:
        """Send one message; OSError when the driver is gone."""
        with self._send_lock:
            self.socket.sendall(self._codec.encode(header, blob))

    def receive(self) -> Message:
        """Return the next message; EOFError when the driver has closed the connection."""
        while not self._waiting:
            self._waiting = self.read_available()
        return self._waiting.pop(0)

    def read_available(self) -> list[Message]:
        """Read once from the socket; return the messages completed by it, maybe none.

        Raises
        ------
        EOFError
            The driver closed the connection or is gone.
        """
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError("the driver closed the connection")
        return list(self._codec.feed(data))

    def hand_over(self) -> Header:
        """Return what another process needs to go on with this connection, if it inherits the descriptor.

        Neither sends nor receives afterwards; to the driver the connection is open as long as any process has it open.
        """
        return {"descriptor": self.socket.fileno(), "codec": self._codec.state()}

    @classmethod
    def take_over(cls, state: Mapping[str, Any]) -> Connection:
        """Return the connection that :meth:`hand_over` described; its descriptor is no longer inherited by others."""
        os.set_inheritable(state["descriptor"], False)
        return cls(socket.socket(fileno=state["descriptor"]), FrameCodec.resume(state["codec"]))

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


# --- driver side ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Peer:
    """One authenticated connection as the server sees it; compare by identity."""

    address: str
    _transport: asyncio.Transport
    _codec: FrameCodec
    _loop: asyncio.AbstractEventLoop
    info: dict[str, Any] = field(default_factory=dict)
    """The owner's notes about this peer."""

    def send(self, header: Mapping[str, Any], blob: bytes = b"") -> None:
        """Queue one message; harmless when the peer or the server is gone. Any thread may call."""
        try:
            self._loop.call_soon_threadsafe(self._write, dict(header), blob)
        except RuntimeError:  # the loop is closed: so is the connection
            return

    def close(self) -> None:
        """Close the connection after what is queued has been sent."""
        try:
            self._loop.call_soon_threadsafe(self._transport.close)
        except RuntimeError:
            return

    def _write(self, header: Header, blob: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._codec.encode(header, blob))


class RendezvousServer:
    """The driver's end; owns one listening socket and one thread.

    Parameters
    ----------
    host : str
        Address to bind: Spark's own driver address, never a wildcard unless Spark binds one.
    secret : bytes
        Of this run.
    on_message : callable(Peer, Message)
        Called in the server's thread, must not block.
    on_close : callable(Peer)
        Called once for each authenticated peer whose connection ended.
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        on_message: Callable[[Peer, Message], None],
        on_close: Callable[[Peer], None],
    ) -> None:
        self._secret = secret
        self.on_message = on_message
        self.on_close = on_close
        self._loop = asyncio.new_event_loop()
        self._protocols: set[_ServerProtocol] = set()
        try:
            self._socket = socket.create_server((host, 0), backlog=1024)
        except OSError as error:
            self._loop.close()
            raise RendezvousError(
                f"Cannot listen on the driver's address {host}: {error}.",
                cause="spark.driver.bindAddress or spark.driver.host names an address that this machine does not have.",
                hint="Set spark.driver.bindAddress to an address of this machine.",
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="tfos_magic rendezvous", daemon=True)
        ready: Future[None] = Future()
        self._loop.call_soon(self._listen, ready)
        self._thread.start()
        ready.result()

    def close(self) -> None:
        """Close every connection and the port, and end the thread. Idempotent."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _listen(self, ready: Future[None]) -> None:
        task = self._loop.create_task(self._loop.create_server(lambda: _ServerProtocol(self), sock=self._socket))
        task.add_done_callback(lambda done: ready.set_result(None))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            for protocol in list(self._protocols):
                protocol.abort()
            self._socket.close()
            self._loop.run_until_complete(asyncio.sleep(0))  # lets the transports close their sockets
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


class _ServerProtocol(asyncio.Protocol):
    """One incoming connection: a stranger until it has proved that it holds the secret."""

    def __init__(self, server: RendezvousServer) -> None:
        self._server = server
        self._loop = server._loop
        self._server_nonce = os.urandom(_NONCE_BYTES)
        self._buffer = b""
        self._peer: Peer | None = None
        self._transport: asyncio.Transport
        self._deadline: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"a stream transport is needed, not {type(transport).__name__}")
        self._transport = transport
        self._server._protocols.add(self)
        set_keep_alive(transport.get_extra_info("socket"))
        self._deadline = self._loop.call_later(HANDSHAKE_TIMEOUT_S, transport.abort)
        transport.write(self._server_nonce)

    def data_received(self, data: bytes) -> None:
        try:
            if self._peer is None:
                data = self._authenticate(data)
            if self._peer is not None:
                for message in self._peer._codec.feed(data):
                    self._server.on_message(self._peer, message)
        except (RendezvousError, ValueError):
            self._transport.abort()  # nothing a stranger sends deserves an answer

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._server._protocols.discard(self)
        if self._peer is not None:
            self._server.on_close(self._peer)

    def abort(self) -> None:
        self._transport.abort()

    def _authenticate(self, data: bytes) -> bytes:
        """Return what follows the handshake; sets the peer once it is complete and right."""
        self._buffer += data
        need = _NONCE_BYTES + _TAG_BYTES
        if len(self._buffer) < need:
            return b""
        nonces = self._server_nonce + self._buffer[:_NONCE_BYTES]
        if not hmac.compare_digest(self._buffer[_NONCE_BYTES:need], _proof(self._server._secret, b"client", nonces)):
            raise RendezvousError("wrong proof")
        self._deadline.cancel()
        self._transport.write(_proof(self._server._secret, b"server", nonces))
        address = self._transport.get_extra_info("peername")[0]
        self._peer = Peer(address, self._transport, _codec(self._server._secret, nonces, is_server=True), self._loop)
        return self._buffer[need:]
