"""Which node plays which role, and the ``TF_CONFIG`` that tells TensorFlow.

Runs on: driver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tfos_magic.errors import UsageError


@dataclass(frozen=True)
class Role:
    """A TensorFlow task: ``chief``, ``worker``, ``ps`` or ``evaluator``, and its index among its like."""

    job_name: str
    task_index: int

    @property
    def name(self) -> str:
        """``worker:2``."""
        return f"{self.job_name}:{self.task_index}"

    @property
    def is_training(self) -> bool:
        """True for the nodes among which data is dealt and gradients are averaged."""
        return self.job_name not in ("ps", "evaluator")


def assign(
    num_nodes: int, *, num_ps: int = 0, chief: str | None = "chief", has_evaluator: bool = False
) -> tuple[Role, ...]:
    """Return one role per node: the chief, the workers, the parameter servers, the evaluator.

    Parameters
    ----------
    num_nodes : int
        All of them, parameter servers and evaluator included, as in TensorFlowOnSpark.
    num_ps : int
    chief : str, optional
        Its job's name; None for none, and ``worker:0`` leads.
    has_evaluator : bool

    Raises
    ------
    UsageError
        No node is left to train.
    """
    num_workers = num_nodes - num_ps - bool(chief) - has_evaluator
    if num_nodes < 1 or num_ps < 0 or num_workers < 0 or num_workers + bool(chief) < 1:
        wanted = f"{num_ps} parameter server(s)" + " and an evaluator" * has_evaluator
        raise UsageError(
            f"{num_nodes} node(s) are too few for {wanted} and at least one node that trains.",
            hint=f"--executors {num_ps + has_evaluator + 1} or more.",
        )
    counts = (
        (chief or "chief", int(bool(chief))),
        ("worker", num_workers),
        ("ps", num_ps),
        ("evaluator", int(has_evaluator)),
    )
    return tuple(Role(job, index) for job, count in counts for index in range(count))


def cluster_spec(roles: Sequence[Role], addresses: Sequence[str]) -> dict[str, list[str]]:
    """Return job name → ``host:port`` of each task, for all nodes but the evaluator, which TensorFlow leaves out."""
    spec: dict[str, list[str]] = {}
    for role, address in zip(roles, addresses, strict=True):
        if role.job_name != "evaluator":
            spec.setdefault(role.job_name, []).append(address)
    return spec


def tf_config(role: Role, spec: Mapping[str, Sequence[str]]) -> str:
    """Return the JSON text that TensorFlow reads from the environment variable ``TF_CONFIG``."""
    return json.dumps({"cluster": spec, "task": {"type": role.job_name, "index": role.task_index}})
