"""A run as one self-contained page: curves from metrics.jsonl, and pictures with the answers before and after.

Sees nothing of the house but errors; no script, no network: charts are SVG, pictures are data URLs.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polymodal.errors import PolymodalError

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


@dataclass(frozen=True)
class Shown:
    """A held-out picture with its question, the expected answer, and the answers before and after training."""

    image: bytes
    question: str
    expected: str
    before: str
    after: str


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


def curves(metrics: list[dict], resumed_at: int | None = None) -> list[Curve]:
    """Loss, throughput and memory (and validation loss, when there is one) of a run."""

    def points(key: str) -> list[tuple[float, float]]:
        return [
            (m["step"], m[key])
            for m in metrics
            if isinstance(m.get(key), (int, float)) and math.isfinite(m[key])
        ]

    marked = {"mark": resumed_at, "mark_text": "stopped and resumed"} if resumed_at else {}
    charts = [
        Curve("Loss", "nats per answer token", points("loss"), smooth=15, **marked),
        Curve("Throughput", "tokens per second", points("tokens_per_second"), smooth=15, zero=True, **marked),
        Curve("Memory", "GiB, peak of one process", points("memory_gib"), zero=True, **marked),
        Curve("Validation loss", "nats per answer token", points("validation/loss"), **marked),
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
    if value and abs(value) >= 10000:
        return f"{value / 1000:.0f}k"
    return f"{value:.3g}"


def chart(curve: Curve) -> str:
    """SVG of one curve: raw values pale, running mean strong, axes with round numbers."""
    xs, ys = zip(*curve.points, strict=True)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = (0.0 if curve.zero or min(ys) >= 0 else min(ys)), max(ys) * 1.05 or 1.0

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
        parts.append(f'<line class="grid" x1="{a:.1f}" x2="{WIDTH - RIGHT}" y1="{b:.1f}" y2="{b:.1f}"/>')
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
        parts.append(f'<line class="mark" x1="{a:.1f}" x2="{a:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor = "end" if a > WIDTH * 0.6 else "start"
        parts.append(
            f'<text class="note" x="{a + (-5 if anchor == "end" else 5):.1f}" y="{TOP + 10}" text-anchor="{anchor}">{html.escape(curve.mark_text)}</text>'
        )
    smooth = curve.smooth and len(ys) > 3 * curve.smooth
    parts.append(f'<path class="{"raw" if smooth else "line"}" d="{path(curve.points)}"/>')
    if smooth:
        mean = [
            (x, sum(w) / len(w)) for i, x in enumerate(xs) for w in [ys[max(0, i - curve.smooth) : i + 1]]
        ]
        parts.append(f'<path class="line" d="{path(mean)}"/>')
    return "".join(parts) + "</svg>"


def _card(shown: Shown) -> str:
    picture = base64.b64encode(shown.image).decode()
    kind = "jpeg" if shown.image[:2] == b"\xff\xd8" else "png"

    def answer(label: str, text: str) -> str:
        right = text.strip() == shown.expected.strip()
        return f'<div class="answer {"right" if right else "wrong"}"><span>{label}</span> <b>{html.escape(text) or "&nbsp;"}</b> <i>{"right" if right else "wrong"}</i></div>'

    return (
        f'<figure><img alt="held-out picture" src="data:image/{kind};base64,{picture}"><figcaption>'
        f'<p>{html.escape(shown.question)}</p><div class="answer"><span>expected</span> <b>{html.escape(shown.expected)}</b></div>'
        f"{answer('before', shown.before)}{answer('after', shown.after)}</figcaption></figure>"
    )


STYLE = """
:root{--ink:#1c2330;--dim:#5b6577;--line:#e3e7ee;--paper:#fff;--tint:#f6f8fb;--blue:#1f5fbf;--pale:#b9cfee;--green:#1b7f4b;--red:#b3372f}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf1;--dim:#9aa5b8;--line:#2c3442;--paper:#12161d;--tint:#1a202a;--blue:#7fb0ff;--pale:#2f4a75;--green:#5fcf95;--red:#ff8d84}}
*{box-sizing:border-box}body{margin:0;font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
main{max-width:1040px;margin:0 auto;padding:32px 20px 56px}h1{font-size:28px;line-height:1.2;margin:0 0 8px}h2{font-size:19px;margin:36px 0 12px}
p.lead{color:var(--dim);margin:0 0 24px;max-width:70ch}.numbers{display:flex;flex-wrap:wrap;gap:12px 36px;margin:0;padding:18px 22px;background:var(--tint);border-radius:8px}
.numbers div{min-width:96px}.numbers dt{color:var(--dim);font-size:13px}.numbers dd{margin:0;font-size:24px;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:20px}.charts h3{font-size:15px;margin:0}.charts h3 small{color:var(--dim);font-weight:400}
svg{width:100%;height:auto;display:block}.grid{stroke:var(--line)}.tick,.note{font:11px system-ui,sans-serif;fill:var(--dim)}.mark{stroke:var(--dim);stroke-dasharray:4 3}
.line{fill:none;stroke:var(--blue);stroke-width:2;stroke-linejoin:round}.raw{fill:none;stroke:var(--pale);stroke-width:1}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:14px}figure{margin:0;border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure img{width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;background:#fff;display:block}figcaption{padding:10px 12px;font-size:14px}figcaption p{margin:0 0 6px;color:var(--dim);line-height:1.35}
.answer span{display:inline-block;width:66px;color:var(--dim)}.answer i{font-style:normal;font-size:12px}.right b,.right i{color:var(--green)}.wrong b,.wrong i{color:var(--red)}
pre{background:var(--tint);border-radius:8px;padding:14px 16px;overflow-x:auto;font-size:14px;line-height:1.45}ol{padding-left:22px}li{margin:0 0 10px}code{font-size:14px}
"""


def page(
    title: str,
    lead: str,
    numbers: dict[str, str],
    charts: Sequence[Curve],
    shown: Sequence[Shown] = (),
    steps: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole page. steps: (what to try next, the command)."""
    out = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p><dl class="numbers">'
    ]
    out += [f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in numbers.items()]
    out.append('</dl><h2>Training</h2><div class="charts">')
    out += [
        f"<section><h3>{html.escape(c.title)} <small>{html.escape(c.unit)}</small></h3>{chart(c)}</section>"
        for c in charts
    ]
    out.append("</div>")
    if shown:
        out.append('<h2>Held-out pictures</h2><div class="pictures">' + "".join(map(_card, shown)) + "</div>")
    if steps:
        out.append("<h2>What to try next</h2><ol>")
        out += [f"<li>{html.escape(text)}<pre>{html.escape(command)}</pre></li>" for text, command in steps]
        out.append("</ol>")
    return "".join(out) + "</main></body></html>\n"


def write(path: Path, text: str) -> Path:
    """Write the page whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
