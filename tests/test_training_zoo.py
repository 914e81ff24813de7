"""Every row of the model zoo trains over nodes as in one process: real processes, real TensorFlow, no Spark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import training_zoo
from training_harness import NodeOutcome, merged, one_of_runs, run_nodes, side_by_side
from training_zoo import CALLBACKS, FAST, OLDEST, TABLE

Nodes = Sequence[NodeOutcome]
SLOW = tuple(name for name in TABLE if name not in FAST)
EVERY = tuple(name for name in TABLE if not TABLE[name].differs)
DECISIONS = ("resume", "nan", "writers", "different_first_epochs", "different_schedules")


def train(rows: Iterable[str], count: int, cases: Iterable[str] = (), **options: Any) -> list[NodeOutcome]:
    return run_nodes([*(f"zoo:{row}" for row in rows), *cases], count, timeout_s=600, **options)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> dict[str, Nodes]:
    each: dict[str, Callable[[], Nodes]] = {
        "two_nodes": lambda: train(SLOW, 2, DECISIONS),
        "four_nodes": lambda: train(EVERY, 4, ["stop"]),
        "fast": lambda: train(FAST, 2, ["stops_alone"]),
        "one_node": lambda: train(EVERY, 1),
    }
    return side_by_side(request, each)


fast = one_of_runs("fast")
one_node = one_of_runs("one_node")
two_nodes = one_of_runs("two_nodes")
four_nodes = one_of_runs("four_nodes")


@pytest.fixture(scope="module")
def oldest(oldest_python: Path) -> Nodes:
    return train(OLDEST, 2, ["resume", "nan", "writers"], python=str(oldest_python))


def rows_of(*names: str) -> list[Any]:
    """Return the names as parameters, each marked where it is known to differ."""
    why = {name: TABLE[name].differs for name in names}
    return [pytest.param(n, marks=[pytest.mark.xfail(reason=why[n], strict=True)] if why[n] else []) for n in names]


def results(nodes: Nodes, case: str) -> list[dict[str, Any]]:
    """Return what each node found, its output shown if there is nothing or an error."""
    for node in nodes:
        assert case in node.results, node.output[-5000:]
        assert "error" not in node.results[case], f"{node.results[case]}\n{node.output[-5000:]}"
    return [node.results[case] for node in nodes]


def assert_follows(nodes: Nodes, name: str) -> None:
    """The nodes have the same bits after each epoch, and are where one process with all rows is."""
    row = TABLE[name]
    found = results(nodes, f"zoo:{name}")
    assert len({str(node["digests"]) for node in found}) == 1, "weights are not the same bits on all nodes"
    histories = [{k: v for k, v in node["history"].items() if k != "learning_rate"} for node in found]
    assert all(history == histories[0] for history in histories), "metrics differ between nodes"
    assert len(nodes) == 1 or found[-1]["empty_batches"] > 0
    measured = merged(nodes)[name]
    assert measured["moved"] > 100 * training_zoo.TABLE["dense"].tolerance, "nothing was learned"
    for what in ("weights_off", "history_off", "evaluated_off"):
        assert largest(measured[what]) < row.tolerance, (what, measured[what])
    assert measured["rates_off"] < 1e-9
    expected = measured["expected"]
    assert all(node["batches"] == expected["batches"] for node in found)
    assert_files(found, expected["files"], row.tolerance)


def largest(gaps: Any) -> float:
    values = gaps.values() if isinstance(gaps, dict) else gaps if isinstance(gaps, list) else [gaps]
    return max(values)


def assert_files(found: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    """The chief has written what one process writes, the others nothing."""
    files = found[0]["files"]
    assert set(files) == set(expected)
    for name, numbers in expected.items():
        assert len(files[name]) == len(numbers)
        for mine, theirs in zip(files[name], numbers, strict=True):
            assert mine == pytest.approx(theirs, rel=0, abs=10 * tolerance), name
    assert all(node["files"] == {} for node in found[1:])


@pytest.mark.parametrize("name", rows_of(*FAST))
def test_two_nodes_follow_one_process(fast: Nodes, name: str) -> None:
    assert_follows(fast, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", rows_of(*SLOW))
def test_two_nodes_follow_one_process_in_all_rows(two_nodes: Nodes, name: str) -> None:
    assert_follows(two_nodes, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", rows_of(*EVERY))
def test_one_node_is_one_process(one_node: Nodes, name: str) -> None:
    assert_follows(one_node, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", rows_of(*EVERY))
def test_four_nodes_follow_one_process(four_nodes: Nodes, name: str) -> None:
    assert_follows(four_nodes, name)


@pytest.mark.slow
def test_last_of_four_nodes_stops_all_after_the_same_epoch(four_nodes: Nodes) -> None:
    for node in results(four_nodes, "stop"):
        assert (node["epochs"], node["rate"]) == (2, pytest.approx(0.05))
        assert node["digest"] == results(four_nodes, "stop")[0]["digest"]


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("name", rows_of(*OLDEST))
def test_oldest_versions_follow_one_process(oldest: Nodes, name: str) -> None:
    assert_follows(oldest, name)


# --- callbacks: decided once, obeyed by all -------------------------------------------------------------------


@pytest.mark.slow
def test_callbacks_of_the_table_do_something(two_nodes: Nodes) -> None:
    """A row whose callback had no effect would follow one process, too."""
    found = {row.name: results(two_nodes, f"zoo:{row.name}")[0] for row in CALLBACKS}
    for name in ("early_stopping", "chief_decides"):
        assert len(found[name]["rates"]) == 3, "stops before the last epoch"
        first = found[name]["history"]["val_loss"][0]
        assert found[name]["evaluated"]["loss"] == pytest.approx(first), "the first epoch's weights are back"
    for name in ("plateau", "scheduler", "chief_decides"):
        assert found[name]["rates"][-1] < found[name]["rates"][0]
    assert set(found["checkpoint"]["files"]) == {"every-1.keras", "every-2.keras", "best.weights.h5"}
    assert len(found["csv_logger"]["files"]["log.csv"]) == 2


def assert_resumes(nodes: Nodes) -> None:
    chief, *others = results(nodes, "resume")
    for node in (chief, *others):
        assert node["epochs"] == [[0, 1], [2, 3]]
        assert node["off"] < 1e-5
        assert node["digest"] == chief["digest"]
        assert node["files"] == (["backup"] if node is chief else [])


def assert_stops_at_nan(nodes: Nodes) -> None:
    for node in results(nodes, "nan"):
        distributed, alone = node["batches"]
        assert distributed == alone < 8, "of 12 in an epoch"
        assert node["digest"] == results(nodes, "nan")[0]["digest"]


def assert_chief_writes(nodes: Nodes) -> None:
    chief, other = results(nodes, "writers")
    assert chief["files"] == ["board", "evaluated", "log.csv", "own", "own.keras"]
    assert chief["said"] == []
    assert other["files"] == ["own"]
    assert [text.partition(": ")[2] for text in other["said"]] == [
        "OwnCheckpoint, TensorBoard",
        "CSVLogger",
        "TensorBoard",
    ]


@pytest.mark.slow
def test_backup_of_the_chief_is_where_all_go_on(two_nodes: Nodes) -> None:
    assert_resumes(two_nodes)


@pytest.mark.slow
def test_loss_that_is_no_number_ends_training_at_once_on_all_nodes(two_nodes: Nodes) -> None:
    assert_stops_at_nan(two_nodes)


@pytest.mark.slow
def test_only_the_chief_writes_and_callbacks_of_ones_own_run_everywhere(two_nodes: Nodes) -> None:
    assert_chief_writes(two_nodes)


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("check", [assert_resumes, assert_stops_at_nan, assert_chief_writes])
def test_callbacks_under_oldest_versions(oldest: Nodes, check: Any) -> None:
    check(oldest)


def test_node_that_stops_alone_within_an_epoch_is_an_error_and_no_hang(fast: Nodes) -> None:
    for node in fast:
        found = node.results["stops_alone"]
        assert found["error"] == "tfos_magic.errors.StalledError"
        assert "'end of epoch'" in found["message"]


@pytest.mark.slow
def test_first_epochs_must_be_the_same(two_nodes: Nodes) -> None:
    for node in two_nodes:
        found = node.results["different_first_epochs"]
        assert found["error"] == "tfos_magic.errors.UsageError"
        assert "initial_epoch: worker:0: 0, worker:1: 1" in found["message"]


@pytest.mark.slow
def test_schedules_must_be_the_same(two_nodes: Nodes) -> None:
    found = two_nodes[1].results["different_schedules"]
    assert found["error"] == "tfos_magic.errors.UsageError"
    assert "learning rate of worker:1 is 0.2, the chief's is 0.1" in found["message"]
