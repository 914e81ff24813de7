from __future__ import annotations

import json

import pytest

from tfos_magic import roles
from tfos_magic.errors import UsageError


def names(*args: int, **options: bool | int) -> list[str]:
    return [role.name for role in roles.assign(*args, **options)]


def test_roles_come_in_a_fixed_order() -> None:
    assert names(1) == ["chief:0"]
    assert names(4) == ["chief:0", "worker:0", "worker:1", "worker:2"]
    assert names(3, chief=None) == ["worker:0", "worker:1", "worker:2"]
    assert names(5, num_ps=2, has_evaluator=True) == ["chief:0", "worker:0", "ps:0", "ps:1", "evaluator:0"]


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        (0, {}),
        (2, {"num_ps": 2}),
        (4, {"num_ps": 4}),
        (1, {"has_evaluator": True}),
        (1, {"num_ps": 1, "chief": None}),
        (2, {"num_ps": -1}),
    ],
)
def test_a_cluster_in_which_nobody_trains_is_refused(nodes: int, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="too few"):
        roles.assign(nodes, **options)


def test_tf_config_is_what_tensorflow_documents() -> None:
    assigned = roles.assign(4, num_ps=1, has_evaluator=True)
    spec = roles.cluster_spec(assigned, ["a:1", "b:2", "c:3", "d:4"])
    assert spec == {"chief": ["a:1"], "worker": ["b:2"], "ps": ["c:3"]}
    config = json.loads(roles.tf_config(assigned[1], spec))
    assert config == {"cluster": spec, "task": {"type": "worker", "index": 0}}
