"""Small SVG charts for the HTML report: lines over steps, and bars. No script, no style attribute, no network.

Colours and fonts come from the classes of the page's style sheet (``s0`` .. ``s7`` for series, in their order).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 16, 50
NUM_COLOURS = 8
ROW, ROW_LABELS = 26, 150
"""Height of a row of a chart of rows, and width of its labels."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: ``points`` are (x, y) with x ascending. ``colour`` numbers the style sheet's series colours."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Labels, and the range of y that is shown at least (``None``: what the data needs)."""

    x_label: str
    y_label: str
    y_from: float | None = None
    y_to: float | None = None


def line_chart(series: Sequence[Series], axes: Axes) -> Markup:
    """Lines over a common x axis that counts (ticks are whole numbers); a note where there is no point to draw."""
    points = [(x, y) for line in series for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return _empty(axes.y_label)
    x_low, x_high = _spread(min(x for x, _ in points), max(x for x, _ in points))
    y_low = min(y for _, y in points) if axes.y_from is None else min(axes.y_from, *(y for _, y in points))
    y_high = max(y for _, y in points) if axes.y_to is None else max(axes.y_to, *(y for _, y in points))
    y_ticks = nice_ticks(*_spread(y_low, y_high))
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    frame = _Frame(x_low, x_high, y_low, y_high)
    parts = [
        _grid(frame, y_ticks, axes),
        *(_x_tick(frame, x, number(x)) for x in nice_ticks(x_low, x_high, 6) if x == int(x)),
    ]
    for line in series:
        drawn = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in drawn)
        kind = f"line s{line.colour % NUM_COLOURS}" + (" faint" if line.faint else "")
        parts.append(
            Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(kind, path, line.name)
        )
    return _svg(parts, axes.y_label)


def bar_chart(values: Sequence[tuple[str, float]], axes: Axes) -> Markup:
    """One bar a (label, share of 0..1), with its value in per cent above it."""
    if not values:
        return _empty(axes.y_label)
    frame = _Frame(0.0, float(len(values)), 0.0, 1.0)
    parts = [_grid(frame, [0.0, 0.25, 0.5, 0.75, 1.0], axes, percent=True)]
    for index, (label, value) in enumerate(values):
        left, right = frame.x(index + 0.2), frame.x(index + 0.8)
        top = frame.y(min(1.0, max(0.0, value)))
        parts.append(
            Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"></rect>').format(
                left, top, right - left, frame.y(0.0) - top
            )
        )
        middle = (left + right) / 2
        # inside the bar where there is no room above it
        y = top - 6 if top - 6 > TOP + 12 else top + 19
        kind = "value" if y < top else "value inside"
        parts.append(Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{:.1%}</text>').format(kind, middle, y, value))
        parts.append(_x_tick(frame, index + 0.5, label))
    return _svg(parts, axes.y_label)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its confidence interval (``None``: it has none), under a label."""

    label: str
    value: float
    interval: tuple[float, float] | None = None


def interval_chart(estimates: Sequence[Estimate], axes: Axes) -> Markup:
    """A row for every estimate, with a dot and a line over its interval. ``axes``: y is what runs along the rows."""
    found = [it for it in estimates if math.isfinite(it.value)]
    if not found:
        return _empty(axes.y_label)
    values = [value for it in found for value in (it.value, *(it.interval or ()))]
    values += [bound for bound in (axes.y_from, axes.y_to) if bound is not None]
    ticks = nice_ticks(*_spread(min(values), max(values)), 6)
    height, bottom = ROW * len(found) + TOP + BOTTOM, ROW * len(found) + TOP

    def x(value: float) -> float:
        return ROW_LABELS + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - ROW_LABELS - 60)

    parts = []
    for tick in ticks:
        line = Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"></line>')
        text = Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>')
        parts += [line.format(x(tick), TOP, bottom), text.format(x(tick), bottom + 19, number(tick))]
    for index, it in enumerate(found):
        y, end = TOP + ROW * (index + 0.5), x(it.value)
        label = Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>')
        parts.append(label.format(ROW_LABELS - 14, y + 5, _shortened(it.label, ROW_LABELS // 9)))
        if it.interval is not None:
            low, high = map(x, it.interval)
            end = max(end, high)
            path = Markup('<path class="line s0" d="M{0:.1f} {2:.1f}v10m0 -5H{1:.1f}m0 -5v10"></path>')
            parts.append(path.format(low, high, y - 5))
        parts.append(Markup('<circle class="bar" cx="{:.1f}" cy="{:.1f}" r="5"></circle>').format(x(it.value), y))
        text = Markup('<text class="value beside" x="{:.1f}" y="{:.1f}">{:.2f}</text>')
        parts.append(text.format(end + 12, y + 5, it.value))
    middle = (ROW_LABELS + WIDTH - 60) / 2
    parts.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(middle, height - 7, axes.y_label))
    return _svg(parts, axes.y_label, height)


def share_bar(share: float) -> Markup:
    """A small horizontal bar for a table cell, filled to ``share`` of 0..1."""
    width = 160 * min(1.0, max(0.0, share))
    return Markup(
        '<svg class="share" viewBox="0 0 160 10" width="160" height="10" role="presentation">'
        '<rect class="track" width="160" height="10" rx="2"></rect>'
        '<rect class="bar" width="{:.1f}" height="10" rx="2"></rect></svg>'
    ).format(width)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from at most ``low`` to at least ``high`` in steps of 1, 2 or 5 times ten^k."""
    raw = (high - low) / max(1, count)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(tick * step, 12) for tick in range(first, last + 1)]


def number(value: float) -> str:
    """Short and exact enough to read: 1,234 / 12.3 / 0.0123."""
    if not math.isfinite(value):
        return "n/a"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _grid(frame: _Frame, ticks: Sequence[float], axes: Axes, percent: bool = False) -> Markup:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        kind = "axis" if tick == ticks[0] else "grid"
        parts.append(Markup('<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"></line>').format(
            kind, LEFT, WIDTH - RIGHT, y, y
        ))  # fmt: skip
        text = f"{tick:.0%}" if percent else number(tick)
        parts.append(Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 8, y + 5, text))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(middle, HEIGHT - 7, axes.x_label))
    return Markup("").join(parts)


def _x_tick(frame: _Frame, value: float, text: str) -> Markup:
    if not frame.x_low <= value <= frame.x_high:
        return Markup("")
    template = Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>')
    return template.format(frame.x(value), HEIGHT - BOTTOM + 19, text)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def _svg(parts: Sequence[Markup], name: str, height: int = HEIGHT) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, name)
    return head + Markup("").join(parts) + Markup("</svg>")


def _empty(name: str) -> Markup:
    note = Markup('<text class="label" x="{}" y="{}">no data</text>').format(WIDTH / 2, HEIGHT / 2)
    return _svg([note], str(escape(name)))


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high > low:
        return low, high
    margin = abs(low) * 0.05 or 0.5
    return low - margin, high + margin
