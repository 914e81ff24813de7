"""TensorFlowOnSpark's ``DataFeed`` over whatever gives rows.

Runs on: executors (child).

Names and meaning are those of TensorFlowOnSpark's documentation (``TFNode.DataFeed``), with three things better:
rows come by the chunk and not one remote call each; :meth:`DataFeed.should_stop` knows the end before an empty batch
has been handed out; ``input_mapping`` gives NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import UsageError
from tfos_magic.feed.readers import QueueReader
from tfos_magic.feed.rows import joined_arrays
from tfos_magic.marker import EndPartition

if TYPE_CHECKING:
    from tfos_magic.feed.columns import Array
    from tfos_magic.feed.readers import Reader
    from tfos_magic.feed.rows import Rows


class DataFeed:
    """Hands out the rows that Spark feeds to this node.

    Parameters
    ----------
    mgr : Manager, TFManager or the like
        ``ctx.mgr``, or any object with ``get_queue``, ``get`` and ``set``.
    train_mode : bool
        True when only reading; False when results are given back as well: batches then end where partitions end.
    qname_in, qname_out : str
        Feed or queue to read (``input`` is what ``cluster.train`` or ``--data`` gives) and queue for the results.
    input_mapping : mapping of str to str, optional
        Column name → tensor name. With it, batches are dicts of arrays.

    Attributes
    ----------
    done_feeding : bool
        Whether :meth:`next_batch` has met the end; unlike :meth:`should_stop` it never waits.
    """

    def __init__(
        self,
        mgr: Any,
        train_mode: bool = True,
        qname_in: str = "input",
        qname_out: str = "output",
        input_mapping: Mapping[str, str] | None = None,
    ) -> None:
        self.mgr = mgr
        self.train_mode = train_mode
        self.qname_in = qname_in
        self.qname_out = qname_out
        self.input_mapping = input_mapping
        self.done_feeding = False
        self._reader = _reader_of(mgr, qname_in, qname_out)
        self._rest: Rows | None = None

    def next_batch(self, batch_size: int) -> list[Any] | dict[str, Array]:
        """Return the next rows; waits for Spark where need be.

        Parameters
        ----------
        batch_size : int

        Returns
        -------
        list
            Of rows: from a DataFrame tuples in column order, or plain values if there is one column; from an RDD the
            objects that are in it.
        dict of str to numpy.ndarray
            With `input_mapping`: tensor name → ``(n, …)``; text is an object array of str.

        Both are shorter than `batch_size` only where the rows end, and with ``train_mode=False`` where a partition
        ends. A batch is empty only when no row is left.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be at least 1.")
        parts = list(self._take(batch_size))
        if self.input_mapping is not None:
            return joined_arrays(parts, self.input_mapping)
        return [row for part in parts for row in part.items()]

    def should_stop(self) -> bool:
        """Return whether no row is left; waits until Spark has delivered one or has ended."""
        return not self._rest and not self._reader.has_rows()

    def batch_results(self, results: Sequence[Any]) -> None:
        """Give results of inference back to Spark, one per row of the last batch."""
        self._reader.put_results(results)

    def terminate(self) -> None:
        """Want no more rows: :meth:`should_stop` is true from now on, and Spark stops feeding."""
        self._rest = None
        self.done_feeding = True
        self._reader.terminate()

    def _take(self, row_count: int) -> Iterator[Rows]:
        has_rows = False
        while row_count:
            if not self._rest:
                item = self._reader.next_item()
                if item is None:
                    self.done_feeding = True
                    return
                if isinstance(item, EndPartition):
                    if has_rows and not self.train_mode:
                        return
                    continue
                self._rest = item
            part, self._rest = self._rest.cut(row_count)
            row_count -= len(part)
            has_rows = True
            self._reader.count_consumed(len(part))  # now: who feeds waits for these, not for the batch to be full
            yield part


def _reader_of(mgr: Any, qname_in: str, qname_out: str) -> Reader:
    make = getattr(mgr, "reader", None)
    if make is not None:
        reader: Reader = make(qname_in)
        return reader
    queue_in = mgr.get_queue(qname_in)
    if queue_in is None:
        raise UsageError(
            f"The manager has no queue '{qname_in}'.",
            hint=f"Start it with one: TFManager.start(authkey, ['{qname_in}', '{qname_out}']).",
        )
    return QueueReader(queue_in, mgr.get_queue(qname_out), mgr)
