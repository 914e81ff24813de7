"""The failure of 2018: a feature column is one on the driver, and a bare namedtuple on the executors."""

import json
import pickle
import sys

from pyspark import SparkConf, SparkContext

mode = sys.argv[1]
sys.path.append(sys.argv[2])
conf = SparkConf().setMaster("local[1]").set("spark.ui.enabled", "false")
sc = SparkContext(conf=conf)
import tensorflow as tf  # noqa: E402
from tensorflow.python.feature_column.feature_column import _FeatureColumn  # noqa: E402

from tfos_magic import namedtuple_patch  # noqa: E402

feature_columns = [tf.feature_column.numeric_column("x")]
column = feature_columns[0]


def name_of(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def reduce_of(value):
    """Return the class in the MRO whose reduction pickle will use; the two NumericColumns by what they derive from."""
    cls = next(cls for cls in type(value).__mro__ if {"__reduce__", "__reduce_ex__"} & set(vars(cls)))
    return f"{cls.__name__}(tuple)" if cls.__bases__ == (tuple,) else cls.__name__


def describe(value):
    back = pickle.loads(pickle.dumps(value))
    return {
        "is one": isinstance(value, _FeatureColumn),
        "mro": [cls.__name__ for cls in type(value).__mro__],
        "reduced by": reduce_of(value),
        "reduced to": value.__reduce_ex__(4)[0].__name__,
        "round trip": type(back) is type(value) and back == value,
    }


def look(_):
    from tensorflow.python.feature_column.feature_column import _FeatureColumn

    column = feature_columns[0]
    return isinstance(column, _FeatureColumn), f"{type(column).__module__}.{type(column).__qualname__}"


def make(_):
    import tensorflow as tf

    return tf.feature_column.numeric_column("made there")


def collected(rdd):
    try:
        (value,) = rdd.collect()  # not first(): Spark ends the worker of a task that it has not read to its end
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-200:]}"
    return [isinstance(value, _FeatureColumn), name_of(type(value))]


one = sc.parallelize([0], 1)
# The worker is warm: it has TensorFlow, and TensorFlow's classes have the patch.
facts = {"warm": one.map(lambda _: __import__("tensorflow").__version__).collect() != []}
facts["status"] = namedtuple_patch.status().to_json()
facts["driver before"] = describe(column)
if mode == "reverted":  # what was published at the time: this side only
    facts["report"] = namedtuple_patch.revert().to_json()
elif mode == "loaded":
    from tfos_magic import namedtuple_session
    from tfos_magic.namedtuple_jobs import CleanJobs

    namedtuple_patch.revert()
    jobs = CleanJobs()
    jobs.start()
facts["driver after"] = describe(column)
facts["after"] = namedtuple_patch.status().to_json()
facts["executor"] = one.map(look).collect()[0]
facts["from the executor"] = collected(one.map(make))
facts["through a shuffle"] = collected(
    one.map(lambda i: (i, make(i))).groupByKey().mapValues(list).values().map(lambda v: v[0])
)
if mode == "loaded":
    facts["session"] = namedtuple_session.survey(sc, jobs=jobs).to_json()
    facts["restored"] = namedtuple_session.restore(sc, jobs=jobs).to_json()
    facts["from the executor, restored"] = collected(one.map(make))
sc.stop()
print(json.dumps(facts))
