"""What is large.

Runs on: driver.
"""

from __future__ import annotations

from collections.abc import Iterator

from tfos_magic.doctor.case import Case
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Node
from tfos_magic.shipping import LARGE_BYTES

_SHARE = 0.8


def look(case: Case) -> Iterator[Finding]:
    """Yield the objects that make it large, as deep as one of them has the most of it."""
    todo = [case.graph.root]
    while todo:
        node = todo.pop()
        if node.size_bytes <= LARGE_BYTES:
            continue
        large = [part for part in node.parts if part.is_named and part.size_bytes > LARGE_BYTES]
        if large and sum(part.size_bytes for part in large) > _SHARE * node.size_bytes:
            todo += large
        else:
            yield _large(case, node)


def _large(case: Case, node: Node) -> Finding:
    size = f"{node.size_bytes / 1e6:.0f} MB"
    if case.is_nodes:
        why = f"It adds {size} to what every node is sent."
        fix = "Give rows to --data, or write it to a file that the nodes can read."
    else:
        why = f"It adds {size} to every job that takes it along."
        fix = "big = sc.broadcast(…) once, and big.value in the function; or make a DataFrame of it."
    return case.finding(node, "large-capture", Verdict.COSTLY, why, fix)
