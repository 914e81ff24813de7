from __future__ import annotations

import hmac
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tfos_magic import rendezvous
from tfos_magic.errors import RendezvousError
from tfos_magic.rendezvous import Message, Peer, RendezvousServer, connect

SECRET = b"s" * 32


class Driver:
    """A server that records what it hears."""

    def __init__(self) -> None:
        self.heard: queue.Queue[tuple[Peer, Message]] = queue.Queue()
        self.closed: queue.Queue[Peer] = queue.Queue()
        self.server = RendezvousServer(
            "127.0.0.1", SECRET, lambda peer, message: self.heard.put((peer, message)), self.closed.put
        )
        self.address = ("127.0.0.1", self.server.port)


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.server.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tfos_magic")]


def test_messages_arrive_whole_and_in_order_both_ways(driver: Driver) -> None:
    connection = connect(driver.address, SECRET)
    blob = os.urandom(3_000_000)
    for number in range(50):
        connection.send({"type": "count", "number": number}, blob if number == 25 else b"")
    received = [driver.heard.get(timeout=5) for _ in range(50)]
    assert [message.header["number"] for _, message in received] == list(range(50))
    assert received[25][1].blob == blob
    peer = received[0][0]
    for number in range(50):
        peer.send({"type": "answer", "number": number}, b"x" * number)
    assert [len(connection.receive().blob) for _ in range(50)] == list(range(50))
    connection.close()
    assert driver.closed.get(timeout=5) is peer


def test_a_client_without_the_secret_is_refused_and_says_so(driver: Driver) -> None:
    with pytest.raises(RendezvousError, match="not as this run's driver"):
        connect(driver.address, b"wrong" * 8)
    assert driver.heard.empty()


def test_a_client_finds_out_that_the_server_has_another_secret() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        stranger, _ = listener.accept()
        with stranger:
            stranger.sendall(b"n" * 32)
            stranger.recv(64)
            stranger.sendall(b"p" * 32)

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(RendezvousError, match="does not hold the run's secret"):
        connect(("127.0.0.1", listener.getsockname()[1]), SECRET)
    thread.join()
    listener.close()


def test_nobody_listening_is_an_error_that_names_address_and_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RendezvousError) as caught:
        connect(("127.0.0.1", port), SECRET)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "spark.driver.host" in str(caught.value)


def test_a_silent_stranger_blocks_nobody_and_is_dropped(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "HANDSHAKE_TIMEOUT_S", 0.3)
    with socket.create_connection(driver.address) as stranger:
        assert len(stranger.recv(32)) == 32
        began = time.monotonic()
        connect(driver.address, SECRET).close()
        assert time.monotonic() - began < 0.25
        stranger.settimeout(5)
        with pytest.raises(ConnectionError):
            if not stranger.recv(1):
                raise ConnectionError("closed")


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n" * 10, b"\0" * 200, os.urandom(5000)])
def test_noise_is_dropped_without_an_answer(driver: Driver, noise: bytes) -> None:
    with socket.create_connection(driver.address) as stranger:
        stranger.settimeout(5)
        stranger.sendall(noise)
        answer = b""
        try:
            while part := stranger.recv(1000):
                answer += part
        except ConnectionError:
            pass
    assert len(answer) == 32  # the challenge, nothing else
    assert driver.heard.empty()


def test_a_forged_frame_after_the_handshake_ends_the_connection(driver: Driver) -> None:
    connection = connect(driver.address, SECRET)
    frame = bytearray(connection._codec.encode({"type": "harmless"}))
    frame[-1] ^= 1
    connection.socket.sendall(frame)
    with pytest.raises(EOFError):
        connection.receive()
    assert driver.heard.empty()
    connection.close()


def test_a_replayed_frame_is_refused(driver: Driver) -> None:
    connection = connect(driver.address, SECRET)
    frame = connection._codec.encode({"type": "once"})
    connection.socket.sendall(frame)
    connection.socket.sendall(frame)
    assert driver.heard.get(timeout=5)[1].type == "once"
    with pytest.raises(EOFError):
        connection.receive()
    assert driver.heard.empty()
    connection.close()


def test_the_secret_never_crosses_the_wire() -> None:
    seen = bytearray()
    driver = Driver()
    relay = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            seen.extend(data)
            sink.sendall(data)

    def serve() -> None:
        client, _ = relay.accept()
        with client, socket.create_connection(driver.address) as server:
            back = threading.Thread(target=pump, args=(server, client))
            back.start()
            pump(client, server)
            server.shutdown(socket.SHUT_RDWR)
            back.join()

    thread = threading.Thread(target=serve)
    thread.start()
    connection = connect(("127.0.0.1", relay.getsockname()[1]), SECRET)
    connection.send({"type": "hello"})
    driver.heard.get(timeout=5)
    connection.close()
    thread.join()
    relay.close()
    driver.server.close()
    assert len(seen) > 100
    assert SECRET not in seen
    assert SECRET.hex().encode() not in seen


def test_an_absurd_length_is_refused_before_memory_is_taken(driver: Driver) -> None:
    connection = connect(driver.address, SECRET)
    connection.socket.sendall((1 << 31).to_bytes(4, "big") + (1 << 60).to_bytes(8, "big"))
    with pytest.raises(EOFError):
        connection.receive()
    connection.close()


def test_closing_the_server_ends_every_connection_and_frees_the_port() -> None:
    driver = Driver()
    connections = [connect(driver.address, SECRET) for _ in range(20)]
    driver.server.close()
    driver.server.close()
    for connection in connections:
        with pytest.raises(EOFError):
            connection.receive()
        connection.close()
    with socket.create_server(driver.address):
        pass


def test_keys_of_the_two_directions_differ() -> None:
    server = rendezvous._codec(SECRET, b"n" * 64, is_server=True)
    client = rendezvous._codec(SECRET, b"n" * 64, is_server=False)
    frame = client.encode({"type": "x"})
    with pytest.raises(RendezvousError):
        next(client.feed(frame))  # reflected
    assert next(server.feed(frame)).type == "x"
    assert hmac.compare_digest(server._send_key, client._receive_key)


def test_an_address_that_this_machine_does_not_have_names_the_setting() -> None:
    with pytest.raises(RendezvousError, match=r"spark\.driver\.bindAddress"):
        RendezvousServer("203.0.113.77", SECRET, lambda peer, message: None, lambda peer: None)
