"""Every trap that the doctor knows: shown on a real Spark first, then the diagnosis; and healthy objects raise none."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import _script_environ, run_with_stacks
from doctor_corpus import BROKEN, COSTLY, FINE, HEALTHY, Entry

TESTS = Path(__file__).resolve().parent
SECONDS = 2.0  # what an answer may take; the first one that needs a large library also imports it
pytestmark = pytest.mark.slow


def look_at_corpus(place: Path, python: str) -> dict[str, Any]:
    """Run the script with `python`; return what it says of each entry."""
    shared = place / "shared"
    shared.mkdir()
    path = os.pathsep.join(map(str, [shared, TESTS, TESTS.parent]))
    environ = _script_environ(python, "local[3]", {}, {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"})
    command = [python, "-X", "faulthandler", str(TESTS / "doctor_scripts" / "corpus.py"), "tensorflow", str(shared)]
    done = run_with_stacks(command, environ=environ, directory=place, timeout_s=280, check=True)
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("CASE ")]
    return {said["name"]: said for said in lines}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return look_at_corpus(tmp_path_factory.mktemp("corpus"), sys.executable)


def of(entry: Entry) -> str:
    return entry.name


def test_the_corpus_is_large_enough_and_has_each_name_once() -> None:
    assert len(BROKEN) >= 40
    assert len(HEALTHY) >= 20
    assert not [name for name, count in Counter(map(of, (*BROKEN, *HEALTHY))).items() if count > 1]
    assert all(entry.trap and entry.path and entry.shown for entry in BROKEN)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("entry", BROKEN, ids=of)
def test_the_trap_is_real_and_named_with_its_path(seen: dict[str, Any], entry: Entry) -> None:
    said = seen[entry.name]
    assert "error" not in said
    assert said["shown"] is True
    assert said["verdict"] == entry.verdict
    bad = [finding for finding in said["findings"] if finding[0] != FINE]
    assert [(verdict, trap, path) for verdict, trap, path, _, _ in bad] == [(entry.verdict, entry.trap, entry.path)]
    assert all(why.endswith(".") and fix for *_, why, fix in said["findings"])


@pytest.mark.parametrize("entry", HEALTHY, ids=of)
def test_what_is_healthy_is_fine(seen: dict[str, Any], entry: Entry) -> None:
    said = seen[entry.name]
    assert "error" not in said
    assert [finding for finding in said["findings"] if finding[0] != FINE] == []
    assert [finding for finding in said["fast"] if finding[0] != FINE] == []
    assert said["verdict"] == FINE
    assert said["pickles"] is True
    assert said["trip"]["outcome"] == "arrived", said["trip"]
    assert said["trip"]["type_before"] == said["trip"]["type_after"]
    assert said["trip"]["is_instance"] is True
    assert said["trip"]["is_equal"] is not False
    assert said["trip"]["lost_methods"] == []


def test_what_can_be_said_at_once_is_nearly_everything(seen: dict[str, Any]) -> None:
    missed = {
        entry.name
        for entry in BROKEN
        if entry.verdict != COSTLY and [entry.verdict, entry.trap, entry.path] not in seen[entry.name]["fast"]
    }
    # These are seen only by sending them.
    assert missed == {
        "an object that needs the driver when it arrives",
        "a module edited and not reloaded",
        "exception that words its message",
    }


def test_answers_are_quick(seen: dict[str, Any]) -> None:
    seconds = sorted(said["seconds"] for said in seen.values())
    assert seconds[len(seconds) // 2] < 0.2
    slow = {name: said["seconds"] for name, said in seen.items() if said["seconds"] > SECONDS}
    # The first one of TensorFlow imports it in the second interpreter.
    assert len(slow) <= 1, slow


@pytest.mark.oldest
@pytest.mark.timeout(300)
def test_the_oldest_supported_versions_have_the_same_traps(oldest_python: Path, tmp_path: Path) -> None:
    seen = look_at_corpus(tmp_path, str(oldest_python))
    wrong = []
    for entry in (*BROKEN, *HEALTHY):
        said = seen[entry.name]
        bad = [tuple(finding[:3]) for finding in said.get("findings", [["error", said.get("error"), ""]])]
        bad = [finding for finding in bad if finding[0] != FINE]
        expected = [(entry.verdict, entry.trap, entry.path)] if entry.trap else []
        if bad != expected or said["shown"] is False:
            wrong.append((entry.name, bad, said.get("shown")))
    assert wrong == []
