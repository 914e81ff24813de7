"""What a run gave: one value per node, the metrics' history, logs and timings.

Runs on: driver.
"""

from __future__ import annotations

import html
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfos_magic import grid
from tfos_magic.errors import ResultError
from tfos_magic.status import StatusBoard

_VALUE_CHARACTERS = 160


@dataclass(frozen=True)
class NodeInfo:
    """Where a node ran."""

    name: str
    host: str
    address: str
    pid: int
    python: str
    times: Mapping[str, float]
    """Seconds since the epoch at which the child began (``child``), had imported TensorFlow (``imported``), had heard
    from all nodes (``met``) and entered the function (``running``)."""
    namedtuple_patch: Mapping[str, Any] = field(default_factory=dict)
    """The state of PySpark's patch in the child before anything of yours was imported there: see
    :class:`tfos_magic.namedtuple_patch.PatchStatus`."""


@dataclass(frozen=True, eq=False, repr=False)
class RunResult:
    """The outcome of a run that succeeded; or, as ``partial`` of an error, of those points of a grid that did.

    Attributes
    ----------
    nodes : tuple of NodeInfo
        In node order: chief, workers, parameter servers, evaluator.
    history : dict of str to list of float
        Metric → its value after each epoch, as in Keras' own ``History.history``: the mean over the nodes, which under
        ``ctx.distribute`` all have the same. In a run without epochs, what one node gave to ``ctx.report``, in order.
        Empty after independent nodes: a mean over different things says nothing, see :attr:`histories`.
    timings : dict of str to float
        Seconds of each phase, from the start of the cell: see :data:`tfos_magic.cluster.Cluster`.
    grid : tuple of dict, optional
        The points of ``--grid``, in node order, as `values` and `histories` are. None where there was no grid.
    missing : dict of str to str
        Nodes of a grid that gave no value, which is None in `values` then → why.
    """

    nodes: tuple[NodeInfo, ...]
    history: Mapping[str, Sequence[float]]
    timings: Mapping[str, float]
    board: StatusBoard
    _blobs: tuple[bytes, ...] = ()
    _values: list[Any] = field(default_factory=list)
    grid: tuple[Mapping[str, Any], ...] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def values(self) -> list[Any]:
        """What the function returned, one per node in node order; unpickled when first read.

        Raises
        ------
        ResultError
            A value cannot be rebuilt here, e.g. because its module exists only on the executors.
        """
        if not self._values:
            from tfos_magic import shipping

            self._values.extend(shipping.unpack_result(blob) if blob else None for blob in self._blobs)
        failed = next((value for value in self._values if isinstance(value, ResultError)), None)
        if failed is not None:
            raise failed
        return list(self._values)

    @property
    def histories(self) -> tuple[dict[str, tuple[float, ...]], ...]:
        """Of independent nodes (``--independent``), one per node in node order, empty else.

        Metric → its value after each epoch under ``ctx.distribute``, or, of a node that counts no epochs, what it gave
        to ``ctx.report``, in order.
        """
        of_nodes = self.board.histories()
        return tuple(of_nodes[node.name] for node in self.nodes) if of_nodes else ()

    @property
    def logs(self) -> dict[str, tuple[str, ...]]:
        """Node → the last 2,000 lines of its output, oldest first."""
        return {node.name: self.board.logs(node.name) for node in self.nodes}

    @property
    def log_files(self) -> dict[str, Path]:
        """Node → the file of the newest lines that it wrote, older ones beside it as ``….log.1``; of those that wrote.

        They are there while the run is one of the last three that have ended in the notebook, empty after that and in
        scripts: see :mod:`tfos_magic.logbook`.
        """
        return self.board.store.paths if self.board.store is not None else {}

    def __repr__(self) -> str:
        facts = [f"{len(self.nodes)} nodes", f"{self.timings.get('total', 0.0):.1f} s"]
        facts += [f"{name} {values[-1]:.4g}" for name, values in self.history.items() if values]
        if self.grid is not None:
            return "\n".join([f"<RunResult: {', '.join(facts)}, grid:", *self._lines_of_points(), ">"])
        try:
            if any(value is not None for value in self.values):
                facts.append(f"values {_short(self.values)}")
        except ResultError as error:
            facts.append(_short(error.fact))
        return f"<RunResult: {', '.join(facts)}>"

    def _lines_of_points(self) -> list[str]:
        """Return one line for each point of the grid: the point, and what the node returned."""
        points = [grid.told(point) for point in self.grid or ()]
        try:
            values = self._shown_values()
        except ResultError as error:
            values = [_short(error.fact)] * len(points)
        width = max(map(len, points))
        return [f"  {point.ljust(width)}  →  {value}" for point, value in zip(points, values, strict=True)]

    def _shown_values(self) -> list[str]:
        named = zip(self.nodes, self.values, strict=True)
        return [f"({self.missing[node.name]})" if node.name in self.missing else _short(value) for node, value in named]

    def _repr_html_(self) -> str:
        """Return a table of the nodes' values; how the run went is on the board above it."""
        try:
            values = self._shown_values()
        except ResultError as error:
            return f"<pre>{html.escape(str(error))}</pre>"
        points = [f"<td>{html.escape(grid.told(point))}</td>" for point in self.grid or ()] or [""] * len(values)
        rows = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(node.name)}</th>{point}'
            f'<td style="text-align:left"><code>{html.escape(value)}</code></td></tr>'
            for node, point, value in zip(self.nodes, points, values, strict=True)
        )
        return f"<table><tbody>{rows}</tbody></table>"


def _short(value: Any) -> str:
    text = reprlib.repr(value)
    return text if len(text) <= _VALUE_CHARACTERS else text[: _VALUE_CHARACTERS - 1] + "…"
