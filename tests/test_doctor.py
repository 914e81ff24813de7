"""The doctor's parts: what it sees, what it leaves alone, and what becomes of its second interpreter."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import leftovers
import psutil
import pytest
from doctor_corpus import CORPUS, Entry

from tfos_magic import doctor
from tfos_magic.doctor import Diagnosis, Doctor, SecondInterpreter, Verdict, second
from tfos_magic.doctor.dialects import NodesDialect, SparkDialect
from tfos_magic.doctor.findings import Part
from tfos_magic.doctor.graph import trace
from tfos_magic.errors import SessionError
from tfos_magic.widgets import diagnosis as drawing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[SecondInterpreter]:
    with SecondInterpreter() as running:
        running.start()
        leftovers.allow_tree(running.pid or 0)
        yield running
        leftovers.forbid_tree(running.pid or 0)


@pytest.fixture
def physician(interpreter: SecondInterpreter) -> Doctor:
    return Doctor({}, interpreter)


def entry(name: str) -> Entry:
    return next(each for each in CORPUS if each.name == name)


def look(value: Any, name: str = "it") -> Diagnosis:
    return doctor.examine(value, name, fast=True, globals_={})


def steps(part: Part) -> dict[str, Part]:
    return {each.step: each for each in part.parts}


# --- the tree ------------------------------------------------------------------------------------------------


def make_step() -> Any:
    model = {"weights": bytes(5000), "names": ["a"]}

    def step(x: Any, by: Any = (1, 2)) -> Any:
        return model, x, by

    step.__module__ = "__main__"
    return step


def test_the_tree_has_captures_with_their_sizes_largest_first() -> None:
    tree = look(make_step()).tree
    assert tree.parts[0].step == "closure model"
    model = steps(tree)["closure model"]
    assert 5000 < model.size_bytes < 5200
    assert tree.size_bytes > model.size_bytes
    assert {part.step for part in model.parts} == {"key 'names'"}  # plain values are no parts
    assert "default of by" in steps(tree)


def test_the_size_is_that_of_the_pickle(physician: Doctor) -> None:
    from pyspark import cloudpickle

    step = make_step()
    found = physician.examine(step, "step")
    assert abs(found.size_bytes - len(cloudpickle.dumps(step, protocol=5))) < 20
    assert abs(found.tree.size_bytes - found.size_bytes) < 100


def test_a_long_container_is_sampled_and_still_searched_to_its_end() -> None:
    rows = [{"n": n} for n in range(20_000)] + [{"lock": threading.Lock()}] + [{"n": 1}] * 20_000
    found = look(rows)
    assert [finding.words for finding in found.findings] == ["it → item 20000 → key 'lock'"]
    assert len(found.tree.parts) < 20
    assert found.tree.more > 0


def test_many_things_are_found_in_one_look() -> None:
    cfg = {"a": threading.Lock(), "b": [queue.Queue(), memoryview(b"x")], "c": (n for n in ())}
    found = {(each.trap, each.words) for each in look(cfg).findings}
    assert found == {
        ("lock", "it → key 'a'"),
        ("thread", "it → key 'b' → item 0"),
        ("memoryview", "it → key 'b' → item 1"),
        ("generator", "it → key 'c'"),
    }


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="it has no lock any more")
def test_a_cached_property_is_named_and_not_only_its_lock(physician: Doctor) -> None:
    cell = "import functools\nclass P:\n    @functools.cached_property\n    def x(self): return 1"
    with Entry("cached property", cell, "[P()]").made() as made:
        found = Doctor(made.namespace, physician.interpreter).examine(made.value, "it").findings[0]
    assert (found.trap, found.words) == ("cached-property", "it → item 0 → class P → attribute x")


def test_what_is_met_twice_is_told_once() -> None:
    lock = threading.Lock()
    holder = {"a": lock}
    assert len([each for each in look([holder, holder]).findings if each.trap == "lock"]) == 1


def test_deep_nesting_is_an_answer_not_a_crash() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    found = look(deep)
    assert found.verdict is Verdict.BREAKS
    assert [each.trap for each in found.findings] == ["too-deep"]
    while deep:  # its destructor would recurse as well
        deep = deep.pop()


def test_large_things_are_seen_in_time() -> None:
    mixed = {f"k{n}": [n, {"n": [n]}] for n in range(150_000)}
    started = time.perf_counter()
    found = look(mixed)
    assert time.perf_counter() - started < 5  # 0.9 s on an idle machine
    assert found.verdict is Verdict.FINE
    assert len(found.tree.parts) < 20


# --- hands off -----------------------------------------------------------------------------------------------


TOUCHY = """
from collections.abc import Mapping

# Whatever pickling does not call must not be called.
class Touchy:
    def __init__(self):
        self.kept = {"x": 1}

    def __eq__(self, other):
        raise AssertionError("compared")

    __hash__ = None

    def __repr__(self):
        raise AssertionError("drawn")

    def __bool__(self):
        raise AssertionError("asked")

    def __len__(self):
        raise AssertionError("measured")

    @property
    def lazy(self):
        raise AssertionError("read")


class TouchyMapping(Mapping):
    def __getitem__(self, key):
        raise AssertionError("read")

    def __iter__(self):
        raise AssertionError("iterated")

    def __len__(self):
        raise AssertionError("measured")

it = {"a": Touchy(), "b": TouchyMapping()}
"""


def test_nothing_of_the_user_s_is_called_that_pickling_does_not_call(physician: Doctor) -> None:
    with Entry("touchy", TOUCHY, "it").made() as made:
        found = Doctor(made.namespace, physician.interpreter).examine(made.value, "it")
    assert found.verdict is Verdict.FINE
    drawing.bundle(found)
    json.dumps(found.to_json())


def test_iterators_and_files_are_where_they_were(physician: Doctor, tmp_path: Path) -> None:
    numbers = iter([1, 2, 3])
    (tmp_path / "f").write_text("one two three")
    with (tmp_path / "f").open() as file:
        file.read(4)
        found = physician.examine([numbers, zip("ab", numbers, strict=False), file], "it")
        assert file.tell() == 4
    assert list(numbers) == [1, 2, 3]
    assert {each.trap for each in found.findings} == {"captured-iterator", "open-file"}


def test_a_pipe_without_end_is_not_read(physician: Doctor) -> None:
    reading, writing = os.pipe()
    with open(reading) as file, open(writing, "w"):
        started = time.perf_counter()
        assert physician.examine(file, "it").findings[0].trap == "open-file"
        assert time.perf_counter() - started < 2


def test_the_user_s_classes_stay_as_they_are(physician: Doctor) -> None:
    """Unpickling in the driver would overwrite them: the very trap that the doctor warns of."""
    with entry("class leak-back: a registry").made() as made:
        cls = made.namespace["Model"]
        registry, methods = cls.known, {name: value for name, value in vars(cls).items() if name[:2] != "__"}
        found = Doctor(made.namespace, physician.interpreter).examine(made.value, "it")
        assert found.findings[0].trap == "class-leak-back"
        assert cls.known is registry
        assert {name: value for name, value in vars(cls).items() if name[:2] != "__"} == methods


def test_a_fast_look_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecondInterpreter, "ask", pytest.fail)
    assert look([1]).trip is None


# --- the two ways to pickle ----------------------------------------------------------------------------------


def test_nodes_get_other_advice_and_have_other_traps(physician: Doctor) -> None:
    lock = {"lock": threading.Lock()}
    assert "the cell" in physician.examine(lock, "it", for_nodes=True).findings[0].fix
    assert "the cell" not in physician.examine(lock, "it").findings[0].fix
    with entry("class leak-back: a method's global").made() as made:
        ours = Doctor(made.namespace, physician.interpreter)
        assert ours.examine(made.value, "it").verdict is Verdict.WRONG
        # Results of nodes leave the notebook's classes alone.
        assert ours.examine(made.value, "it", for_nodes=True).verdict is Verdict.FINE


def test_pip_s_registration_counts_for_nodes_only(physician: Doctor) -> None:
    with entry("registered with pip's cloudpickle").made() as made:
        ours = Doctor(made.namespace, physician.interpreter)
        assert ours.examine(made.value, "it").findings[0].trap == "registered-in-vain"
        assert ours.examine(made.value, "it", for_nodes=True).verdict is Verdict.FINE


@pytest.mark.parametrize("dialect", [SparkDialect, NodesDialect])
def test_a_known_obstacle_is_blamed_before_what_is_inside_it(dialect: Any) -> None:
    import weakref

    known: Any = weakref.WeakValueDictionary()
    stopped = [node for node in trace([known], "it", dialect()) if node.obstacle is not None or node.error is not None]
    assert [" → ".join(node.path) for node in stopped] == ["it → item 0"]


def test_without_pyspark_it_says_so() -> None:
    code = """
    import sys
    sys.modules["pyspark"] = None
    from tfos_magic import doctor
    from tfos_magic.errors import SessionError
    try:
        doctor.examine(1)
    except SessionError as error:
        print(error.fact, error.hint)
    print(doctor.examine([1], for_nodes=True).verdict.word)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "PySpark is not installed" in done.stdout
    assert done.stdout.splitlines()[-1] == "fine"


# --- the record ----------------------------------------------------------------------------------------------


def test_the_record_is_frozen_short_and_plain(physician: Doctor) -> None:
    found = physician.examine({"a": threading.Lock(), "b": threading.Event()}, "cfg")
    assert repr(found) == "<Diagnosis of cfg: breaks: lock at cfg → key 'a' and 1 more>"
    assert not found.pickles
    assert found.trip is None
    said = json.loads(json.dumps(found.to_json()))
    assert (said["verdict"], said["findings"][0]["words"]) == ("breaks", "cfg → key 'a'")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "x"  # type: ignore[misc]
    assert physician.examine([1], "ok").is_fine


def test_findings_come_worst_first() -> None:
    found = look([memoryview(b"x"), iter([1]), threading.Lock(), bytes(20_000_000)])
    assert [each.verdict for each in found.findings] == sorted((each.verdict for each in found.findings), reverse=True)
    assert found.verdict is Verdict.BREAKS


def test_globals_are_listed_with_the_way_they_travel(physician: Doctor) -> None:
    with entry("NumPy's functions").made() as made:
        (row,) = Doctor(made.namespace, physician.interpreter).examine(made.value, "work").names
    assert (row.name, row.kind, row.how) == ("np", "module", "by import of numpy")
    assert row.here == row.there != ""
    with entry("a module's function replaced by the notebook").made() as made:
        rows = Doctor(made.namespace, physician.interpreter).examine(made.value, "work").names
    assert [(row.name, row.is_patched) for row in rows] == [("json", True)]


def test_a_namedtuple_s_mro_says_who_wins(physician: Doctor) -> None:
    with entry("subclass of a namedtuple").made() as made:
        (table,) = Doctor(made.namespace, physician.interpreter).examine(made.value, "it").namedtuples
    assert [each.name for each in table.mro] == ["__main__.P", "__main__.P", "tuple", "object"]
    assert [each.wins for each in table.mro] == [False, False, False, True]
    assert not any(each.is_pysparks for each in table.mro)


def test_the_trip_has_the_facts(physician: Doctor) -> None:
    trip = physician.examine(collections.OrderedDict(a=[1, float("nan")]), "it").trip
    assert trip is not None
    assert (trip.outcome, trip.type_after) == ("arrived", "collections.OrderedDict")
    assert (trip.is_instance, trip.is_equal, trip.is_same, trip.lost_methods) == (True, True, False, ())
    assert trip.size_before == trip.size_after > 0
    same = physician.examine(json.dumps, "it").trip
    assert same is not None and same.is_same is True


def test_what_fails_on_arrival_is_found_by_its_path(physician: Doctor) -> None:
    with entry("an object that needs the driver when it arrives").made() as made:
        found = Doctor(made.namespace, physician.interpreter).examine({"deep": [1, made.value]}, "it")
    assert [each.words for each in found.findings[:1]] == ["it → key 'deep' → item 1 → key 'session'"]
    assert "this is another process" in found.findings[0].why


# --- drawing -------------------------------------------------------------------------------------------------


def test_html_is_escaped_and_needs_nothing(physician: Doctor) -> None:
    nasty = {"<script>alert(1)</script>": threading.Lock(), "&": {"x" * 5: memoryview(b"")}}
    html = drawing.render_html(physician.examine(nasty, "<b>cfg</b>"))
    assert "<script" not in html
    assert "<b>cfg" not in html.replace("<b>&lt;b&gt;cfg", "")
    assert "&lt;script&gt;" in html
    assert not {"<style", "<svg", "javascript:", "onclick", "http"} & set(html.lower().split('"'))
    for word in ("breaks", "lock", "→", "What it drags along"):
        assert word in html


def test_text_shows_the_tree_and_the_tables(physician: Doctor) -> None:
    with entry("subclass of a namedtuple").made() as made:
        text = drawing.render_text(Doctor(made.namespace, physician.interpreter).examine(made.value, "P(1, 2)"))
    assert text.startswith("✓ P(1, 2): fine   (__main__.P; pickles with pyspark.cloudpickle ")
    assert "└─ class P  (class, " in text
    assert "method sum" in text
    assert "_make" not in text  # what namedtuple itself puts into a class
    assert "← wins" in text
    assert "a clean second interpreter  arrived in" in text


def test_every_corpus_entry_can_be_drawn() -> None:
    for each in CORPUS:
        if each.needs:
            continue
        with each.made(SHARED="/nowhere") if "SHARED" not in each.cell else entry("plain values").made() as made:
            shown = drawing.bundle(doctor.examine(made.value, each.asked, fast=True, globals_=made.namespace))
        assert len(shown["text/plain"].splitlines()) < 120, each.name
        assert len(shown["text/html"]) < 60_000, each.name


# --- the second interpreter ----------------------------------------------------------------------------------


def blob(code: str) -> bytes:
    """A pickle that runs code where it is unpickled."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(textwrap.dedent(code), space)
    return SparkDialect().dumps(space["value"])


HANGS = """
class Hangs:
    def __init__(self): self.x = 1
    def __setstate__(self, state):
        import threading
        threading.Event().wait()
value = Hangs()
"""
DIES = HANGS.replace("import threading", "import os").replace("threading.Event().wait()", "os.kill(os.getpid(), 11)")
LEAVES = HANGS.replace("import threading", "import json, os").replace(
    "threading.Event().wait()", "json.left = getattr(json, 'left', 0) + 1; self.x = json.left; print('noise')"
)
ASKS_MAIN = HANGS.replace("import threading", "import sys").replace(
    "threading.Event().wait()", "assert not hasattr(sys.modules['__main__'], 'answer'), 'a name of ours in __main__'"
)


def test_a_hang_ends_at_the_deadline_and_the_next_question_is_answered(interpreter: SecondInterpreter) -> None:
    started = time.monotonic()
    assert interpreter.ask(blob(HANGS), {}, deadline_s=0.5)["timed_out"] is True
    assert time.monotonic() - started < 5
    assert interpreter.ask(blob("value = [1]"), {})["type"] == "builtins.list"


def test_a_crash_is_told_and_survived(interpreter: SecondInterpreter) -> None:
    before = interpreter.pid
    assert interpreter.ask(blob(DIES), {})["died_of"] == signal.SIGSEGV
    assert interpreter.ask(blob("value = 1"), {})["type"] == "builtins.int"
    assert interpreter.pid == before


def test_questions_leave_nothing_to_each_other(interpreter: SecondInterpreter) -> None:
    for _ in range(2):
        said = interpreter.ask(blob(LEAVES), {"names": ["json:left"]})
        assert said["names"] == {"json:left": second.fingerprint(1)}


def test_nothing_is_found_in_its_main(interpreter: SecondInterpreter) -> None:
    assert "error" not in interpreter.ask(blob(ASKS_MAIN), {})


def test_it_has_the_notebook_s_folder_but_not_what_the_notebook_added_to_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_me.py").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far_away.py").write_text("")
    (elsewhere / "json.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(elsewhere))
    with SecondInterpreter() as running:
        said = running.ask(blob("value = 1"), {"modules": ["beside_me", "far_away", "json", "graph", "second"]})
    found = {name: each is not None for name, each in said["modules"].items()}
    # The last two lie beside the program that it runs.
    assert found == {"beside_me": True, "far_away": False, "json": True, "graph": False, "second": False}
    assert "elsewhere" not in said["modules"]["json"]["file"]


def test_it_uses_no_gpu(interpreter: SecondInterpreter) -> None:
    code = HANGS.replace("import threading", "import os").replace(
        "threading.Event().wait()", "assert os.environ['CUDA_VISIBLE_DEVICES'] == '-1'"
    )
    assert "error" not in interpreter.ask(blob(code), {})


def test_close_ends_it_and_the_next_question_starts_another() -> None:
    with SecondInterpreter() as running:
        assert running.pid is None
        running.ask(blob("value = 1"), {})
        first = running.pid
        assert first is not None
        running.close()
        assert running.pid is None
        assert not psutil.pid_exists(first)
        assert running.ask(blob("value = 1"), {})["type"] == "builtins.int"


def test_an_interpreter_that_was_killed_is_replaced() -> None:
    with SecondInterpreter() as running:
        running.start()
        os.kill(running.pid or 0, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(running.pid)] if running.pid else [], 10)
        said = [running.ask(blob("value = 1"), {}) for _ in range(2)]
    assert said[-1]["type"] == "builtins.int"


def test_one_that_nobody_asks_ends_by_itself() -> None:
    code = "import os; from tfos_magic.doctor import second; second.IDLE_S = 0.3; second.serve(os.getppid())"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT) as process:
        assert process.wait(20) == 0


OWNER = """
import os, signal, sys, time
from tfos_magic.doctor import SecondInterpreter
running = SecondInterpreter()
running.start()
if sys.argv[1] == "forked":
    if os.fork() == 0:
        time.sleep(60)  # holds the pipe's other end
print(running.pid, flush=True)
if sys.argv[1] == "interrupted":
    os.killpg(0, signal.SIGINT)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "forked"])
def test_it_does_not_outlive_the_notebook(how: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, how], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    with owner:
        assert owner.stdout is not None
        process = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
        owner.wait(10)
        gone, _ = psutil.wait_procs([process], 30)
        os.killpg(owner.pid, signal.SIGKILL) if how == "forked" else None
        assert gone


def test_an_interrupt_of_the_notebook_is_none_of_its_business() -> None:
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{OWNER}"
    command = [sys.executable, "-c", ignoring, "interrupted"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as owner:
        assert owner.stdout is not None
        process = psutil.Process(int(owner.stdout.readline()))
        with pytest.raises(psutil.TimeoutExpired):
            process.wait(1)
        owner.kill()
        psutil.wait_procs([process], 30)


def test_examine_by_itself_leaves_no_process() -> None:
    assert doctor.examine([1, 2], "it", globals_={}).verdict is Verdict.FINE  # nothing_left looks


def test_a_session_without_context_is_an_error_in_words() -> None:
    class Connect:
        @property
        def sparkContext(self) -> Any:
            raise RuntimeError("[JVM_ATTRIBUTE_NOT_SUPPORTED]")

    with pytest.raises(SessionError, match="Spark Connect"):
        doctor.examine([1], "it", executors=Connect(), round_trip=False, globals_={})
