"""TensorFlowOnSpark's ``TFParallel``: the same function on many nodes that know nothing of each other.

Runs on: driver.
"""

from __future__ import annotations

from typing import Any

from tfos_magic import session, shipping
from tfos_magic.cluster import run as run_cluster
from tfos_magic.options import RunOptions, modules_to_preload


def run(sc: Any, map_fn: Any, tf_args: Any, num_executors: int, use_barrier: bool = True) -> list[Any]:
    """Run a function on independent nodes, and wait for all of them.

    Parameters
    ----------
    sc : SparkContext or SparkSession
    map_fn : callable(args, ctx)
        ``ctx.worker_num`` and ``ctx.num_workers`` tell the nodes apart.
    tf_args : object
        Its first argument.
    num_executors : int
        How many nodes.
    use_barrier : bool
        True: all run at the same time, or none does. False: as many at once as there are slots, in as many rounds as
        it takes.

    Returns
    -------
    list
        What each node's function returned. (TensorFlowOnSpark gives None.)

    Raises
    ------
    TooFewSlotsError, NodeError, …
        See :mod:`tfos_magic.errors`.
    """
    payload = shipping.pack(map_fn, args=tf_args)
    options = RunOptions(
        num_nodes=num_executors,
        chief=False,
        is_independent=True,
        waits_for_all=use_barrier,
        preload=modules_to_preload(payload),
        title=f"{getattr(map_fn, '__name__', 'map_fn')} on {num_executors} independent nodes",
    )
    return run_cluster(session.as_session(sc), payload, options).values
