"""The doctor and real Spark sessions: what executors say, the namedtuple patch, and what must not be touched."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LOCAL_CLUSTER

from tfos_magic.namedtuple_patch import ENABLING_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

_BEGIN = """
import json, os, sys
from pathlib import Path
from pyspark.sql import SparkSession
from tfos_magic import doctor
spark = SparkSession.builder.getOrCreate()
sc = spark.sparkContext

def tell(name, found):
    said = found.to_json() if hasattr(found, "to_json") else found
    print("SAID", json.dumps({name: said}))
"""
_END = "\nspark.stop()\n"


@pytest.fixture
def ask(spark_script: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a script that tells; the folders ``here`` and ``there`` are its PYTHONPATH and its executors'."""

    def run(code: str, master: str = "local[2]", **more: Any) -> dict[str, Any]:
        for name in ("here", "there"):
            (tmp_path / name).mkdir(exist_ok=True)
        env = {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "here", ROOT))), **more.pop("env", {})}
        done = spark_script(_BEGIN + code + _END, master=master, env=env, args=[str(tmp_path)], **more)
        said: dict[str, Any] = {}
        for line in done.stdout.splitlines():
            if line.startswith("SAID "):
                said.update(json.loads(line[5:]))
        return said

    return run


def bad(said: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(f["verdict"], f["trap"], f["words"]) for f in said["findings"] if f["verdict"] != "fine"]


RELOADED = """
import importlib
file = Path(sys.argv[1]) / "here" / "reloaded_helper.py"
file.write_text("def rate(): return 3\\n")
import reloaded_helper
def work(x): return reloaded_helper.rate()
tell("first", sc.parallelize(range(4), 4).map(work).collect())
tell("healthy", doctor.examine(work, "work", executors=spark))
file.write_text("def rate(): return 40000\\n")
importlib.invalidate_caches()
importlib.reload(reloaded_helper)
tell("driver", work(1))
tell("then", sc.parallelize(range(4), 4).map(work).collect())
tell("stale", doctor.examine(work, "work", executors=spark))
tell("guessed", doctor.examine(work, "work"))
tell("jobs", [len(sc.statusTracker().getActiveJobsIds())])
"""


def test_an_edited_and_reloaded_module_is_stale_on_warm_executors(ask: Any) -> None:
    said = ask(RELOADED, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert said["first"] == [3] * 4
    assert bad(said["healthy"]) == []
    assert [trip["outcome"] for trip in said["healthy"]["executors"]] == ["arrived"]
    assert (said["driver"], said["then"]) == (40000, [3] * 4)  # the trap
    assert bad(said["stale"]) == [("silently wrong", "stale-module", "work → global reloaded_helper → attribute rate")]
    assert "keeps what it imported first" in said["stale"]["findings"][0]["why"]
    # Without asking nobody knows whether they have used it: a remark.
    assert bad(said["guessed"]) == []
    assert [f["trap"] for f in said["guessed"]["findings"]] == ["stale-module"]
    assert said["jobs"] == [0]


CLUSTER = """
import collections
place = Path(sys.argv[1])
for name, version in (("here", "1.0"), ("there", "2.0")):
    (place / name / "versioned.py").write_text(f"__version__ = {version!r}\\ndef f(): return 1\\n")
Path("beside_notebook.py").write_text("def f(): return 1\\n")
(place / "shipped_helper.py").write_text("def f(): return 1\\n")
sys.path.insert(0, "")
import beside_notebook, versioned
Pair = collections.namedtuple("Pair", "x y")
def uses_beside(x): return beside_notebook.f()
def uses_versioned(x): return versioned.f()
try:
    sc.parallelize([1]).map(uses_beside).collect()
except Exception as error:
    tell("shown", "No module named 'beside_notebook'" in str(error))
tell("guessed", doctor.examine(uses_beside, "work"))
tell("beside", doctor.examine(uses_beside, "work", executors=spark))
tell("versions", sc.parallelize([1]).map(lambda _: versioned.__version__).collect())
tell("versioned", doctor.examine(uses_versioned, "work", executors=spark))
sc.addPyFile(str(place / "shipped_helper.py"))
import shipped_helper
tell("shipped", doctor.examine(lambda x: shipped_helper.f(), "work", executors=spark))
tell("back", [type(p).__mro__[1].__name__ for p in sc.parallelize(range(2)).map(lambda x: Pair(x, x)).collect()])
tell("pair", doctor.examine([Pair(1, 2)], "pairs", executors=spark))
tell("large", doctor.examine([bytes(3_000_000)], "large", executors=spark))
"""


def test_executors_tell_what_they_have(ask: Any, tmp_path: Path) -> None:
    conf = {
        "spark.executorEnv.PYTHONPATH": f"{tmp_path / 'there'}",
        f"spark.executorEnv.{ENABLING_VARIABLE}": "1",
    }
    said = ask(CLUSTER, LOCAL_CLUSTER, conf=conf)
    missing = [("breaks", "driver-only-module", "work → global beside_notebook")]
    assert said["shown"] is True
    assert bad(said["guessed"]) == bad(said["beside"]) == missing
    assert len(said["beside"]["executors"]) == 2
    assert {trip["outcome"] for trip in said["beside"]["executors"]} == {"failed"}
    assert said["beside"]["trip"]["outcome"] == "arrived"  # the module lies where the notebook runs

    assert said["versions"] == ["2.0"]
    assert ("silently wrong", "other-version", "work") in bad(said["versioned"])
    assert {row["name"]: (row["here"], row["there"]) for row in said["versioned"]["names"]} == {
        "versioned": ("1.0", "2.0")
    }
    assert bad(said["shipped"]) == []

    assert ("silently wrong", "namedtuple-patch", "pairs") in bad(said["pair"])
    assert said["pair"]["trip"]["is_namedtuple_patched"] is False
    assert {trip["is_namedtuple_patched"] for trip in said["pair"]["executors"]} == {True}

    assert bad(said["large"]) == []
    assert {trip["outcome"] for trip in said["large"]["executors"]} == {"arrived"}


PATCHED = """
import collections
from tfos_magic import namedtuple_patch
class Point(collections.namedtuple("Point", "x y")):
    def sum(self): return self.x + self.y
tell("back", [type(p) is Point for p in sc.parallelize([Point(1, 2)]).collect()])
tell("patched", doctor.examine({"p": Point(1, 2)}, "row"))
namedtuple_patch.revert()
tell("reverted", doctor.examine({"p": Point(1, 2)}, "row"))
"""


def test_the_namedtuple_patch_is_a_silent_wrong_until_it_is_reverted(ask: Any) -> None:
    said = ask(PATCHED, env={ENABLING_VARIABLE: "1"})
    assert said["back"] == [False]
    assert bad(said["patched"]) == [("silently wrong", "namedtuple-patch", "row → key 'p'")]
    (table,) = said["patched"]["namedtuples"]
    assert [each["name"] for each in table["mro"] if each["is_pysparks"]] == ["collections.Point"]
    assert bad(said["reverted"]) == []
    assert not [each for each in said["reverted"]["namedtuples"][0]["mro"] if each["is_pysparks"]]


FEATURE_COLUMNS = """
import tensorflow as tf
from tfos_magic import namedtuple_patch
column = tf.feature_column.numeric_column("x")
tell("there", sc.parallelize([1]).map(lambda _: [type(column).__module__, hasattr(column, "parse_example_spec")])
     .collect()[0])
tell("patched", doctor.examine([column], "columns"))
namedtuple_patch.revert()
tell("reverted", doctor.examine([column], "columns"))
"""


def test_the_2018_case_is_named(ask: Any) -> None:
    said = ask(FEATURE_COLUMNS, env={ENABLING_VARIABLE: "1", "TF_CPP_MIN_LOG_LEVEL": "3"})
    assert said["there"][1] is False  # a bare namedtuple
    assert bad(said["patched"])[0] == ("silently wrong", "namedtuple-patch", "columns → item 0")
    assert bad(said["reverted"]) == []


UNTOUCHED = """
table = sc.broadcast({"a": 1})
seen = sc.accumulator(0)
def work(x):
    seen.add(1)
    return table.value["a"]
found = doctor.examine(work, "work")
tell("verdict", found.verdict.word)
tell("noted", len(list(sc._pickled_broadcast_vars)))
tell("works", sc.parallelize([1, 2], 2).map(work).collect() + [seen.value])
tell("again", doctor.examine([table], "table", executors=spark))
tell("nodes", doctor.examine(work, "work", for_nodes=True))
class P:
    pass
spark.udf.register("f", lambda x: x)
tell("rdd", doctor.examine(sc.parallelize([1]), "rdd"))
"""


def test_a_broadcast_is_not_noted_for_the_next_job(ask: Any) -> None:
    said = ask(UNTOUCHED)
    assert (said["verdict"], said["noted"]) == ("fine", 0)
    assert said["works"] == [1, 1, 2]
    assert bad(said["again"]) == []
    assert {trap for _, trap, _ in bad(said["nodes"])} == {"spark-broadcast"}
    assert bad(said["rdd"]) == [("breaks", "spark-dataframe", "rdd")]


OLD = """
import collections, json, threading
from tfos_magic import doctor
found = {
    "lock": doctor.examine({"a": threading.Lock()}, "it"),
    "plain": doctor.examine({"a": [1]}, "it"),
    "late": doctor.examine([lambda: i for i in range(2)], "it"),
}
Late = type("Late", (collections.namedtuple("Late", "a"),), {"__module__": "__main__"})
found["after"] = doctor.examine(Late(1), "it")
print(json.dumps({name: each.to_json() for name, each in found.items()}))
"""


@pytest.mark.oldest
def test_pyspark_3_2_is_understood_too(pyspark32_python: Path, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(OLD)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(pyspark32_python), str(tmp_path / "old.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert bad(said["lock"]) == [("breaks", "lock", "it → key 'a'")]
    assert bad(said["plain"]) == []
    assert bad(said["late"]) == [("silently wrong", "late-binding", "it")]
    assert bad(said["after"]) == [("silently wrong", "namedtuple-patch", "it")]
    assert said["plain"]["trip"]["outcome"] == "arrived"
