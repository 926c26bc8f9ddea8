"""`polymodal plan`: traces what a recipe's ranks would do on a cluster, and says it as text, JSON or a page.

Sees every room. Needs the checkpoint's config only, neither its weights nor data nor an accelerator.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from polymodal import machine
from polymodal.errors import PolymodalError
from polymodal.models import catalog
from polymodal.models.card import Family
from polymodal.parallel import apply as layout
from polymodal.parallel import cuts
from polymodal.parallel.mesh import ParallelSizes
from polymodal.plan import devices
from polymodal.plan.devices import Accelerator
from polymodal.plan.job import Load
from polymodal.plan.predict import Prediction, packs, per_rank, predict
from polymodal.plan.trace import trace
from polymodal.plan.tracker import KINDS
from polymodal.recipe import Recipe


@dataclass(frozen=True)
class Question:
    """What is asked beside the recipe: the cluster, what a micro-batch holds, and which ranks are traced."""

    world: int
    accelerator: Accelerator
    media: float = 0.25
    patches: int = 1024
    rank: int | None = None
    stage: int | None = None


def family_of(recipe: Recipe) -> Family:
    """The recipe's family from its config alone."""
    return catalog.family(recipe.model.model_copy(update={"init": "random"}))


def ranks_of(sizes: ParallelSizes, question: Question) -> list[int]:
    """The ranks that are traced: the first of each pipeline stage, or the one that is asked for. Raises PolymodalError."""
    each = sizes.world // sizes.pp
    if question.rank is not None:
        if not 0 <= question.rank < sizes.world:
            raise PolymodalError(
                f"--rank {question.rank} is outside 0..{sizes.world - 1}.", "Ranks are counted from 0."
            )
        return [question.rank]
    if question.stage is not None:
        if not 0 <= question.stage < sizes.pp:
            raise PolymodalError(
                f"--stage {question.stage} is outside 0..{sizes.pp - 1} (parallel.pp = {sizes.pp}).",
                "Stages are counted from 0.",
            )
        return [question.stage * each]
    return [stage * each for stage in range(sizes.pp)]


def under_way(recipe: Recipe, sizes: ParallelSizes, packed: bool) -> int:
    """Micro-batches that are traced: enough for a step's highest moment, few enough to be quick."""
    count, stages = per_rank(recipe, sizes, packed), sizes.pp * cuts.rounds(recipe.parallel)
    if sizes.pp == 1:
        return min(2, count)
    if recipe.parallel.pp_schedule == "GPipe":
        return count  # all are kept at once
    least = stages + 1 if recipe.parallel.pp_schedule == "1F1B" else 2 * stages
    return next(
        (
            n
            for n in range(min(least, count), count + 1)
            if cuts.micro_batches_fit(recipe.parallel.pp_schedule, sizes.pp, n)
        ),
        count,
    )


def plan(recipe: Recipe, family: Family, question: Question, progress: bool = False) -> Prediction:
    """Trace and predict. Raises PolymodalError for every layout that training would refuse."""
    sizes = ParallelSizes.of(recipe.parallel, question.world)
    for reason in layout.check(family.card, family.config, sizes, recipe.parallel, recipe.model.attention):
        raise reason
    compiled = recipe.parallel.compile
    if compiled:  # what a compiler makes of a block is not known without its device
        parallel = recipe.parallel.model_copy(update={"compile": False})
        recipe = recipe.model_copy(update={"parallel": parallel})
    load, packed = Load.of(recipe, family, question.media, question.patches), packs(recipe, family)
    load.batch(family)
    cuts.check_micro_batches(recipe.parallel, recipe.train, packed, sizes.dp)
    count = under_way(recipe, sizes, packed)
    traces = []
    for rank in ranks_of(sizes, question):
        if progress:
            print(f"tracing rank {rank} of {question.world} ...", file=sys.stderr, flush=True)
        traces.append(trace(recipe, family, question.world, rank, load, question.accelerator.name, count))
    made = predict(recipe, family, sizes, question.accelerator, traces, recipe.parallel.pp_schedule)
    if compiled:
        made.advice.append(
            "parallel.compile: blocks are planned as they run without it; compiled ones are faster and hold less."
        )
    return made


def text(made: Prediction) -> str:
    """The verdict for a terminal."""
    sizes, accelerator = made.sizes, made.accelerator
    axes = {
        "pp": sizes.pp, "dp_replicate": sizes.dp_replicate, "dp_shard": sizes.dp_shard, "cp": sizes.cp, "tp": sizes.tp, "ep": sizes.ep
    }  # fmt: skip
    layout = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one process"
    measure = made.stages[0].trace.measure
    samples = made.stages[0].trace.samples
    held = f"{len(measure.patches)} pictures of {measure.patches[0] if measure.patches else 0} patches"
    if made.uniform:
        held = f"{samples} x {' x '.join(map(str, measure.patches))} (frames, height, width)"
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
        f"  {verdict}: {machine.size(made.peak)} of {machine.size(made.room)} that {accelerator.name} can hand out",
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
        from polymodal.plan import search as room

        return room.main(recipe, family, question, as_json=as_json, out=out, base=base, html=html)
    made = plan(recipe, family, question, progress=sys.stderr.isatty())
    if html is not None:
        draw(made, html)
    print(json.dumps(made.as_dict(), indent=2) if as_json else text(made))
    return 0


def draw(made: Prediction, html: Path) -> None:
    """Write the page. Raises PolymodalError where it cannot be."""
    from polymodal.plan import page

    partial = html.with_name(f".{html.name}.partial")
    try:
        partial.write_text(page.page(made))
        os.replace(partial, html)
    except OSError as error:
        raise PolymodalError(f"--html {html} cannot be written: {error.strerror}.") from None


def question(
    world: int, device: str, media: float, patches: int, rank: int | None, stage: int | None
) -> Question:
    """The command line's options, checked. Raises PolymodalError."""
    if rank is not None and stage is not None:
        raise PolymodalError("--rank and --stage ask for different things.", "Give one of them.")
    return Question(world, devices.named(device), media, patches, rank, stage)
