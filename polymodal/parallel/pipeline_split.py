"""Where a model is cut for a pipeline: schedules and what they need, and how many blocks each stage holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.models import partial
from polymodal.models.card import Chain
from polymodal.models.family import Family
from polymodal.recipe import Parallel, Train

Counts = Mapping[str, tuple[int, ...]]
"""Tower -> number of its blocks in each stage, in the order of the model."""


@dataclass(frozen=True)
class ScheduleTraits:
    """A schedule. least, most: stages a rank; v: a rank's stages form a V; split_backward: gradients of
    inputs and of weights are computed apart; gathers: it gathers and frees a stage's sharded parameters
    itself; otherwise: the schedule for forward passes alone, and where micro-batches do not fit."""

    least: int = 1
    most: int = 1
    v: bool = False
    split_backward: bool = False
    gathers: bool = False
    otherwise: str = "GPipe"


SCHEDULES = {
    "1F1B": ScheduleTraits(),
    "GPipe": ScheduleTraits(),
    "Interleaved1F1B": ScheduleTraits(2, 64, gathers=True, otherwise="LoopedBFS"),
    "InterleavedZeroBubble": ScheduleTraits(1, 64, split_backward=True, gathers=True, otherwise="LoopedBFS"),
    "ZBVZeroBubble": ScheduleTraits(
        2, 2, v=True, split_backward=True, gathers=True, otherwise="ZBVZeroBubble"
    ),
}


# ---- how many stages, and their ranks ------------------------------------------------------------


def stages_per_rank(parallel: Parallel) -> int:
    """Stages a rank (virtual stages): pp_virtual, as pp_layers are nested, or as the schedule needs."""
    asked = {parallel.pp_virtual} if parallel.pp_virtual is not None else set()
    if not isinstance(parallel.pp_layers, str):
        nested = (layers for layers in parallel.pp_layers.values() if layers and isinstance(layers[0], list))
        asked |= {len(layers) for layers in nested}
    if len(asked) > 1:
        numbers = " and for ".join(map(str, sorted(asked)))
        raise PolymodalError(
            f"parallel.pp_layers and pp_virtual ask for {numbers} stages a rank.",
            "Nest every tower's numbers alike: one list for each round of stages.",
        )
    kind = SCHEDULES[parallel.pp_schedule]
    if not asked:
        return kind.least
    (count,) = asked
    if not kind.least <= count <= kind.most:
        fits = [name for name, other in SCHEDULES.items() if other.least <= count <= other.most]
        number = f"{kind.least}" if kind.least == kind.most else f"at least {kind.least}"
        stages = "stage" if kind.most == 1 else "stages"
        nearest = min(max(count, kind.least), kind.most)
        raise PolymodalError(
            f"parallel.pp_schedule = {parallel.pp_schedule} needs {number} {stages} a rank, not {count}.",
            f"Set parallel.pp_virtual to {nearest}, or take {' or '.join(fits)}.",
        )
    return count


def unused_pp_key(parallel: Parallel) -> str:
    """The key, if any, of how to cut a model which parallel.pp leaves in one piece."""
    keys = {"pp_layers": parallel.pp_layers != "auto", "pp_virtual": parallel.pp_virtual is not None}
    return next((key for key, given in keys.items() if given and parallel.pp == 1), "")


def stage_to_rank(parallel: Parallel, stage: int) -> int:
    """Pipeline rank of a stage: in turn, or there and back in a V."""
    at = stage % (2 * parallel.pp)
    if SCHEDULES[parallel.pp_schedule].v:
        return at if at < parallel.pp else 2 * parallel.pp - 1 - at
    return stage % parallel.pp


def micro_batches_fit(schedule: str, pp: int, count: int) -> bool:
    """Whether torch's schedule runs with so many micro-batches on `pp` ranks."""
    if schedule == "1F1B":
        return count >= pp
    if schedule.startswith("Interleaved"):
        return count % max(1, count // pp) == 0
    return count >= 1


def micro_batches(train: Train, packed: bool, dp: int) -> int:
    """Micro-batches of a rank in a step."""
    count = train.global_batch_size if packed else math.ceil(train.global_batch_size / train.micro_batch_size)
    return math.ceil(count / dp)


def check_micro_batches(parallel: Parallel, train: Train, packed: bool, dp: int) -> None:
    """Raise PolymodalError for a number of micro-batches that the schedule cannot take."""
    name, pp, count = parallel.pp_schedule, parallel.pp, micro_batches(train, packed, dp)
    if pp == 1 or micro_batches_fit(name, pp, count):
        return
    below = next((n for n in range(count - 1, 0, -1) if micro_batches_fit(name, pp, n)), None)
    above = next(n for n in range(count + 1, count + pp + 2) if micro_batches_fit(name, pp, n))
    size = dp * (1 if packed else train.micro_batch_size)
    near = " or ".join(str(n * size) for n in (below, above) if n is not None)
    needs = f"at least {pp}" if name == "1F1B" else f"equal rounds of {pp} or more"
    raise PolymodalError(
        f"parallel.pp_schedule = {name} needs {needs} micro-batches a rank in a step, "
        f"train.global_batch_size = {train.global_batch_size} gives {count}.",
        f"Set train.global_batch_size to {near}, or parallel.pp_schedule to GPipe.",
    )


# ---- how many blocks each stage holds ------------------------------------------------------------


def counts(
    model: nn.Module, family: Family, parallel: Parallel, measure: SampleLengths | None = None
) -> dict[str, tuple[int, ...]]:
    """Blocks of each tower in each stage, by parallel.pp_layers or, for auto, by their cost.

    model: whole, on meta, with its frozen parameters marked; measure: of a typical sample.
    Raises PolymodalError when the card cannot be cut, or not so.
    """
    card = family.card
    if parallel.pp > 1 and "pp" in card.limits:
        raise PolymodalError(
            f"{card.name} cannot be cut into pipeline stages: {card.limits['pp']}", "Set parallel.pp to 1."
        )
    if not card.pipeline:
        raise PolymodalError(f"The card {card.name} has no pipeline to be cut.", "Set parallel.pp to 1.")
    depth = {tower: len(partial.blocks(model, chain)) for tower, chain in card.pipeline.items()}
    for tower, chain in card.pipeline.items():
        if not depth[tower]:
            raise PolymodalError(
                f"The card {card.name}: no module fits `{chain.blocks}` of its pipeline.",
                "This is a defect of the model's card: please report it.",
            )
    stages = parallel.pp * stages_per_rank(parallel)
    if isinstance(parallel.pp_layers, str):
        total = sum(depth.values())
        if stages > total:
            raise PolymodalError(
                f"{total} blocks of {card.name} cannot be cut into {stages} stages.",
                f"Set parallel.pp to at most {total * parallel.pp // stages}.",
            )
        return balanced(model, family, stages, measure)
    found = _asked(parallel, depth, stages, card.name)
    _check_order(found, stages, card.name)
    return found


def _asked(
    parallel: Parallel, depth: Mapping[str, int], stages: int, name: str
) -> dict[str, tuple[int, ...]]:
    asked = parallel.pp_layers
    assert not isinstance(asked, str)
    unknown = [tower for tower in asked if tower not in depth]
    if unknown:
        raise PolymodalError(
            f"parallel.pp_layers: {name} has no tower `{unknown[0]}` to cut.",
            f"Its towers: {', '.join(depth)}.",
        )
    main = list(depth)[-1]
    if main not in asked:
        raise PolymodalError(
            f"parallel.pp_layers does not place the {depth[main]} {main} layers.",
            f"Add {main}: {_even(depth[main], stages)}, or set parallel.pp_layers to auto.",
        )
    found = {}
    end = 0  # the stage in which the tower before ends; one that is not named is there too
    for tower, layers in depth.items():
        key = f"parallel.pp_layers.{tower}"
        given: Sequence[Any] = asked.get(tower, [layers * (stage == end) for stage in range(stages)])
        flat = [n for part in given for n in (part if isinstance(part, list) else [part])]
        if len(flat) != stages:
            shape = f"{parallel.pp} numbers"
            if stages > parallel.pp:
                shape = f"{stages // parallel.pp} lists of {shape}"
            raise PolymodalError(
                f"{key} = {given} has {len(flat)} numbers, {stages} stages need {stages}.",
                f"Give {shape}, such as {_nearest(flat, layers, stages)}.",
            )
        if sum(flat) != layers:
            raise PolymodalError(
                f"{key} = {given} adds up to {sum(flat)}, {name} has {layers} {tower} layers.",
                f"Nearest: {_nearest(flat, layers, stages)}.",
            )
        found[tower] = tuple(flat)
        end = max((stage for stage, held in enumerate(flat) if held), default=end)
    return found


def _even(layers: int, stages: int) -> list[int]:
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def _nearest(flat: Sequence[int], layers: int, stages: int) -> list[int]:
    """Numbers for `stages` stages that add up to `layers`, as close as can be to those given."""
    out = [*flat[:stages], *[0] * (stages - len(flat))]
    while sum(out) != layers:
        more = sum(out) < layers
        held = [at for at in range(stages) if out[at] or (more and not any(out))]
        at = min(held, key=lambda i: (out[i], -i)) if more else max(held, key=lambda i: (out[i], i))
        out[at] += 1 if more else -1
    return out


def _check_order(found: Counts, stages: int, name: str) -> None:
    """Towers come one after the other, and no stage between the ends is empty."""
    towers = list(found)
    for tower, after in zip(towers, towers[1:], strict=False):
        end = max((at for at, n in enumerate(found[tower]) if n), default=0)
        start = next(at for at, n in enumerate(found[after]) if n)
        if start < end:
            raise PolymodalError(
                f"parallel.pp_layers: stage {start} holds {after} layers, but the {tower} tower of {name} "
                f"ends in stage {end}.",
                f"Let {after} layers begin in stage {end}, or the {tower} tower end in stage {start}.",
            )
    for stage in range(1, stages - 1):
        if not any(numbers[stage] for numbers in found.values()):
            raise PolymodalError(
                f"parallel.pp_layers: stage {stage} of {name} would hold no layer.",
                "Only the first and the last stage hold other modules; give every other one at least one "
                "layer.",
            )


# ---- auto ----------------------------------------------------------------------------------------

TYPICAL = SampleLengths(1024, 512, {"vision": (1024,)})
"""A sample, when the data are not known: 1,024 tokens, half of them answers, with one picture of 1,024
patches."""


def block_costs(
    model: nn.Module, family: Family, measure: SampleLengths | None = None
) -> dict[str, list[float]]:
    """Tower -> cost of each block of its chain: forward and backward FLOPs, with the modules at its ends."""
    work = _block_work(model, family, measure)
    return {tower: [flops * passes for flops, passes in blocks] for tower, blocks in work.items()}


def training_passes(model: nn.Module, family: Family, measure: SampleLengths | None = None) -> float:
    """FLOPs of training over those of the forward pass, for a typical sample: 3 where all is trained, about 2
    for adapters, and in between with frozen towers. Recompute does not count.

    model: whole, on meta, with its frozen parameters marked.
    """
    blocks = [block for tower in _block_work(model, family, measure).values() for block in tower]
    forward = sum(flops for flops, _ in blocks)
    return sum(flops * passes for flops, passes in blocks) / forward if forward else 3.0


def _block_work(
    model: nn.Module, family: Family, measure: SampleLengths | None
) -> dict[str, list[tuple[float, float]]]:
    """Tower -> (forward FLOPs, passes) of each block of its chain, with the modules at its ends.

    A family's FLOPs by module, or parameters where it has none. Passes that training makes over a block: one
    forward, one for gradients of weights if it has trained ones, one for gradients of inputs if it or
    anything before it is trained.
    """
    try:
        by_module: dict[str, float] | None = family.costs(measure or TYPICAL)
    except NotImplementedError:
        by_module = None
    out: dict[str, list[tuple[float, float]]] = {}
    trained = False
    for tower, chain in (family.card.pipeline or {"blocks": Chain(family.card.blocks)}).items():
        blocks = [model.get_submodule(name) for name in partial.blocks(model, chain)]
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        patterns = (chain.blocks,) if isinstance(chain.blocks, str) else chain.blocks
        total = float(sum(sizes)) if by_module is None else sum(by_module.get(each, 0.0) for each in patterns)
        flops = [total * size / max(1, sum(sizes)) for size in sizes]
        for names, at in ((chain.first, 0), (chain.last, -1)):
            for name in partial.present(model, names):
                if by_module is not None:
                    flops[at] += by_module.get(name, 0.0)
                elif name != family.card.embedding:  # a table is looked up, not multiplied
                    flops[at] += sum(p.numel() for p in _parameters(model, name))
        before = [p for name in partial.present(model, chain.first) for p in _parameters(model, name)]
        trained = trained or any(p.requires_grad for p in before)
        out[tower] = []
        for block, size, cost in zip(blocks, sizes, flops, strict=True):
            own = sum(p.numel() for p in block.parameters() if p.requires_grad) / max(1, size)
            out[tower].append((cost, 1 + own + (trained or own > 0)))
            trained = trained or own > 0
    return out


def _parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        parameter = owner._parameters[leaf]
        return [] if parameter is None else [parameter]
    return list(owner.get_submodule(leaf).parameters())


def balanced(
    model: nn.Module, family: Family, stages: int, measure: SampleLengths | None = None
) -> dict[str, tuple[int, ...]]:
    """Counts whose most expensive stage is as cheap as can be; every stage has at least one block."""
    costs = block_costs(model, family, measure)
    towers = [tower for tower, blocks in costs.items() for _ in blocks]
    sums = list(accumulate((cost for blocks in costs.values() for cost in blocks), initial=0.0))

    @functools.cache
    def best(count: int, end: int) -> tuple[float, int]:
        """(cost of the most expensive of `count` stages over blocks before `end`, start of the last one)."""
        if count == 0:
            return (0.0 if end == 0 else math.inf), 0
        starts = range(count - 1, end)
        return min((max(best(count - 1, start)[0], sums[end] - sums[start]), start) for start in starts)

    spans: list[list[str]] = []
    end = len(towers)
    for count in range(stages, 0, -1):
        start = best(count, end)[1]
        spans.insert(0, towers[start:end])
        end = start
    return {tower: tuple(span.count(tower) for span in spans) for tower in costs}
