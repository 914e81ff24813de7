"""Inferences that stand: their nodes wait for questions until somebody stops them.

Runs on: notebook.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfos_magic.inference import Inference
    from tfos_magic.result import NodeInfo


@dataclass(frozen=True)
class Stopped:
    """One inference that was told to end."""

    name: str
    num_nodes: int
    error: BaseException | None
    """What went wrong on the way; its nodes are gone all the same."""


class StandingInferences:
    """Open inferences, each under the name of its DataFrame; owner of all of them."""

    def __init__(self) -> None:
        self._all: dict[str, tuple[Inference, int]] = {}

    def add(self, name: str, inference: Inference, num_nodes: int) -> None:
        """Take one over. There is none of this name: :meth:`stop` comes before."""
        self._all[name] = inference, num_nodes

    @property
    def names(self) -> list[str]:
        """Of those whose nodes are there; one that has failed or ended is not kept."""
        self._all = {name: pair for name, pair in self._all.items() if pair[0].is_open}
        return list(self._all)

    @property
    def nodes(self) -> list[NodeInfo]:
        """The nodes of all."""
        return [node for name in self.names for node in self._all[name][0].nodes]

    def find(self, name: str) -> Inference | None:
        """Return the open one of this name."""
        return self._all[name][0] if name in self.names else None

    def stop(self, names: Iterable[str]) -> list[Stopped]:
        """Close those of `names` that are open. What one raises, an interrupt too, does not keep the others open."""
        return [self._stop(name) for name in names if name in self.names]

    def _stop(self, name: str) -> Stopped:
        inference, num_nodes = self._all.pop(name)
        try:
            inference.close()
        except BaseException as error:  # the caller's to raise, once all are closed
            return Stopped(name, num_nodes, error)
        return Stopped(name, num_nodes, None)
