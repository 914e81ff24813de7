"""Serialized Examples to Arrow columns, a whole batch at a time.

Runs on: executors.

All records of a batch are taken apart together: one step finds every record's first feature, the next one every
record's second. What is found is places in the buffer, so that each column's values are copied once, at the end.
A record that is not laid out as writers of Examples lay it out is first written anew by :mod:`~tfos_magic.tfrecords.
example`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tfos_magic.errors import DataError
from tfos_magic.tfrecords import example, varints
from tfos_magic.tfrecords.example import NUMBERS
from tfos_magic.tfrecords.kinds import BYTES, FLOAT, INT64, Column
from tfos_magic.tfrecords.slices import Array, Slices

_FIRST, _SECOND = 0x0A, 0x12  # field 1, field 2: a length and that many bytes
_READS = {"float32": (FLOAT, INT64), "float64": (FLOAT, INT64), "string": (BYTES,), "binary": (BYTES,)}
_KINDS = {number: kind for kind, number in NUMBERS.items()}


@dataclass(frozen=True)
class Place:
    """Where a batch comes from, for messages.

    Attributes
    ----------
    name : str
        The file.
    first_record : int
        The number of the batch's first record in it, from 0.
    """

    name: str
    first_record: int

    def of(self, record: int) -> str:
        """Return where the batch's record `record` is."""
        return f"{self.name}, record {self.first_record + record:,}"


def columns(records: Slices, wanted: Sequence[Column], place: Place) -> list[pa.Array]:
    """Return the wanted columns of serialized Examples; other features are left out.

    Parameters
    ----------
    records : Slices
    wanted : sequence of Column
    place : Place

    Raises
    ------
    DataError
        A record is no Example, or a feature does not fit its column.
    """
    table, is_odd = _take_apart(records)
    if is_odd.any():
        records = _rewritten(records, is_odd, place)
        table, is_odd = _take_apart(records)
    if is_odd.any():
        raise RuntimeError(f"{place.of(int(np.argmax(is_odd)))} cannot be rewritten")
    return [_Reader(table.of(column.name), column, len(records), place).array() for column in wanted]


def _rewritten(records: Slices, is_odd: Array, place: Place) -> Slices:
    strings = list(records)
    for index in np.flatnonzero(is_odd).tolist():
        try:
            strings[index] = example.serialize(example.parse(strings[index]))
        except ValueError as error:
            raise DataError(
                f"{place.of(index)} is no tf.train.Example: {error}.",
                cause="TFRecord files hold any bytes; these are of some other kind.",
                hint="Read them with tf.data.TFRecordDataset and the program that knows what they are.",
            ) from error
    return Slices.from_list(strings)


# --- the layout -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Features:
    """Features of many records: whose, of which kind, and where the values are.

    `starts` and `ends` enclose the packed numbers, or the elements' messages. `first_element` and `element_counts`
    say which of `elements` are a BytesList's.
    """

    owners: Array
    numbers: Array
    values: Slices
    first_element: Array
    element_counts: Array
    elements: Slices

    def take(self, chosen: Array) -> _Features:
        values = Slices(self.values.data, self.values.starts[chosen], self.values.ends[chosen])
        first, counts = self.first_element[chosen], self.element_counts[chosen]
        return _Features(self.owners[chosen], self.numbers[chosen], values, first, counts, self.elements)


@dataclass(frozen=True)
class _Table:
    """The features of a batch, findable by name."""

    features: _Features
    by_name: dict[bytes, Array]

    def of(self, name: str) -> _Features:
        return self.features.take(self.by_name.get(name.encode(), np.empty(0, np.int64)))


def _take_apart(records: Slices) -> tuple[_Table, Array]:
    """Return all features, and which records are laid out in another way than expected."""
    data = records.data
    is_odd = np.zeros(len(records), bool)
    some = np.flatnonzero(records.lengths)  # an Example without any feature may be no bytes at all
    starts, is_whole = _field(data, records.starts[some], records.ends[some], _FIRST)
    is_odd[some[~is_whole]] = True
    some, starts = some[is_whole], starts[is_whole]
    which, entries, is_broken = _messages(data, starts, records.ends[some])
    is_odd[some[is_broken]] = True
    owners = some[which]
    names, features, is_good = _entries(entries, owners)
    is_odd[owners[~is_good]] = True
    by_name = _by_name(names)
    for chosen in by_name.values():  # a feature that is there twice
        is_odd[owners[chosen][1:][np.diff(owners[chosen]) == 0]] = True
    return _Table(features, by_name), is_odd


def _entries(entries: Slices, owners: Array) -> tuple[Slices, _Features, Array]:
    """Take map entries apart; returns names, features, and which entries are laid out as expected."""
    data, ends = entries.data, entries.ends
    lengths, names = varints.read_at(data, entries.starts + 1)
    names_end = names + lengths
    is_good = (_at(data, entries.starts) == _FIRST) & (lengths >= 0) & (names_end <= ends)
    names_end = np.where(is_good, names_end, names)
    places, is_whole = _field(data, names_end, ends, _SECOND)
    is_good &= is_whole
    numbers = np.where(is_good & (places < ends), _at(data, places) >> 3, 0)
    has_list = numbers > 0
    tag = _at(data, places)
    lists, is_whole = _field(data, places, ends, tag)
    is_good &= ~has_list | (is_whole & (numbers <= 3) & (tag & 7 == 2))
    starts = np.where(has_list & is_good, lists, ends)
    is_packed = (starts < ends) & (numbers != NUMBERS[BYTES])
    values, is_whole = _field(data, starts, ends, _FIRST)
    is_good &= ~is_packed | is_whole
    starts = np.where(is_packed & is_good, values, starts)
    is_good &= (numbers != NUMBERS[FLOAT]) | ((ends - starts) % 4 == 0)
    is_good &= (numbers != NUMBERS[INT64]) | (starts == ends) | (_at(data, ends - 1) < 0x80)
    is_bytes = np.flatnonzero(numbers == NUMBERS[BYTES])
    which, elements, is_broken = _messages(data, starts[is_bytes], ends[is_bytes])
    is_good[is_bytes[is_broken]] = False
    counts = np.zeros(len(ends), np.int64)
    counts[is_bytes] = np.bincount(which, minlength=len(is_bytes))
    first = np.cumsum(counts) - counts
    features = _Features(owners, numbers, Slices(data, starts, ends), first, counts, elements)
    return Slices(data, names, names_end), features, is_good


def _messages(data: Array, starts: Array, limits: Array) -> tuple[Array, Slices, Array]:
    """Split each place into its messages, all of them field 1.

    Returns
    -------
    which : ndarray of int
        The place that each message is in.
    messages : Slices
    is_broken : ndarray of bool
        The places that hold something else as well.
    """
    is_broken = np.zeros(len(starts), bool)
    active = np.flatnonzero(starts < limits)
    places = starts[active]
    found: list[tuple[Array, Array, Array]] = [(active[:0], places[:0], places[:0])]
    while len(active):
        lengths, begins = varints.read_at(data, places + 1)
        ends = begins + lengths
        is_good = (_at(data, places) == _FIRST) & (lengths >= 0) & (ends <= limits[active])
        if not is_good.all():
            is_broken[active[~is_good]] = True
            active, begins, ends = active[is_good], begins[is_good], ends[is_good]
        found.append((active, begins, ends))
        goes_on = ends < limits[active]
        active, places = active[goes_on], ends[goes_on]
    which, begins, ends = map(np.concatenate, zip(*found, strict=True))
    if len(found) > 2:
        order = np.argsort(begins, kind="stable")
        which, begins, ends = which[order], begins[order], ends[order]
    return which, Slices(data, begins, ends), is_broken


def _field(data: Array, places: Array, limits: Array, tag: Array | int) -> tuple[Array, Array]:
    """Return where the field at each place begins, and whether it has this tag and goes exactly to the limit."""
    lengths, starts = varints.read_at(data, places + 1)
    is_whole = (places < limits) & (_at(data, places) == tag) & (lengths >= 0) & (starts + lengths == limits)
    return starts, is_whole


def _at(data: Array, places: Array) -> Array:
    if not len(data):
        return np.zeros(len(places), np.uint8)
    return np.take(data, places, mode="clip")


def _by_name(names: Slices) -> dict[bytes, Array]:
    """Return for each name where it occurs, ascending."""
    encoded = names.to_arrow().dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    codes = codes.astype(np.uint16) if len(distinct) <= 1 << 16 else codes  # NumPy sorts these in linear time
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(distinct) + 1))
    return {name: order[bounds[code] : bounds[code + 1]] for code, name in enumerate(distinct)}


# --- the columns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """One column of one batch."""

    features: _Features
    column: Column
    row_count: int
    place: Place

    def array(self) -> pa.Array:
        """Return the column, null where the feature is missing."""
        kinds = _READS.get(self.column.arrow_type, (INT64,))
        self._check_kinds(kinds)
        parts = []
        for kind in kinds:
            chosen = np.flatnonzero(self.features.numbers == NUMBERS[kind])
            if len(chosen):
                parts.append(self._part(kind, self.features.take(chosen)))
        if not parts:
            return pa.nulls(self.row_count, self._type())
        owners = np.concatenate([part[0] for part in parts])
        values = parts[0][1] if len(parts) == 1 else pa.concat_arrays([part[1] for part in parts])
        if len(parts) == 1 and len(owners) == self.row_count:
            return values
        where = np.full(self.row_count, -1)
        where[owners] = np.arange(len(owners))
        return values.take(pa.array(where, mask=where < 0))

    def _part(self, kind: str, features: _Features) -> tuple[Array, pa.Array]:
        """Return which rows have a feature of this kind, and their values or lists of values."""
        values, counts = {FLOAT: _floats, INT64: _integers, BYTES: _strings}[kind](features)
        if self.column.is_list:
            values = self._cast(values)
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]).astype(np.int32)
            return features.owners, pa.ListArray.from_arrays(pa.array(offsets), values)
        if counts.max(initial=0) > 1:
            first = int(np.argmax(counts > 1))
            raise self._misfit(features, first, f"has {counts[first]} values", self.column, is_list=True)
        return features.owners[counts == 1], self._cast(values)

    def _type(self) -> pa.DataType:
        value_type = pa.type_for_alias(self.column.arrow_type)
        return pa.list_(value_type) if self.column.is_list else value_type

    def _cast(self, values: pa.Array) -> pa.Array:
        target = pa.type_for_alias(self.column.arrow_type)
        try:
            if pa.types.is_string(target):
                values = values.cast(pa.binary())
            return values.cast(target, safe=not pa.types.is_floating(target))
        except pa.ArrowInvalid as error:
            raise self._bad_cast(error) from error

    def _bad_cast(self, error: Exception) -> DataError:
        name = self.column.name
        if self.column.kind == BYTES:
            fact, hint = "is not UTF-8", f"loadTFRecords(…, binary_features=['{name}'])"
        else:
            fact = f"does not fit into {self.column.arrow_type}: {error}"
            hint = f"loadTFRecords(…, schema={{'{name}': 'bigint'}})"
        first = self.place.first_record
        return DataError(
            f"{self.place.name}, records {first:,} to {first + self.row_count - 1:,}: feature '{name}' {fact}.",
            cause="The column's type comes from schema=, or from a sample of the records.",
            hint=f"Say its type: {hint}.",
        )

    def _check_kinds(self, kinds: Sequence[str]) -> None:
        accepted = [0, *(NUMBERS[kind] for kind in kinds)]
        is_empty = self.features.values.lengths == 0
        wrong = ~np.isin(self.features.numbers, accepted) & ~is_empty
        if wrong.any():
            first = int(np.argmax(wrong))
            kind = _KINDS[int(self.features.numbers[first])]
            default = {INT64: "bigint", FLOAT: "double", BYTES: "string"}[kind]
            found = Column.of(self.column.name, default)
            raise self._misfit(self.features, first, f"holds {kind} values", found, is_list=self.column.is_list)

    def _misfit(self, features: _Features, index: int, what: str, found: Column, *, is_list: bool) -> DataError:
        name, column = self.column.name, self.column
        needed = {"bool": "boolean", "int8": "tinyint", "int16": "smallint", "int32": "int", "int64": "bigint"}
        needed |= {"float32": "float", "float64": "double"}
        wanted, better = (needed.get(each.arrow_type, each.arrow_type) for each in (column, found))
        wanted = f"array<{wanted}>" if column.is_list else wanted
        better = f"array<{better}>" if is_list else better
        return DataError(
            f"{self.place.of(int(features.owners[index]))}: feature '{name}' {what}, and its column is {wanted}.",
            cause="The column's type comes from schema=, or from a sample of the records.",
            hint=f"Say its type: loadTFRecords(…, schema={{'{name}': '{better}'}}).",
        )


def _floats(features: _Features) -> tuple[pa.Array, Array]:
    return pa.array(features.values.content().view("<f4")), features.values.lengths // 4


def _integers(features: _Features) -> tuple[pa.Array, Array]:
    values, ends = varints.decode(features.values.content())
    totals = np.searchsorted(ends, np.cumsum(features.values.lengths), side="right")
    return pa.array(values), np.diff(totals, prepend=0)


def _strings(features: _Features) -> tuple[pa.Array, Array]:
    counts = features.element_counts
    before = np.cumsum(counts) - counts
    chosen = np.repeat(features.first_element - before, counts) + np.arange(counts.sum())
    elements = features.elements
    return Slices(elements.data, elements.starts[chosen], elements.ends[chosen]).to_arrow(), counts
