"""The namedtuple patch, where PySpark applies it: 4.x with the variable set, and 3.2, which always does.

Each scenario is a script of its own, since a process can only be patched once; ``namedtuple_scripts/`` has them.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from namedtuple_runs import ROOT, Run, make_run, run_with_pyspark32

from tfos_magic import namedtuple_patch
from tfos_magic.namedtuple_patch import ENABLING_VARIABLE

STDLIB = ["sched", "platform", "ssl", "inspect", "tokenize", "dis", "difflib", "doctest", "urllib.robotparser"]
STDLIB += ["importlib.metadata", "sqlite3", "asyncio", "http.client", "concurrent.futures", "unittest", "pyarrow"]
SIGNATURE = "(typename, field_names, *, rename=False, defaults=None, module=None)"


class PatchedEnd:
    """What must hold wherever PySpark patches; subclasses say where."""

    cause: str
    always = False
    lost_in_closures: tuple[str, ...] = ()

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls) -> Run:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def pickles(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("namedtuple") / "pickles"

    @pytest.fixture(scope="class")
    @classmethod
    def facts(cls, run: Run, pickles: Path) -> dict[str, Any]:
        return run("facts.py", str(pickles))

    def test_detects_the_patch_its_cause_and_what_it_affects(self, facts: dict[str, Any]) -> None:
        status = facts["status before"]
        assert status["is_patched"] and not status["is_prevented"]
        assert status["cause"] == self.cause
        assert status["class_count"] >= 10
        assert {"__main__.SubBefore", "__main__.SameName"} <= set(status["downgraded"])
        assert "__main__.TypedBefore" not in status["downgraded"]
        assert self.cause in status["summary"] and "\n" not in status["summary"]

    def test_the_patch_does_the_harm_that_is_told_of_it(self, facts: dict[str, Any]) -> None:
        before = facts["trip before"]
        assert not any(before[name]["same type"] for name in ("sub", "typed", "late"))
        assert before["copied sub"] is False
        assert "cannot start with an underscore" in before["renamed"]
        assert facts["signature before"] == "(*args, **kwargs)"

    def test_revert_restores_pythons_own_function(self, facts: dict[str, Any]) -> None:
        assert facts["plain after revert"] == {"code": True, "kwdefaults": True, "planted": [], "signature": SIGNATURE}
        assert facts["plain after"] == {"module": "__main__", "reduce": []}

    def test_eight_threads_revert_once(self, facts: dict[str, Any]) -> None:
        reports = facts["reports"]
        assert len(reports) == 8
        assert [report["was_patched"] for report in reports].count(True) == 1
        repaired = [name for report in reports for name in report["repaired"]]
        assert len(repaired) == len(set(repaired))
        assert {"__main__.Before", "__main__.TypedBefore", "sched.Event"} <= set(repaired)

    def test_classes_that_pickle_cannot_find_are_made_safe(self, facts: dict[str, Any]) -> None:
        report = next(report for report in facts["reports"] if report["was_patched"])
        assert {"__main__.Hidden", "__main__.SameName", "pyspark.serializers.Event"} <= set(report["made_safe"])
        assert report["lost"] == []

    def test_reimport_does_not_patch_again(self, facts: dict[str, Any]) -> None:
        assert facts["still off after re-import"]
        assert facts["status reverted"]["is_prevented"] and facts["status reverted"]["class_count"] == 0

    def test_repaired_class_pickles_as_unpatched(self, facts: dict[str, Any]) -> None:
        late = facts["late after plain"]
        assert (late["same type"], late["equal"], late["module"], late["reduce"]) == (True, True, "sched", [])
        assert late["bytes"] < facts["trip before"]["late"]["bytes"] / 2

    def test_restore_is_exact_and_idempotent(self, facts: dict[str, Any]) -> None:
        assert facts["restore is exact"] == {"code": True, "kwdefaults": True, "flag": True, "planted": True}
        assert facts["classes not restored"] == []
        assert facts["restored"]["is_patched"] and facts["restored twice"]

    def test_restore_takes_the_guard_away(self, facts: dict[str, Any]) -> None:
        assert facts["restored from guard"]["is_patched"] and facts["guard gone"]
        assert facts["point as pyspark has it"]

    def test_guard_is_invisible_to_who_makes_a_namedtuple(self, facts: dict[str, Any]) -> None:
        assert facts["status guarded"]["is_guarded"] and not facts["status guarded"]["is_patched"]
        assert facts["guard"] == {
            "signature": SIGNATURE,
            "error": "TypeError: namedtuple() missing 1 required positional argument: 'field_names'",
            "bad name": "ValueError: Encountered duplicate field name: 'x'",
        }
        assert facts["outside main"] == {"module": "somewhere", "reduce": []}

    def test_revert_is_idempotent(self, facts: dict[str, Any]) -> None:
        again = facts["driver revert again"]
        assert (again["was_patched"], again["repaired"], again["made_safe"], again["lost"]) == (False, [], [], [])
        assert again["summary"] == "namedtuple patch: not present, nothing to revert"

    def test_everything_keeps_its_type_after_the_revert(self, facts: dict[str, Any]) -> None:
        trips = facts["trip after"]
        assert [name for name, trip in trips.items() if not (trip["same type"] and trip["equal"])] == []
        assert [name for name, is_same in facts["copies"].items() if not is_same] == []
        assert facts["protocols"] == [True] * 6
        assert facts["class untouched by its return"]

    def test_class_travels_once_per_pickle(self, facts: dict[str, Any]) -> None:
        assert facts["bytes per row"] < 20
        assert facts["trip after"]["point"]["bytes"] < 20_000
        assert facts["trip after"]["late"]["bytes"] < 100

    def test_main_classes_arrive_where_this_package_is_not(
        self, facts: dict[str, Any], run: Run, pickles: Path
    ) -> None:
        assert pickles.exists() and facts
        found = run("elsewhere.py", str(pickles), with_package=False)
        assert not found["has package"]
        values = found["values"]
        assert {name: value["total"] for name, value in values.items() if value["total"] is not None} == {
            "typed": 8,
            "sub": 3,
            "typed before": 8,
            "sub before": 3,
        }
        assert values["point"]["value"] == [1, 5]
        assert values["sub"]["bases"] == ["Sub", "Point", "tuple", "object"]
        assert [name for name, value in values.items() if value["goes on"] != [True, True]] == []

    def test_prevented_before_the_import(self, run: Run) -> None:
        found = run(
            "import json, collections; from tfos_magic import namedtuple_patch as patch\n"
            "code = collections.namedtuple.__code__\n"
            "before = patch.status(); patch.prevent(); patch.prevent(); import pyspark.serializers\n"
            "status = patch.status(); is_same = collections.namedtuple.__code__ is code\n"
            "report = patch.revert(); clean = patch.ensure_clean(); last = patch.restore()\n"
            "print(json.dumps([before.to_json(), status.to_json(), is_same, report.to_json(), clean.to_json(),"
            " last.to_json()]))"
        )
        before, status, is_same, report, clean, last = found
        assert not before["is_patched"] and not before["is_prevented"] and before["cause"] == self.cause
        assert not status["is_patched"] and status["is_prevented"] and is_same and status["class_count"] == 0
        assert not report["was_patched"] and report["keeps_main"]
        assert not clean["is_guarded"]
        assert last["is_patched"]  # as it would have been

    def test_revert_while_others_make_namedtuples(self, run: Run) -> None:
        found = run(
            "import json, threading, collections; import pyspark.serializers\n"
            "from tfos_magic import namedtuple_patch as patch\n"
            "made, errors = [], []\n"
            "def work():\n"
            "    for _ in range(500):\n"
            "        try:\n"
            "            made.append(collections.namedtuple('P', 'x y'))\n"
            "        except Exception as error:\n"
            "            errors.append(repr(error))\n"
            "threads = [threading.Thread(target=work) for _ in range(4)]\n"
            "[thread.start() for thread in threads]\n"
            "for _ in range(10):\n"
            "    patch.revert(); patch.restore()\n"
            "patch.revert(); [thread.join() for thread in threads]\n"
            "patch.revert()\n"
            "print(json.dumps({'errors': errors, 'made': len(made), 'left': patch.status().class_count}))"
        )
        assert found["errors"] == [] and found["made"] > 10 and found["left"] == 0

    def test_compared_with_a_process_never_patched(self, run: Run) -> None:
        self.compare(run, STDLIB)

    @pytest.mark.slow
    def test_compared_with_a_process_never_patched_tensorflow(self, run: Run) -> None:
        report = self.compare(run, [*STDLIB, "tensorflow", "keras"])
        assert len(report["repaired"]) > 70
        assert report["cpu_seconds"] < 1  # of the CPU: how busy the machine is does not matter

    @staticmethod
    def compare(run: Run, modules: list[str]) -> dict[str, Any]:
        plain = run("corpus.py", "plain", *modules)
        reverted = run("corpus.py", "reverted", *modules)
        assert not plain["status"]["is_patched"] and reverted["status"]["is_patched"]
        ours, theirs = Counter(reverted["classes"]), Counter(plain["classes"])
        missing = [json.loads(text) for text in (theirs - ours).elements()]
        # Python names importlib._bootstrap for what compiled modules make; ours are found by their names instead.
        assert {module for module, *_ in missing} <= {"importlib._bootstrap"}
        extra = [json.loads(text) for text in (ours - theirs).elements()]
        assert sorted(rest for _, *rest in extra) == sorted(rest for _, *rest in missing)
        assert {f"{module}.{name}" for module, name, *_ in extra if module == "collections"} == set(
            reverted["report"]["lost"]
        )
        return reverted["report"]  # type: ignore[no-any-return]

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["reverted", "session"])
    def test_main_namedtuples_keep_working_on_spark(self, run: Run, mode: str) -> None:
        found = run("spark.py", mode, str(ROOT))
        for name in ("Early", "Point", "Typed", "Sub"):
            ways = {way: got for way, got in found[name].items() if name not in self.lost_in_closures}
            if name in self.lost_in_closures:  # the class itself cannot be captured, reverted or not
                ways = {way: got for way, got in found[name].items() if way not in ("closure", "data is", "made there")}
            expected = {
                "closure": [[True, 2]],
                "data": [[name, i] for i in range(4)],
                "data is": [True] * 4,
                "broadcast": [[name, 2]],
                "result": [[True, i] for i in range(4)],
                "made there": [[True, 8]],
                "shuffle": [[i, True, 3] for i in range(4)],
                "distinct": 4,
            }
            assert ways == {way: expected[way] for way in ways}, name
        assert found["methods in data"] == [3, 10]
        assert found["methods afterwards"] == 300  # no class of the driver's was overwritten by what came back
        assert found["early again"] == [True]  # an RDD of before the revert

    @pytest.mark.slow
    def test_main_namedtuples_lose_their_type_while_patched(self, run: Run) -> None:
        found = run("spark.py", "patched", str(ROOT))
        assert found["Point"]["closure"] == [[False, 2]]
        assert found["Sub"]["data"] == [["Point", i] for i in range(4)]
        assert "Error" in found["methods in data"]

    @pytest.mark.slow
    def test_feature_columns_of_2018(self, run: Run) -> None:
        broken = run("case2018.py", "patched", str(ROOT), timeout=200)
        assert broken["driver before"]["is one"] is True
        # The first class that reduces is the bare namedtuple at the end of the MRO: what it says is what arrives.
        assert broken["driver before"]["mro"][-4:] == ["_FeatureColumn", "NumericColumn", "tuple", "object"]
        assert broken["driver before"]["reduced by"] == "NumericColumn(tuple)"
        assert broken["driver before"]["reduced to"] == "_restore"
        assert broken["driver before"]["round trip"] is False
        for way in ("executor", "from the executor", "through a shuffle"):
            assert broken[way] == [False, "collections.NumericColumn"], way
        assert any(name.endswith(".NumericColumn") for name in broken["status"]["downgraded"])

    @pytest.mark.slow
    def test_feature_columns_of_2018_as_it_was_published(self, run: Run) -> None:
        half = run("case2018.py", "reverted", str(ROOT), timeout=200)
        assert half["executor"][0] is True and half["executor"][1].endswith("feature_column_v2.NumericColumn")
        assert half["after"]["downgraded"] == []
        assert half["driver after"]["reduced to"] == "__newobj__" and half["driver after"]["round trip"]
        # The sender decides: what the executors send is as broken as before.
        assert half["from the executor"] == half["through a shuffle"] == [False, "pyspark.serializers.NumericColumn"]

    @pytest.mark.slow
    def test_feature_columns_of_2018_with_both_sides_reverted(self, run: Run) -> None:
        right = run("case2018.py", "loaded", str(ROOT), timeout=200)
        for way in ("executor", "from the executor", "through a shuffle"):
            assert right[way][0] is True and right[way][1].endswith("feature_column_v2.NumericColumn"), way
        (worker,) = right["session"]["workers"]
        patch = worker["patch"]
        assert patch["mended_count"] > 300 and patch["class_count"] == 0  # it was warm, and had all of TensorFlow
        assert any(name.endswith(".NumericColumn") for name in patch["rescued"])
        assert set(patch["owners"].values()) == {"TensorFlow", "other"}
        # Everything goes back as it was, in the same process.
        (restored,) = right["restored"]["workers"]
        assert restored["pid"] == worker["pid"] and restored["patch"]["is_patched"]
        assert restored["patch"]["class_count"] == patch["mended_count"]
        assert right["from the executor, restored"] == [False, "collections.NumericColumn"]


class TestVariable(PatchedEnd):
    """The PySpark of this environment, with the variable set."""

    cause = f"{ENABLING_VARIABLE}=1"

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls) -> Run:
        return make_run(sys.executable, {ENABLING_VARIABLE: "1"})


class TestPySpark32(PatchedEnd):
    """PySpark 3.2, which patches always."""

    cause = "PySpark 3.2.4 applies it always"
    # Its cloudpickle cannot send a typing.NamedTuple class of __main__ on Python ≥ 3.9, patched or not.
    lost_in_closures = ("Typed",)

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, pyspark32_python: Path) -> Run:
        return run_with_pyspark32(pyspark32_python)


def test_unpatched_pyspark_is_left_alone() -> None:
    found = make_run(sys.executable, {ENABLING_VARIABLE: ""})(
        "import json, collections, pyspark.serializers; from tfos_magic import namedtuple_patch as patch\n"
        "code = collections.namedtuple.__code__\n"
        "report = patch.revert(); status = patch.status(); last = patch.restore()\n"
        "is_same = collections.namedtuple.__code__ is code and not hasattr(collections.namedtuple, '__hijack')\n"
        "print(json.dumps([report.to_json(), status.to_json(), last.to_json(), is_same]))"
    )
    report, status, last, is_same = found
    assert not report["was_patched"] and not report["keeps_main"]
    assert status["is_prevented"] and not status["is_guarded"] and status["cause"] == ""
    assert not last["is_prevented"] and is_same


def test_revert_imports_nothing_and_costs_milliseconds() -> None:
    found = make_run(sys.executable, {})(
        "import json, sys; from tfos_magic import namedtuple_patch as patch\n"
        "first = patch.revert().seconds; best = min(patch.revert().seconds for _ in range(5))\n"
        "heavy = [name for name in ('pyspark', 'tensorflow', 'IPython', 'numpy') if name in sys.modules]\n"
        "print(json.dumps({'first': first, 'best': best, 'heavy': heavy}))"
    )
    assert found["heavy"] == []
    assert found["best"] < 0.005


def test_status_of_this_process_is_plain_json() -> None:
    status = namedtuple_patch.status()
    assert json.loads(json.dumps(status.to_json())) == status.to_json()
    assert not status.is_patched
