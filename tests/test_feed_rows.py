"""Rows: columns of a DataFrame and objects of an RDD, as Python objects and as arrays."""

from __future__ import annotations

import collections
import datetime
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import Row

from tfos_magic.errors import DataError, UsageError
from tfos_magic.feed.rows import ArrowRows, ObjectRows, joined_arrays

Point = collections.namedtuple("Point", "b a")


def arrow(**columns: Any) -> ArrowRows:
    return ArrowRows(pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()}))


def listed(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: array.tolist() for name, array in arrays.items()}


# --- columns ----------------------------------------------------------------------------------------------------


def test_arrow_rows_are_tuples_and_those_of_one_column_plain_values() -> None:
    assert arrow(x=[1.5, 2.5], t=["a", None]).items() == [(1.5, "a"), (2.5, None)]
    assert arrow(x=[1, 2]).items() == [1, 2]


def test_cutting_keeps_every_row_once_and_copies_nothing() -> None:
    rows: Any = arrow(x=list(range(1000)))
    before = pa.total_allocated_bytes()
    first, rest = rows.cut(300)
    assert (len(first), len(rest)) == (300, 700)
    assert pa.total_allocated_bytes() == before
    assert first.items() + rest.items() == list(range(1000))
    all_of_it, nothing = rows.cut(5000)
    assert (len(all_of_it), len(nothing)) == (1000, 0)
    assert not nothing


def test_arrow_arrays_by_tensor_name() -> None:
    rows = arrow(x=[[1.0, 2.0], [3.0, 4.0]], n=[1, None], t=["a", "b"])
    arrays = rows.arrays({"x": "image", "n": "count", "t": "text"})
    assert listed(arrays) == {"image": [[1, 2], [3, 4]], "count": [1, None], "text": ["a", "b"]}
    assert (arrays["image"].dtype, arrays["text"].dtype) == (np.float64, object)


def test_unknown_column_is_said_with_a_guess() -> None:
    with pytest.raises(UsageError, match=r"(?s)no column 'imag'.*Did you mean 'image'"):
        arrow(image=[1]).arrays({"imag": "x"})


# --- objects ----------------------------------------------------------------------------------------------------


def test_objects_come_as_they_are_and_are_cut_without_copying_the_list() -> None:
    objects = [{"a": 1}, (1, 2), "text", None]
    first, rest = ObjectRows(objects).cut(1)
    second, end = rest.cut(5)
    assert [*first.items(), *second.items()] == objects
    assert first.items()[0] is objects[0]
    assert (len(first), len(second), len(end)) == (1, 3, 0)


def test_columns_go_by_the_order_of_their_sorted_names() -> None:
    arrays = ObjectRows([(1, 2.5), (3, 4.5)]).arrays({"z": "second", "a": "first"})
    assert listed(arrays) == {"first": [1, 3], "second": [2.5, 4.5]}
    assert (arrays["first"].dtype, arrays["second"].dtype) == (np.int64, np.float64)


@pytest.mark.parametrize(
    "rows",
    [
        [Row(b=1, a=2.5), Row(b=3, a=4.5)],
        [Point(b=1, a=2.5), Point(b=3, a=4.5)],
        [{"b": 1, "a": 2.5, "c": 0}, {"a": 4.5, "b": 3}],
        [Row(b=1, a=2.5), Row(a=4.5, b=3)],
    ],
    ids=["Row", "namedtuple", "dict", "Rows in another order"],
)
def test_rows_that_name_their_values_are_asked_by_name(rows: list[Any]) -> None:
    arrays = ObjectRows(rows).arrays({"a": "x", "b": "y"})
    assert listed(arrays) == {"x": [2.5, 4.5], "y": [1, 3]}


def test_a_name_that_a_namedtuple_lacks_goes_by_position() -> None:
    assert listed(ObjectRows([Point(1, 2), Point(3, 4)]).arrays({"first": "x", "second": "y"})) == {
        "x": [1, 3],
        "y": [2, 4],
    }


def test_lists_and_arrays_are_rows_too() -> None:
    rows: list[Any] = [[np.ones((2, 2), np.float32), 1], [np.zeros((2, 2), np.float32), 2]]
    arrays = ObjectRows(rows).arrays({"image": "x", "label": "y"})
    assert (arrays["x"].shape, arrays["x"].dtype, arrays["y"].tolist()) == ((2, 2, 2), np.float32, [1, 2])
    assert listed(ObjectRows([np.array([1, 2]), np.array([3, 4])]).arrays({"a": "a", "b": "b"})) == {
        "a": [1, 3],
        "b": [2, 4],
    }


def test_plain_values_are_rows_of_one_column() -> None:
    assert listed(ObjectRows(["ab", "cd"]).arrays({"text": "t"})) == {"t": ["ab", "cd"]}
    assert listed(ObjectRows([1.5, 2.5]).arrays({"x": "x"})) == {"x": [1.5, 2.5]}
    with pytest.raises(UsageError, match="names 2 columns, x, y; the rows are single values"):
        ObjectRows([1.5]).arrays({"x": "x", "y": "y"})


@pytest.mark.parametrize(
    "values",
    [
        ["a", "bcd"],
        [b"a\0", b"bc"],
        [1, "a"],
        [None, 1.5],
        [[1], [2, 3]],
        [datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)],
        [{"k": 1}, {"k": 2}],
        [np.ones((1, 2)), np.ones((1, 3))],
        [[b"a\0", b"b"], [b"c", b"d\0"]],
        [["a", "b"], ["c", "d"]],
    ],
    ids=str,
)
def test_what_is_no_number_stays_what_it_is(values: list[Any]) -> None:
    array = ObjectRows([(value,) for value in values]).arrays({"v": "v"})["v"]
    assert array.dtype == object
    assert len(array) == 2
    for value, found in zip(values, array, strict=True):
        if isinstance(value, np.ndarray):
            assert (found == value).all()
        else:
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == value


def test_rows_of_different_forms_are_refused() -> None:
    mapping = {"a": "a", "b": "b"}
    with pytest.raises(DataError, match="2 rows are not of one length"):
        ObjectRows([(1, 2), (3,)]).arrays(mapping)
    with pytest.raises(UsageError, match="names 2 columns, a, b; the rows have 1 values"):
        ObjectRows([(1,), (3,)]).arrays(mapping)
    with pytest.raises(UsageError, match="no column 'b' among the 1 columns: a"):
        ObjectRows([{"a": 1}]).arrays(mapping)
    with pytest.raises(DataError, match="Not all of 2 rows have the key 'b'"):
        ObjectRows([{"a": 1, "b": 2}, {"a": 1}]).arrays(mapping)
    with pytest.raises(DataError, match="Not all of 2 rows have the fields of the first one: a, b"):
        ObjectRows([Row(a=1, b=2), Row(a=1, c=2)]).arrays(mapping)


# --- several parts ----------------------------------------------------------------------------------------------


def test_parts_are_joined_into_arrays_that_may_be_changed() -> None:
    parts = [arrow(x=[1, 2]), arrow(x=[3])]
    for some in (parts, parts[:1]):
        array = joined_arrays(some, {"x": "x"})["x"]
        assert array.tolist() == [1, 2, 3][: len(array)]
        array += 1
    assert parts[0].items() == [1, 2]


def test_single_objects_are_joined_before_they_become_arrays() -> None:
    parts = [ObjectRows([(n, "a" * n)]) for n in range(3)]
    assert listed(joined_arrays(parts, {"n": "n", "t": "t"})) == {"n": [0, 1, 2], "t": ["", "a", "aa"]}


def test_parts_with_lists_of_other_lengths_become_objects() -> None:
    parts = [arrow(x=[[1, 2], [3, 4]]), arrow(x=[[5]])]
    array = joined_arrays(parts, {"x": "x"})["x"]
    assert array.dtype == object
    assert array.tolist() == [[1, 2], [3, 4], [5]]


def test_no_rows_give_empty_arrays() -> None:
    assert listed(joined_arrays([], {"x": "x"})) == {"x": []}
    assert listed(ObjectRows([]).arrays({"x": "x"})) == {"x": []}


def test_numbers_reach_python_without_pandas() -> None:
    code = """
        import sys
        import pyarrow as pa
        from tfos_magic.feed.rows import ArrowRows

        schema = pa.schema([("a", pa.float64()), ("b", pa.int32()), ("l", pa.list_(pa.float32()))])
        batch = pa.ipc.read_record_batch(pa.py_buffer(sys.stdin.buffer.read()), schema)
        rows = ArrowRows(batch.slice(1))
        assert rows.items() == [(2.0, 4, [7.0, 8.0])], rows.items()
        arrays = rows.arrays({"a": "a", "b": "b", "l": "l"})
        assert arrays["l"].tolist() == [[7.0, 8.0]] and arrays["b"].tolist() == [4]
        print("pandas" in sys.modules)
    """
    lists = pa.array([[5.0, 6.0], [7.0, 8.0]], pa.list_(pa.float32()))
    batch = pa.RecordBatch.from_arrays(
        [pa.array([1.0, 2.0]), pa.array([3, 4], pa.int32()), lists], names=["a", "b", "l"]
    )
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, input=batch.serialize().to_pybytes(), capture_output=True, timeout=60)
    assert done.stdout == b"False\n", done
