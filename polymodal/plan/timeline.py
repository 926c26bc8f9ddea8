"""A pipeline's step as a timeline: torch's own order of actions, played with given times of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from polymodal.core.errors import PolymodalError
from polymodal.parallel.pipeline_split import SCHEDULES
from polymodal.plan.pretended import pretended_group

NAMES = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
"""torch's letters of actions. Zero-bubble schedules split a backward pass into gradients of inputs and of
weights."""
Order = dict[int, list[tuple[int, str, int]]]
"""rank -> (stage, letter, micro-batch), in the order in which the rank does them."""


@dataclass(frozen=True)
class Slot:
    """One action of a rank: seconds from the step's begin."""

    rank: int
    stage: int
    micro_batch: int
    kind: str  # forward | backward | input | weight
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    slots: tuple[Slot, ...]
    seconds: float
    bubble: float  # share of all ranks' time in which they do nothing


def stages_of(schedule: str, ranks: int, virtual: int) -> list[list[int]]:
    """Stages of each rank: in turn, or there and back (a V) for schedules made for that."""
    total = ranks * virtual
    if SCHEDULES[schedule].v:
        return [[rank, total - 1 - rank] for rank in range(ranks)]
    return [list(range(rank, total, ranks)) for rank in range(ranks)]


def order(schedule: str, ranks: int, virtual: int, micro_batches: int) -> Order:
    """torch's own, of schedules with several stages a rank; its 1F1B is off by one on the last rank, so
    schedules with one stage are written down here. Raises PolymodalError for what the schedule cannot run."""
    if schedule in ("GPipe", "1F1B"):
        return _one_stage_a_rank(ranks, micro_batches, schedule == "GPipe")
    with pretended_group(ranks):
        example, cpu = (torch.empty(1),), torch.device("cpu")
        shapes: dict[str, Any] = {"input_args": example, "output_args": example, "group": dist.group.WORLD}
        stages = [
            PipelineStage(torch.nn.Identity(), stage, ranks * virtual, cpu, **shapes)
            for stage in stages_of(schedule, ranks, virtual)[0]
        ]
        kind = get_schedule_class(schedule)
        try:
            made = kind(
                stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
                n_microbatches=micro_batches,
                loss_fn=lambda output, target: output,
            )
        except ValueError as error:
            raise PolymodalError(
                f"The schedule {schedule} cannot run {micro_batches} micro-batches over {ranks} ranks: "
                f"{error}.",
                f"Use a multiple of {ranks} micro-batches: train.global_batch_size = {ranks} x data-parallel "
                "ranks.",
            ) from None
        return {
            rank: [
                (action.stage_index, action.computation_type.value, action.microbatch_index)
                for action in actions
                if action is not None and action.microbatch_index is not None
            ]
            for rank, actions in made.pipeline_order.items()
        }


def _one_stage_a_rank(ranks: int, micro_batches: int, all_forward_first: bool) -> Order:
    """1F1B: a forward for every stage from here on before the first backward, then in turn; GPipe: all
    forwards."""
    actions: Order = {}
    for rank in range(ranks):
        first = micro_batches if all_forward_first else min(micro_batches, ranks - rank)
        letters = [("F", micro) for micro in range(first)]
        for micro in range(micro_batches):
            letters.append(("B", micro))
            if first + micro < micro_batches:
                letters.append(("F", first + micro))
        actions[rank] = [(rank, letter, micro) for letter, micro in letters]
    return actions


def play(
    schedule: str,
    ranks: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: float = 0.0,
) -> Timeline:
    """Play a step. forward, backward: seconds of each STAGE's micro-batch; transfer: between two ranks."""
    virtual, last = len(forward) // ranks, len(forward) - 1
    actions = order(schedule, ranks, virtual, micro_batches)
    rank_of = {stage: rank for rank, own in enumerate(stages_of(schedule, ranks, virtual)) for stage in own}
    done: dict[tuple[int, str, int], float] = {}
    free = dict.fromkeys(actions, 0.0)
    slots: list[Slot] = []

    def ready(stage: int, letter: str, micro: int) -> float | None:
        """When the inputs of this action are there; None while one of them has not been scheduled."""
        if letter == "W":
            needed = [(stage, "I")]
        elif letter == "F":
            needed = [(stage - 1, "F")] if stage else []
        else:
            needed = [(stage, "F"), *([(stage + 1, "I")] if stage < last else [])]
        times = []
        for source, kind in needed:
            at = done.get((source, kind, micro))
            if at is None and kind == "I":
                at = done.get((source, "B", micro))
            if at is None:
                return None
            times.append(at + (transfer if rank_of[source] != rank_of[stage] else 0.0))
        return max(times, default=0.0)

    progress = True
    while progress:
        progress = False
        for rank, queue in actions.items():
            while queue and (at := ready(*queue[0])) is not None:
                stage, letter, micro = queue.pop(0)
                progress = True
                seconds = forward[stage] if letter == "F" else backward[stage]
                start = max(at, free[rank])
                end = start + seconds * (0.5 if letter in "IW" else 1.0)
                free[rank] = done[stage, letter, micro] = end
                slots.append(Slot(rank, stage, micro, NAMES[letter], start, end))
    if any(actions.values()):
        raise RuntimeError(f"the order of {schedule} waits for itself")
    seconds = max(free.values())
    busy = sum(slot.end - slot.start for slot in slots)
    return Timeline(tuple(slots), seconds, 1.0 - busy / (seconds * ranks))
