"""Charts as lists of SVG shapes: values become coordinates here, `chart` in templates/parts.html writes them.

Every function returns a `Chart` in its own units of length; the page scales it to its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

Point = tuple[float, float]
WIDE, LEFT = 960, 70
"""Width of charts as wide as the page; space in them for names of rows and numbers of an axis."""


@dataclass
class Chart:
    """Shapes on a canvas. wide: as wide as the page; it scrolls on a narrow screen instead of shrinking."""

    width: float
    height: float
    label: str
    wide: bool = False
    shapes: list[dict[str, Any]] = field(default_factory=list)

    def add(self, tag: str, title: str = "", text: str = "", **attributes: Any) -> None:
        """One SVG element. Floats are rounded; `_` in names becomes `-`, one at the end is dropped."""
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

    def block(
        self, x: float, y: float, width: float, height: float, colour: str, opacity: float, title: str
    ) -> None:
        self.add("rect", title, x=x, y=y, width=width, height=height, fill=colour, fill_opacity=opacity)


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
        corners = (at(*point) for point in through)
        chart.add("path", d="M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in corners), class_=kind)

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
    """Stacked horizontal bars, kinds ordered as in `colours`. limit: a vertical line at a size, its text."""
    each = 34
    foot = len(rows) * each + 4
    chart = Chart(WIDE, foot + 20, label, wide=True)
    scale = (WIDE - LEFT - 90) / (max([limit[0], *(row.total for row in rows)]) * 1.02)
    for at, row in enumerate(rows):
        x, y = float(LEFT), at * each + 6
        chart.text(0, y + 16, row.name, kind="label")
        for kind, colour in colours.items():
            size = row.sizes.get(kind, 0)
            width = size * scale
            if width >= 0.3:
                chart.block(x, y, width, 22, colour, row.opacity, f"{kind}: {text(size)}")
            if width >= 64:
                chart.text(x + width / 2, y + 15, text(size), "middle", "inside")
            x += width
        chart.text(x + 6, y + 16, text(row.total), kind="label")
    edge = LEFT + limit[0] * scale
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
    """Stacked areas over the events of `course`, kinds ordered as in `colours`. mark: a line at an event."""
    height = 220
    chart = Chart(WIDE, height + 6, label, wide=True)
    stacks = [list(accumulate((sizes.get(kind, 0) for kind in colours), initial=0.0)) for sizes in course]
    peak = max(sum(sizes.values()) for sizes in course)
    top, step = max(peak * 1.05, 1), (WIDE - LEFT) / (len(course) - 1)
    edges = [
        [
            f"{LEFT + event * step:.1f},{height - stack[n] / top * height:.1f}"
            for event, stack in enumerate(stacks)
        ]
        for n in range(len(colours) + 1)
    ]
    for (kind, colour), lower, upper in zip(colours.items(), edges[:-1], edges[1:], strict=True):
        if upper != lower:
            chart.add("polygon", kind, points=" ".join(upper + lower[::-1]), fill=colour)
    for value in (0.0, 0.5 * peak, peak):
        y = height - value / top * height
        chart.text(0, min(y + 4, height), text(value), kind="label")
        chart.line(LEFT, y, WIDE, y, "faint")
    if mark is not None:
        x = LEFT + mark[0] * step
        chart.line(x, 0, x, height, "mark")
        chart.text(x - 4, 12, mark[1], "end", "label")
    return chart


@dataclass(frozen=True)
class Span:
    """A slot of `timeline`, from `start` to `end` seconds; its text stands inside where it fits."""

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
    """A row for each worker, time to the right."""
    each = 26
    foot = len(rows) * each + 14
    chart, scale = Chart(WIDE, foot + 6, label, wide=True), (WIDE - LEFT) / seconds
    for at, name in enumerate(rows):
        chart.text(0, at * each + 17, name, kind="label")
    for span in spans:
        x, y, width = LEFT + span.start * scale, span.row * each + 3, (span.end - span.start) * scale
        chart.block(x, y, max(width - 0.4, 0.3), each - 6, colours[span.kind], span.opacity, span.title)
        if width > 16:
            chart.text(x + width / 2, y + 14, span.text, "middle", "inside")
    chart.text(LEFT, foot, "0 s", kind="label")
    chart.text(WIDE, foot, f"{seconds:.3g} s", "end", "label")
    return chart
