"""The failure of 2018: a feature column is one on the driver, and a bare namedtuple on the executors."""

import json
import sys

from pyspark import SparkConf, SparkContext

mode = sys.argv[1]
sys.path.append(sys.argv[2])
sc = SparkContext(conf=SparkConf().setMaster("local[1]").set("spark.ui.enabled", "false"))
import tensorflow as tf  # noqa: E402
from tensorflow.python.feature_column.feature_column import _FeatureColumn  # noqa: E402

from tfos_magic import namedtuple_patch  # noqa: E402

feature_columns = [tf.feature_column.numeric_column("x")]
facts = {"status": namedtuple_patch.status().to_json(), "driver": isinstance(feature_columns[0], _FeatureColumn)}
if mode == "reverted":
    facts["report"] = namedtuple_patch.revert().to_json()
    facts["after"] = namedtuple_patch.status().to_json()


def look(_):
    from tensorflow.python.feature_column.feature_column import _FeatureColumn

    column = feature_columns[0]
    return isinstance(column, _FeatureColumn), f"{type(column).__module__}.{type(column).__qualname__}"


facts["executor"] = sc.parallelize([0], 1).map(look).first()
sc.stop()
print(json.dumps(facts))
