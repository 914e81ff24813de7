"""Ordinary Spark jobs with namedtuples of a module, where executors patch; prints what arrived where, as JSON.

    executors.py MODE ROOT MASTER [EXECUTOR_ENV]

MODE: `patched` loads nothing, `late` loads the extension when the session is there and its workers are warm, `early`
before PySpark is imported. EXECUTOR_ENV ``1`` sets the variable for executors only.
"""

import contextlib
import io
import json
import os
import sys

mode, root, master, executor_env = sys.argv[1:5]
sys.path.append(root)
HERE = os.path.dirname(os.path.abspath(__file__))
facts = {}

from IPython.core.interactiveshell import InteractiveShell  # noqa: E402

shell = InteractiveShell(user_module=sys.modules["__main__"], user_ns=globals())


def load():
    before = set(sys.modules)
    shell.run_line_magic("load_ext", "tfos_magic")
    facts["load imports pyspark"] = "pyspark" in set(sys.modules) - before


if mode == "early":
    load()

from pyspark import SparkConf, SparkContext  # noqa: E402
from pyspark.sql import SparkSession  # noqa: E402
from pyspark.sql import functions as F  # noqa: E402

conf = SparkConf().setMaster(master).set("spark.ui.enabled", "false").set("spark.ui.showConsoleProgress", "false")
if executor_env:
    conf.set("spark.executorEnv.PYSPARK_ENABLE_NAMEDTUPLE_PATCH", executor_env)
    conf.set("spark.executorEnv.PYTHONPATH", os.path.join(HERE, "with_users_own"))
sc = SparkContext(conf=conf)
sc.setLogLevel("ERROR")
spark = SparkSession(sc)
sc.addPyFile(os.path.join(HERE, "shapes.py"))
import shapes  # noqa: E402

numbers = sc.parallelize(range(4), 4)
frame = spark.range(0, 4, 1, 4)


def is_patched():
    import collections

    import shapes  # in warm workers its classes carry the patch by now

    marked = sum("_hack_namedtuple" in getattr(cls.__reduce__, "__qualname__", "") for cls in tuple.__subclasses__())
    return ["_hack_namedtuple" in collections.namedtuple.__code__.co_names, marked, len(shapes.ALL)]


def ask():
    import os

    return json.dumps([os.getpid(), *is_patched()[:2]])


def states():
    """Return [patched, classes marked] of the workers, asked in all the ways in which jobs run."""

    def in_pandas(values):
        return values.map(lambda _: ask())

    def frames(batches):
        import pandas as pd

        for batch in batches:
            yield pd.DataFrame({"answer": [ask() for _ in range(len(batch))]})

    def arrow(batches):
        import pyarrow as pa

        for batch in batches:
            yield pa.RecordBatch.from_pydict({"answer": [ask() for _ in range(batch.num_rows)]})

    ways = {
        "rdd.map": numbers.map(lambda _: ask()).collect,
        "mapPartitions": numbers.mapPartitions(lambda part: [ask() for _ in part]).collect,
        "barrier": sc.parallelize(range(2), 2).barrier().mapPartitions(lambda part: [ask() for _ in part]).collect,
        "reduce side": numbers.map(lambda i: (i, i)).groupByKey(2).map(lambda _: ask()).collect,
        "udf": lambda: [row[0] for row in frame.select(F.udf(lambda _: ask())("id")).collect()],
        "sql udf": lambda: (
            spark.udf.register("ask", lambda _: ask())
            and [r[0] for r in spark.sql("select ask(id) from range(0, 4, 1, 4)").collect()]
        ),
        "pandas udf": lambda: [row[0] for row in frame.select(F.pandas_udf(in_pandas, "string")("id")).collect()],
        "mapInPandas": lambda: [row[0] for row in frame.mapInPandas(frames, "answer string").collect()],
        "applyInPandas": lambda: [
            row[0]
            for row in frame.groupBy("id").applyInPandas(lambda group: next(frames([group])), "answer string").collect()
        ],
    }
    if hasattr(frame, "mapInArrow"):
        ways["mapInArrow"] = lambda: [row[0] for row in frame.mapInArrow(arrow, "answer string").collect()]
    answers = {name: list(map(json.loads, way())) for name, way in ways.items()}
    pids = {pid for each in answers.values() for pid, *_ in each}
    return {name: sorted({tuple(rest) for _, *rest in each}) for name, each in answers.items()}, pids


def attempt(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-300:]}"


def kinds(values):
    return [f"{type(value).__module__}.{type(value).__qualname__}" for value in values]


def ways():
    """Return what becomes of the module's namedtuples on every way."""
    held = shapes.ALL

    def there(_):
        import shapes

        return shapes.ALL

    def is_right(values):
        import shapes

        return [type(mine) is type(value) and mine == value for mine, value in zip(shapes.ALL, values, strict=True)]

    broadcast = sc.broadcast(held)
    circles = sc.parallelize(range(8), 4).map(lambda i: (__import__("shapes").Circle(i % 2, 0, 1), i))
    found = {
        "closure": attempt(lambda: numbers.map(lambda _: is_right(held)).collect()[0]),
        "data": attempt(lambda: sc.parallelize([held], 1).map(is_right).collect()[0]),
        "broadcast": attempt(lambda: numbers.map(lambda _: is_right(broadcast.value)).collect()[0]),
        "result": attempt(lambda: kinds(numbers.map(there).collect()[0])),
        "shuffle": attempt(
            lambda: (
                sc.parallelize([0], 1)
                .map(lambda i: (i, there(i)))
                .groupByKey(2)
                .map(lambda pair: is_right(next(iter(pair[1]))))
                .collect()[0]
            )
        ),
        "keys": attempt(
            lambda: sorted((kinds([key])[0], key.x, sum(group)) for key, group in circles.groupByKey(3).collect())
        ),
        "methods": attempt(lambda: circles.reduceByKey(lambda a, b: a + b).map(lambda pair: pair[0].area()).collect()),
        "cached": attempt(lambda: numbers.map(there).cache().map(is_right).collect()[0]),
        "udf": attempt(lambda: frame.select(F.udf(lambda _: str(is_right(held)))("id")).collect()[0][0]),
        "rows": attempt(lambda: [list(row) for row in spark.createDataFrame([shapes.Plain(1, 2)]).collect()]),
    }
    broadcast.destroy()
    return found


def made_in_tasks():
    """Classes that a notebook's function makes on the executors."""
    from collections import namedtuple

    def make(i):
        Made = namedtuple("Made", "i")
        return Made(i)

    found = numbers.map(make).collect()
    return [type(value).__name__ for value in found], [tuple(value) for value in found]


if mode != "early":
    facts["before"], pids = states()
    facts["ways before"] = ways()
if mode == "late":
    load()
if mode != "patched":
    facts["after"], later = states()
    facts["same workers"] = mode == "late" and bool(later & pids)
    facts["ways after"] = ways()
    facts["sitecustomize"] = numbers.map(lambda _: hasattr(__import__("sys"), "users_own")).distinct().collect()
    facts["made in tasks"] = made_in_tasks()
    facts["nothing left in Spark"] = sorted(sc.environment.items())
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for action in ("status", "restore", "status", "revert"):
            shell.run_line_magic("tfos_namedtuple", action)
    facts["magic"] = [line for line in shown.getvalue().splitlines() if line.startswith("namedtuple patch: ")]
    facts["after again"], _ = states()
    shell.run_line_magic("unload_ext", "tfos_magic")
    facts["unloaded"], _ = states()
    home = sys.modules.get("pyspark.core.rdd") or sys.modules["pyspark.rdd"]
    holders = [m for n, m in sys.modules.items() if n.startswith("pyspark.") and "_prepare_for_python_RDD" in vars(m)]
    facts["pyspark as it was"] = {m._prepare_for_python_RDD.__module__ for m in holders} == {home.__name__}
sc.stop()
print(json.dumps(facts))
