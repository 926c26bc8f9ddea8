"""Charts as lists of SVG shapes: values become coordinates here, `chart` in templates/parts.html writes them
down.

Every function returns a `Chart` in its own units of length; the page scales it to its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

Point = tuple[float, float]
LEFT = 70
"""Room for the names of rows and the numbers of a vertical axis, in charts as wide as the page."""


@dataclass
class Chart:
    """Shapes on a canvas. wide: made for a whole page's width, it scrolls on a narrow screen instead of
    shrinking."""

    width: float
    height: float
    label: str
    wide: bool = False
    shapes: list[dict[str, Any]] = field(default_factory=list)

    def add(self, tag: str, title: str = "", text: str = "", **attributes: Any) -> None:
        """One SVG element. attributes: numbers are rounded; `_` in a name becomes `-`, one at its end is
        dropped."""
        named = {
            name.rstrip("_").replace("_", "-"): f"{value:.2f}".rstrip("0").rstrip(".")
            if isinstance(value, float)
            else value
            for name, value in attributes.items()
        }
        self.shapes.append({"tag": tag, "title": title, "text": text, "attributes": named})

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> None:
        self.add("text", text=text, x=x, y=y, text_anchor=anchor, class_=kind)


def number(value: float) -> str:
    """A tick's text: 1,500 or 0.25."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """At most `count` + 1 round numbers from low to high, evenly spaced by 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) <= count)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def curve(
    label: str,
    points: Sequence[Point],
    *,
    mark: tuple[float, str] | None = None,
    smooth: int = 0,
    from_zero: bool = False,
    axis: str = "step",
) -> Chart:
    """A line through (x, y) with round numbers at its axes. mark: a vertical line at x, with its text.

    smooth: values of a running mean; where there are enough of them it is drawn strong and the values pale.
    from_zero: the vertical axis begins at 0 even when values are negative.
    """
    chart, left, right, top, bottom = Chart(460, 240, label), 58, 14, 14, 36
    xs, ys = zip(*points, strict=True)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = (0.0 if from_zero or min(ys) >= 0 else min(ys)), max(ys) * 1.15 or 1.0

    def at(x: float, y: float) -> Point:
        across = left + (x - x0) / (x1 - x0) * (chart.width - left - right)
        return across, chart.height - bottom - (y - y0) / ((y1 - y0) or 1) * (chart.height - top - bottom)

    def path(through: Sequence[Point], kind: str) -> None:
        chart.add(
            "path", d="M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in (at(*p) for p in through)), class_=kind
        )

    for y in ticks(y0, y1):
        a, b = at(x0, y)
        chart.line(a, b, chart.width - right, b, "axis")
        chart.text(a - 6, b + 4, number(y), "end")
    for x in ticks(x0, x1, 6):
        chart.text(at(x, y0)[0], chart.height - bottom + 16, number(x), "middle")
    chart.text(chart.width - right, chart.height - 4, axis, "end")
    if mark is not None:
        a = at(mark[0], y0)[0]
        chart.line(a, top, a, chart.height - bottom, "mark")
        before = a > chart.width * 0.6
        chart.text(a + (-5 if before else 5), top + 10, mark[1], "end" if before else "start")
    smoothed = bool(smooth) and len(ys) > 3 * smooth
    path(points, "raw" if smoothed else "curve")
    if smoothed:
        windows = [ys[max(0, i - smooth) : i + 1] for i in range(len(ys))]
        path([(x, sum(window) / len(window)) for x, window in zip(xs, windows, strict=True)], "curve")
    return chart


@dataclass(frozen=True)
class Bar:
    """A row of `bars`: sizes by kind, laid end to end, and their sum as text behind them."""

    name: str
    sizes: Mapping[str, float]
    total: float
    opacity: float = 1.0


def bars(
    label: str,
    rows: Sequence[Bar],
    colours: Mapping[str, str],
    limit: tuple[float, str],
    text: Callable[[float], str],
) -> Chart:
    """Stacked horizontal bars, kinds in the order of `colours`; limit: a vertical line at a size, with its
    text."""
    each, width = 34, 960
    chart = Chart(width, len(rows) * each + 24, label, wide=True)
    scale = (width - LEFT - 90) / (max([limit[0], *(row.total for row in rows)]) * 1.02)
    for at, row in enumerate(rows):
        x, y = float(LEFT), at * each + 6
        chart.text(0, y + 16, row.name, kind="label")
        for kind, colour in colours.items():
            size = row.sizes.get(kind, 0)
            wide = size * scale
            if wide >= 0.3:
                chart.add(
                    "rect",
                    f"{kind}: {text(size)}",
                    x=x,
                    y=y,
                    width=wide,
                    height=22,
                    fill=colour,
                    fill_opacity=row.opacity,
                )
            if wide >= 64:
                chart.text(x + wide / 2, y + 15, text(size), "middle", "inside")
            x += wide
        chart.text(x + 6, y + 16, text(row.total), kind="label")
    edge, foot = LEFT + limit[0] * scale, len(rows) * each + 4
    chart.line(edge, 0, edge, foot, "mark")
    chart.text(edge, foot + 14, limit[1], "end", "label")
    return chart


def areas(
    label: str,
    course: Sequence[Mapping[str, float]],
    colours: Mapping[str, str],
    text: Callable[[float], str],
    mark: tuple[int, str] | None = None,
) -> Chart:
    """Stacked areas over the events of `course`, kinds in the order of `colours`; mark: a line at an
    event."""
    height, width = 220, 960
    chart = Chart(width, height + 6, label, wide=True)
    peak = max(sum(held.values()) for held in course)
    top, step = max(peak * 1.05, 1), (width - LEFT) / (len(course) - 1)

    def at(event: int, value: float) -> str:
        return f"{LEFT + event * step:.1f},{height - value / top * height:.1f}"

    stacks = [list(accumulate((held.get(kind, 0) for kind in colours), initial=0.0)) for held in course]
    for n, (kind, colour) in enumerate(colours.items()):
        upper = [at(event, stack[n + 1]) for event, stack in enumerate(stacks)]
        lower = [at(event, stack[n]) for event, stack in enumerate(stacks)]
        if upper != lower:
            chart.add("polygon", kind, points=" ".join(upper + lower[::-1]), fill=colour)
    for share in (0.0, 0.5, 1.0):
        y = height - share * peak / top * height
        chart.text(0, min(y + 4, height), text(share * peak), kind="label")
        chart.line(LEFT, y, width, y, "faint")
    if mark is not None:
        x = LEFT + mark[0] * step
        chart.line(x, 0, x, height, "mark")
        chart.text(x - 4, 12, mark[1], "end", "label")
    return chart


@dataclass(frozen=True)
class Span:
    """A slot of `timeline`: from `start` to `end` (seconds) in a row; text stands inside where there is
    room."""

    row: int
    start: float
    end: float
    kind: str
    text: str
    title: str
    opacity: float = 1.0


def timeline(
    label: str, rows: Sequence[str], spans: Sequence[Span], seconds: float, colours: Mapping[str, str]
) -> Chart:
    """One row a worker, time to the right."""
    each, width = 26, 960
    chart, scale = Chart(width, len(rows) * each + 20, label, wide=True), (width - LEFT) / seconds
    for at, name in enumerate(rows):
        chart.text(0, at * each + 17, name, kind="label")
    for span in spans:
        x, wide = LEFT + span.start * scale, (span.end - span.start) * scale
        chart.add(
            "rect",
            span.title,
            x=x,
            y=span.row * each + 3,
            width=max(wide - 0.4, 0.3),
            height=each - 6,
            fill=colours[span.kind],
            fill_opacity=span.opacity,
        )
        if wide > 16:
            chart.text(x + wide / 2, span.row * each + 17, span.text, "middle", "inside")
    foot = len(rows) * each + 14
    chart.text(LEFT, foot, "0 s", kind="label")
    chart.text(width, foot, f"{seconds:.3g} s", "end", "label")
    return chart
