"""How a cell gets an output: with a publisher, and a display id by which it can be replaced.

Runs on: notebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.displaypub import DisplayPublisher


def publish(
    publisher: DisplayPublisher, bundle: Mapping[str, Any], *, display_id: str = "", update: bool = False
) -> None:
    """Do what ``IPython.display.display`` does with ``raw=True``, with this publisher.

    An empty bundle shows nothing.
    """
    transient = {"display_id": display_id} if display_id else {}
    publisher.publish(data=bundle, metadata={}, transient=transient, update=update)
