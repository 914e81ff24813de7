"""DataFrames to TFRecord files and back, with real Spark and TensorFlow's own reader and writer."""

from __future__ import annotations

import gc
import gzip
import json
import os
import random
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tfos_magic import dfutil
from tfos_magic.errors import DataError, UsageError

Script = Callable[..., subprocess.CompletedProcess[str]]

TYPES = """
    bo boolean, ty tinyint, sh smallint, n int, bi bigint, fl float, do double, st string, by binary,
    bos array<boolean>, ns array<int>, bis array<bigint>, fls array<float>, dos array<double>, sts array<string>,
    bys array<binary>
"""
ROW = {
    "bo": True, "ty": -1, "sh": 300, "n": -(2**31), "bi": 2**63 - 1, "fl": 0.5, "do": -1.25, "st": "ä", "by": b"\xff\0",
    "bos": [True, False], "ns": [1, 2], "bis": [-(2**63), 0], "fls": [0.5], "dos": [1.5, 2.5], "sts": ["", "b"],
    "bys": [b"", b"\xff"],
}  # fmt: skip
NUMBERS = ("bo", "ty", "sh", "n", "bi", "bos", "ns", "bis")
BYTES = ("st", "by", "sts", "bys")


@pytest.fixture(scope="module")
def tf() -> Any:
    return pytest.importorskip("tensorflow")


def frame(spark: Any, rows: list[dict[str, Any]], schema: str = TYPES, parts: int = 1) -> Any:
    df = spark.createDataFrame([tuple(row.values()) for row in rows], schema)
    return df.coalesce(1) if parts == 1 else df.repartition(parts)


def examples(tf: Any, directory: Path, compression: str = "") -> list[dict[str, Any]]:
    """What TensorFlow reads: the features of each record."""
    paths = sorted(map(str, directory.glob("part-*")))
    found = []
    for record in tf.data.TFRecordDataset(paths, compression_type=compression).as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        kinds = {name: feature.WhichOneof("kind") for name, feature in features.items()}
        found.append({name: (kind, list(getattr(features[name], kind).value)) for name, kind in kinds.items()})
    return found


def write(tf: Any, path: Path, rows: list[dict[str, list[Any]]], compression: str = "") -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for row in rows:
            example = tf.train.Example()
            for name, values in row.items():
                kind = {int: "int64_list", float: "float_list", bytes: "bytes_list"}[type(values[0] if values else 0)]
                getattr(example.features.feature[name], kind).value.extend(values)
            writer.write(example.SerializeToString())
    return str(path.parent)


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_what_tensorflow_reads_is_what_the_dataframe_holds(
    spark_local4: Any, tf: Any, tmp_path: Path, compression: str | None
) -> None:
    nothing = dict.fromkeys(ROW)
    empty = {**nothing, "ns": [], "fls": [], "sts": []}
    dfutil.saveAsTFRecords(frame(spark_local4, [ROW, nothing, empty]), str(tmp_path / "o"), compression=compression)
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == ["_SUCCESS", f"part-00000{'.gz' if compression else ''}"]

    def values(name: str) -> list[Any]:
        value = ROW[name]
        listed = value if isinstance(value, list) else [value]
        return [each.encode() if isinstance(each, str) else each for each in listed]

    first, second, third = examples(tf, tmp_path / "o", "GZIP" if compression else "")
    assert second == {}
    assert third == {"ns": ("int64_list", []), "fls": ("float_list", []), "sts": ("bytes_list", [])}
    assert first == {
        name: ("int64_list" if name in NUMBERS else "bytes_list" if name in BYTES else "float_list", values(name))
        for name in ROW
    }


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("first_argument", ["session", "context"])
def test_a_dataframe_comes_back_equal(
    spark_local4: Any, tmp_path: Path, compression: str | None, first_argument: str
) -> None:
    nothing = dict.fromkeys(ROW)
    empty = {**nothing, "ns": [], "fls": [], "sts": []}
    df = frame(spark_local4, [ROW, nothing, empty])
    dfutil.saveAsTFRecords(df, str(tmp_path / "o"), compression=compression)
    sc = spark_local4 if first_argument == "session" else spark_local4.sparkContext
    loaded = dfutil.loadTFRecords(sc, str(tmp_path / "o"), schema=df.schema)
    assert loaded.schema == df.schema
    assert loaded.collect() == df.collect()


def test_without_hints_the_types_are_tfoss(spark_local4: Any, tmp_path: Path) -> None:
    dfutil.saveAsTFRecords(frame(spark_local4, [ROW]), str(tmp_path / "o"))
    loaded = dfutil.loadTFRecords(spark_local4, str(tmp_path / "o"), ["st"])
    expected = {name: "bigint" if name in NUMBERS else "string" if name in BYTES else "double" for name in ROW}
    expected |= {"st": "binary", "by": "binary"}  # named, not UTF-8
    lists = {name for name, value in ROW.items() if isinstance(value, list) and len(value) > 1}
    expected |= {name: f"array<{'binary' if name == 'bys' else expected[name]}>" for name in lists}
    assert loaded.dtypes == sorted(expected.items())
    assert loaded.first()["fls"] == 0.5  # one value: TFoS cannot know that it was an array


@pytest.mark.slow
def test_every_partition_is_a_file_and_every_file_a_partition(spark_local4: Any, tmp_path: Path) -> None:
    df = spark_local4.range(0, 100_000, 1, 7).selectExpr("id", "if(id % 3 = 0, null, concat('s', id)) s")
    dfutil.saveAsTFRecords(df, str(tmp_path / "o"))
    assert sorted(p.name for p in (tmp_path / "o").glob("p*")) == [f"part-{part:05d}" for part in range(7)]
    loaded = dfutil.loadTFRecords(spark_local4, str(tmp_path / "o"))
    assert loaded.rdd.getNumPartitions() == 7
    assert loaded.collect() == df.collect()  # in order


def test_ml_vectors_become_floats(spark_local4: Any, tf: Any, tmp_path: Path) -> None:
    from pyspark.ml.linalg import Vectors

    rows = [(1, Vectors.dense([1.0, 2.0])), (2, Vectors.sparse(3, {1: 5.0})), (3, None)]
    df = spark_local4.createDataFrame(rows, ["id", "a.b"]).coalesce(1)
    dfutil.saveAsTFRecords(df, str(tmp_path / "o"))
    found = [each.get("a.b") for each in examples(tf, tmp_path / "o")]
    assert found == [("float_list", [1.0, 2.0]), ("float_list", [0.0, 5.0, 0.0]), None]


def test_empty_partitions_and_empty_dataframes(spark_local4: Any, tmp_path: Path) -> None:
    df = spark_local4.range(0, 2, 1, 4)
    dfutil.saveAsTFRecords(df, str(tmp_path / "o"))
    assert dfutil.loadTFRecords(spark_local4, str(tmp_path / "o")).collect() == df.collect()
    dfutil.saveAsTFRecords(df.filter("id > 5"), str(tmp_path / "none"))
    assert (tmp_path / "none" / "_SUCCESS").exists()
    with pytest.raises(DataError, match=r"no TFRecord files|no record with a feature"):
        dfutil.loadTFRecords(spark_local4, str(tmp_path / "none"))
    (tmp_path / "none" / "part-00000").touch()
    assert dfutil.loadTFRecords(spark_local4, str(tmp_path / "none"), schema="id bigint").collect() == []


def test_a_batch_larger_than_what_is_written_at_a_time(spark_local4: Any, tmp_path: Path) -> None:
    df = spark_local4.range(0, 50, 1, 1).selectExpr("id", "repeat('x', 1000000) s")  # 50 MB in one Arrow batch
    dfutil.saveAsTFRecords(df, str(tmp_path / "o"))
    loaded = dfutil.loadTFRecords(spark_local4, str(tmp_path / "o")).selectExpr("id", "length(s)")
    assert [tuple(row) for row in loaded.collect()] == [(number, 1_000_000) for number in range(50)]


# --- TensorFlow's files -----------------------------------------------------------------------------------------


def test_files_that_tensorflow_has_written(spark_local4: Any, tf: Any, tmp_path: Path) -> None:
    rows = [{"x": [number], "v": [0.5 * number, 1.0], "s": [b"t%d" % number]} for number in range(5)]
    write(tf, tmp_path / "o" / "a.tfrecord", rows[:2])
    write(tf, tmp_path / "o" / "b.tfrecord.gz", rows[2:4], "GZIP")
    write(tf, tmp_path / "o" / "c", rows[4:], "GZIP")  # nothing in its name says so
    write(tf, tmp_path / "o" / "_hidden", [{"no": [1]}])
    write(tf, tmp_path / "o" / ".hidden", [{"no": [1]}])
    expected = [(f"t{number}", [0.5 * number, 1.0], number) for number in range(5)]

    def load(path: str) -> list[Any]:
        return [tuple(row) for row in dfutil.loadTFRecords(spark_local4, path).collect()]

    assert load(str(tmp_path / "o")) == expected
    assert load(f"file://{tmp_path}/o/") == expected
    assert load(str(tmp_path / "o" / "b.tfrecord.gz")) == expected[2:4]
    assert load(str(tmp_path / "o" / "*tfrecord*")) == expected[:4]
    assert load(str(tmp_path / "[op]")) == expected
    with pytest.raises(DataError, match=r"There are no TFRecord files at .*/nothing"):
        load(str(tmp_path / "nothing"))


def test_the_schema_comes_from_many_records_of_many_files(spark_local4: Any, tf: Any, tmp_path: Path) -> None:
    write(tf, tmp_path / "o" / "a", [{"n": [1], "late": [], "s": [b"text"], "mixed": [1], "bad": [b"ok"]}] * 3)
    write(tf, tmp_path / "o" / "b", [{}, {"n": [1, 2], "late": [0.5], "mixed": [0.5], "bad": [b"\xff"], "new": [1]}])
    loaded = dfutil.loadTFRecords(spark_local4, str(tmp_path / "o"))
    assert dict(loaded.dtypes) == {
        "n": "array<bigint>", "late": "double", "s": "string", "mixed": "double", "bad": "binary", "new": "bigint",
    }  # fmt: skip
    rows = loaded.select("n", "late", "s", "mixed", "bad", "new").collect()
    assert [tuple(row) for row in rows] == [
        *[([1], None, "text", 1.0, b"ok", None)] * 3,
        (None,) * 6,
        ([1, 2], 0.5, None, 0.5, b"\xff", 1),
    ]


def test_a_feature_of_two_kinds_is_an_error(spark_local4: Any, tf: Any, tmp_path: Path) -> None:
    directory = write(tf, tmp_path / "o" / "a", [{"x": [1]}, {"x": [b"1"]}])
    with pytest.raises(DataError, match="'x' is bytes in some records and int64 in others"):
        dfutil.loadTFRecords(spark_local4, directory)


def test_a_schema_in_part_and_as_a_whole(spark_local4: Any, tf: Any, tmp_path: Path) -> None:
    from pyspark.sql.types import BinaryType

    directory = write(tf, tmp_path / "o" / "a", [{"x": [1], "y": [2.0], "s": [b"t"]}])

    def load(schema: Any) -> tuple[list[tuple[str, str]], tuple[Any, ...]]:
        loaded = dfutil.loadTFRecords(spark_local4, directory, schema=schema)
        return loaded.dtypes, tuple(loaded.first())

    assert load({"x": "array<int>", "s": BinaryType()}) == (
        [("s", "binary"), ("x", "array<int>"), ("y", "double")],
        (b"t", [1], 2.0),
    )
    assert load("y float, x double, absent string") == (
        [("y", "float"), ("x", "double"), ("absent", "string")],
        (2.0, 1.0, None),
    )
    with pytest.raises(UsageError, match="schema: Column 'x' has the type date"):
        load("x date")


def test_infer_schema_takes_an_example(tf: Any) -> None:
    example = tf.train.Example()
    for name, kind, values in [
        ("i", "int64_list", [1]), ("f", "float_list", [1.0, 2.0]), ("b", "bytes_list", [b"x"]),
        ("t", "bytes_list", [b"x"]), ("e", "float_list", []),
    ]:  # fmt: skip
        getattr(example.features.feature[name], kind).value.extend(values)
    for given in (example, example.SerializeToString()):
        schema = dfutil.infer_schema(given, ["b"])
        assert {field.name: field.dataType.simpleString() for field in schema.fields} == {
            "b": "binary", "e": "string", "f": "array<double>", "i": "bigint", "t": "string",
        }  # fmt: skip


# --- TFoS's functions for RDDs ----------------------------------------------------------------------------------


def test_rows_of_an_rdd_become_examples_and_rows_again(spark_local4: Any, tf: Any) -> None:
    df = frame(spark_local4, [ROW])
    pairs = df.rdd.mapPartitions(dfutil.toTFExample(df.dtypes)).collect()
    assert [type(each) for each in pairs[0]] == [bytearray, type(None)]
    features = tf.train.Example.FromString(bytes(pairs[0][0])).features.feature
    assert list(features["sts"].bytes_list.value) == [b"", b"b"]
    binary = ["by", "bys"]
    (row,) = spark_local4.sparkContext.parallelize(pairs).mapPartitions(
        lambda records: dfutil.fromTFExample(records, binary)
    ).collect()  # fmt: skip
    expected = {name: ROW[name] for name in sorted(ROW)} | {"fls": 0.5}  # one value is itself
    assert row.asDict() == expected


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "hint"),
    [
        ("cast(1 as decimal(9,2))", r'cast\("double"\)'),
        ("current_date()", r'cast\("string"\)'),
        ("current_timestamp()", r"seconds since 1970"),
        ("named_struct('a', 1)", r'select\("\*", "x\.\*"\)'),
        ("map('a', 1)", r'df\["x"\]\["a"\]'),
        ("array(array(1))", "flatten"),
        ("array(current_date())", "cast its elements"),
        ("null", r'df\.drop\("x"\)'),
    ],
)
def test_types_that_are_no_feature_are_refused_before_spark_runs(
    spark_local4: Any, tmp_path: Path, expression: str, hint: str
) -> None:
    df = spark_local4.range(1).selectExpr("id", f"{expression} as x")
    with pytest.raises(
        DataError, match=rf"Column 'x' has the type .* which no TensorFlow feature can hold[\s\S]*{hint}"
    ):
        dfutil.saveAsTFRecords(df, str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_two_columns_of_one_name_and_unknown_arguments_are_refused(spark_local4: Any, tmp_path: Path) -> None:
    df = spark_local4.range(1)
    with pytest.raises(DataError, match="more than one column named 'id'"):
        dfutil.saveAsTFRecords(df.crossJoin(df), str(tmp_path / "o"))
    with pytest.raises(UsageError, match="compression='zip'"):
        dfutil.saveAsTFRecords(df, str(tmp_path / "o"), compression="zip")
    with pytest.raises(UsageError, match="mode='w'"):
        dfutil.saveAsTFRecords(df, str(tmp_path / "o"), mode="w")
    assert not (tmp_path / "o").exists()


def test_a_damaged_file_is_named_when_the_rows_are_read(spark_local4: Any, tf: Any, tmp_path: Path) -> None:
    directory = write(tf, tmp_path / "o" / "part-0", [{"x": [1000 + number]} for number in range(1000)])
    path = tmp_path / "o" / "part-0"
    content = bytearray(path.read_bytes())
    at = len(content) // 1000 * 900
    content[at + 14] ^= 1
    path.write_bytes(content)
    loaded = dfutil.loadTFRecords(spark_local4, directory, schema="x bigint")
    with pytest.raises(Exception, match=f"DataError: {path} is damaged .* at byte {at:,} the checksum"):
        loaded.count()
    with pytest.raises(DataError, match=f"{path} is damaged"):  # while the schema is inferred: no Java in sight
        dfutil.loadTFRecords(spark_local4, directory)


# --- what is left where -----------------------------------------------------------------------------------------


def test_modes(spark_local4: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "o")

    def save(first: int, mode: str) -> None:
        dfutil.saveAsTFRecords(spark_local4.range(first, first + 2, 1, 2), path, mode=mode)

    def state() -> tuple[list[str], list[int]]:
        rows = dfutil.loadTFRecords(spark_local4, path).collect()
        return sorted(os.listdir(path)), [row.id for row in rows]

    save(0, "ignore")
    assert state() == (["_SUCCESS", "part-00000", "part-00001"], [0, 1])
    with pytest.raises(UsageError, match="is there already"):
        save(9, "error")
    save(9, "ignore")
    assert state()[1] == [0, 1]
    save(2, "append")
    assert state() == (["_SUCCESS", *(f"part-0000{part}" for part in range(4))], [0, 1, 2, 3])
    (tmp_path / "o" / "other").touch()
    save(7, "overwrite")
    assert state() == (["_SUCCESS", "part-00000", "part-00001"], [7, 8])
    with pytest.raises(UsageError, match="is a file, not a directory"):
        dfutil.saveAsTFRecords(spark_local4.range(1), f"{path}/part-00000", mode="overwrite")


def test_a_directory_can_be_overwritten_by_what_is_loaded_from_it(spark_local4: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "o")
    dfutil.saveAsTFRecords(spark_local4.range(10), path)
    dfutil.saveAsTFRecords(dfutil.loadTFRecords(spark_local4, path).filter("id > 7"), path, mode="overwrite")
    assert [row.id for row in dfutil.loadTFRecords(spark_local4, path).collect()] == [8, 9]


@pytest.mark.parametrize("mode", ["error", "overwrite", "append"])
@pytest.mark.parametrize("cause", ["data", "spark"])
def test_a_save_that_fails_leaves_the_directory_as_it_was(
    spark_local4: Any, tmp_path: Path, mode: str, cause: str
) -> None:
    path = tmp_path / "o"
    if mode != "error":
        dfutil.saveAsTFRecords(spark_local4.range(3).coalesce(1), str(path))
    last = "array(id, null)" if cause == "data" else "array(raise_error('no'))"
    df = spark_local4.range(0, 100, 1, 4).selectExpr(f"if(id = 99, {last}, array(id)) x")
    with pytest.raises(
        DataError if cause == "data" else Exception, match="has 1 nulls inside" if cause == "data" else "no"
    ):
        dfutil.saveAsTFRecords(df, str(path), mode=mode)
    if mode == "error":
        assert not path.exists()
    else:
        assert sorted(os.listdir(path)) == ["_SUCCESS", "part-00000"]
        assert dfutil.loadTFRecords(spark_local4, str(path)).count() == 3


def test_a_commit_that_fails_takes_back_what_it_has_named(spark_local4: Any, tmp_path: Path) -> None:
    path = tmp_path / "o"
    dfutil.saveAsTFRecords(spark_local4.range(0, 2, 1, 1), str(path))
    from tfos_magic.tfrecords.output import Output

    with pytest.raises(FileNotFoundError), Output.at(str(path), "append") as output:
        assert output is not None
        Path(output.scratch, "00000-1").write_bytes(b"")
        output.commit([f"{output.scratch}/00000-1", f"{output.scratch}/00001-2"], "")
    assert sorted(os.listdir(path)) == ["_SUCCESS", "part-00000"]


@pytest.mark.slow
def test_a_task_that_is_tried_again_leaves_one_complete_file(spark_script: Script, tmp_path: Path) -> None:
    code = """
        import os, sys
        from pyspark.sql import SparkSession
        from tfos_magic import dfutil

        out, marks = sys.argv[1:]
        spark = SparkSession.builder.getOrCreate()

        def failing(batches):
            from pyspark import TaskContext
            context = TaskContext.get()
            for batch in batches:
                yield batch
            if context.partitionId() == 1 and context.attemptNumber() == 0:
                open(f"{marks}/{len(os.listdir(out))}", "w").close()
                raise RuntimeError("the first attempt")

        df = spark.range(0, 40_000, 1, 3)
        dfutil.saveAsTFRecords(df.mapInArrow(failing, "id long"), out)
        loaded = dfutil.loadTFRecords(spark, out)
        assert loaded.collect() == df.collect()
        spark.stop()
    """
    (tmp_path / "marks").mkdir()
    spark_script(code, master="local[2,3]", args=(str(tmp_path / "o"), str(tmp_path / "marks")))
    assert os.listdir(tmp_path / "marks") == ["1"]  # while it was written: nothing but the temporary directory
    assert sorted(os.listdir(tmp_path / "o")) == ["_SUCCESS", *(f"part-0000{part}" for part in range(3))]


@pytest.mark.slow
def test_executors_need_not_have_the_package(spark_script: Script, tmp_path: Path) -> None:
    site = sysconfig.get_paths()["purelib"]
    bare = tmp_path / "python"  # -S: an editable installation is found by what site-packages' .pth files start
    bare.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{site}" exec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code = """
        import sys
        from pyspark.sql import SparkSession
        from tfos_magic import dfutil

        out = sys.argv[1]
        spark = SparkSession.builder.config("spark.pyspark.python", sys.argv[2]).getOrCreate()

        def import_error(rows):
            try:
                import tfos_magic
                yield "it is there"
            except ModuleNotFoundError as error:
                yield str(error)

        print(spark.sparkContext.parallelize([0], 1).mapPartitions(import_error).collect())
        df = spark.createDataFrame([(1, [0.5], "a")], "n long, x array<float>, s string").coalesce(1)
        dfutil.saveAsTFRecords(df, out)
        print(dfutil.loadTFRecords(spark, out, schema={"x": "array<float>"}).collect())
        print(len(df.rdd.mapPartitions(dfutil.toTFExample(df.dtypes)).collect()))
        spark.stop()
    """
    done = spark_script(
        code,
        args=(str(tmp_path / "o"), str(bare)),
        env={"PYSPARK_PYTHON": str(bare), "PYSPARK_ENABLE_NAMEDTUPLE_PATCH": "1"},
    )
    lines = done.stdout.splitlines()
    assert lines == ["[\"No module named 'tfos_magic'\"]", "[Row(n=1, s='a', x=[0.5])]", "1"]


def test_is_loaded_knows_the_dataframe_itself_and_keeps_none_alive(spark_local4: Any, tmp_path: Path) -> None:
    dfutil.saveAsTFRecords(spark_local4.range(1), str(tmp_path / "o"))
    loaded = dfutil.loadTFRecords(spark_local4, str(tmp_path / "o"))
    assert dfutil.isLoadedDF(loaded)
    assert not dfutil.isLoadedDF(loaded.select("id"))
    assert not dfutil.isLoadedDF(spark_local4.range(1))
    reference = weakref.ref(loaded)
    del loaded
    gc.collect()
    assert reference() is None


def test_the_same_rows_give_the_same_gzip_bytes(spark_local4: Any, tmp_path: Path) -> None:
    df = spark_local4.range(0, 1000, 1, 1)
    for name in ("a", "b"):
        dfutil.saveAsTFRecords(df, str(tmp_path / name), compression="gzip")
    first, second = ((tmp_path / name / "part-00000.gz").read_bytes() for name in ("a", "b"))
    assert first == second
    assert len(gzip.decompress(first)) > len(first)


@pytest.mark.slow
@pytest.mark.oldest
def test_with_the_oldest_versions(spark_script: Script, oldest_python: Path, tmp_path: Path) -> None:
    code = """
        import json, sys
        from pyspark.ml.linalg import Vectors
        from pyspark.sql import SparkSession
        import tensorflow as tf
        from tfos_magic import dfutil

        out, rows = sys.argv[1], json.load(open(sys.argv[2]))
        spark = SparkSession.builder.getOrCreate()
        schema = "n long, x array<float>, s string, ss array<string>, b boolean"
        df = spark.createDataFrame(rows, schema).repartition(3)
        for compression in (None, "gzip"):
            dfutil.saveAsTFRecords(df, f"{out}/{compression}", compression=compression)
            loaded = dfutil.loadTFRecords(spark, f"{out}/{compression}", schema=df.schema)
            assert loaded.collect() == df.collect()
            assert dfutil.isLoadedDF(loaded)
        inferred = dfutil.loadTFRecords(spark.sparkContext, f"{out}/gzip").dtypes
        assert inferred == [("b", "bigint"), ("n", "bigint"), ("s", "string"), ("ss", "array<string>"),
                            ("x", "array<double>")], inferred
        paths = sorted(tf.io.gfile.glob(f"{out}/None/part*"))
        read = [tf.train.Example.FromString(r) for r in tf.data.TFRecordDataset(paths).as_numpy_iterator()]
        seen = sorted(list(e.features.feature["x"].float_list.value) for e in read)
        assert seen == sorted(row[1] for row in rows), seen
        vectors = spark.createDataFrame([(Vectors.dense([1.0, 2.0]),), (None,)], ["v"])
        dfutil.saveAsTFRecords(vectors.coalesce(1), f"{out}/v")
        assert [tuple(r) for r in dfutil.loadTFRecords(spark, f"{out}/v").collect()] == [([1.0, 2.0],), (None,)]
        assert len(df.rdd.mapPartitions(dfutil.toTFExample(df.dtypes)).collect()) == len(rows)
        print("done")
        spark.stop()
    """
    rng = random.Random(0)
    rows = [[n, [float(n), 0.5], f"ä{n}" * rng.randrange(99), ["", "a"] * (n % 3 + 1), n % 2 == 0] for n in range(300)]
    root = os.path.dirname(os.path.dirname(__file__))
    (tmp_path / "rows").write_text(json.dumps(rows))
    arguments = (str(tmp_path / "o"), str(tmp_path / "rows"))
    done = spark_script(code, python=oldest_python, env={"PYTHONPATH": root}, args=arguments)
    assert done.stdout.strip() == "done"
