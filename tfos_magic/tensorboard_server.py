"""TensorBoards beside the driver: started when a run first asks for one, kept until the notebook ends.

Runs on: driver. Knows nothing of IPython: whoever asks is told the URL, in whatever way they like.

A TensorBoard shows its directory to whoever can reach its port, and has no login: so it listens on 127.0.0.1 only, and
is there only where somebody typed ``--tensorboard``. One that somebody else has started for the directory is used.
"""

from __future__ import annotations

import contextvars
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from tfos_magic.node.tensorboard import TensorBoard

Tell = Callable[[str, str], None]
"""Called with a URL, or with an empty string and the reason why there is none."""


class TensorBoards:
    """The TensorBoards of one notebook, one for each directory."""

    def __init__(self) -> None:
        self._servers: dict[Path, _Server] = {}

    def show(self, directory: Path, tell: Tell) -> None:
        """Have one show `directory`; returns at once, `tell` is called when the URL is known, maybe by another thread.

        Parameters
        ----------
        directory : Path
        tell : callable(str, str)
        """
        server = self._servers.get(directory)
        if server is None or server.has_ended:
            other = url_of_another(directory)
            if other:
                tell(other, "")
                return
            server = self._servers[directory] = _Server(directory)
        server.tell_url(tell)

    def close(self) -> None:
        """End all of them."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()


def url_of_another(directory: Path) -> str:
    """Return the URL of a TensorBoard that shows `directory` already, empty if there is none that says so."""
    if not Path(tempfile.gettempdir(), ".tensorboard-info").is_dir():  # asking would make it
        return ""
    try:
        from tensorboard import manager
    except ImportError:
        return ""
    infos = manager.get_all()  # of this user, on this machine
    return next((f"http://localhost:{info.port}{info.path_prefix}/" for info in infos if _shows(info, directory)), "")


def _shows(info: object, directory: Path) -> bool:
    logdir = getattr(info, "logdir", "")
    pid = getattr(info, "pid", 0)
    return bool(logdir) and Path(logdir).absolute() == directory and Path(f"/proc/{pid}").exists()


class _Server:
    """A process, and the thread that reads what it says."""

    def __init__(self, directory: Path) -> None:
        self._scratch = tempfile.mkdtemp(prefix="tfos_magic-tensorboard-")
        try:
            self._board = TensorBoard(str(directory), "127.0.0.1", self._scratch)
        except BaseException:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        self._lock = threading.Lock()
        self._waiting: list[tuple[contextvars.Context, Tell]] = []
        self._answer: tuple[str, str] | None = None
        self.has_ended = False
        self._thread = threading.Thread(target=self._read, name="tfos_magic tensorboard", daemon=True)
        self._thread.start()

    def tell_url(self, tell: Tell) -> None:
        """Call `tell` as soon as the URL is known, or that there will be none."""
        with self._lock:
            if self._answer is None:
                self._waiting.append((contextvars.copy_context(), tell))  # IPython finds the cell in it
                return
            answer = self._answer
        tell(*answer)

    def _read(self) -> None:
        while self._board.read():
            if self._board.url is not None:
                self._answer_all(self._board.url, "")
        self.has_ended = True
        self._answer_all("", self._board.why_not())

    def _answer_all(self, url: str, reason: str) -> None:
        with self._lock:
            if self._answer is not None and url:
                return
            self._answer = url, reason
            waiting, self._waiting = self._waiting, []
        for context, tell in waiting:
            context.run(tell, url, reason)

    def close(self) -> None:
        """End the process; its reader ends with it."""
        self._board.kill()
        self._thread.join()
        self._board.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
