"""TFRecord files and Examples against TensorFlow's own reader, writer and protobuf classes."""

from __future__ import annotations

import gzip
import io
import random
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tfos_magic.errors import DataError
from tfos_magic.tfrecords import crc32c, decode, encode, example, files, frames, varints
from tfos_magic.tfrecords.kinds import Column
from tfos_magic.tfrecords.slices import Slices

PLACE = decode.Place("somewhere", 0)
RECORDS = [b"", b"a", b"ab", b"abc", b"\0" * 100, bytes(range(256)) * 40, b"x" * 35_615]


@pytest.fixture(scope="module")
def tf() -> Any:
    return pytest.importorskip("tensorflow")


def written_by_tensorflow(tf: Any, path: Path, records: Sequence[bytes], compression: str = "") -> bytes:
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for record in records:
            writer.write(record)
    return path.read_bytes()


def read_back(data: bytes, block_bytes: int = frames.BLOCK_BYTES) -> list[bytes]:
    return [record for batch in frames.read(io.BytesIO(data), "a file", block_bytes) for record in batch]


# --- checksums, numbers -----------------------------------------------------------------------------------------


def test_the_checksum_is_castagnolis() -> None:
    # RFC 3720, appendix B.4, and the check value of the CRC catalogue
    known = {b"\0" * 32: 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, b"123456789": 0xE3069283}
    assert crc32c.checksums(Slices.from_list(list(known))).tolist() == list(known.values())


def test_checksums_of_all_short_lengths_and_some_long_ones() -> None:
    def bitwise(data: bytes) -> int:
        state = 0xFFFFFFFF
        for byte in data:
            state ^= byte
            for _ in range(8):
                state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
        return state ^ 0xFFFFFFFF

    strings = [random.Random(size).randbytes(size) for size in [*range(70), 127, 128, 129, 1000, 4097, 70_001]]
    random.Random(1).shuffle(strings)
    assert crc32c.checksums(Slices.from_list(strings)).tolist() == list(map(bitwise, strings))


def test_varints_of_all_sizes() -> None:
    values = np.array([0, 1, 127, 128, 300, -1, -(2**63), 2**63 - 1, *(1 << bit for bit in range(63))])
    encoded = varints.encode(values)
    assert encoded[4] == b"\xac\x02"  # the example of protobuf's documentation
    decoded, ends = varints.decode(encoded.data)
    assert decoded.tolist() == values.tolist()
    assert ends.tolist() == encoded.ends.tolist()


# --- framing ----------------------------------------------------------------------------------------------------


def test_a_file_is_the_same_bytes_as_tensorflows(tf: Any, tmp_path: Path) -> None:
    assert frames.framed(Slices.from_list(RECORDS)) == written_by_tensorflow(tf, tmp_path / "x", RECORDS)


@pytest.mark.parametrize("compression", ["", "GZIP"])
@pytest.mark.parametrize("block_bytes", [1, 13, 5000, 1 << 20])
def test_tensorflows_files_are_read(tf: Any, tmp_path: Path, compression: str, block_bytes: int) -> None:
    data = written_by_tensorflow(tf, tmp_path / "x", RECORDS, compression)
    assert read_back(data, block_bytes) == RECORDS


def test_a_first_record_whose_length_looks_like_gzips_magic_is_read() -> None:
    record = b"y" * 0x8B1F
    data = frames.framed(Slices.from_list([record]))
    assert data.startswith(b"\x1f\x8b")
    assert read_back(data) == [record]


def test_gzip_of_several_members_is_read() -> None:
    parts = [frames.framed(Slices.from_list([record])) for record in RECORDS]
    assert read_back(b"".join(map(gzip.compress, parts))) == RECORDS


DATA = frames.framed(Slices.from_list([b"first", b"second", b"third"]))  # 21, 22 and 21 bytes


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("place", range(len(DATA)))
def test_any_changed_byte_is_found_and_its_record_named(place: int, block_bytes: int) -> None:
    damaged = bytearray(DATA)
    damaged[place] ^= 0x40
    start = 0 if place < 21 else 21 if place < 43 else 43
    with pytest.raises(DataError, match=rf"^a file is damaged or no TFRecord file: at byte {start} the "):
        read_back(bytes(damaged), block_bytes)


@pytest.mark.parametrize("size", set(range(1, len(DATA))) - {21, 43})
def test_a_file_that_ends_too_early_is_found(size: int) -> None:
    start = 0 if size < 21 else 21 if size < 43 else 43
    with pytest.raises(DataError, match=f"at byte {start} the file ends {size - start} bytes after the start"):
        read_back(DATA[:size])


def test_gzip_that_ends_too_early_or_is_damaged_is_found() -> None:
    data = gzip.compress(random.Random(0).randbytes(10) + DATA)  # whatever is inside
    with pytest.raises(DataError, match=r"\(uncompressed\) is damaged.* at byte \d+ gzip cannot go on"):
        read_back(data[:-9])
    whole = bytearray(gzip.compress(frames.framed(Slices.from_list([random.Random(0).randbytes(99_999)]))))
    whole[50_000] ^= 1
    with pytest.raises(DataError, match=r"gzip cannot go on|checksum"):
        read_back(bytes(whole))


def test_another_kind_of_file_is_refused() -> None:
    with pytest.raises(DataError, match="at byte 0 the checksum of the record's length does not match"):
        read_back(b"PAR1" + b"\0" * 100)


def test_an_empty_file_has_no_records() -> None:
    assert read_back(b"") == []


# --- Examples ---------------------------------------------------------------------------------------------------


def tensorflows(tf: Any, features: dict[str, Any]) -> bytes:
    """Serialize with TensorFlow: lists of int, float or bytes; None is a feature without a list."""
    made = tf.train.Example()
    for name, values in features.items():
        feature = made.features.feature[name]
        if values is None:
            continue
        kind = {int: "int64_list", float: "float_list", bytes: "bytes_list"}[type(values[0]) if values else int]
        getattr(feature, kind).SetInParent()
        getattr(feature, kind).value.extend(values)
    return bytes(made.SerializeToString())


def as_tensorflow_sees(tf: Any, record: bytes) -> dict[str, tuple[str | None, list[Any]]]:
    parsed = tf.train.Example.FromString(record)
    result: dict[str, tuple[str | None, list[Any]]] = {}
    for name, feature in parsed.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        result[name] = (kind.removesuffix("_list") if kind else None, values)
    return result


def random_features(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    makers: list[Callable[[], Any]] = [
        lambda: rng.getrandbits(rng.choice([1, 7, 8, 30, 63])) * rng.choice([1, -1]),
        lambda: struct.unpack("<f", struct.pack("<f", rng.gauss(0, 1e3)))[0],
        lambda: rng.randbytes(rng.choice([0, 1, 5, 127, 128, 300])),
    ]
    names = rng.sample(["a", "b", "ä", "a_long_name" * 20, "f", "g"], rng.randrange(7))
    sizes = [0, 1, 1, 2, 40, 200]
    return {name: [maker() for _ in range(rng.choice(sizes))] for name in names for maker in [rng.choice(makers)]}


def test_any_example_is_parsed_and_written_as_tensorflow_does(tf: Any) -> None:
    for seed in range(300):
        record = tensorflows(tf, random_features(seed))
        parsed = example.parse(record)
        assert parsed == as_tensorflow_sees(tf, record)
        assert as_tensorflow_sees(tf, example.serialize(parsed)) == as_tensorflow_sees(tf, record)


ODD = {
    "numbers that are not packed": bytes.fromhex("0a13 0a11 0a0178 120c 1a0a 0801 08ac02 0a03 05ac02"),
    "floats that are not packed": bytes.fromhex("0a12 0a10 0a0178 120b 1209 0d0000803f 0a00 1500") + b"\0\0",
    "a feature twice": bytes.fromhex("0a18 0a0a 0a0178 1205 1a03 0a0101 0a0a 0a0178 1205 1a03 0a0102"),
    "two maps": bytes.fromhex("0a0c 0a0a 0a0178 1205 1a03 0a0101 0a0c 0a0a 0a0179 1205 1a03 0a0102"),
    "value before key": bytes.fromhex("0a0c 0a0a 1205 1a03 0a0101 0a0178"),
    "no value": bytes.fromhex("0a05 0a03 0a0178"),
    "no key": bytes.fromhex("0a09 0a07 1205 1a03 0a0101"),
    "two lists": bytes.fromhex("0a14 0a12 0a0178 120d 1a03 0a0101 0a06 0a01 41 0a01 42"),
    "the same list in parts": bytes.fromhex("0a11 0a0f 0a0178 120a 1a03 0a0101 1a03 0a0102"),
    "fields that are not known": bytes.fromhex("3801 0a0f 0a0d 2205 6162636465 0a0178 1200 1201 00"),
    "a length in more bytes than needed": bytes.fromhex("0a8d00 0a0b 0a8100 78 1205 1a03 0a0101"),
    "nothing": b"",
    "no features": bytes.fromhex("0a00"),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_what_protobuf_allows_is_read_as_tensorflow_reads_it(tf: Any, odd: bytes) -> None:
    try:
        expected = as_tensorflow_sees(tf, odd)
    except Exception:
        with pytest.raises(DataError, match=r"record 1 is no tf\.train\.Example"):
            columns_of([tensorflows(tf, {}), odd], x="array<bigint>")
        return
    assert example.parse(odd) == expected
    # in the middle of records that are laid out as usual
    usual = tensorflows(tf, {"x": [7, 8], "y": [b"z"]})
    kind, values = expected.get("x", (None, []))
    type_name = {None: "bigint", "int64": "bigint", "float": "double", "bytes": "binary"}[kind]
    if kind in (None, "int64"):
        found = columns_of([usual, odd, usual], x=f"array<{type_name}>")["x"]
        assert found == [[7, 8], values if kind else None, [7, 8]]
    else:
        assert columns_of([odd], x=f"array<{type_name}>")["x"] == [values]


def columns_of(records: Sequence[bytes], **types: str) -> dict[str, list[Any]]:
    wanted = [Column.of(name, kind) for name, kind in types.items()]
    # as they lie in a file: with gaps
    batch = next(frames.read(io.BytesIO(frames.framed(Slices.from_list(list(records)))), "f"))
    arrays = decode.columns(batch, wanted, PLACE)
    for array in arrays:
        array.validate(full=True)
    return {column.name: array.to_pylist() for column, array in zip(wanted, arrays, strict=True)}


def test_columns_are_what_tensorflow_sees_in_each_record(tf: Any) -> None:
    rng = random.Random(3)
    names = ["n", "v", "b", "bs", "often"]
    rows: list[dict[str, Any]] = []
    for _ in range(500):
        row: dict[str, Any] = {
            "n": [rng.randrange(-(10**12), 10**12) for _ in range(rng.choice([0, 1, 3]))],
            "v": [float(np.float32(rng.random())) for _ in range(rng.choice([1, 4]))],
            "b": [rng.randbytes(rng.randrange(300))],
            "bs": [rng.randbytes(rng.randrange(4)) for _ in range(rng.choice([1, 1, 5]))],
            "often": [rng.randrange(200)],
        }
        chosen = rng.sample(names, rng.randrange(6))  # in any order, any of them missing
        rows.append({name: row[name] for name in chosen})
    found = columns_of(
        [tensorflows(tf, row) for row in rows],
        n="array<bigint>", v="array<float>", b="binary", bs="array<binary>", often="bigint", absent="string",
    )  # fmt: skip
    for name in ("n", "v", "bs"):
        assert found[name] == [row.get(name) for row in rows], name
    for name in ("b", "often"):
        assert found[name] == [row[name][0] if name in row else None for row in rows], name
    assert found["absent"] == [None] * len(rows)


def test_an_encoded_batch_is_what_tensorflow_would_have_written(tf: Any) -> None:
    batch = pa.RecordBatch.from_pydict(
        {
            "i": pa.array([1, None, -3], pa.int32()),
            "b": pa.array([True, False, None]),
            "d": pa.array([0.5, None, 1e300], pa.float64()),
            "s": pa.array(["ä" * 100, "", None]),
            "y": pa.array([b"\xff", None, b""], pa.large_binary()),
            "is": pa.array([[1, 300], [], None], pa.list_(pa.int16())),
            "fs": pa.array([None, [1.5], [2.5] * 100], pa.large_list(pa.float32())),
            "ss": pa.array([["a", "", "b" * 200], [], None]),
        }
    )
    expected: list[dict[str, Any]] = [
        {"i": [1], "b": [1], "d": [0.5], "s": [b"\xc3\xa4" * 100], "y": [b"\xff"], "is": [1, 300],
         "ss": [b"a", b"", b"b" * 200]},
        {"b": [0], "s": [b""], "is": [], "fs": [1.5], "ss": []},
        {"i": [-3], "d": [float("inf")], "y": [b""], "fs": [2.5] * 100},
    ]  # fmt: skip
    for rows in (slice(0, 3), slice(1, 3), slice(2, 3)):  # a batch may be part of another
        records = list(encode.examples(batch.slice(rows.start, rows.stop - rows.start)))
        seen = [{name: values for name, (_, values) in as_tensorflow_sees(tf, r).items()} for r in records]
        assert seen == expected[rows]
        assert as_tensorflow_sees(tf, records[0]).keys() == expected[rows.start].keys()


def test_a_batch_without_rows_is_no_records() -> None:
    assert list(encode.examples(pa.RecordBatch.from_pydict({"x": pa.array([], pa.list_(pa.string()))}))) == []


def test_a_null_inside_an_array_is_refused() -> None:
    batch = pa.RecordBatch.from_pydict({"x": [[1, 2], [], [3, None, None]]})
    with pytest.raises(DataError, match=r"Column 'x' has 2 nulls inside its arrays.*\[3, None, None\]"):
        encode.examples(batch)


@pytest.mark.parametrize(
    ("values", "kind", "found"),
    [
        ([1, 2], "bigint", r"f, record 2: feature 'x' has 2 values, and its column is bigint[\s\S]*'array<bigint>'"),
        ([1.5], "bigint", r"record 2: feature 'x' holds float values, and its column is bigint[\s\S]*'x': 'double'"),
        ([b"a"], "array<float>", r"holds bytes values, and its column is array<float>[\s\S]*'array<string>'"),
        ([300], "tinyint", r"records 1 to 2: feature 'x' does not fit into int8"),
        ([b"\xff"], "string", r"feature 'x' is not UTF-8[\s\S]*binary_features=\['x'\]"),
    ],
)
def test_a_feature_that_does_not_fit_its_column_is_named(tf: Any, values: list[Any], kind: str, found: str) -> None:
    records = Slices.from_list([tensorflows(tf, {}), tensorflows(tf, {"x": values})])
    with pytest.raises(DataError, match=found):
        decode.columns(records, [Column.of("x", kind)], decode.Place("f", 1))


def test_integers_where_a_float_is_wanted_and_flags_where_integers_are_stored(tf: Any) -> None:
    records = [tensorflows(tf, {"x": [2], "b": [1]}), tensorflows(tf, {"x": [0.5], "b": [0]})]
    assert columns_of(records, x="double", b="boolean") == {"x": [2.0, 0.5], "b": [True, False]}


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "default", "expected"),
    [
        ("/a/b/", "file:///", "/a/b"),
        ("file:///a/b%20c", "hdfs://h:1", "/a/b c"),
        ("file:/a", "hdfs://h:1", "/a"),
        ("hdfs://h:1/a/", "file:///", "hdfs://h:1/a"),
        ("/a", "hdfs://h:1", "hdfs://h:1/a"),
    ],
)
def test_a_path_means_the_same_everywhere(path: str, default: str, expected: str) -> None:
    assert files.absolute(path, default) == expected


def test_a_relative_path_is_below_the_working_directory_or_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setattr(files.getpass, "getuser", lambda: "me")
    assert files.absolute("x/y", "file:///") == "/x/y"
    assert files.absolute("x/y", "hdfs://h:1") == "hdfs://h:1/user/me/x/y"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_files_do_the_same_wherever_they_are(kind: str, tmp_path: Path, tf: Any) -> None:
    root = str(tmp_path) if kind == "local" else "ram://tfrecords"
    there = files.files_for(root)
    assert type(there).__name__ == ("LocalFiles" if kind == "local" else "RemoteFiles")
    there.make_dirs(f"{root}/d/scratch")
    for name in ("_SUCCESS", ".x.crc", "b", "a"):
        with there.open(f"{root}/d/{name}", "wb") as file:
            file.write(name.encode())
    assert files.visible_files(there, f"{root}/d") == [f"{root}/d/a", f"{root}/d/b"]
    assert files.visible_files(there, f"{root}/d/b") == [f"{root}/d/b"]
    assert files.visible_files(there, f"{root}/d/[_b]*") == [f"{root}/d/b"]
    assert files.visible_files(there, f"{root}/nothing") == []
    with there.open(f"{root}/d/a", "rb") as file:
        assert file.read(100) == b"a"
    there.rename(f"{root}/d/a", f"{root}/d/c")
    with pytest.raises((FileExistsError, tf.errors.OpError)):
        there.rename(f"{root}/d/b", f"{root}/d/c")
    assert not there.exists(f"{root}/d/a")
    assert there.is_dir(f"{root}/d")
    there.remove(f"{root}/d/c")
    there.remove(f"{root}/d")
    assert not there.exists(f"{root}/d/b")


def test_no_tensorflow_is_imported_for_local_files() -> None:
    import subprocess

    code = (
        "import sys; from tfos_magic import dfutil; from tfos_magic.tfrecords import files, task, decode, encode, rows;"
        "files.files_for('/x'); print('tensorflow' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
