"""Rows of an RDD to and from serialized Examples, for TFoS's ``toTFExample`` and ``fromTFExample``.

Runs on: executors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from tfos_magic.errors import DataError
from tfos_magic.tfrecords import encode, example
from tfos_magic.tfrecords.kinds import BYTES, Column

_ROWS_AT_A_TIME = 1000


def to_examples(
    archive: bytes, columns: Sequence[tuple[Any, ...]], rows: Iterable[Any]
) -> Iterator[tuple[bytearray, None]]:
    """Yield each Row as a serialized Example, with the None that is Hadoop's value.

    Parameters
    ----------
    archive : bytes
        The package; mounted already, so not used here.
    columns : sequence of tuple
        Each with a Column's fields.
    rows : iterable of Row
    """
    wanted = [Column(*fields) for fields in columns]
    remaining = iter(rows)
    while some := list(itertools.islice(remaining, _ROWS_AT_A_TIME)):
        arrays = [pa.array([_plain(row[column.name]) for row in some], _arrow_type(column)) for column in wanted]
        batch = pa.RecordBatch.from_arrays(arrays, [column.name for column in wanted])
        for record in encode.examples(batch):
            yield bytearray(record), None


def _plain(value: Any) -> Any:
    return value.toArray() if hasattr(value, "toArray") else value  # an ML vector


def _arrow_type(column: Column) -> pa.DataType:
    value_type = pa.type_for_alias(column.arrow_type)
    return pa.list_(value_type) if column.is_list else value_type


def from_examples(records: Iterable[Any], binary_features: Sequence[str]) -> Iterator[Any]:
    """Yield each serialized Example, bare or the first of a pair, as a Row."""
    from pyspark.sql import Row

    for record in records:
        data = bytes(record if isinstance(record, (bytes, bytearray)) else record[0])
        try:
            features = example.parse(data)
        except ValueError as error:
            raise DataError(f"A record of {len(data):,} bytes is no tf.train.Example: {error}.") from error
        yield Row(**{name: _value(name, *features[name], binary_features) for name in sorted(features)})


def _value(name: str, kind: str | None, values: list[Any], binary_features: Sequence[str]) -> Any:
    if kind == BYTES:
        values = [bytearray(value) if name in binary_features else _text(name, value) for value in values]
    return values if len(values) > 1 else values[0] if values else None


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"Feature '{name}' has {len(value):,} bytes that are not UTF-8.",
            hint=f"Name it: fromTFExample(…, binary_features=['{name}']).",
        ) from error
