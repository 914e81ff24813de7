"""The board as HTML that needs nothing: no kernel, no JavaScript, no style sheet.

Runs on: anywhere. Knows nothing of IPython.

JupyterLab shows a reopened notebook through a sanitizer that drops ``<style>``, ``<svg>``, ``role``, ``aria-*`` and of
inline styles those with ``var(…)``: so the colours are plain ones that can be told apart on white and on black, text
inherits its colour, and whatever a colour says a word or a mark says too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape as _escape
from itertools import accumulate, takewhile

from tfos_magic.status import LEFT_OUT, BoardView, NodeState, NodeView
from tfos_magic.widgets import words

_GREEN, _AMBER, _RED, _BLUE, _GREY = "#2a9d4b", "#c77700", "#dc3d45", "#2f80d0", "#888888"
_COLOURS = {
    NodeState.PLANNED: _GREY,
    NodeState.STARTING: _BLUE,
    NodeState.IMPORTING: _BLUE,
    NodeState.MEETING: _BLUE,
    NodeState.RUNNING: _GREEN,
    NodeState.WAITING: _AMBER,
    NodeState.FINISHED: _GREEN,
    NodeState.DONE: _GREEN,
    NodeState.FAILED: _RED,
    NodeState.STOPPED: _GREY,
    NodeState.LOST: _RED,
}
_OUTCOMES = {"done": ("✓", _GREEN), "failed": ("✗", _RED), "stopped": ("■", _GREY), words.READY: ("●", _GREEN)}

# MathJax would take "$5 and $6" in a log line for a formula; the classes are its versions' words for "leave me alone".
_ROOT = '<div class="tfos-board tex2jax_ignore mathjax_ignore" style="font-size:13px;line-height:1.45;overflow-x:auto">'
# JupyterLab fixes the layout of tables and stripes their rows: taken back here, in few bytes, for live frames are many.
_TABLE = (
    "table-layout:auto;border:none;border-collapse:collapse;margin:0;font-size:12px;font-variant-numeric:tabular-nums"
)
_ROW = '<tr style="background:none;border-top:1px solid rgba(128,128,128,0.3)">'
_HEAD_ROW = '<tr style="background:none">'
_CELL = "padding:2px 5px;text-align:"
_LEFT = f"{_CELL}left;white-space:nowrap"
_CLIP = f"{_LEFT};max-width:0;overflow:hidden;text-overflow:ellipsis;opacity:0.7"
_MUTED = "opacity:0.7"
_PRE = "margin:2px 0 6px;padding:4px 8px;white-space:pre-wrap;font-size:12px;line-height:1.35;background:none;"
# Laid out from the end, so that it opens at its last lines.
_SCROLL = (
    "display:flex;flex-direction:column-reverse;max-height:320px;overflow:auto;"
    "border-left:3px solid rgba(128,128,128,0.3)"
)
_NBSP = "\N{NO-BREAK SPACE}"

_COLUMNS = (
    ("node", "right"),
    ("state", "left"),
    ("role", "left"),
    ("host", "left"),
    ("rows fed", "right"),
    ("rows used", "right"),
    ("rows/s", "right"),
    ("waits", "right"),
    ("CPU", "right"),
    ("memory", "right"),
    ("GPU", "right"),
    ("last metrics", "left"),
    ("last output", "left"),
)
_HINTS = {
    "rows fed": "rows that Spark has delivered to the node",
    "rows used": "rows that the function has taken, all epochs counted",
    "waits": "share of the running time that the function waited for data",
    "CPU": "100 % is one core kept busy",
}
_METRICS_SHOWN = 2
_MESSAGE_LINES = 20
_LOG_LINES_PER_NODE = 200
_LOG_CHARS_PER_NODE = 20_000
_LOG_CHARS = 400_000
_LOGS_LISTED = 8


def render_html(view: BoardView, logs: Mapping[str, Sequence[str]] | None = None, *, live: bool = False) -> str:
    """Return the board as HTML.

    Parameters
    ----------
    view : BoardView
        What to draw.
    logs : mapping of str to sequence of str, optional
        Node name → its output lines; the last 200 of each are folded away under the table, a failing node's are open.
    live : bool
        True when it is redrawn again and again: nothing to unfold then, it would fold up under the reader's hand.

    Returns
    -------
    str
        One ``<div>``; everything that came from users or nodes is escaped.
    """
    shown, rest = words.split(view)
    parts = [_ROOT, _board(shown, view, caption=_caption(view)) if shown else f"<div>{_caption(view)}</div>"]
    if rest:
        parts.append(_rest(rest, view, live))
    if view.outcome and view.message:
        parts.append(_message(view))
    parts.append(_curves(view))
    if logs:
        parts.append(_logs(view, logs))
    parts.append("</div>")
    return "".join(parts)


def one_line_html(text: str) -> str:
    """Return a line of text as quiet HTML."""
    return f'{_ROOT}<span style="{_MUTED}">{escape(text)}</span></div>'


def escape(text: object) -> str:
    """Return `text` with all that HTML or its transport could stumble over made harmless."""
    return _escape(str(text).encode("utf-8", "replace").decode())


def _caption(view: BoardView) -> str:
    title, facts = words.headline(view)
    mark, colour = _OUTCOMES.get(view.outcome, ("●", _BLUE))
    told = [f"<b>{escape(words.outcome(view))}</b>"] if view.outcome else []
    told += [escape(fact) for fact in facts]
    line = f'<span style="color:{colour}">{mark}</span> <b>{escape(title)}</b> &nbsp; {" · ".join(told)}'
    remark = words.bottleneck(view)
    return f'{line} &nbsp; <span style="{_MUTED}">{escape(remark)}</span>' if remark else line


# --- the table --------------------------------------------------------------------------------------------


def _board(pairs: Sequence[tuple[int, NodeView]], view: BoardView, *, caption: str = "") -> str:
    heads = "".join(_column_head(name, side, view) for name, side in _COLUMNS)
    style = "caption-side:top;text-align:left;padding:2px 5px 5px;font-size:13px;font-style:normal;color:inherit"
    top = f'<caption style="{style}">{caption}</caption>' if caption else ""
    rows = "".join(_row(index, node, view) for index, node in pairs)
    return (
        f'<table style="{_TABLE};width:100%">{top}<thead style="border:none">{_HEAD_ROW}{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _column_head(name: str, side: str, view: BoardView) -> str:
    is_last = name == _COLUMNS[-1][0]
    shown = "peak mem." if name == "memory" and view.outcome else name
    # The last column takes what is left; in a clipped cell a width must come from inside.
    content = f'<div style="min-width:110px">{shown}</div>' if is_last else shown
    title = f' title="{_HINTS[name]}"' if name in _HINTS else ""
    style = f"{_CELL}{side};white-space:nowrap;font-weight:normal;{_MUTED}{';width:45%' if is_last else ''}"
    return f'<th scope="col" style="{style}"{title}>{content}</th>'


def _row(index: int, node: NodeView, view: BoardView) -> str:
    memory = node.memory_peak_bytes if view.outcome else node.machine.memory_bytes
    cells = (
        str(index),
        _state(node, view),
        escape(node.name),
        _host(node.host),
        words.count(node.rows_received),
        words.count(node.rows_consumed),
        words.count(node.rows_per_s),
        words.percent(node.wait_percent),
        words.percent(node.machine.cpu_percent),
        words.size(memory),
        _gpu(node),
        _metrics(node),
    )
    return f"{_ROW}{''.join(map(_cell, _COLUMNS, cells))}{_last_words(node)}</tr>"


def _cell(column: tuple[str, str], content: str) -> str:
    if column[1] == "left":
        return f'<td style="{_LEFT}">{content}</td>'
    # A number breaks nowhere but at its blanks: cheaper than forbidding it by style.
    return f'<td style="{_CELL}right">{content if "<" in content else content.replace(" ", _NBSP)}</td>'


def _state(node: NodeView, view: BoardView) -> str:
    look = words.look(node, view)
    mark = f'<span style="color:{_COLOURS[look]}">{words.MARKS[look]}</span>'
    return f"{mark} {escape(words.state(node, view))}"


def _host(host: str) -> str:
    if len(host) <= 24:
        return escape(host or words.NOTHING)
    return f'<span title="{escape(host)}">{escape(host[:23])}…</span>'


def _gpu(node: NodeView) -> str:
    samples = node.machine.gpus
    told = escape(words.gpu(samples)).replace(" ", _NBSP)
    return f'<span title="{escape(words.gpu_detail(samples))}">{told}</span>' if samples else told


def _metrics(node: NodeView) -> str:
    known = list(node.metrics.items())
    told = [f"{escape(name)} {escape(words.number(value))}" for name, value in known[:_METRICS_SHOWN]]
    if node.step is not None and node.epoch is None:
        told.insert(0, f"step {node.step:,}")
    if len(known) <= _METRICS_SHOWN:
        return " &nbsp;".join(told) or words.NOTHING
    return f'<span title="{escape(words.metrics(node))}">{" &nbsp;".join(told)} …</span>'


def _last_words(node: NodeView) -> str:
    line = words.last_words(node)
    full = f' title="{escape(line)}"' if len(line) > 20 else ""
    return f'<td style="{_CLIP}"{full}>{escape(line[:200])}</td>'


def _rest(rest: Sequence[tuple[int, NodeView]], view: BoardView, live: bool) -> str:
    told = escape(words.summary([node for _, node in rest]))
    if live:
        return f'<div style="padding:4px 5px;{_MUTED}">… and {told}</div>'
    return _fold(told, _board(rest, view))


def _fold(summary: str, content: str, *, is_open: bool = False) -> str:
    style = "padding:1px 5px;cursor:pointer"
    return f'<details{" open" if is_open else ""}><summary style="{style}">{summary}</summary>{content}</details>'


# --- below the table --------------------------------------------------------------------------------------


def _message(view: BoardView) -> str:
    lines = view.message.strip().split("\n")
    more = [f"… {len(lines) - _MESSAGE_LINES} more lines"] if len(lines) > _MESSAGE_LINES else []
    colour = _OUTCOMES.get(view.outcome, ("", _GREY))[1]
    return (
        f'<pre style="{_PRE}margin-top:6px;border-left:3px solid {colour}">'
        f"{escape(chr(10).join(lines[:_MESSAGE_LINES] + more))}</pre>"
    )


def _curves(view: BoardView) -> str:
    curves = words.curves(view)
    if not curves:
        return ""
    has_validation = any(curve.validation for curve in curves)
    names = ["per epoch", "training", *(["validation"] if has_validation else [])]
    heads = "".join(f'<th scope="col" style="{_LEFT};font-weight:normal;{_MUTED}">{name}</th>' for name in names)
    rows = "".join(_curve(curve, has_validation) for curve in curves)
    return (
        f'<table style="{_TABLE};margin-top:8px"><thead style="border:none">{_HEAD_ROW}{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _curve(curve: words.Curve, has_validation: bool) -> str:
    low, high = words.curve_range(curve)
    lines = [curve.training, *([curve.validation] if has_validation else [])]
    cells = "".join(f'<td style="{_LEFT}">{_line(line, low, high)}</td>' for line in lines)
    return f'{_ROW}<th scope="row" style="{_LEFT};font-weight:normal">{escape(curve.name)}</th>{cells}</tr>'


def _line(values: Sequence[float], low: float, high: float) -> str:
    last = words.last_finite(values)
    if last is None:
        return words.NOTHING
    if len(values) == 1:
        return words.number(last)
    first = words.last_finite(values[::-1])
    start = f'<span style="{_MUTED}">{words.number(first)} →</span>' if first is not None else ""
    spark = words.sparkline(values, low, high).replace(" ", _NBSP)
    return f'<span style="font-family:monospace;color:{_BLUE}">{spark}</span> &nbsp;{start} {words.number(last)}'


def _logs(view: BoardView, logs: Mapping[str, Sequence[str]]) -> str:
    written = {name: lines for name, lines in logs.items() if lines}
    opened = _first_failed(view)
    budget = min(_LOG_CHARS_PER_NODE, _LOG_CHARS // max(1, len(written)))
    first = "".join(_log(name, lines, budget, is_open=True) for name, lines in written.items() if name == opened)
    others = [_log(name, lines, budget) for name, lines in written.items() if name != opened]
    rest = "".join(others)
    if len(others) > _LOGS_LISTED:
        which = "other nodes" if first else "nodes"
        rest = _fold(f"Output of {len(others)} {which}", f'<div style="padding-left:16px">{rest}</div>')
    return f'<div style="margin-top:6px">{first}{rest}</div>' if written else ""


def _log(name: str, lines: Sequence[str], budget: int, *, is_open: bool = False) -> str:
    noted = LEFT_OUT.fullmatch(lines[0])  # the board's own note of lines that it no longer has
    lines = lines[1:] if noted else lines
    total = len(lines) + (int(noted[1].replace(",", "")) if noted else 0)
    tail = _tail(lines, budget)
    note = f"… {total - len(tail):,} earlier lines not shown\n" if total > len(tail) else ""
    what = "1 line" if total == 1 else f"{total:,} lines"
    return _fold(
        f'Output of {escape(name)} <span style="{_MUTED}">{what}</span>',
        f'<div style="{_SCROLL}"><pre style="{_PRE}flex-shrink:0">{note}{escape(chr(10).join(tail))}</pre></div>',
        is_open=is_open,
    )


def _first_failed(view: BoardView) -> str:
    failed = [node for node in view.nodes if node.state in (NodeState.FAILED, NodeState.LOST)]
    return min(failed, key=lambda node: node.ended_at or 0.0).name if failed else ""


def _tail(lines: Sequence[str], budget: int) -> list[str]:
    """Return the last lines, no more than are kept per node and than fit into `budget` characters."""
    newest = list(reversed(lines[-_LOG_LINES_PER_NODE:]))
    fitting = sum(1 for _ in takewhile(lambda total: total <= budget, accumulate(len(line) + 1 for line in newest)))
    return list(reversed(newest[: max(1, fitting)]))
