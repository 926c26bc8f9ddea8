"""The page of `plan --html`: a rank's memory over a step as stacked areas and bars, and the pipeline as a timeline.

This room may touch predict.py's types and errors only. One file without scripts or anything from elsewhere: SVG that prints too.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from polymodal.core.errors import PolymodalError
from polymodal.plan.predict import Prediction, Stage
from polymodal.plan.timeline import Timeline
from polymodal.plan.tracker import KINDS

COLOURS = {
    "parameters": "#4269d0", "gradients": "#efb118", "optimizer": "#6cc5b0", "average": "#3ca951", "encoders": "#ff8ab7", "gathered": "#97bbf5",
    "activations": "#ff725c", "communication": "#a463f2", "temporary": "#9c6b4e", "batch": "#9498a0",
}  # fmt: skip
ACTIONS = {"forward": "#4269d0", "backward": "#ff725c", "input": "#ffb3a7", "weight": "#efb118"}
WIDTH = 960
STYLE = """
:root { color-scheme: light dark; --line: #8884; --text: #222; --back: #fff; }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --back: #161616; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child, .facts td { text-align: left; } .facts td:first-child { padding-right: 2rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; } .good { color: #2a9d3a; } .bad { color: #d62728; }
svg text.in { fill: #fff; } p.note { margin: .3rem 0; font-size: 13px; opacity: .75; }
.key span { display: inline-block; margin-right: 1rem; } .key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
"""


def page(made: Prediction) -> str:
    """The whole page as HTML."""
    sizes = made.sizes
    layout = " x ".join(
        f"{axis} {size}"
        for axis, size in (("pp", sizes.pp), ("dp_replicate", sizes.dp_replicate), ("dp_shard", sizes.dp_shard), ("cp", sizes.cp), ("tp", sizes.tp), ("ep", sizes.ep))
        if size > 1
    )  # fmt: skip
    verdict = '<b class="good">It fits.</b>' if made.fits else '<b class="bad">It does not fit.</b>'
    facts = [
        ("layout", layout or "one process"),
        ("recompute", made.recipe.parallel.recompute),
        ("peak of the fullest rank", f"{_gib(made.peak)} of {_gib(made.room)} usable"),
        ("step", f"{made.step:.2f} s (a model, not a measurement)"),
        ("tokens a second", f"{made.tokens:,.0f}"),
        ("MFU", f"{made.mfu:.1%}"),
    ]
    if made.timeline is not None:
        facts.append(("pipeline bubble", f"{made.bubble:.1%}"))
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in made.advice)
    parts = [
        f"<h1>{escape(made.recipe.name)} on {sizes.world} x {escape(made.accelerator.name)}</h1>",
        f"<p>{verdict}</p><table class='facts'>{rows}</table>" + (f"<ul>{advice}</ul>" if advice else ""),
        "<h2>Memory of a rank at its peak</h2>",
        _key(
            {
                kind: COLOURS[kind]
                for kind in KINDS
                if any(
                    stage.trace.usage.parts[kind] or stage.trace.usage.host_parts.get(kind)
                    for stage in made.stages
                )
            }
        ),
        _bars(made),
    ]
    if made.timeline is not None:
        note = "A row is a rank, a number a micro-batch; a rank's later virtual stages are paler; gaps are the bubble."
        parts += [
            "<h2>The pipeline's step</h2>", _key(_used(made.timeline)), _gantt(made.timeline), f'<p class="note">{note}</p>'
        ]  # fmt: skip
    for stage in made.stages:
        parts += [
            f"<h2>Stage {stage.trace.stage}: memory over a step of {stage.trace.micro_batches} micro-batches</h2>",
            _course(stage, made.room),
            _collectives(stage),
        ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>plan: {escape(made.recipe.name)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _key(colours: dict[str, str]) -> str:
    spans = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items()
    )
    return f'<p class="key">{spans}</p>'


def _bars(made: Prediction) -> str:
    """One horizontal bar a stage, one below it for the host where something lies there; the device's usable memory as a
    line."""
    left, height = 70, 34
    rows = []
    for stage in made.stages:
        usage = stage.trace.usage
        rows.append((f"stage {stage.trace.stage}", usage.parts, usage.peak, 1.0))
        if made.host:
            rows.append(("its host", usage.host_parts, usage.host, 0.55))
    widest = max(made.room, made.peak, made.host) * 1.02
    scale = (WIDTH - left - 90) / widest
    out = []
    for row, (name, kinds, whole, pale) in enumerate(rows):
        x, y = float(left), row * height + 6
        out.append(f'<text x="0" y="{y + 16}">{name}</text>')
        for kind in KINDS:
            size = kinds.get(kind, 0)
            wide = size * scale
            if wide >= 0.3:
                out.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="22" fill="{COLOURS[kind]}" fill-opacity="{pale}"><title>{kind}: {_gib(size)}</title></rect>'
                )
            if wide >= 64:
                out.append(
                    f'<text class="in" x="{x + wide / 2:.1f}" y="{y + 15}" text-anchor="middle">{_gib(size)}</text>'
                )
            x += wide
        out.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{_gib(whole)}</text>')
    bottom = len(rows) * height + 4
    edge = left + made.room * scale
    out.append(
        f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="{bottom}" stroke="currentColor" stroke-dasharray="4 3"/>'
    )
    out.append(
        f'<text x="{edge:.1f}" y="{bottom + 14}" text-anchor="end">a device can hand out {_gib(made.room)}</text>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {bottom + 20}">{"".join(out)}</svg>'  # fmt: skip


def _course(stage: Stage, room: float) -> str:
    """Stacked areas over the events of a step."""
    course = stage.trace.usage.course
    if len(course) < 2:
        return ""
    height, left = 220, 70
    top = max(stage.trace.usage.peak * 1.05, 1)
    step = (WIDTH - left) / (len(course) - 1)
    base = [0.0] * len(course)
    out = []
    for kind in KINDS:
        upper = [below + held[kind] for below, (_, held) in zip(base, course, strict=True)]
        if any(held[kind] for _, held in course):
            there = [
                f"{left + i * step:.1f},{height - value / top * height:.1f}" for i, value in enumerate(upper)
            ]
            back = [
                f"{left + i * step:.1f},{height - value / top * height:.1f}" for i, value in enumerate(base)
            ]
            out.append(
                f'<polygon points="{" ".join(there + back[::-1])}" fill="{COLOURS[kind]}"><title>{kind}</title></polygon>'
            )
        base = upper
    for share in (0.0, 0.5, 1.0):
        y = height - share * stage.trace.usage.peak / top * height
        out.append(f'<text x="0" y="{min(y + 4, height):.0f}">{_gib(share * stage.trace.usage.peak)}</text>')
        out.append(
            f'<line x1="{left}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-opacity=".25"/>'
        )
    last = next((i for i, (phase, _) in enumerate(course) if phase.endswith("update")), None)
    if last is not None:
        x = left + last * step
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="currentColor" stroke-dasharray="3 3"/>'
        )
        out.append(f'<text x="{x - 4:.1f}" y="12" text-anchor="end">optimizer</text>')
    return f'<svg viewBox="0 0 {WIDTH} {height + 6}">{"".join(out)}</svg>'  # fmt: skip


def _used(timeline: Timeline) -> dict[str, str]:
    kinds = {slot.kind for slot in timeline.slots}
    return {kind: colour for kind, colour in ACTIONS.items() if kind in kinds}


def _gantt(timeline: Timeline) -> str:
    """One row a pipeline rank; numbers are micro-batches, later virtual stages are paler."""
    left, height = 70, 26
    ranks = 1 + max(slot.rank for slot in timeline.slots)
    scale = (WIDTH - left) / timeline.seconds
    lowest = {rank: min(s.stage for s in timeline.slots if s.rank == rank) for rank in range(ranks)}
    out = []
    for rank in range(ranks):
        out.append(f'<text x="0" y="{rank * height + 17}">rank {rank}</text>')
    for slot in timeline.slots:
        x, wide = left + slot.start * scale, (slot.end - slot.start) * scale
        pale = 1.0 if slot.stage == lowest[slot.rank] else 0.6
        title = f"<title>stage {slot.stage}, micro-batch {slot.micro_batch}, {slot.kind}: {slot.start:.4g} to {slot.end:.4g} s</title>"
        out.append(
            f'<rect x="{x:.2f}" y="{slot.rank * height + 3}" width="{max(wide - 0.4, 0.3):.2f}" height="{height - 6}" fill="{ACTIONS[slot.kind]}" fill-opacity="{pale}">{title}</rect>'
        )
        if wide > 16:
            out.append(
                f'<text x="{x + wide / 2:.1f}" y="{slot.rank * height + 17}" text-anchor="middle" style="fill:#fff">{slot.micro_batch}</text>'
            )
    bottom = ranks * height
    out.append(
        f'<text x="{left}" y="{bottom + 14}">0 s</text><text x="{WIDTH}" y="{bottom + 14}" text-anchor="end">{timeline.seconds:.3g} s</text>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {bottom + 20}">{"".join(out)}</svg>'  # fmt: skip


def _collectives(stage: Stage) -> str:
    rows = "".join(
        f"<tr><td>{escape(t.axes)}</td><td>{t.kind}</td><td>{t.where}</td><td>{len(t.ranks)}</td><td>{t.count}</td><td>{_gib(t.bytes)}</td></tr>"
        for t in sorted(stage.trace.traffic, key=lambda t: -t.bytes)
    )
    if not rows:
        return ""
    head = "<tr><th>axes</th><th>collective</th><th>when</th><th>ranks</th><th>calls</th><th>bytes</th></tr>"
    return f"<details><summary>collectives of one micro-batch and of the update</summary><table>{head}{rows}</table></details>"


def write(made: Prediction, html: Path) -> None:
    """The page as a file. Raises PolymodalError where it cannot be."""
    partial = html.with_name(f".{html.name}.partial")
    try:
        partial.write_text(page(made))
        os.replace(partial, html)
    except OSError as error:
        raise PolymodalError(f"--html {html} cannot be written: {error.strerror}.") from None
