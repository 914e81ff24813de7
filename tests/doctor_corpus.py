"""Objects that break, arrive as something else or cost much, and healthy ones: what a pickling doctor must know.

Data, with no test in it: the traps are shown on a real Spark and diagnosed in test_doctor_traps.py, and benchmarks may
compare other tools on the same objects. Each entry is a notebook cell and what is asked about it.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FINE, COSTLY, WRONG, BREAKS = "fine", "costly", "silently wrong", "breaks"

_SHARED = """
def run(function, tasks=3):
    return sc.parallelize(range(tasks), tasks).map(function).collect()

def error(function):
    try:
        run(function)
    except Exception as caught:
        return str(caught)
    return ""
"""


@dataclass(frozen=True)
class Entry:
    """One object.

    Attributes
    ----------
    name : str
    cell : str
        What the notebook has run. ``PLACE`` is a temporary folder, ``SHARED`` one that was in ``PYTHONPATH`` before
        Spark and the doctor started; ``sc`` and ``spark`` are there where it needs Spark.
    asked : str
        The expression that gives the object.
    verdict, trap, path : str
        What is to be said; the path in words. No trap for healthy objects.
    shown : str
        An expression that is true where a real Spark does what the diagnosis says; ``run(f)`` collects ``f`` over three
        tasks, ``error(f)`` is the text of its failure.
    needs : frozenset of str
        ``spark``, ``tensorflow``.
    """

    name: str
    cell: str
    asked: str
    verdict: str = FINE
    trap: str = ""
    path: str = ""
    shown: str = ""
    needs: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def made(self, **given: Any) -> Iterator[Made]:
        """Run the cell in a ``__main__`` of its own, which is in place as long as the context lasts."""
        main = types.ModuleType("__main__")
        before, path, modules = sys.modules["__main__"], list(sys.path), set(sys.modules)
        filename = f"<cell of {self.name}>"
        linecache.cache[filename] = (len(self.cell), None, self.cell.splitlines(keepends=True), filename)
        with tempfile.TemporaryDirectory() as place:
            main.__dict__.update(given, PLACE=place)
            sys.modules["__main__"] = main
            try:
                exec(compile(_SHARED, "<shared>", "exec"), main.__dict__)
                exec(compile(self.cell, filename, "exec"), main.__dict__)
                yield Made(eval(self.asked, main.__dict__), main.__dict__)
            finally:
                if "clean_up" in main.__dict__:
                    main.__dict__["clean_up"]()
                sys.modules["__main__"] = before
                sys.path[:] = path
                for name in set(sys.modules) - modules:
                    if name.startswith("corpus_"):
                        del sys.modules[name]


@dataclass(frozen=True)
class Made:
    """A made object, and the notebook around it."""

    value: Any
    namespace: dict[str, Any] = field(repr=False)


SPARK = frozenset({"spark"})
TENSORFLOW = frozenset({"tensorflow"})

_QUIET = "import os; os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')\n"

BROKEN: tuple[Entry, ...] = (
    # --- handles of one process ---
    Entry(
        "lock in a captured model",
        """
import threading
class Optimizer:
    def __init__(self): self.lock = threading.Lock()
class Model:
    def __init__(self): self.optimizer = Optimizer()
def make():
    model = Model()
    def train_step(x): return model.optimizer
    return train_step
train_step = make()
""",
        "train_step",
        BREAKS,
        "lock",
        "train_step → closure model → attribute optimizer → attribute lock",
        "\"cannot pickle '_thread.lock' object\" in error(train_step)",
    ),
    Entry(
        "lock deep in a dict",
        "import threading\ncfg = {'a': [1, {'deep': threading.Lock()}]}",
        "cfg",
        BREAKS,
        "lock",
        "cfg → key 'a' → item 1 → key 'deep'",
        "'_thread.lock' in error(lambda x: cfg)",
    ),
    Entry(
        "lock far back in a long list",
        "import threading\nrows = [{'n': n} for n in range(50_000)] + [{'lock': threading.Lock()}]",
        "rows",
        BREAKS,
        "lock",
        "rows → item 50000 → key 'lock'",
        "'_thread.lock' in error(lambda x: rows)",
    ),
    Entry(
        "event",
        "import threading\nstop = threading.Event()\ndef work(x): return stop.is_set()",
        "work",
        BREAKS,
        "thread",
        "work → global stop",
        "'cannot pickle' in error(work)",
    ),
    Entry(
        "queue",
        "import queue\ntodo = queue.Queue()\ndef work(x): todo.put(x)",
        "work",
        BREAKS,
        "thread",
        "work → global todo",
        "'cannot pickle' in error(work)",
    ),
    Entry(
        "thread pool",
        "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1)\nclean_up = pool.shutdown\n"
        "work = lambda x: pool.submit(len, [x])",
        "work",
        BREAKS,
        "process",
        "work → global pool",
        "'cannot pickle' in error(work)",
    ),
    Entry(
        "binary file",
        "import sys\nsource = open(sys.executable, 'rb')\nclean_up = source.close\nwork = lambda x: source.read(1)",
        "work",
        BREAKS,
        "open-file",
        "work → global source",
        "'BufferedReader' in error(work)",
    ),
    Entry(
        "text file",
        "with open(PLACE + '/words.txt', 'w') as out: out.write('one two')\n"
        "source = open(PLACE + '/words.txt')\nclean_up = source.close\nwork = lambda x: type(source).__name__",
        "work",
        WRONG,
        "open-file",
        "work → global source",
        "run(work) == ['StringIO'] * 3",
    ),
    Entry(
        "memoryview",
        "view = memoryview(b'abc')\nwork = lambda x: type(view).__name__",
        "work",
        WRONG,
        "memoryview",
        "work → global view",
        "run(work) == ['bytes'] * 3",
    ),
    Entry(
        "generator",
        "def numbers():\n    yield from range(9)\nstream = numbers()\nwork = lambda x: next(stream)",
        "work",
        BREAKS,
        "generator",
        "work → global stream",
        "\"cannot pickle 'generator' object\" in error(work)",
    ),
    Entry(
        "socket",
        "import socket\nlink, other = socket.socketpair()\ndef clean_up(): link.close(), other.close()\n"
        "class Client:\n    def __init__(self, link): self.link = link\nclient = Client(link)",
        "client",
        BREAKS,
        "socket",
        "client → attribute link",
        "'socket' in error(lambda x: client)",
    ),
    Entry(
        "sqlite3",
        "import sqlite3\nbase = sqlite3.connect(':memory:')\nclean_up = base.close\n"
        "work = lambda x: base.total_changes",
        "work",
        BREAKS,
        "database",
        "work → global base",
        "'sqlite3.Connection' in error(work)",
    ),
    Entry(
        "context variable",
        "import contextvars\nuser = contextvars.ContextVar('user')\nwork = lambda x: user.get('nobody')",
        "work",
        BREAKS,
        "contextvar",
        "work → global user",
        "'ContextVar' in error(work)",
    ),
    Entry(
        "stack frame",
        "import sys\nhere = {'frame': sys._getframe()}\ndef clean_up(): here.clear()",
        "here",
        BREAKS,
        "frame",
        "here → key 'frame'",
        "'frame' in error(lambda x: here)",
    ),
    Entry(
        "self drags a lock along",
        """
import threading
class Trainer:
    def __init__(self):
        self.rate, self.lock = 0.1, threading.Lock()
    def step(self):
        return lambda x: x * self.rate
step = Trainer().step()
""",
        "step",
        BREAKS,
        "drags-self",
        "step → closure self → attribute lock",
        "'_thread.lock' in error(step)",
    ),
    Entry(
        "bound method drags its object along",
        """
import threading
class Trainer:
    def __init__(self):
        self.rate, self.lock = 0.1, threading.Lock()
    def step(self, x):
        return x * self.rate
trainer = Trainer()
""",
        "trainer.step",
        BREAKS,
        "drags-self",
        "trainer.step → self → attribute lock",
        "'_thread.lock' in error(trainer.step)",
    ),
    Entry(
        "weak references",
        "import weakref\nclass Cache:\n    def __init__(self): self.known = "
        "weakref.WeakValueDictionary()\ncache = Cache()",
        "cache",
        BREAKS,
        "weakref",
        "cache → attribute known",
        "'weakref' in error(lambda x: cache)",
    ),
    Entry(
        "singledispatch",
        "import functools\n@functools.singledispatch\ndef show(x): return str(x)\n"
        "@show.register\ndef _(x: int): return hex(x)\nwork = lambda x: show(x)",
        "work",
        BREAKS,
        "singledispatch",
        "work → global show",
        "'weakref' in error(work)",
    ),
    # --- by name ---
    Entry(
        "lru_cache",
        "import functools\n@functools.lru_cache\ndef slow(x): return x\ndef work(x): return slow(x)",
        "work",
        BREAKS,
        "lru-cache",
        "work → global slow",
        "\"Can't get attribute 'slow'\" in error(work)",
    ),
    Entry(
        "NewType",
        "import typing\nUserId = typing.NewType('UserId', int)\nwork = lambda x: UserId(x)",
        "work",
        BREAKS,
        "new-type",
        "work → global UserId",
        "\"Can't get attribute 'UserId'\" in error(work)",
    ),
    Entry(
        "an object that pickles itself by its name",
        "class Setting:\n    def __reduce__(self): return 'default'\ndefault = Setting()\nwork = lambda x: default",
        "work",
        BREAKS,
        "by-name-in-main",
        "work → global default",
        "\"Can't get attribute 'default'\" in error(work)",
    ),
    Entry(
        "an object that refuses",
        "class Stubborn:\n    def __reduce__(self): raise RuntimeError('not today')\nit = [Stubborn()]",
        "it",
        BREAKS,
        "unpicklable",
        "it → item 0",
        "'not today' in error(lambda x: it)",
    ),
    Entry(
        "an object that needs the driver when it arrives",
        """
import os
class Session:
    def __init__(self): self.pid = os.getpid()
    def __setstate__(self, state):
        if state['pid'] != os.getpid():
            raise RuntimeError('this is another process')
config = {'session': Session()}
""",
        "config",
        BREAKS,
        "fails-on-arrival",
        "config → key 'session'",
        "'this is another process' in error(lambda x: config)",
    ),
    # --- modules ---
    Entry(
        "a module that only the driver has",
        """
import sys
with open(PLACE + '/corpus_helper.py', 'w') as out: out.write('def rate(): return 3\\n')
sys.path.insert(0, PLACE)
import corpus_helper
def work(x): return corpus_helper.rate() * x
""",
        "work",
        BREAKS,
        "driver-only-module",
        "work → global corpus_helper",
        "\"No module named 'corpus_helper'\" in error(work)",
    ),
    Entry(
        "a module that exists in memory only",
        """
import sys, types
corpus_memory = types.ModuleType('corpus_memory')
sys.modules['corpus_memory'] = corpus_memory
exec('class Rate: pass', corpus_memory.__dict__)
rates = [corpus_memory.Rate()]
""",
        "rates",
        BREAKS,
        "driver-only-module",
        "rates → item 0",
        "\"No module named 'corpus_memory'\" in error(lambda x: rates)",
    ),
    Entry(
        "registered with pip's cloudpickle",
        """
import sys
with open(PLACE + '/corpus_registered.py', 'w') as out: out.write('def rate(): return 3\\n')
sys.path.insert(0, PLACE)
import cloudpickle, corpus_registered
cloudpickle.register_pickle_by_value(corpus_registered)
def clean_up(): cloudpickle.unregister_pickle_by_value(corpus_registered)
rate = corpus_registered.rate
""",
        "rate",
        BREAKS,
        "registered-in-vain",
        "rate",
        "\"No module named 'corpus_registered'\" in error(lambda x: rate())",
    ),
    Entry(
        "a module's function replaced by the notebook",
        """
import json
def dumps(value, kept=json.dumps): return 'mine'
theirs, json.dumps = json.dumps, dumps
def clean_up(): json.dumps = theirs
work = lambda x: json.dumps(x)
""",
        "work",
        WRONG,
        "patched-module",
        "work → global json → attribute dumps",
        "(work(1), run(work)[1]) == ('mine', '1')",
    ),
    Entry(
        "a module edited and not reloaded",
        """
import sys
file = SHARED + '/corpus_stale.py'
with open(file, 'w') as out: out.write('def rate(): return 3\\n')
sys.path.insert(0, SHARED)
import corpus_stale
with open(file, 'w') as out: out.write('def rate(): return 4000\\n')
def work(x): return corpus_stale.rate()
""",
        "work",
        WRONG,
        "stale-module",
        "work → global corpus_stale → attribute rate",
        "(work(1), run(work)) == (3, [4000] * 3)",
    ),
    Entry(
        "a module's value set by the notebook",
        """
import sys
with open(SHARED + '/corpus_settings.py', 'w') as out: out.write('RATE = 1\\n')
sys.path.insert(0, SHARED)
import corpus_settings
corpus_settings.RATE = 7
def work(x): return corpus_settings.RATE
""",
        "work",
        WRONG,
        "module-state",
        "work → global corpus_settings → attribute RATE",
        "(work(1), run(work)) == (7, [1] * 3)",
    ),
    Entry(
        "addPyFile, edited since",
        """
file = PLACE + '/corpus_added.py'
with open(file, 'w') as out: out.write('def rate(): return 3\\n')
sc.addPyFile(file)
sc.parallelize(range(4), 4).count()  # Spark reads the file with the first job
import corpus_added, importlib, sys
with open(file, 'w') as out: out.write('def rate(): return 4000\\n')
sys.path.insert(0, PLACE)
importlib.invalidate_caches()
del sys.modules['corpus_added']
import corpus_added
def work(x): return corpus_added.rate()
""",
        "work",
        WRONG,
        "stale-module",
        "work → global corpus_added",
        "(work(1), run(work)) == (4000, [3] * 3)",
        SPARK,
    ),
    # --- classes ---
    Entry(
        "class leak-back: a method's global",
        "G = 1\nclass Model:\n    def rate(self): return G\nmodel = Model()",
        "model",
        WRONG,
        "class-leak-back",
        "model",
        "(sc.parallelize([model]).collect(), globals().update(G=99), model.rate())[2] == 1",
    ),
    Entry(
        "class leak-back: a registry",
        "class Model:\n    known = {}\n    def __init__(self): self.known['me'] = 1\nmodel = Model()",
        "[model]",
        WRONG,
        "class-leak-back",
        "[model] → item 0",
        "(lambda before: (sc.parallelize([model]).collect(), Model.known is before)[1])(Model.known) is False",
    ),
    Entry(
        "class leak-back: a counter of the class",
        "class Model:\n    made = 0\n    def __init__(self): Model.made += 1\nmodel = Model()",
        "model",
        WRONG,
        "class-leak-back",
        "model",
        "(lambda rdd: (setattr(Model, 'made', 9), rdd.collect(), Model.made)[2])(sc.parallelize([model])) == 1",
    ),
    Entry(
        "class leak-back: what a function gives back",
        "G = 1\nclass Point:\n    def __init__(self, x): self.x = x\n    def far(self): return self.x * G\n"
        "def place(x): return Point(x)",
        "place",
        WRONG,
        "class-leak-back",
        "place → global Point",
        "(run(place), globals().update(G=99), Point(1).far())[2] == 1",
    ),
    Entry(
        "class defined again",
        "class P:\n    pass\nold = [P()]\nclass P:\n    pass",
        "old",
        WRONG,
        "class-defined-again",
        "old → item 0",
        "not isinstance(sc.parallelize(old).collect()[0], P)",
    ),
    Entry(
        "dataclass defined again",
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int = 1\nold = P()\n"
        "@dataclasses.dataclass\nclass P:\n    x: int = 1",
        "old",
        WRONG,
        "class-defined-again",
        "old",
        "sc.parallelize([old]).collect()[0] != P()",
    ),
    Entry(
        "enum defined again",
        "import enum\nclass Mode(enum.Enum):\n    FAST = 1\ncfg = {'mode': Mode.FAST}\n"
        "class Mode(enum.Enum):\n    FAST = 1",
        "cfg",
        WRONG,
        "class-defined-again",
        "cfg → key 'mode'",
        "sc.parallelize([cfg]).collect()[0]['mode'] is not Mode.FAST",
    ),
    Entry(
        "class made in the task",
        "def work(x):\n    class Result:\n        def __init__(self, v): self.v = v\n    return Result(x)",
        "work",
        WRONG,
        "class-in-task",
        "work",
        "(lambda a, b, c: type(a) is type(b))(*run(work)) is False",
    ),
    Entry(
        "namedtuple made in the task",
        "from collections import namedtuple\ndef work(x):\n    Pair = namedtuple('Pair', 'a b')\n"
        "    return [Pair(x, x)]",
        "work",
        WRONG,
        "class-in-task",
        "work",
        "(lambda a, b, c: type(a[0]) is type(b[0]))(*run(work)) is False",
    ),
    Entry(
        "__slots__",
        "class Slim:\n    __slots__ = ('a',)\n    def __init__(self): self.a = 1\nslim = Slim()\n"
        "work = lambda x: hasattr(slim, '__dict__')",
        "slim",
        COSTLY,
        "lost-slots",
        "slim",
        "not hasattr(slim, '__dict__') and run(work) == [True] * 3",
    ),
    Entry(
        "dataclass with slots",
        "import dataclasses\n@dataclasses.dataclass(slots=True)\nclass Slim:\n    a: int = 1\nslim = [Slim()]\n"
        "work = lambda x: hasattr(slim[0], '__dict__')",
        "slim",
        COSTLY,
        "lost-slots",
        "slim → item 0",
        "not hasattr(slim[0], '__dict__') and run(work) == [True] * 3",
    ),
    Entry(
        "sentinel in data",
        "MISSING = object()\nrow = {'a': 1, 'b': MISSING}",
        "row",
        WRONG,
        "lost-identity",
        "row → key 'b'",
        "sc.parallelize([row]).map(lambda r: r['b'] is MISSING).collect() == [False]",
    ),
    Entry(
        "sentinel compared with data",
        "MISSING = object()\ndef work(value): return value is MISSING",
        "work",
        WRONG,
        "lost-identity",
        "work → global MISSING",
        "sc.parallelize([MISSING, 1], 2).map(work).collect() == [False, False]",
    ),
    Entry(
        "singleton compared with data",
        "class _Missing:\n    pass\nMISSING = _Missing()\ndef work(value): return value is MISSING",
        "work",
        WRONG,
        "lost-identity",
        "work → global MISSING",
        "sc.parallelize([MISSING, 1], 2).map(work).collect() == [False, False]",
    ),
    # --- functions ---
    Entry(
        "late binding in a comprehension",
        "def make(): return [lambda x: x + i for i in range(3)]\nsteps = make()",
        "steps",
        WRONG,
        "late-binding",
        "steps",
        "run(lambda x: [step(0) for step in steps]) == [[2, 2, 2]] * 3",
    ),
    Entry(
        "late binding in the notebook's loop",
        "steps = {}\nfor name, factor in [('a', 1), ('b', 2)]:\n    steps[name] = lambda x: x * factor",
        "steps",
        WRONG,
        "late-binding",
        "steps",
        "run(lambda x: steps['a'](1)) == [2] * 3",
    ),
    Entry(
        "a counter",
        "seen = 0\ndef work(x):\n    global seen\n    seen += 1\n    return x",
        "work",
        WRONG,
        "mutated-global",
        "work → global seen",
        "(run(work), seen)[1] == 0",
    ),
    Entry(
        "a list that is only appended to",
        "found = []\ndef work(x):\n    if x > 0:\n        found.append(x)",
        "work",
        WRONG,
        "mutated-global",
        "work → global found",
        "(run(work), found)[1] == []",
    ),
    Entry(
        "a dict that is only written",
        "counts = {}\ndef work(x):\n    counts[x] = counts.get(x, 0) + 1\n    return x",
        "work",
        WRONG,
        "mutated-global",
        "work → global counts",
        "(run(work), counts)[1] == {}",
    ),
    Entry(
        "a closure that counts",
        "def make():\n    seen = 0\n    def work(x):\n        nonlocal seen\n        seen += 1\n        return seen\n"
        "    return work\nwork = make()",
        "work",
        WRONG,
        "mutated-global",
        "work → closure seen",
        "(run(work), work(0))[1] == 1",
    ),
    Entry(
        "a UDF that was used before its global changed",
        "from pyspark.sql.functions import udf\nrate = 1\ntimes = udf(lambda x: x * rate, 'long')\n"
        "before = spark.range(1, 2).select(times('id')).collect()\nrate = 5",
        "times",
        WRONG,
        "frozen-globals",
        "times → global rate",
        "spark.range(1, 2).select(times('id')).collect()[0][0] == 1",
        SPARK,
    ),
    # --- places in sequences ---
    Entry(
        "NumPy's generator",
        "import numpy as np\nrng = np.random.default_rng(1)\ndef work(x): return float(rng.random())",
        "work",
        WRONG,
        "captured-rng",
        "work → global rng",
        "len(set(run(work))) == 1",
    ),
    Entry(
        "Python's Random",
        "import random\nclass Sampler:\n    def __init__(self): self.random = random.Random(3)\nsampler = Sampler()",
        "sampler",
        WRONG,
        "captured-rng",
        "sampler → attribute random",
        "len(set(run(lambda x: sampler.random.random()))) == 1",
    ),
    Entry(
        "from random import random",
        "from random import random\nwork = lambda x: random()",
        "work",
        WRONG,
        "captured-rng",
        "work → global random → self",
        "len(set(run(work))) == 1",
    ),
    Entry(
        "from numpy.random import rand",
        "from numpy.random import rand\nwork = lambda x: float(rand())",
        "work",
        WRONG,
        "captured-rng",
        "work → global rand → self",
        "len(set(run(work))) == 1",
    ),
    Entry(
        "iterator over a list",
        "names = iter(['a', 'b', 'c'])\nwork = lambda x: next(names)",
        "work",
        WRONG,
        "captured-iterator",
        "work → global names",
        "run(work) == ['a'] * 3",
    ),
    Entry(
        "itertools.count",
        "import itertools\nids = itertools.count()\nwork = lambda x: next(ids)",
        "work",
        WRONG,
        "captured-iterator",
        "work → global ids",
        "run(work) == [0] * 3",
    ),
    # --- exceptions ---
    Entry(
        "exception that takes two and keeps one",
        "class Failed(Exception):\n    def __init__(self, code, text): super().__init__(f'{code}: {text}')\n"
        "failure = Failed(1, 'x')",
        "failure",
        BREAKS,
        "exception-init",
        "failure",
        "'missing 1 required positional argument' in error(lambda x: failure)",
    ),
    Entry(
        "exception that words its message",
        "class Failed(Exception):\n    def __init__(self, code): super().__init__(f'error {code}')\n"
        "outcome = {'failure': Failed(5)}",
        "outcome",
        WRONG,
        "exception-init",
        "outcome → key 'failure'",
        "run(lambda x: str(outcome['failure'])) == ['error error 5'] * 3",
    ),
    # --- size ---
    Entry(
        "five million numbers",
        "numbers = list(range(5_000_000))\ndef work(x): return numbers[x]\ndef outer(x): return work(x)",
        "outer",
        COSTLY,
        "large-capture",
        "outer → global work → global numbers",
        "len(cloudpickle.dumps(outer)) > 20_000_000",
    ),
    Entry(
        "a large array",
        "import numpy as np\nweights = {'w': np.zeros(4_000_000)}",
        "weights",
        COSTLY,
        "large-capture",
        "weights → key 'w'",
        "len(cloudpickle.dumps(weights)) > 30_000_000",
    ),
    # --- Spark's own ---
    Entry(
        "SparkContext",
        "work = lambda x: sc.version",
        "work",
        BREAKS,
        "spark-session",
        "work → global sc",
        "'CONTEXT_ONLY_VALID_ON_DRIVER' in error(work) or 'SparkContext' in error(work)",
        SPARK,
    ),
    Entry(
        "DataFrame",
        "frame = spark.range(3)\nclass Job:\n    def __init__(self, frame): self.frame = frame\njob = Job(frame)",
        "job",
        BREAKS,
        "spark-dataframe",
        "job → attribute frame",
        "error(lambda x: job) != ''",
        SPARK,
    ),
    Entry(
        "RDD",
        "rows = sc.parallelize([1])\nwork = lambda x: rows.count()",
        "work",
        BREAKS,
        "spark-dataframe",
        "work → global rows",
        "error(work) != ''",
        SPARK,
    ),
    Entry(
        "Column",
        "column = spark.range(3).id\nwork = lambda x: column",
        "work",
        BREAKS,
        "spark-column",
        "work → global column",
        "'cannot pickle' in error(work)",
        SPARK,
    ),
    Entry(
        "broadcast of an instance",
        "class P:\n    x = 1\np = sc.broadcast(P())",
        "p",
        BREAKS,
        "broadcast-plain-pickle",
        "p → value, P",
        "\"Can't get attribute 'P'\" in error(lambda x: p.value.x)",
        SPARK,
    ),
    # --- TensorFlow and Keras ---
    Entry(
        "tf.function that was called",
        _QUIET + "import tensorflow as tf\n@tf.function\ndef double(x): return x * 2\ndouble(tf.constant(1))\n"
        "def work(x): return double(x)",
        "work",
        BREAKS,
        "tf-function-called",
        "work → global double",
        "'FuncGraph' in error(work)",
        TENSORFLOW,
    ),
    Entry(
        "tf.function that branches on a tensor",
        _QUIET
        + "import tensorflow as tf\n@tf.function\ndef double(x):\n    if tf.reduce_sum(x) > 0:\n        return x * 2\n"
        "    return x\ndef work(x): return float(double(tf.constant(1.0)))",
        "work",
        BREAKS,
        "tf-function-no-source",
        "work → global double",
        "'OperatorNotAllowedInGraphError' in error(work) or 'symbolic' in error(work)",
        TENSORFLOW,
    ),
    Entry(
        "tf.data",
        _QUIET + "import tensorflow as tf\ndata = tf.data.Dataset.range(3).batch(2)\nwork = lambda x: next(iter(data))",
        "work",
        BREAKS,
        "tf-dataset",
        "work → global data",
        "error(work) != ''",
        TENSORFLOW,
    ),
    Entry(
        "tf.distribute",
        _QUIET
        + "import tensorflow as tf\nstrategy = tf.distribute.OneDeviceStrategy('cpu')\nwork = lambda x: strategy",
        "work",
        BREAKS,
        "tf-strategy",
        "work → global strategy",
        "'cannot pickle' in error(work)",
        TENSORFLOW,
    ),
    Entry(
        "tf.Graph",
        _QUIET + "import tensorflow as tf\ncfg = {'graph': tf.Graph()}",
        "cfg",
        BREAKS,
        "tf-graph",
        "cfg → key 'graph'",
        "'cannot pickle' in error(lambda x: cfg)",
        TENSORFLOW,
    ),
    Entry(
        "lookup table",
        _QUIET + "import tensorflow as tf\ntable = tf.lookup.StaticHashTable("
        "tf.lookup.KeyValueTensorInitializer(['a'], [1]), 0)\nwork = lambda x: table",
        "work",
        BREAKS,
        "tf-table",
        "work → global table",
        "error(work) != ''",
        TENSORFLOW,
    ),
    Entry(
        "checkpoint",
        _QUIET + "import tensorflow as tf\nsaved = tf.train.Checkpoint(v=tf.Variable(1))\nwork = lambda x: saved",
        "work",
        BREAKS,
        "tf-checkpoint",
        "work → global saved",
        "'cannot pickle' in error(work)",
        TENSORFLOW,
    ),
    Entry(
        "Keras model with a layer of the notebook",
        _QUIET + "import keras\nclass Twice(keras.layers.Layer):\n    def call(self, x): return x * 2\n"
        "model = keras.Sequential([keras.Input((3,)), Twice(name='twice'), keras.layers.Dense(1)])\n"
        "def work(x): return model.count_params()",
        "work",
        BREAKS,
        "keras-main-layer",
        "work → global model → layer twice → class Twice",
        "\"Could not locate class 'Twice'\" in error(work)",
        TENSORFLOW,
    ),
    Entry(
        "Keras model with a loss of the notebook",
        _QUIET + "import keras\ndef off(y, p): return keras.ops.mean(keras.ops.abs(y - p))\n"
        "model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])\nmodel.compile('adam', loss=off)",
        "model",
        BREAKS,
        "keras-main-layer",
        "model → loss → function off",
        "\"Could not locate function 'off'\" in error(lambda x: model.count_params())",
        TENSORFLOW,
    ),
)


def _fine(name: str, cell: str, asked: str, *needs: str) -> Entry:
    return Entry(name, cell, asked, needs=frozenset(needs))


HEALTHY: tuple[Entry, ...] = (
    _fine("plain values", "it = [1, 2.5, 'x', b'y', None, True, 1j, ..., (1,), {2}, frozenset({3}), range(4)]", "it"),
    _fine("not a number", "it = {'loss': float('nan'), 'best': float('inf')}", "it"),
    _fine("nested containers", "it = {'a': [{'b': ({'c': 1},)}], ('k', 1): {1: [2]}}", "it"),
    _fine("a list that holds itself", "it = [1]\nit.append(it)", "it"),
    _fine(
        "collections",
        "import collections\nit = [collections.defaultdict(list, a=[1]), collections.Counter('aab'), "
        "collections.OrderedDict(a=1), collections.deque([1, 2]), collections.ChainMap({'a': 1})]",
        "it",
    ),
    _fine("NumPy array", "import numpy as np\nit = {'x': np.arange(6).reshape(2, 3), 'dtype': np.dtype('f4')}", "it"),
    _fine("NumPy array of objects", "import numpy as np\nit = np.array([{'a': 1}, None, 'x'], dtype=object)", "it"),
    _fine("NumPy's functions", "import numpy as np\ndef work(x): return np.mean(x) + np.linalg.norm(x)", "work"),
    _fine("NumPy's module-level generator", "import numpy as np\nwork = lambda x: np.random.rand()", "work"),
    _fine(
        "a generator for each task",
        "import numpy as np\nrngs = [np.random.default_rng(seed) for seed in range(4)]",
        "rngs",
    ),
    _fine("seeded in the task", "import numpy as np\ndef work(x): return np.random.default_rng(x).random()", "work"),
    _fine(
        "pandas",
        "import pandas as pd\nit = pd.DataFrame({'a': [1, 2], 'b': ['x', None], 'c': "
        "pd.to_datetime(['2020', '2021'])})",
        "it",
    ),
    _fine(
        "dataclass",
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int = 1\n    tags: list = dataclasses.field("
        "default_factory=list)\n    def double(self): return self.x * 2\nit = P(3)",
        "it",
    ),
    _fine(
        "frozen dataclass", "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass P:\n    x: int = 1", "P(2)"
    ),
    _fine("enum", "import enum\nclass Mode(enum.Enum):\n    FAST = 1\n    SLOW = 2\nit = {'mode': Mode.FAST}", "it"),
    _fine(
        "enum compared in the task",
        "import enum\nclass Mode(enum.IntFlag):\n    A = 1\n    B = 2\ndef work(mode): return mode is Mode.A",
        "work",
    ),
    _fine(
        "namedtuple", "from collections import namedtuple\nP = namedtuple('P', 'x y')\nit = [P(1, 2), P(3, 4)]", "it"
    ),
    _fine(
        "typing.NamedTuple",
        "import typing\nclass P(typing.NamedTuple):\n    x: int\n    y: int = 2\n"
        "    def sum(self): return self.x + self.y",
        "P(1)",
    ),
    _fine(
        "subclass of a namedtuple",
        "from collections import namedtuple\nclass P(namedtuple('P', 'x y')):\n    __slots__ = ()\n"
        "    def sum(self): return self.x + self.y",
        "P(1, 2)",
    ),
    _fine("partial", "import functools, operator\nit = functools.partial(operator.add, 1)", "it"),
    _fine(
        "partial of a notebook function",
        "import functools\ndef scale(x, by): return x * by\nit = functools.partial(scale, by=2)",
        "it",
    ),
    _fine(
        "nested closures",
        "def outer(a):\n    def middle(b):\n        def inner(c): return a + b + c\n        return inner\n"
        "    return middle\nwork = outer(1)(2)",
        "work",
    ),
    _fine(
        "functions with values bound by default",
        "steps = [lambda x, i=i: x + i for i in range(3)]",
        "steps",
    ),
    _fine(
        "functions from a factory",
        "def make(n):\n    return lambda x: x + n\nsteps = {n: make(n) for n in range(3)}",
        "steps",
    ),
    _fine(
        "a decorator with functools.wraps",
        "import functools\ndef logged(function):\n    @functools.wraps(function)\n    def wrapper(*args):\n"
        "        return function(*args)\n    return wrapper\n@logged\ndef work(x): return x\n@logged\n"
        "def other(x): return x",
        "[work, other]",
    ),
    _fine("recursive function", "def work(n): return 1 if n < 2 else n * work(n - 1)", "work"),
    _fine("lambda over the standard library", "import math, json\nwork = lambda x: json.dumps(math.sqrt(x))", "work"),
    _fine("builtin functions", "it = [len, print, sorted, str.upper, [].append, dict.fromkeys]", "it"),
    _fine("a global constant", "RATE = 0.5\ndef work(x): return x * RATE", "work"),
    _fine(
        "a cache of each Python worker",
        "cache = {}\ndef work(x):\n    if x not in cache:\n        cache[x] = x * 2\n    return cache[x]",
        "work",
    ),
    _fine(
        "made on first use",
        "model = None\ndef work(x):\n    global model\n    if model is None:\n        model = {'w': 2}\n"
        "    return x * model['w']",
        "work",
    ),
    _fine("a list that is read", "names = ['a', 'b']\ndef work(x): return names[x]", "work"),
    _fine("a local list", "def work(x):\n    found = []\n    found.append(x)\n    return found", "work"),
    _fine(
        "a sentinel as a default",
        "MISSING = object()\ndef work(x, given=MISSING): return x if given is MISSING else given",
        "work",
    ),
    _fine(
        "a sentinel for get",
        "MISSING = object()\ndef work(row):\n    return row.get('a', MISSING) is MISSING",
        "work",
    ),
    _fine(
        "a class of the notebook that reads modules only",
        "import numpy as np\nclass Model:\n    size = 3\n    def __init__(self): self.w = np.ones(self.size)\n"
        "    def predict(self, x): return np.dot(self.w, x)\n    @property\n    def n(self): return len(self.w)\n"
        "    @classmethod\n    def make(cls): return cls()\n    @staticmethod\n    def help(): return 'no'",
        "Model()",
    ),
    _fine(
        "inheritance and super()",
        "import abc\nclass Base(abc.ABC):\n    @abc.abstractmethod\n    def f(self): ...\n"
        "class Model(Base):\n    def __init__(self): super().__init__(); self.x = 1\n    def f(self): return self.x",
        "Model()",
    ),
    _fine(
        "a class used inside the task only",
        "G = 2\nclass Helper:\n    def f(self, x): return x * G\ndef work(x):\n    return Helper().f(x)",
        "work",
    ),
    _fine(
        "a class made and used inside the task",
        "def work(x):\n    class Point:\n        def __init__(self, x): self.x = x\n    return Point(x).x",
        "work",
    ),
    _fine(
        "an object that leaves its lock behind",
        "import threading\nclass Careful:\n    def __init__(self): self.lock, self.x = threading.Lock(), 1\n"
        "    def __getstate__(self): return {'x': self.x}\n"
        "    def __setstate__(self, state): self.__init__(); self.x = state['x']",
        "Careful()",
    ),
    _fine(
        "slots of an installed class",
        "from fractions import Fraction\nimport pathlib, uuid, ipaddress\n"
        "it = [Fraction(1, 3), pathlib.PurePosixPath('/a/b'), uuid.UUID(int=1), ipaddress.ip_address('127.0.0.1')]",
        "it",
    ),
    _fine(
        "dates, decimals, patterns, paths",
        "import datetime, decimal, pathlib, re\nit = {'d': datetime.datetime(2020, 1, 1, "
        "tzinfo=datetime.timezone.utc), "
        "'n': decimal.Decimal('1.5'), 'r': re.compile('a+', re.I), 'p': pathlib.Path('x')}",
        "it",
    ),
    _fine("logger", "import logging\nlog = logging.getLogger('work')\ndef work(x): log.info(x)", "work"),
    _fine("module", "import xml.etree.ElementTree as tree\nwork = lambda x: tree.fromstring(x)", "work"),
    _fine("standard streams", "import sys\nwork = lambda x: print(x, file=sys.stderr)", "work"),
    _fine("bytes in memory", "import io\nit = [io.BytesIO(b'x'), io.StringIO('y'), bytearray(b'z')]", "it"),
    _fine("an exception", "failure = ValueError('no', 3)", "failure"),
    _fine(
        "an exception that passes its arguments on",
        "class Failed(Exception):\n    def __init__(self, code, text): super().__init__(code, text); self.code = code",
        "Failed(1, 'x')",
    ),
    _fine(
        "a generic class and type variables",
        "import typing\nT = typing.TypeVar('T')\nclass Box(typing.Generic[T]):\n"
        "    def __init__(self, x: T): self.x = x\n"
        "it = Box[int](3)",
        "it",
    ),
    _fine("a property class with annotations", "class P:\n    x: int = 1\n    y: 'P | None' = None", "P"),
    _fine(
        "scikit-learn",
        "from sklearn.linear_model import LogisticRegression\n"
        "it = LogisticRegression(random_state=1).fit([[0.0], [1.0]], [0, 1])",
        "it",
    ),
    _fine(
        "Spark's rows and types",
        "from pyspark.sql import Row\nfrom pyspark.sql.types import StructType, LongType\n"
        "it = [Row(a=1), StructType().add('a', LongType())]",
        "it",
    ),
    _fine(
        "a broadcast in a closure", "table = sc.broadcast({'a': 1})\nwork = lambda x: table.value['a']", "work", "spark"
    ),
    _fine("an accumulator", "seen = sc.accumulator(0)\ndef work(x): seen.add(1)", "work", "spark"),
    _fine(
        "an unused UDF", "from pyspark.sql.functions import udf\ntimes = udf(lambda x: x * 2, 'long')", "times", "spark"
    ),
    _fine(
        "a UDF that was used",
        "from pyspark.sql.functions import udf\nrate = 2\ntimes = udf(lambda x: x * rate, 'long')\n"
        "seen = spark.range(1).select(times('id')).collect()",
        "times",
        "spark",
    ),
    _fine(
        "stock Keras model",
        _QUIET + "import keras\nmodel = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, 'relu'), "
        "keras.layers.Dropout(0.5), keras.layers.BatchNormalization(), keras.layers.Dense(1)])\n"
        "model.compile('adam', 'mse', metrics=['mae'])\ndef work(x): return model.count_params()",
        "work",
        "tensorflow",
    ),
    _fine(
        "functional Keras model, trained",
        _QUIET + "import keras, numpy as np\nx = keras.Input((2,))\nmodel = keras.Model(x, keras.layers.Dense(1)(x))\n"
        "model.compile(keras.optimizers.Adam(0.1), keras.losses.MeanSquaredError())\n"
        "history = model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0).history",
        "model",
        "tensorflow",
    ),
    _fine(
        "Keras layers, optimizers, losses, callbacks",
        _QUIET
        + "import keras\nit = [keras.layers.Dense(1), keras.optimizers.SGD(0.1), keras.losses.MeanSquaredError(), "
        "keras.callbacks.EarlyStopping(), keras.layers.StringLookup(vocabulary=['a'])]",
        "it",
        "tensorflow",
    ),
    _fine(
        "tensors, variables, specs",
        _QUIET
        + "import tensorflow as tf\nit = {'t': tf.constant([1.0]), 'v': tf.Variable(2.0), 's': tf.TensorSpec([1]), "
        "'d': tf.float32, 'r': tf.ragged.constant([[1], [2, 3]])}",
        "it",
        "tensorflow",
    ),
    _fine(
        "feature columns",
        _QUIET + "import tensorflow as tf\nit = [tf.feature_column.numeric_column('x')]",
        "it",
        "tensorflow",
    ),
    _fine(
        "tf.function before its first call",
        _QUIET + "import tensorflow as tf\n@tf.function\ndef step(x, training=False):\n    y = tf.square(x)\n"
        "    if training:\n        y = y * 2\n    for i in range(2):\n        y = y + i\n    return y\n"
        "def work(x): return step(x)",
        "work",
        "tensorflow",
    ),
    _fine(
        "a subclass of keras.callbacks.Callback",
        _QUIET + "import keras\nclass Tell(keras.callbacks.Callback):\n"
        "    def on_epoch_end(self, epoch, logs=None): print(epoch)",
        "Tell()",
        "tensorflow",
    ),
)

CORPUS: tuple[Entry, ...] = BROKEN + HEALTHY
