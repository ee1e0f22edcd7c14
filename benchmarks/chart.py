"""A chart with logarithmic axes, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 40, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
STYLE = "font-family='sans-serif' font-size='12'"


@dataclass(frozen=True)
class Line:
    """A series of points; all numbers above zero."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> str:
    """The chart as a document. Decades are marked, and each line has its name at its end."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' {STYLE}>",
        "<rect width='100%' height='100%' fill='white'/>",
        _text(LEFT, 20, title, size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_name, anchor="middle"),
        _text(LEFT, TOP - 6, y_name),
    ]
    for tick in x_axis.ticks():
        at = x_axis.place(tick)
        parts.append(_stroke([(at, TOP), (at, HEIGHT - BOTTOM)], "#dddddd", 1))
        parts.append(_text(at, HEIGHT - BOTTOM + 18, f"{tick:,g}", anchor="middle"))
    for tick in y_axis.ticks():
        at = y_axis.place(tick)
        parts.append(_stroke([(LEFT, at), (WIDTH - RIGHT, at)], "#dddddd", 1))
        parts.append(_text(LEFT - 8, at + 4, f"{tick:,g}", anchor="end"))
    ends = sorted(
        (y_axis.place(line.points[-1][1]), number, line) for number, line in enumerate(lines)
    )
    label_at = 0.0
    for end, number, line in ends:
        colour = COLOURS[number % len(COLOURS)]
        placed = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
        parts.append(_stroke(placed, colour, 2))
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in placed]
        # Names of lines that end close to each other stand below each other.
        label_at = max(end + 4, label_at + 16)
        parts.append(_text(WIDTH - RIGHT + 10, label_at, line.name, colour=colour))
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """A logarithmic axis over whole thirds of decades (1, 2, 5, 10 ...)."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self._low, self._high = _round(low, up=False), _round(high, up=True)
        self._begin, self._end = begin, end

    def place(self, value: float) -> float:
        share = math.log(value / self._low) / math.log(self._high / self._low)
        return self._begin + share * (self._end - self._begin)

    def ticks(self) -> list[float]:
        steps = range(math.floor(math.log10(self._low)), math.ceil(math.log10(self._high)) + 1)
        marks = [10.0**step * factor for step in steps for factor in (1, 2, 5)]
        return [it for it in marks if self._low * 0.999 <= it <= self._high * 1.001]


def _round(value: float, *, up: bool) -> float:
    decade = 10.0 ** math.floor(math.log10(value))
    marks = [decade * factor for factor in (1, 2, 5, 10)]
    if up:
        return next(it for it in marks if it >= value * 0.999)
    return max(it for it in marks if it <= value * 1.001)


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, colour: str = "#333"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}'"
        f" fill='{colour}'>{escape(words)}</text>"
    )


def _stroke(points: Sequence[tuple[float, float]], colour: str, width: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}'/>"
