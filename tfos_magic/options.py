"""How a run is to be: what the magic's line says, checked.

Runs on: driver.
"""

from __future__ import annotations

from dataclasses import dataclass

from tfos_magic import roles
from tfos_magic.errors import UsageError


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
    preload : tuple of str
        Modules that each node imports while the nodes meet, before it unpickles the function.
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
    preload: tuple[str, ...] = ("tensorflow",)
    title: str = "tfos_magic"

    def __post_init__(self) -> None:
        for name in ("num_nodes", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise UsageError(f"timeout_s is {self.timeout_s:g}; it must be more than 0.")
        self.roles()

    def roles(self) -> tuple[roles.Role, ...]:
        """Return one role per node; UsageError when there are too few nodes."""
        return roles.assign(self.num_nodes, num_ps=self.num_ps, has_chief=self.chief, has_evaluator=self.evaluator)
