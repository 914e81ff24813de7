"""The board as text: for terminals, and the text/plain of a saved notebook.

Runs on: anywhere. Knows nothing of IPython.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from tfos_magic.status import BoardView, NodeView
from tfos_magic.widgets import words

_MIN_WIDTH = 40
_HOST_WIDTH = 18
_STATE_WIDTH = 32
_BAR_WIDTH = 20
_LEFT = frozenset({"role", "host", "state", "last 20 s"})
# The least important first: what is left out when the table is wider than the page.
_EXPENDABLE = ("fed", "last 20 s", "queued", "host", "memory", "CPU", "GPU", "role", "node/feed waits")


def render_text(view: BoardView, *, width: int = 120) -> str:
    """Return the board as aligned text.

    Parameters
    ----------
    view : BoardView
        What to draw.
    width : int
        Columns to stay within; not less than 40 are used.

    Returns
    -------
    str
        Lines without escapes or trailing blanks.
    """
    width = max(width, _MIN_WIDTH)
    title, facts = words.headline(view)
    heading = [" · ".join([title, *filter(None, [words.outcome(view)]), *facts])]
    remark = words.bottleneck(view)
    facts = [*filter(None, [words.restarts(view)]), *view.notices]
    lines = [*heading, *facts, *_progress(view), *([remark] if remark else [])]
    if view.outcome and view.message:
        lines += view.message.strip().split("\n")[:20]
    shown, rest = words.split(view)
    if shown:
        lines += ["", *_table(shown, view, width)]
    if rest:
        lines += [f"{words.MARKS[state]} {told}" for state, told in words.groups([node for _, node in rest])]
    curves = _curves(view)
    if curves:
        lines += ["", *curves]
    return "\n".join(shorten(line, width).rstrip() for line in lines)


def one_line(view: BoardView) -> str:
    """Return the run in one line."""
    title, facts = words.headline(view)
    last = [
        f"{curve.name} {words.number(value)}" for curve in words.curves(view) if (value := _last(curve)) is not None
    ]
    return " · ".join([title, *filter(None, [words.outcome(view)]), *facts, *last[:4]])


def _last(curve: words.Curve) -> float | None:
    return words.last_finite(curve.training)


def _progress(view: BoardView) -> list[str]:
    known = words.progress(view)
    if known is None:
        return []
    done = round(_BAR_WIDTH * known.share)
    return [f"{'█' * done}{'░' * (_BAR_WIDTH - done)} {words.progress_told(view, known)}"]


def _table(pairs: Sequence[tuple[int, NodeView]], view: BoardView, width: int) -> list[str]:
    rows = [_cells(index, node, view) for index, node in pairs]
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    while _table_width(names, rows) > width:
        drop = next((name for name in _EXPENDABLE if name in names), None)
        if drop is None:
            break
        names.remove(drop)
    sizes = {name: max(cells_wide(name), *(cells_wide(row[name]) for row in rows)) for name in names}
    lines = ["  " + "  ".join(_pad(name, sizes[name], name in _LEFT) for name in names)]
    for (_, node), row in zip(pairs, rows, strict=True):
        lines.append(
            words.MARKS[words.look(node, view)] + " " + "  ".join(_pad(row[n], sizes[n], n in _LEFT) for n in names)
        )
        heat = words.gpu_heat(node.machine.gpus) if "GPU" in names else ""
        said = "  │  ".join(part for part in (node.point, heat, words.metrics(node), words.last_words(node)) if part)
        if said:
            lines.append(" " * (4 + sizes["node"]) + said)
    return lines


def _cells(index: int, node: NodeView, view: BoardView) -> dict[str, str]:
    """Return what the columns say of a node; a column that says nothing of any node is left out."""
    machine = node.machine
    memory = node.memory_peak_bytes if view.outcome else machine.memory_bytes
    has_feed = words.has_feed(view)
    fed = {
        "fed": words.count(node.rows_received),
        "rows": words.count(node.rows_consumed),
        "rows/s": words.count(node.rows_per_s),
        "last 20 s": words.rate_line(node).strip(),
        "queued": "" if view.outcome else words.queued(node),
        "node/feed waits": f"{words.percent(node.wait_percent)} / {words.percent(node.feed_wait_percent):>4}",
    }
    return {
        "node": str(index),
        "role": shorten(node.name, 14),
        "host": shorten(node.host or words.NOTHING, _HOST_WIDTH),
        "state": shorten(words.state(node, view), _STATE_WIDTH),
        **(fed if has_feed else {}),
        "CPU": words.percent(machine.cpu_percent),
        "memory": words.size(memory),
        "GPU": words.gpu(machine.gpus, node.gpu_history) if words.has_gpus(view) else "",
    }


def _table_width(names: Sequence[str], rows: Sequence[dict[str, str]]) -> int:
    return sum(2 + max(cells_wide(name), *(cells_wide(row[name]) for row in rows)) for name in names)


def _curves(view: BoardView) -> list[str]:
    curves = words.curves(view)
    if not curves:
        return []
    name_width = max(cells_wide(curve.name) for curve in curves)
    spark_width = max(min(40, len(line)) for curve in curves for line in (curve.training, curve.validation))
    return ["  ".join([_pad(curve.name, name_width, True), *_both_lines(curve, spark_width)]) for curve in curves]


def _both_lines(curve: words.Curve, width: int) -> list[str]:
    low, high = words.curve_range(curve)
    parts = []
    for label, values in (("", curve.training), ("validation ", curve.validation)):
        if values:
            last = words.last_finite(values)
            spark = _pad(words.sparkline(values, low, high), width, True)
            parts.append(f"{label}{spark} {words.NOTHING if last is None else words.number(last):>8}")
    return parts


def cells_wide(text: str) -> int:
    """Return how many terminal columns `text` takes: East Asian wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def shorten(text: str, width: int) -> str:
    """Return `text` within `width` columns, the end replaced by an ellipsis where it does not fit."""
    if cells_wide(text) <= width:
        return text
    kept, used = [], 0
    for char in text:
        used += cells_wide(char)
        if used > width - 1:
            break
        kept.append(char)
    return "".join(kept) + "…"


def _pad(text: str, width: int, left: bool) -> str:
    blanks = " " * (width - cells_wide(text))
    return text + blanks if left else blanks + text
