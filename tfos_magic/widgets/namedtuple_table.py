"""The namedtuple patch's state in a session's processes, as HTML and as text.

Runs on: notebook. Knows nothing of IPython, and of Spark only the status that it is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfos_magic.widgets.html import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tfos_magic.namedtuple_session import SessionStatus

_RED, _GREEN = "#dc3d45", "#2a9d4b"
_ROOT = '<div class="tfos-namedtuple tex2jax_ignore mathjax_ignore" style="font-size:13px;overflow-x:auto">'
_TABLE = "table-layout:auto;border:none;border-collapse:collapse;margin:0;font-size:12px"
_ROW = "background:none;border-top:1px solid rgba(128,128,128,0.3)"
_CELL = "padding:2px 8px 2px 0;text-align:left;vertical-align:top"
_ROWS_SHOWN = 60


def bundle(status: SessionStatus) -> dict[str, str]:
    """Return a mime bundle of ``text/html`` and ``text/plain`` that needs no kernel."""
    return {"text/html": render_html(status), "text/plain": str(status)}


def render_html(status: SessionStatus) -> str:
    """Return the table as one ``<div>`` in which everything is escaped.

    Parameters
    ----------
    status : SessionStatus
        From :func:`tfos_magic.namedtuple_session.survey`.
    """
    mark, colour = ("✗", _RED) if status.is_patched else ("✓", _GREEN)
    rows = status.rows()
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in status.HEADINGS)
    body = "".join(_row(row) for row in rows[:_ROWS_SHOWN])
    notes = [f"… and {len(rows) - _ROWS_SHOWN} more rows"] if len(rows) > _ROWS_SHOWN else []
    return "".join(
        [
            _ROOT,
            f'<div><span style="color:{colour}">{mark}</span> <b>{escape(status.summary)}</b></div>',
            f'<table style="{_TABLE}"><thead><tr style="background:none">{head}</tr></thead>',
            f"<tbody>{body}</tbody></table>",
            *(f'<div style="opacity:0.7">{escape(note)}</div>' for note in (*notes, *status.notes)),
            "</div>",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return f'<tr style="{_ROW}">' + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in cells) + "</tr>"
