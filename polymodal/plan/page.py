"""The page of `plan --html`: a rank's memory over a step as areas and bars, and the pipeline as a
timeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polymodal import pages
from polymodal.core.text import format_bytes
from polymodal.pages import charts
from polymodal.plan.predict import Prediction, Stage
from polymodal.plan.timeline import Timeline

COLOURS = {
    "parameters": "#4269d0",
    "gradients": "#efb118",
    "optimizer": "#6cc5b0",
    "average": "#3ca951",
    "encoders": "#ff8ab7",
    "gathered": "#97bbf5",
    "activations": "#ff725c",
    "communication": "#a463f2",
    "temporary": "#9c6b4e",
    "batch": "#9498a0",
}
ACTIONS = {"forward": "#4269d0", "backward": "#ff725c", "input": "#ffb3a7", "weight": "#efb118"}


def page(made: Prediction) -> str:
    """The whole page as HTML."""
    usable = format_bytes(made.accelerator.usable_memory)
    facts = [
        ("layout", made.axes),
        ("recompute", made.recipe.parallel.recompute),
        ("peak of the fullest rank", f"{format_bytes(made.peak)} of {usable} usable"),
        ("step", f"{made.step:.2f} s (a model, not a measurement)"),
        ("tokens a second", f"{made.tokens:,.0f}"),
        ("MFU", f"{made.mfu:.1%}"),
    ]
    if made.saving:
        facts.append(("host while a checkpoint is saved", f"{format_bytes(made.saving)} a rank"))
    if made.timeline is not None:
        facts.append(("pipeline bubble", f"{made.bubble:.1%}"))
    usages = [stage.trace.usage for stage in made.stages]
    held = {
        kind for usage in usages for parts in (usage.parts, usage.host_parts) for kind in parts if parts[kind]
    }
    kinds = {kind: colour for kind, colour in COLOURS.items() if kind in held}
    passes = {slot.kind for slot in made.timeline.slots} if made.timeline is not None else set()
    return pages.render(
        "plan.html",
        title=f"{made.recipe.name} on {made.sizes.world} x {made.accelerator.name}",
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
    """A bar for every stage, below it one for its host where something is there."""
    bars = []
    for stage in made.stages:
        usage = stage.trace.usage
        bars.append(charts.Bar(f"stage {stage.trace.stage}", usage.parts, usage.peak))
        if made.host:
            bars.append(charts.Bar("its host", usage.host_parts, usage.host, 0.55))
    usable = made.accelerator.usable_memory
    limit = (usable, f"a device can hand out {format_bytes(usable)}")
    return charts.bars("Memory of a rank at its peak", bars, kinds, limit, format_bytes)


def _stage(stage: Stage) -> dict[str, Any]:
    """What the template shows of a stage: its memory over a step, and its collectives."""
    trace = stage.trace
    title = f"Stage {trace.stage}: memory over a step of {trace.micro_batches} micro-batches"
    course = trace.usage.course
    chart = None
    if len(course) > 1:
        update = next((i for i, (phase, _) in enumerate(course) if phase.endswith("update")), None)
        mark = None if update is None else (update, "optimizer")
        chart = charts.areas(title, [parts for _, parts in course], COLOURS, format_bytes, mark)
    rows = [
        (each.axes, each.kind, each.where, len(each.ranks), each.count, format_bytes(each.bytes))
        for each in sorted(trace.traffic, key=lambda traffic: -traffic.bytes)
    ]
    traffic = pages.Table(("axes", "collective", "when", "ranks", "calls", "bytes"), rows)
    return {"title": title, "course": chart, "traffic": traffic}


def _pipeline(timeline: Timeline) -> charts.Chart:
    """A row for every pipeline rank; numbers are micro-batches, later virtual stages are paler."""
    first_stage: dict[int, int] = {}
    for slot in timeline.slots:
        first_stage[slot.rank] = min(slot.stage, first_stage.get(slot.rank, slot.stage))
    spans = []
    for slot in timeline.slots:
        when = f"{slot.start:.4g} to {slot.end:.4g} s"
        title = f"stage {slot.stage}, micro-batch {slot.micro_batch}, {slot.kind}: {when}"
        opacity = 1.0 if slot.stage == first_stage[slot.rank] else 0.6
        number = str(slot.micro_batch)
        spans.append(charts.Span(slot.rank, slot.start, slot.end, slot.kind, number, title, opacity))
    rows = [f"rank {rank}" for rank in sorted(first_stage)]
    return charts.timeline("The pipeline's step", rows, spans, timeline.seconds, ACTIONS)


def write(made: Prediction, html: Path) -> None:
    """The page as a file. Raises PolymodalError where it cannot be written."""
    pages.write(html, page(made), "Choose another file with --html.")
