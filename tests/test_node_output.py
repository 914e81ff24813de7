"""What a node prints, on its way into messages: bounded in bytes, memory and work."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from tfos_magic.node.output import OutputLines, OutputPipe, Taken, bytes_per_beat

MIB = 1 << 20


def taken(*pieces: bytes, budget: int = 1 << 18) -> Taken:
    lines = OutputLines(budget)
    for piece in pieces:
        lines.feed(piece)
    return lines.take()


def numbered(start: int, stop: int) -> bytes:
    return b"".join(b"line %d\n" % number for number in range(start, stop))


def test_lines_are_put_together_from_pieces() -> None:
    assert taken(b"one\ntw", b"o\nthr", b"ee", b"") == ([], 0, ["one", "two", "three"])


def test_lines_are_put_together_over_beats() -> None:
    lines = OutputLines()
    lines.feed(b"one\nt")
    assert lines.take().last == ["one", "t\r"]
    lines.feed(b"wo\n")
    assert lines.take().last == ["two"]
    assert lines.take() == ([], 0, [])


def test_a_program_that_prints_ten_thousand_lines_at_once_loses_none() -> None:
    text = numbered(0, 10_000)
    pieces = [text[start : start + 65536] for start in range(0, len(text), 65536)]
    assert taken(*pieces) == ([], 0, [f"line {number}" for number in range(10_000)])


@pytest.mark.parametrize("size", [1000, 65536, MIB])
def test_in_a_flood_the_first_and_the_last_lines_arrive_and_the_others_are_counted(size: int) -> None:
    text = numbered(0, 1_000_000)
    lines = OutputLines(32 << 10)
    for start in range(0, len(text), size):
        lines.feed(text[start : start + size])
    first, dropped, last = lines.take()
    assert first[:20] == [f"line {number}" for number in range(20)]
    assert last[-200:] == [f"line {number}" for number in range(999_800, 1_000_000)]
    assert len(first) + dropped + len(last) == 1_000_000
    assert sum(map(len, [*first, *last])) < 8 * (32 << 10) + 4096
    assert list(lines.tail) == last[-200:]


def test_in_a_flood_that_goes_on_each_beat_is_within_its_budget() -> None:
    lines = OutputLines(32 << 10)
    sizes, count = [], 0
    for beat in range(30):
        for piece in range(16):
            lines.feed(numbered(beat * 160_000 + piece * 10_000, beat * 160_000 + (piece + 1) * 10_000))
        first, dropped, last = lines.take()
        count += len(first) + dropped + len(last)
        sizes.append(sum(len(line) + 1 for line in [*first, *last]))
    assert sizes[0] > 4 * sizes[-1]  # the burst
    assert max(sizes[1:]) <= (32 << 10) + 4096
    assert count == 30 * 160_000


def test_a_flood_costs_little_memory_and_time() -> None:
    lines, piece = OutputLines(), b"some words and a number 12345678\n" * (MIB // 33)
    tracemalloc.start()
    began = time.process_time()
    for _ in range(500):
        lines.feed(piece)
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MIB
    assert seconds < 3  # 0.2 s where nothing else runs: a fiftieth of a core at 200 MB/s
    assert lines.take().dropped > 10_000_000


def test_what_is_not_read_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr(OutputLines, "_is_chatter", lambda self, text: looked_at.append(text))
    taken(*[numbered(0, 100_000)] * 10, budget=8 << 10)
    assert len(looked_at) < 10_000


# --- what is redrawn ------------------------------------------------------------------------------------------


def bar(step: int, steps: int = 20) -> bytes:
    """Return what Keras 3 writes at each step."""
    done = step * 20 // steps
    drawn = f"\x1b[1m{step}/{steps}\x1b[0m \x1b[32m{'━' * done}\x1b[0m\x1b[37m{'━' * (20 - done)}\x1b[0m"
    back = "\b" * 50 if step > 1 else ""
    return f"{back}\r{drawn} \x1b[1m0s\x1b[0m 5ms/step - loss: {1 / step:.4f}".encode()


def test_of_a_redrawn_line_the_last_state_counts() -> None:
    assert taken(b"1/3\r2/3\r3/3 done\n") == ([], 0, ["3/3 done"])
    assert taken(b"1/3\r2/3\r3/3 done\r\n") == ([], 0, ["3/3 done"])


def test_a_bar_is_one_line_and_its_state_can_be_seen_meanwhile() -> None:
    lines = OutputLines()
    lines.feed(b"Epoch 1/2\n" + bar(1) + bar(2))
    epoch, state = lines.take().last
    assert epoch == "Epoch 1/2"
    assert state.startswith("2/20 ━━") and state.endswith("loss: 0.5000\r")
    for step in range(3, 20):
        lines.feed(bar(step))
        (state,) = lines.take().last
        assert state.startswith(f"{step}/20 ") and state.endswith("\r")
    assert lines.take().last == []  # nothing new
    lines.feed(bar(20) + b"\nEpoch 2/2\n")
    assert [line.partition(" ━")[0] for line in lines.take().last] == ["20/20", "Epoch 2/2"]


def test_a_bar_that_ends_at_once_is_one_line() -> None:
    (line,) = taken(b"".join(map(bar, range(1, 21))) + b"\n").last
    assert line.endswith("━ 0s 5ms/step - loss: 0.0500")


def test_a_bar_of_any_length_costs_no_memory() -> None:
    lines = OutputLines(32 << 10)
    for _ in range(50):
        lines.feed(b"".join(map(bar, range(1, 20))) * 400)
    (state,) = lines.take().last
    assert state.startswith("19/20 ")
    lines.feed(bar(20) + b"\n")
    (line,) = lines.take().last
    assert line.startswith("20/20 ")


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_that_never_ends_is_bounded(ending: bytes) -> None:
    lines = OutputLines()
    for _ in range(1600):
        lines.feed(b"x" * 65536)
    lines.feed(ending)
    assert lines.take() == ([], 0, ["x" * 1999 + "…"])
    lines.feed(b"short\n")
    assert lines.take().last == ["short"]


def test_a_line_that_never_ends_is_bounded_over_beats() -> None:
    lines = OutputLines()
    for _ in range(100):
        lines.feed(b"y" * MIB)
        assert sum(map(len, lines.take().last)) <= 2001
    lines.feed(b"\n")
    assert lines.take().last == ["y" * 1999 + "…"]


# --- what is shown --------------------------------------------------------------------------------------------


def test_bytes_that_are_no_text_do_not_stop_the_log() -> None:
    assert taken(b"\xff\xfe ok\n").last[0].endswith("ok")


@pytest.mark.parametrize(
    ("line", "is_shown"),
    [
        (b"I0000 00:00:1795351425.071737   19875 cpu_feature_guard.cc:227] This TensorFlow binary\n", False),
        (b"2024-01-01 10:00:00.123: I tensorflow/core/util/port.cc:113] oneDNN custom operations are on.\n", False),
        (b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n", False),
        (b"W0000 00:00:1795351425.071737 x.cc:1] something to look at\n", True),
        (b"INFO my own line\n", True),
    ],
)
def test_tensorflows_greetings_are_left_out_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, line: bytes, is_shown: bool
) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    assert bool(taken(line).last) is is_shown
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    assert taken(line).last


# --- the pipe -------------------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def test_all_nodes_together_send_what_one_driver_can_take() -> None:
    assert bytes_per_beat(1) == bytes_per_beat(8) == 256 << 10
    assert bytes_per_beat(64) * 64 <= 2 * MIB
    assert bytes_per_beat(100_000) >= 8 << 10


def test_a_drain_takes_what_was_written_and_ends_though_the_writer_goes_on(ends: tuple[int, int]) -> None:
    pipe = OutputPipe(ends[0])
    assert pipe.read() is None and list(pipe.drain()) == []
    os.set_blocking(ends[1], False)
    size = os.write(ends[1], b"x" * (4 * MIB))
    drained = 0
    for piece in pipe.drain():
        drained += len(piece)
        os.write(ends[1], b"more" * 1000)
    assert size <= drained < 2 * size
    assert 0 < pipe.pause_s <= 0.006
