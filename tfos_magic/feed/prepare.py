"""Make a DataFrame ready to travel: only the columns in use, ML vectors as arrays, impossible types refused.

Runs on: driver. Starts no Spark job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import DataError
from tfos_magic.feed.columns import choose

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

_HINTS = {
    "struct": 'Take its fields out: df.select("*", "{name}.*").drop("{name}").',
    "map": 'Take values out by key: df.withColumn("a", df["{name}"]["a"]).drop("{name}").',
}
_HINT = 'Cast or drop it: df.withColumn("{name}", df["{name}"].cast("double")), df.drop("{name}").'
_REFUSED = frozenset({"struct", "map", "void", "variant", "interval", "udt"})


def prepare(
    df: DataFrame, features: Sequence[str] | None = None, label: str | None = None, weight: str | None = None
) -> DataFrame:
    """Return `df` with the columns that a dataset will use, in a form that can become tensors.

    Parameters
    ----------
    df : DataFrame
    features, label, weight : optional
        As :func:`tfos_magic.feed.columns.choose` takes them.

    Returns
    -------
    DataFrame
        Features, label, weight in this order; ML vectors have become ``array<float>``.

    Raises
    ------
    UsageError
        If a name is unknown, or no feature is left.
    DataError
        If a column has a type that has no tensor form, or two columns share a name.
    """
    _refuse_twins(df.columns)
    choice = choose(df.columns, features, label, weight)
    types = {field.name: field.dataType for field in df.schema.fields}
    return df.select(*[_travelling(df, name, types[name]) for name in choice.names])


def columns_of(df: DataFrame, names: Sequence[str], *, as_arrays: bool = True) -> list[Column]:
    """Return some columns, with ML vectors as ``array<double>``: the form in which Python sees them in Arrow."""
    vectors = _vectors(df) if as_arrays else ()
    if not vectors:
        return [df[f"`{name}`"] for name in names]
    from pyspark.ml.functions import vector_to_array

    return [vector_to_array(df[f"`{n}`"]).alias(n) if n in vectors else df[f"`{n}`"] for n in names]


def vectors_as_arrays(df: DataFrame) -> DataFrame:
    """Return `df` with ML vectors as ``array<double>``."""
    return df.select(*columns_of(df, df.columns)) if _vectors(df) else df


def vectors_restored(df: DataFrame, original: DataFrame) -> DataFrame:
    """Return `df` with those arrays as (dense) ML vectors again that are vectors in `original`."""
    vectors = [name for name in _vectors(original) if name in df.columns]
    if not vectors:
        return df
    from pyspark.ml.functions import array_to_vector

    return df.select(*[array_to_vector(df[f"`{n}`"]).alias(n) if n in vectors else df[f"`{n}`"] for n in df.columns])


def _vectors(df: DataFrame) -> list[str]:
    return [field.name for field in df.schema.fields if _type_name(field.dataType) == "vector"]


def _travelling(df: DataFrame, name: str, kind: Any) -> Column:
    from pyspark.sql import functions

    column = df[f"`{name}`"]
    if _type_name(kind) == "vector":
        from pyspark.ml.functions import vector_to_array

        return vector_to_array(column, dtype="float32").alias(name)
    innermost = kind
    while _type_name(innermost) == "array":
        innermost = innermost.elementType
    if _type_name(innermost) in _REFUSED:
        raise _no_tensor(name, kind, _type_name(innermost))
    return column if name.isidentifier() else functions.col(f"`{name}`").alias(name)


def _type_name(kind: Any) -> str:
    """Return Spark's own short name, with user-defined types and the intervals folded together."""
    if type(kind).__name__ == "VectorUDT":  # by name: pyspark.ml need not be imported to know it
        return "vector"
    if hasattr(kind, "sqlType") and type(kind).__name__.endswith("UDT"):
        return "udt"
    name = str(kind.typeName())
    return "interval" if name in ("yearmonthinterval", "interval year to month", "calendarinterval") else name


def _refuse_twins(names: Sequence[str]) -> None:
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(
            f"The DataFrame has more than one column named '{twins[0]}'.",
            cause="That is what a join leaves behind.",
            hint=f'Rename or drop one, e.g. join(…, on="{twins[0]}").',
        )


def _no_tensor(name: str, kind: Any, type_name: str) -> DataError:
    return DataError(
        f"Column '{name}' has the type {kind.simpleString()}, which has no tensor form.",
        hint=_HINTS.get(type_name, _HINT).format(name=name),
    )
