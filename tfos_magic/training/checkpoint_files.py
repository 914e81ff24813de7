"""Checkpoints as files: written whole or not at all, read only when they are whole and ours.

Runs on: executors.

    DIR/fit-1/checkpoint-0000000420.npz     the first call of fit, after 420 steps
                ▲ renamed when complete
    DIR/fit-1/…420.npz.partial

A file is a plain ``.npz`` that ``numpy.load`` opens: the arrays, and ``meta`` with JSON that says what they are. A zip
keeps a checksum of each member and its directory at the end, so that one that was cut off, or damaged, is told from
a good one. Nothing in it is pickled. Paths are whatever ``tf.io.gfile`` opens.
"""

from __future__ import annotations

import contextlib
import io
import json
import posixpath
import re
import zipfile
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import tensorflow as tf

from tfos_magic.errors import TfosError
from tfos_magic.training.directories import PARTIAL, writable

Array = np.ndarray[Any, np.dtype[Any]]

_FORMAT = "tfos_magic checkpoint"
_VERSION = 1
_META = "meta"
_NAME = re.compile(r"checkpoint-(\d{10})\.npz")


class CheckpointError(TfosError):
    """A file is no checkpoint that can be used here; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds.

    Attributes
    ----------
    meta : dict
        Plain values, as JSON has them.
    arrays : dict of str to array
    """

    meta: dict[str, Any]
    arrays: dict[str, Array]

    def encode(self, out: Any) -> None:
        """Write everything to a file-like object, which need not be seekable."""
        # NumPy's format does not know bfloat16 and its kin: they go as bytes, and this says what they are.
        foreign = {name: (str(a.dtype), a.shape) for name, a in self.arrays.items() if a.dtype.kind == "V"}
        head = {"format": _FORMAT, "version": _VERSION, "foreign": foreign, "meta": self.meta}
        with zipfile.ZipFile(cast("IO[bytes]", _Sink(out)), "w") as archive:
            _add(archive, _META, np.frombuffer(json.dumps(head).encode(), np.uint8))
            for name, array in self.arrays.items():
                _add(archive, name, np.frombuffer(array.tobytes(), np.uint8) if name in foreign else array)

    @classmethod
    def decode(cls, data: bytes) -> Checkpoint:
        """Return what :meth:`encode` wrote.

        Raises
        ------
        CheckpointError
            It is truncated, damaged, of another kind or of another version.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                members = {name: archive[name] for name in archive.files}  # each is checked against its checksum
            head = json.loads(members.pop(_META).tobytes()) if _META in members else None
        except Exception as error:  # whatever NumPy and zipfile make of bytes that were flipped
            raise CheckpointError("it is cut off or damaged, or no checkpoint at all") from error
        if not isinstance(head, dict) or head.get("format") != _FORMAT:
            raise CheckpointError("it is a NumPy file, but no checkpoint of tfos_magic")
        if head.get("version") != _VERSION:
            raise CheckpointError(f"its format is version {head.get('version')}, this tfos_magic reads {_VERSION}")
        for name, (dtype, shape) in head["foreign"].items():
            members[name] = members[name].view(tf.as_dtype(dtype).as_numpy_dtype).reshape(shape)
        return cls(head["meta"], members)


class Directory:
    """The checkpoints of one call of ``fit``.

    Parameters
    ----------
    path : str
        The run's ``--checkpoint`` directory.
    fit_number : int
        Which call of ``fit`` in the process this is, from 1.
    """

    def __init__(self, path: str, fit_number: int) -> None:
        self.path = posixpath.join(path, f"fit-{fit_number}")

    def prepare(self) -> None:
        """Make the directory, and remove what a process that was killed has left half-written.

        Raises
        ------
        UsageError
            It cannot be written to.
        """
        with writable(self.path, "Checkpoints cannot be written to", "--checkpoint"):
            for name in tf.io.gfile.listdir(self.path):
                if name.endswith(PARTIAL):
                    tf.io.gfile.remove(posixpath.join(self.path, name))

    def steps(self) -> list[int]:
        """Return the steps after which there are files, oldest first; good or not."""
        if not tf.io.gfile.isdir(self.path):
            return []
        found = (_NAME.fullmatch(name.rstrip("/")) for name in tf.io.gfile.listdir(self.path))
        return sorted(int(match[1]) for match in found if match)

    def file(self, step: int) -> str:
        """Return where the checkpoint after this step is."""
        return posixpath.join(self.path, f"checkpoint-{step:010d}.npz")

    def read(self, step: int) -> bytes:
        """Return a file's content; CheckpointError where it cannot be had."""
        try:
            with tf.io.gfile.GFile(self.file(step), "rb") as file:
                data: bytes = file.read()
                return data
        except (tf.errors.OpError, OSError) as error:
            raise CheckpointError(f"it cannot be read ({getattr(error, 'message', error)})") from error

    def write(self, step: int, checkpoint: Checkpoint, keep: int) -> int:
        """Write a checkpoint, whole or not at all, then remove all but the newest `keep`.

        Returns
        -------
        int
            Its size in bytes.
        """
        partial = f"{self.file(step)}{PARTIAL}"
        try:
            with tf.io.gfile.GFile(partial, "wb") as file:
                checkpoint.encode(file)
        except BaseException:
            with contextlib.suppress(tf.errors.OpError, OSError):
                tf.io.gfile.remove(partial)  # on a full disk it would keep the next one from being written, too
            raise
        size_bytes = int(tf.io.gfile.stat(partial).length)
        tf.io.gfile.rename(partial, self.file(step), overwrite=True)
        for old in [known for known in self.steps() if known < step][: -(keep - 1) or None]:
            tf.io.gfile.remove(self.file(old))
        return size_bytes


class _Sink:
    """Lets zipfile only write: remote files can do nothing else, and zipfile then does without going back."""

    def __init__(self, out: Any) -> None:
        self._out = out

    def write(self, data: Any) -> int:
        self._out.write(bytes(data))
        return len(data)

    def flush(self) -> None:
        self._out.flush()


def array_of(values: Any) -> Array:
    """Return a copy, which stays as it is, of a variable's or a tensor's numbers."""
    return np.array(values.numpy() if hasattr(values, "numpy") else values, copy=True, order="C")


def _add(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
