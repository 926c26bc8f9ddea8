"""The layout that a new recipe begins with: what the formulas rank first among those that fit, in a second or
two.

A model is known by its family, where its config is here, or by a published size's facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from polymodal.core.sample import SampleLengths
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.plan import estimate, search
from polymodal.plan.accelerators import Accelerator
from polymodal.plan.planner import Question
from polymodal.plan.search import Candidate
from polymodal.plan.shape import Shape
from polymodal.recipe import Recipe
from polymodal.train.layouts import Workload, layout_of

MARGIN = 0.9
"""Share of the usable memory that a layout may fill by the formulas, which are about 10 % off."""
TOKEN_PIXELS, TOKEN_FRAMES = 16 * 16, 4
"""Pixels and frames of a latent token where no config is here: an autoencoder's 8 x 8 x 4, and patches of 2 x
2."""


def fastest(
    made: Recipe,
    card: ModelCard,
    key: str,
    family: Family | None,
    shape: Shape,
    question: Question,
    units: Mapping[str, float] | None,
) -> tuple[Candidate, bool]:
    """(the layout of `made` that is ranked first among those that fit, True), or the smallest one and False.

    key: the published size, of use without a family. units: patches and frames a token, by stream, of data
    that were measured.
    """
    if family is not None:
        candidates, packed = search.candidates(made, family, question), layout_of(made, family).packs
    else:
        candidates, packed = published(made, card, key, question), card.kind != "generation"
    batch = made.train.global_batch_size
    even = [
        (one, sizes)
        for one, sizes in candidates
        if batch % (sizes.dp * one.train.micro_batch_size) == 0
        # the link to the host is slow, and the formulas do not count it: only inputs of blocks go there
        and ("activations" not in one.parallel.offload or one.parallel.recompute == "full")
    ]
    listed = search.ranked(
        even, shape, lambda one: workload(one, card, family, units), question.accelerator, packed
    )
    limit = question.accelerator.usable_memory * MARGIN
    best = next((candidate for candidate in listed if candidate.memory <= limit), None)
    return (best, True) if best is not None else (min(listed, key=lambda c: c.memory), False)


def published(
    made: Recipe, card: ModelCard, key: str, question: Question
) -> Iterator[tuple[Recipe, ParallelSizes]]:
    """Layouts that a published size has for certain, without its config: sharded, sequences cut within a
    node, and tp up to what its card names."""
    tp = int(card.sizes[key].layout.get("tp", 1)) if "tp" not in card.limits else 1
    cuts = bool(card.sequence_entry or card.sequence_plan) and "cp" not in card.limits
    for sizes in search.layouts(made, question, False):
        if tp % sizes.tp or sizes.pp > 1 or (sizes.cp > 1 and not (cuts and 8 % sizes.cp == 0)):
            continue
        axes = {axis: getattr(sizes, axis) for axis in ("dp_replicate", "dp_shard", "cp", "tp")}
        for recompute in search.RECOMPUTE:
            parallel = made.parallel.model_copy(update={**axes, "recompute": recompute})
            yield made.model_copy(update={"parallel": parallel}), sizes


def workload(
    one: Recipe, card: ModelCard, family: Family | None, units: Mapping[str, float] | None
) -> Workload:
    """A micro-batch of a recipe."""
    if family is not None:
        layout = layout_of(one, family)
        return layout.workload(0.25, 1024) if units is None else estimate.workload(layout, units)
    tokens = one.data.pack_length or one.data.max_length
    if card.kind == "generation":
        frames = max(one.data.clip.frames) if card.clip.get("frames") else 1
        tokens = ((frames - 1) // TOKEN_FRAMES + 1) * one.data.clip.pixels // TOKEN_PIXELS
    return Workload(SampleLengths(tokens, tokens))


def device_count(shape: Shape, accelerator: Accelerator) -> int:
    """Accelerators that the states of a model fill to two fifths: within a node a power of two, else whole
    nodes."""
    needed = (shape.trained * 16 + (shape.total - shape.trained) * 2) / (0.4 * accelerator.memory)
    return next((n for n in (1, 2, 4, 8) if n >= needed), 8 * -(-int(needed) // 8))
