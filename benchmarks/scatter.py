"""A scatter plot with a logarithmic x axis, as SVG and by hand: the project has no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Goal", "Point", "scatter"]

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 70, 40, 60, 60
LETTER, LINE = 6.2, 13.0
"""Width of a letter and height of a line of the labels, in pixels."""

INK, PALE, GOAL = "#1f2933", "#d9dee4", "#e3f4e8"


@dataclass(frozen=True)
class Point:
    """A labelled point; `spread` is the whole length of its vertical bar, `filled` its first and `kind` its second mark."""

    x: float
    y: float
    label: str
    kind: str
    filled: bool
    spread: float = 0.0


@dataclass(frozen=True)
class Goal:
    """The corner of the plane from `x` to the right and from `y` down."""

    x: float
    y: float
    label: str


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    points: Sequence[Point],
    goals: Sequence[Goal],
    kinds: Sequence[tuple[str, str]],
    legend: Sequence[str],
) -> str:
    """The plot as SVG text.

    Args:
        kinds: each kind of point with its colour, in the legend's order.
        legend: what a filled and what a hollow mark mean.
    """
    low, high = _decades([p.x for p in points] + [g.x for g in goals])
    bottom, top, tick = _span(
        [p.y + side * p.spread / 2 for p in points for side in (-1, 1)] + [g.y for g in goals] + [0.0]
    )

    def at_x(x: float) -> float:
        return LEFT + 20 + (math.log10(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT - 20)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    frame = (
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif" fill="{INK}"'
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, title, "start", size=15),
    ]
    out += [
        (
            f'<rect x="{at_x(goal.x):.1f}" y="{at_y(goal.y):.1f}" width="{right - at_x(goal.x):.1f}" '
            f'height="{floor - at_y(goal.y):.1f}" fill="{GOAL}" fill-opacity="0.6" stroke="#7fbf95" stroke-dasharray="4 3"/>'
        )
        for goal in goals
    ]
    for power in range(low, high + 1):
        x = at_x(10**power)
        out.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{floor}" stroke="{PALE}"/>')
        out.append(_text(x, floor + 18, f"{10**power:,}x", "middle"))
    for step in range(round(bottom / tick), round(top / tick) + 1):
        y = at_y(step * tick)
        colour = INK if step == 0 else PALE
        out.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="{colour}"/>')
        out.append(_text(LEFT - 8, y + 4, f"{step * tick:g}", "end"))
    for index, goal in enumerate(goals):
        label_y = floor - 8 - 15 * (len(goals) - 1 - index)
        out.append(_text(at_x(goal.x) + 6, label_y, goal.label, "start", colour="#3c7a52"))
    out.append(_text((LEFT + right) / 2, HEIGHT - 14, x_label, "middle", size=12))
    out.append(
        f'<g transform="translate(18 {(TOP + floor) / 2:.0f}) rotate(-90)">{_text(0, 0, y_label, "middle", size=12)}</g>'
    )
    colours = dict(kinds)
    taken = [(at_x(p.x) - 6, at_y(p.y) - 6, at_x(p.x) + 6, at_y(p.y) + 6) for p in points]
    for point in points:
        x, y, colour = at_x(point.x), at_y(point.y), colours[point.kind]
        if point.spread:
            half = abs(at_y(0) - at_y(point.spread)) / 2
            out.append(
                f'<line x1="{x:.1f}" y1="{y - half:.1f}" x2="{x:.1f}" y2="{y + half:.1f}" stroke="{colour}" stroke-width="1.5"/>'
            )
        out.append(_mark(x, y, colour, point.filled))
        at, anchor, box = _place(x, y, len(point.label) * LETTER, taken, (LEFT, TOP, right, floor))
        taken.append(box)
        out.append(_text(*at, point.label, anchor))
    across = LEFT
    for name, colour in kinds:
        out += [_mark(across + 5, 42, colour, True), _text(across + 15, 46, name, "start")]
        across += round(30 + len(name) * LETTER)
    for name, filled in zip(legend, (True, False), strict=True):
        out += [_mark(across + 5, 42, INK, filled), _text(across + 15, 46, name, "start")]
        across += round(30 + len(name) * LETTER)
    return "\n".join([*out, "</svg>", ""])


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _span(values: Sequence[float]) -> tuple[float, float, float]:
    """Ends of an axis around all values, and the distance of its ticks: 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    raw = max(high - low, 1e-9) / 8
    power = 10.0 ** math.floor(math.log10(raw))
    tick = next(power * step for step in (1, 2, 5, 10) if power * step >= raw)
    return math.floor(low / tick) * tick, math.ceil(high / tick) * tick, tick


def _place(
    x: float,
    y: float,
    width: float,
    taken: Sequence[tuple[float, float, float, float]],
    frame: tuple[float, float, float, float],
) -> tuple[tuple[float, float], str, tuple[float, float, float, float]]:
    """Where a label covers least of what is there already: its position, its anchor and its box."""
    found = []
    for rank, (dx, dy, anchor) in enumerate(
        [(9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 19, "middle")]
        + [(9, dy, "start") for dy in (-9, 16)]
        + [(-9, dy, "end") for dy in (-9, 16)]
        + [(0, dy, "middle") for dy in (-23, 32, -36, 45)]
    ):
        left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (left, y + dy - LINE + 3, left + width, y + dy + 3)
        covered = sum(
            max(0.0, min(box[2], o[2]) - max(box[0], o[0])) * max(0.0, min(box[3], o[3]) - max(box[1], o[1]))
            for o in taken
        )
        outside = max(0.0, frame[0] - box[0], box[2] - frame[2]) + max(
            0.0, frame[1] - box[1], box[3] - frame[3]
        )
        found.append((covered + 100 * outside, rank, (x + dx, y + dy), anchor, box))
    _, _, at, anchor, box = min(found)
    return at, anchor, box


def _mark(x: float, y: float, colour: str, filled: bool) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour if filled else "white"}" stroke="{colour}" stroke-width="1.8"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 11, colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
