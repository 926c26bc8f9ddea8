"""From traces to a prediction: does it fit, how long is a step, where does the time go, what to change.

Times are a model: rooflines of every operator and ring costs of every collective, with the shares of peak
that accelerators.yaml assumes; none was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from polymodal.core.text import format_bytes
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models.family import Family
from polymodal.parallel import pipeline_split
from polymodal.plan import accelerators
from polymodal.plan.accelerators import Accelerator
from polymodal.plan.timeline import Timeline, play, stages_of
from polymodal.plan.trace import Trace
from polymodal.recipe import Recipe
from polymodal.train.layouts import Layout, layout_of

SHARDING = {"dp_replicate", "dp_shard", "cp"}
"""Mesh axes of FSDP2's groups: their gathers and reductions run beside the arithmetic of another block."""


@dataclass(frozen=True)
class Part:
    """Seconds of one direction of a micro-batch: arithmetic, and collectives that it does not hide, by mesh
    axes."""

    compute: float
    exposed: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, by its traced rank."""

    trace: Trace
    forward: Part
    backward: Part
    update: Part

    @property
    def seconds(self) -> float:
        """Of a micro-batch."""
        return self.forward.seconds + self.backward.seconds


@dataclass
class Prediction:
    """What a recipe needs and does on `sizes.world` accelerators."""

    recipe: Recipe
    sizes: ParallelSizes
    accelerator: Accelerator
    layout: Layout
    stages: list[Stage]
    micro_batches: int
    timeline: Timeline | None
    step: float
    mfu: float
    tokens: float  # a second, over all devices
    advice: list[str] = field(default_factory=list)

    @property
    def axes(self) -> str:
        """The mesh axes of more than one rank: "pp 2 x tp 4"."""
        sizes = asdict(self.sizes)
        return " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one process"

    @property
    def bubble(self) -> float:
        return self.timeline.bubble if self.timeline is not None else 0.0

    @property
    def peak(self) -> int:
        return max(stage.trace.usage.peak for stage in self.stages)

    @property
    def host(self) -> int:
        """Bytes of the host that the fullest rank needs."""
        return max(stage.trace.usage.host for stage in self.stages)

    @property
    def saving(self) -> int:
        """Bytes of the host that a rank needs besides while a checkpoint is written in the background."""
        return max(stage.trace.saving for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak <= self.accelerator.usable_memory

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "world": self.sizes.world,
            "layout": asdict(self.sizes),
            "device": self.accelerator.name,
            "fits": self.fits,
            "peak_bytes": self.peak,
            "host_bytes": self.host,
            "saving_bytes": self.saving,
            "memory_bytes": self.accelerator.memory,
            "step_seconds": self.step,
            "mfu": self.mfu,
            "bubble": self.bubble,
            "tokens_per_second": self.tokens,
            "micro_batches": self.micro_batches,
            "advice": self.advice,
            "stages": [_stage_values(stage) for stage in self.stages],
        }


def _stage_values(stage: Stage) -> dict[str, Any]:
    trace = stage.trace
    return {
        "stage": trace.stage,
        "rank": trace.rank,
        "peak_bytes": trace.usage.peak,
        "at_peak": trace.usage.parts,
        "on_host": trace.usage.host_parts,
        "forward_seconds": stage.forward.seconds,
        "backward_seconds": stage.backward.seconds,
        "update_seconds": stage.update.seconds,
        "flops": {where: trace.flops(where) for where in ("forward", "backward")},
        "collectives": [{**asdict(traffic), "ranks": len(traffic.ranks)} for traffic in trace.traffic],
    }


# ---- seconds -------------------------------------------------------------------------------------


def part(trace: Trace, where: str, accelerator: Accelerator) -> Part:
    """Seconds of a direction ("forward", "backward", "update") of a micro-batch."""
    on_host = where == "update" and trace.usage.host_parts.get("parameters")  # the optimizer steps there
    compute = 0.0
    for (at, half, flops, touched), calls in trace.work.items():
        if at == where and on_host:
            compute += calls * touched / accelerator.host_memory
        elif at == where:
            compute += calls * accelerators.seconds(accelerator, half, flops, touched)
    link = accelerator.host * accelerator.wire
    hidden = trace.moved[where, True] / link
    exposed: dict[str, float] = {}
    if waiting := trace.moved[where, False]:
        exposed["host"] = waiting / link
    for traffic in (each for each in trace.traffic if each.where == where):
        axes, kind = traffic.axes, traffic.kind
        seconds = accelerators.transfer(accelerator, kind, traffic.ranks, traffic.bytes, traffic.count)
        if kind in ("all_gather", "reduce_scatter", "all_reduce") and set(axes.split("+")) <= SHARDING:
            hidden += seconds
        elif axes != "pp":  # the timeline has those
            exposed[axes] = exposed.get(axes, 0.0) + seconds
    if hidden > compute:
        exposed["fsdp"] = hidden - compute
    return Part(compute, exposed)


def predict(
    recipe: Recipe, family: Family, sizes: ParallelSizes, accelerator: Accelerator, traces: Sequence[Trace]
) -> Prediction:
    """Put the traces (one a pipeline rank, in order, or of one rank alone) together."""
    directions = ("forward", "backward", "update")
    stages = [Stage(trace, *(part(trace, where, accelerator) for where in directions)) for trace in traces]
    layout = layout_of(recipe, family)
    micro_batches = pipeline_split.micro_batches(recipe.train, layout.packs, sizes.dp)
    timeline = None
    step = micro_batches * stages[0].seconds
    if sizes.pp > 1:
        timeline = _timeline(recipe.parallel.pp_schedule, stages, sizes.pp, micro_batches, accelerator)
        step = timeline.seconds
    step += max(stage.update.seconds for stage in stages)
    load, passes = traces[0].load, traces[0].passes
    samples = micro_batches * sizes.dp * load.samples
    mfu = passes * family.cost(load.measure) * samples / (step * sizes.world * accelerator.half_flops)
    tokens = load.measure.tokens * samples / step
    made = Prediction(recipe, sizes, accelerator, layout, stages, micro_batches, timeline, step, mfu, tokens)
    made.advice = list(_advice(made))
    return made


def _timeline(
    schedule: str, stages: list[Stage], ranks: int, micro_batches: int, accelerator: Accelerator
) -> Timeline:
    """The pipeline's step. Where one rank alone was traced the others are taken to be like it."""
    by_rank = stages * (ranks // len(stages))
    chunks = by_rank[0].trace.chunks
    own = stages_of(schedule, ranks, chunks)
    forward, backward = [0.0] * (ranks * chunks), [0.0] * (ranks * chunks)
    for rank, stage in enumerate(by_rank):
        for number in own[rank]:
            forward[number] = stage.forward.seconds / chunks
            backward[number] = stage.backward.seconds / chunks
    hop = slowest_hop([stage.trace for stage in by_rank], accelerator, own)
    return play(schedule, ranks, micro_batches, forward, backward, hop)


def slowest_hop(traces: Sequence[Trace], accelerator: Accelerator, own: list[list[int]]) -> float:
    """Seconds to send what a stage hands on of a micro-batch, all tensors of it, between the slowest two
    ranks.

    traces: one a pipeline rank; own: stages of each rank, which sends several times if it has several.
    """
    rank_of = {stage: rank for rank, stages in enumerate(own) for stage in stages}
    slowest = 0.0
    for rank, trace in enumerate(traces):
        next_ranks = [rank_of.get(stage + 1, rank) for stage in own[rank]]
        peers = [peer for peer in next_ranks if peer != rank]
        each = max(1, len(peers) // max(1, len(set(peers))))
        for traffic in trace.traffic:
            if (traffic.kind, traffic.axes, traffic.where) == ("send", "pp", "forward"):
                bytes_sent, calls = traffic.bytes / each, traffic.count // each
                hop = accelerators.transfer(accelerator, "send", traffic.ranks, bytes_sent, calls)
                slowest = max(slowest, hop)
    return slowest


# ---- advice --------------------------------------------------------------------------------------


def _advice(made: Prediction) -> Iterator[str]:
    """What to change, most useful first: a sentence each, recipe keys named."""
    recipe, sizes = made.recipe, made.sizes
    ranks = min(sizes.world, made.accelerator.node)
    if made.host:
        yield (
            f"parallel.offload keeps {format_bytes(made.host)} of a rank on the host: "
            f"{format_bytes(made.host * ranks)} for {ranks} ranks of a node."
        )
    yield from _advice_on_memory(made)
    each = made.layout.samples_per_micro_batch
    if made.micro_batches * sizes.dp * each > recipe.train.global_batch_size * 1.01:
        yield (
            f"train.global_batch_size = {recipe.train.global_batch_size} does not fill {sizes.dp} "
            "data-parallel ranks evenly: some idle."
        )
    first = made.stages[0]
    if len(made.stages) < sizes.pp:
        yield (
            f"Only rank {first.trace.rank} (stage {first.trace.stage} of {sizes.pp}) was traced: "
            "the times take the others to be like it."
        )
    if made.bubble > 0.2:
        yield (
            f"{made.bubble:.0%} of the time is pipeline bubble: a larger train.global_batch_size, "
            "fewer stages or virtual stages shrink it."
        )
    for axes in sorted({*first.forward.exposed, *first.backward.exposed}):
        seconds = first.forward.exposed.get(axes, 0.0) + first.backward.exposed.get(axes, 0.0)
        if seconds > 0.3 * first.seconds:
            what = f"Collectives over {axes} that no arithmetic hides"
            if axes == "host":
                what = "Copies to the host and back"
            yield f"{what} take {seconds / first.seconds:.0%} of a micro-batch."


def _advice_on_memory(made: Prediction) -> Iterator[str]:
    parallel, usable = made.recipe.parallel, made.accelerator.usable_memory
    fullest = max((stage.trace.usage for stage in made.stages), key=lambda usage: usage.peak)
    if made.fits:
        if parallel.recompute == "full" and fullest.peak < 0.45 * usable:
            yield (
                "There is memory left: parallel.recompute: selective, none, or full for fewer blocks "
                "(recompute_first, recompute_every) saves arithmetic where it fits."
            )
        return
    missing = fullest.peak - usable
    yield (
        f"It needs {format_bytes(missing)} more than the device can give "
        f"({format_bytes(usable)} of {format_bytes(made.accelerator.memory)})."
    )
    activations = fullest.parts["activations"]
    states = sum(fullest.parts[kind] for kind in ("parameters", "gradients", "optimizer"))
    if activations > missing and parallel.recompute != "full":
        yield f"parallel.recompute: full would free most of {format_bytes(activations)} of activations."
    if states > missing / 2 and made.sizes.dp_replicate > 1:
        yield "parallel.dp_replicate: 1 shards the states over all ranks instead of copying them."
    if not parallel.reshards:
        yield "parallel.zero: 3 with reshard_after_forward gives gathered parameters back."
    if activations > missing:
        yield (
            "A shorter data.pack_length, parallel.tp with sp, or parallel.cp cut the activations "
            "a rank holds."
        )
    if states > missing:
        yield (
            "More devices, parallel.tp or parallel.pp cut the states a rank holds; "
            "model.lora leaves most of them out."
        )
