"""DataFrames to and from TFRecord files of ``tf.train.Example``: TFoS's ``dfutil``, as ordinary Spark tasks.

Runs on: driver; :func:`toTFExample` and :func:`fromTFExample` on executors as well.

    saveAsTFRecords   partition ─► task ─► out/_temporary-…/00000-17 ─┐ the driver, when all tasks are done
                                                                      └► out/part-00000, …, out/_SUCCESS
    loadTFRecords     a sample of the files ─► schema;  file ─► task ─► rows, when the DataFrame is used

Names, and what they mean, are TFoS's; the keyword-only parameters are not in TFoS. The types are in
:mod:`tfos_magic.tfrecords.kinds`. Files are read and written without TensorFlow, and are what its own
``tf.io.TFRecordWriter`` writes and ``tf.data.TFRecordDataset`` reads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from tfos_magic import archive, session, tasks
from tfos_magic.errors import DataError, UsageError
from tfos_magic.tfrecords import files, rows, summary
from tfos_magic.tfrecords.kinds import Column
from tfos_magic.tfrecords.output import Output

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import DataType, StructType

_LOADED = "_tfos_magic_loaded_from"
_SAMPLED_FILES = 16
_SAMPLED_RECORDS = 100
_TASKS = "tfos_magic.tfrecords.task:"


def isLoadedDF(df: DataFrame) -> bool:
    """Return True if `df` is what :func:`loadTFRecords` returned; what is derived from it is not."""
    return _LOADED in vars(df)


def saveAsTFRecords(df: DataFrame, output_dir: str, *, compression: str | None = None, mode: str = "error") -> None:
    """Write a DataFrame as TFRecord files, one a partition: ``part-00000``, … and ``_SUCCESS``.

    Nothing is at its place before everything is written: a save that fails leaves the directory as it was.

    Parameters
    ----------
    df : DataFrame
        Columns of numbers, booleans, strings, binaries, arrays of these, and ML vectors.
    output_dir : str
        A path that driver and executors see: a local one, a ``file:`` URI, or what ``tf.io.gfile`` opens.
    compression : {None, "gzip"}
        Compressed files end in ``.gz``; read them with ``TFRecordDataset(…, compression_type="GZIP")``.
    mode : {"error", "overwrite", "append", "ignore"}
        What to do if `output_dir` is there already, as ``df.write.mode``.

    Raises
    ------
    UsageError
        An argument is wrong, or `output_dir` is there already and `mode` is "error".
    DataError
        A column has a type that is no feature, or an array has a null in it.
    """
    if compression not in (None, "gzip"):
        raise UsageError(f"compression={compression!r} is not known.", hint="None and 'gzip' are.")
    spark = session.as_session(df.sparkSession, "the DataFrame's session")
    prepared = _as_features(df)
    path = files.absolute(output_dir, session.default_file_system(spark.sparkContext))
    with Output.at(path, mode) as output:
        if output is None:
            return
        task = tasks.task(
            _TASKS + "write_part", {"directory": output.scratch, "compression": compression, "names": df.columns}
        )
        written = prepared.mapInArrow(task, "partition long, file string, problem string")
        parts = sorted(tasks.collect(written, f"TFRecords to {path}"), key=lambda row: row.partition)
        output.commit([row.file for row in parts], ".gz" if compression else "")


def loadTFRecords(
    sc: SparkContext | SparkSession,
    input_dir: str,
    binary_features: Sequence[str] = (),
    *,
    schema: StructType | str | Mapping[str, str | DataType] | None = None,
) -> DataFrame:
    """Return the Examples of TFRecord files as a DataFrame, one partition a file; reads them when it is used.

    Checksums are verified. A file that is damaged, and a feature that does not fit its column, is a DataError in the
    Spark job that comes upon it.

    Parameters
    ----------
    sc : SparkContext or SparkSession
    input_dir : str
        A directory, one file, or a pattern; gzip is recognised by its content. See :func:`saveAsTFRecords`.
    binary_features : sequence of str
        Features to load as binary. Others of bytes become strings if they are UTF-8 in all records sampled.
    schema : StructType or DDL string or mapping of name to type, optional
        A StructType or DDL string is the whole schema: these columns, and no sample is read. A mapping, e.g.
        ``{"image": "binary"}``, says the type of some columns; the others are inferred from up to 100 records in each
        of up to 16 files, and come in alphabetical order.

    Raises
    ------
    DataError
        There are no files, or no record to infer a schema from, or a sampled record is damaged or no Example.
    UsageError
        `schema` has a type that no feature has.
    """
    spark = session.as_session(sc, "sc")
    path = files.absolute(input_dir, session.default_file_system(spark.sparkContext))
    paths = files.visible_files(files.files_for(path), path)
    if not paths:
        raise DataError(f"There are no TFRecord files at {path}.", hint="Names that begin with _ or . are left out.")
    hints = _as_hints(spark, schema)
    if isinstance(schema, Mapping) or schema is None:
        hints = _infer(spark, paths, binary_features, hints)
    plan = {"paths": paths, "columns": [astuple(column) for column in hints.values()]}
    df = tasks.one_each(spark, len(paths), _TASKS + "read_files", plan, _struct(hints))
    setattr(df, _LOADED, path)
    return df


def toTFExample(dtypes: Sequence[tuple[str, str]]) -> Callable[[Iterable[Any]], Iterator[tuple[bytearray, None]]]:
    """Return a function for ``df.rdd.mapPartitions`` that turns Rows into serialized Examples.

    Parameters
    ----------
    dtypes : list of (str, str)
        ``df.dtypes``.

    Returns
    -------
    callable
        Yields ``(bytearray, None)``, which ``saveAsNewAPIHadoopFile`` takes. Executors need not have this package.
    """
    columns = [Column.of(name, "array<float>" if kind == "vector" else kind) for name, kind in dtypes]
    task = archive.by_value("tfos_magic.tfrecords.rows:to_examples", archive.build())
    return functools.partial(task, [astuple(column) for column in columns])


def fromTFExample(iter: Iterable[Any], binary_features: Sequence[str] = ()) -> list[Any]:
    """Return the Rows of serialized Examples; a function for ``rdd.mapPartitions``.

    Parameters
    ----------
    iter : iterable of (bytes, object) or bytes
        As ``newAPIHadoopFile`` gives them.
    binary_features : sequence of str
        Features to return as bytearray; other bytes are text.

    Returns
    -------
    list of Row
        One value as itself, more as a list, none as None; fields in alphabetical order.
    """
    return list(rows.from_examples(iter, binary_features))


def infer_schema(example: Any, binary_features: Sequence[str] = ()) -> StructType:
    """Return the schema of one Example: integers are long, floats double, bytes string, more than one an array.

    Parameters
    ----------
    example : tf.train.Example or bytes
        Serialized or not.
    binary_features : sequence of str
        Features that are binary.
    """
    record = example if isinstance(example, (bytes, bytearray)) else example.SerializeToString()
    found = summary.of(bytes(record), "the example")
    return _struct(_columns(found, binary_features, {}))


# --- schemas ------------------------------------------------------------------------------------------------------


def _as_features(df: DataFrame) -> DataFrame:
    """Return `df` with numbered columns and its ML vectors as arrays; refuse what is no feature."""
    from pyspark.sql import functions

    twins = sorted({name for name in df.columns if df.columns.count(name) > 1})
    if twins:
        raise DataError(
            f"The DataFrame has more than one column named '{twins[0]}'.",
            cause="That is what a join leaves behind.",
            hint=f'Rename or drop one, e.g. join(…, on="{twins[0]}").',
        )
    for name, kind in df.dtypes:
        if kind != "vector":
            Column.of(name, kind)
    # By number, because mapInArrow cannot find a column with a dot in its name.
    numbered = df.toDF(*(f"c{index}" for index in range(len(df.columns))))
    if "vector" not in dict(df.dtypes).values():
        return numbered
    from pyspark.ml.functions import vector_to_array

    def column(name: str, kind: str) -> Any:
        value = functions.col(name)
        if kind != "vector":
            return value
        # The function refuses null.
        return functions.when(value.isNotNull(), vector_to_array(value, dtype="float32")).alias(name)

    return numbered.select(*(column(name, kind) for name, kind in numbered.dtypes))


def _as_hints(spark: SparkSession, schema: Any) -> dict[str, Column]:
    if schema is None:
        return {}
    if isinstance(schema, str):
        schema = spark.createDataFrame([], schema).schema
    if isinstance(schema, Mapping):
        types = {name: kind if isinstance(kind, str) else kind.simpleString() for name, kind in schema.items()}
    else:
        types = {field.name: field.dataType.simpleString() for field in schema.fields}
    try:
        return {name: Column.of(name, kind) for name, kind in types.items()}
    except DataError as error:
        raise UsageError(f"schema: {error.fact}", hint="Load it as what the file holds, and cast it then.") from error


def _infer(
    spark: SparkSession, paths: Sequence[str], binary_features: Sequence[str], hints: Mapping[str, Column]
) -> dict[str, Column]:
    sampled = list(paths[:: max(1, len(paths) // _SAMPLED_FILES)])[:_SAMPLED_FILES]
    plan = {"paths": sampled, "records": _SAMPLED_RECORDS}
    columns = "summary string, problem string"
    samples = tasks.one_each(spark, len(sampled), _TASKS + "sample_files", plan, columns)
    collected = tasks.collect(samples, f"a sample of {len(sampled)} TFRecord files")
    found = summary.merged(json.loads(row.summary) for row in collected)
    if not found and not hints:
        raise DataError(
            f"{len(sampled)} files sampled of {len(paths)} hold no record with a feature, so there is no schema.",
            hint="Say it: loadTFRecords(…, schema='x array<float>, label bigint').",
        )
    return _columns(found, binary_features, hints)


def _columns(
    found: Mapping[str, Any], binary_features: Sequence[str], hints: Mapping[str, Column]
) -> dict[str, Column]:
    inferred = {
        name: Column.of(name, summary.type_of(name, each, is_binary=name in binary_features))
        for name, each in found.items()
        if name not in hints
    }
    return dict(sorted({**inferred, **hints}.items()))


def _struct(columns: Mapping[str, Column]) -> StructType:
    from pyspark.sql import types

    return types.StructType([types.StructField(column.name, _spark_type(column)) for column in columns.values()])


def _spark_type(column: Column) -> DataType:
    from pyspark.sql import types

    element: DataType = {
        "bool": types.BooleanType,
        "int8": types.ByteType,
        "int16": types.ShortType,
        "int32": types.IntegerType,
        "int64": types.LongType,
        "float32": types.FloatType,
        "float64": types.DoubleType,
        "string": types.StringType,
        "binary": types.BinaryType,
    }[column.arrow_type]()
    return types.ArrayType(element) if column.is_list else element
