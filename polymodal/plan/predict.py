"""From traces to a verdict: does it fit, how long is a step, where does the time go, what to change.

This room may touch the other files of `plan`, the recipe and the card's types. Times are a model: rooflines of every
operator and ring costs of every collective, with the shares of peak that devices.py assumes; none was measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from polymodal.core.text import format_bytes
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models.family import Family
from polymodal.plan import devices
from polymodal.plan.devices import Accelerator
from polymodal.plan.timeline import Timeline, play, stages_of
from polymodal.plan.trace import Trace
from polymodal.recipe import Recipe
from polymodal.train.layouts import Layout, layout_of

SHARDING = {"dp_replicate", "dp_shard", "cp"}
"""Mesh axes of FSDP2's groups: their gathers and reductions run beside the arithmetic of another block."""


@dataclass(frozen=True)
class Part:
    """Seconds of one direction of a micro-batch: arithmetic, and what of each kind of collective is not hidden by it."""

    compute: float
    exposed: dict[str, float]  # axes -> seconds

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())


@dataclass(frozen=True)
class Stage:
    """One pipeline stage as its traced rank sees it."""

    trace: Trace
    forward: Part
    backward: Part
    update: float


@dataclass
class Prediction:
    """What a recipe needs and does on `world` accelerators."""

    recipe: Recipe
    sizes: ParallelSizes
    accelerator: Accelerator
    stages: list[Stage]
    micro_batches: int
    timeline: Timeline | None
    step: float
    bubble: float
    mfu: float
    tokens: float  # a second, over all devices
    layout: Layout
    advice: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(stage.trace.usage.peak for stage in self.stages)

    @property
    def host(self) -> int:
        """Bytes of the host that the fullest rank needs."""
        return max(stage.trace.usage.host for stage in self.stages)

    @property
    def room(self) -> float:
        """Bytes that an accelerator can hand out."""
        return self.accelerator.memory * self.accelerator.usable

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "world": self.sizes.world,
            "layout": asdict(self.sizes),
            "device": self.accelerator.name,
            "fits": self.fits,
            "peak_bytes": self.peak,
            "host_bytes": self.host,
            "memory_bytes": self.accelerator.memory,
            "step_seconds": self.step,
            "mfu": self.mfu,
            "bubble": self.bubble,
            "tokens_per_second": self.tokens,
            "micro_batches": self.micro_batches,
            "advice": self.advice,
            "stages": [
                {
                    "stage": stage.trace.stage,
                    "rank": stage.trace.rank,
                    "peak_bytes": stage.trace.usage.peak,
                    "at_peak": stage.trace.usage.parts,
                    "on_host": stage.trace.usage.host_parts,
                    "forward_seconds": stage.forward.seconds,
                    "backward_seconds": stage.backward.seconds,
                    "update_seconds": stage.update,
                    "flops": {where: stage.trace.flops(where) for where in ("forward", "backward")},
                    "collectives": [
                        {**asdict(traffic), "ranks": len(traffic.ranks)} for traffic in stage.trace.traffic
                    ],
                }
                for stage in self.stages
            ],
        }


def part(trace: Trace, where: str, accelerator: Accelerator) -> Part:
    """Seconds of a direction ("forward", "backward", "update") of a micro-batch."""
    works = trace.work.get(where, {}).items()
    if where == "update" and trace.usage.host_parts.get("parameters"):  # the optimizer steps there
        compute = sum(touched * calls for (_, _, touched), calls in works) / accelerator.host_memory
    else:
        compute = sum(devices.seconds(accelerator, *work) * calls for work, calls in works)
    link = accelerator.host * accelerator.wire
    hidden = trace.moved.get((where, True), 0) / link
    waiting = trace.moved.get((where, False), 0) / link
    exposed: dict[str, float] = {"host": waiting} if waiting else {}
    for traffic in trace.traffic:
        if traffic.where != where:
            continue
        seconds = devices.transfer(accelerator, traffic.kind, traffic.ranks, traffic.bytes, traffic.count)
        sharding = set(traffic.axes.split("+")) <= SHARDING and traffic.kind in (
            "all_gather", "reduce_scatter", "all_reduce"
        )  # fmt: skip
        if sharding:
            hidden += seconds
        elif traffic.axes != "pp":  # the timeline has those
            exposed[traffic.axes] = exposed.get(traffic.axes, 0.0) + seconds
    if hidden > compute:
        exposed["fsdp"] = hidden - compute
    return Part(compute, exposed)


def predict(
    recipe: Recipe, family: Family, sizes: ParallelSizes, accelerator: Accelerator, traces: list[Trace], schedule: str = "1F1B"
) -> Prediction:  # fmt: skip
    """Put the traces (one a pipeline rank, in order, or of one rank alone) together."""
    stages = [
        Stage(
            trace,
            part(trace, "forward", accelerator),
            part(trace, "backward", accelerator),
            part(trace, "update", accelerator).seconds,
        )
        for trace in traces
    ]
    layout = layout_of(recipe, family)
    micro = per_rank(recipe, sizes, layout.packs)
    timeline, bubble = None, 0.0
    if sizes.pp > 1:
        line = stages * (sizes.pp // len(stages))  # of one rank alone: the others are taken to be like it
        virtual = max(1, len(traces[0].chunks))
        forward, backward = [0.0] * (sizes.pp * virtual), [0.0] * (sizes.pp * virtual)
        for stage, own in zip(line, stages_of(schedule, sizes.pp, virtual), strict=True):
            for number, share in zip(own, stage.trace.chunks or (1.0,), strict=True):
                forward[number], backward[number] = (
                    stage.forward.seconds * share,
                    stage.backward.seconds * share,
                )
        hop = _hop([stage.trace for stage in line], accelerator, schedule, virtual)
        timeline = play(schedule, sizes.pp, micro, forward, backward, hop)
        seconds, bubble = timeline.seconds, timeline.bubble
    else:
        seconds = micro * (stages[0].forward.seconds + stages[0].backward.seconds)
    step = seconds + max(stage.update for stage in stages)
    samples = micro * sizes.dp * traces[0].samples
    measure = traces[0].measure
    flops = 3 * family.cost(measure) * samples
    mfu = flops / (step * sizes.world * accelerator.half_flops)
    made = Prediction(
        recipe, sizes, accelerator, stages, micro, timeline, step, bubble, mfu, measure.tokens * samples / step,
        layout,
    )  # fmt: skip
    made.advice = advise(made)
    return made


def per_rank(recipe: Recipe, sizes: ParallelSizes, packed: bool) -> int:
    """Micro-batches that a data-parallel rank has in a step."""
    batch = recipe.train.global_batch_size
    each = 1 if packed else recipe.train.micro_batch_size
    return max(1, math.ceil(batch / (sizes.dp * each)))


def _hop(traces: list[Trace], accelerator: Accelerator, schedule: str, virtual: int) -> float:
    """Seconds that what a stage hands on for a micro-batch, all tensors of it, travels: the slowest hop counts.

    traces: one a pipeline rank. A rank with several stages hands on several times, to one neighbour or to two.
    """
    own = stages_of(schedule, len(traces), virtual)
    home = {stage: rank for rank, stages in enumerate(own) for stage in stages}
    slowest = 0.0
    for rank, trace in enumerate(traces):
        sends = [
            t for t in trace.traffic if (t.kind, t.axes, t.where) == ("send", "pp", "forward") and t.count
        ]
        peers = {home[stage + 1] for stage in own[rank] if home.get(stage + 1, rank) != rank}
        hops = sum(home.get(stage + 1, rank) != rank for stage in own[rank])
        for traffic in sends:
            each = max(1, hops // max(1, len(peers)))
            slowest = max(slowest, devices.transfer(accelerator, "send", traffic.ranks, traffic.bytes / each, traffic.count // each))  # fmt: skip
    return slowest


def advise(made: Prediction) -> list[str]:
    """What to change, most useful first: a sentence each, recipe keys named."""
    recipe, sizes, said = made.recipe, made.sizes, []
    worst = max(made.stages, key=lambda stage: stage.trace.usage.peak).trace.usage
    if made.host:
        node = min(sizes.world, made.accelerator.node)
        said.append(
            f"parallel.offload keeps {format_bytes(made.host)} of a rank on the host: {format_bytes(made.host * node)} for {node} ranks of a node."
        )
    if not made.fits:
        over = worst.peak - made.room
        said.append(
            f"It needs {format_bytes(over)} more than the device can give ({format_bytes(made.room)} of {format_bytes(made.accelerator.memory)})."
        )
        kept, state = (
            worst.parts["activations"],
            worst.parts["parameters"] + worst.parts["gradients"] + worst.parts["optimizer"],
        )
        if kept > over and recipe.parallel.recompute != "full":
            said.append(f"parallel.recompute: full would free most of {format_bytes(kept)} of activations.")
        if state > over / 2 and sizes.dp_replicate > 1:
            said.append("parallel.dp_replicate: 1 shards the states over all ranks instead of copying them.")
        if not recipe.parallel.reshards:
            said.append("parallel.zero: 3 with reshard_after_forward gives gathered parameters back.")
        if kept > over:
            said.append(
                "A shorter data.pack_length, parallel.tp with sp, or parallel.cp cut the activations a rank holds."
            )
        if state > over:
            said.append(
                "More devices, parallel.tp or parallel.pp cut the states a rank holds; model.lora leaves most of them out."
            )
    elif recipe.parallel.recompute == "full" and worst.peak < 0.45 * made.room:
        said.append(
            "There is room: parallel.recompute: selective, none, or full for fewer blocks (recompute_first, recompute_every) saves arithmetic where it fits."
        )
    each = made.layout.samples_per_micro_batch
    if made.micro_batches * sizes.dp * each > recipe.train.global_batch_size * 1.01:
        said.append(
            f"train.global_batch_size = {recipe.train.global_batch_size} does not fill {sizes.dp} data-parallel ranks evenly: some idle."
        )
    if len(made.stages) < sizes.pp:
        (only,) = made.stages
        said.append(
            f"Only rank {only.trace.rank} (stage {only.trace.stage} of {sizes.pp}) was traced: the times take the others to be like it."
        )
    if made.bubble > 0.2:
        said.append(
            f"{made.bubble:.0%} of the time is pipeline bubble: a larger train.global_batch_size, fewer stages or virtual stages shrink it."
        )
    for stage in made.stages[:1]:
        both = stage.forward.seconds + stage.backward.seconds
        for axes in sorted({*stage.forward.exposed, *stage.backward.exposed}):
            seconds = stage.forward.exposed.get(axes, 0.0) + stage.backward.exposed.get(axes, 0.0)
            if seconds > 0.3 * both:
                said.append(
                    f"Copies to the host and back take {seconds / both:.0%} of a micro-batch."
                    if axes == "host"
                    else f"Collectives over {axes} that no arithmetic hides take {seconds / both:.0%} of a micro-batch."
                )
    return said  # fmt: skip
