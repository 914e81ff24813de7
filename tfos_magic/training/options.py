"""What the line of ``%%tfos_train`` says about training itself; the same record on the driver and on every node.

Runs on: driver and executors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tfos_magic.errors import UsageError

WIRE_DTYPES = ("float32", "bfloat16")
"""What gradients may be while they travel between nodes."""


@dataclass(frozen=True)
class TrainingOptions:
    """How ``ctx.distribute(model)`` trains; checked when made.

    Attributes
    ----------
    checkpoint_dir : str, optional
        Where checkpoints go: a path on the chief's machine, or what ``tf.io.gfile`` opens. None for no checkpoints.
    checkpoint_every_steps : int, optional
    checkpoint_every_s : float, optional
        How often besides the end of each epoch: after so many steps, or so many seconds; at most one of the two.
    keep_checkpoints : int
        How many of the newest stay.
    resume : bool
        Go on with the newest checkpoint that is good.
    save_dir : str, optional
        Where the chief leaves the trained models.
    accumulate : int
        How many batches' gradients a node adds up before they are averaged over the nodes and applied.
    wire_dtype : {"float32", "bfloat16"}
        What gradients are while they travel.
    """

    checkpoint_dir: str | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_every_s: float | None = None
    keep_checkpoints: int = 3
    resume: bool = False
    save_dir: str | None = None
    accumulate: int = 1
    wire_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("keep_checkpoints", "accumulate"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.wire_dtype not in WIRE_DTYPES:
            raise UsageError(f"wire_dtype is {self.wire_dtype!r}; it must be one of {', '.join(WIRE_DTYPES)}.")
        if self.checkpoint_dir is None and (self.resume or self.checkpoint_every_steps or self.checkpoint_every_s):
            raise UsageError(
                "There is no directory for checkpoints.",
                cause="resume and checkpoint_every_… say what to do with them.",
                hint="--checkpoint DIR.",
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingOptions:
        """Inverse of :meth:`to_json`."""
        return cls(**data)
