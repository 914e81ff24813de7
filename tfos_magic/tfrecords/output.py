"""A directory that is written by many tasks and is whole at once, or as it was before.

Runs on: driver.

Each attempt of a task writes a file of its own below ``_temporary-…``. Spark tells the driver of one attempt a
partition, and these files get their names when all are there; what other attempts left goes with the directory.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Sequence

from tfos_magic.errors import DataError, UsageError
from tfos_magic.tfrecords import files

_MODES = ("error", "errorifexists", "overwrite", "append", "ignore")
_PART = re.compile(r"part-(\d+)")
_SUCCESS = "_SUCCESS"


class Output:
    """The directory, while it is written.

    Attributes
    ----------
    scratch : str
        Where tasks write.
    """

    def __init__(self, path: str, mode: str) -> None:
        self.scratch = f"{path}/_temporary-{uuid.uuid4().hex[:12]}"
        self._path = path
        self._mode = mode
        self._files = files.files_for(path)
        self._is_new = not self._files.exists(path)
        self._is_committed = False

    @classmethod
    @contextlib.contextmanager
    def at(cls, path: str, mode: str) -> Iterator[Output | None]:
        """Give an output to write to, or None if nothing is to be written; leave nothing temporary behind.

        Raises
        ------
        UsageError
            The mode is unknown, or does not go with what is there.
        """
        if mode not in _MODES:
            raise UsageError(f"mode={mode!r} is not known.", hint=f"Modes: {', '.join(_MODES)}.")
        output = cls(path, mode)
        if not output._is_new and mode == "ignore":
            yield None
            return
        output._refuse_what_is_there()
        output._files.make_dirs(output.scratch)
        try:
            yield output
        finally:
            # A directory that was made for an output which there is not would look like an empty one.
            output._files.remove(path if output._is_new and not output._is_committed else output.scratch)

    def _refuse_what_is_there(self) -> None:
        if self._is_new:
            return
        if self._mode in ("error", "errorifexists"):
            raise UsageError(
                f"{self._path} is there already.", hint="Take another directory, or mode='overwrite' or 'append'."
            )
        if not self._files.is_dir(self._path):
            raise UsageError(f"{self._path} is a file, not a directory.", hint="Take another path.")

    def commit(self, written: Sequence[str], suffix: str) -> None:
        """Give the written files their names, in this order, and write ``_SUCCESS``.

        Raises
        ------
        DataError
            The driver does not see what the executors have written.
        """
        if written and not self._files.exists(written[0]):
            raise DataError(
                f"The driver does not see {written[0]}, which an executor has written.",
                cause="The path is local, and not the same directory on all machines.",
                hint="Take a path that all machines share: a mounted directory, hdfs:, s3:.",
            )
        there = self._files.names(self._path)
        kept = there if self._mode == "append" else []
        for name in there:
            path = f"{self._path}/{name}"
            if path != self.scratch and (name not in kept or name == _SUCCESS):
                self._files.remove(path)
        first = max((int(match[1]) + 1 for name in kept if (match := _PART.match(name))), default=0)
        try:
            self._name(written, [f"{self._path}/part-{first + i:05d}{suffix}" for i in range(len(written))])
        except BaseException:
            if _SUCCESS in kept:
                self._mark_success()
            raise
        self._mark_success()
        self._is_committed = True

    def _name(self, written: Sequence[str], names: Sequence[str]) -> None:
        done: list[str] = []
        try:
            for source, target in zip(written, names, strict=True):
                self._files.rename(source, target)
                done.append(target)
        except BaseException:
            for target in done:
                self._files.remove(target)
            raise

    def _mark_success(self) -> None:
        self._files.open(f"{self._path}/{_SUCCESS}", "wb").close()
