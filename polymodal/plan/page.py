"""The page of `plan --html`: a rank's memory over a step as stacked areas and bars, and the pipeline as a
timeline."""

from __future__ import annotations

from pathlib import Path

from polymodal import pages
from polymodal.core.text import format_bytes
from polymodal.pages import charts
from polymodal.plan.predict import Prediction, Stage
from polymodal.plan.timeline import Timeline
from polymodal.plan.tracker import KINDS

COLOURS = {
    "parameters": "#4269d0", "gradients": "#efb118", "optimizer": "#6cc5b0", "average": "#3ca951", "encoders": "#ff8ab7", "gathered": "#97bbf5",
    "activations": "#ff725c", "communication": "#a463f2", "temporary": "#9c6b4e", "batch": "#9498a0",
}  # fmt: skip
ACTIONS = {"forward": "#4269d0", "backward": "#ff725c", "input": "#ffb3a7", "weight": "#efb118"}


def page(made: Prediction) -> str:
    """The whole page as HTML."""
    sizes = made.sizes
    layout = " x ".join(
        f"{axis} {getattr(sizes, axis)}"
        for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
        if getattr(sizes, axis) > 1
    )
    facts = [
        ("layout", layout or "one process"),
        ("recompute", made.recipe.parallel.recompute),
        ("peak of the fullest rank", f"{format_bytes(made.peak)} of {format_bytes(made.room)} usable"),
        ("step", f"{made.step:.2f} s (a model, not a measurement)"),
        ("tokens a second", f"{made.tokens:,.0f}"),
        ("MFU", f"{made.mfu:.1%}"),
    ]
    if made.timeline is not None:
        facts.append(("pipeline bubble", f"{made.bubble:.1%}"))
    usages = [stage.trace.usage for stage in made.stages]
    kinds = {
        kind: COLOURS[kind]
        for kind in KINDS
        if any(usage.parts[kind] or usage.host_parts.get(kind) for usage in usages)
    }
    passes = {slot.kind for slot in made.timeline.slots} if made.timeline is not None else set()
    return pages.render(
        "plan.html",
        title=f"{made.recipe.name} on {sizes.world} x {made.accelerator.name}",
        lead="",
        fits=made.fits,
        facts=facts,
        advice=made.advice,
        kinds=kinds,
        memory=_memory(made, kinds),
        passes={kind: colour for kind, colour in ACTIONS.items() if kind in passes},
        pipeline=_pipeline(made.timeline) if made.timeline is not None else None,
        stages=[_stage(stage) for stage in made.stages],
    )


def _memory(made: Prediction, kinds: dict[str, str]) -> charts.Chart:
    """A bar a stage, below it one for the host where something lies there."""
    rows = []
    for stage in made.stages:
        usage = stage.trace.usage
        rows.append(charts.Bar(f"stage {stage.trace.stage}", usage.parts, usage.peak))
        if made.host:
            rows.append(charts.Bar("its host", usage.host_parts, usage.host, 0.55))
    limit = (made.room, f"a device can hand out {format_bytes(made.room)}")
    return charts.bars("Memory of a rank at its peak", rows, kinds, limit, format_bytes)


def _stage(stage: Stage) -> dict:
    """What the template shows of a stage: its memory over a step, and its collectives."""
    trace = stage.trace
    title = f"Stage {trace.stage}: memory over a step of {trace.micro_batches} micro-batches"
    course = trace.usage.course
    update = next((i for i, (phase, _) in enumerate(course) if phase.endswith("update")), None)
    drawn = None
    if len(course) > 1:
        mark = None if update is None else (update, "optimizer")
        drawn = charts.areas(
            title, [held for _, held in course], {k: COLOURS[k] for k in KINDS}, format_bytes, mark
        )
    rows = [
        (t.axes, t.kind, t.where, len(t.ranks), t.count, format_bytes(t.bytes))
        for t in sorted(trace.traffic, key=lambda t: -t.bytes)
    ]
    traffic = pages.Table(("axes", "collective", "when", "ranks", "calls", "bytes"), rows)
    return {"title": title, "course": drawn, "traffic": traffic}


def _pipeline(timeline: Timeline) -> charts.Chart:
    """One row a pipeline rank; numbers are micro-batches, later virtual stages are paler."""
    ranks = 1 + max(slot.rank for slot in timeline.slots)
    lowest = [min(s.stage for s in timeline.slots if s.rank == rank) for rank in range(ranks)]
    spans = [
        charts.Span(
            s.rank,
            s.start,
            s.end,
            s.kind,
            str(s.micro_batch),
            f"stage {s.stage}, micro-batch {s.micro_batch}, {s.kind}: {s.start:.4g} to {s.end:.4g} s",
            1.0 if s.stage == lowest[s.rank] else 0.6,
        )
        for s in timeline.slots
    ]
    rows = [f"rank {rank}" for rank in range(ranks)]
    return charts.timeline("The pipeline's step", rows, spans, timeline.seconds, ACTIONS)


def write(made: Prediction, html: Path) -> None:
    """The page as a file. Raises PolymodalError where it cannot be."""
    pages.write(html, page(made), "Choose another file with --html.")
