"""What each kind of column becomes, and what is refused."""

from __future__ import annotations

import datetime
import decimal
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tfos_magic.errors import DataError, UsageError
from tfos_magic.feed import columns


def became(values: pa.Array, *, ragged: bool = False, keep_float64: bool = False):
    """Send one column through sender and child; return its spec and what TensorFlow gets."""
    batch = pa.RecordBatch.from_pydict({"c": values})
    schema = pa.ipc.read_schema(columns.with_list_lengths(batch).serialize())
    spec = columns.column_specs(schema, "train", ragged=["c"] if ragged else (), keep_float64=keep_float64)["c"]
    column = columns.join([columns.extract(part, spec) for part in (batch.slice(0, 1), batch.slice(1))], spec)
    return spec, columns.finish(columns.pick(column, np.arange(len(values))), spec)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (pa.int8(), "int8"),
        (pa.int16(), "int16"),
        (pa.int32(), "int32"),
        (pa.int64(), "int64"),
        (pa.float32(), "float32"),
        (pa.float64(), "float32"),
        (pa.decimal128(21, 2), "float32"),
    ],
)
def test_numbers(kind, dtype):
    spec, array = became(pa.array([1, 2, 3], pa.int64()).cast(kind))
    assert spec.dtype == dtype == array.dtype.name
    assert array.tolist() == [1, 2, 3]
    assert spec.shape == ()


def test_doubles_stay_when_asked():
    _, array = became(pa.array([0.1, 1e300]), keep_float64=True)
    assert array.dtype == np.float64
    assert array.tolist() == [0.1, 1e300]


def test_decimals_keep_their_fraction():
    _, array = became(pa.array([decimal.Decimal("1.25"), decimal.Decimal("-3.50")]), keep_float64=True)
    assert array.tolist() == [1.25, -3.5]


def test_booleans():
    _, array = became(pa.array([True, False, True]))
    assert array.dtype == np.bool_
    assert array.tolist() == [True, False, True]


def test_text_and_bytes():
    for kind in (pa.string(), pa.large_string()):
        assert became(pa.array(["ä", "", "b"], kind))[1].tolist() == ["ä".encode(), b"", b"b"]
    assert became(pa.array([b"\xff\x00", b"x"]))[1].tolist() == [b"\xff\x00", b"x"]


def test_dates_are_days_and_timestamps_microseconds():
    spec, days = became(pa.array([datetime.date(1970, 1, 2), datetime.date(2020, 1, 1)]))
    assert (spec.dtype, days.tolist()) == ("int32", [1, 18262])
    second = datetime.datetime(1970, 1, 1, 0, 0, 1)
    for kind in (pa.timestamp("us"), pa.timestamp("us", "Europe/Berlin"), pa.timestamp("ns")):
        spec, micros = became(pa.array([second, second], pa.timestamp("us")).cast(kind))
        assert (spec.dtype, set(np.diff(micros))) == ("int64", {0})
    assert micros.tolist() == [1_000_000] * 2
    assert became(pa.array([datetime.timedelta(seconds=1)] * 2))[1].tolist() == [1_000_000] * 2


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda t: pa.list_(t, 2)])
def test_lists_of_equal_lengths_have_a_static_shape(kind):
    spec, array = became(pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], kind(pa.float64())))
    assert spec.shape == (2,)
    assert array.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_nested_lists_and_lists_of_text():
    image = np.arange(12).reshape(2, 3, 2)
    spec, array = became(pa.array(image.tolist()))
    assert spec.shape == (3, 2)
    assert (array == image).all()
    spec, words = became(pa.array([["a", "b"], ["c", "d"]]))
    assert spec.shape == (2,)
    assert words.tolist() == [[b"a", b"b"], [b"c", b"d"]]


def test_lists_of_other_lengths_are_refused_with_count_and_way_out():
    with pytest.raises(DataError) as caught:
        became(pa.array([[1, 2], [3], [4, 5], [6, 7, 8]]))
    assert "2 in the first row, but 2 of 3 rows differ, e.g. one of 1" in str(caught.value)
    assert "ragged=['c']" in caught.value.hint


def test_ragged_lists():
    spec, ragged = became(pa.array([[1, 2], [], [3]]), ragged=True)
    assert spec.shape == (None,)
    assert ragged.values.tolist() == [1, 2, 3]
    assert ragged.row_splits.tolist() == [0, 2, 2, 3]
    spec, ragged = became(pa.array([[[1, 2]], [[3, 4], [5, 6]]]), ragged=True)
    assert spec.shape == (None, 2)
    assert ragged.values.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert ragged.row_splits.tolist() == [0, 1, 3]


def test_ragged_must_name_an_array_column():
    schema = pa.schema({"c": pa.int64()})
    with pytest.raises(UsageError, match="holds no arrays but int64"):
        columns.column_specs(schema, "train", ragged=["c"])
    with pytest.raises(UsageError, match="There is no column 'd'"):
        columns.column_specs(schema, "train", ragged=["d"])


@pytest.mark.parametrize(
    ("values", "cure"),
    [
        (pa.array([{"a": 1}]), r'df\.select\("\*", "c\.\*"\)'),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), "by key"),
        (pa.nulls(2), "cast"),
        (pa.array([[{"a": 1}]]), r"c\.\*"),
    ],
)
def test_types_without_a_tensor_form_are_refused_with_the_way_out(values, cure):
    with pytest.raises(DataError, match=rf"(?s)Column 'c' of feed 'train' has the type .*{cure}"):
        became(values)


def test_nulls_are_refused_in_the_child_too():
    spec = columns.column_specs(pa.schema({"c": pa.int64()}), "train")["c"]
    with pytest.raises(DataError, match="1 nulls in 2 rows"):
        columns.extract(pa.RecordBatch.from_pydict({"c": pa.array([1, None])}), spec)


def test_sliced_lists_are_checked_only_where_they_are_used():
    lists = pa.array([[9, None], [1], [2], [3], [None]])
    batch = pa.RecordBatch.from_pydict({"c": lists}).slice(1, 3)
    columns.refuse_nulls(batch, "train")
    spec = columns.column_specs(columns.with_list_lengths(batch), "train")["c"]
    assert columns.extract(batch, spec).tolist() == [[1], [2], [3]]


def test_numbers_are_views_of_the_chunk():
    values = pa.array(np.arange(1000, dtype=np.float32))
    spec = columns.column_specs(pa.schema({"c": pa.float32()}), "train")["c"]
    array = columns.join([columns.extract(pa.RecordBatch.from_pydict({"c": values}), spec)], spec)
    assert array.ctypes.data == values.buffers()[1].address


# --- which columns ------------------------------------------------------------------------------------------


def test_label_is_found_by_name_in_the_contracts_order():
    assert columns.choose(["a", "target", "y", "label"]) == columns.Choice(("a", "target", "y"), "label", None)
    assert columns.choose(["a", "target", "y"]).label == "y"
    assert columns.choose(["a", "target"]).label == "target"
    assert columns.choose(["a", "b"]) == columns.Choice(("a", "b"), None, None)


def test_named_columns_win_and_features_keep_their_order():
    choice = columns.choose(["a", "b", "c", "w"], ["c", "a"], "b", "w")
    assert choice.names == ("c", "a", "b", "w")
    assert columns.choose(["y", "z"], ["y"]) == columns.Choice(("y",), None, None)


def test_unknown_column_gets_a_guess():
    with pytest.raises(
        UsageError, match=r"(?s)no column 'lable' among the 2 columns: x, label\..*Did you mean 'label'"
    ):
        columns.choose(["x", "label"], label="lable")
    with pytest.raises(UsageError, match="Did you mean 'Age'"):
        columns.choose(["Age", "b"], ["AGE"])


def test_dataframe_without_features_is_refused():
    with pytest.raises(UsageError, match="no feature column"):
        columns.choose(["label"])


def test_agents_half_imports_nothing_heavy():
    """Checked in a fresh interpreter: the agent must start in milliseconds."""
    import subprocess
    import sys

    code = (
        "import sys, tfos_magic.feed.receiver, tfos_magic.feed.sender, tfos_magic.feed.source, tfos_magic.feed.columns,"
        " tfos_magic.feed.dataset, tfos_magic.feed.datafeed, tfos_magic.feed.prepare;"
        "print([m for m in ('pyarrow', 'numpy', 'tensorflow', 'pyspark', 'IPython', 'pandas') if m in sys.modules])"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
