"""One side of the comparison in ``tensorflowonspark.py``: a Spark driver that measures one package when it is told to.

It is run by the Python of that package's environment, so it needs nothing but PySpark and the package. Both packages
run the same code on their nodes, `node_main`; only our side knows DataFrames, ``ctx.dataset`` and ``mapInArrow``, too.

    harness ──{"do": "stream", …}──► this driver ──TFCluster.run, train / inference, shutdown──► nodes
       ▲ ◄──{"event": "fed" …}, reply──┘   ▲ ◄────── "I have begun", "I have read so many rows" ──────┘
"""

from __future__ import annotations

import argparse
import importlib
import queue
import secrets
import sys
import threading
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

# Not the directory of this file: in it, tensorflowonspark.py would be taken for the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

PIXELS = 784
NODE_TIMEOUT_S = 180
# By TensorFlowOnSpark's rule columns are sorted by name, and the k-th one is item k of a row.
MAPPINGS = {
    "narrow": {"f0": "f0", "f1": "f1", "f2": "f2", "f3": "f3", "label": "y"},
    "wide": {"image": "x", "label": "y"},
}


def main() -> None:
    """Answer requests until the harness closes the connection."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", required=True)
    parser.add_argument("--master", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--descriptor", type=int, required=True, help="of the socket to the harness")
    options = parser.parse_args()
    with Connection(options.descriptor) as harness:
        side = Side(options.package, options.master, options.nodes, harness)
        try:
            while True:
                request = harness.recv()
                harness.send(answer(side, request))
        except EOFError:
            pass
        finally:
            side.spark.stop()


def answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """Return what came of a request; TensorFlowOnSpark ends a driver with ``sys.exit``, so that is caught too."""
    try:
        reply: dict[str, Any] = getattr(side, request.pop("do"))(**request)
    except (Exception, SystemExit):
        return {"error": traceback.format_exc()}
    return reply


class Side:
    """A Spark session on the standalone cluster of one package.

    Parameters
    ----------
    package : str
        ``tensorflowonspark`` or ``tfos_magic``: where ``TFCluster`` is imported from.
    master : str
    nodes : int
        One-core executors, and as many nodes.
    harness : Connection
        Is told when the rows begin to flow.
    """

    def __init__(self, package: str, master: str, nodes: int, harness: Connection) -> None:
        from pyspark.sql import SparkSession

        self.package = package
        self.nodes = nodes
        self.harness = harness
        self.spark = (
            SparkSession.builder.master(master)
            .appName(f"benchmark of {package}")
            .config("spark.executor.cores", "1")
            .config("spark.cores.max", str(nodes))
            .getOrCreate()
        )
        self._data: dict[tuple[str, str, int, int], Any] = {}
        context = self.spark.sparkContext
        context.parallelize(range(nodes), nodes).foreachPartition(lambda rows: None)  # executors and daemons are up

    # --- requests -----------------------------------------------------------------------------------------

    def stream(
        self,
        *,
        shape: str,
        form: str,
        source: str,
        rows: int,
        partitions: int,
        call: str,
        batch_size: int,
        **wishes: Any,
    ) -> dict[str, Any]:
        """Run a cluster, feed it once, stop it.

        Parameters
        ----------
        shape : str
            ``narrow`` or ``wide``.
        form : str
            ``tuples`` or ``arrays``: what the node's function makes of a batch.
        source : str
            ``rdd`` or ``frame``.
        rows : int
            0 for a cluster that is only started and stopped.
        partitions : int
            For each node.
        call : str
            ``train`` or ``inference``.
        wishes
            Of the node: ``tensorflow`` (import it), ``pauses``, ``pause_s``.
        """
        data = self.data(shape, source, rows, partitions) if rows else None
        mapping = MAPPINGS[shape] if form == "arrays" else None
        with NodeReports(self.nodes) as reports:
            args = argparse.Namespace(
                address=reports.address, authkey=reports.authkey.hex(), mapping=mapping, batch_size=batch_size,
                gives_results=call == "inference", tensorflow=wishes.get("tensorflow", False),
                pause_every=rows // self.nodes // wishes["pauses"] if wishes.get("pauses") else 0,
                pause_s=wishes.get("pause_s", 0.0),
            )  # fmt: skip
            times = {"asked": time.time()}
            cluster = self.start(args)
            times["returned"] = time.time()
            began = self.wait_for_nodes(cluster, reports)
            self.harness.send({"event": "fed"})
            times["call"] = time.time()
            if data is not None:
                self.feed(cluster, data, call, rows)
            times["called"] = time.time()
            cluster.shutdown()
            times["shut"] = time.time()
            read = reports.ended()
        if sum(node["rows"] for node in read) != rows:
            raise ValueError(f"{rows} rows went in, the nodes read {[node['rows'] for node in read]}")
        return {"times": times, "nodes": [{**one, **other} for one, other in zip(began, read)]}  # noqa: B905

    def start(self, args: argparse.Namespace) -> Any:
        """Start the nodes as TensorFlowOnSpark's users do."""
        cluster_module = importlib.import_module(f"{self.package}.TFCluster")
        spark_mode = cluster_module.InputMode.SPARK
        return cluster_module.run(self.spark.sparkContext, node_main, args, self.nodes, 0, input_mode=spark_mode)

    def wait_for_nodes(self, cluster: Any, reports: NodeReports) -> list[dict[str, Any]]:
        """Return what the nodes said at their beginning; if they say nothing, stopping them tells why."""
        try:
            return reports.began()
        except queue.Empty:
            cluster.shutdown()
            raise TimeoutError(f"the nodes said nothing in {NODE_TIMEOUT_S} s, and stopped without an error") from None

    def feed(self, cluster: Any, data: Any, call: str, rows: int) -> None:
        """Send all rows through the nodes, once."""
        if call == "train":
            cluster.train(data, 1)
        elif cluster.inference(data).count() != rows:
            raise ValueError(f"{rows} rows went in, another number of results came back")

    def dataset(self, *, shape: str, rows: int, partitions: int, batch_size: int) -> dict[str, Any]:
        """Feed the same rows by ``--data`` to nodes that iterate over ``ctx.dataset``."""
        from benchmarks.feed import feed

        frame = self.data(shape, "frame", rows, partitions)
        seconds, _ = feed(self.spark, frame, rows, batch_size, self.nodes)
        return {"seconds": seconds}

    def drop(self, *, shape: str, rows: int, partitions: int) -> dict[str, Any]:
        """Send the same rows through bare ``mapInArrow``, which looks at nothing."""
        from benchmarks.feed import drop, timed

        frame = self.data(shape, "frame", rows, partitions)
        drop(frame)  # starts the Python workers, which import pyarrow
        return {"seconds": timed(lambda: drop(frame))}

    # --- data ---------------------------------------------------------------------------------------------

    def data(self, shape: str, source: str, rows: int, partitions: int) -> Any:
        """Return an RDD or a DataFrame that is computed and cached, with so many partitions for each node."""
        key = shape, source, rows, partitions
        if key not in self._data:
            for old in [old for old in self._data if old[:2] == key[:2]]:
                self._data.pop(old).unpersist()
            make = make_rdd if source == "rdd" else make_frame
            self._data[key] = make(self.spark, shape, rows, partitions * self.nodes).cache()
            self._data[key].count()
        return self._data[key]


def make_rdd(spark: Any, shape: str, rows: int, partitions: int) -> Any:
    """Return tuples: 4 floats and a label, or a list of 784 floats and a label."""
    numbers = [float(number % 255) for number in range(255 + PIXELS)]
    makers = {
        "narrow": lambda i: (*numbers[i % 255 : i % 255 + 4], i % 10),
        "wide": lambda i: (numbers[i % 255 : i % 255 + PIXELS], i % 10),
    }
    return spark.sparkContext.range(rows, numSlices=partitions).map(makers[shape])


def make_frame(spark: Any, shape: str, rows: int, partitions: int) -> Any:
    """Return the same kinds of rows as a DataFrame, the floats being 32 bits wide."""
    image = f"transform(sequence(1, {PIXELS}), k -> cast((id * k) % 255 as float)) as image"
    columns = [f"cast((id + {k}) % 255 as float) as f{k}" for k in range(4)] if shape == "narrow" else [image]
    return spark.range(rows, numPartitions=partitions).selectExpr(*columns, "cast(id % 10 as int) as label")


# --- the nodes ------------------------------------------------------------------------------------------------


def node_main(args: argparse.Namespace, ctx: Any) -> None:
    """Read all batches, as a training function does, and tell the driver when it began and what it has read."""
    began = time.time()
    import numpy as np

    if args.tensorflow:
        importlib.import_module("tensorflow")
    ready = time.time()
    rows = first_rows = pauses = 0
    first = last = 0.0
    with Client(tuple(args.address), authkey=bytes.fromhex(args.authkey)) as driver:
        feed = ctx.get_data_feed(not args.gives_results, input_mapping=args.mapping)
        driver.send({"node": ctx.executor_id, "began": began, "ready": ready})
        while not feed.should_stop():
            batch = feed.next_batch(args.batch_size)
            if args.mapping is None:
                labels = [row[-1] for row in batch]
            else:
                arrays = {name: np.asarray(values) for name, values in batch.items()}
                labels = arrays["y"].tolist()
            if args.gives_results and labels:
                feed.batch_results(labels)
            rows += len(labels)
            last = time.time() if labels else last
            if not first and labels:
                first, first_rows = last, rows
            if args.pause_every and rows // args.pause_every > pauses:
                pauses += 1
                time.sleep(args.pause_s)  # this is the slow step of a model, not a wait for something
        driver.send({"rows": rows, "first": first, "first_rows": first_rows, "last": last})


class NodeReports:
    """Hears what the nodes say: each connects once and sends two messages.

    Parameters
    ----------
    count : int
    """

    def __init__(self, count: int) -> None:
        self.authkey = secrets.token_bytes(16)
        self._count = count
        self._listener = Listener(("127.0.0.1", 0), backlog=count, authkey=self.authkey)
        self.address: Any = self._listener.address
        self._said: queue.Queue[dict[str, Any]] = queue.Queue()
        self._connections: list[Connection] = []
        self._thread = threading.Thread(target=self._hear, daemon=True)

    def __enter__(self) -> NodeReports:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def began(self) -> list[dict[str, Any]]:
        """Wait until all nodes are in their function; return their first messages."""
        return self._take()

    def ended(self) -> list[dict[str, Any]]:
        """Wait until all nodes have read everything; return their second messages, in the same order of nodes."""
        return self._take()

    def _take(self) -> list[dict[str, Any]]:
        messages = [self._said.get(timeout=NODE_TIMEOUT_S) for _ in range(self._count)]
        return sorted(messages, key=lambda message: message["from"])

    def _hear(self) -> None:
        for _ in range(self._count):
            self._connections.append(self._listener.accept())
        speaking: dict[Any, int] = {connection: number for number, connection in enumerate(self._connections)}
        while speaking:
            connection: Any
            for connection in wait(list(speaking)):
                try:
                    self._said.put({**connection.recv(), "from": speaking[connection]})
                except (EOFError, OSError):
                    del speaking[connection]


if __name__ == "__main__":
    main()
