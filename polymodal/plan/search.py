"""`plan --search`: which layout of a recipe is the fastest that fits.

Sees every room. Layouts are ranked by the formulas of estimate.py; the best ones are then traced, and what a trace
says corrects the formulas for its like.
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
from polymodal.core.text import format_bytes
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import partial
from polymodal.models.family import Family
from polymodal.parallel import apply as layout
from polymodal.parallel import pipeline_split
from polymodal.plan import estimate, page, planner
from polymodal.plan.devices import Accelerator
from polymodal.plan.estimate import Shape
from polymodal.plan.planner import Question
from polymodal.plan.predict import Prediction, per_rank
from polymodal.plan.pretended import meta_model
from polymodal.recipe import Recipe
from polymodal.train.layouts import Workload, layout_of

RECOMPUTE = ("none", "selective", "full")
LAYOUT = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "recompute")
"""Keys that the search decides: always written."""
CONFIRMED = 3
"""How many of the best layouts are traced before one is recommended."""
TRACES = 10
"""Traces that a search makes at most: those of layouts that turn out not to fit are among them."""
SIMPLER = 1.05
"""Times are estimates: an axis more must save so much to be worth it."""


@dataclass(frozen=True)
class Scale:
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
    def name(self) -> str:
        sizes = self.sizes
        axes = [("pp", sizes.pp), ("replicate", sizes.dp_replicate), ("fsdp", sizes.dp_shard), ("cp", sizes.cp), ("tp", sizes.tp), ("ep", sizes.ep)]  # fmt: skip
        said = " ".join(f"{axis}{size}" for axis, size in axes if size > 1) or "one"
        micro = f" mbs{self.recipe.train.micro_batch_size}" if self.varies else ""
        zero = f" zero{self.recipe.parallel.zero_stage}" if sizes.pp > 1 else ""
        return f"{said} {self.recipe.parallel.recompute}{zero}{micro}"


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(made: Recipe, question: Question, experts: bool) -> Iterator[ParallelSizes]:
    """Every way to fill the world; tensor parallelism stays in a node, replicas are of whole nodes."""
    world, node = question.world, question.accelerator.node
    for tp in (n for n in divisors(world) if n <= node):
        for cp in divisors(world // tp):
            for pp in divisors(world // tp // cp):
                rest = world // tp // cp // pp
                replicas = {1} | ({rest * cp * tp // node} if rest * cp * tp > node and rest * cp * tp % node == 0 else set())  # fmt: skip
                for replicate in sorted(r for r in replicas if rest % r == 0):
                    shard = rest // replicate
                    for ep in divisors(shard * cp * tp) if experts else [1]:
                        sizes = ParallelSizes(pp, replicate, shard, cp, tp, ep)
                        if sizes.dp <= made.train.global_batch_size:
                            yield sizes


def candidates(made: Recipe, family: Family, question: Question) -> Iterator[tuple[Recipe, ParallelSizes]]:
    """Every layout of the world that the model can have and the batch can fill, with and without recompute; of a
    pipeline that keeps parameters whole over a step, with gradients whole too (zero 1) and sharded (zero 2)."""
    packed = layout_of(made, family).packs
    micro = [1] if packed else [m for m in (1, 2, 4, 8) if m <= made.train.global_batch_size]
    chains, rounds = family.card.pipeline.values(), pipeline_split.stages_per_rank(made.parallel)
    model = family.build().trained
    depth = sum(len(partial.blocks(model, chain)) for chain in chains)
    for sizes in layouts(made, question, bool(family.balance(None))):
        if sizes.pp > 1 and sizes.pp * rounds > depth:
            continue
        changes: dict[str, Any] = {axis: getattr(sizes, axis) for axis in LAYOUT[:-1]} | {"ulysses": None}
        piped = sizes.pp > 1
        if made.parallel.pp != sizes.pp:
            changes["pp_layers"] = "auto"
        if not piped:
            changes["pp_virtual"] = None
        sharded = piped and not pipeline_split.SCHEDULES[made.parallel.pp_schedule].gathers
        for zero in (1, 2) if sharded else (None,) if piped else (made.parallel.zero,):
            for recompute in RECOMPUTE:
                chosen = made.parallel.model_copy(update={**changes, "zero": zero, "recompute": recompute})
                if layout.check(family.card, family.config, sizes, chosen, made.model.attention):
                    continue
                for size in micro:
                    train = made.train.model_copy(update={"micro_batch_size": size})
                    one = made.model_copy(update={"parallel": chosen, "train": train})
                    if pipeline_split.micro_batches_fit(
                        chosen.pp_schedule, sizes.pp, per_rank(one, sizes, packed)
                    ):
                        yield one, sizes


def ranked(
    found: Iterable[tuple[Recipe, ParallelSizes]],
    shape: Shape,
    load_of: Callable[[Recipe], Workload],
    accelerator: Accelerator,
    packed: bool,
    scales: dict[str, Scale] | None = None,
) -> list[Candidate]:
    """Layouts with their estimate, the fastest a sample first. load_of: the micro-batch of a recipe."""
    out = []
    for one, sizes in found:
        scale = (scales or {}).get(one.parallel.recompute, Scale())
        load = load_of(one)
        measure, samples = load.measure, load.samples
        depth = estimate.pipeline_depth(one, sizes, packed)
        held = estimate.memory(shape, one, sizes, measure, samples, depth)
        micro = per_rank(one, sizes, packed)
        took = estimate.seconds(shape, one, sizes, measure, samples, micro, accelerator)
        varying = held.activations + held.working + held.gathered
        bytes_ = held.memory + (scale.memory - 1) * varying
        done = micro * sizes.dp * samples
        share = estimate.mfu(shape, measure, done, took, sizes.world, accelerator)
        out.append(Candidate(one, sizes, bytes_, took * scale.seconds, not packed, share / scale.seconds))
    return sorted(out, key=lambda candidate: candidate.cost)


def rank(made: Recipe, family: Family, question: Question, say: Any = lambda text: None) -> list[Candidate]:
    """Candidates that fit, fastest first; the first CONFIRMED of them traced. Raises PolymodalError when nothing fits.

    What a trace says of one candidate corrects the estimates of all with the same recompute.
    """
    shape = estimate.shape_of(family, meta_model(family, made))
    found = list(candidates(made, family, question))
    if not found:
        raise PolymodalError(
            f"No layout of {question.world} devices suits {family.card.name} with train.global_batch_size = {made.train.global_batch_size}.",
            "Raise train.global_batch_size, or use fewer devices.",
        )
    room, packed = question.accelerator.memory * question.accelerator.usable, layout_of(made, family).packs
    scales: dict[str, Scale] = {}
    traced: dict[int, Prediction] = {}

    def load_of(one: Recipe) -> Workload:
        return layout_of(one, family).workload(question.media, question.patches)

    def estimated() -> list[Candidate]:
        listed = ranked(found, shape, load_of, question.accelerator, packed, scales)
        for candidate in listed:
            candidate.traced = traced.get(id(candidate.recipe))
        return listed

    for _ in range(TRACES):
        listed = estimated()
        good = [c for c in listed if c.traced is not None and c.traced.fits]
        waiting = [c for c in listed if c.traced is None]
        point = next((c for c in waiting if c.memory <= room), None)
        if (
            point is None and not traced
        ):  # by the formulas nothing fits: the smallest shows whether that is so
            point = min(waiting, key=lambda c: c.memory)
        if len(good) >= CONFIRMED or point is None:
            break
        say(f"tracing {point.name}")
        traced[id(point.recipe)] = seen = planner.plan(point.recipe, family, question)
        load = load_of(point.recipe)
        measure, samples = load.measure, load.samples
        depth = estimate.pipeline_depth(point.recipe, point.sizes, packed)
        held = estimate.memory(shape, point.recipe, point.sizes, measure, samples, depth)
        varying = held.activations + held.working + held.gathered
        old = scales.get(point.recipe.parallel.recompute, Scale())
        scales[point.recipe.parallel.recompute] = Scale(
            max(0.2, 1 + (seen.peak - held.memory) / max(1, varying)), old.seconds * seen.step / point.seconds
        )
    listed = estimated()
    confirmed = [c for c in listed if c.traced is not None and c.traced.fits]
    if not confirmed:
        least = min((c for c in listed if c.traced is not None), key=lambda c: c.traced.peak)  # type: ignore[union-attr]
        raise PolymodalError(
            f"No layout of {question.world} x {question.accelerator.name} holds this run: the smallest needs about {format_bytes(least.traced.peak)} a device of {format_bytes(room)} ({least.name}).",  # type: ignore[union-attr]
            "Use more devices, a shorter data.pack_length, or model.lora.",
        )
    confirmed.sort(key=lambda candidate: candidate.traced.step)  # type: ignore[union-attr]
    return confirmed + [c for c in listed if c.traced is None and c.memory <= room]


def written(best: Candidate, made: Recipe, base: Path | None, directory: Path) -> str:
    """The best layout of `made` as a recipe: on top of its file `base`, or whole when there is none. dp_shard takes
    what is left."""
    parallel = best.recipe.parallel.model_copy(update={"dp_shard": -1})
    if base is None:
        return recipe.dump(best.recipe.model_copy(update={"parallel": parallel}))
    given = made.parallel.model_dump(mode="json")
    changed = {
        key: value
        for key, value in parallel.model_dump(mode="json").items()
        if key in LAYOUT or value != given[key]
    }
    data: dict[str, Any] = {"base": os.path.relpath(base, directory), "parallel": changed}
    if best.varies:
        data["train"] = {"micro_batch_size": best.recipe.train.micro_batch_size}
    where = best.traced.accelerator.name if best.traced else ""
    head = f"# The fastest layout on {best.sizes.world} x {where} that `polymodal plan --search` found.\n"
    return head + yaml.safe_dump(data, sort_keys=False)


def main(
    made: Recipe, family: Family, question: Question, *, as_json: bool = False, out: Path | None = None, base: Path | None = None,
    html: Path | None = None,
) -> int:  # fmt: skip
    """The command: prints the ranking, writes the best recipe, and the page of its plan to `html`. base: the file that
    `made` is, when nothing overrides it."""

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(text, "...", file=sys.stderr, flush=True)

    found = rank(made, family, question, say)
    best = found[0]
    path = out or Path(f"{made.name}-{question.world}x{question.accelerator.name}.yaml")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(written(best, made, base, path.parent))
        os.replace(partial, path)
    except OSError as error:
        raise PolymodalError(
            f"{path} cannot be written: {error.strerror}.", "Choose another file with -o."
        ) from None
    if html is not None and best.traced is not None:
        page.write(best.traced, html)
    rows: list[dict[str, Any]] = []
    for candidate in found[:12]:
        traced = candidate.traced
        rows.append({
            "layout": candidate.name,
            "traced": traced is not None,
            "step_seconds": traced.step if traced else candidate.seconds,
            "peak_bytes": traced.peak if traced else int(candidate.memory),
            "mfu": traced.mfu if traced else candidate.mfu,
        })  # fmt: skip
    if as_json:
        print(json.dumps({"recipe": str(path), "layouts": rows}, indent=2))
        return 0
    width = max(28, *(len(row["layout"]) + 2 for row in rows))
    print(f"{'layout':<{width}}{'step s':>9}{'GiB':>8}{'MFU':>8}")
    for row in rows:
        print(
            f"{row['layout']:<{width}}{row['step_seconds']:>9.2f}{row['peak_bytes'] / 2**30:>8.1f}{row['mfu']:>8.1%}{'' if row['traced'] else '  by formula'}"
        )
    print(f"{len(found)} layouts fit; the best is written to {path}")
    return 0  # fmt: skip
