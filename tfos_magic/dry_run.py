"""What ``--dry-run`` shows: what would be shipped, as tables of text.

Runs on: notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic import grid

if TYPE_CHECKING:
    from tfos_magic.shipping import Payload


def describe(payload: Payload, num_nodes: int, points: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
    """Return lines that say what goes to each of the nodes, and which modules they import.

    Parameters
    ----------
    payload : Payload
    num_nodes : int
    points : sequence of mapping, optional
        What is different on each node.
    """
    lines = [f"{len(payload.data):,} bytes would go to each of {num_nodes} nodes.", ""]
    lines += _table([("object", "kind", "bytes", "how"), *_object_rows(payload)])
    if payload.modules:
        lines += ["", *_table([("module", "the driver has it at"), *_module_rows(payload)])]
    if points is not None:
        rows = [(f"worker:{index}", grid.told(point)) for index, point in enumerate(points)]
        lines += ["", *_table([("node", "point of the grid"), *rows])]
    return lines


def _object_rows(payload: Payload) -> list[tuple[str, ...]]:
    return [(each.name, each.kind, f"{each.size_bytes:,}", each.how) for each in payload.objects]


def _module_rows(payload: Payload) -> list[tuple[str, ...]]:
    return [
        (each.name, f"{each.file or 'nowhere'}{'  (not installed: executors may lack it)' if each.is_local else ''}")
        for each in payload.modules
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
