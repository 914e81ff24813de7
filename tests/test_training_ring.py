"""The ring by itself: its nodes are threads here, its connections real."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from training_harness import held_ports

from tfos_magic.errors import RendezvousError, StalledError
from tfos_magic.training.neighbours import PLACE
from tfos_magic.training.ring import PeerLostError, Ring, RingPlan


def plans(ports: list[int], secret: bytes = b"s") -> list[RingPlan]:
    names = tuple(f"worker:{rank}" for rank in range(len(ports)))
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    return [RingPlan(names, addresses, rank, secret) for rank in range(len(ports))]


def on_ring(count: int, action: Callable[[Ring], Any], sharing: str = "*****") -> list[Any]:
    """Return what `action` returns, or raises, on each node of a new ring; those with a "-" share no memory."""

    def node(plan: RingPlan) -> Any:
        ring = Ring.connect(plan, timeout_s=20, shares_memory=sharing[plan.rank] == "*")
        try:
            return action(ring)
        except Exception as error:
            return error
        finally:
            ring.close()

    with held_ports(count) as ports, ThreadPoolExecutor(count) as pool:
        return list(pool.map(node, plans(ports)))


@pytest.mark.parametrize("sharing", ["**", "--", "*-", "***", "---", "**-", "*****"])
def test_sums_are_right_and_the_same_bits_on_every_node(sharing: str) -> None:
    count = len(sharing)
    random = np.random.default_rng(0)
    sizes = [0, 1, 2, 7, 1000, 400_000]
    inputs = [[random.normal(size=size).astype("float32") for size in sizes] for _ in range(count)]

    def action(ring: Ring) -> list[Any]:
        return [ring.all_reduce(values, "sum") for values in inputs[ring.plan.rank]]

    results = on_ring(count, action, sharing)
    for index in range(len(sizes)):
        expected = np.sum([values[index].astype("float64") for values in inputs], 0)
        np.testing.assert_allclose(results[0][index], expected, atol=1e-5)
        assert len({result[index].tobytes() for result in results}) == 1


def test_input_is_left_as_it_is() -> None:
    values = [np.ones(5), np.ones(5)]
    on_ring(2, lambda ring: ring.all_reduce(values[ring.plan.rank], "sum"))
    assert values[0].tolist() == values[1].tolist() == [1] * 5


def test_integers_and_doubles_keep_their_type() -> None:
    def action(ring: Ring) -> Any:
        big = 2**60 + ring.plan.rank
        return ring.gather(np.array([big]), "g").ravel().tolist(), ring.all_reduce(np.array([0.1]), "d").dtype.str

    assert on_ring(2, action) == [([2**60, 2**60 + 1], "<f8")] * 2


def test_parts_of_different_lengths_are_joined_in_order() -> None:
    def action(ring: Ring) -> Any:
        return ring.concatenate(np.full((ring.plan.rank, 2), ring.plan.rank, "float32"), "parts").tolist()

    assert on_ring(3, action) == [[[1, 1], [2, 2], [2, 2]]] * 3


@pytest.mark.parametrize("sharing", ["***", "---"])
def test_bytes_sent_are_the_least_possible(sharing: str) -> None:
    def action(ring: Ring) -> int:
        before = ring.bytes_sent
        ring.all_reduce(np.zeros(300_000, "float32"), "sum")
        return ring.bytes_sent - before

    least = 2 * (3 - 1) / 3 * 1_200_000
    assert all(least <= sent < 1.001 * least for sent in on_ring(3, action, sharing))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_averages_are_weighted_and_what_is_only_summed_is_not_divided(count: int) -> None:
    random = np.random.default_rng(0)
    inputs = [random.normal(size=1001).astype("float32") for _ in range(count)]

    def action(ring: Ring) -> tuple[Any, float]:
        rank = ring.plan.rank
        values = np.concatenate([inputs[rank] * rank, inputs[rank]])
        return values, ring.average(values, rank, "mean", averaged=1001)

    results = on_ring(count, action)
    assert {total for _, total in results} == {sum(range(count))}
    assert len({values.tobytes() for values, _ in results}) == 1
    mean = np.average(np.array(inputs, "float64"), axis=0, weights=range(count))
    np.testing.assert_allclose(results[0][0][:1001], mean, atol=1e-6)
    np.testing.assert_allclose(results[0][0][1001:], np.sum(inputs, 0), atol=1e-5)


def test_average_without_any_weight_is_a_sum() -> None:
    def action(ring: Ring) -> Any:
        values = np.zeros(5, "float32")
        return ring.average(values, 0, "mean"), values.tolist()

    assert on_ring(2, action) == [(0.0, [0.0] * 5)] * 2


@pytest.mark.parametrize("sharing", ["**", "--", "****", "*--*"])
def test_bfloat16_on_the_way_halves_the_bytes_and_gives_all_nodes_the_same_bits(sharing: str) -> None:
    count = len(sharing)
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    random = np.random.default_rng(0)
    inputs = [random.normal(1, 0.1, size=300_000).astype("float32") for _ in range(count)]

    def action(ring: Ring) -> tuple[Any, int]:
        values, before = inputs[ring.plan.rank].copy(), ring.bytes_sent
        ring.average(values, 1.0, "mean", wire=bfloat16)
        return values, ring.bytes_sent - before

    results = on_ring(count, action, sharing)
    assert len({values.tobytes() for values, _ in results}) == 1
    np.testing.assert_allclose(results[0][0], np.mean(inputs, 0), rtol=1e-2)
    assert not np.array_equal(results[0][0], np.mean(inputs, 0))
    least = 2 * (count - 1) / count * 600_000
    assert all(least <= sent < 1.001 * least for _, sent in results)


def test_bfloat16_keeps_what_is_no_number() -> None:
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    strange = np.array([np.nan, np.inf, -np.inf, 3e38, 0.0, 1.0], "float32")

    def action(ring: Ring) -> Any:
        values = strange.copy() if ring.plan.rank else np.zeros_like(strange)
        ring.average(values, 0.5, "mean", wire=bfloat16)
        return values

    for result in on_ring(2, action):
        np.testing.assert_allclose(result, strange, rtol=1e-2)


def test_nodes_with_different_types_on_the_way_are_an_error() -> None:
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    results = on_ring(
        2, lambda ring: ring.average(np.zeros(5, "float32"), 1, "x", wire=bfloat16 if ring.plan.rank else None)
    )
    assert any(isinstance(result, StalledError) for result in results)


@pytest.mark.parametrize("sharing", ["**", "***"])
def test_what_is_returned_may_be_changed_at_once_though_neighbours_read_it_where_it_lies(sharing: str) -> None:
    def action(ring: Ring) -> list[tuple[float, float]]:
        found = []
        for number in range(100):
            values = ring.empty(300_000, np.float32)
            values[...] = number
            ring.average(values, 1.0, "mean")
            found.append((float(values.min()), float(values.max())))
            values[...] = np.nan
        return found

    for result in on_ring(len(sharing), action, sharing):
        assert result == [(number, number) for number in range(100)]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("sharing", ["**", "--", "*--*", "*****"])
def test_each_part_is_filled_in_once_and_before_it_is_needed(sharing: str, rounded: bool) -> None:
    wire = np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if rounded else None
    size = 700_000

    def action(ring: Ring) -> tuple[Any, Any]:
        times, found = np.zeros(size, np.uint8), []
        for number in range(3):
            values = ring.empty(size, np.float32)
            values[...] = np.nan

            def fill(begin: int, end: int, values: Any = values, number: int = number) -> None:
                times[begin:end] += 1
                values[begin:end] = number + ring.plan.rank

            ring.average(values, 1.0, "mean", averaged=size - 5, wire=wire, fill=fill)
            found.append((set(values[:-5]), set(values[-5:])))
        return set(times), found

    count = len(sharing)
    for result in on_ring(count, action, sharing):
        sums = [sum(range(number, number + count)) for number in range(3)]
        assert result == ({3}, [({total / count}, {total}) for total in sums])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_slow_neighbour_reads_what_was_there_when_it_was_told(count: int) -> None:
    def action(ring: Ring) -> list[set[float]]:
        receive = ring._receive_chunk
        if ring.plan.rank == 1:
            ring._receive_chunk = lambda chunk: time.sleep(0.1) or receive(chunk)  # type: ignore[method-assign,func-returns-value]
        found = []
        for number in range(4):
            values = ring.empty(300_000, np.float32)
            address = values.ctypes.data

            def fill(begin: int, end: int, values: Any = values, number: int = number) -> None:
                values[begin:end] = number

            ring.average(values, 1.0, "mean", fill=fill)
            found.append(set(values))
            del values, fill
            assert ring.empty(300_000, np.float32).ctypes.data == address, "the same memory comes next"
        return found

    assert on_ring(count, action) == [[{0.0}, {1.0}, {2.0}, {3.0}]] * count


def test_a_node_that_ends_while_its_neighbour_still_reads_is_no_loss() -> None:
    has_ended = threading.Event()

    def action(ring: Ring) -> Any:
        receive = ring._receive_chunk
        if ring.plan.rank == 1:
            ring._receive_chunk = lambda chunk: has_ended.wait(10) and receive(chunk)  # type: ignore[method-assign]
        values = ring.empty(300_000, np.float32)

        def fill(begin: int, end: int) -> None:
            values[begin:end] = 7

        ring.average(values, 1.0, "mean", fill=fill)
        found = set(values)
        if ring.plan.rank == 0:
            ring.close()
            has_ended.set()
        return found

    assert on_ring(2, action) == [{7.0}, {7.0}]


def test_memory_that_neighbours_see_is_used_again_and_closed() -> None:
    def action(ring: Ring) -> tuple[int, Any]:
        lent = []
        for _ in range(20):
            values = ring.empty(100_000, np.float64)
            lent.append(values.ctypes.data)
            values[...] = 1
            kept = ring.all_reduce(values, "sum")
            ring.average(values, 1.0, "mean")
        assert any("tfos-ring" in name for name in _files())
        return len(set(lent)), kept

    before = _files()
    results = on_ring(2, action)
    assert max(parts for parts, _ in results) <= 3  # two that are held, and one for the next
    for _, kept in results:
        assert set(kept) == {2.0}, "what is held outlives the ring"
    del kept, results
    assert sorted(_files()) == sorted(before)


def test_a_node_that_is_lost_before_it_has_read_is_noticed() -> None:
    def action(ring: Ring) -> Any:
        if ring.plan.rank == 1:
            ring._add_chunk = lambda *a: ring.close() or iter(())  # type: ignore[method-assign,func-returns-value]
        ring.all_reduce(np.zeros(300_000), "gradients")

    error, _ = on_ring(2, action)
    assert isinstance(error, PeerLostError), error
    assert error.peer == "worker:1"


def test_a_reader_that_is_reset_is_named_and_not_the_other_neighbour() -> None:
    """Nobody but the next node is at fault when it goes away with something unread, which resets its connection."""
    has_gone = threading.Event()

    def action(ring: Ring) -> Any:
        if ring.plan.rank == 1:

            def vanish(chunk: Any) -> None:
                unread = 0
                while unread < 2 * PLACE.size:  # until it has been told of the last chunk, too
                    with contextlib.suppress(BlockingIOError):
                        unread = len(ring._previous.recv(10_000, socket.MSG_PEEK))
                    time.sleep(0.01)
                for link in (ring._previous, ring._next):
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                ring.close()
                has_gone.set()
                raise PeerLostError("gone", peer="")

            ring._receive_chunk = vanish  # type: ignore[method-assign]
        values = ring.empty(300_000, np.float32)
        ring.average(values, 1.0, "mean", fill=lambda begin, end: values[begin:end].fill(1))
        has_gone.wait(10)
        ring.empty(300_000, np.float32)

    error = on_ring(3, action)[0]
    assert isinstance(error, PeerLostError), error
    assert error.peer == "worker:1"


def test_nodes_at_different_places_are_an_error_that_names_both() -> None:
    first, second = on_ring(2, lambda ring: ring.all_reduce(np.zeros(1), ["fit", "evaluate"][ring.plan.rank]))
    assert isinstance(first, StalledError)
    assert "worker:0 is at 'fit' while worker:1 is at 'evaluate'" in str(first)
    assert isinstance(second, (StalledError, PeerLostError))


def test_different_lengths_are_an_error_with_the_numbers() -> None:
    results = on_ring(2, lambda ring: ring.all_reduce(np.zeros(3 + ring.plan.rank), "x"))
    told = [str(result) for result in results if isinstance(result, StalledError)]  # who is second may be hung up on
    assert any(
        ("with 3 numbers" in text and "with 4." in text) or ("with 4 numbers" in text and "with 3." in text)
        for text in told
    )


def test_lost_peer_is_named_and_stays_lost() -> None:
    def action(ring: Ring) -> Any:
        if ring.plan.rank == 1:
            return None
        with pytest.raises(PeerLostError) as first:
            ring.all_reduce(np.zeros(10), "gradients")
        with pytest.raises(PeerLostError) as again:
            ring.all_reduce(np.zeros(10), "gradients")
        assert again.value is first.value
        return first.value

    error, _ = on_ring(2, action)
    assert error.peer == "worker:1"
    assert "'gradients'" in error.fact


def test_node_that_ends_early_but_has_sent_all_is_no_loss() -> None:
    for _ in range(20):
        results = on_ring(4, lambda ring: float(ring.all_reduce(np.ones(1), "last")[0]))
        assert results == [4.0] * 4


def test_strangers_are_turned_away_and_do_not_block() -> None:
    with held_ports(2) as ports, ThreadPoolExecutor(2) as pool:
        ours = plans(ports)
        first = pool.submit(Ring.connect, ours[0], timeout_s=20)
        stranger = _connect_when_open(ports[0])
        stranger.recv(16)
        stranger.sendall(b"x" * 48)
        second = pool.submit(Ring.connect, ours[1], timeout_s=20)
        for ring in (first.result(), second.result()):
            ring.close()
        stranger.close()


def test_wrong_secret_never_meets() -> None:
    with held_ports(2) as ports, ThreadPoolExecutor(2) as pool:
        pair = [plans(ports)[0], plans(ports, b"other")[1]]
        futures = [pool.submit(Ring.connect, plan, timeout_s=0.5) for plan in pair]
        errors = [future.exception() for future in futures]
    assert all(isinstance(error, RendezvousError) for error in errors)


def test_missing_node_is_named() -> None:
    before = threading.active_count()
    with held_ports(2) as ports, pytest.raises(RendezvousError, match="worker:0 could not meet worker:1"):
        Ring.connect(plans(ports)[0], timeout_s=0.3)
    assert threading.active_count() == before


def test_address_of_another_machine_is_explained() -> None:
    plan = RingPlan(("worker:0", "worker:1"), ("192.0.2.1:1", "127.0.0.1:1"), 0)
    with pytest.raises(RendezvousError, match=r"cannot listen on 192\.0\.2\.1:1"):
        Ring.connect(plan, timeout_s=0.1)


def _files() -> list[str]:
    """Return what this process's descriptors stand for."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread has closed it
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


def _connect_when_open(port: int) -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except ConnectionRefusedError:
            threading.Event().wait(0.01)
    raise AssertionError("nobody listens")
