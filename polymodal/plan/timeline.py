"""A pipeline's step as a timeline: torch's own order of actions, played with given times of every stage.

This room may touch torch and the pretended group. The bubble that it gives is the share of the ranks' time without work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from polymodal.core.errors import PolymodalError
from polymodal.plan.pretended import pretended_group

NAMES = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
"""Letters of torch's actions; `input` and `weight` are the two halves of a backward that zero-bubble schedules part."""


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
    if "ZBV" in schedule or "DualPipeV" in schedule:
        return [[rank, total - 1 - rank] for rank in range(ranks)]
    return [list(range(rank, total, ranks)) for rank in range(ranks)]


Order = dict[int, list[tuple[int, str, int]]]
"""rank -> (stage, letter, micro-batch), in the order in which the rank does them."""


def _single(ranks: int, micro_batches: int, ahead: int | None) -> Order:
    """One stage a rank: forwards up to `ahead` + stages behind it before the first backward (None: all), then in turn."""
    found: Order = {}
    for rank in range(ranks):
        first = micro_batches if ahead is None else min(micro_batches, ranks - rank - 1 + ahead)
        letters = [("F", micro) for micro in range(first)]
        for micro in range(micro_batches):
            letters.append(("B", micro))
            if first + micro < micro_batches:
                letters.append(("F", first + micro))
        found[rank] = [(rank, letter, micro) for letter, micro in letters]
    return found


def order(schedule: str, ranks: int, virtual: int, micro_batches: int) -> Order:
    """Of schedules with several stages a rank from torch itself; what it tells of 1F1B is off by one on the last rank,
    so those with one stage are written down here. Raises PolymodalError for what the schedule cannot run."""
    if schedule in ("GPipe", "1F1B"):
        return _single(ranks, micro_batches, None if schedule == "GPipe" else 1)
    with pretended_group(ranks):
        group, total = dist.group.WORLD, ranks * virtual
        example = (torch.empty(1),)
        stages = [
            PipelineStage(torch.nn.Identity(), stage, total, torch.device("cpu"), input_args=example, output_args=example, group=group)
            for stage in stages_of(schedule, ranks, virtual)[0]
        ]  # fmt: skip
        kind = get_schedule_class(schedule)
        try:
            made = kind(
                stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
                n_microbatches=micro_batches,
                loss_fn=lambda output, target: output,
            )
        except ValueError as error:
            raise PolymodalError(
                f"The schedule {schedule} cannot run {micro_batches} micro-batches over {ranks} ranks: {error}.",
                f"Use a multiple of {ranks} micro-batches: train.global_batch_size = {ranks} x data-parallel ranks.",
            ) from None
        known = made.pipeline_order
        return {
            rank: [
                (a.stage_index, str(a.computation_type.value if hasattr(a.computation_type, "value") else a.computation_type), a.microbatch_index)
                for a in actions
                if a is not None and a.microbatch_index is not None
            ]
            for rank, actions in known.items()
        }  # fmt: skip


def play(
    schedule: str, ranks: int, micro_batches: int, forward: Sequence[float], backward: Sequence[float], transfer: float = 0.0
) -> Timeline:  # fmt: skip
    """Play a step. forward, backward: seconds of each STAGE's micro-batch, transfer: between two stages."""
    virtual = len(forward) // ranks
    actions = {rank: list(found) for rank, found in order(schedule, ranks, virtual, micro_batches).items()}
    last = len(forward) - 1
    done: dict[tuple[int, str, int], float] = {}
    free = dict.fromkeys(actions, 0.0)
    slots: list[Slot] = []
    home = {stage: rank for rank, own in enumerate(stages_of(schedule, ranks, virtual)) for stage in own}

    def ready(stage: int, letter: str, micro: int) -> float | None:
        """When what this action reads is there; None while nobody has begun to make it."""
        if letter == "W":
            needed = [(stage, "I", micro)]
        elif letter == "F":
            needed = [(stage - 1, "F", micro)] if stage else []
        else:
            needed = [(stage, "F", micro)] + ([(stage + 1, "I", micro)] if stage < last else [])
        times = []
        for key in needed:
            at = done.get(key, done.get((key[0], "B", micro)) if key[1] == "I" else None)
            if at is None:
                return None
            times.append(at + (transfer if home[key[0]] != home[stage] else 0.0))
        return max(times, default=0.0)

    waiting = True
    while waiting:
        waiting = False
        for rank, queue in actions.items():
            while queue:
                stage, letter, micro = queue[0]
                at = ready(stage, letter, micro)
                if at is None:
                    break
                queue.pop(0)
                waiting = True
                share = 0.5 if letter in "IW" else 1.0
                start = max(at, free[rank])
                end = start + (forward[stage] if letter == "F" else backward[stage] * share)
                free[rank] = done[stage, letter, micro] = end
                slots.append(Slot(rank, stage, micro, NAMES[letter], start, end))
    if any(actions.values()):
        raise RuntimeError(f"the order of {schedule} waits for itself")
    seconds = max(free.values())
    busy = sum(slot.end - slot.start for slot in slots)
    return Timeline(tuple(slots), seconds, 1.0 - busy / (seconds * ranks))
