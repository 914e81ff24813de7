"""Run in a process where importing PySpark patches namedtuple; prints what revert and restore did, as JSON."""

import collections
import copy
import importlib
import inspect
import json
import pickle
import sys
import threading
import typing
import urllib.parse
from collections import namedtuple

original_code = collections.namedtuple.__code__
original_kwdefaults = dict(collections.namedtuple.__kwdefaults__)

import pyspark.serializers  # noqa: E402

from tfos_magic import namedtuple_patch  # noqa: E402

PLANTED = ("_old_namedtuple", "_old_namedtuple_kwdefaults", "_hack_namedtuple", "_tfos_magic_make_namedtuple")
facts = {}

Before = namedtuple("Before", "x y")
FLAG = "__hijack"
Renamed = namedtuple("Renamed", "x class", rename=True)


class TypedBefore(typing.NamedTuple):
    x: int
    y: int = 7

    def total(self):
        return self.x + self.y


class SubBefore(Before):
    def total(self):
        return self.x + self.y


class SameName(namedtuple("SameName", "x")):
    pass


def make_hidden():
    return namedtuple("Hidden", "x")


Hidden_ = make_hidden()  # found under another name only: pickle will not find it


def snapshot():
    """What PySpark's patch consists of."""
    space = vars(collections)
    return {
        "code": collections.namedtuple.__code__,
        "kwdefaults": collections.namedtuple.__kwdefaults__,
        "flag": getattr(collections.namedtuple, FLAG, None),
        "planted": {name: space.get(name) for name in PLANTED},
        "classes": {
            cls: (cls.__module__, cls.__dict__.get("__reduce__"), cls.__dict__.get("__reduce_ex__"))
            for cls in tuple.__subclasses__()
            if "_fields" in cls.__dict__
        },
    }


def round_trip(value):
    data = pickle.dumps(value)
    back = pickle.loads(data)
    return {"same type": type(back) is type(value), "equal": back == value, "bytes": len(data)}


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


parsed = urllib.parse.urlparse("http://host/path")  # ParseResult derives from a namedtuple made before the patch
imported_late = importlib.import_module("sched").Event  # made after it, found by its name
late = imported_late(1.0, 0, 0, print, (), {})

facts["status before"] = namedtuple_patch.status().to_json()
facts["signature before"] = str(inspect.signature(collections.namedtuple))
facts["trip before"] = {
    "sub": round_trip(SubBefore(1, 2)),
    "typed": round_trip(TypedBefore(1)),
    "late": round_trip(late),
    "copied sub": type(copy.copy(SubBefore(1, 2))) is SubBefore,
    "renamed": error_of(lambda: pickle.loads(pickle.dumps(Renamed(1, 2)))),
}
patched = snapshot()

reports = []
barrier = threading.Barrier(8)


def revert_together():
    barrier.wait()
    reports.append(namedtuple_patch.revert(keep_main=False))


threads = [threading.Thread(target=revert_together) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
facts["reports"] = [report.to_json() for report in reports]
facts["plain after revert"] = {
    "code": collections.namedtuple.__code__ is original_code,
    "kwdefaults": collections.namedtuple.__kwdefaults__ == original_kwdefaults,
    "planted": [name for name in PLANTED if name in vars(collections)],
    "signature": str(inspect.signature(collections.namedtuple)),
}
facts["status reverted"] = namedtuple_patch.status().to_json()
importlib.reload(pyspark.serializers)
facts["still off after re-import"] = not namedtuple_patch.status().is_patched
After = namedtuple("After", "x")
facts["plain after"] = {"module": After.__module__, "reduce": [n for n in vars(After) if "reduce" in n]}
facts["late after plain"] = {
    **round_trip(late),
    "module": imported_late.__module__,
    "reduce": [n for n in vars(imported_late) if "reduce" in n or n == "_is_namedtuple_"],
}

facts["restored"] = namedtuple_patch.restore().to_json()
# reload() above has made new functions in PySpark; the ones planted are those of before.
facts["restore is exact"] = {key: value == patched[key] for key, value in snapshot().items() if key != "classes"}
now = snapshot()["classes"]
facts["classes not restored"] = [str(cls) for cls, was in patched["classes"].items() if now[cls] != was]
facts["restored twice"] = namedtuple_patch.restore().to_json() == facts["restored"]

facts["driver report"] = namedtuple_patch.revert().to_json()
facts["driver revert again"] = namedtuple_patch.revert().to_json()
facts["status guarded"] = namedtuple_patch.status().to_json()
facts["guard"] = {
    "signature": str(inspect.signature(collections.namedtuple)),
    "error": error_of(lambda: namedtuple("P")),
    "bad name": error_of(lambda: namedtuple("P", "x x")),
}

Point = namedtuple("Point", "x y", defaults=(5,))


class Typed(typing.NamedTuple):
    x: int
    y: int = 7

    def total(self):
        return self.x + self.y


class Sub(Point):
    def total(self):
        return self.x + self.y


Sub.ORIGIN = Sub(0, 0)
method_globals = Typed.total.__globals__ is globals()
values = {
    "before": Before(1, 2),
    "typed before": TypedBefore(1),
    "sub before": SubBefore(1, 2),
    "same name": SameName(1),
    "hidden": Hidden_(1),
    "renamed": Renamed(1, 2),
    "point": Point(1),
    "typed": Typed(1),
    "sub": Sub(1, 2),
    "parsed": parsed,
    "late": late,
}
facts["trip after"] = {name: round_trip(value) for name, value in values.items()}
facts["copies"] = {name: type(copy.copy(v)) is type(v) and copy.deepcopy(v) == v for name, v in values.items()}
facts["class untouched by its return"] = method_globals and Typed.total.__globals__ is globals()
facts["protocols"] = [pickle.loads(pickle.dumps(Typed(1), protocol)) == Typed(1) for protocol in range(6)]
other = namedtuple("Other", "x", module="somewhere")
facts["outside main"] = {"module": other.__module__, "reduce": [n for n in vars(other) if "reduce" in n]}
rows = [Point(i, i) for i in range(1000)]
facts["bytes per row"] = (len(pickle.dumps(rows)) - len(pickle.dumps(rows[:1]))) / 999
with open(sys.argv[1], "wb") as out:
    mains = ("point", "typed", "sub", "before", "typed before", "sub before", "hidden")
    pickle.dump({name: pickle.dumps(values[name]) for name in mains}, out)

facts["restored from guard"] = namedtuple_patch.restore().to_json()
facts["guard gone"] = "_tfos_magic_make_namedtuple" not in vars(collections)
facts["point as pyspark has it"] = "_restore" in str(Point(1).__reduce__()[0])

print(json.dumps(facts))
