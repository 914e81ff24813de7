"""Lets PySpark 3.2 run on Python ≥ 3.11, which its own cloudpickle does not know, in driver and Python workers."""

import sys

import cloudpickle
import cloudpickle.cloudpickle

sys.modules["pyspark.cloudpickle"] = cloudpickle
sys.modules["pyspark.cloudpickle.cloudpickle"] = cloudpickle.cloudpickle
