"""One plan: what is asked beside the recipe, which ranks are traced, and the prediction that is made of them.

Sees every room. Needs the checkpoint's config only, neither its weights nor data nor an accelerator.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import catalog
from polymodal.models.family import Family
from polymodal.parallel import apply as layout
from polymodal.parallel import pipeline_split
from polymodal.plan import devices
from polymodal.plan.devices import Accelerator
from polymodal.plan.predict import Prediction, per_rank, predict
from polymodal.plan.trace import trace
from polymodal.recipe import Recipe
from polymodal.train.layouts import layout_of


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
    count, stages = (
        per_rank(recipe, sizes, packed),
        sizes.pp * pipeline_split.stages_per_rank(recipe.parallel),
    )
    if sizes.pp == 1:
        return min(2, count)
    if recipe.parallel.pp_schedule == "GPipe":
        return count  # all are kept at once
    least = stages + 1 if recipe.parallel.pp_schedule == "1F1B" else 2 * stages
    return next(
        (
            n
            for n in range(min(least, count), count + 1)
            if pipeline_split.micro_batches_fit(recipe.parallel.pp_schedule, sizes.pp, n)
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
    batches = layout_of(recipe, family)
    load, packed = batches.workload(question.media, question.patches), batches.packs
    batches.example(load)
    pipeline_split.check_micro_batches(recipe.parallel, recipe.train, packed, sizes.dp)
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


def question(
    world: int, device: str, media: float, patches: int, rank: int | None, stage: int | None
) -> Question:
    """The command line's options, checked. Raises PolymodalError."""
    if rank is not None and stage is not None:
        raise PolymodalError("--rank and --stage ask for different things.", "Give one of them.")
    return Question(world, devices.named(device), media, patches, rank, stage)
