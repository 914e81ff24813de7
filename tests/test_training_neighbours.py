"""Memory that one process lends and another reads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tfos_magic.training.neighbours import OFFER, Lender, Window

READ = """
import sys
from tfos_magic.training.neighbours import Window
window = Window.open(bytes.fromhex(sys.argv[1]))
print(window.view(bytes.fromhex(sys.argv[2]), int(sys.argv[3])).view("float32").tolist())
"""


@pytest.fixture
def lender() -> object:
    lender = Lender()
    yield lender
    lender.close()


def test_another_process_reads_it_where_it_lies(lender: Lender) -> None:
    lender.empty(5000)
    values = lender.empty(20_000).view("float32")
    values[...] = range(5000)
    place = lender.place_of(values[100:103])
    assert place is not None
    command = [sys.executable, "-c", READ, lender.offer.hex(), place.hex(), "12"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[100.0, 101.0, 102.0]\n"


def test_it_cannot_be_written_to_from_there(lender: Lender) -> None:
    values = lender.empty(5000)
    window, place = Window.open(lender.offer), lender.place_of(values)
    assert window is not None and place is not None
    with pytest.raises(ValueError, match="read-only"):
        window.view(place, 5000)[0] = 1
    window.close()


def test_what_lies_elsewhere_has_no_place(lender: Lender) -> None:
    assert lender.place_of(np.zeros(10_000)) is None


def test_what_is_not_the_lenders_file_is_not_opened(lender: Lender) -> None:
    pid, descriptor, token = OFFER.unpack(lender.offer)
    pipe = os.pipe()
    ours, theirs = socket.socketpair()
    other = Lender()
    _, others, _ = OFFER.unpack(other.offer)
    gone = subprocess.Popen(["true"])
    gone.wait()
    before = len(os.listdir("/proc/self/fd"))
    strange = [(pid, fd, token) for fd in (pipe[0], pipe[1], ours.fileno(), others, 10_000)]
    for offer in [*strange, (pid, descriptor, b"x" * 16), (gone.pid, descriptor, token), (0, descriptor, token)]:
        assert Window.open(OFFER.pack(*offer)) is None, offer
    assert len(os.listdir("/proc/self/fd")) == before
    for end in pipe:
        os.close(end)
    ours.close()
    theirs.close()
    other.close()


def test_a_part_is_lent_once_at_a_time_and_used_again(lender: Lender) -> None:
    first = lender.empty(10_000)
    address, view = first.ctypes.data, first[5:50].view("int8")
    del first
    second = lender.empty(10_000)
    assert second.ctypes.data != address, "a view of it was still held"
    del view
    assert lender.empty(9_000).ctypes.data == address


def test_sizes_that_change_do_not_fill_the_memory(lender: Lender) -> None:
    descriptor = OFFER.unpack(lender.offer)[1]
    for size in range(100_000, 10_000_000, 100_000):
        lender.empty(size)[...] = 1
    held = os.fstat(descriptor).st_blocks * 512
    assert 9_900_000 <= held < 3 * 10_000_000, held


def test_what_is_held_stays_when_it_is_closed(lender: Lender) -> None:
    values = lender.empty(10_000)
    values[...] = 7
    lender.close()
    lender.close()
    assert set(values.tolist()) == {7}
