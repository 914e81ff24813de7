"""Directories that the chief writes to, wherever ``tf.io.gfile`` opens them.

Runs on: executors (chief).
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator

from tfos_magic.errors import UsageError

PARTIAL = ".partial"
"""The end of the name of what is not whole yet."""


@contextlib.contextmanager
def writable(directory: str, complaint: str, option: str) -> Iterator[None]:
    """Make a directory, and try whether it can be written to; what goes wrong in the block is its fault, too.

    Parameters
    ----------
    directory : str
    complaint : str
        What cannot be done, up to the directory's name.
    option : str
        The option of the magic's line that names it.

    Raises
    ------
    UsageError
    """
    import tensorflow as tf

    probe = posixpath.join(directory, f"writable{PARTIAL}")
    try:
        tf.io.gfile.makedirs(directory)
        with tf.io.gfile.GFile(probe, "wb") as file:
            file.write(b"")
        tf.io.gfile.remove(probe)
        yield
    except (tf.errors.OpError, OSError) as error:
        raise UsageError(
            f"{complaint} {directory}: {getattr(error, 'message', error)}",
            cause="The directory belongs to somebody else, or its file system is not there on the chief's host.",
            hint=f"{option} DIR, a directory that the chief can write to.",
        ) from error
