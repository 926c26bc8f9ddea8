"""`plan --search`: which layout of a recipe is the fastest that fits.

Sees every room. Layouts are ranked by closed formulas (Rajbhandari et al. 2020 for states, Korthikanti et al. 2022 for
activations, ring costs for collectives) whose scale comes from a few traced points; the best ones are then traced whole.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
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
from polymodal.plan import devices, estimate, page, planner
from polymodal.plan.planner import Question
from polymodal.plan.predict import Prediction, per_rank
from polymodal.recipe import Recipe
from polymodal.train.layouts import Workload, layout_of

RECOMPUTE = ("none", "selective", "full")
AGAIN = {"none": 3.0, "selective": 3.15, "full": 4.0}
"""Arithmetic of a micro-batch over that of its forward pass, by recompute."""
LAYOUT = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "recompute")
"""Keys that the search decides: always written."""
CONFIRMED = 3
"""How many of the best layouts are traced before one is recommended."""


@dataclass(frozen=True)
class Counts:
    """What formulas need of a model: parameters, those trained, and bytes of a frozen and a trained one."""

    total: int
    trained: int
    whole: int  # the largest block
    experts: int  # parameters of routed experts


@dataclass(frozen=True)
class Scale:
    """Traced over computed, by recompute: bytes beside the states, and seconds of arithmetic."""

    memory: float = 1.0
    compute: float = 1.0


@dataclass
class Candidate:
    """A layout with its estimate; `traced` once it was confirmed."""

    recipe: Recipe
    sizes: ParallelSizes
    memory: float
    seconds: float
    varies: bool  # the size of micro-batches, where they are no packs
    traced: Prediction | None = None

    @property
    def name(self) -> str:
        sizes = self.sizes
        axes = [("pp", sizes.pp), ("replicate", sizes.dp_replicate), ("fsdp", sizes.dp_shard), ("cp", sizes.cp), ("tp", sizes.tp), ("ep", sizes.ep)]  # fmt: skip
        said = " ".join(f"{axis}{size}" for axis, size in axes if size > 1) or "one"
        micro = f" mbs{self.recipe.train.micro_batch_size}" if self.varies else ""
        zero = f" zero{self.recipe.parallel.zero_stage}" if sizes.pp > 1 else ""
        return f"{said} {self.recipe.parallel.recompute}{zero}{micro}"


def counts(family: Family, made: Recipe) -> Counts:
    model = estimate.meta_model(family, made)
    blocks = layout.matching(model, family.card.blocks, family.card.name).values()
    parameters = list(model.named_parameters())
    return Counts(
        sum(p.numel() for _, p in parameters),
        sum(p.numel() for _, p in parameters if p.requires_grad),
        max(sum(p.numel() for p in block.parameters()) for block in blocks),
        sum(p.numel() for name, p in parameters if ".experts." in name),
    )


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


def states(made: Recipe, sizes: ParallelSizes, have: Counts) -> float:
    """Bytes of parameters, gradients, optimizer and average on a rank, and of what ZeRO below stage 3 keeps whole."""
    shards, stage = sizes.dp_shard * sizes.cp, made.parallel.zero_stage
    half = made.train.precision == "pure_bf16"
    frozen = 4 if made.train.precision == "fp32" else 2
    moments = 8 if not half else 4
    trained = (2 + 2 if half else 4 + 4) + moments + (4 if made.train.ema else 0)
    held = (have.trained * trained + (have.total - have.trained) * frozen) / shards
    if stage < 3 and shards * sizes.dp_replicate > 1:
        held += have.total * frozen + (4 * have.trained if stage == 1 else 0)
    return held / (sizes.pp * sizes.tp)


def beside(made: Recipe, family: Family, sizes: ParallelSizes, have: Counts, load: Workload) -> float:
    """Bytes beside the states, unscaled: activations as `check` estimates them, gathered blocks and their gradients."""
    patches = load.measure.total("vision") / load.measure.tokens
    kept, _ = estimate.activations(family, made, patches, sizes.world)
    width = 4 if made.train.precision == "fp32" else 2
    gathered = (2 * width + 8) * have.whole / sizes.tp / sizes.ep if made.parallel.zero_stage == 3 else 0.0
    return kept + gathered


def seconds(
    made: Recipe,
    family: Family,
    sizes: ParallelSizes,
    have: Counts,
    load: Workload,
    question: Question,
    scale: float,
) -> float:
    """Seconds of a step: arithmetic, what collectives it does not hide, the bubble."""
    accelerator, measure = question.accelerator, load.measure
    again = AGAIN[made.parallel.recompute]
    share = sizes.tp * sizes.cp * sizes.pp
    peak = accelerator.half_flops if made.train.precision != "fp32" else accelerator.single_flops
    compute = scale * again * family.cost(measure) * load.samples / share / (peak * accelerator.matmul)
    batches = layout_of(made, family)
    depth, hidden, chosen = batches.blocks_shape()
    width = 4 if made.train.precision == "fp32" else 2
    stream = measure.tokens * load.samples / sizes.cp * hidden * width
    layers = depth / sizes.pp
    passes = 3 if made.parallel.recompute == "full" else 2

    def ring(kind: str, size: float, ranks: int, stride: int, calls: float) -> float:
        members = tuple(range(0, ranks * stride, stride))
        return devices.transfer(accelerator, kind, members, size, math.ceil(calls)) if ranks > 1 else 0.0

    calls = layers * 2 * passes
    exposed = 2 * ring("all_gather", stream * calls, sizes.tp, 1, calls)
    exposed += ring(
        "all_to_all", stream / sizes.tp * 4 * layers * passes, sizes.cp, sizes.tp, 4 * layers * passes
    )
    exposed += ring("all_to_all", stream / sizes.tp * chosen * calls, sizes.ep, 1, calls)
    sharded = (have.total - have.experts * (1 - 1 / sizes.ep)) / sizes.pp / sizes.tp
    gathers = 2 if made.parallel.reshards else 1
    stride = sizes.tp
    fsdp = ring("all_gather", sharded * width * gathers, sizes.dp_shard * sizes.cp, stride, layers * gathers)
    fsdp += ring("reduce_scatter", sharded * 4, sizes.dp_shard * sizes.cp, stride, layers)
    micro = per_rank(made, sizes, batches.packs)
    exposed += 2 * ring("send", stream / sizes.tp, sizes.pp, sizes.world // sizes.pp, 1)
    once = fsdp if made.parallel.zero_stage == 1 else 0.0  # a step, not a micro-batch
    each = compute + exposed + max(0.0, fsdp - once - compute)
    bubble = (sizes.pp - 1) / pipeline_split.stages_per_rank(made.parallel) if sizes.pp > 1 else 0.0
    replicas = ring(
        "all_reduce", sharded * 4 / sizes.dp_shard, sizes.dp_replicate, stride * sizes.dp_shard * sizes.cp, 1
    )
    return each * (micro + bubble) + once + replicas


def rank(made: Recipe, family: Family, question: Question, say: Any = lambda text: None) -> list[Candidate]:
    """Candidates that fit, fastest first; the first CONFIRMED of them traced. Raises PolymodalError when nothing fits."""
    have = counts(family, made)
    found = list(candidates(made, family, question))
    if not found:
        raise PolymodalError(
            f"No layout of {question.world} devices suits {family.card.name} with train.global_batch_size = {made.train.global_batch_size}.",
            "Raise train.global_batch_size, or use fewer devices.",
        )
    load = {id(one): layout_of(one, family).workload(question.media, question.patches) for one, _ in found}
    scales = {kind: Scale() for kind in RECOMPUTE}

    def estimated() -> list[Candidate]:
        out = []
        for one, sizes in found:
            scale = scales[one.parallel.recompute]
            memory = states(one, sizes, have) + scale.memory * beside(one, family, sizes, have, load[id(one)])
            took = seconds(one, family, sizes, have, load[id(one)], question, scale.compute)
            out.append(Candidate(one, sizes, memory, took, not layout_of(made, family).packs))
        return sorted(out, key=lambda candidate: candidate.seconds)

    room = question.accelerator.memory * question.accelerator.usable
    for kind in RECOMPUTE:  # one traced point a kind sets the formulas' scale
        near = [c for c in estimated() if c.recipe.parallel.recompute == kind and c.sizes.pp == 1]
        point = next((c for c in near if c.memory <= room), near[0] if near else None)
        if point is None:
            continue
        say(f"tracing {point.name} for the scale of recompute {kind}")
        traced = planner.plan(point.recipe, family, question)
        plain = beside(point.recipe, family, point.sizes, have, load[id(point.recipe)])
        stage = traced.stages[0]
        arithmetic = stage.forward.compute + stage.backward.compute
        share = point.sizes.tp * point.sizes.cp * point.sizes.pp
        ideal = (
            AGAIN[kind]
            * family.cost(stage.trace.measure)
            * stage.trace.samples
            / share
            / (question.accelerator.half_flops * question.accelerator.matmul)
        )
        scales[kind] = Scale(
            max(0.2, (traced.peak - states(point.recipe, point.sizes, have)) / plain), arithmetic / ideal
        )
    ranked = [candidate for candidate in estimated() if candidate.memory <= room]
    confirmed: list[Candidate] = []

    def confirm(candidate: Candidate) -> None:
        say(f"tracing {candidate.name}")
        candidate.traced = planner.plan(candidate.recipe, family, question)
        if candidate.traced.fits:
            confirmed.append(candidate)

    for candidate in ranked[: 2 * CONFIRMED]:
        confirm(candidate)
        if len(confirmed) == CONFIRMED:
            break
    if not confirmed:
        least = min(ranked or estimated(), key=lambda candidate: candidate.memory)
        if least.traced is None:
            confirm(least)
        if not confirmed:
            needed = least.traced.peak if least.traced else 0
            raise PolymodalError(
                f"No layout of {question.world} x {question.accelerator.name} holds this run: the smallest needs about {format_bytes(needed)} a device of {format_bytes(room)} ({least.name}).",
                "Use more devices, a shorter data.pack_length, or model.lora.",
            )
    confirmed.sort(key=lambda candidate: candidate.traced.step if candidate.traced else math.inf)
    others = [candidate for candidate in ranked if candidate.traced is None]
    return confirmed + others


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
            "mfu": traced.mfu if traced else None,
        })  # fmt: skip
    if as_json:
        print(json.dumps({"recipe": str(path), "layouts": rows}, indent=2))
        return 0
    width = max(28, *(len(row["layout"]) + 2 for row in rows))
    print(f"{'layout':<{width}}{'step s':>9}{'GiB':>8}{'MFU':>8}")
    for row in rows:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "-"
        print(
            f"{row['layout']:<{width}}{row['step_seconds']:>9.2f}{row['peak_bytes'] / 2**30:>8.1f}{mfu:>8}{'' if row['traced'] else '  by formula'}"
        )
    print(f"{len(found)} layouts fit; the best is written to {path}")
    return 0  # fmt: skip
