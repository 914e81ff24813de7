"""Files by path: local ones as Python opens them, all others as ``tf.io.gfile`` does.

Runs on: driver and executors. TensorFlow is imported for paths with a scheme other than ``file:`` only.
"""

from __future__ import annotations

import getpass
import glob
import os
import posixpath
import shutil
from collections.abc import Iterator
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit

_PATTERN = frozenset("*?[")


class Files(Protocol):
    """What is done with files, whatever the file system."""

    def open(self, path: str, mode: str) -> IO[bytes]:
        """Open for ``rb`` or ``wb``."""

    def exists(self, path: str) -> bool:
        """Tell whether there is a file or directory."""

    def is_dir(self, path: str) -> bool:
        """Tell whether it is a directory."""

    def stamp(self, path: str) -> tuple[int, int]:
        """Return a file's time of change and its size."""

    def names(self, directory: str) -> list[str]:
        """Return the names in a directory."""

    def matching(self, pattern: str) -> list[str]:
        """Return the paths that a pattern with ``*``, ``?``, ``[…]`` matches."""

    def make_dirs(self, path: str) -> None:
        """Make a directory and those above it; one that is there is fine."""

    def rename(self, source: str, target: str) -> None:
        """Give a file another name that nothing has yet."""

    def remove(self, path: str) -> None:
        """Remove a file, or a directory with all that is in it."""


class LocalFiles:
    """The machine's own file system, and what is mounted there."""

    def open(self, path: str, mode: str) -> IO[bytes]:  # noqa: D102 - as in Files, here and below
        return open(path, mode)

    def exists(self, path: str) -> bool:  # noqa: D102
        return os.path.exists(path)

    def is_dir(self, path: str) -> bool:  # noqa: D102
        return os.path.isdir(path)

    def stamp(self, path: str) -> tuple[int, int]:  # noqa: D102
        found = os.stat(path)
        return found.st_mtime_ns, found.st_size

    def names(self, directory: str) -> list[str]:  # noqa: D102
        return os.listdir(directory)

    def matching(self, pattern: str) -> list[str]:  # noqa: D102
        return glob.glob(pattern)

    def make_dirs(self, path: str) -> None:  # noqa: D102
        os.makedirs(path, exist_ok=True)

    def rename(self, source: str, target: str) -> None:  # noqa: D102
        if os.path.lexists(target):
            raise FileExistsError(target)
        os.rename(source, target)

    def remove(self, path: str) -> None:  # noqa: D102
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


class RemoteFiles:
    """What TensorFlow can open: ``hdfs:``, ``s3:``, ``gs:``, … by the plugins that it has."""

    def __init__(self) -> None:
        import tensorflow as tf

        self._gfile: Any = tf.io.gfile

    def open(self, path: str, mode: str) -> IO[bytes]:  # noqa: D102
        file: IO[bytes] = self._gfile.GFile(path, mode)
        return file

    def exists(self, path: str) -> bool:  # noqa: D102
        return bool(self._gfile.exists(path))

    def is_dir(self, path: str) -> bool:  # noqa: D102
        return bool(self._gfile.isdir(path))

    def stamp(self, path: str) -> tuple[int, int]:  # noqa: D102
        found = self._gfile.stat(path)
        return found.mtime_nsec, found.length

    def names(self, directory: str) -> list[str]:  # noqa: D102
        return [name.rstrip("/") for name in self._gfile.listdir(directory)]  # object stores mark directories with it

    def matching(self, pattern: str) -> list[str]:  # noqa: D102
        return list(self._gfile.glob(pattern))

    def make_dirs(self, path: str) -> None:  # noqa: D102
        self._gfile.makedirs(path)

    def rename(self, source: str, target: str) -> None:  # noqa: D102
        self._gfile.rename(source, target, overwrite=False)

    def remove(self, path: str) -> None:  # noqa: D102
        if self._gfile.isdir(path):
            self._gfile.rmtree(path)
        else:
            self._gfile.remove(path)


def files_for(path: str) -> Files:
    """Return how to reach an absolute path."""
    return LocalFiles() if path.startswith("/") else RemoteFiles()


def absolute(path: str, default_file_system: str) -> str:
    """Return a path that means the same on every machine: a local one that begins with ``/``, or a URI.

    Parameters
    ----------
    path : str
        A URI, or a path without a scheme, which is in the default file system as Hadoop has it.
    default_file_system : str
        Hadoop's ``fs.defaultFS``.
    """
    path = os.fspath(path)
    scheme = urlsplit(path).scheme
    if scheme == "file":
        return posixpath.normpath(unquote(urlsplit(path).path))
    if scheme and "://" in path:
        return path.rstrip("/")
    if default_file_system.startswith("file:"):
        return os.path.abspath(path)
    under = path if path.startswith("/") else f"/user/{getpass.getuser()}/{path}"
    return default_file_system.rstrip("/") + under.rstrip("/")


def visible_files(files: Files, path: str) -> list[str]:
    """Return the data files that a path means, sorted: a file, a directory's, or those that a pattern matches.

    Names that begin with ``_`` or ``.`` are left out, as Spark and Hadoop do.
    """
    places = [path] if files.exists(path) else files.matching(path) if _PATTERN & set(path) else []
    found = [file for place in sorted(places) for file in _files_in(files, place, is_named=place == path)]
    return list(dict.fromkeys(found))


def _files_in(files: Files, place: str, *, is_named: bool) -> Iterator[str]:
    if not is_named and _is_hidden(place):
        return
    if not files.is_dir(place):
        yield place
        return
    for name in sorted(files.names(place)):
        path = f"{place.rstrip('/')}/{name}"
        if not _is_hidden(path) and not files.is_dir(path):
            yield path


def _is_hidden(path: str) -> bool:
    return posixpath.basename(path.rstrip("/")).startswith(("_", "."))
