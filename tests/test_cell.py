from __future__ import annotations

import ast
import pickle
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any

import pytest
from child_fixture import Child, notebook

from tfos_magic.cell import CellFunction, has_trailing_semicolon, map_function
from tfos_magic.errors import UsageError


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(tmp_path)


def made(body: str, namespace: dict[str, Any] | None = None, **options: Any) -> CellFunction:
    return map_function(textwrap.dedent(body), namespace or {}, filename="<cell>", label="Cell In[4]", **options)


def value_of(body: str, namespace: dict[str, Any] | None = None, args: Any = None, ctx: Any = None) -> Any:
    return made(body, namespace)(args, ctx)


# --- what the cell gives back -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("1 + 1", 2),
        ("x = 3\nx * 2", 6),
        ("x = 3", None),
        ("x = 3\nx;", None),
        ("x = 3\nx ; # that was it", None),
        ("x = 3\nx  # no semicolon; really", 3),
        ("'a; b'", "a; b"),
        ("args, ctx", ("A", "C")),
        ("if args:\n    1", None),
        ("[y for y in range(3)]", [0, 1, 2]),
        ("(n := 5)\nn", 5),
        ("[last := i for i in range(3)]\nlast", 2),
        ("from os.path import *\njoin('a', 'b')", "a/b"),
        ("x = 1\ndel x\n'x' in globals()", False),
        ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    m = str(e)\nm", "division by zero"),
        ("match args:\n    case 'A' as got:\n        r = got\n    case _:\n        r = 0\nr", "A"),
        ("class A:\n    class B:\n        def f(self): return helper()\ndef helper(): return 7\nA.B().f()", 7),
        ("counter = 0\ndef up():\n    global counter\n    counter += 1\nup(); up()\ncounter", 2),
        ("async def f(): return 4\nawait f()", 4),
        ("async def g():\n    yield 1\n    yield 2\n[x async for x in g()]", [1, 2]),
        (
            "import asyncio\nr = await asyncio.gather(*(asyncio.sleep(0, i) for i in range(2)))\nr",
            [0, 1],
        ),
        ("__name__", "__main__"),
        ("", None),
        ("# only a comment", None),
    ],
)
def test_a_body_runs_as_a_cell_does_and_gives_its_last_expression(body: str, value: Any) -> None:
    assert value_of(body, args="A", ctx="C") == value


@pytest.mark.parametrize(
    "body",
    [
        "def main_fun(args, ctx):\n    return [args, ctx]",
        '"""Doc."""\nimport os\nclass H: ...\ndef same(a): return a\ndef run(args, ctx):\n    return same([args, ctx])',
        "N = 3\ntry:\n    import nope\nexcept ImportError:\n    nope = None\ndef f(args, ctx):\n    return [args, ctx]",
        "async def f(args, ctx):\n    return [args, ctx]",
        "def f(args, ctx, *, more=1):\n    return [args, ctx]",
    ],
)
def test_a_cell_that_only_defines_calls_its_function_of_args_and_ctx(body: str) -> None:
    assert value_of(body, args=1, ctx=2) == [1, 2]


def test_a_cell_that_calls_its_function_itself_is_a_body() -> None:
    assert value_of("def f(args, ctx): return 1\nvalue = f(args, ctx) + 1\nvalue") == 2
    assert value_of("def f(args, ctx): return 1\nvalue = f(args, ctx) + 1") is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def f(x): return x", "only defines f, and none takes (args, ctx)"),
        ("def f(args, ctx): ...\ndef g(args, ctx): ...", "both f and g take (args, ctx)"),
    ],
)
def test_a_cell_in_which_nothing_would_run_is_refused(body: str, words: str) -> None:
    with pytest.raises(UsageError, match="Cell In") as caught:
        made(body)
    assert words in str(caught.value)


def test_each_call_starts_from_a_fresh_namespace_and_leaves_the_notebook_alone() -> None:
    namespace = {"x": 1}
    function = made("x += 1\ny = x\ny", namespace)
    assert [function(None, None), function(None, None)] == [2, 2]
    assert namespace == {"x": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a;", True), ("a; # c", True), ("a;\n\n# c\n", True), ("a; b", False), ("';'", False), ("(", False)],
)
def test_a_trailing_semicolon_is_seen_past_comments(text: str, expected: bool) -> None:
    assert has_trailing_semicolon(text) is expected


# --- what predicts ------------------------------------------------------------------------------------------


def predicting(body: str, namespace: dict[str, Any] | None = None) -> Any:
    """What a cell of %%tfos_infer returns on a node, asked for a batch of 3."""
    return made(body, namespace, predicts=True)("A", "C")(3)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("def predict(batch):\n    return batch * k", 6),
        ("def predict(batch):\n    return batch * k\npredict", 6),
        ("def predict(batch):\n    return batch * k\npredict;", 6),
        ("def predict(batch):\n    return batch * k\npredict  ;  # quiet", 6),
        ("def predict(batch):\n    return batch * k;", 6),
        ("def one(batch): ...\ndef predict(batch, times=2, *, add=1):\n    return batch * times + add", 7),
        ("def predict(*batches):\n    return batches", (3,)),
        ("lambda batch: batch + k", 5),
        ("predict = other = lambda batch: batch + k", 5),
        ("predict: object = lambda batch: batch + k", 5),
        ("class Scorer:\n    def __call__(self, batch): return batch + k\nScorer()", 5),
        ("class Scorer:\n    def __call__(self, batch): return batch + k\nscorer = Scorer()", 5),
        ("def made(kind): return kind()\n@made\nclass scorer:\n    def __call__(self, batch): return batch + k", 5),
        ("import functools\ndef f(a, b): return a * b\nfunctools.partial(f, 4)", 12),
        ("import functools\n@functools.lru_cache\ndef predict(batch): return batch + k", 5),
        ("def fixed(f): return lambda batch: f(batch, 9)\n@fixed\ndef predict(batch, to): return to", 9),
        ("def main_fun(args, ctx):\n    return lambda batch: [args, ctx, batch]", ["A", "C", 3]),
        ("print('x')\ndef main_fun(args, ctx):\n    return lambda batch: [args, ctx, batch]", ["A", "C", 3]),
        ("async def main_fun(args, ctx):\n    return lambda batch: [args, ctx, batch]", ["A", "C", 3]),
        ("def main_fun(args, ctx):\n    return helper\ndef helper(batch): return batch", 3),
        ("def load(args, ctx): return 4\nn = load(args, ctx)\ndef predict(batch): return batch + n", 7),
        ("def a(args, ctx): ...\ndef b(args, ctx): ...\ndef predict(batch): return batch", 3),
        ("(\n    lambda batch:\n    batch\n)", 3),
    ],
)
def test_a_cell_that_predicts_gives_what_it_ends_with(body: str, answer: Any) -> None:
    assert predicting(body, {"k": 2}) == answer


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x = 1\npass", "Cell In[4], line 3: the cell ends with pass: nothing there predicts."),
        ("import keras", "line 2: the cell ends with an import: "),
        ("for i in []:\n    def predict(batch): ...", "line 2: the cell ends with a loop: "),
        ("while k:\n    k = 0", "ends with a loop"),
        ("if k:\n    def predict(batch): ...", "ends with an if: "),
        ("with open('f') as f:\n    pass", "ends with a with block: "),
        ("try:\n    x = 1\nexcept ValueError:\n    x = 2", "ends with a try block: "),
        ("x = 1\ndel x", "ends with a del: "),
        ("assert k", "ends with assert: "),
        ("a, b = k, k", "ends with a tuple, and that does not predict."),
        ("a, b = k", "ends with an assignment to something else than one name: "),
        ("k.x = k", "ends with an assignment to something else than one name: "),
        ("x: int", "ends with an annotation without a value: "),
        ("x = 5", "ends with 5, and that does not predict."),
        ("'A docstring.'", "ends with 'A docstring.', and that does not predict."),
        ("None", "ends with None, and"),
        ("{'score': k}", "ends with a dict, and"),
        ("[x for x in k]", "ends with a list, and"),
        ("k == 2", "ends with a comparison, and"),
        ("# nothing but a comment", "Cell In[4] is empty: what should predict?"),
        ("async def predict(batch): ...", "line 2: predict is async, and nodes await nothing for a batch."),
        ("class Scorer:\n    def predict(self, batch): ...", "ends with class Scorer; a class does not predict"),
        ("def predict(): ...", "line 2: predict() cannot be called with one batch."),
        ("def predict(a, b): ...", "line 2: predict(a, b) cannot be called with one batch."),
        ("def predict(a, *, b): ...", "line 2: predict(a, *, b) cannot be called with one batch."),
        ("predict = lambda a, b: a", "the lambda(a, b) cannot be called with one batch."),
    ],
)
def test_a_cell_that_ends_with_nothing_that_predicts_is_refused(body: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(body, {"k": 2}, predicts=True)
    assert words in caught.value.fact
    assert caught.value.hint


@pytest.mark.parametrize("body", ["print(k)", "k", "k.attribute", "k[0]", "await k", "f if k else k", "k @ k"])
def test_what_only_the_node_can_know_is_left_to_it(body: str) -> None:
    made(body, {"k": 2, "f": 3}, predicts=True)


def test_a_cell_that_predicts_has_its_own_lines_and_source(child: Child) -> None:
    body = "import inspect\n\ndef predict(batch):\n    return batch / 0"
    function = made(body, predicts=True)
    assert function.text == f"\n{body}"
    with pytest.raises(ZeroDivisionError) as caught:
        function(None, None)(1)
    frames = [(f.lineno, f.name) for f in traceback.extract_tb(caught.value.__traceback__) if f.filename == "<cell>"]
    assert frames == [(5, "predict")]
    source = child.run(made("import inspect\ndef main(args, ctx):\n    return inspect.getsource(main)", predicts=True))
    assert source == "def main(args, ctx):\n    return inspect.getsource(main)"


def test_what_predicts_may_leave_behind_what_it_can_do_without() -> None:
    function = made("if args:\n    k = 1\ndef predict(batch):\n    return k", {"k": 2}, predicts=True)
    assert function.without(["k"])(True, None)(0) == 1


# --- which names it takes along -----------------------------------------------------------------------------

NOTEBOOK = dict.fromkeys(["model", "cfg", "data", "loss", "x", "f"], 1)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("model = cfg\nmodel", ["cfg"]),
        ("x += 1", ["x"]),
        ("x = x + 1", ["x"]),
        ("x: int = 1\nx", []),
        ("[x for x in data]", ["data"]),
        ("[y := f(v) for v in data]\ny", ["data", "f"]),
        ("(lambda v: v + x)(2)", ["x"]),
        ("for x in data:\n    x", ["data"]),
        ("for v in data:\n    loss = v\nprint(loss)", ["data", "loss"]),
        ("if cfg:\n    model = 1\nelse:\n    model = 2\nmodel", ["cfg"]),
        ("if cfg:\n    model = 1\nelse:\n    raise ValueError\nmodel", ["cfg"]),
        ("if cfg:\n    model = 1\nmodel", ["cfg", "model"]),
        ("with open('p') as f, cfg as (x, *data):\n    f, x, data", ["cfg"]),
        ("try:\n    import json as model\nexcept ImportError:\n    model = None\nmodel", []),
        ("try:\n    pass\nexcept ValueError as x:\n    x\nx", ["x"]),
        ("try:\n    pass\nfinally:\n    x = 1\nx", []),
        ("while cfg:\n    x = 1\n    x", ["cfg"]),
        ("match cfg:\n    case {'k': x, **data} if f:\n        x, data", ["cfg", "f"]),
        ("match cfg:\n    case [loss, *x]:\n        x, loss", ["cfg"]),
        ("def g():\n    return model\nmodel = 1\ng()", []),
        ("def g():\n    return model\ng()\nmodel = 1", ["model"]),
        ("def g():\n    return h()\ndef h():\n    return model\ng()", ["model"]),
        ("g = lambda: model\nmodel = 1\ng()", []),
        ("class A(f):\n    y = cfg\n    def m(self):\n        return model", ["cfg", "f", "model"]),
        ("def g(a=cfg, *, b: x = 1) -> data:\n    return a\ng()", ["cfg", "data", "x"]),
        ("@f\ndef g():\n    return x\nx = 1", ["f", "x"]),
        ("f'{x!r:>{cfg}}'", ["cfg", "x"]),
        ("def g():\n    global model\n    model = 1\ng()\nmodel", ["model"]),
        ("del x", ["x"]),
        (
            "async def g():\n    async with cfg as x:\n        return [v async for v in data]\nawait g()",
            ["cfg", "data"],
        ),
        ("def main(args, ctx):\n    return helper(model)\ndef helper(m):\n    return cfg", ["cfg", "model"]),
        ("import x, os.path as f\nx, f", []),
        ("from __future__ import annotations\ndef g(a: model): ...\ng(1)", []),
    ],
)
def test_names_that_may_be_read_before_they_are_assigned_come_from_the_notebook(body: str, names: list[str]) -> None:
    expected = names
    got = made(body, NOTEBOOK).captured
    if "__future__" in body:
        got.pop("model", None)  # Python before 3.14 still lists annotations that nothing evaluates
    assert sorted(got) == expected


def test_a_name_that_the_cell_may_assign_itself_is_optional() -> None:
    function = made("if cfg:\n    model = 1\nmodel", NOTEBOOK)
    assert function.optional == {"model"}
    assert list(function.without(["model"]).captured) == ["cfg"]


def test_submodules_reached_through_a_captured_package_are_recorded() -> None:
    import xml.etree.ElementTree

    assert xml.etree.ElementTree
    function = made("xml.etree.ElementTree.fromstring('<a/>').tag", {"xml": xml})
    assert function.submodules == ("xml.etree", "xml.etree.ElementTree")


def test_python_s_open_replaces_the_one_that_ipython_puts_into_the_notebook() -> None:
    from IPython.core.interactiveshell import _modified_open

    assert made("open('p', 'w')", {"open": _modified_open}).captured == {}
    assert list(made("open('p')", {"open": lambda p: p}).captured) == ["open"]


def test_a_future_import_of_an_earlier_cell_holds_here_too() -> None:
    import __future__

    body = "def f(x: undefined_anywhere): ...\nf.__annotations__['x']"
    assert (
        made(body, {"undefined_anywhere": 1}, flags=__future__.annotations.compiler_flag)(0, 0) == "undefined_anywhere"
    )


# --- what is wrong with it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "fact"),
    [
        (
            "x = 1\nmodle.fit(x)",
            "Cell In[4], line 3: name 'modle' is neither in the cell nor in the notebook. Did you mean 'model'?",
        ),
        ("def g():\n    return nowhere_at_all\ng()", "Cell In[4], line 3: name 'nowhere_at_all' is neither"),
        ("display(x)", "Cell In[4], line 2: display exists only in the notebook."),
        ("!pip install x", "Cell In[4], line 2: !pip install x is IPython syntax."),
        ("x = 1\nfiles = !ls", "Cell In[4], line 3: files = !ls is IPython syntax."),
        ("x = 1\n%time x", "Cell In[4], line 3: %time x is IPython syntax."),
        ("%%time\nx", "Cell In[4], line 2: %%time is IPython syntax."),
        ("model?", "Cell In[4], line 2: model? is IPython syntax."),
        ("?model", "Cell In[4], line 2: ?model is IPython syntax."),
    ],
)
def test_mistakes_are_named_with_their_line(body: str, fact: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(body, NOTEBOOK)
    assert caught.value.fact.startswith(fact)


@pytest.mark.parametrize(
    "body",
    [
        "try:\n    missing\nexcept NameError:\n    missing = 1",
        "try:\n    missing\nexcept Exception:\n    pass",
        "from os.path import *\nbasename('a')",
        "exec('missing = 1')\nmissing",
        "globals()['missing'] = 1\nmissing",
        "if x:\n    missing = 1\nmissing",
        "__doc__",
    ],
)
def test_names_that_may_exist_when_the_cell_runs_are_no_mistakes(body: str) -> None:
    made(body, NOTEBOOK)


@pytest.mark.parametrize(
    ("body", "line"),
    [("x = (1,\ny = 3\n", 2), ("x = 1\nreturn x", 3), ("a\n\n\n  b", 5), ("x = 1\nnonlocal x", 3), ("a = 5 % % 2", 2)],
)
def test_a_syntax_error_has_the_cell_s_file_and_line(body: str, line: int) -> None:
    with pytest.raises(SyntaxError) as caught:
        made(body, {"a": 1})
    assert (caught.value.filename, caught.value.lineno) == ("<cell>", line)


def test_a_traceback_has_the_cell_s_lines() -> None:
    function = map_function("x = 1\n\ndef fail():\n    1 / 0\nfail()", {}, filename="<cell>", first_line=2)
    with pytest.raises(ZeroDivisionError) as caught:
        function(None, None)
    frames = [(f.lineno, f.name) for f in traceback.extract_tb(caught.value.__traceback__) if f.filename == "<cell>"]
    assert frames == [(6, "<module>"), (5, "fail")]


# --- elsewhere ----------------------------------------------------------------------------------------------


def test_a_cell_and_the_functions_of_the_notebook_share_one_namespace_there(child: Child) -> None:
    namespace = notebook("rate = 1\ndef get_rate(): return rate", "def set_rate(v):\n    global rate\n    rate = v")
    assert child.run_cell(
        "before = get_rate()\nrate = 5\nafter = get_rate()\nset_rate(6)\n(before, after, rate)", namespace
    ) == (1, 5, 6)
    assert namespace["rate"] == 1


TORTURE = '''
"""A docstring."""
from __future__ import annotations
import dataclasses, enum, functools, inspect, pickle, sys, typing
from math import *

T = typing.TypeVar("T")

class Color(enum.Enum):
    RED = 1

@dataclasses.dataclass(order=True)
class Point:
    x: int
    y: typing.ClassVar[int] = 3
    def moved(self, by: int = 1) -> Point:
        return Point(self.x + by + offset)

class Pair(typing.NamedTuple):
    a: int
    b: int = 2

def outer():
    n = 0
    def inner():
        nonlocal n
        n += 1
        return n
    return inner

@functools.lru_cache
def cached(v): return v * scale(1)

class Base:
    def __init_subclass__(cls, **kw): cls.tag = kw.get("tag")
class Derived(Base, tag="t"):
    def who(self): return __class__.__name__, super().__repr__()[:1]

inner = outer(); inner()
gen = (i * scale(i) for i in range(3))
squares = {k: [k * j for j in range(2)] for k in range(2) if (big := k) >= 0}
try:
    undefined_somewhere
except NameError as problem:
    text = str(problem)
async def later(v):
    return v
waited = [await later(i) async for i in _numbers()] if False else await later(9)
del Base
assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
assert pickle.loads(pickle.dumps(Pair(1))) == (1, 2)
assert "moved" in inspect.getsource(Point.moved)
assert sys.modules["__main__"].Point is Point
if __name__ == "__main__":
    main = True
values = [inner(), list(gen), Color.RED.name, Point(1).moved().x, Pair(1).b, cached(3), Derived().who(), Derived.tag]
[*values, big, text, waited, sqrt(4), main]
'''


def test_a_cell_with_everything_in_it_runs_in_a_clean_process(child: Child) -> None:
    namespace = notebook("offset = 10\nfactor = 2\ndef scale(v): return v * factor\nasync def _numbers():\n    yield 1")
    got = child.run_cell(TORTURE, namespace)
    text = "name 'undefined_somewhere' is not defined"
    assert got == [2, [0, 2, 8], "RED", 12, 2, 6, ("Derived", "<"), "t", 1, text, 9, 2.0, True]


def test_modules_travel_by_import_with_the_submodules_in_use(child: Child) -> None:
    namespace = notebook("import xml.etree.ElementTree\nimport collections.abc as abc\nimport os")
    assert child.run_cell("xml.etree.ElementTree.fromstring('<a/>').tag, abc.__name__, os.sep", namespace) == (
        "a",
        "collections.abc",
        "/",
    )


def test_sources_of_the_cell_and_of_earlier_cells_are_found_there(child: Child) -> None:
    namespace = notebook("def earlier(x):\n    # a comment that only the source has\n    return x")
    body = "import inspect\ndef here(y):\n    return y  # here\nclass K:\n    def m(self): return 1  # method\n"
    body += "[inspect.getsource(f) for f in (here, earlier, K.m)]"
    here, earlier, method = child.run_cell(body, namespace)
    assert here == "def here(y):\n    return y  # here\n"
    assert "a comment that only the source has" in earlier
    assert method.strip() == "def m(self): return 1  # method"


@pytest.mark.slow
def test_autograph_rewrites_functions_of_this_and_of_earlier_cells(child: Child) -> None:
    namespace = notebook(
        "import tensorflow as tf",
        "@tf.function\ndef earlier(x):\n    if x > 0:\n        return x\n    return -x",
    )
    body = """
@tf.function
def here(n):
    total = tf.constant(0)
    while n > 0:
        total += n
        n -= 1
    return total
int(here(tf.constant(4))), int(earlier(tf.constant(-3)))
"""
    assert child.run_cell(body, namespace) == (10, 3)


@pytest.mark.slow
def test_a_keras_layer_of_the_cell_survives_saving_and_loading(child: Child) -> None:
    body = """
import keras, numpy as np
@keras.saving.register_keras_serializable()
class Twice(keras.layers.Layer):
    def call(self, x): return 2 * x
model = keras.Sequential([keras.Input((1,)), Twice()])
model.save("model.keras")
float(keras.models.load_model("model.keras")(np.ones((1, 1)))[0, 0])
"""
    assert child.run_cell(body, {}) == 2.0


def test_a_cell_function_unpickles_without_its_notebook() -> None:
    import cloudpickle

    function = made("x + y", {"x": 1, "y": 2})
    again = pickle.loads(cloudpickle.dumps(function))
    assert again(None, None) == 3
    assert repr(again) == "<Cell In[4]: body(args, ctx)>"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="syntax of Python 3.12")
def test_type_parameters_and_aliases() -> None:
    body = "type A[T] = list[T]\ndef first[T](xs: A[T]) -> T:\n    return xs[k]\nclass Box[T]:\n    v: T\nfirst([1, 2])"
    assert sorted(made(body, {"k": 1, "T": 0}).captured) == ["k"]
    assert value_of(body, {"k": 1}) == 2


def test_what_traceback_printers_hang_onto_syntax_trees_is_not_followed() -> None:
    """IPython's gives every node a parent; contexts like Load are one object for all trees of the process."""

    class Elsewhere:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("a large tree of somebody else's")

    shared = ast.parse("x", mode="eval").body.ctx  # type: ignore[attr-defined]
    shared.parent = Elsewhere()
    try:
        assert sorted(made("y = [x for x in data]\ny", NOTEBOOK).captured) == ["data"]
    finally:
        del shared.parent


def test_reading_a_cell_takes_milliseconds() -> None:
    import time

    started = time.perf_counter()
    made(TORTURE, {"offset": 1, "scale": 1, "_numbers": 1})
    assert time.perf_counter() - started < 0.5
    assert ast.parse(TORTURE)
