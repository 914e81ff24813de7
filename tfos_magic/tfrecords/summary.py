"""What features some records have, from which a schema is inferred.

Runs on: driver and executors. Summaries are plain dicts, so that JSON can carry them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from tfos_magic.errors import DataError
from tfos_magic.tfrecords import example
from tfos_magic.tfrecords.kinds import BYTES, FLOAT, INT64

Summary: TypeAlias = "dict[str, dict[str, Any]]"
"""By feature: ``kinds`` that occur with values, ``most`` values in a record, ``is_text`` if all bytes are UTF-8."""

_TYPES = {INT64: "bigint", FLOAT: "double"}


def of(record: bytes, where: str) -> Summary:
    """Return the features of one serialized Example.

    Raises
    ------
    DataError
        It is none.
    """
    try:
        features = example.parse(record)
    except ValueError as error:
        raise DataError(
            f"{where} holds a record of {len(record):,} bytes that is no tf.train.Example: {error}.",
            cause="TFRecord files hold any bytes; these are of some other kind.",
            hint="Read them with tf.data.TFRecordDataset and the program that knows what they are.",
        ) from error
    return {
        name: {"kinds": [kind] if values else [], "most": len(values), "is_text": kind != BYTES or _is_text(values)}
        for name, (kind, values) in features.items()
    }


def merged(summaries: Iterable[Summary]) -> Summary:
    """Return what all of them say together."""
    result: Summary = {}
    for summary in summaries:
        for name, new in summary.items():
            old = result.get(name, {"kinds": [], "most": 0, "is_text": True})
            result[name] = {
                "kinds": sorted({*old["kinds"], *new["kinds"]}),
                "most": max(old["most"], new["most"]),
                "is_text": old["is_text"] and new["is_text"],
            }
    return result


def type_of(name: str, found: dict[str, Any], *, is_binary: bool) -> str:
    """Return the type that Spark's column gets, as DDL has it; TFoS's rule.

    Raises
    ------
    DataError
        The feature holds numbers in one record and bytes in another.
    """
    kinds = found["kinds"]
    if BYTES in kinds and len(kinds) > 1:
        raise DataError(
            f"Feature '{name}' is {' in some records and '.join(kinds)} in others.",
            cause="The files were written by different programs, or with different schemas.",
            hint="Load them apart, e.g. with a pattern for the files, and join the DataFrames.",
        )
    if kinds in ([INT64], [FLOAT], [FLOAT, INT64]):
        element = _TYPES[kinds[0]]  # floats and integers together are floats
    else:
        element = "binary" if is_binary or not found["is_text"] else "string"
    return f"array<{element}>" if found["most"] > 1 else element


def _is_text(values: list[bytes]) -> bool:
    try:
        b"\0".join(values).decode()
    except UnicodeDecodeError:
        return False
    return True
