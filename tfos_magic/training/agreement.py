"""What nodes tell each other before they start, so that a mistake is an error on all of them and not a hang.

Runs on: executors.

Everything here is plain numbers that fit into one row of an array; each node gathers the rows of all and compares.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfos_magic.errors import UsageError

_UNKNOWN = -1
_UNBUILT = 0
_CALLS = ("fit", "evaluate")


@dataclass(frozen=True)
class Structure:
    """A model's variables in three numbers; all zero while it is not built."""

    digest: int = _UNBUILT
    variable_count: int = 0
    parameter_count: int = 0

    @classmethod
    def of(cls, variables: Sequence[Any]) -> Structure:
        """Return the structure of these variables, by shape and dtype."""
        if not variables:
            return cls()
        # Not the names: the automatic ones count the layers that each process has ever made.
        text = ";".join(f"{tuple(v.shape)}{v.dtype}" for v in variables)
        count = sum(int(np.prod(v.shape)) for v in variables)
        return cls(zlib.crc32(text.encode()) | 1 << 32, len(variables), count)

    @classmethod
    def decode(cls, row: Any) -> Structure:
        """Inverse of :meth:`encode`."""
        return cls(*(int(x) for x in row))

    @property
    def is_built(self) -> bool:
        """True when there were variables."""
        return self.digest != _UNBUILT

    def encode(self) -> Any:
        """Return an array of int64, shape (3,)."""
        return np.array([self.digest, self.variable_count, self.parameter_count], np.int64)


@dataclass(frozen=True)
class Plan:
    """What a node is about to do."""

    call: str
    model_number: int
    steps: int | None
    epochs: int
    steps_per_execution: int
    structure: Structure = field(default_factory=Structure)
    initial_epoch: int = 0
    """As passed to ``fit``: the same on all nodes."""
    restored_epoch: int | None = None
    """What a callback has restored (BackupAndRestore): the chief's is that of all."""
    has_slots: bool = False
    """Whether the compiled optimizer has made its variables."""

    def encode(self) -> Any:
        """Return an array of int64, shape (11,)."""
        plan = [_CALLS.index(self.call), self.model_number, _number_of(self.steps), self.epochs]
        plan += [int(self.steps_per_execution), self.initial_epoch, _number_of(self.restored_epoch), self.has_slots]
        return np.concatenate([np.array(plan, np.int64), self.structure.encode()])

    @classmethod
    def decode(cls, row: Any) -> Plan:
        """Inverse of :meth:`encode`."""
        call, number, steps, epochs, per_execution, initial, restored, has_slots = (int(x) for x in row[:8])
        return cls(
            _CALLS[call],
            number,
            _known(steps),
            epochs,
            per_execution,
            Structure.decode(row[8:]),
            initial,
            _known(restored),
            bool(has_slots),
        )


def _number_of(value: int | None) -> int:
    return _UNKNOWN if value is None else int(value)


def _known(number: int) -> int | None:
    return None if number == _UNKNOWN else number


def compare_plans(plans: Sequence[Plan], names: Sequence[str]) -> None:
    """Raise if the nodes are about to do different things, which would end in a hang or a wrong result."""
    _same("calls", [f"model.{p.call}" for p in plans], names, "Every node must make the same calls in the same order.")
    _same("models", [p.model_number for p in plans], names, "Call ctx.distribute in the same order on every node.")
    _same("epochs", [p.epochs for p in plans], names, "Pass the same epochs on every node.")
    _same(
        "values of initial_epoch",
        [p.initial_epoch for p in plans],
        names,
        "Pass the same initial_epoch on every node. keras.callbacks.BackupAndRestore goes on where the chief stopped.",
    )
    _same("steps_per_execution", [p.steps_per_execution for p in plans], names, "Compile alike on every node.")
    if all(p.steps is not None for p in plans):
        _same(
            f"numbers of batches in {plans[0].call}",
            [p.steps for p in plans],
            names,
            "Use ctx.dataset(…), which gives every node the same number, pass steps_per_epoch=/validation_steps=, "
            "or cut the arrays to equal lengths.",
        )
    built = [p.structure for p in plans if p.structure.is_built]
    if len(built) == len(plans):
        compare_structures(built, names)


def compare_structures(structures: Sequence[Structure], names: Sequence[str]) -> None:
    """Raise UsageError if the nodes have different models."""
    if len({s.digest for s in structures}) == 1:
        return
    shown = [f"{s.variable_count} variables with {s.parameter_count:,} numbers" for s in structures]
    _same(
        "models",
        [f"{text} (structure {s.digest & 0xFFFF:04x})" for text, s in zip(shown, structures, strict=True)],
        names,
        "Build the same layers with the same sizes on every node.",
    )


def _same(what: str, values: Sequence[Any], names: Sequence[str], hint: str) -> None:
    if len(set(values)) > 1:
        shown = ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        raise UsageError(f"The nodes have different {what}: {shown}.", hint=hint)
