"""How gradients travel: several batches per update, fewer bits on the way, many tensors in one message."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_training_ring import on_ring
from training_harness import NodeOutcome, one_of_runs, run_nodes, side_by_side

from tfos_magic.training import packing
from tfos_magic.training.ring import Ring

TOLERANCE = 1e-5
ROUNDING = 1e-2
"""Of the way that the weights have moved, with gradients as bfloat16."""

FOLLOWING = ("accumulate", "accumulate_clipped", "accumulate_embedding", "accumulate_several_steps")
MORE_FOLLOWING = ("accumulate_eager", "accumulate_custom_step")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> dict[str, list[NodeOutcome]]:
    each: dict[str, Callable[[], list[NodeOutcome]]] = {
        "two_nodes": lambda: run_nodes([*FOLLOWING, "wire"], 2),
        "other_steps": lambda: run_nodes([*MORE_FOLLOWING, "accumulate_mixed_precision", "accumulate_twice"], 2),
        "one_node": lambda: run_nodes([*FOLLOWING, *MORE_FOLLOWING], 1),
        "four_nodes": lambda: run_nodes(["wire"], 4),
    }
    return side_by_side(request, each)


two_nodes = one_of_runs("two_nodes")
other_steps = one_of_runs("other_steps")
one_node = one_of_runs("one_node")
four_nodes = one_of_runs("four_nodes")


def succeeded(nodes: Sequence[NodeOutcome], case: str) -> list[dict[str, Any]]:
    found = [node.results.get(case, {"error": "no result"}) for node in nodes]
    for node, result in zip(nodes, found, strict=True):
        assert "error" not in result, f"{result}\n{node.output[-5000:]}"
    assert len({result["digest"] for result in found}) == 1, "weights are not the same bits on all nodes"
    return found


def assert_follows(nodes: Sequence[NodeOutcome], case: str) -> None:
    """K batches of B rows have done what one batch of K·B rows does, and what an epoch leaves over was applied."""
    found = succeeded(nodes, case)
    first = found[0]
    assert first["moved"] > 100 * TOLERANCE
    assert max(first["weights_off"]) < TOLERANCE, first
    if case != "accumulate_custom_step":  # its loss counts batches, not rows
        assert max(first["history_off"].values()) < TOLERANCE, first
        assert first["evaluated_off"] < TOLERANCE, first
    assert {(node["updates"], node["expected_updates"]) for node in found} == {(first["expected_updates"],) * 2}
    if len(nodes) > 1:
        assert found[-1]["empty_batches"] > 0


# --- several batches per update ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FOLLOWING)
def test_accumulated_batches_are_one_large_batch(two_nodes: list[NodeOutcome], case: str) -> None:
    assert_follows(two_nodes, case)


@pytest.mark.slow
def test_accumulation_with_other_kinds_of_steps(other_steps: list[NodeOutcome]) -> None:
    for case in MORE_FOLLOWING:
        assert_follows(other_steps, case)
    mixed = succeeded(other_steps, "accumulate_mixed_precision")[0]
    assert mixed["updates"] == 6
    assert mixed["loss"][1] < mixed["loss"][0]
    assert {node["off"] for node in succeeded(other_steps, "accumulate_twice")} == {0}


@pytest.mark.slow
def test_accumulation_on_one_node(one_node: list[NodeOutcome]) -> None:
    for case in (*FOLLOWING, *MORE_FOLLOWING):
        assert_follows(one_node, case)


@pytest.mark.slow
@pytest.mark.oldest
def test_accumulation_with_the_oldest_versions(oldest_python: Path) -> None:
    nodes = run_nodes([*FOLLOWING, *MORE_FOLLOWING, "wire"], 2, python=str(oldest_python))
    for case in (*FOLLOWING, *MORE_FOLLOWING):
        assert_follows(nodes, case)
    assert_rounded(nodes)


# --- fewer bits on the way ----------------------------------------------------------------------------------------


def assert_rounded(nodes: Sequence[NodeOutcome]) -> None:
    """Gradients are rounded, and nothing else is."""
    found = succeeded(nodes, "wire")
    assert 0 < found[0]["off"] < ROUNDING
    assert found[0]["changed_without_rate"] == 0
    assert {node["losses_off"] for node in found} == {0}


def test_only_gradients_are_rounded(two_nodes: list[NodeOutcome]) -> None:
    assert_rounded(two_nodes)


@pytest.mark.slow
def test_rounded_gradients_on_four_nodes(four_nodes: list[NodeOutcome]) -> None:
    assert_rounded(four_nodes)


# --- many tensors in one message ----------------------------------------------------------------------------------


def test_one_message_per_type_averages_and_sums() -> None:
    gradients = [np.full((3, 5), 2, "float32"), np.full(5000, 4, "float32"), np.ones(2, "float64")]
    plain = [np.array([10, 20], "int64"), np.array(3, "float32")]

    def action(ring: Ring) -> Any:
        rank = ring.plan.rank
        given = [gradient + rank for gradient in gradients]
        before = ring._sequence
        results, total = packing.average(ring, given[:2], given[2:], plain, 1 + 2 * rank, "step")
        assert [result.dtype for result in results] == [each.dtype for each in (*gradients, *plain)]
        assert [result.shape for result in results] == [each.shape for each in (*gradients, *plain)]
        assert (given[0] == gradients[0] + rank).all()
        return [float(result.flat[0]) for result in results], total, ring._sequence - before

    assert on_ring(2, action) == [([2.75, 4.75, 1.75, 20.0, 6.0], 4.0, 3)] * 2


def test_large_tensors_begin_where_tensorflow_takes_them_without_a_copy() -> None:
    shapes = [(3,), (100, 100), (7,), (64, 64)]

    def action(ring: Ring) -> Any:
        results, _ = packing.average(ring, [np.ones(shape, "float32") for shape in shapes], [], [], 1, "step")
        return [result.ctypes.data % 64 == 0 for result in results if result.size > 1024]

    assert on_ring(2, action) == [[True, True]] * 2


def test_node_without_rows_adds_nothing_be_it_no_number() -> None:
    def action(ring: Ring) -> Any:
        rank = ring.plan.rank
        numbers = np.array([np.nan if rank else 6.0], "float32")
        results, total = packing.average(ring, [numbers], [], [numbers], 2 * (1 - rank), "step")
        return [float(result[0]) for result in results], total

    assert on_ring(2, action) == [([6.0, 6.0], 2.0)] * 2


def test_sums_that_were_weighted_before_are_only_divided() -> None:
    def action(ring: Ring) -> Any:
        results, _ = packing.average(ring, [np.array([8.0], "float32")], [], [], 4, "step", is_sum=True)
        return float(results[0][0])

    assert on_ring(2, action) == [2.0, 2.0]


NOT_WRITTEN_TO = """
import numpy as np, tensorflow as tf
shape = (300, 320)
kept = []
def show(_):
    raw = np.full(300 * 320 + 16, 3, "float32")
    first = -raw.ctypes.data % 64 // 4
    kept.append(raw[first : first + 300 * 320].reshape(shape))
    return kept[-1]
variable, other = tf.Variable(tf.zeros(shape)), tf.random.normal(shape)
operations = [tf.square, tf.nn.relu, lambda x: x * other, lambda x: other - x, lambda x: tf.reshape(x, [-1]) * 2.0]
operations += [lambda x: (variable.assign(x), variable.assign_add(other))[1], lambda x: tf.cast(x, tf.float16)]
for operation in operations:
    def step(n, operation=operation):
        return operation(tf.ensure_shape(tf.numpy_function(show, [n], tf.float32), shape))
    for call in (step, tf.function(step, autograph=False)):
        call(tf.constant(1.0))
        call(tf.constant(1.0))
places = []
def look(values):
    places.append(values.ctypes.data)
    return np.float32(0)
tf.function(lambda n: tf.numpy_function(look, [tf.numpy_function(show, [n], tf.float32)], tf.float32))(tf.constant(1.0))
print("as it is:", places == [kept[-1].ctypes.data])
print(len(kept), "arrays, changed", sum(not (k == 3).all() for k in kept))
"""


def not_written_to(python: str) -> str:
    return subprocess.run([python, "-c", NOT_WRITTEN_TO], check=True, capture_output=True, text=True).stdout


def test_tensorflow_does_not_compute_where_averages_lie_which_a_neighbour_may_still_be_reading() -> None:
    assert not_written_to(sys.executable) == "as it is: True\n29 arrays, changed 0\n"


@pytest.mark.slow
@pytest.mark.oldest
def test_the_oldest_tensorflow_does_not_either(oldest_python: Path) -> None:
    assert not_written_to(str(oldest_python)) == "as it is: True\n29 arrays, changed 0\n"
