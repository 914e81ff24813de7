"""A TensorBoard process: gone with whoever started it.

Runs on: executor, in the agent; and on the driver, for ``%%tfos_train --tensorboard``.

It shows its directory to whoever can reach its port, as TensorBoard does; so it listens on the node's own address only,
and only where the user has asked for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

_URL = re.compile(r"(http://\S+)")
_TAIL_CHARACTERS = 2000
# Its standard input is a pipe that nobody else holds: at its end whoever started it is gone, however that came about.
_BOOT = """
import os, shutil, sys, threading
def end_with_starter():
    os.read(0, 1)
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    os._exit(0)
threading.Thread(target=end_with_starter, daemon=True).start()
from tensorboard.main import run_main
sys.argv[0] = "tensorboard"
run_main()
"""


class TensorBoard:
    """A TensorBoard process.

    Parameters
    ----------
    directory : str
        What it shows; relative to the working directory, which an empty one means.
    host : str
        Address to listen on.
    scratch : str
        Where it may leave files; removed when whoever started it is gone.

    Attributes
    ----------
    output : int
        A descriptor to wait on; :meth:`read` when there is something.
    url : str or None
        Where it is, once it says so.
    """

    def __init__(self, directory: str, host: str, scratch: str) -> None:
        command = [sys.executable, "-c", _BOOT, "--logdir", directory or os.getcwd(), "--host", host]
        self._process = subprocess.Popen(
            [*command, "--port", "0", "--load_fast", "false"],  # the fast loader is one more process
            stdin=subprocess.PIPE,
            start_new_session=True,  # a notebook sends its signals, ■ among them, to the kernel's whole group
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "TMPDIR": scratch,
            },  # it needs no GPU
        )
        pipe = self._process.stdout
        self.output = pipe.fileno() if pipe is not None else -1
        self.url: str | None = None
        self._text = ""

    def read(self) -> bool:
        """Take what it has written; return whether more may come."""
        data = os.read(self.output, 1 << 16)
        self._text = (self._text + data.decode(errors="replace"))[-_TAIL_CHARACTERS:]
        found = _URL.search(self._text)
        if self.url is None and found and self._text[found.end() :]:
            self.url = found.group(1)
        return bool(data)

    def why_not(self) -> str:
        """Return its last line, for when it has ended without a URL."""
        lines = [line for line in self._text.splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def kill(self) -> None:
        """End it; what it has written may still be read."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it, and let go of its descriptors."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
