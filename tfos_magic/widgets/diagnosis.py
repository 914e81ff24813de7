"""A diagnosis of the pickling doctor, as HTML and as text.

Runs on: notebook. Knows nothing of IPython, and no logic of pickling: it draws the record that it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tfos_magic.doctor.findings import Diagnosis, Finding, GlobalName, NamedtupleTable, Part, Trip, Verdict
from tfos_magic.widgets.html import escape

_COLOURS = {Verdict.FINE: "#2a9d4b", Verdict.COSTLY: "#2f80d0", Verdict.WRONG: "#c77700", Verdict.BREAKS: "#dc3d45"}
_MARKS = {Verdict.FINE: "✓", Verdict.COSTLY: "$", Verdict.WRONG: "≠", Verdict.BREAKS: "✗"}
_ROOT = (
    '<div class="tfos-doctor tex2jax_ignore mathjax_ignore" '
    'style="font-size:13px;line-height:1.45;overflow-x:auto;max-width:1000px">'
)
_TABLE = "table-layout:auto;border:none;border-collapse:collapse;margin:0 0 6px;font-size:12px"
_ROW = "background:none;border-top:1px solid rgba(128,128,128,0.3)"
_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"
_MONO = "font-family:monospace;font-size:12px"
_MUTED = "opacity:0.7"
_FINDINGS_SHOWN = 20
_OPEN_LINES = 12
_WIDTH = 100

Rows = list[tuple[str, ...]]


def bundle(diagnosis: Diagnosis) -> dict[str, str]:
    """Return a mime bundle of ``text/html`` and ``text/plain`` that needs no kernel."""
    return {"text/html": render_html(diagnosis), "text/plain": render_text(diagnosis)}


# --- HTML --------------------------------------------------------------------------------------------------


def render_html(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as one ``<div>`` in which everything is escaped.

    Parameters
    ----------
    diagnosis : Diagnosis
        From :func:`tfos_magic.doctor.examine`.
    """
    tree = list(_tree_lines(diagnosis.tree))
    return "".join(
        [
            _ROOT,
            _headline_html(diagnosis),
            *map(_finding_html, diagnosis.findings[:_FINDINGS_SHOWN]),
            *_more_html(len(diagnosis.findings) - _FINDINGS_SHOWN),
            _fold("What it drags along", _pre("\n".join(tree)), is_open=len(tree) <= _OPEN_LINES),
            _table_html("Globals", _NAME_HEADS, _name_rows(diagnosis.names)),
            *(_table_html(_mro_title(each), _MRO_HEADS, _mro_rows(each)) for each in diagnosis.namedtuples),
            _table_html("Round trip", _TRIP_HEADS, _trip_rows(diagnosis)),
            "</div>",
        ]
    )


def _headline_html(diagnosis: Diagnosis) -> str:
    colour = _COLOURS[diagnosis.verdict]
    return (
        f'<div><span style="color:{colour}">{_MARKS[diagnosis.verdict]}</span> <b>{escape(diagnosis.name)}</b>: '
        f'<b style="color:{colour}">{_verdict(diagnosis)}</b> '
        f'&nbsp;<span style="{_MUTED}">{escape(_facts(diagnosis))}</span></div>'
        + (f'<div style="{_MUTED}">{escape(_waiting(diagnosis))}</div>' if diagnosis.awaits else "")
    )


def _finding_html(finding: Finding) -> str:
    colour = _COLOURS[finding.verdict]
    return (
        f'<div style="margin:6px 0 6px 2px;padding-left:8px;border-left:3px solid {colour}">'
        f'<div><b style="color:{colour}">{_word(finding)}</b> &nbsp;'
        f'<span style="{_MONO}">{escape(finding.words)}</span> '
        f'<span style="{_MUTED}">[{escape(finding.trap)}]</span></div>'
        f"<div>{escape(finding.why)}</div>"
        f'<div>→ <span style="{_MONO}">{escape(finding.fix)}</span></div></div>'
    )


def _more_html(count: int) -> Iterator[str]:
    if count > 0:
        yield f'<div style="{_MUTED}">… and {count} more findings: .findings of the object that --out binds</div>'


def _table_html(title: str, heads: Sequence[str], rows: Rows) -> str:
    if not rows:
        return ""
    head = "".join(f'<th style="{_CELL};font-weight:normal;{_MUTED}">{escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr style="{_ROW}">{"".join(f"<td style={chr(34)}{_CELL}{chr(34)}>{escape(cell)}</td>" for cell in row)}</tr>'
        for row in rows
    )
    table = (
        f'<table style="{_TABLE}"><thead><tr style="background:none">{head}</tr></thead><tbody>{body}</tbody></table>'
    )
    return _fold(title, table, is_open=len(rows) <= _OPEN_LINES)


def _fold(title: str, content: str, *, is_open: bool) -> str:
    style = "padding:1px 0;cursor:pointer"
    return f'<details{" open" if is_open else ""}><summary style="{style}">{escape(title)}</summary>{content}</details>'


def _pre(text: str) -> str:
    return f'<pre style="margin:2px 0 6px;padding:0 8px;background:none;font-size:12px">{escape(text)}</pre>'


# --- text --------------------------------------------------------------------------------------------------


def render_text(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as text for terminals."""
    lines = [f"{_MARKS[diagnosis.verdict]} {diagnosis.name}: {_verdict(diagnosis)}   ({_facts(diagnosis)})"]
    if diagnosis.awaits:
        lines.append(_waiting(diagnosis))
    for finding in diagnosis.findings[:_FINDINGS_SHOWN]:
        lines += _finding_text(finding)
    if len(diagnosis.findings) > _FINDINGS_SHOWN:
        lines += ["", f"… and {len(diagnosis.findings) - _FINDINGS_SHOWN} more findings"]
    lines += ["", "what it drags along:", *(f"  {line}" for line in _tree_lines(diagnosis.tree))]
    lines += _table_text("globals", _NAME_HEADS, _name_rows(diagnosis.names))
    for each in diagnosis.namedtuples:
        lines += _table_text(_mro_title(each), _MRO_HEADS, _mro_rows(each))
    lines += _table_text("round trip", _TRIP_HEADS, _trip_rows(diagnosis))
    return "\n".join(lines)


def _finding_text(finding: Finding) -> list[str]:
    return [
        "",
        f"{_MARKS[finding.verdict]} {_word(finding)}: {finding.words}   [{finding.trap}]",
        f"    {finding.why}",
        f"    → {finding.fix}",
    ]


def _table_text(title: str, heads: Sequence[str], rows: Rows) -> list[str]:
    if not rows:
        return []
    cells = [tuple(heads), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return ["", f"{title}:", *(f"  {line}" for line in lines)]


# --- what both say -----------------------------------------------------------------------------------------


def _verdict(diagnosis: Diagnosis) -> str:
    return f"so far {diagnosis.verdict.word}" if diagnosis.awaits else diagnosis.verdict.word


def _waiting(diagnosis: Diagnosis) -> str:
    return f"asking {diagnosis.awaits} …"


def _facts(diagnosis: Diagnosis) -> str:
    does = "pickles" if diagnosis.pickles else "does not pickle"
    kind = diagnosis.kind.removeprefix("builtins.")
    return f"{kind}; {does} with {diagnosis.pickler}; {_size(diagnosis.size_bytes)}; {diagnosis.seconds:.2f} s"


def _word(finding: Finding) -> str:
    """Return the verdict in words; what is only a remark may speak of breaking, elsewhere."""
    return finding.verdict.word if finding.verdict else "worth knowing"


def _tree_lines(part: Part, before: str = "", below: str = "") -> Iterator[str]:
    how = [] if part.how == "by value" else [part.how]
    size = [] if part.how == "stays behind" else [_size(part.size_bytes)]
    yield f"{before}{part.step}  ({', '.join([part.kind, *how, *size])})"
    for position, each in enumerate(part.parts):
        is_last = position == len(part.parts) - 1 and not part.more
        yield from _tree_lines(each, f"{below}{'└─ ' if is_last else '├─ '}", f"{below}{'   ' if is_last else '│  '}")
    if part.more:
        yield f"{below}└─ … and {part.more} more"


def _size(size_bytes: int) -> str:
    """Return a size that is exact where it is small: a hundred bytes more or less tell something here."""
    if size_bytes < 10_000:
        return f"{size_bytes:,} byte{'s' * (size_bytes != 1)}"
    return f"{size_bytes / 1e3:,.0f} KB" if size_bytes < 10_000_000 else f"{size_bytes / 1e6:,.0f} MB"


_NAME_HEADS = ("name", "kind", "how it travels", "here", "there", "")


def _name_rows(names: Sequence[GlobalName]) -> Rows:
    return [
        (each.name, each.kind, each.how, each.here, each.there, "patched" if each.is_patched else "") for each in names
    ]


_MRO_HEADS = ("class", "defines", "")


def _mro_title(table: NamedtupleTable) -> str:
    return f"Whose __reduce__ wins: {table.name}"


def _mro_rows(table: NamedtupleTable) -> Rows:
    return [(each.name, ", ".join(each.defines), _wins(each.wins, each.is_pysparks)) for each in table.mro]


def _wins(wins: bool, is_pysparks: bool) -> str:
    return "← wins: PySpark's patch" if is_pysparks else "← wins" if wins else ""


_TRIP_HEADS = ("where", "outcome", "type", "isinstance", "equal", "the same object", "methods", "bytes")


def _trip_rows(diagnosis: Diagnosis) -> Rows:
    trips = [*([diagnosis.trip] if diagnosis.trip is not None else []), *diagnosis.executors]
    return [_trip_row(each) for each in trips]


def _trip_row(trip: Trip) -> tuple[str, ...]:
    if trip.outcome != "arrived":
        return (trip.where, f"{trip.outcome}: {trip.error}"[:_WIDTH], *[""] * 6)
    is_kept = trip.type_after == trip.type_before
    return (
        trip.where,
        f"{trip.outcome} in {trip.seconds * 1000:.0f} ms",
        trip.type_after if is_kept else f"{trip.type_before} → {trip.type_after}",
        _yes(trip.is_instance),
        _yes(trip.is_equal),
        _yes(trip.is_same, "no, a copy"),
        "all there" if not trip.lost_methods else f"without {', '.join(trip.lost_methods[:3])}",
        f"{trip.size_before:,} → {trip.size_after:,}",
    )


def _yes(value: bool | None, no: str = "no") -> str:
    return "not compared" if value is None else "yes" if value else no
