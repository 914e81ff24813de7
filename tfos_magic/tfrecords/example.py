"""One ``tf.train.Example`` in plain Python: for samples, and for records that are not written in the usual order.

Runs on: executors and driver.

    message Example   { Features features = 1; }
    message Features  { map<string, Feature> feature = 1; }
    message Feature   { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    message BytesList { repeated bytes value = 1; }
    message FloatList { repeated float value = 1 [packed = true]; }
    message Int64List { repeated int64 value = 1 [packed = true]; }

Protocol buffers allow much that no writer of Examples does: several `features`, a feature twice, numbers not packed,
fields that are not known. All of it is read here as protobuf's own classes read it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

from tfos_magic.tfrecords.kinds import BYTES, FLOAT, INT64

Feature: TypeAlias = "tuple[str | None, list[Any]]"
"""The kind (None: the feature is there and holds no list), and the values."""

NUMBERS = {BYTES: 1, FLOAT: 2, INT64: 3}
"""The field numbers in Feature."""

_KINDS = {number: kind for kind, number in NUMBERS.items()}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def parse(record: bytes) -> dict[str, Feature]:
    """Return the features of a serialized Example, by name.

    Raises
    ------
    ValueError
        The bytes are no Example; the text says why.
    """
    features: dict[str, Feature] = {}
    for number, wire, value in _fields(memoryview(record)):
        if (number, wire) == (1, _LENGTH):
            entries = [entry for field, kind, entry in _fields(value) if (field, kind) == (1, _LENGTH)]
            features.update(map(_parse_entry, entries))
    return features


def serialize(features: dict[str, Feature]) -> bytes:
    """Return the serialized Example, in the form that :mod:`~tfos_magic.tfrecords.decode` takes by the batch."""
    body = b"".join(
        message(1, message(1, name.encode()) + message(2, _feature(kind, values)))
        for name, (kind, values) in features.items()
    )
    return message(1, body)


def message(number: int, body: bytes) -> bytes:
    """Return `body` as the field `number` of a message."""
    return header(number, len(body)) + body


def header(number: int, length: int) -> bytes:
    """Return what stands before a field of `length` bytes."""
    return bytes([number << 3 | _LENGTH]) + _varint(length)


def _feature(kind: str | None, values: list[Any]) -> bytes:
    if kind is None:
        return b""
    if kind == BYTES:
        body = b"".join(message(1, value) for value in values)
    elif kind == FLOAT:
        body = message(1, struct.pack(f"<{len(values)}f", *values)) if values else b""
    else:
        body = message(1, b"".join(_varint(value & (1 << 64) - 1) for value in values)) if values else b""
    return message(NUMBERS[kind], body)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _parse_entry(entry: memoryview) -> tuple[str, Feature]:
    name = ""
    feature: Feature = (None, [])
    for number, wire, value in _fields(entry):
        if (number, wire) == (1, _LENGTH):
            name = str(value, "utf-8")
        elif (number, wire) == (2, _LENGTH):
            feature = _parse_feature(value, feature)
    return name, feature


def _parse_feature(data: memoryview, feature: Feature) -> Feature:
    kind, values = feature
    for number, wire, value in _fields(data):
        if number in _KINDS and wire == _LENGTH:
            if _KINDS[number] != kind:  # one of: the last one counts
                kind, values = _KINDS[number], []
            values += _parse_values(_KINDS[number], value)
    return kind, values


def _parse_values(kind: str, data: memoryview) -> Iterator[Any]:
    for number, wire, value in _fields(data):
        if number != 1:
            continue
        if kind == BYTES and wire == _LENGTH:
            yield bytes(value)
        elif kind == FLOAT and wire in (_LENGTH, _FIXED32):
            if len(value) % 4:
                raise ValueError(f"{len(value)} bytes are no list of floats")
            yield from struct.unpack(f"<{len(value) // 4}f", value)
        elif kind == INT64 and wire == _VARINT:
            yield _signed(value)
        elif kind == INT64 and wire == _LENGTH:
            place = 0
            while place < len(value):
                number_, place = _read_varint(value, place)
                yield _signed(number_)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Yield number, wire type and value of each field: an int for a varint, else the bytes."""
    place = 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, place = _read_varint(data, place)
            yield number, wire, value
            continue
        if wire == _LENGTH:
            length, place = _read_varint(data, place)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"field {number} has the wire type {wire}, which nothing is written in")
        if place + length > len(data):
            raise ValueError(f"field {number} has {length} bytes and {len(data) - place} are left")
        yield number, wire, data[place : place + length]
        place += length


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("a number is cut off")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, place
    raise ValueError("a number has more than ten bytes")
