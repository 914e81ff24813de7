"""Short Spark jobs over Arrow batches: a function of this package on the executors, its rows back on the driver.

Runs on: driver.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tfos_magic import archive
from tfos_magic.errors import DataError
from tfos_magic.jobs import SparkJob

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession
    from pyspark.sql.types import StructType


def task(entry: str, plan: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function for Spark that runs ``entry(archive, plan, batches)`` where nothing is installed.

    Parameters
    ----------
    entry : str
        ``module:generator_function``.
    plan : mapping
        Plain values.
    """
    return functools.partial(archive.by_value(entry, archive.build()), plan)


def one_each(
    spark: SparkSession, count: int, entry: str, plan: Mapping[str, Any], schema: StructType | str
) -> DataFrame:
    """Return what `count` tasks yield; each gets its own number, from 0, as its only row."""
    return spark.range(0, count, 1, count).mapInArrow(task(entry, plan), schema)


def collect(df: DataFrame, description: str) -> list[Row]:
    """Run the job and return its rows; an interrupt cancels it.

    Parameters
    ----------
    df : DataFrame
        With a column ``problem``: empty, or a DataError's fields as JSON.
    description : str
        Shown in the Spark UI.

    Raises
    ------
    DataError
        The first one that a task has found.
    """
    context = df.sparkSession.sparkContext
    group = f"tfos_magic-{uuid.uuid4().hex[:8]}"
    job = SparkJob(context, group, f"tfos_magic: {description}", df.collect)
    job.finish()
    if job.error is not None:
        raise job.error
    for row in job.value:
        if row.problem:
            raise DataError(**json.loads(row.problem))
    return list(job.value)
