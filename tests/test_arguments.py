from __future__ import annotations

import argparse
from typing import Any

import pytest

from tfos_magic import completion
from tfos_magic.arguments import (
    HelpRequestedError,
    InferLine,
    TrainLine,
    expand,
    option_strings,
    parse_duration,
    parse_infer,
    parse_train,
    split,
)
from tfos_magic.errors import UsageError


class DataFrame:
    """Looks like Spark's to whoever goes by names."""

    columns = ("age", "income", "label")
    schema = "…"

    def limit(self, n: int) -> DataFrame:
        return self


DataFrame.__module__ = "pyspark.sql.classic.dataframe"
SparkSession = type("SparkSession", (), {"__module__": "pyspark.sql.session"})
PandasFrame = type("DataFrame", (), {"__module__": "pandas.core.frame"})
FRAME = DataFrame()


def names(**more: Any) -> dict[str, Any]:
    return {
        "train_df": FRAME,
        "spark2": SparkSession(),
        "pandas_df": PandasFrame(),
        "n": 3,
        "cols": ["a", "b"],
        "params": {"lr": 0.1},
        "space": argparse.Namespace(lr=0.2),
        "text": "word",
        **more,
    }


def parsed(line: str, **more: Any) -> TrainLine:
    return parse_train(line, names(**more))


def test_every_option_arrives() -> None:
    line = parsed(
        "--executors 8 --data train_df --validation train_df.limit(3) --epochs 5 --batch-size 32 --label label "
        "--features age,income --weight w --no-shuffle --seed 7 --args params --out result --ps 2 --no-chief "
        "--evaluator --timeout 1h30m --session spark2 --dry-run --quiet"
    )
    assert line == TrainLine(
        executors=8,
        data=FRAME,
        validation=FRAME,
        epochs=5,
        batch_size=32,
        label="label",
        features=("age", "income"),
        weight="w",
        shuffle=False,
        seed=7,
        args={"lr": 0.1},
        out="result",
        ps=2,
        chief=False,
        evaluator=True,
        timeout_s=5400.0,
        session="spark2",
        is_dry_run=True,
        is_quiet=True,
    )


def test_defaults_and_spellings() -> None:
    assert parsed("-n 2") == parsed("--nodes=2") == parsed("--executors 2") == TrainLine(executors=2)
    assert parsed("-n 2 helper").function == "helper"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a  b", ["a", "b"]),
        ("""--label 'my label' --x "two words" """, ["--label", "my label", "--x", "two words"]),
        (r'a\ b "c\"d"', ["a b", 'c"d']),
        ("--data df.filter('x > 1 )')", ["--data", "df.filter('x > 1 )')"]),
        ('--args {"lr": 0.1, "l": [1, 2]} -n 2', ["--args", '{"lr": 0.1, "l": [1, 2]}', "-n", "2"]),
        ("--epochs={2 * n} x", ["--epochs={2 * n}", "x"]),
        ("''", [""]),
        ("", []),
    ],
)
def test_words_are_split_as_in_a_shell_but_brackets_hold_together(line: str, words: list[str]) -> None:
    assert split(line) == words


@pytest.mark.parametrize("line", ["--label 'open", "--data f(1", '--args {"a": [1}', "--data f('"])
def test_what_is_never_closed_is_said(line: str) -> None:
    with pytest.raises(UsageError, match="never closed"):
        split(line)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{n}", 3),
        ("$n", 3),
        ("{n + 1}", 4),
        ("{cols}", ["a", "b"]),
        ("run_{n}_$text", "run_3_word"),
        ("{{n}}", "{n}"),
        ("$$n", "$n"),
        ("5$", "5$"),
        ("a{b", "a{b"),
        ("a}b", "a}b"),
        ('{"a": 1, "b"}', '{"a": 1, "b"}'),
        ("{}", "{}"),
        ("", ""),
        ("plain", "plain"),
    ],
)
def test_expressions_and_names_expand(text: str, value: Any) -> None:
    assert expand(text, names()) == value


def test_options_expand_one_by_one() -> None:
    line = parsed("--executors {n} --epochs $n --label {text}_x --out r_{n} --features {cols} --timeout {n * 60}")
    assert (line.executors, line.epochs, line.label, line.out) == (3, 3, "word_x", "r_3")
    assert (line.features, line.timeout_s) == (("a", "b"), 180.0)


@pytest.mark.parametrize(
    "value", ["train_df", "{train_df}", "$train_df", "'train_df'", "train_df.limit(2)", "{train_df.limit(2)}"]
)
def test_a_frame_is_an_expression_in_any_spelling(value: str) -> None:
    assert parsed(f"-n 2 --data {value}").data is FRAME


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("params", {"lr": 0.1}),
        ("{params}", {"lr": 0.1}),
        ("$params", {"lr": 0.1}),
        ("space", {"lr": 0.2}),
        ("dict(lr=n, deep=[1, 2])", {"lr": 3, "deep": [1, 2]}),
        ('{"lr": n}', {"lr": 3}),
        ('\'{"lr": true, "x": null}\'', {"lr": True, "x": None}),
        ('{"lr": true}', {"lr": True}),
        ("{}", {}),
        ("{**params, 'x': 1}", {"lr": 0.1, "x": 1}),
    ],
)
def test_args_are_an_expression_or_json(value: str, expected: dict[str, Any]) -> None:
    assert parsed(f"-n 2 --args {value}").args == expected


@pytest.mark.parametrize(
    ("value", "points"),
    [
        ('{"lr": [0.1, n], "k": (1, 2)}', [(0.1, 1), (0.1, 2), (3, 1), (3, 2)]),
        ("[dict(lr=0.1, k=1), {'lr': n, 'k': 2}]", [(0.1, 1), (3, 2)]),
        ('\'[{"lr": null, "k": true}]\'', [(None, True)]),
        ("$tried", [(1, 2)]),
        ("{'lr': numpy.array([0.5, 1.5]), 'k': range(1)}", [(0.5, 0), (1.5, 0)]),
    ],
)
def test_a_grid_is_a_list_of_points_or_all_combinations(value: str, points: list[tuple[Any, ...]]) -> None:
    import numpy

    line = parsed(f"--independent --grid {value}", numpy=numpy, tried=[{"lr": 1, "k": 2}])
    assert [(point["lr"], point["k"]) for point in line.grid or ()] == points
    assert line.executors == len(points)
    assert line.is_independent
    assert not line.chief
    assert parsed(f"-n {len(points)} --independent --grid {value}", numpy=numpy, tried=[{"lr": 1, "k": 2}]) == line


def test_independent_nodes_need_no_grid() -> None:
    assert parsed("-n 3 --independent") == TrainLine(executors=3, is_independent=True, chief=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--executors is missing: on how many executors? For example --executors 2."),
        ("--executor 2", "Unknown option --executor. Did you mean --executors?"),
        ("-n 2 --epoch=3", "Unknown option --epoch. Did you mean --epochs?"),
        ("-n 2 --zzz", "Unknown option --zzz. See %tfos_train --help."),
        ("-n 2 one two", "Unexpected 'two'. Options begin with --; quote values that hold spaces."),
        ("-n", "Argument --executors/--nodes/-n: expected one argument."),
        ("-n two", "--executors two: a whole number is needed."),
        ("-n 1.5", "--executors 1.5: a whole number is needed."),
        ("-n 0", "--executors 0: 0 is too few; at least 1."),
        ("-n -1", "--executors -1: -1 is too few; at least 1."),
        ("-n 2 --epochs 0", "--epochs 0: 0 is too few; at least 1."),
        ("-n 2 --batch-size -1", "--batch-size -1: -1 is too few; at least 1."),
        ("-n 2 --seed -1", "--seed -1: -1 is negative."),
        ("-n {cols}", "--executors {cols}: a whole number is needed."),
        ("-n {m}", "--executors {m}: name 'm' is not defined."),
        ("-n 2 --label {txt}", "--label {txt}: name 'txt' is not defined. Did you mean 'text'?"),
        ("-n 2 --epochs {1/0}", "--epochs {1/0}: ZeroDivisionError: division by zero"),
        ("-n 2 --label {n}", "--label {n}: text is needed, not int."),
        ("-n 4 --ps 4", "--executors 4 with --ps 4 leaves no node that trains: at least --executors 5."),
        (
            "-n 3 --ps 2 --evaluator",
            "--executors 3 with --ps 2 and --evaluator leaves no node that trains: at least --executors 4.",
        ),
        ("-n 2 --grid [{}]", "--grid needs --independent: each node works at one point of the grid, for itself."),
        ("--independent", "--executors is missing: on how many executors? For example --executors 2."),
        ("--independent --grid 3", "--grid 3: a list of dicts or a dict of lists is needed, not int."),
        ("--independent --grid []", "--grid []: it has no points."),
        ("--independent --grid {}", "--grid {}: it has no points."),
        ("--independent --grid [params,n]", "--grid [params,n]: item 1 is no dict, but int."),
        ("--independent --grid {'a':1}", "--grid {'a':1}: a needs a list of values, not int."),
        ("--independent --grid {'a':'bc'}", "--grid {'a':'bc'}: a needs a list of values, not str."),
        ("--independent --grid {'a':[]}", "--grid {'a':[]}: a has no values."),
        ("--independent --grid {'a-b':[1]}", "--grid {'a-b':[1]}: 'a-b' cannot be an attribute of args."),
        ("--independent --grid [{1:2}]", "--grid [{1:2}]: 1 cannot be an attribute of args."),
        (
            "-n 2 --independent --grid {'a':[1,2,3]}",
            "--executors 2: the grid has 3 points, and each is a node. Leave --executors away: "
            "as many nodes run at once as there are free slots.",
        ),
        (
            "-n 2 --independent --data train_df",
            "--data does not go with --independent: independent nodes are not fed. Read files in the cell; "
            "what df.toPandas() gives travels by its name.",
        ),
        (
            "-n 2 --independent --checkpoint there",
            "--checkpoint does not go with --independent: independent nodes would overwrite each other's files. "
            "Write them in the cell, to a path with ctx.executor_id in it.",
        ),
        (
            "-n 3 --independent --evaluator",
            "--evaluator does not go with --independent: independent nodes have nobody to watch: each evaluates by "
            "itself. Leave one of the two away.",
        ),
        ("-n 2 --out 2x", "--out 2x: a variable name is needed."),
        ("-n 2 --out class", "--out class: a variable name is needed."),
        ("-n 2 --timeout soon", "--timeout soon: a time is needed, as in 90, 90s, 10m, 2h or 1h30m."),
        ("-n 2 --timeout 0", "--timeout 0: a time is needed, as in 90, 90s, 10m, 2h or 1h30m."),
        ("-n 2 --session sprk2", "--session sprk2: the notebook has no such name. Did you mean 'spark2'?"),
        ("-n 2 --data train_d", "--data train_d: name 'train_d' is not defined. Did you mean 'train_df'?"),
        ("-n 2 --data 1+", "--data 1+: this is no Python expression."),
        ("-n 2 --data n", "--data n: a Spark DataFrame is needed, not int."),
        (
            "-n 2 --data pandas_df",
            "--data pandas_df: it is a pandas DataFrame; spark.createDataFrame(…) makes a Spark DataFrame of it.",
        ),
        ("-n 2 --args n", "--args n: a dict, a Namespace or JSON is needed, not int."),
        ("-n 2 --args '{\"a b\": 1}'", "--args {\"a b\": 1}: 'a b' cannot be an attribute of args."),
        ("-n 2 --features a,,b", "--features a,,b: column names are needed, as in a,b,c or a list of str."),
        ("-n 2 --features a,b,a", "--features a,b,a: a is there twice."),
    ],
)
def test_mistakes_are_one_line_and_name_the_option(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(line)
    assert str(caught.value) == message
    assert "\n" not in message


@pytest.mark.parametrize("line", ["--help", "-h", "--executors 2 --help"])
def test_help_wins_over_everything(line: str) -> None:
    with pytest.raises(HelpRequestedError):
        parsed(line)


# --- inference -----------------------------------------------------------------------------------------------


def test_every_option_of_inference_arrives() -> None:
    line = parse_infer(
        "model --executors 8 --data train_df.limit(3) --out preds --features age,income --keep label --batch-size 32 "
        "--schema 'score float' --save {text}/out --mode overwrite --args params --timeout 1h --session spark2 "
        "--dry-run --quiet",
        names(),
    )
    assert line == InferLine(
        executors=8,
        function="model",
        data=FRAME,
        out="preds",
        features=("age", "income"),
        keep=("label",),
        batch_size=32,
        schema="score float",
        save="word/out",
        mode="overwrite",
        args={"lr": 0.1},
        timeout_s=3600.0,
        session="spark2",
        is_dry_run=True,
        is_quiet=True,
    )
    small = parse_infer("-n 2 --data train_df --out p", names())
    assert small == InferLine(executors=2, data=FRAME, out="p", batch_size=1024, mode="error")


def test_a_schema_may_be_spark_s_own_object() -> None:
    from pyspark.sql.types import FloatType, StructField, StructType

    schema = StructType([StructField("score", FloatType())])
    assert parse_infer("-n 2 --data train_df --out p --schema {schema}", names(schema=schema)).schema == (
        "struct<score:float>"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-n 2 --out p", "--data is missing: which DataFrame? For example --data train_df."),
        (
            "-n 2 --data train_df",
            "--out is missing: what is the DataFrame with the predictions to be called? --out preds.",
        ),
        ("--data train_df --out p", "--executors is missing: on how many executors? For example --executors 2."),
        ("-n 2 --data train_df --out 1p", "--out 1p: a variable name is needed."),
        ("-n 2 --data pandas_df --out p", "--data pandas_df: it is a pandas DataFrame; "),
        ("-n 2 --data train_df --out p --mode append", "--mode append says how to write, but --save is missing"),
        (
            "-n 2 --data train_df --out p --save x --mode overwite",
            "--mode overwite: one of error, errorifexists, overwrite, append, ignore is needed. "
            "Did you mean 'overwrite'?",
        ),
        ("-n 2 --data train_df --out p --schema {n}", "--schema {n}: text is needed, not int."),
        ("-n 2 --data train_df --out p --keep a,a", "--keep a,a: a is there twice."),
        ("-n 2 --data train_df --out p --ps 1", "Unknown option --ps. "),
        ("-n 2 --data train_df --ou p", "Unknown option --ou. Did you mean --out?"),
    ],
)
def test_mistakes_of_inference_are_one_line_and_name_the_option(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_infer(line, names())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_help_of_inference_is_its_own() -> None:
    with pytest.raises(HelpRequestedError, match="%%tfos_infer --executors N"):
        parse_infer("--help", names())


# --- durations, completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("1.5m", 90),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h1m1s", 3661),
        ("", None),
        ("m", None),
        ("1x", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


class Model:
    def predict_on_batch(self, batch: Any) -> None: ...


INFER_OPTIONS = [text for text in option_strings("tfos_infer") if text.startswith("--")]


def function(args: Any, ctx: Any) -> None: ...


function.__module__ = "__main__"


@pytest.mark.parametrize(
    ("text", "token", "expected"),
    [
        ("%%tfos_train --ep", "--ep", ["--epochs"]),
        ("%%tfos_train --executors 2 --ex", "--ex", []),
        ("%%tfos_train --data ", "", ["train_df"]),
        ("%%tfos_train --data tr", "tr", ["train_df"]),
        ("%%tfos_train --data=tr", "tr", ["train_df"]),
        ("%%tfos_train --session ", "", ["spark2"]),
        ("%%tfos_train --args ", "", ["params", "space"]),
        ("%%tfos_train --independent --grid ", "", ["params", "points"]),
        ("%%tfos_train --data train_df --label ", "", ["age", "income", "label"]),
        ("%%tfos_train --data train_df --features age,in", "in", ["income"]),
        ("%%tfos_train --label ", "", []),
        ("%tfos_train -n 2 fu", "fu", ["function"]),
        ("%%tfos_train -n 2 fu", "fu", []),
        ("%tfos_namedtuple re", "re", ["revert", "restore"]),
        ("%%tfos_infer --k", "--k", ["--keep"]),
        ("%%tfos_infer --data train_df --keep ", "", ["age", "income", "label"]),
        ("%%tfos_infer --mode o", "o", ["overwrite"]),
        ("%%tfos_infer --label ", "", INFER_OPTIONS),
        ("%tfos_infer mo", "mo", ["model"]),
        ("%tfos_infer -n 2 fu", "fu", ["function"]),
        ("%tfos_stop ", "", ["preds"]),
        ("%tfos_stop x", "x", []),
        ("%%time x", "x", None),
        ("tfos_train --ep", "--ep", None),
    ],
)
def test_completion(text: str, token: str, expected: list[str] | None) -> None:
    known = names(function=function, model=Model(), points=[{"lr": 1}])
    assert completion.choices(text, token, known, standing=["preds"]) == expected
