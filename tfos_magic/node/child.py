"""The child: a fresh interpreter that runs the user's function on one node.

Runs on: executor, started by the agent.

The order is the point: die with the agent → take the namedtuple patch out, before anything of the user's can be
imported → import TensorFlow → hear from the driver who is who → environment (TF_CONFIG, GPUs) → unpickle → run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import socket
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tfos_magic.node import channel
from tfos_magic.node.link import Link
from tfos_magic.node.processes import die_with_parent

if TYPE_CHECKING:
    from tfos_magic.feed.source import Feeds
    from tfos_magic.node.context import NodeContext


def main(config_fd: int, payload_fd: int, channel_fd: int, agent_pid: int) -> None:
    """Run the user's function, hand over what came of it, and exit when told to."""
    die_with_parent(agent_pid)
    _compute_in_long_turns()
    from tfos_magic import namedtuple_patch

    patch = namedtuple_patch.ensure_clean()
    config = json.loads(channel.read_all(config_fd))
    # sys.path is the Python worker's, so that what sc.addPyFile brought is found; our archive stays in front.
    sys.path[1:] = [entry for entry in config["sys_path"] if entry not in sys.path[:1]]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    link = Link(socket.socket(fileno=channel_fd))
    try:
        link.send("state", state="IMPORTING", namedtuple_patch=patch.to_json())
        _live(config, payload_fd, link)
    finally:
        link.wait_exit()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(0)  # a TensorFlow process takes about a second to exit by itself


def _live(config: dict[str, Any], payload_fd: int, link: Link) -> None:
    times = {"child": time.time()}
    if not _preload(config["preload"], link):
        return
    times["imported"] = time.time()
    link.send("state", state="MEETING")
    start = link.wait_start()
    os.environ.update(start["environment"])
    _share_cores(start["nodes_on_host"])
    times["met"] = time.time()
    try:
        from tfos_magic import shipping, training
        from tfos_magic.node.context import NodeContext

        function, args, point = shipping.unpack_for_node(channel.read_all(payload_fd), config["index"])
        os.close(payload_fd)
        _seed(start["seed"], config["index"])
        context = NodeContext(config, start, args, link, point)
        link.send("state", state="RUNNING", times={**times, "running": time.time()})
        training.prepare(context)
        value = _call(function, args, context)
        training.save(context, value)
        if start["predicts"]:
            value = _predict(value, start["data_options"], link)
        training.warn_if_forgotten(context)
        blob = _packed(value, context)
        link.send_counters()
    except BaseException as error:  # whatever the user's code raises, SystemExit too, belongs to the driver
        link.send_counters()
        link.fail("user", _with_feed_error(error, link.feeds))
        return
    link.send_blob("result", blob)
    if training.is_serving():
        link.send("state", state="RUNNING")  # the function is over, the server is not


def _compute_in_long_turns() -> None:
    """Ask the kernel to let threads that compute go on when others wake up; all threads from here on inherit it.

    TensorFlow has more threads than a node has cores. Where each that wakes up interrupts one that computes, be it of
    another node, all nodes wait at the end of the step for the one that was interrupted most.
    """
    with contextlib.suppress(OSError):  # a container may forbid it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _share_cores(nodes_on_host: int) -> None:
    """Let TensorFlow compute on this node's part of the cores, unless the user has said on how many.

    By itself it takes all of them in each process, and nodes that wait for each other at every step then mostly wait
    for a core. It reads the variable when it first computes.
    """
    if nodes_on_host > 1:
        threads = -(-len(os.sched_getaffinity(0)) // nodes_on_host)
        os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))


def _seed(seed: int | None, index: int) -> None:
    """Start the random streams of this node where ``--seed`` says; each node has its own.

    Keras takes the seeds of its initialisers and random layers from Python's.
    """
    if seed is None:
        return
    own = zlib.crc32(f"{seed}/{index}".encode())
    random.seed(own)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(own)
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].random.set_seed(own)


def _predict(predictor: Any, options: Mapping[str, Any], link: Link) -> int:
    """Answer Spark's questions with what the function returned; return how many."""
    from tfos_magic.node import inference

    inference.as_function(predictor, options["features"])  # refuses what is none before anybody asks
    link.send("predicting")
    return inference.serve(predictor, link.feeds.queue("input"), options["batch_size"], options["features"])


def _packed(value: Any, context: NodeContext) -> bytes:
    """Return the function's value as bytes; hours of training are not lost because it cannot be pickled."""
    from tfos_magic import shipping
    from tfos_magic.errors import ResultError

    try:
        return shipping.pack_result(value)
    except ResultError as error:
        context.log.warning("%s", error)
        return shipping.pack_result(error)


def _with_feed_error(error: BaseException, feeds: Feeds) -> BaseException:
    """Put what was wrong with the data in place of the TensorFlow error that it came out as."""
    origin = next((feed.error for feed in feeds if feed.error is not None), None)
    if origin is None:
        return error
    origin.__cause__, origin.__suppress_context__ = None, True
    return origin.with_traceback(error.__traceback__)


def _call(function: Callable[..., Any], args: Any, context: NodeContext) -> Any:
    from tfos_magic import training

    if isinstance(args, list):  # as TensorFlowOnSpark: for functions that parse the command line
        sys.argv = [str(word) for word in args]
    try:
        return training.serve(context) if context.is_server else function(args, context)
    except SystemExit as stop:
        if stop.code in (None, 0):
            return None
        raise
    finally:
        training.close(context)


def _preload(modules: list[str], link: Link) -> bool:
    """Import ahead of need, while the nodes meet, what the user's function is going to import anyway."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation raises anything
            link.fail("import", error)
            return False
    return True
