"""A run as one self-contained page: numbers, curves from metrics.jsonl, pictures with answers, what to try next.

Sees errors and the parts of evaluate/report.py (page, grid, thumbnail); charts are SVG made here, without scripts.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.evaluate import report as parts

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 36


@dataclass(frozen=True)
class Curve:
    """One chart: points (step, value); `mark` draws a vertical line at a step; `smooth` adds a running mean."""

    title: str
    unit: str
    points: Sequence[tuple[float, float]]
    mark: float | None = None
    mark_text: str = ""
    smooth: int = 0
    zero: bool = False


def read_metrics(run: Path) -> list[dict]:
    """Lines of metrics.jsonl. Raises PolymodalError when the run has none."""
    path = Path(run) / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise PolymodalError(
            f"{run} has no metrics.jsonl.", "Give the directory of a run (checkpoint.dir of its recipe)."
        ) from None
    except ValueError as error:
        raise PolymodalError(f"{path} is damaged: {error}.") from None


SHEETS = 12
"""Sheets of samples on a page at most: the first, the last, and evenly between."""


def drawn(run: Path) -> list[tuple[int, Path]]:
    """(step, contact sheet) of what a generating model drew while it trained (evaluate.samples), by step."""
    found = sorted(Path(run).glob("samples/step-*/sheet.png"))
    steps = [(int(sheet.parent.name.removeprefix("step-")), sheet) for sheet in found]
    if len(steps) > SHEETS:
        steps = [steps[round(i * (len(steps) - 1) / (SHEETS - 1))] for i in range(SHEETS)]
    return steps


def of_generation(run: Path, prompts: Sequence[str], resumed_at: int | None = None) -> str:
    """The page of a generating model that trains: its curves, and what it drew of its prompts so far."""
    metrics = read_metrics(run)
    last = metrics[-1] if metrics else {}
    numbers = {"step": str(last.get("step", 0)), "loss": _number(float(last.get("loss", math.nan)))}
    lead = "Samples: " + " | ".join(prompts)
    return page(
        Path(run).name, lead, numbers, curves(metrics, resumed_at, "mean squared error"), drawn=drawn(run)
    )


def curves(
    metrics: list[dict], resumed_at: int | None = None, unit: str = "nats per answer token"
) -> list[Curve]:
    """Loss (in `unit`), throughput and memory (and validation loss, when there is one) of a run."""

    def points(key: str) -> list[tuple[float, float]]:
        return [
            (m["step"], m[key])
            for m in metrics
            if isinstance(m.get(key), (int, float)) and math.isfinite(m[key])
        ]

    marked: dict[str, Any] = {"mark": resumed_at, "mark_text": "stopped and resumed"} if resumed_at else {}
    charts = [
        Curve("Loss", unit, points("loss"), smooth=15, **marked),
        Curve("Throughput", "tokens per second", points("tokens_per_second"), smooth=15, zero=True, **marked),
        Curve("Memory", "GiB, peak of one process", points("memory_gib"), zero=True, **marked),
        Curve("Validation loss", unit, points("validation/loss"), **marked),
    ]
    return [c for c in charts if c.points]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= count:
            step *= factor
            break
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def chart(curve: Curve) -> str:
    """SVG of one curve: raw values pale, running mean strong, axes with round numbers."""
    xs, ys = zip(*curve.points, strict=True)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = (0.0 if curve.zero or min(ys) >= 0 else min(ys)), max(ys) * 1.15 or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM),
        )

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(
            f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(at(*p) for p in points)
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(curve.title)}">']
    for y in _ticks(y0, y1):
        a, b = at(x0, y)
        parts.append(f'<line class="axis" x1="{a:.1f}" x2="{WIDTH - RIGHT}" y1="{b:.1f}" y2="{b:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{a - 6:.1f}" y="{b + 4:.1f}" text-anchor="end">{_number(y)}</text>'
        )
    for x in _ticks(x0, x1, 6):
        a, b = at(x, y0)
        parts.append(
            f'<text class="tick" x="{a:.1f}" y="{b + 16:.1f}" text-anchor="middle">{_number(x)}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    if curve.mark is not None:
        a, _ = at(curve.mark, y0)
        parts.append(f'<line class="stop" x1="{a:.1f}" x2="{a:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor = "end" if a > WIDTH * 0.6 else "start"
        parts.append(
            f'<text class="tick" x="{a + (-5 if anchor == "end" else 5):.1f}" y="{TOP + 10}" text-anchor="{anchor}">{html.escape(curve.mark_text)}</text>'
        )
    smooth = curve.smooth and len(ys) > 3 * curve.smooth
    parts.append(f'<path class="{"raw" if smooth else "curve"}" d="{path(curve.points)}"/>')
    if smooth:
        mean = [
            (x, sum(w) / len(w)) for i, x in enumerate(xs) for w in [ys[max(0, i - curve.smooth) : i + 1]]
        ]
        parts.append(f'<path class="curve" d="{path(mean)}"/>')
    return "".join(parts) + "</svg>"


STYLE = """
.numbers{display:flex;flex-wrap:wrap;gap:12px 36px;margin:16px 0;padding:16px 20px;background:var(--card);border-radius:8px}.numbers dt{color:var(--dim);font-size:13px}
.numbers dd{margin:0;font-size:24px;font-variant-numeric:tabular-nums}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:20px}
.charts h3{font-size:15px;margin:0}.charts h3 small{color:var(--dim);font-weight:400}.charts svg{width:100%;height:auto;display:block}.axis{stroke:var(--line)}
.tick{font:11px system-ui,sans-serif;fill:var(--dim)}.stop{stroke:var(--dim);stroke-dasharray:4 3}.curve{fill:none;stroke:#2f6fd6;stroke-width:2;stroke-linejoin:round}
.raw{fill:none;stroke:#2f6fd6;stroke-opacity:.3}.next pre{background:var(--card);border-radius:8px;padding:12px 14px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px}.next li{margin-bottom:8px}
.drawn{display:flex;flex-wrap:wrap;gap:16px}.drawn figure{margin:0}.drawn img{max-width:100%;border-radius:4px}.drawn figcaption{color:var(--dim);font-size:13px}
"""


def page(
    title: str,
    lead: str,
    numbers: Mapping[str, str],
    charts: Sequence[Curve],
    shown: Sequence[parts.Shown] = (),
    steps: Sequence[tuple[str, str]] = (),
    drawn: Sequence[tuple[int, Path]] = (),
) -> str:
    """The whole page. shown: held-out pictures; steps: (what to try next, the command); drawn: (step, sheet of samples)."""
    figures = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in numbers.items()
    )
    charted = "".join(
        f"<section><h3>{html.escape(c.title)} <small>{html.escape(c.unit)}</small></h3>{chart(c)}</section>"
        for c in charts
    )
    sections = [
        f'<style>{STYLE}</style><dl class="numbers">{figures}</dl>',
        f'<h2>Training</h2><div class="charts">{charted}</div>',
    ]
    if drawn:
        sheets = "".join(
            f"<figure>{parts.thumbnail(str(sheet), 900)}<figcaption>step {step}</figcaption></figure>"
            for step, sheet in drawn
        )
        sections.append(f'<h2>Samples while it trained</h2><div class="drawn">{sheets}</div>')
    if shown:
        sections.append("<h2>Held-out pictures</h2>" + parts.grid(shown))
    if steps:
        items = "".join(f"<li>{html.escape(t)}<pre>{html.escape(c)}</pre></li>" for t, c in steps)
        sections.append(f'<h2>What to try next</h2><ol class="next">{items}</ol>')
    return parts.page(title, sections, lead)


def write(path: Path, text: str) -> Path:
    """Write the page whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
