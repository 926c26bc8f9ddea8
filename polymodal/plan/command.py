"""`polymodal plan`: traces what a recipe's ranks would do on a cluster, and prints it as text, JSON or a
page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say_lines
from polymodal.core.text import format_bytes
from polymodal.plan import page
from polymodal.plan import search as searching
from polymodal.plan.planner import Question, family_of, plan
from polymodal.plan.predict import Prediction
from polymodal.plan.tracker import KINDS
from polymodal.recipe import Recipe


def text(made: Prediction) -> str:
    """The prediction for a terminal."""
    sizes, accelerator, recipe = made.sizes, made.accelerator, made.recipe
    traces = [stage.trace for stage in made.stages]
    load = traces[0].load

    def row(name: str, values: Iterable[float]) -> str:
        return f"  {name:<14}" + "".join(f"{value / 2**30:>12.2f}" for value in values)

    lines = [
        f"{sizes.world} x {accelerator.name}: {made.axes}, recompute {recipe.parallel.recompute}, "
        f"{recipe.train.precision}",
        f"micro-batch: {load.measure.tokens * load.samples} tokens, {made.layout.describe(load)}; "
        f"{made.micro_batches} a data-parallel rank and step",
        "",
        f"{'GiB of a rank':<16}" + "".join(f"{f'stage {trace.stage}':>12}" for trace in traces),
    ]
    for kind in KINDS:
        if any(trace.usage.parts[kind] for trace in traces):
            lines.append(row(kind, (trace.usage.parts[kind] for trace in traces)))
    lines.append(row("peak", (trace.usage.peak for trace in traces)))
    if made.host:
        lines.append(row("on the host", (trace.usage.host for trace in traces)))
    if made.saving:
        lines.append(row("host, saving", (trace.saving for trace in traces)))
    usable = format_bytes(accelerator.usable_memory)
    lines += [
        f"  {'fits' if made.fits else 'does NOT fit'}: {format_bytes(made.peak)} of {usable} that "
        f"{accelerator.name} can hand out",
        "",
        "collectives of a micro-batch (stage, axes, kind, direction: calls, GiB)",
    ]
    for trace in traces:
        for each in sorted(trace.traffic, key=lambda t: -t.bytes)[:12]:
            lines.append(
                f"  {trace.stage}  {each.axes:<16} {each.kind:<15} {each.where:<9} {each.count:>6} "
                f"{each.bytes / 2**30:>9.3f}"
            )
    bubble = f", pipeline bubble {made.bubble:.1%}" if sizes.pp > 1 else ""
    lines += [
        "",
        f"step {made.step:.2f} s, {made.tokens:,.0f} tokens/s, MFU {made.mfu:.1%}{bubble}",
        "times are a model: shares of peak are assumed, none was measured",
        *(f"- {sentence}" for sentence in made.advice),
    ]
    return "\n".join(lines)


def main(
    recipe: Recipe,
    question: Question,
    *,
    as_json: bool = False,
    html: Path | None = None,
    search: bool = False,
    out: Path | None = None,
    base: Path | None = None,
) -> int:
    """The command. Exit code 0 when the plan was made, also when the run does not fit."""
    if search and (question.rank is not None or question.stage is not None):
        raise PolymodalError("--search traces all stages of a layout.", "Leave out --rank and --stage.")
    if out is not None and not search:
        raise PolymodalError("-o names the recipe that --search writes.", "Add --search, or leave -o out.")
    family = family_of(recipe)
    if search:
        return searching.main(recipe, family, question, as_json=as_json, out=out, base=base, html=html)
    made = plan(recipe, family, question, progress=sys.stderr.isatty())
    if html is not None:
        page.write(made, html)
    say_lines(json.dumps(made.as_dict(), indent=2) if as_json else text(made), "\n")
    return 0
