"""What stands behind ``%%tfos_train --tensorboard DIR``: the run's numbers in DIR, and a TensorBoard that shows them.

Runs on: notebook.
"""

from __future__ import annotations

import html
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from tfos_magic.scalars import ScalarLog
    from tfos_magic.status import StatusBoard
    from tfos_magic.tensorboard_server import TensorBoards

_STYLE = "font-size:13px"


class TensorBoardMagic:
    """Keeps the notebook's TensorBoards.

    Parameters
    ----------
    shell : InteractiveShell
    services : Services
        ``scalars``, ``tensorboard_server`` and ``widgets`` of them.
    """

    def __init__(self, shell: InteractiveShell, services: Any) -> None:
        self._shell = shell
        self._services = services
        self._servers: TensorBoards | None = None

    def begin(self, wanted: str, run: str, board: StatusBoard) -> ScalarLog:
        """Return what writes the numbers of a run, and show where TensorBoard has them.

        Parameters
        ----------
        wanted : str
            The directory as typed.
        run : str
            The run's name.
        board : StatusBoard

        Raises
        ------
        UsageError
            Nothing can be written there.
        """
        directory = self._services.scalars.directory_for(wanted)
        if self._servers is None:
            self._servers = self._services.tensorboard_server.TensorBoards()
        link = _Link(self._shell, self._services.widgets, str(directory))
        link.open()
        self._servers.show(directory, link.tell)
        log: ScalarLog = self._services.scalars.ScalarLog(directory, run, board)
        return log

    def close(self) -> None:
        """End the TensorBoards; what they have shown stays in its directory."""
        if self._servers is not None:
            self._servers.close()
            self._servers = None


class _Link:
    """Where the URL is shown: a line of the cell's output, there at once; in a terminal a line when it is known."""

    def __init__(self, shell: InteractiveShell, widgets: Any, directory: str) -> None:
        self._publisher = shell.display_pub if hasattr(shell, "kernel") else None
        self._widgets = widgets
        self._directory = directory
        self._display_id = uuid.uuid4().hex

    def open(self) -> None:
        """Say that it begins."""
        if self._publisher is not None:
            self._publish(f"TensorBoard for {self._directory} is starting …", update=False)

    def tell(self, url: str, reason: str) -> None:
        """Show where it is, or why there is none; from any thread."""
        if url:
            text, link = f"TensorBoard: {url}", f'TensorBoard: <a href="{html.escape(url)}" target="_blank">{url}</a>'
        else:
            text, link = f"No TensorBoard: {reason} The numbers are in {self._directory}.", ""
        if self._publisher is None:
            print(text, flush=True)
        else:
            self._publish(text, link, update=True)

    def _publish(self, text: str, link: str = "", *, update: bool) -> None:
        shown = f'<div style="{_STYLE}">{link or html.escape(text)}</div>'
        bundle = {"text/html": shown, "text/plain": text}
        self._widgets.publish(self._publisher, bundle, display_id=self._display_id, update=update)
