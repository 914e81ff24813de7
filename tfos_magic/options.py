"""How a run is to be: what the magic's line says, checked.

Runs on: driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tfos_magic import roles
from tfos_magic.errors import UsageError
from tfos_magic.feed.staging import QUEUE_LIMIT_BYTES
from tfos_magic.training.options import TrainingOptions

if TYPE_CHECKING:
    from tfos_magic.shipping import Payload

_USES_TENSORFLOW = ("tensorflow", "keras", ".dataset(", ".distribute(", ".strategy(")


def modules_to_preload(payload: Payload) -> tuple[str, ...]:
    """Return what the nodes import while they meet: TensorFlow, unless nothing says that the function uses it."""
    modules = {module.name.partition(".")[0] for module in payload.modules}
    text = "\n".join(payload.sources.values())
    hides_it = any(module.is_local for module in payload.modules)  # the user's own module: who knows what it imports
    wants = modules & {"tensorflow", "keras", "tf_keras"} or any(word in text for word in _USES_TENSORFLOW)
    return ("tensorflow",) if wants or hides_it else ()


@dataclass(frozen=True)
class RunOptions:
    """How to run; checked when made.

    Attributes
    ----------
    num_nodes : int
        All nodes, parameter servers and evaluator included.
    epochs, batch_size : int
        `batch_size` is per node: a step of N nodes takes N times as many rows.
    label, weight : str, optional
    features : tuple of str, optional
        Columns; see ``ctx.dataset``.
    timeout_s : float, optional
        The whole run's limit; None for none.
    chief_name : str
        What the chief's job is called: ``chief``, or ``master`` as old Estimators have it.
    queue_limit_bytes : int
        How much may wait on a node for a function that takes rows more slowly than Spark delivers them.
    predicts : bool
        What the function returns then predicts, batch by batch, for as long as Spark asks.
    is_independent : bool
        Each node is a cluster of its own, and ends when its function has returned.
    grid : tuple of mapping, optional
        What is different on each of the independent nodes, in node order: see :mod:`tfos_magic.grid`.
    waits_for_all : bool
        False, for independent nodes: they start as slots come, so there may be more of them than slots.
    ps_on_driver : bool
        Parameter servers run as processes of the driver's machine and take no slot.
    gpus_per_node : int, optional
        Of each node but parameter servers. None: those that Spark assigned to its task, else one where one is free.
    tensorboard : str, optional
        Run TensorBoard beside the chief, for this directory there; empty for its working directory.
    release_port : bool
        False: the node's port is bound in the function's own process too, until ``ctx.release_port()``.
    preload : tuple of str
        Modules that each node imports while the nodes meet, before it unpickles the function.
    max_restarts : int
        How often the nodes are started again when one of them, or its executor, is lost.
    training : TrainingOptions
        What ``ctx.distribute`` is to do besides.
    serves_itself : bool
        With parameter servers: True when the function runs on every node and serves there by itself, as
        TensorFlowOnSpark's do; False when ps and workers only serve and the chief alone runs the function.
    """

    num_nodes: int
    num_ps: int = 0
    chief: bool = True
    evaluator: bool = False
    epochs: int = 1
    batch_size: int = 64
    label: str | None = None
    features: tuple[str, ...] | None = None
    weight: str | None = None
    shuffle: bool = True
    seed: int | None = None
    timeout_s: float | None = None
    serves_itself: bool = True
    chief_name: str = "chief"
    queue_limit_bytes: int = QUEUE_LIMIT_BYTES
    release_port: bool = True
    predicts: bool = False
    is_independent: bool = False
    grid: tuple[Mapping[str, Any], ...] | None = None
    waits_for_all: bool = True
    ps_on_driver: bool = False
    gpus_per_node: int | None = None
    tensorboard: str | None = None
    max_restarts: int = 0
    training: TrainingOptions = field(default_factory=TrainingOptions)
    preload: tuple[str, ...] = ("tensorflow",)
    title: str = "tfos_magic"

    def __post_init__(self) -> None:
        for name in ("num_nodes", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            raise UsageError(f"gpus_per_node is {self.gpus_per_node}; it must be 0 or more.")
        if self.max_restarts < 0:
            raise UsageError(f"max_restarts is {self.max_restarts}; it must be 0 or more.")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise UsageError(f"timeout_s is {self.timeout_s:g}; it must be more than 0.")
        if self.grid is not None and (not self.is_independent or len(self.grid) != self.num_nodes):
            kind = "independent nodes" if self.is_independent else "nodes that train together"
            raise UsageError(
                f"The grid has {len(self.grid)} points for {self.num_nodes} {kind}; each independent node takes one."
            )
        self.roles()

    @property
    def data_seed(self) -> int | None:
        """The seed of shuffling: with checkpoints there is always one, or a resumed run would see other batches."""
        return 0 if self.seed is None and self.training.checkpoint_dir is not None else self.seed

    def roles(self) -> tuple[roles.Role, ...]:
        """Return one role per node; UsageError when there are too few nodes."""
        chief = self.chief_name if self.chief else None
        return roles.assign(self.num_nodes, num_ps=self.num_ps, chief=chief, has_evaluator=self.evaluator)
