"""Show each entry of the corpus on a real Spark, then ask the doctor; one line of JSON for each.

Arguments: what is there besides Spark (``tensorflow``), and a folder that is in PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

from doctor_corpus import CORPUS, Entry
from pyspark import cloudpickle
from pyspark.sql import SparkSession

from tfos_magic.doctor import Doctor, SecondInterpreter

warnings.simplefilter("ignore")


def look_at(entry: Entry, interpreter: SecondInterpreter, given: dict[str, Any]) -> dict[str, Any]:
    with entry.made(**given, cloudpickle=cloudpickle) as made:
        shown = bool(eval(entry.shown, made.namespace)) if entry.shown else None
        before = sorted(made.namespace)
        doctor = Doctor(made.namespace, interpreter)
        started = time.perf_counter()
        diagnosis = doctor.examine(made.value, entry.asked)
        seconds = time.perf_counter() - started
        fast = doctor.examine(made.value, entry.asked, fast=True)
        assert sorted(made.namespace) == before
        json.dumps(diagnosis.to_json())
        return {
            "name": entry.name,
            "shown": shown,
            "verdict": diagnosis.verdict.word,
            "findings": [[f.verdict.word, f.trap, f.words, f.why, f.fix] for f in diagnosis.findings],
            "fast": [[f.verdict.word, f.trap, f.words] for f in fast.findings],
            "trip": diagnosis.trip.to_json() if diagnosis.trip else None,
            "pickles": diagnosis.pickles,
            "seconds": seconds,
        }


def main() -> None:
    wanted = {"spark", *sys.argv[1].split(",")}
    spark = SparkSession.builder.getOrCreate()
    given = {"spark": spark, "sc": spark.sparkContext, "SHARED": sys.argv[2]}
    with SecondInterpreter() as interpreter:
        interpreter.start()
        for entry in CORPUS:
            if not entry.needs <= wanted:
                continue
            try:
                said = look_at(entry, interpreter, given)
            except Exception as error:
                said = {"name": entry.name, "error": f"{type(error).__name__}: {str(error)[:2000]}"}
            print("CASE", json.dumps(said), flush=True)
    spark.stop()


if __name__ == "__main__":
    assert sys.argv[2] in os.environ["PYTHONPATH"]
    main()
