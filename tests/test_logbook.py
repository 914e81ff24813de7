"""The files of a run's output: what they keep, how they are read, and that they go."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tfos_magic.background import lines_of
from tfos_magic.logbook import LogBook, remove_abandoned
from tfos_magic.status import NodeChanged, NodeLogged, NodeState, StatusBoard

NODE = "worker:0"


def directories() -> list[Path]:
    return sorted(Path(tempfile.gettempdir()).glob("tfos_magic-logs-*"))


def numbered(start: int, stop: int) -> list[str]:
    return [f"line {number}" for number in range(start, stop)]


@pytest.fixture
def book() -> Iterator[LogBook]:
    book = LogBook(64 << 10)
    yield book
    book.close()


def test_lines_come_back_as_they_were_given(book: LogBook) -> None:
    assert (book.read(NODE), book.paths, directories()) == (([], 0), {}, [])
    book.append(NODE, ["one", "zwei ″ç━", "", "three"])
    book.append("chief:0", ["other"])
    assert book.read(NODE) == (["one", "zwei ″ç━", "three"], 1)
    assert book.read(NODE, last=1) == (["three"], 3)
    assert book.read("chief:0", last=99) == (["other"], 0)
    assert book.read("worker:9") == ([], 0)


def test_the_files_are_readable_by_their_owner_alone(book: LogBook) -> None:
    book.append(NODE, ["a secret word"])
    path = book.paths[NODE]
    assert path.read_text() == "a secret word\n"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.name == "worker-0.log"


@pytest.mark.parametrize("at_once", [1, 7, 100_000])
def test_at_least_the_last_half_is_kept_and_never_more_than_the_whole(book: LogBook, at_once: int) -> None:
    lines = numbered(0, 30_000)
    for start in range(0, len(lines), at_once):
        book.append(NODE, lines[start : start + at_once])
    path = book.paths[NODE]
    sizes = [each.stat().st_size for each in path.parent.glob("worker-0.log*")]
    assert 32 << 10 <= sum(sizes) <= 64 << 10
    kept, left_out = book.read(NODE) or ([], 0)
    assert kept == lines[-len(kept) :]
    assert len(kept) + left_out == 30_000
    assert book.read(NODE, last=2) == (lines[-2:], 29_998)


def test_lines_left_out_are_noted_where_they_are_missing_and_counted(book: LogBook) -> None:
    book.append(NODE, ["begin"], dropped=5)  # nothing is before them: they are earlier ones
    book.append(NODE, ["end"], dropped=998_000)
    assert book.read(NODE) == (["begin", "… 998,000 lines left out here", "end"], 5)
    assert book.read(NODE, last=1) == (["end"], 998_006)
    assert book.read(NODE, pattern=re.compile("begin|left|end"), last=1) == (["end"], 998_006)
    assert book.read(NODE, pattern=re.compile("end$")) == (["end"], 998_005)


def test_a_pattern_finds_lines_in_all_that_is_kept(book: LogBook) -> None:
    lines = numbered(0, 3000)
    book.append(NODE, lines)
    expected = [line for line in lines if line.endswith("7")]
    assert book.read(NODE, pattern=re.compile("7$")) == (expected, 0)
    assert book.read(NODE, 3, re.compile("7$")) == (expected[-3:], 297)


def test_the_last_lines_of_a_long_log_are_read_without_the_rest() -> None:
    book = LogBook()
    try:
        for _ in range(40):
            book.append(NODE, ["x" * 99] * 10_000)  # 40 MB
        assert sum(each.stat().st_size for each in book.paths[NODE].parent.iterdir()) <= 16 << 20
        began = time.process_time()
        assert book.read(NODE, last=100) == (["x" * 99] * 100, 399_900)
        assert time.process_time() - began < 0.05  # 0.5 ms; all of it: 60 ms
    finally:
        book.close()


def test_it_can_be_read_while_it_is_written_and_closed(book: LogBook) -> None:
    begun = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        begun.set()
        while (found := book.read(NODE)) is not None:
            kept = [int(line.split()[1]) for line in found[0]]
            if kept and kept != list(range(kept[0], kept[-1] + 1)):
                wrong.append(f"{kept[0]} … {kept[-1]}: {len(kept)}")

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(10)
    for start in range(0, 200_000, 500):
        book.append(NODE, numbered(start, start + 500))
    book.close()
    reader.join(30)
    assert not reader.is_alive() and not wrong


# --- the end --------------------------------------------------------------------------------------------------


def test_closed_it_has_nothing_and_takes_nothing(book: LogBook) -> None:
    book.append(NODE, ["word"])
    assert directories()
    book.close()
    book.append(NODE, ["another"])
    assert (book.read(NODE), book.paths, directories()) == (None, {}, [])
    book.close()


def test_the_files_go_with_the_object() -> None:
    book = LogBook()
    book.append(NODE, ["word"])
    del book
    gc.collect()
    assert directories() == []


def test_a_disk_that_is_full_closes_the_book_and_memory_goes_on(book: LogBook) -> None:
    board = StatusBoard()
    board.store = book
    board.apply(NodeLogged(NODE, ("one",)))
    path = book.paths[NODE]
    path.unlink()
    path.symlink_to("/dev/full")
    board.apply(NodeLogged(NODE, ("two",)))
    board.apply(NodeLogged(NODE, ("three",)))
    assert (book.paths, directories()) == ({}, [])
    assert board.logs(NODE) == ("one", "two", "three")
    assert lines_of(board) == {NODE: ("one", "two", "three")}


SCRIPT = """
import os, sys
from tfos_magic.logbook import LogBook
book = LogBook()
book.append("chief:0", ["word"])
print(book.paths["chief:0"], flush=True)
"""


def process(more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT + more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError", "import threading\nbook.append('a', ['b'])"])
def test_the_files_go_with_the_process_however_it_ends(end: str) -> None:
    with process(end.replace("raise", "sys.stderr.close()\nraise")) as running:
        out = running.communicate(timeout=60)[0]
    assert "tfos_magic-logs-" in out and directories() == []


def test_a_forked_process_leaves_them_alone() -> None:
    with process(
        "if os.fork() == 0:\n    sys.exit()\nos.wait()\nprint(os.path.exists(book.paths['chief:0']))"
    ) as running:
        assert running.communicate(timeout=60)[0].split()[-1] == "True"
    assert directories() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_files_go_with_a_process_that_a_signal_ends(number: signal.Signals) -> None:
    with process("import signal; signal.pause()") as running:
        assert running.stdout is not None
        path = Path(running.stdout.readline().strip())
        (guard,) = psutil.Process(running.pid).children()
        assert os.getpgid(guard.pid) != os.getpgid(running.pid)
        running.send_signal(number)
        running.wait(60)
        guard.wait(10)
    assert not path.parent.exists()


def test_a_closed_book_leaves_no_process(book: LogBook) -> None:
    before = psutil.Process().children()
    book.append(NODE, ["word"])
    assert len(psutil.Process().children()) == len(before) + 1
    book.close()
    assert psutil.Process().children() == before


def test_what_is_left_when_all_is_killed_goes_with_the_next_one_and_what_is_in_use_stays(book: LogBook) -> None:
    book.append(NODE, ["mine"])
    with process("import signal; signal.pause()") as running:
        assert running.stdout is not None
        path = Path(running.stdout.readline().strip())
        (guard,) = psutil.Process(running.pid).children()
        guard.kill()
        remove_abandoned()
        assert path.exists()
        running.send_signal(signal.SIGKILL)
        running.wait(60)
    assert path.exists()
    remove_abandoned()
    assert directories() == [book.paths[NODE].parent]


def test_directories_that_look_alike_stay(book: LogBook) -> None:
    other = Path(tempfile.mkdtemp(prefix="tfos_magic-logs-"))
    try:
        link = other.with_name("tfos_magic-logs-link")
        link.symlink_to(other)
        remove_abandoned()
        assert other.exists() and link.is_symlink()
        link.unlink()
    finally:
        os.rmdir(other)


# --- with a board -----------------------------------------------------------------------------------------------


def test_a_board_writes_clean_lines_and_what_is_not_finished_only_shows(book: LogBook) -> None:
    board = StatusBoard()
    board.store = book
    board.apply(NodeLogged(NODE, ("\x1b[31mred\x1b[0m", " 1/20 ━\r")))
    assert board.view().nodes[0].last_line == "1/20 ━"
    board.apply(NodeLogged(NODE, ("12/20 ━━━━\r",)))
    assert board.view().nodes[0].last_line == "12/20 ━━━━"
    board.apply(NodeLogged(NODE, ("20/20 ━━━━━━━",)))
    assert board.logs(NODE) == ("red", "20/20 ━━━━━━━")
    assert book.paths[NODE].read_text() == "red\n20/20 ━━━━━━━\n"


def test_a_board_in_memory_notes_what_is_missing_as_the_file_does(book: LogBook) -> None:
    board = StatusBoard(log_lines_kept=4)
    board.apply(NodeChanged(NODE, NodeState.RUNNING, "host"))
    in_memory = StatusBoard(log_lines_kept=4)
    board.store = book
    for each in (board, in_memory):
        each.apply(NodeChanged(NODE, NodeState.RUNNING, "host"))
        each.apply(NodeLogged(NODE, ("a", "b"), dropped=10))
        each.apply(NodeLogged(NODE, ("c",), dropped=500))
    assert lines_of(in_memory) == {NODE: ("… 10 earlier lines left out", "a", "b", "… 500 lines left out here", "c")}
    assert lines_of(board) == lines_of(in_memory)
    for tail in (1, 2, 3):
        assert lines_of(board, tail=tail) == lines_of(in_memory, tail=tail)
        assert lines_of(board, tail=tail, grep="[abc]$") == lines_of(in_memory, tail=tail, grep="[abc]$")
    in_memory.apply(NodeLogged(NODE, ("d", "e", "f")))
    assert lines_of(in_memory) == {NODE: ("… 512 earlier lines left out", "c", "d", "e", "f")}
