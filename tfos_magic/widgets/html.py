"""The board as HTML that needs nothing: no kernel, no JavaScript, no style sheet.

Runs on: anywhere. Knows nothing of IPython.

JupyterLab shows a reopened notebook through a sanitizer that drops ``<style>``, ``<svg>``, ``role``, ``aria-*`` and of
inline styles those with ``var(…)``: so the colours are plain ones that can be told apart on white and on black, text
inherits its colour, and whatever a colour says a word or a mark says too. A trusted notebook, and a cell that runs,
keep ``aria-*``: marks and small lines are hidden from screen readers there, which would spell them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape as _escape
from itertools import accumulate, takewhile

from tfos_magic.status import LEFT_OUT, BoardView, NodeState, NodeView
from tfos_magic.widgets import chart, words

_GREEN, _AMBER, _RED, _BLUE, _GREY = "#2a9d4b", "#c77700", "#dc3d45", "#2f80d0", "#888888"
_COLOURS = {
    NodeState.PLANNED: _GREY,
    NodeState.STARTING: _BLUE,
    NodeState.IMPORTING: _BLUE,
    NodeState.MEETING: _BLUE,
    NodeState.RUNNING: _GREEN,
    NodeState.WAITING: _AMBER,
    NodeState.SAVING: _BLUE,
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
    "table-layout:auto;border:none;border-collapse:collapse;margin:0;text-align:right;font-size:12px;"
    "font-variant-numeric:tabular-nums"
)
_LINE = "border-top:1px solid rgba(128,128,128,0.3)"
_ROW = f'<tr style="background:none;{_LINE}">'
_PLAIN_ROW = '<tr style="background:none">'
_CELL = "padding:2px 5px"  # aligned as the table is, on the right
_LEFT = f"{_CELL};text-align:left;white-space:nowrap"
_SECOND = "padding:0 5px 3px;opacity:0.7"
_CLIP = f"{_SECOND};text-align:left;white-space:nowrap;max-width:0;overflow:hidden;text-overflow:ellipsis"
_MUTED = "opacity:0.7"
_PRE = "margin:2px 0 6px;padding:4px 8px;white-space:pre-wrap;font-size:12px;line-height:1.35;background:none;"
# Laid out from the end, so that it opens at its last lines.
_SCROLL = (
    "display:flex;flex-direction:column-reverse;max-height:320px;overflow:auto;"
    "border-left:3px solid rgba(128,128,128,0.3)"
)
_NBSP = "\N{NO-BREAK SPACE}"

_LEFT_COLUMNS = frozenset({"node", "state", "host"})
_HINTS = {
    "fed": "rows that Spark has delivered to the node",
    "rows": "rows that the function has taken, all epochs counted",
    "rows/s": "over the last seconds; the line shows the last twenty",
    "queued": "chunks that lie at the node and have not been used yet",
    "node waits": "share of the running time that the function waited for data",
    "feed waits": "share of the time that Spark's tasks waited because this node had no room",
    "CPU": "100 % is one core kept busy",
}
_METRICS_SHOWN = 5
_CHARTS_SHOWN = 4
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
    caption = _caption(view) + _facts(view) + _progress(view)
    parts = [_ROOT, _board(shown, view, caption=caption) if shown else f"<div>{caption}</div>"]
    if rest:
        parts.append(_rest(rest, view, live))
    if view.outcome and view.message:
        parts.append(_message(view))
    parts += _curves(view)
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
    return f"{_mark(mark, colour)} <b>{escape(title)}</b> &nbsp; {' · '.join(told)}"


def _facts(view: BoardView) -> str:
    told = [("↻", words.restarts(view)), *(("·", notice) for notice in view.notices)]
    return "".join(f"<br>{_mark(mark, _AMBER)} {escape(text)}" for mark, text in told if text)


def _mark(mark: str, colour: str, style: str = "") -> str:
    """Return characters that only repeat, to the eye, what is said in words beside them."""
    return f'<span aria-hidden="true" style="color:{colour}{style}">{mark}</span>'


def _progress(view: BoardView) -> str:
    """Return the second line: how far it is, and which side is slow."""
    parts = [_bar(known, view)] if (known := words.progress(view)) is not None else []
    parts += [f"<span>{escape(remark)}</span>"] if (remark := words.bottleneck(view)) else []
    return f"<div>{' &nbsp; '.join(parts)}</div>" if parts else ""


def _bar(known: words.Progress, view: BoardView) -> str:
    style = "display:inline-block;vertical-align:middle;width:180px;height:5px;margin-right:8px"
    done = f'<div style="width:{100 * known.share:.0f}%;height:5px;background:{_BLUE}"></div>'
    told = f'<span style="{_MUTED}">{escape(words.progress_told(view, known))}</span>'
    return f'<div style="{style};background:rgba(128,128,128,0.3)">{done}</div>{told}'


# --- the table --------------------------------------------------------------------------------------------


def _board(pairs: Sequence[tuple[int, NodeView]], view: BoardView, *, caption: str = "") -> str:
    columns = _columns(view)
    heads = "".join(_column_head(name, view) for name in columns)
    style = "caption-side:top;text-align:left;padding:2px 5px 5px;font-size:13px;font-style:normal;color:inherit"
    top = f'<caption style="{style}">{caption}</caption>' if caption else ""
    rows = "".join(_row(index, node, view, columns) for index, node in pairs)
    return (
        f'<table style="{_TABLE};width:100%">{top}<thead style="border:none">{_PLAIN_ROW}{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _columns(view: BoardView) -> list[str]:
    """Return what there is to say of this run's nodes."""
    feed = ["fed" if view.outcome else "queued", "node waits", "feed waits"] if words.has_feed(view) else []
    rows = ["rows", "rows/s"] if words.has_feed(view) else []
    return ["node", "host", "state", *rows, *feed, "CPU", "memory", *(["GPU"] if words.has_gpus(view) else [])]


def _side(column: str) -> str:
    return "left" if column in _LEFT_COLUMNS else "right"


def _column_head(name: str, view: BoardView) -> str:
    shown = "peak memory" if name == "memory" and view.outcome else name
    title = f' title="{_HINTS[name]}"' if name in _HINTS else ""
    # What is left goes to the column whose words change most: then the others stay where they are.
    width = ";width:45%" if name == "state" else ""
    style = f"{_CELL};text-align:{_side(name)};white-space:nowrap;font-weight:normal;{_MUTED}{width}"
    return f'<th scope="col" style="{style}"{title}>{shown}</th>'


def _row(index: int, node: NodeView, view: BoardView, columns: Sequence[str]) -> str:
    """Return a node's row; what it said last is a second line of it, where there is room for a sentence."""
    told = _said(node)
    heat = escape(words.gpu_heat(node.machine.gpus)).replace(" ", _NBSP)
    span = ' rowspan="2"' if told or heat else ""
    name = f'<span style="{_MUTED}">{index}</span>&nbsp; {escape(node.name)}'
    head = f'<th scope="row"{span} style="{_LEFT};font-weight:normal;vertical-align:top">{name}</th>'
    first = "".join(_cell(column, node, view) for column in columns[1:])
    if not span:
        return f"{_ROW}{head}{first}</tr>"
    has_gpus = columns[-1] == "GPU"
    second = f'<td colspan="{len(columns) - 1 - has_gpus}" style="{_CLIP}">{told}</td>'
    last = f'<td style="{_SECOND}">{heat}</td>' if has_gpus else ""
    return f"{_ROW}{head}{first}</tr>{_PLAIN_ROW}{second}{last}</tr>"


def _cell(column: str, node: NodeView, view: BoardView) -> str:
    content = _content(column, node, view)
    if _side(column) == "left":
        return f'<td style="{_LEFT}">{content}</td>'
    # A number breaks nowhere but at its blanks: cheaper than forbidding it by style.
    if "<" in content:
        return f'<td style="{_CELL};white-space:nowrap">{content}</td>'
    return f'<td style="{_CELL}">{content.replace(" ", _NBSP)}</td>'


def _content(column: str, node: NodeView, view: BoardView) -> str:
    match column:
        case "state":
            return _state(node, view)
        case "host":
            return _host(node.host)
        case "rows":
            return words.count(node.rows_consumed)
        case "fed":
            return words.count(node.rows_received)
        case "rows/s":
            return _rate(node, view)
        case "queued":
            return words.queued(node)
        case "node waits":
            return words.percent(node.wait_percent)
        case "feed waits":
            return words.percent(node.feed_wait_percent)
        case "CPU":
            return words.percent(node.machine.cpu_percent)
        case "memory":
            return words.size(node.memory_peak_bytes if view.outcome else node.machine.memory_bytes)
        case _:
            return _gpu(node)


def _state(node: NodeView, view: BoardView) -> str:
    look = words.look(node, view)
    age_s = words.beat_age_s(node, view)
    told = escape(words.state(node, view))
    heard = f' title="last heartbeat {words.duration(age_s)} ago"' if age_s is not None else ""
    return f"{_mark(words.MARKS[look], _COLOURS[look])} " + (f"<span{heard}>{told}</span>" if heard else told)


def _rate(node: NodeView, view: BoardView) -> str:
    line = words.rate_line(node)
    return f"{_spark(line)} {words.count(node.rows_per_s)}" if line else words.count(node.rows_per_s)


def _spark(line: str) -> str:
    return _mark(line.replace(" ", _NBSP), _BLUE, ";font:10px monospace;opacity:0.75")


def _host(host: str) -> str:
    if len(host) <= 24:
        return escape(host or words.NOTHING)
    return f'<span title="{escape(host)}">{escape(host[:23])}…</span>'


def _gpu(node: NodeView) -> str:
    samples = node.machine.gpus
    if not samples:
        return words.NOTHING
    load, line = escape(words.gpu_load(samples)), words.load_line(node.gpu_history)
    told = " · ".join(filter(None, [f"{load} {_spark(line)}" if line else load, escape(words.gpu_memory(samples))]))
    return f'<span title="{escape(words.gpu_detail(samples))}">{told}</span>'


def _said(node: NodeView) -> str:
    """Return the second line: its point of a grid, step and last metrics, then its last line, or why it failed."""
    known = list(node.metrics.items())
    told = [f"step {node.step:,}"] if node.step is not None else []
    told += [f"{escape(name)} {escape(words.number(value))}" for name, value in known[:_METRICS_SHOWN]]
    metrics = " &nbsp;".join(told)
    if len(known) > _METRICS_SHOWN:
        metrics = f'<span title="{escape(words.metrics(node))}">{metrics} …</span>'
    line = words.last_words(node)
    full = f' title="{escape(line)}"' if len(line) > 100 else ""
    output = f"<span{full}>{escape(line[:200])}</span>" if line else ""
    point = f"<b>{escape(node.point)}</b>" if node.point else ""
    return " &nbsp;│&nbsp; ".join(part for part in (point, metrics, output) if part)


def _rest(rest: Sequence[tuple[int, NodeView]], view: BoardView, live: bool) -> str:
    nodes = [node for _, node in rest]
    if live:
        lines = [
            f"<div>{_mark(words.MARKS[state], _COLOURS[state])} {escape(told)}</div>"
            for state, told in words.groups(nodes)
        ]
        return f'<div style="padding:4px 5px;font-size:12px">{"".join(lines)}</div>'
    return _fold(escape(words.summary(nodes)), _board(rest, view))


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


def _curves(view: BoardView) -> list[str]:
    """Return the first metrics as charts, the others as a table of small lines."""
    curves = words.curves(view)
    drawn = [curve for curve in curves if len(curve.training) > 1 or len(curve.validation) > 1][:_CHARTS_SHOWN]
    others = [curve for curve in curves if curve not in drawn]
    charts = f'<div style="margin-top:8px">{"".join(map(_chart, drawn))}</div>' if drawn else ""
    return [charts, _curve_table(others)]


def _chart(curve: words.Curve) -> str:
    picture = chart.draw(curve)
    keys = [
        _key("━", chart.TRAINING_COLOUR, "", curve.training),
        _key("╍", chart.VALIDATION_COLOUR, "validation ", curve.validation),
    ]
    image = (
        f'<img alt="{escape(picture.told)}" src="{picture.source}" width="{picture.width}" height="{picture.height}"'
        ' style="display:block;max-width:none;margin:0">'
    )
    told = f"<b>{escape(curve.name)}</b> &nbsp;{' &nbsp;'.join(filter(None, keys))}"
    return f'<div style="display:inline-block;margin:0 12px 4px 0;font-size:12px"><div>{told}</div>{image}</div>'


def _key(stroke: str, colour: str, name: str, values: Sequence[float]) -> str:
    """Return how a line is drawn, and its last value."""
    last = words.last_finite(values)
    return f"{_mark(stroke, colour)} {name}{words.number(last)}" if last is not None else ""


def _curve_table(curves: Sequence[words.Curve]) -> str:
    if not curves:
        return ""
    has_validation = any(curve.validation for curve in curves)
    names = ["metric", "training", *(["validation"] if has_validation else [])]
    heads = "".join(f'<th scope="col" style="{_LEFT};font-weight:normal;{_MUTED}">{name}</th>' for name in names)
    rows = "".join(_curve(curve, has_validation) for curve in curves)
    return (
        f'<table style="{_TABLE};margin-top:8px"><thead style="border:none">{_PLAIN_ROW}{heads}</tr></thead>'
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
    return f"{_spark(words.sparkline(values, low, high))} &nbsp;{start} {words.number(last)}"


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
    written = f'<pre style="{_PRE}flex-shrink:0">{note}{escape(chr(10).join(tail))}</pre>'
    return _fold(
        f'Output of {escape(name)} <span style="{_MUTED}">{what}</span>',
        f'<div tabindex="0" style="{_SCROLL}">{written}</div>',
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
