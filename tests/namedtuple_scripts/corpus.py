"""Print all namedtuple classes of a corpus, as they are in a process that was never patched, or after a revert."""

import importlib
import json
import sys
import time
from collections import Counter

from tfos_magic import namedtuple_patch

mode, *names = sys.argv[1:]
if mode == "plain":
    namedtuple_patch.prevent()
import pyspark.serializers  # noqa: E402, F401

for name in names:
    importlib.import_module(name)
before = namedtuple_patch.status().to_json()
started = time.thread_time()
report = namedtuple_patch.revert(keep_main=False).to_json() if mode == "reverted" else {}
report["cpu_seconds"] = time.thread_time() - started


def describe(cls):
    marks = [name for name in ("__reduce__", "_is_namedtuple_") if name in vars(cls)]
    return json.dumps([cls.__module__, cls.__qualname__, list(cls._fields), marks])


classes = [cls for cls in tuple.__subclasses__() if isinstance(vars(cls).get("_fields"), tuple)]
print(json.dumps({"status": before, "report": report, "classes": Counter(map(describe, classes))}))
