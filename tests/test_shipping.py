from __future__ import annotations

import asyncio
import collections
import contextvars
import dataclasses
import enum
import functools
import io
import pickle
import socket
import sqlite3
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from child_fixture import Child, notebook

import tfos_magic
from tfos_magic import shipping
from tfos_magic.cell import map_function
from tfos_magic.errors import EnvironmentMismatchError, ResultError, ShippingError

ROOT = str(Path(tfos_magic.__file__).parents[1])


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(tmp_path)


def pack_cell(body: str, namespace: dict[str, Any]) -> shipping.Payload:
    return shipping.pack(map_function(body, namespace, filename="<cell 7>", label="Cell In[7]"))


def refused(body: str, namespace: dict[str, Any]) -> ShippingError:
    with pytest.raises(ShippingError) as caught:
        pack_cell(body, namespace)
    return caught.value


# --- what cannot travel, and how it is reached ---------------------------------------------------------------


class Holder:
    """Has an attribute; lives in the notebook, as far as pickle can tell."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> Any:
        return self


class Slotted:
    __slots__ = ("lock", "other")

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.other = 1


class Careful:
    """Leaves its lock behind, as it should."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value = 3

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self.value}


Holder.__module__ = Slotted.__module__ = Careful.__module__ = "__main__"


def holding_in_closure(value: Any) -> Callable[[], Any]:
    def inner() -> Any:
        return value

    inner.__module__ = "__main__"
    return inner


def cycle(leaf: Any) -> Holder:
    top, child = Holder(), Holder()
    top.children, child.parent, child.leaf = [child], top, leaf
    return top


def holding_as_default(value: Any) -> Callable[..., Any]:
    def inner(x: Any = value) -> Any:
        return x

    inner.__module__ = "__main__"
    return inner


LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (LOCK, "it"),
        ({"opt": Holder(lock=LOCK)}, 'it["opt"].lock'),
        ([1, (2, {3: LOCK})], "it[1][1][3]"),
        (Slotted(LOCK), "it.lock"),
        (holding_in_closure({"a": LOCK}), 'it → value["a"]'),
        (holding_as_default([LOCK]), "it.__defaults__[0][0]"),
        (functools.partial(print, 1, LOCK, key=2), "it.args[1]"),
        (functools.partial(print, key=Holder(x=LOCK)), "it.keywords['key'].x"),
        (Holder(x=LOCK).method, "it.__self__.x"),
        (collections.defaultdict(list, {"k": [LOCK]}), 'it["k"][0]'),
        (collections.deque([LOCK]), "it[0]"),
        (collections.OrderedDict(k=LOCK), 'it["k"]'),
        ({(1, 2): LOCK}, "it[(1, 2)]"),
        (cycle(LOCK), "it.children[0].leaf"),
        (type("Model", (), {"__module__": "__main__", "lock": LOCK}), "it.lock"),
        (types.SimpleNamespace(a=types.SimpleNamespace(b=LOCK)), "it.a.b"),
    ],
)
def test_the_path_leads_through_containers_attributes_and_closures(value: Any, path: str) -> None:
    error = refused("it", {"it": value})
    assert error.path == path
    assert str(error).startswith(f"Cell In[7], line 2: {path} cannot travel to the executors: it is a lock.")


def test_the_path_begins_with_the_function_that_reads_a_global() -> None:
    namespace = notebook(
        "import threading",
        "class Opt:\n    def __init__(self): self.lock = threading.Lock()",
        "cfg = {'opt': Opt()}\ndef train_step(): return cfg",
    )
    assert refused("x = 1\ntrain_step()", namespace).path == 'train_step → cfg["opt"].lock'
    with pytest.raises(ShippingError) as caught:
        shipping.pack(namespace["train_step"])
    assert caught.value.path == 'train_step → cfg["opt"].lock'


def running() -> Iterator[int]:
    yield 1


async def coroutine() -> None: ...


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (threading.RLock, "a lock"),
        (threading.Event, "a thread"),
        (threading.Thread, "a thread"),
        (threading.local, "a thread"),
        (__import__("queue").Queue, "a thread"),
        (socket.socket, "a network connection"),
        (lambda: sqlite3.connect(":memory:"), "a database connection"),
        (lambda: open(__file__), "an open file"),  # noqa: SIM115  # the test closes it
        (lambda: open(__file__, "rb"), "an open file"),  # noqa: SIM115
        (running, "a generator"),
        (coroutine, "a generator"),
        (lambda: sys._getframe(), "a stack frame"),
        (lambda: memoryview(b"12"), "a view of memory"),
        (lambda: contextvars.ContextVar("v"), "a context variable"),
        (asyncio.new_event_loop, "a thread"),
    ],
)
def test_what_lives_in_one_process_is_refused_with_a_reason_and_a_way_out(make: Callable[[], Any], what: str) -> None:
    value = make()
    try:
        error = refused("it", {"it": {"deep": [value]}})
    finally:
        if hasattr(value, "close"):
            value.close()
    assert error.path == 'it["deep"][0]'
    assert f"it is {what}" in error.fact
    assert error.cause and error.hint


def test_a_cached_function_of_the_notebook_says_how_to_ship_it() -> None:
    namespace = notebook("import functools\n@functools.lru_cache\ndef cached(): return 1")
    error = refused("cached()", namespace)
    assert "cached by functools" in error.fact
    assert "__wrapped__" in error.hint


@pytest.mark.parametrize(
    "name", ["DataFrame", "SparkSession", "SparkContext", "RDD", "Column", "Broadcast", "Accumulator"]
)
def test_spark_s_own_objects_are_recognised_by_their_class(name: str) -> None:
    fake = type(name, (), {"__module__": f"pyspark.sql.classic.{name.lower()}"})()
    error = refused("x = df", {"df": fake})
    assert "df cannot travel" in error.fact
    assert "Spark" in error.fact
    assert "driver" in error.cause


def test_objects_of_other_libraries_with_the_same_names_may_travel() -> None:
    for module in ("pandas.core.frame", "pysparkling.sql", "__main__"):
        assert pack_cell("df", {"df": type("DataFrame", (), {"__module__": module})()}).objects


def test_an_object_that_refuses_by_itself_is_named_with_its_own_words() -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise RuntimeError("not today")

    error = refused("it", {"it": [Stubborn()]})
    assert error.path == "it[0]"
    assert "RuntimeError: not today" in error.cause


def test_something_nested_without_end_is_an_error_not_a_crash() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in str(refused("it", {"it": deep}))
    while deep:  # its destructor would recurse as well
        deep = deep.pop()


def test_kernel_objects_are_refused() -> None:
    from IPython.core.getipython import get_ipython

    assert "kernel" in str(refused("get_ipython()", {"get_ipython": get_ipython}))


def test_an_object_that_leaves_its_lock_behind_may_travel() -> None:
    assert pack_cell("it", {"it": Careful()}).objects[0].kind == "Careful"


def test_a_name_that_the_cell_assigns_itself_is_left_behind_when_it_cannot_travel() -> None:
    payload = pack_cell("for v in []:\n    loss = v\nprint(loss)", {"loss": LOCK})
    assert payload.objects == ()
    assert payload.warnings == ("The notebook's loss cannot travel and was left behind: the cell assigns its own.",)


def test_args_are_checked_too() -> None:
    with pytest.raises(ShippingError) as caught:
        shipping.pack(map_function("1", {}, filename="<cell>"), args={"lock": LOCK})
    assert caught.value.path == 'args["lock"]'


# --- what does travel ----------------------------------------------------------------------------------------


def test_objects_are_listed_with_kind_size_and_the_way_they_travel() -> None:
    import numpy

    namespace = notebook("class Mine: pass\ndef step(): return 1\nmine = Mine()")
    namespace.update(np=numpy, block=bytes(5000), Path=Path)
    payload = pack_cell("step(); np; block; mine; Mine; Path", namespace)
    rows = {each.name: (each.kind, each.how) for each in payload.objects}
    assert rows == {
        "block": ("bytes", "by value"),
        "mine": ("Mine", "by value"),
        "Mine": ("class", "by value"),
        "step": ("function", "by value"),
        "np": ("module", "by import of numpy"),
        "Path": ("class", "by import of pathlib"),
    }
    assert payload.objects[0].name == "block"
    assert 5000 <= payload.objects[0].size_bytes < 5100
    assert [module.name for module in payload.modules] == ["numpy"]
    assert payload.modules[0].file.endswith("numpy/__init__.py")
    assert not payload.modules[0].is_local


def test_the_bytes_of_equal_cells_are_equal() -> None:
    namespace = notebook("a = {'x': 1}\ndef f(): return a, b, c\nb = c = 2")
    assert pack_cell("f(), a", namespace).data == pack_cell("f(), a", namespace).data


def test_something_large_is_named_with_its_size_and_path() -> None:
    namespace = notebook("numbers = list(range(3_000_000))\ndef uses(): return numbers\ndef calls(): return uses()")
    (warning,) = pack_cell("calls()", namespace).warnings
    assert warning.startswith("calls → uses → numbers adds 15 MB")


def test_modules_beside_the_notebook_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_notebook.py").write_text("def f(): return 1\n")
    (tmp_path / "beside_too.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import beside_notebook  # type: ignore[import-not-found]

    payload = pack_cell("import beside_too, nowhere_at_all\nf()", {"f": beside_notebook.f})
    modules = {module.name: module for module in payload.modules}
    assert modules["beside_notebook"].is_local
    assert modules["beside_too"].is_local  # found without being imported
    assert "beside_too" not in sys.modules
    assert (modules["nowhere_at_all"].file, modules["nowhere_at_all"].is_local) == ("", False)
    del sys.modules["beside_notebook"]


def test_functions_classes_closures_and_instances_arrive(child: Child) -> None:
    namespace = notebook(
        "import dataclasses, enum, functools, collections, typing",
        "@dataclasses.dataclass\nclass P:\n    x: int\n    def double(self): return self.x * factor",
        "class Color(enum.Enum):\n    RED = 1",
        "NT = collections.namedtuple('NT', 'a b')\nclass Typed(typing.NamedTuple):\n    a: int = 4",
        "factor = 3\ndef adder(n):\n    return lambda v: v + n + factor",
        "add = adder(10)\np = P(2)\npart = functools.partial(add, 1)",
    )
    body = "p.double(), add(1), part(), Color.RED is type(Color.RED).RED, NT(1, 2).b, Typed().a, isinstance(p, P)"
    assert child.run_cell(body, namespace) == (6, 14, 14, True, 2, 4, True)


def test_a_function_of_an_importable_module_goes_by_reference(child: Child) -> None:
    payload = shipping.pack(contextvars.copy_context)
    assert payload.objects[0].how == "by import of _contextvars"
    assert shipping.unpack(payload.data) is contextvars.copy_context


def test_args_arrive_with_the_function(child: Child) -> None:
    assert child.run_cell("args['rate'] * 2, ctx", {}, args={"rate": 4}) == (8, "ctx")


def test_ipython_s_open_becomes_python_s_inside_notebook_functions(child: Child) -> None:
    from IPython.core.interactiveshell import _modified_open

    namespace = notebook("def read(): return open.__module__.strip('_'), 'IPython' in __import__('sys').modules")
    namespace["open"] = _modified_open
    assert child.run_cell("read()", namespace) == ("io", False)


def test_another_python_is_refused_before_anything_is_unpickled() -> None:
    data = pickle.dumps(shipping._Envelope((3, 1), {}, b"no pickle at all"))
    with pytest.raises(EnvironmentMismatchError, match=r"Python 3\.1"):
        shipping.unpack(data)


def test_a_source_of_a_file_that_exists_here_is_not_shadowed() -> None:
    import linecache

    shipping.install_source(__file__, "other")
    assert "other" not in linecache.cache.get(__file__, (0, 0, []))[2]


def test_shipping_imports_neither_spark_nor_tensorflow_nor_ipython(child: Child) -> None:
    body = "import sys\nsorted({'pyspark', 'tensorflow', 'IPython', 'keras', 'ipywidgets'} & set(sys.modules))"
    assert child.run_cell(body, {}) == []


# --- what comes back -----------------------------------------------------------------------------------------


def test_results_come_back(child: Child) -> None:
    body = "import numpy as np\n{'a': np.arange(3), 'b': [1.5, None, 'x'], 'c': args}"
    value = child.run_cell(body, {}, args=(1, 2))
    assert value["a"].tolist() == [0, 1, 2]
    assert (value["b"], value["c"]) == ([1.5, None, "x"], (1, 2))


def test_a_keras_history_comes_back_as_its_figures() -> None:
    history = type("History", (), {"__module__": "keras.src.callbacks.history"})()
    history.history, history.model = {"loss": [1.0]}, LOCK
    assert shipping.unpack_result(shipping.pack_result([history])) == [{"loss": [1.0]}]


def test_a_result_that_cannot_travel_says_what_it_is() -> None:
    with pytest.raises(ResultError) as caught:
        shipping.pack_result({"n": 1, "deep": [LOCK]})
    assert "a dict that cannot travel to the driver" in caught.value.fact
    assert "lock" in caught.value.fact  # its repr
    assert 'value["deep"][0]' in caught.value.cause


def test_a_result_that_the_driver_cannot_make_is_an_error_of_ours() -> None:
    data = pickle.dumps(collections.OrderedDict()).replace(b"collections", b"kollektions")
    with pytest.raises(ResultError, match="kollektions"):
        shipping.unpack_result(data)


CLASSES = """
import dataclasses, enum
G = 1
class M:
    tag = "old"
    def f(self): return G
@dataclasses.dataclass
class D:
    x: int = 1
class E(enum.Enum):
    A = 1
"""


def test_live_classes_of_the_notebook_keep_their_globals_and_attributes(child: Child) -> None:
    """What Spark's own collect() gets wrong: cloudpickle gives the driver's class the state of its copy."""
    namespace = notebook(CLASSES)
    blob = child.run_raw(shipping.pack(map_function("(M(), M, D(5), E.A)", namespace, filename="<cell>")))
    mine = namespace["M"]
    mine.tag, mine.added, namespace["G"] = "new", True, 99
    instance, same, record, member = shipping.unpack_result(blob)
    assert same is mine
    assert type(instance) is mine
    assert (mine.tag, mine.added, instance.f(), mine().f()) == ("new", True, 99, 99)
    assert mine.f.__globals__ is namespace
    assert record == namespace["D"](5)
    assert member is namespace["E"].A


def test_the_leak_that_this_prevents_is_real(child: Child) -> None:
    namespace = notebook(CLASSES)
    blob = child.run_raw(shipping.pack(map_function("M()", namespace, filename="<cell>")))
    namespace["M"].tag = "new"
    pickle.loads(blob)
    assert namespace["M"].tag == "old"


def test_classes_made_by_the_cell_come_home_whole(child: Child) -> None:
    first, second = child.run_cell("class New:\n    k = 4\n    def f(self): return self.k\n[New(), New()]", {})
    assert type(first) is type(second)
    assert first.f() == 4


# --- no false alarms -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    a: int = 1


class Kind(enum.Enum):
    A = 1


def healthy_objects() -> Iterator[Any]:
    import decimal
    import logging
    import random
    import re
    import uuid

    import numpy
    import pandas

    yield from (1, "s", b"b", None, ..., 1j, {1}, frozenset({2}), range(3), slice(1), bytearray(b"x"), object())
    yield from (
        Record(),
        Kind.A,
        Path("x"),
        decimal.Decimal(1),
        uuid.uuid4(),
        re.compile("a"),
        iter([1]),
        zip([1], [2], strict=True),
    )
    yield from (numpy.arange(3), numpy.random.default_rng(1), numpy.float32(1), numpy.dtype("i4"), numpy.add)
    yield from (pandas.DataFrame({"a": [1]}), pandas.Timestamp(0), random.Random(1), logging.getLogger("x"))
    yield from (functools.partial(print, 1), len, [].append, Record, Record().__init__, property(len), io.BytesIO(b"x"))
    yield from (holding_in_closure([1, 2]), collections.Counter("aa"), io.StringIO("x"))


def test_healthy_objects_raise_no_alarm() -> None:
    for value in healthy_objects():
        payload = pack_cell("it", {"it": value})
        assert payload.warnings == (), value


# --- the real things -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # PySpark 3.5 closes none itself
def test_real_spark_objects_are_refused_wherever_they_hide(spark_local4: Any) -> None:
    from pyspark.sql import functions

    spark, context = spark_local4, spark_local4.sparkContext
    frame = spark.range(3)
    cases = {
        "session": spark,
        "context": context,
        "frame": frame,
        "grouped": frame.groupBy("id"),
        "reader": spark.read,
        "rdd": context.parallelize([1]),
        "column": functions.col("id"),
        "broadcast": context.broadcast([1]),
        "accumulator": context.accumulator(0),
        "jvm": context._jvm,
        "java_object": context._jsc,
    }
    for name, value in cases.items():
        error = refused("it", {"it": {"cfg": Holder(x=[value])}})
        assert error.path == 'it["cfg"].x[0]', name
        assert "it is" in error.fact, name
        assert error.hint, name
    cases["broadcast"].destroy()
    assert pack_cell("schema, row", {"schema": frame.schema, "row": frame.first()}).objects


TENSORFLOW = """
import sys, threading
import tensorflow as tf
from tensorflow import keras
from tfos_magic import shipping
from tfos_magic.cell import map_function
from tfos_magic.errors import ShippingError

@tf.function
def called(x): return x
called(tf.constant(1))

@tf.function
def fresh(x): return x

model = keras.Sequential([keras.layers.Dense(2)])
model.compile("adam", "mse")
model.build((None, 3))
dataset = tf.data.Dataset.range(3)

broken = {
    "called": called,
    "dataset": dataset,
    "mapped": dataset.map(lambda x: x).batch(2),
    "iterator": iter(dataset),
    "strategy": tf.distribute.get_strategy(),
    "mirrored": tf.distribute.OneDeviceStrategy("cpu"),
    "graph": tf.Graph(),
    "concrete": called.get_concrete_function(tf.constant(1)),
    "table": tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a"], [1]), 0),
    "checkpoint": tf.train.Checkpoint(v=tf.Variable(1)),
}
healthy = {
    "tf": tf, "keras": keras, "lazy": tf.keras, "fresh": fresh, "model": model, "layer": keras.layers.Dense(1),
    "tensor": tf.constant(1), "variable": tf.Variable(1.0), "dtype": tf.float32, "shape": tf.TensorShape([1]),
    "optimizer": keras.optimizers.Adam(), "loss": keras.losses.MeanSquaredError(), "signature": tf.TensorSpec([1]),
}
def pack(value):
    return shipping.pack(map_function("it", {"it": [value]}, filename="<cell>"))
for name, value in broken.items():
    try:
        pack(value)
        print(name, "NOT REFUSED")
    except ShippingError as error:
        print(name, "|", error.path, "|", "it is" in error.fact, "|", bool(error.hint))
for name, value in healthy.items():
    payload = pack(value)
    shipping.unpack(payload.data)(None, None)
    print(name, "fine")
history = model.fit(tf.ones((4, 3)), tf.ones((4, 2)), verbose=0)
print(list(shipping.unpack_result(shipping.pack_result(history))))
"""


@pytest.mark.slow
def test_real_tensorflow_objects(spark_script: Any) -> None:
    lines = spark_script(TENSORFLOW, env={"PYTHONPATH": ROOT, "TF_CPP_MIN_LOG_LEVEL": "3"}).stdout.splitlines()
    assert [line for line in lines if "|" in line and not line.endswith("| it[0] | True | True")] == []
    assert "NOT REFUSED" not in " ".join(lines)
    assert len([line for line in lines if line.endswith("fine")]) == 13
    assert lines[-1] == "['loss']"
