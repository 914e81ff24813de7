"""Draws a board: as HTML, as text, and live while a cell runs.

Runs on: notebook.

    StatusBoard.view() ──► words (facts as words) ──┬─► html ──┐
                                                    └─► text ──┴─► live: one output, redrawn while the cell blocks
                                                                    background: … and after the cell has returned

Only `live` and `background` know IPython; nothing here knows Spark.
"""

from __future__ import annotations

from tfos_magic.widgets import diagnosis, namedtuple_table
from tfos_magic.widgets.background import BackgroundBoard, show_record
from tfos_magic.widgets.html import render_html
from tfos_magic.widgets.live import LiveBoard, static_bundle
from tfos_magic.widgets.outputs import publish
from tfos_magic.widgets.text import one_line, render_text

__all__ = [
    "BackgroundBoard",
    "LiveBoard",
    "diagnosis",
    "namedtuple_table",
    "one_line",
    "publish",
    "render_html",
    "render_text",
    "show_record",
    "static_bundle",
]
