"""Send namedtuples of __main__ through every way that Spark has, patched or reverted; prints what arrived."""

import json
import sys
import typing
from collections import namedtuple

from pyspark import SparkConf, SparkContext

mode = sys.argv[1]
sys.path.append(sys.argv[2])

conf = SparkConf().setMaster("local[2]").set("spark.ui.enabled", "false")
Early = namedtuple("Early", "x y")  # marked by the patch before the revert
sc = SparkContext(conf=conf)
early_rdd = sc.parallelize([(1, 2)], 1).map(lambda pair: Early(*pair))
early_rdd.count()  # warm workers

if mode != "patched":
    from tfos_magic import namedtuple_patch

    namedtuple_patch.revert()
if mode == "session":  # workers, too
    from tfos_magic.namedtuple_jobs import CleanJobs

    CleanJobs().start()

Point = namedtuple("Point", "x y", defaults=(5,))
GAIN = 1


class Typed(typing.NamedTuple):
    x: int
    y: int = 7

    def total(self):
        return (self.x + self.y) * GAIN


class Sub(Point):
    def total(self):
        return self.x + self.y


def run(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-300:]}"


def ways(cls):
    items = [cls(i, i + 1) for i in range(4)]
    rdd = sc.parallelize(items, 2)
    broadcast = None

    def broadcast_value():
        nonlocal broadcast
        broadcast = sc.broadcast(items[1])
        sent = broadcast
        return sc.parallelize([0], 1).map(lambda _: (type(sent.value).__name__, sent.value.y)).collect()

    found = {
        "closure": run(lambda: sc.parallelize([0], 1).map(lambda _, v=items[1]: (isinstance(v, cls), v.y)).collect()),
        "data": run(lambda: rdd.map(lambda v: (type(v).__name__, v.x)).collect()),
        "data is": run(lambda: rdd.map(lambda v: isinstance(v, cls)).collect()),
        "broadcast": run(broadcast_value),
        "result": run(lambda: [(type(v) is cls, v.x) for v in rdd.map(lambda v: v).collect()]),
        "made there": run(
            lambda: [(type(v) is cls, v.x) for v in sc.parallelize([8], 1).map(lambda i: cls(i, i)).collect()]
        ),
        "shuffle": run(
            lambda: sorted(
                (k.x, type(k) is cls, sum(v))
                for k, v in rdd.map(lambda v: (v, 1)).union(rdd.map(lambda v: (v, 2))).groupByKey(2).collect()
            )
        ),
        "distinct": run(lambda: rdd.union(rdd).distinct().count()),
    }
    if broadcast is not None:
        broadcast.destroy()
    return found


facts = {cls.__name__: ways(cls) for cls in (Early, Point, Typed, Sub)}
facts["methods in data"] = run(lambda: sc.parallelize([Typed(1, 2), Typed(3)], 1).map(lambda v: v.total()).collect())
GAIN = 100
facts["methods afterwards"] = Typed(1, 2).total()
facts["early again"] = run(lambda: [type(v) is Early for v in early_rdd.collect()])
sc.stop()
print(json.dumps(facts))
