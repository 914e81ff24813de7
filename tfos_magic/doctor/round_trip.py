"""The round trip through a clean second interpreter.

Runs on: driver. What runs on the other side is `second`.

The interpreter is a process of its own, started anew and never a fork of the user's: it has what the user's Python has
installed, the same working directory and environment, and nothing of what the user has defined, imported or changed in
``sys.path``, as a Python worker of Spark. It stays for further questions, each of which is answered in a fork of it.
It ends with :meth:`SecondInterpreter.close`, with the driver however that ends, and after ten idle minutes.
"""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from json.decoder import JSONDecoder  # not json.loads: people replace that, and ask the doctor why it does not work
from json.encoder import JSONEncoder
from pathlib import Path
from typing import Any

from tfos_magic.doctor import second

DEADLINE_S = 10.0
"""For one question, from the fork on."""

_PRELOAD_S = 90.0
_START_S = 30.0
# Large, and known to do no harm when they are imported and nothing more; they stay loaded for the next question.
_PRELOADED = ("numpy", "pandas", "pyarrow", "scipy", "sklearn", "tensorflow", "keras", "torch")
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONHASHSEED": "0"}


class SecondInterpreter:
    """A clean Python, started when it is first asked, and kept.

    Parameters
    ----------
    environment : mapping of str to str, optional
        Added to this process's.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: frozenset[str] = frozenset()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def __enter__(self) -> SecondInterpreter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def will_import(self, modules: Sequence[str]) -> list[str]:
        """Return the large libraries among top-level `modules` that it has not loaded yet: they take seconds."""
        loaded = self._loaded if self.pid is not None else frozenset()
        return [name for name in _PRELOADED if name in modules and name not in loaded]

    def start(self) -> None:
        """Start it now, so that the first question need not wait for it."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the process; it is started again when it is asked again."""
        with self._lock:
            self._end()

    def ask(
        self, blob: bytes, question: Mapping[str, Any], *, modules: Sequence[str] = (), deadline_s: float = DEADLINE_S
    ) -> dict[str, Any]:
        """Return what `second.answer` says.

        Parameters
        ----------
        blob : bytes
        question : mapping
        modules : sequence of str
            Top-level modules that will be needed; large libraries among them are imported once.
        deadline_s : float

        Returns
        -------
        dict
            The facts; ``timed_out`` when there was no end in time, ``died_of`` a signal, or ``no_interpreter``.
        """
        preload = [name for name in _PRELOADED if name in modules]
        message = {**question, "deadline_s": deadline_s, "blob_bytes": len(blob), "preload": preload}
        head = JSONEncoder().encode(message).encode()
        with self._lock:
            try:
                process = self._running()
                until = time.monotonic() + deadline_s + _START_S + (_PRELOAD_S if preload else 0.0)
                _send(process, struct.pack("!I", len(head)) + head + blob, until)
                size = struct.unpack("!I", _receive(process, 4, until))[0]
                said = _receive(process, size, until)
                self._loaded |= {*preload}
                return dict(JSONDecoder().decode(said.decode()))
            except (OSError, EOFError) as error:
                self._end()
                return {"no_interpreter": f"{type(error).__name__}: {error}"}
            except BaseException:  # an interrupt: half a question is in the pipe
                self._end()
                raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        # Not as a script: its folder would come first in sys.path. Not as __main__: nothing may be found there.
        program = f"runpy.run_path({str(Path(second.__file__))!r}, run_name='the_second')"
        code = f"import runpy; {program}['serve']({os.getpid()})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_NO_GPU, **self._environment},
            bufsize=0,
            start_new_session=True,  # an interrupt of the notebook is none of its business
        )
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
        self._process = process
        self._finalizer = weakref.finalize(self, _end_process, process)
        return process

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None
        self._loaded = frozenset()


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def _send(process: subprocess.Popen[bytes], data: bytes, until: float) -> None:
    pipe = process.stdin
    view = memoryview(data)
    while view and pipe is not None:
        if not select.select([], [pipe], [], max(0.0, until - time.monotonic()))[1]:
            raise TimeoutError("the second interpreter takes no questions")
        view = view[os.write(pipe.fileno(), view) :]


def _receive(process: subprocess.Popen[bytes], count: int, until: float) -> bytes:
    pipe = process.stdout
    data = b""
    while len(data) < count and pipe is not None:
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError("the second interpreter does not answer")
        piece = os.read(pipe.fileno(), count - len(data))
        if not piece:
            raise EOFError("the second interpreter has ended")
        data += piece
    return data
