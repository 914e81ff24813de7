from __future__ import annotations

import pytest

from tfos_magic.node.output import OutputLines


def taken(*pieces: bytes) -> tuple[list[str], int]:
    lines = OutputLines()
    for piece in pieces:
        lines.feed(piece)
    return lines.take()


def test_lines_are_put_together_from_pieces() -> None:
    assert taken(b"one\ntw", b"o\nthr", b"ee", b"") == (["one", "two", "three"], 0)


def test_of_a_redrawn_line_the_last_state_counts() -> None:
    assert taken(b"1/3\r2/3\r3/3 done\n") == (["3/3 done"], 0)


def test_too_many_lines_are_counted_and_the_last_ones_kept() -> None:
    lines, dropped = taken(b"".join(b"line %d\n" % number for number in range(1000)))
    assert lines[-1] == "line 999"
    assert len(lines) + dropped == 1000


def test_a_line_that_never_ends_is_bounded() -> None:
    lines, _ = taken(b"x" * 500_000)
    assert all(len(line) <= 2000 for line in lines)


def test_bytes_that_are_no_text_do_not_stop_the_log() -> None:
    assert taken(b"\xff\xfe ok\n")[0][0].endswith("ok")


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
    assert bool(taken(line)[0]) is is_shown
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    assert taken(line)[0]
