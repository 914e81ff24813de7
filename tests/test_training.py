"""Keras over several nodes: real processes, real TensorFlow, no Spark."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_harness import ROOT, NodeOutcome, one_of_runs, run_nodes, side_by_side

from tfos_magic.training import is_consequence

TOLERANCE = 1e-5

CORE = ("sgd", "unbuilt", "custom_step")
BEHAVIOUR = ("stop", "arrays", "lifecycle")
MORE_BEHAVIOUR = ("batch_norm", "no_rows_anywhere", "jit", "second_model")
MISTAKES = ("different_steps", "different_models", "different_unbuilt_models", "not_a_model", "late_strategy")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> dict[str, list[NodeOutcome]]:
    each: dict[str, Callable[[], list[NodeOutcome]]] = {
        "core": lambda: run_nodes([*CORE, *BEHAVIOUR, *MISTAKES, "peer_raises"], 2),
        "with_chief": lambda: run_nodes(["sgd", *MORE_BEHAVIOUR, "uneven_loop"], 2, has_chief=True),
        "one_node": lambda: run_nodes(["sgd", "batch_norm", "custom_step", "lifecycle", "jit"], 1),
        "strategy": lambda: run_nodes(["strategy"], 2),
        "chief_alone": lambda: run_nodes(["chief_evaluates_alone"], 2),
    }
    return side_by_side(request, each)


core = one_of_runs("core")
with_chief = one_of_runs("with_chief")
one_node = one_of_runs("one_node")
strategy = one_of_runs("strategy")
chief_alone = one_of_runs("chief_alone")


def results(nodes: Sequence[NodeOutcome], case: str) -> list[dict[str, Any]]:
    """Return what each node found, the output shown if one has none."""
    for node in nodes:
        assert case in node.results, node.output[-5000:]
    return [node.results[case] for node in nodes]


def succeeded(nodes: Sequence[NodeOutcome], case: str) -> list[dict[str, Any]]:
    found = results(nodes, case)
    for node, result in zip(nodes, found, strict=True):
        assert "error" not in result, f"{result}\n{node.output[-5000:]}"
    assert len({result.get("digest") for result in found}) == 1, "weights are not the same bits on all nodes"
    assert len({str(result.get("history")) for result in found}) == 1, "metrics differ between nodes"
    return found


def assert_follows(nodes: Sequence[NodeOutcome], case: str) -> None:
    """N nodes with batch B have done what one process does with all rows."""
    found = succeeded(nodes, case)
    first = found[0]
    assert first["moved"] > 100 * TOLERANCE or len(first["weights_off"]) == 1
    assert max(first["weights_off"]) < TOLERANCE, first
    assert max(first["history_off"].values()) < TOLERANCE, first
    assert first["evaluated_off"] < TOLERANCE, first
    if len(nodes) > 1:
        assert found[-1]["empty_batches"] > 0


@pytest.mark.parametrize("case", CORE)
def test_two_nodes_follow_one_process(core: list[NodeOutcome], case: str) -> None:
    assert_follows(core, case)


def test_epochs_are_reported_with_the_whole_batch_metrics(core: list[NodeOutcome]) -> None:
    for node in succeeded(core, "sgd"):
        assert [epoch for epoch, _ in node["reported"]] == [1, 2]
        last = node["reported"][-1][1]
        assert last == {name: values[-1] for name, values in node["history"].items()}
        assert set(node["steps"][0]) == {"step", "loss"}


def test_only_the_chief_prints(core: list[NodeOutcome]) -> None:
    assert "Epoch 1/" in core[0].output
    assert "Epoch 1/" not in core[1].output


def test_one_node_stops_all_after_the_same_epoch(core: list[NodeOutcome]) -> None:
    for node in succeeded(core, "stop"):
        assert (node["epochs"], node["rate"]) == (2, pytest.approx(0.05))


def test_arrays_with_validation_split(core: list[NodeOutcome]) -> None:
    assert "val_loss" in succeeded(core, "arrays")[0]["history"]


def test_copies_are_plain_and_compile_again_works(core: list[NodeOutcome]) -> None:
    for node in succeeded(core, "lifecycle"):
        assert node["copies_are_plain"] == [True, True]
        assert node["predicts_own_rows"]
        assert node["copy_predicts_alike"] == 0
        assert node["leftovers"] == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("different_steps", "numbers of batches in fit: worker:0: 4, worker:1: 6"),
        ("different_models", "worker:0: 2 variables with 21 numbers"),
        ("different_unbuilt_models", "different models"),
        ("not_a_model", "not builtins.list"),
        ("late_strategy", "first line"),
    ],
)
def test_mistakes_are_usage_errors_on_all_nodes(core: list[NodeOutcome], case: str, words: str) -> None:
    for node in results(core, case):
        assert node["error"] == "tfos_magic.errors.UsageError"
        assert words in node["message"]


def test_bug_on_one_node_is_told_from_its_consequence(core: list[NodeOutcome]) -> None:
    victim, culprit = results(core, "peer_raises")
    assert is_consequence(victim["error"], victim["message"])
    assert "worker:1 went away" in victim["message"]
    assert culprit["error"] == "builtins.KeyError"
    assert not is_consequence(culprit["error"], culprit["message"])


def test_custom_loop_under_the_strategy(strategy: list[NodeOutcome]) -> None:
    found = succeeded(strategy, "strategy")
    assert found[0]["weights_off"] < TOLERANCE
    assert found[0]["losses"] == found[1]["losses"]


def test_importing_loads_nothing_heavy() -> None:
    heavy = "{'tensorflow', 'keras', 'numpy', 'pyspark', 'IPython'}"
    code = f"import sys, tfos_magic.training; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


@pytest.mark.parametrize(
    ("type_name", "message", "expected"),
    [
        ("tfos_magic.training.ring.PeerLostError", "worker:1 went away", True),
        ("tensorflow.python.framework.errors_impl.UnknownError", "PeerLostError: worker:1 went away", True),
        (
            "tensorflow.python.framework.errors_impl.UnavailableError",
            "Collective ops is aborted by: Error reported from /job:worker/task:1: The following tasks are unhealthy",
            True,
        ),
        ("tensorflow.python.framework.errors_impl.InternalError", "an op of the user's failed", False),
        ("ValueError", "Connection reset by peer", False),
        ("tfos_magic.errors.UsageError", "The nodes have different models", False),
        ("tfos_magic.errors.StalledError", "The nodes are not at the same place", False),
    ],
)
def test_consequences_are_told_from_causes(type_name: str, message: str, expected: bool) -> None:
    assert is_consequence(type_name, message) is expected


# --- on other nodes -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_chief_and_a_worker(with_chief: list[NodeOutcome]) -> None:
    assert_follows(with_chief, "sgd")
    assert succeeded(with_chief, "batch_norm")
    assert all(node["unchanged"] for node in succeeded(with_chief, "no_rows_anywhere"))
    assert all(node["warned"] for node in succeeded(with_chief, "jit"))
    assert succeeded(with_chief, "second_model")
    for node in results(with_chief, "uneven_loop"):
        assert node["error"] == "tfos_magic.errors.StalledError"
        assert "'end of epoch'" in node["message"]


@pytest.mark.slow
def test_chief_that_evaluates_alone_is_told_why_it_cannot(chief_alone: list[NodeOutcome]) -> None:
    chief, _ = results(chief_alone, "chief_evaluates_alone")
    assert is_consequence(chief["error"], chief["message"])
    assert "not only the chief" in chief["message"]


@pytest.mark.slow
@pytest.mark.oldest
def test_oldest_versions_follow_one_process(oldest_python: Path) -> None:
    nodes = run_nodes(["unbuilt", "custom_step", "stop", "lifecycle", "peer_raises"], 2, python=str(oldest_python))
    for case in ("unbuilt", "custom_step"):
        assert_follows(nodes, case)
    assert succeeded(nodes, "stop")
    assert succeeded(nodes, "lifecycle")
    assert is_consequence(*results(nodes, "peer_raises")[0].values())


@pytest.mark.slow
def test_one_node_is_plain_keras(one_node: list[NodeOutcome]) -> None:
    for case in ("sgd", "custom_step"):
        assert_follows(one_node, case)
    for case in ("batch_norm", "lifecycle"):
        assert succeeded(one_node, case)
    assert not results(one_node, "jit")[0]["warned"]
