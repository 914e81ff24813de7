"""A feed as ``tf.data.Dataset``.

Runs on: executors (child).

Python handles blocks of many batches, C++ the single batches::

    chunks ──► window ──► one block per window ──► shuffled ──► superbatch (k, batch, …) ──► unbatch ──► batch
               what is there, or up to 256 MiB                  Python, a few times a second │ C++, per step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import DataError, UsageError
from tfos_magic.feed import columns
from tfos_magic.feed.columns import Choice, ColumnSpec, Ragged
from tfos_magic.feed.source import FeedSource

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import tensorflow as tf

    from tfos_magic.feed.columns import Array, Column

_WINDOW_BYTES = 256 << 20  # rows shuffled together; a share up to this size is permuted as a whole
_STREAM_WINDOW_BYTES = 32 << 20  # while the feed still runs: training should start soon
_SUPERBATCH_BYTES = 8 << 20
_SUPERBATCH_ROWS = 131072
_SUPERBATCH_FIRST_ROWS = 1024
_SUPERBATCH_S = (0.05, 0.3)  # a superbatch should last between these, so that counters move and Python is rarely called


def make_dataset(
    source: FeedSource,
    *,
    batch_size: int,
    features: Sequence[str] | None = None,
    label: str | None = None,
    weight: str | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    raw: bool = False,
    ragged: Iterable[str] = (),
) -> tf.data.Dataset:
    """Return this node's share of a feed; iterating once is one epoch.

    The first iteration may begin, and go on, while Spark still delivers; later ones read the local cache.
    Every node yields the same number of batches, ``source.steps(batch_size)``: when a node's rows are used up, a short
    batch and then batches of 0 rows follow. Waits until the feed's columns are known.

    Parameters
    ----------
    source : FeedSource
    batch_size : int
        Rows per batch on this node.
    features, label, weight : optional
        Columns, as :func:`tfos_magic.feed.columns.choose` takes them.
    shuffle : bool
        Different in every epoch. The whole share is permuted if it has fewer than 256 MiB; a larger one, or a feed that
        still runs, by windows of that size (32 MiB).
    seed : int, optional
        Makes the order repeatable, given the order in which Spark delivers. Each node, and each pass over the feed,
        has its own random stream.
    raw : bool
        Give the dict of all columns, doubles left as float64.
    ragged : iterable of str
        Array columns whose rows differ in length: they become RaggedTensors.

    Returns
    -------
    tf.data.Dataset
        Of ``x``, ``(x, y)`` or ``(x, y, sample_weight)``; `x` is a tensor ``(batch, …)`` for one feature column, a dict
        by name for several. See :mod:`tfos_magic.feed.columns` for shapes and dtypes.

    Raises
    ------
    DataError
        If the feed has no rows at all, or a column no tensor form. Errors found later, in the rows, arrive inside
        TensorFlow's own exceptions; ``source.error`` keeps the original.
    UsageError
        If a name is unknown or the batch size is not positive.

    Notes
    -----
    An iterator that is dropped while it reads ahead (``.prefetch``) of a feed that still runs lets go when the next
    chunk comes, or when the feed ends or fails: TensorFlow cannot interrupt a generator.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1.")
    schema = source.schema
    if schema is None:
        raise DataError(
            f"Feed '{source.name}' has no rows.",
            cause="Its DataFrame is empty: a filter or a join may have left nothing.",
            hint="Look at it: df.count().",
        )
    specs = columns.column_specs(schema, source.name, ragged=ragged, keep_float64=raw)
    choice = Choice(tuple(schema.names), None, None) if raw else columns.choose(schema.names, features, label, weight)
    layout = _Layout(choice, {name: specs[name] for name in choice.names}, as_dict=raw or len(choice.features) > 1)
    reader = _Reader(source, layout, batch_size, shuffle, seed)
    source.reading = f"{batch_size} rows, shuffle {shuffle}, seed {seed}"
    dataset = _ragged_dataset(reader) if layout.has_ragged else _dense_dataset(reader)
    if source.is_ended:  # Keras then shows how far an epoch is, and does not warn that the data "ran out"
        import tensorflow as tf

        dataset = dataset.apply(tf.data.experimental.assert_cardinality(source.steps(batch_size)))
    return dataset.with_options(_options())


def _options() -> tf.data.Options:
    import tensorflow as tf

    options = tf.data.Options()
    # The rows are this node's already: sharding them again would silently drop most of them.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options


def _dense_dataset(reader: _Reader) -> tf.data.Dataset:
    """Superbatches ``(k, batch, …)``, taken apart by ``unbatch``."""
    import tensorflow as tf

    layout = reader.layout

    def signature(spec: ColumnSpec) -> tf.TensorSpec:
        return tf.TensorSpec((None, None, *spec.lengths), _tf_dtype(spec))

    def superbatches() -> Iterator[Any]:
        for part in reader.superbatches():
            yield layout.arrange({name: part.stacked(name) for name in layout.specs})

    structure = layout.arrange({name: signature(spec) for name, spec in layout.specs.items()})
    rows = tf.data.Dataset.from_generator(superbatches, output_signature=structure).unbatch()
    return rows.concatenate(_padding(reader))


def _padding(reader: _Reader) -> tf.data.Dataset:
    """Batches of 0 rows, as many as this node lacks. On their own: ``unbatch`` crashes on empty slices (TF 2.21)."""
    import tensorflow as tf

    def counts() -> Iterator[int]:
        yield reader.missing_batches()

    def empty() -> Any:
        return reader.layout.arrange(
            {name: tf.zeros((0, *spec.lengths), _tf_dtype(spec)) for name, spec in reader.layout.specs.items()}
        )

    batch_counts = tf.data.Dataset.from_generator(counts, output_signature=tf.TensorSpec((), tf.int64))
    return batch_counts.flat_map(tf.data.Dataset.range).map(lambda _: empty())


def _ragged_dataset(reader: _Reader) -> tf.data.Dataset:
    """Flat superbatches, cut into batches by slicing in the graph: ``unbatch`` would go through ragged rows singly."""
    import tensorflow as tf

    layout, batch_size = reader.layout, reader.batch_size

    def signature(spec: ColumnSpec) -> Any:
        values = tf.TensorSpec((None, *spec.lengths), _tf_dtype(spec))
        return (values, tf.TensorSpec((None,), tf.int64)) if spec.is_ragged else values

    def superbatches() -> Iterator[Any]:
        for part in reader.superbatches():
            yield part.batch_count, {name: part.flat(name) for name in layout.specs}
        nothing = reader.nothing()  # slices beyond the end are empty batches
        yield reader.missing_batches(), {name: nothing.flat(name) for name in layout.specs}

    def cut(flat: dict[str, Any], index: tf.Tensor) -> Any:
        start, stop = index * batch_size, (index + 1) * batch_size
        return layout.arrange({name: _tensor(flat[name])[start:stop] for name in layout.specs})

    def split(batch_count: tf.Tensor, flat: dict[str, Any]) -> tf.data.Dataset:
        return tf.data.Dataset.range(batch_count).map(lambda index: cut(flat, index))

    structure = (tf.TensorSpec((), tf.int64), {name: signature(spec) for name, spec in layout.specs.items()})
    return tf.data.Dataset.from_generator(superbatches, output_signature=structure).flat_map(split)


def _tensor(flat: Any) -> Any:
    import tensorflow as tf

    return tf.RaggedTensor.from_row_splits(*flat, validate=False) if isinstance(flat, tuple) else flat


def _tf_dtype(spec: ColumnSpec) -> tf.DType:
    import tensorflow as tf

    return tf.string if spec.dtype == "object" else tf.as_dtype(spec.dtype)


@dataclass(frozen=True)
class _Layout:
    """How columns are arranged into an element."""

    choice: Choice
    specs: dict[str, ColumnSpec]
    as_dict: bool

    @property
    def has_ragged(self) -> bool:
        return any(spec.is_ragged for spec in self.specs.values())

    def arrange(self, by_name: dict[str, Any]) -> Any:
        """Return ``x``, ``(x, y)`` or ``(x, y, weight)``."""
        features = {name: by_name[name] for name in self.choice.features}
        x = features if self.as_dict else next(iter(features.values()))
        if self.choice.label is None:
            return x  # a weight without a label has nothing to weigh
        y = by_name[self.choice.label]
        return (x, y) if self.choice.weight is None else (x, y, by_name[self.choice.weight])


@dataclass(frozen=True)
class _Block:
    """Rows as columns."""

    columns: dict[str, Column]
    row_count: int

    @classmethod
    def extract(cls, batch: pa.RecordBatch, specs: dict[str, ColumnSpec]) -> _Block:
        return cls({name: columns.extract(batch, spec) for name, spec in specs.items()}, batch.num_rows)

    @classmethod
    def join(cls, parts: Sequence[_Block], specs: dict[str, ColumnSpec]) -> _Block:
        joined = {name: columns.join([p.columns[name] for p in parts], spec) for name, spec in specs.items()}
        return cls(joined, sum(part.row_count for part in parts))

    def pick(self, rows: slice | Array) -> _Block:
        row_count = len(range(*rows.indices(self.row_count))) if isinstance(rows, slice) else len(rows)
        return _Block({name: columns.pick(column, rows) for name, column in self.columns.items()}, row_count)


@dataclass(frozen=True)
class _Superbatch:
    """Some batches, still in one piece: ``batch_count`` of them, all of the same number of rows."""

    block: _Block
    specs: dict[str, ColumnSpec]
    batch_count: int

    def stacked(self, name: str) -> Array:
        """Return a column as ``(batch_count, batch, …)``."""
        spec, rows = self.specs[name], self.block.row_count // self.batch_count
        array: Any = columns.finish(self.block.columns[name], spec)
        stacked: Array = array.reshape(self.batch_count, rows, *spec.lengths)
        return stacked

    def flat(self, name: str) -> Any:
        """Return a column as ``(rows, …)``, a ragged one as values and row splits."""
        column = columns.finish(self.block.columns[name], self.specs[name])
        return (column.values, column.row_splits) if isinstance(column, Ragged) else column


class _Reader:
    """Reads a feed any number of times; each pass is independent of the others."""

    def __init__(self, source: FeedSource, layout: _Layout, batch_size: int, shuffle: bool, seed: int | None) -> None:
        import numpy as np

        self.source, self.layout, self.batch_size = source, layout, batch_size
        self._shuffle = shuffle
        self._seed = seed if seed is not None else int(np.random.SeedSequence().generate_state(1)[0])

    def superbatches(self) -> Iterator[_Superbatch]:
        """Yield one epoch."""
        try:
            yield from self._epoch()
        except Exception as error:
            self.source.error = error  # TensorFlow turns it into text
            raise

    def missing_batches(self) -> int:
        """Return how many batches the node with most rows has more than this one; waits for the feed's end."""
        return self.source.steps(self.batch_size) - -(-(self.source.row_count or 0) // self.batch_size)

    def nothing(self) -> _Superbatch:
        """Return no row."""
        specs = self.layout.specs
        block = _Block.join([_Block.extract(columns.empty_batch(self.source.schema), specs)], specs)
        return _Superbatch(block, specs, 0)

    def _epoch(self) -> Iterator[_Superbatch]:
        order = _Order(self._shuffle, [abs(self._seed), self.source.node_index, self.source.begin_pass()])
        pacer = _Pacer(self._batches_at_most())
        specs, size = self.layout.specs, self.batch_size
        rest: list[_Block] = []
        for parts in self._windows(order):
            block = _Block.join([*rest, *parts], specs)
            rows = order.of_rows(block.row_count)
            full = block.row_count // size
            for start, stop in pacer.ranges(full):
                yield self._hand_over(block.pick(rows(start * size, stop * size)), stop - start)
            rest = [block.pick(rows(full * size, block.row_count))] if block.row_count % size else []
            del block, parts  # up to a window of memory, while the next one is awaited
        if rest:
            yield self._hand_over(_Block.join(rest, specs), 1)

    def _hand_over(self, block: _Block, batch_count: int) -> _Superbatch:
        self.source.count_consumed(block.row_count)
        return _Superbatch(block, self.layout.specs, batch_count)

    def _batches_at_most(self) -> int:
        row_bytes = sum(_row_bytes(spec) for spec in self.layout.specs.values())
        rows = min(_SUPERBATCH_ROWS, _SUPERBATCH_BYTES // row_bytes)
        return max(1, rows // self.batch_size)

    # --- windows ------------------------------------------------------------------------------------------

    def _windows(self, order: _Order) -> Iterator[list[_Block]]:
        """Yield the rows in parts that fit into memory together."""
        if not self.source.is_ended:
            return self._streamed_windows()
        if self._size_bytes() <= _WINDOW_BYTES:
            return self._single_window()
        return self._cached_windows(order)

    def _streamed_windows(self) -> Iterator[list[_Block]]:
        seen = 0
        while batches := self.source.next_chunks(seen, _STREAM_WINDOW_BYTES):
            seen += len(batches)
            yield [_Block.extract(batch, self.layout.specs) for batch in batches]

    def _single_window(self) -> Iterator[list[_Block]]:
        """Yield the whole share. Its columns are joined once, for all epochs and all datasets over this feed."""
        whole = self.source.whole_columns
        missing = {name: spec for name, spec in self.layout.specs.items() if spec not in whole}
        if missing:
            parts = [_Block.extract(batch, missing) for batch in self.source.chunks()]
            joined = _Block.join(parts, missing) if parts else self.nothing().block
            whole.update({spec: joined.columns[name] for name, spec in missing.items()})
        row_count = self.source.row_count or 0
        yield [_Block({name: whole[spec] for name, spec in self.layout.specs.items()}, row_count)]

    def _cached_windows(self, order: _Order) -> Iterator[list[_Block]]:
        window: list[_Block] = []
        size_bytes = 0
        refs = self.source.chunk_refs
        for index in order.of_chunks(len(refs)):
            window.append(_Block.extract(self.source.read(refs[index]), self.layout.specs))
            size_bytes += refs[index].length_bytes
            if size_bytes >= _WINDOW_BYTES:
                yield window
                window, size_bytes = [], 0
        if window:
            yield window

    def _size_bytes(self) -> int:
        return sum(ref.length_bytes for ref in self.source.chunk_refs)


def _row_bytes(spec: ColumnSpec) -> int:
    """Estimate a row's size; text and ragged rows are of unknown size."""
    import numpy as np

    if not spec.is_numpy:
        return 1024
    return max(1, int(np.prod(spec.lengths)) * np.dtype(spec.dtype).itemsize)


class _Order:
    """The order of one epoch, from its own random stream."""

    def __init__(self, is_random: bool, seed: list[int]) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed) if is_random else None

    def of_chunks(self, count: int) -> Sequence[int] | np.ndarray[Any, Any]:
        return range(count) if self._random is None else self._random.permutation(count)

    def of_rows(self, count: int) -> Callable[[int, int], slice | Array]:
        """Return a function that gives which rows come from one place in the order up to another."""
        if self._random is None:
            return slice
        permutation = self._random.permutation(count)
        return lambda start, stop: permutation[start:stop]


class _Pacer:
    """Finds how many batches to hand over at once.

    Few while they last long, so that counters move and little is in flight; many while they go fast, so that
    Python is called seldom.
    """

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._count = max(1, at_most * _SUPERBATCH_FIRST_ROWS // _SUPERBATCH_ROWS)

    def ranges(self, batch_count: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) until all batches are covered, adapting to the time between the calls."""
        start = 0
        while start < batch_count:
            stop = min(batch_count, start + self._count)
            began = time.monotonic()
            yield start, stop
            self._adapt(time.monotonic() - began)
            start = stop

    def _adapt(self, took_s: float) -> None:
        shortest_s, longest_s = _SUPERBATCH_S
        if took_s < shortest_s:
            self._count = min(self._at_most, self._count * 2)
        elif took_s > longest_s:
            self._count = max(1, self._count // 2)
