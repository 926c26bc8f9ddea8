"""`polymodal plan`: traces what a recipe's ranks would do on a cluster, and says it as text, JSON or a page.

Sees every room.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from polymodal.core.errors import PolymodalError
from polymodal.core.text import format_bytes
from polymodal.plan import page
from polymodal.plan import search as searching
from polymodal.plan.planner import Question, family_of, plan
from polymodal.plan.predict import Prediction
from polymodal.plan.tracker import KINDS
from polymodal.recipe import Recipe
from polymodal.train.layouts import Workload


def text(made: Prediction) -> str:
    """The verdict for a terminal."""
    sizes, accelerator = made.sizes, made.accelerator
    axes = {
        "pp": sizes.pp, "dp_replicate": sizes.dp_replicate, "dp_shard": sizes.dp_shard, "cp": sizes.cp, "tp": sizes.tp, "ep": sizes.ep
    }  # fmt: skip
    layout = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one process"
    measure = made.stages[0].trace.measure
    samples = made.stages[0].trace.samples
    held = made.layout.describe(Workload(measure, samples))
    lines = [
        f"{sizes.world} x {accelerator.name}: {layout}, recompute {made.recipe.parallel.recompute}, {made.recipe.train.precision}",
        f"micro-batch: {measure.tokens * samples} tokens, {held}; {made.micro_batches} a data-parallel rank and step",
        "",
        f"{'GiB of a rank':<16}" + "".join(f"{f'stage {stage.trace.stage}':>12}" for stage in made.stages),
    ]
    for kind in KINDS:
        values = [stage.trace.usage.parts[kind] for stage in made.stages]
        if any(values):
            lines.append(f"  {kind:<14}" + "".join(f"{value / 2**30:>12.2f}" for value in values))
    lines.append(
        f"  {'peak':<14}" + "".join(f"{stage.trace.usage.peak / 2**30:>12.2f}" for stage in made.stages)
    )
    if made.host:
        lines.append(
            f"  {'on the host':<14}" + "".join(f"{s.trace.usage.host / 2**30:>12.2f}" for s in made.stages)
        )
    verdict = "fits" if made.fits else "does NOT fit"
    lines += [
        f"  {verdict}: {format_bytes(made.peak)} of {format_bytes(made.room)} that {accelerator.name} can hand out",
        "",
        "collectives of a micro-batch (stage, axes, kind, direction: calls, GiB)",
    ]
    for stage in made.stages:
        for traffic in sorted(stage.trace.traffic, key=lambda t: -t.bytes)[:12]:
            lines.append(
                f"  {stage.trace.stage}  {traffic.axes:<16} {traffic.kind:<15} {traffic.where:<9} {traffic.count:>6} {traffic.bytes / 2**30:>9.3f}"
            )
    lines += [
        "",
        f"step {made.step:.2f} s, {made.tokens:,.0f} tokens/s, MFU {made.mfu:.1%}"
        + (f", pipeline bubble {made.bubble:.1%}" if sizes.pp > 1 else ""),
        "times are a model: shares of peak are assumed, none was measured",
    ]
    lines += [f"- {sentence}" for sentence in made.advice]
    return "\n".join(lines)


def main(
    recipe: Recipe, question: Question, *, as_json: bool = False, html: Path | None = None, search: bool = False, out: Path | None = None,
    base: Path | None = None,
) -> int:  # fmt: skip
    """The command. Exit code 0 when the plan was made, also when it does not fit: the verdict is the answer."""
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
    print(json.dumps(made.as_dict(), indent=2) if as_json else text(made))
    return 0
