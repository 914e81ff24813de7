"""Run a cell's text on a cluster, the way the magic does, without a notebook."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from tfos_magic import cell, cluster, shipping
from tfos_magic.result import RunResult
from tfos_magic.status import Event

FILENAME = "<cell 1>"
LABEL = "Cell In[1]"


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
    function = cell.map_function(body, dict(namespace or {}), filename=FILENAME, label=LABEL)
    chosen = cluster.RunOptions(num_nodes=nodes, preload=preload, **options)
    defaults = {"epochs": chosen.epochs, "batch_size": chosen.batch_size}
    payload = shipping.pack(function, args=types.SimpleNamespace(**{**defaults, **(args or {})}))
    return cluster.run(spark, payload, chosen, data=data, on_event=on_event, cell_names={FILENAME: LABEL})
