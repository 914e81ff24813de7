"""A metric as a picture that needs nothing: an SVG inside an ``<img>``.

Runs on: anywhere. Pure functions; knows nothing of IPython.

JupyterLab's sanitizer drops ``<svg>`` from a notebook that it does not trust, and keeps images that bring their data
along. Such an image knows nothing of the page's theme: its colours can be told apart on white and on black, and the two
lines differ in their strokes, too.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tfos_magic.widgets import words

TRAINING_COLOUR, VALIDATION_COLOUR = "#2f80d0", "#c77700"
_AXIS = "#777"
_WIDTH, _HEIGHT = 220, 96
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 214, 6, 78
_POINTS = 48
_HEAD = (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif"'
    f' font-size="10" fill="{_AXIS}">'
    f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}" fill="none" stroke="{_AXIS}" stroke-opacity=".6"/>'
)


@dataclass(frozen=True)
class Picture:
    """An image and what it says."""

    source: str
    """A ``data:`` address."""
    told: str
    """The same in words, for those who do not see it."""
    width: int = _WIDTH
    height: int = _HEIGHT


def draw(curve: words.Curve) -> Picture:
    """Return a curve as a picture of at most 3 KB."""
    data = base64.b64encode(_svg(curve).encode()).decode()
    return Picture(f"data:image/svg+xml;base64,{data}", describe(curve))


def describe(curve: words.Curve) -> str:
    """Return a curve in words, e.g. ``loss by epoch, 1 to 5: training from 1.9 to 0.41 (lowest 0.41, highest 1.9)``."""
    first, last = _span(curve)
    unit = "step" if curve.is_by_step else "epoch"
    lines = [
        f"{name} {_line_told(values)}" for name, values in _lines_of(curve) if words.last_finite(values) is not None
    ]
    return f"{curve.name} by {unit}, {_place(first)} to {_place(last)}: {'; '.join(lines) or 'no number'}"


def _lines_of(curve: words.Curve) -> list[tuple[str, tuple[float, ...]]]:
    return [("training", curve.training), ("validation", curve.validation)]


def _line_told(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) == 1:
        return words.number(finite[0])
    low, high = words.number(min(finite)), words.number(max(finite))
    return f"from {words.number(finite[0])} to {words.number(finite[-1])} (lowest {low}, highest {high})"


def _svg(curve: words.Curve) -> str:
    low, high = words.curve_range(curve)
    span = _span(curve)
    parts = [_HEAD]
    labels = [(words.number(high), _LEFT - 4, _TOP + 7, "end")]
    if low < high:
        labels.append((words.number(low), _LEFT - 4, _BOTTOM, "end"))
    unit = "step" if curve.is_by_step else "epoch"
    labels.append((f"{unit} {_place(span[0])}", _LEFT, _BOTTOM + 13, "start"))
    if span[0] < span[1]:
        labels.append((_place(span[1]), _RIGHT, _BOTTOM + 13, "end"))
    parts += [f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for text, x, y, anchor in labels]
    frame = _Frame(span, (low, high))
    parts.append(frame.line(curve.places, curve.training, TRAINING_COLOUR, ""))
    parts.append(frame.line(curve.validation_places, curve.validation, VALIDATION_COLOUR, ' stroke-dasharray="5 3"'))
    return "".join(parts) + "</svg>"


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the picture."""

    span: tuple[float, float]
    range: tuple[float, float]

    def line(self, places: Sequence[float], values: Sequence[float], colour: str, dashes: str) -> str:
        """Return a line with gaps where there is no number, and a dot at its end."""
        points = _thinned(list(zip(places, values, strict=True)))
        path, is_drawing = [], False
        for place, value in points:
            if math.isfinite(value):
                path.append(f"{'L' if is_drawing else 'M'}{self._x(place):.0f} {self._y(value):.1f}")
            is_drawing = math.isfinite(value)
        if not path:
            return ""
        place, value = next(point for point in reversed(points) if math.isfinite(point[1]))
        dot = f'<circle cx="{self._x(place):.0f}" cy="{self._y(value):.1f}" r="2.2" fill="{colour}"/>'
        return f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>{dot}'

    def _x(self, place: float) -> float:
        first, last = self.span
        share = (place - first) / (last - first) if last > first else 0.0
        return _LEFT + 3 + share * (_RIGHT - _LEFT - 6)

    def _y(self, value: float) -> float:
        low, high = self.range
        share = (value - low) / (high - low) if 0 < high - low < math.inf else 0.5
        return _BOTTOM - 3 - share * (_BOTTOM - _TOP - 6)


def _span(curve: words.Curve) -> tuple[float, float]:
    places = (*curve.places, *curve.validation_places)
    return (min(places), max(places)) if places else (0.0, 0.0)


def _place(value: float) -> str:
    """Return an epoch or a step; the epoch that goes on is the next one."""
    return f"{math.ceil(value):,}"


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (_POINTS - 1))] for i in range(_POINTS)]
