"""`plan --search`: which layout of a recipe is the fastest that fits.

Layouts are ranked by the formulas of estimate.py; the best ones are then traced, and each trace corrects the
formulas for all layouts with the same recompute.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.core.terminal import say, say_lines
from polymodal.core.text import format_bytes
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import partial
from polymodal.models.family import Family
from polymodal.parallel import apply, pipeline_split
from polymodal.plan import page, planner
from polymodal.plan.accelerators import Accelerator
from polymodal.plan.estimate import Formula
from polymodal.plan.planner import Question
from polymodal.plan.predict import Prediction
from polymodal.plan.shape import Shape, shape_of
from polymodal.recipe import PREFERENCE, Recipe
from polymodal.train.layouts import Workload, layout_of
from polymodal.train.parallel_model import meta_model

RECOMPUTE = ("none", "selective", "full")
AXES = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
WRITTEN = (*AXES, "recompute")
"""Keys that the search decides: always written."""
CONFIRMED = 3
"""How many of the best layouts are traced before one is recommended."""
TRACES = 10
"""Traces that a search makes at most, of layouts that turn out not to fit too."""
SIMPLER = 1.05
"""Times are estimates: an axis more must save so much to be worth it."""


@dataclass(frozen=True)
class Correction:
    """Traced over estimated: bytes beside the states, and seconds of a step."""

    memory: float = 1.0
    seconds: float = 1.0


@dataclass
class Candidate:
    """A layout with its estimate; `traced` once it was confirmed."""

    recipe: Recipe
    sizes: ParallelSizes
    memory: float
    seconds: float
    varies: bool  # the size of micro-batches, where they are no packs
    mfu: float = 0.0
    traced: Prediction | None = None

    @property
    def cost(self) -> float:
        """What is ranked by: seconds a sample, a little more for every axis in use."""
        sizes = self.sizes
        axes = sum(n > 1 for n in (sizes.pp, sizes.dp_replicate, sizes.cp, sizes.tp, sizes.ep))
        return self.seconds / self.recipe.train.global_batch_size * SIMPLER**axes

    @property
    def fits(self) -> bool:
        """By its trace."""
        return self.traced is not None and self.traced.fits

    @property
    def step(self) -> float:
        return self.traced.step if self.traced else self.seconds

    @property
    def peak(self) -> int:
        return self.traced.peak if self.traced else int(self.memory)

    def as_dict(self) -> dict[str, Any]:
        """A row of the ranking."""
        mfu = self.traced.mfu if self.traced else self.mfu
        row = {"layout": self.name, "traced": self.traced is not None}
        return {**row, "step_seconds": self.step, "peak_bytes": self.peak, "mfu": mfu}

    @property
    def name(self) -> str:
        sizes, parallel = self.sizes, self.recipe.parallel
        words = {"pp": sizes.pp, "replicate": sizes.dp_replicate, "fsdp": sizes.dp_shard}
        words |= {"cp": sizes.cp, "tp": sizes.tp, "ep": sizes.ep}
        layout = " ".join(f"{word}{size}" for word, size in words.items() if size > 1) or "one"
        zero = f" zero{parallel.zero_stage}" if sizes.pp > 1 else ""
        micro = f" mbs{self.recipe.train.micro_batch_size}" if self.varies else ""
        return f"{layout} {parallel.recompute}{zero}{micro}"


# ---- which layouts there are ---------------------------------------------------------------------


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(made: Recipe, question: Question, experts: bool) -> Iterator[ParallelSizes]:
    """Every way to fill the world; tensor parallelism stays in a node, replicas are of whole nodes."""
    world, node = question.world, question.accelerator.node
    alone = made.train.objective == "grpo"  # a rank answers by itself
    # a reference is asked on ranks that hold the whole model
    whole = alone or made.train.objective in PREFERENCE
    for tp in (n for n in divisors(1 if alone else world) if n <= node):
        for cp in divisors(1 if alone else world // tp):
            for pp in [1] if whole else divisors(world // tp // cp):
                data = world // tp // cp // pp
                nodes, rest = divmod(data * cp * tp, node)
                replicas = {1, nodes} if nodes > 1 and not rest and data % nodes == 0 else {1}
                for replicate in sorted(replicas):
                    shard = data // replicate
                    for ep in divisors(shard * cp * tp) if experts and not alone else [1]:
                        sizes = ParallelSizes(pp, replicate, shard, cp, tp, ep)
                        if sizes.dp <= made.train.global_batch_size:
                            yield sizes


def candidates(made: Recipe, family: Family, question: Question) -> Iterator[tuple[Recipe, ParallelSizes]]:
    """Every layout of the world that the model can have and the batch can fill, with and without
    recompute."""
    packed = layout_of(made, family).packs
    micro_sizes = [1] if packed else [n for n in (1, 2, 4, 8) if n <= made.train.global_batch_size]
    model, stages = family.build(), pipeline_split.stages_per_rank(made.parallel)
    depth = sum(len(partial.blocks(model, chain)) for chain in family.card.pipeline.values())
    for sizes in layouts(made, question, bool(family.balance(None))):
        if sizes.pp > 1 and sizes.pp * stages > depth:
            continue
        for parallel in _variants(made, sizes):
            if apply.check(family.card, family.config, sizes, parallel, made.model):
                continue
            for size in micro_sizes:
                train = made.train.model_copy(update={"micro_batch_size": size})
                count = pipeline_split.micro_batches(train, packed, sizes.dp)
                if pipeline_split.micro_batches_fit(parallel.pp_schedule, sizes.pp, count):
                    yield made.model_copy(update={"parallel": parallel, "train": train}), sizes


def _variants(made: Recipe, sizes: ParallelSizes) -> Iterator[recipe.Parallel]:
    """Every recompute; of a pipeline that keeps parameters whole over a step, with gradients whole too (zero
    1) and sharded (zero 2)."""
    changes: dict[str, Any] = {axis: getattr(sizes, axis) for axis in AXES} | {"ulysses": None}
    zeros: tuple[Any, ...] = (made.parallel.zero,)
    if made.parallel.pp != sizes.pp:
        changes["pp_layers"] = "auto"
    if sizes.pp == 1:
        changes["pp_virtual"] = None
    else:
        zeros = (None,) if pipeline_split.SCHEDULES[made.parallel.pp_schedule].gathers else (1, 2)
    for zero in zeros:
        for recompute in RECOMPUTE:
            yield made.parallel.model_copy(update={**changes, "zero": zero, "recompute": recompute})


# ---- their order ---------------------------------------------------------------------------------


def ranked(
    found: Iterable[tuple[Recipe, ParallelSizes]],
    shape: Shape,
    load_of: Callable[[Recipe], Workload],
    accelerator: Accelerator,
    packed: bool,
    corrections: dict[str, Correction] | None = None,
) -> list[Candidate]:
    """Layouts with their estimate, the fastest a sample first. load_of: the micro-batch of a recipe;
    corrections: by recompute."""
    out = []
    for one, sizes in found:
        correction = (corrections or {}).get(one.parallel.recompute, Correction())
        formula = Formula(shape, one, sizes, load_of(one), packed)
        held = formula.memory()
        memory = held.memory + (correction.memory - 1) * held.varying
        seconds = formula.seconds(accelerator) * correction.seconds
        out.append(Candidate(one, sizes, memory, seconds, not packed, formula.mfu(accelerator, seconds)))
    return sorted(out, key=lambda candidate: candidate.cost)


def rank(
    made: Recipe, family: Family, question: Question, progress: Callable[[str], None] = lambda text: None
) -> list[Candidate]:
    """Candidates that fit, fastest first; the first CONFIRMED of them traced. Raises PolymodalError when
    nothing fits."""
    accelerator, packed = question.accelerator, layout_of(made, family).packs
    shape = shape_of(family, meta_model(family, made))
    found = list(candidates(made, family, question))
    if not found:
        raise PolymodalError(
            f"No layout of {question.world} devices suits {family.card.name} with "
            f"train.global_batch_size = {made.train.global_batch_size}.",
            "Raise train.global_batch_size, or use fewer devices.",
        )
    corrections: dict[str, Correction] = {}
    traced: dict[int, Prediction] = {}

    def load_of(one: Recipe) -> Workload:
        return question.load(layout_of(one, family))

    def estimated() -> list[Candidate]:
        listed = ranked(found, shape, load_of, accelerator, packed, corrections)
        for candidate in listed:
            candidate.traced = traced.get(id(candidate.recipe))
        return listed

    for _ in range(TRACES):
        listed = estimated()
        waiting = [candidate for candidate in listed if candidate.traced is None]
        chosen = next((each for each in waiting if each.memory <= accelerator.usable_memory), None)
        if chosen is None and not traced:  # nothing fits by the formulas: a trace of the smallest decides
            chosen = min(waiting, key=lambda candidate: candidate.memory)
        if chosen is None or sum(candidate.fits for candidate in listed) >= CONFIRMED:
            break
        progress(f"tracing {chosen.name}")
        one = chosen.recipe
        trace = traced[id(one)] = planner.plan(one, family, question)
        held = Formula(shape, one, chosen.sizes, load_of(one), packed).memory()
        before = corrections.get(one.parallel.recompute, Correction())
        corrections[one.parallel.recompute] = Correction(
            max(0.2, 1 + (trace.peak - held.memory) / max(1, held.varying)),
            before.seconds * trace.step / chosen.seconds,
        )
    listed = estimated()
    confirmed = sorted((each for each in listed if each.fits), key=lambda candidate: candidate.step)
    if not confirmed:
        least = min((each for each in listed if each.traced), key=lambda candidate: candidate.peak)
        raise PolymodalError(
            f"No layout of {question.world} x {accelerator.name} holds this run: the smallest needs about "
            f"{format_bytes(least.peak)} a device of {format_bytes(accelerator.usable_memory)} "
            f"({least.name}).",
            "Use more devices, a shorter data.pack_length, or model.lora.",
        )
    return confirmed + [
        each for each in listed if not each.traced and each.memory <= accelerator.usable_memory
    ]


# ---- the command ---------------------------------------------------------------------------------


def written(best: Candidate, made: Recipe, base: Path | None, directory: Path) -> str:
    """The best layout of `made` as a recipe: on top of its file `base`, or whole when there is none. dp_shard
    takes what is left."""
    parallel = best.recipe.parallel.model_copy(update={"dp_shard": -1})
    if base is None:
        return recipe.dump(best.recipe.model_copy(update={"parallel": parallel}))
    given, chosen = made.parallel.model_dump(mode="json"), parallel.model_dump(mode="json")
    changed = {key: value for key, value in chosen.items() if key in WRITTEN or value != given[key]}
    data: dict[str, Any] = {"base": os.path.relpath(base, directory), "parallel": changed}
    if best.varies:
        data["train"] = {"micro_batch_size": best.recipe.train.micro_batch_size}
    accelerator = best.traced.accelerator.name if best.traced else ""
    head = (
        f"# The fastest layout on {best.sizes.world} x {accelerator} that `polymodal plan --search` found.\n"
    )
    return head + yaml.safe_dump(data, sort_keys=False)


def main(
    made: Recipe,
    family: Family,
    question: Question,
    *,
    as_json: bool = False,
    out: Path | None = None,
    base: Path | None = None,
    html: Path | None = None,
) -> int:
    """The command: prints the ranking, writes the best recipe, and the page of its plan to `html`. base: the
    file that `made` is, when nothing overrides it."""

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            say(text, "...", error=True)

    found = rank(made, family, question, progress)
    best = found[0]
    path = out or Path(f"{made.name}-{question.world}x{question.accelerator.name}.yaml")
    try:
        replace_file(path, written(best, made, base, path.parent))
    except OSError as error:
        raise PolymodalError(
            f"{path} cannot be written: {error.strerror}.", "Choose another file with -o."
        ) from None
    if html is not None and best.traced is not None:
        page.write(best.traced, html)
    rows = [candidate.as_dict() for candidate in found[:12]]
    if as_json:
        say_lines(json.dumps({"recipe": str(path), "layouts": rows}, indent=2), "\n")
        return 0
    width = max(28, *(len(row["layout"]) + 2 for row in rows))
    say(f"{'layout':<{width}}{'step s':>9}{'GiB':>8}{'MFU':>8}")
    for row in rows:
        figures = f"{row['step_seconds']:>9.2f}{row['peak_bytes'] / 2**30:>8.1f}{row['mfu']:>8.1%}"
        say(f"{row['layout']:<{width}}{figures}{'' if row['traced'] else '  by formula'}")
    say(f"{len(found)} layouts fit; the best is written to {path}")
    return 0
