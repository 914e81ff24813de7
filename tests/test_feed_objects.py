"""Rows of any objects between processes whose ``__main__`` differ: a driver, real Python workers, a child, and back."""

from __future__ import annotations

import collections
import datetime
import decimal
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfos_magic.errors import DataError, ResultError
from tfos_magic.feed import objects

ROOT = Path(__file__).resolve().parents[1]
Script = Callable[..., "subprocess.CompletedProcess[str]"]

# What a notebook defines. In a driver's __main__, and in a child's, where the cell has brought it.
CLASSES = """
import collections, dataclasses, enum, typing
import numpy as np

Point = collections.namedtuple("Point", "x y")

class Pair(typing.NamedTuple):
    a: int
    b: float = 0.5
    def total(self):
        return self.a + self.b

class Vector(collections.namedtuple("Vector", "u v")):
    scale = 2
    def length(self):
        return self.scale * (self.u ** 2 + self.v ** 2) ** 0.5

@dataclasses.dataclass
class Record:
    name: str
    values: list
    def first(self):
        return self.values[0]

@dataclasses.dataclass(frozen=True)
class Frozen:
    key: int

@dataclasses.dataclass(slots=True)
class Slim:
    key: int

class Plain:
    def __init__(self, value):
        self.value = value
    def __eq__(self, other):
        return type(other) is Plain and other.value == self.value
    __hash__ = None

class Slotted:
    __slots__ = ("value",)
    def __init__(self, value):
        self.value = value
    def __eq__(self, other):
        return type(other) is Slotted and other.value == self.value
    __hash__ = None

class Color(enum.Enum):
    RED = 1
    BLUE = 2

def namedtuples():
    return [Point(1, 2), Pair(3), Vector(3, 4), Point(x=[1], y="__main__")]

def all_rows():
    return namedtuples() + [Record("r", [1, 2]), Frozen(7), Slim(8), Plain({"k": (1, 2)}), Slotted(3), Color.BLUE,
                            {"c": Color.RED}, (1, Frozen(2)), [Plain(Frozen(3))]]
"""

# How the bytes travel: driver ─ rows ─► Python worker ─ dumps ─► child ─ dumps ─► Python worker ─ rows ─► driver.
JOURNEY = (
    CLASSES
    + """
import json, os, subprocess, sys
from pathlib import Path
from pyspark.sql import SparkSession

def check(args, ctx):
    from tfos_magic.feed import objects
    live = [Point, Pair, Vector, Record, Frozen, Slim, Plain, Slotted, Color]
    before = [dict(vars(kind)) for kind in live]
    with open(args["data"], "rb") as file:
        rows = objects.loads(file.read())
    expected = globals()[args["rows"]]()
    found = {
        "is_same_type": [type(row) is type(original) for row, original in zip(rows, expected)],
        "is_equal": [row == original for row, original in zip(rows, expected)],
        "has_methods": [row.total() for row in rows if isinstance(row, Pair)]
                     + [row.length() for row in rows if isinstance(row, Vector)]
                     + [row.first() for row in rows if isinstance(row, Record)],
        "changed": [kind.__name__ for kind, old in zip(live, before) if dict(vars(kind)) != old],
        "has_pyspark": "pyspark" in sys.modules,
    }
    assert namedtuples and all_rows and is_slotted  # mentioned, so that they come along
    with open(args["data"], "wb") as file:
        file.write(objects.dumps([row for row in rows if not is_slotted(row)]))
    print(json.dumps(found))

CHILD = '''
import sys
from tfos_magic import namedtuple_patch, shipping
namedtuple_patch.ensure_clean()
function, args = shipping.unpack_call(open(sys.argv[1], "rb").read(), as_main=True)
function(args, None)
'''

def is_slotted(row):
    return isinstance(row, (Slim, Slotted))  # PySpark by itself cannot collect these

def travel(make):
    from tfos_magic import shipping
    rows = make()
    sc = SparkSession.builder.getOrCreate().sparkContext
    (data,) = sc.parallelize(rows, 1).mapPartitions(lambda part: [pack(part)]).collect()
    Path("rows.bin").write_bytes(data)
    args = {"data": os.path.abspath("rows.bin"), "rows": make.__name__}
    Path("payload.bin").write_bytes(shipping.pack(check, args=args).data)
    done = subprocess.run([sys.executable, "-c", CHILD, "payload.bin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    results = Path("rows.bin").read_bytes()
    home = sc.parallelize(rows, 1).mapPartitions(lambda part: answer(part, results)).collect()
    rows = [row for row in rows if not is_slotted(row)]
    return {
        **found,
        "count": len(home),
        "is_equal_at_home": [a == b for a, b in zip(home, rows)],
        "is_same_type_at_home": [type(a) is type(b) for a, b in zip(home, rows)],
    }

def pack(part):
    from tfos_magic.feed import objects
    return objects.dumps(list(part))

def answer(part, results):
    from tfos_magic.feed import objects
    rows = list(part)
    objects.dumps(rows)  # as a task of inference, which has sent them and still has them when the results come
    yield from objects.loads(results)
    del rows
"""
)


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def assert_same(found: dict[str, Any], count: int, at_home: int) -> None:
    assert found["is_same_type"] == [True] * count, found
    assert found["is_equal"] == [True] * count, found
    assert found["changed"] == []
    assert found["count"] == found["is_equal_at_home"].count(True) == at_home, found


# --- in one process ---------------------------------------------------------------------------------------------

ORDINARY = [
    (1, 2.5, "text", b"\0bytes\0", None, True),
    [1, (2, {"k": {3, 4}})],
    {"a": np.float32(1.5), "b": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc)},
    decimal.Decimal("1.10"),
    collections.OrderedDict(a=1),
    3,
    "plain",
]


def test_ordinary_rows_take_the_fast_way_and_arrive_equal_and_of_the_same_type() -> None:
    data = objects.dumps(ORDINARY)
    assert data == pickle.dumps(ORDINARY, 5)
    rows = objects.loads(data)
    assert rows == ORDINARY
    assert [type(row) for row in rows] == [type(row) for row in ORDINARY]
    assert type(rows[2]["a"]) is np.float32


def test_arrays_keep_dtype_and_shape() -> None:
    arrays = [np.arange(6, dtype=np.int16).reshape(2, 3), np.array(["a", None], object), np.array(3.5)]
    for sent, arrived in zip(arrays, objects.loads(objects.dumps(arrays)), strict=True):
        assert arrived.dtype == sent.dtype
        assert arrived.shape == sent.shape
        assert (arrived == sent).all()


def test_sparks_rows_stay_rows() -> None:
    from pyspark.sql import Row

    rows = [Row(a=1, b="x"), Row(a=2, b="y")]
    arrived = objects.loads(objects.dumps(rows))
    assert arrived == rows
    assert [type(row) for row in arrived] == [Row, Row]
    assert arrived[1].b == "y"


def test_no_rows() -> None:
    assert objects.loads(objects.dumps([])) == []


@pytest.mark.parametrize(("is_result", "error", "word"), [(False, DataError, "row"), (True, ResultError, "result")])
def test_what_cannot_travel_is_named(is_result: bool, error: type[Exception], word: str) -> None:
    rows = [1, 2, threading.Lock(), 4]
    with pytest.raises(error, match=rf"A {word} \(lock, number 2 of 4\) cannot travel.*cannot pickle '_thread.lock'"):
        objects.dumps(rows, is_result=is_result)


def test_text_that_looks_like_a_module_is_text() -> None:
    rows = ["__main__", "pyspark.serializers", "tfos_magic.feed.objects"]
    assert objects.loads(objects.dumps(rows)) == rows


# --- processes with other __main__s, without Spark --------------------------------------------------------------


def run(directory: Path, code: str) -> dict[str, Any]:
    """Run a script in an interpreter of its own and return what it printed as JSON in its last line."""
    directory.joinpath("script.py").write_text(textwrap.dedent(code), encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "script.py"]
    done = subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return last_json(done)


STORE = """
from pathlib import Path
from tfos_magic.feed.objects import dumps
Path("data").write_bytes(dumps(rows))
print("{}")
"""


def send(directory: Path, code: str) -> None:
    run(
        directory,
        CLASSES + textwrap.dedent(code) + "\n" + STORE,
    )


RECEIVE = "import json, pathlib\nfrom tfos_magic.feed.objects import loads\ndata = pathlib.Path('data').read_bytes()\n"


def test_a_process_without_the_class_gets_one_rebuilt_and_always_the_same_one(tmp_path: Path) -> None:
    send(tmp_path, "rows = all_rows()")
    found = run(
        tmp_path,
        RECEIVE
        + """
first, second = loads(data), loads(data)
print(json.dumps({
    "equal": first == second,
    "same": [type(a) is type(b) for a, b in zip(first, second)],
    "methods": [first[1].total(), first[2].length(), first[4].first()],
    "names": [f"{type(row).__module__}.{type(row).__qualname__}" for row in first[:3]],
}))
""",
    )
    assert found == {
        "equal": True,
        "same": [True] * 13,
        "methods": [3.5, 10.0, 1],
        "names": ["__main__.Point", "__main__.Pair", "__main__.Vector"],
    }


def test_threads_that_load_at_once_get_the_same_class(tmp_path: Path) -> None:
    send(
        tmp_path,
        """
import time
class Slow:
    def __reduce__(self):
        return time.sleep, (0.1,)  # lets the others run while the class is being made
class Made:
    pause = Slow()
rows = [Made()]
""",
    )
    found = run(
        tmp_path,
        RECEIVE
        + """
import threading
loaded = []
start = threading.Barrier(8)
def load():
    start.wait()
    loaded.append(loads(data))
threads = [threading.Thread(target=load) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(len({tuple(map(type, rows)) for rows in loaded})))
""",
    )
    assert found == 1


def test_a_class_of_the_same_name_counts_only_with_the_same_fields(tmp_path: Path) -> None:
    send(tmp_path, "rows = [Point(1, 2), Record('r', [1]), Color.RED]")
    found = run(
        tmp_path,
        RECEIVE
        + """
import collections, dataclasses, enum
Point = collections.namedtuple("Point", "x y z")
@dataclasses.dataclass
class Record:
    name: str
    values: list
    marker = "mine"
class Color(enum.Enum):
    RED = 1
rows = loads(data)
print(json.dumps([isinstance(rows[0], Point), isinstance(rows[1], Record), rows[1].marker, isinstance(rows[2], Color),
                  rows[0]._asdict()]))
""",
    )
    assert found == [False, True, "mine", False, {"x": 1, "y": 2}]


def test_a_live_class_is_never_overwritten(tmp_path: Path) -> None:
    send(tmp_path, "rows = [Record('r', [1]), Plain(2)]")
    found = run(
        tmp_path,
        CLASSES
        + RECEIVE
        + """
Record.first = lambda self: "mine"
Plain.added = 1
rows = loads(data)
print(json.dumps([rows[0].first(), rows[1].added, rows[1] == Plain(2), "value" in vars(rows[1])]))
""",
    )
    assert found == ["mine", 1, True, True]


def test_classes_made_inside_functions_are_not_mixed_up(tmp_path: Path) -> None:
    send(
        tmp_path,
        """
def make(factor):
    class Scaled:
        def __init__(self, value): self.value = value
        def get(self): return factor * self.value
    return Scaled
two, three = make(2), make(3)
rows = [two(1), three(1), two(5)]
""",
    )
    found = run(
        tmp_path,
        RECEIVE
        + """
class Scaled: pass
rows = loads(data)
print(json.dumps([[row.get() for row in rows], type(rows[0]) is type(rows[2]), isinstance(rows[0], Scaled)]))
""",
    )
    assert found == [[2, 3, 10], True, False]


def test_what_pysparks_patch_has_reduced_becomes_the_live_class(tmp_path: Path) -> None:
    environ = "import os; os.environ['PYSPARK_ENABLE_NAMEDTUPLE_PATCH'] = '1'\nimport pyspark.serializers\n"
    code = "\nrows = namedtuples()\n" + STORE
    in_worker = "import pickle; rows = pickle.loads(pickle.dumps(namedtuples()))"  # as rows arrive there: structural
    run(tmp_path, environ + CLASSES + code)
    assert b"_restore" in tmp_path.joinpath("data").read_bytes()
    check = "print(json.dumps([[type(row).__name__ for row in rows], rows == namedtuples(), rows[1].total(), "
    check += "isinstance(rows[0], Point), isinstance(rows[2], Vector), 'pyspark' in __import__('sys').modules]))"
    expected = [["Point", "Pair", "Vector", "Point"], True, 3.5, True, True, False]
    assert run(tmp_path, CLASSES + RECEIVE + "rows = loads(data)\n" + check) == expected
    run(tmp_path, environ + CLASSES + in_worker + STORE)
    assert run(tmp_path, CLASSES + RECEIVE + "rows = loads(data)\n" + check) == expected


def test_a_reduced_namedtuple_without_a_live_class_is_rebuilt_also_with_odd_names(tmp_path: Path) -> None:
    environ = "import os; os.environ['PYSPARK_ENABLE_NAMEDTUPLE_PATCH'] = '1'\nimport pyspark.serializers\n"
    make = "import collections\nOdd = collections.namedtuple('Odd', 'a def', rename=True)\nrows = [Odd(1, 2)]\n"
    make += STORE
    run(tmp_path, environ + make)
    check = "rows = loads(data)\nprint(json.dumps([rows[0]._asdict(), type(rows[0]) is type(loads(data)[0])]))"
    assert run(tmp_path, RECEIVE + check) == [{"a": 1, "_1": 2}, True]


# --- the whole way, through a real Spark ------------------------------------------------------------------------


def test_the_notebooks_classes_make_the_whole_way_and_back(spark_script: Script) -> None:
    found = last_json(spark_script(JOURNEY + "print(json.dumps(travel(all_rows)))", env={"PYTHONPATH": str(ROOT)}))
    assert_same(found, 13, at_home=11)
    assert found["has_methods"] == [3.5, 10.0, 1]
    assert not found["has_pyspark"]
    assert found["is_same_type_at_home"] == [True] * 11  # what Spark brought to a worker goes home as what it was


@pytest.mark.parametrize("revert", ["", "from tfos_magic import namedtuple_patch\nnamedtuple_patch.revert()\n"])
def test_namedtuples_make_the_whole_way_where_pyspark_patches(spark_script: Script, revert: str) -> None:
    environ = {"PYTHONPATH": str(ROOT), "PYSPARK_ENABLE_NAMEDTUPLE_PATCH": "1"}
    code = "import pyspark.serializers\n" + revert + JOURNEY + "print(json.dumps(travel(namedtuples)))"
    found = last_json(spark_script(code, env=environ))
    assert_same(found, 4, at_home=4)
    assert found["has_methods"] == [3.5, 10.0]
    if revert:  # guarded, so that their type holds on the way home as well
        assert found["is_same_type_at_home"] == [True] * 4


@pytest.mark.slow
@pytest.mark.oldest
def test_the_notebooks_classes_make_the_whole_way_with_the_oldest_versions(
    spark_script: Script, oldest_python: Path
) -> None:
    code = JOURNEY + "print(json.dumps(travel(all_rows)))"
    found = last_json(spark_script(code, env={"PYTHONPATH": str(ROOT)}, python=oldest_python))
    assert_same(found, 13, at_home=11)
