"""One plan: what is asked beside the recipe, which ranks are traced, and the prediction made of them.

Needs the checkpoint's config only, neither its weights nor data nor an accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import catalog
from polymodal.models.family import Family
from polymodal.parallel import apply, pipeline_split
from polymodal.plan.accelerators import Accelerator
from polymodal.plan.predict import Prediction, predict
from polymodal.plan.trace import trace
from polymodal.recipe import Recipe
from polymodal.train.layouts import Layout, Workload, layout_of
from polymodal.train.layouts.base import SOUND_FRAMES


@dataclass(frozen=True)
class Question:
    """What is asked beside the recipe: the cluster, the pictures and the sound of a micro-batch (shares of
    its tokens, patches of a picture, mel frames of a sound), and which rank is traced (None: the first of
    each pipeline stage)."""

    world: int
    accelerator: Accelerator
    media: float = 0.25
    patches: int = 1024
    sound: float = 0.25
    frames: int = SOUND_FRAMES
    rank: int | None = None
    stage: int | None = None

    def load(self, layout: Layout) -> Workload:
        """A micro-batch of a recipe's layout."""
        return layout.workload(self.media, self.patches, self.sound, self.frames)

    def __post_init__(self) -> None:
        if self.rank is not None and self.stage is not None:
            raise PolymodalError("--rank and --stage ask for different things.", "Give one of them.")


def family_of(recipe: Recipe) -> Family:
    """The recipe's family from its config alone; of a published size that is not here from its card's."""
    asked = recipe.model.model_copy(update={"init": "random"})
    known = catalog.named(asked.source)
    try:
        return catalog.family(asked)
    except PolymodalError:
        family = catalog.published(*known) if known else None
        if family is None:
            raise
    family.config = catalog.override(family.config, asked.config)
    family.attention, family.experts = asked.attention, asked.experts
    family.check()
    return family


def traced_ranks(sizes: ParallelSizes, question: Question) -> list[int]:
    """Raises PolymodalError for a rank or stage that there is not."""
    each = sizes.world // sizes.pp
    rank, stage = question.rank, question.stage
    if rank is not None and not 0 <= rank < sizes.world:
        raise PolymodalError(f"--rank {rank} is outside 0..{sizes.world - 1}.", "Ranks are counted from 0.")
    if stage is not None and not 0 <= stage < sizes.pp:
        raise PolymodalError(
            f"--stage {stage} is outside 0..{sizes.pp - 1} (parallel.pp = {sizes.pp}).",
            "Stages are counted from 0.",
        )
    if rank is not None:
        return [rank]
    return [at * each for at in (range(sizes.pp) if stage is None else [stage])]


def traced_micro_batches(recipe: Recipe, sizes: ParallelSizes, packed: bool) -> int:
    """Enough for a step's highest moment, few enough to be quick."""
    parallel, count = recipe.parallel, pipeline_split.micro_batches(recipe.train, packed, sizes.dp)
    if sizes.pp == 1:
        return min(2, count)
    if parallel.pp_schedule == "GPipe":
        return count  # all are kept at once
    stages = sizes.pp * pipeline_split.stages_per_rank(parallel)
    least = min(count, stages + 1 if parallel.pp_schedule == "1F1B" else 2 * stages)
    numbers = range(least, count + 1)
    fitting = (n for n in numbers if pipeline_split.micro_batches_fit(parallel.pp_schedule, sizes.pp, n))
    return next(fitting, count)


def plan(recipe: Recipe, family: Family, question: Question, progress: bool = False) -> Prediction:
    """Trace and predict. Raises PolymodalError for every layout that training would refuse."""
    sizes = ParallelSizes.of(recipe.parallel, question.world)
    for reason in apply.check(family.card, family.config, sizes, recipe.parallel, recipe.model):
        raise reason
    compiled = recipe.parallel.compile
    if compiled:  # what a compiler makes of a block is not known without its device
        parallel = recipe.parallel.model_copy(update={"compile": False})
        recipe = recipe.model_copy(update={"parallel": parallel})
    layout = layout_of(recipe, family)
    load = question.load(layout)
    layout.example(load)  # raises for a family that cannot tell
    pipeline_split.check_micro_batches(recipe.parallel, recipe.train, layout.packs, sizes.dp)
    count = traced_micro_batches(recipe, sizes, layout.packs)
    traces = []
    for rank in traced_ranks(sizes, question):
        if progress:
            say(f"tracing rank {rank} of {question.world} ...", error=True)
        traces.append(trace(recipe, family, question.world, rank, load, question.accelerator.name, count))
    made = predict(recipe, family, sizes, question.accelerator, traces)
    if compiled:
        made.advice.append(
            "parallel.compile: blocks are planned as they run without it; "
            "compiled ones are faster and hold less."
        )
    return made
