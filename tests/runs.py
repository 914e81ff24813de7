"""Run a cell's text on a cluster, the way the magic does, without a notebook."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tfos_magic import cell, cluster, shipping
from tfos_magic.result import RunResult
from tfos_magic.status import Event

FILENAME = "<cell 1>"
LABEL = "Cell In[1]"


def pack_cell(body: str, namespace: Mapping[str, Any], args: Mapping[str, Any]) -> shipping.Payload:
    """Return the cell's text as the magic would ship it."""
    function = cell.map_function(body, dict(namespace), filename=FILENAME, label=LABEL)
    return shipping.pack(function, args=types.SimpleNamespace(**args))


def run_cell(
    spark: Any,
    body: str,
    nodes: int = 2,
    *,
    namespace: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
    preload: tuple[str, ...] = (),
    **options: Any,
) -> RunResult:
    """Run `body` on `nodes` nodes; TensorFlow is imported ahead only when `preload` says so."""
    chosen = cluster.RunOptions(num_nodes=nodes, preload=preload, **options)
    defaults = {"epochs": chosen.epochs, "batch_size": chosen.batch_size}
    payload = pack_cell(body, namespace or {}, {**defaults, **(args or {})})
    return cluster.run(spark, payload, chosen, data=data, on_event=on_event, cell_names={FILENAME: LABEL})


def start_cell(
    spark: Any, body: str, nodes: int, *, feeds: Sequence[str], on_event: Callable[[Event], None], **options: Any
) -> cluster.Cluster:
    """Start `body` and return the cluster that runs it; the caller feeds, waits and closes."""
    chosen = cluster.RunOptions(num_nodes=nodes, **options)
    running = cluster.Cluster(spark, pack_cell(body, {}, {}), chosen, on_event=on_event, cell_names={})
    running.start(feeds=feeds)
    return running
