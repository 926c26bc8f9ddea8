"""Pipeline stages: cutting a model by its card's facts, torch's schedules over the cut, tied weights between stages.

Sees models/card.py and the ground floor. Parameter names never change: a module of another stage is replaced by
`Dropped`, so indices inside lists stay what they are in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.distributed.tensor import DTensor

from polymodal.data.sample import Batch
from polymodal.errors import PolymodalError
from polymodal.models.card import Dropped, Family, ModelCard, Output
from polymodal.parallel.mesh import Mesh


@dataclass(frozen=True)
class Stage:
    """One stage of a cut model.

    layers: the blocks that it holds, by their number in the whole model.
    tied:   one entry for each weight that several stages hold a copy of: ((parameter name, stage), ...), owner first.
    """

    index: int
    stages: int
    layers: range
    tied: tuple[tuple[tuple[str, int], ...], ...] = ()

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.stages - 1

    @property
    def copies(self) -> frozenset[str]:
        """Parameters here that another stage owns: left out of gradient norms and of what is saved."""
        return frozenset(name for tie in self.tied for name, at in tie[1:] if at == self.index and at != tie[0][1])


def split(layers: int, stages: int, layers_per_stage: Sequence[int] | None = None) -> tuple[range, ...]:
    """Blocks of each stage: as asked, or even with the remainder on the middle stages (the ends hold more besides).

    Raises PolymodalError when a stage would be empty or the numbers do not add up.
    """
    if layers_per_stage is None:
        counts = [layers // stages] * stages
        middle = sorted(range(stages), key=lambda stage: abs(stage - (stages - 1) / 2))
        for stage in middle[: layers % stages]:
            counts[stage] += 1
    else:
        counts = list(layers_per_stage)
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        raise PolymodalError(
            f"{layers} layers cannot be cut into {stages} stages as {counts}.",
            f"Give {stages} numbers from 1 that add up to {layers}, or use at most {layers} stages.",
        )
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return tuple(range(end - count, end) for count, end in zip(counts, ends, strict=True))


def pipeline_blocks(model: nn.Module, card: ModelCard) -> list[str]:
    """Names of the blocks that stages are made of, in order: the card's blocks outside its first and last modules."""
    ends = tuple(f"{name}." for name in (*card.first, *card.last))
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found = []
    for pattern in card.blocks:
        if not pattern.startswith(ends):
            expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
            found += [name for name in names if expression.fullmatch(name)]
    return found


def prune(
    model: nn.Module, card: ModelCard, stage: int, stages: int, layers_per_stage: Sequence[int] | None = None
) -> Stage:
    """Drop from `model`, in place, what other stages hold; names of what stays do not change.

    Kept everywhere: modules without parameters (rotary tables) and whatever the card does not place. `card.first`
    and `card.last` may also name parameters. Must come before adapters, sharding and loading. Raises PolymodalError
    when the card cannot be cut, or not so.
    """
    if stages > 1 and "pp" in card.limits:
        raise PolymodalError(f"{card.name} cannot be cut into pipeline stages: {card.limits['pp']}", "Set parallel.pp to 1.")
    blocks = pipeline_blocks(model, card)
    cut = split(len(blocks), stages, layers_per_stage)
    home = {name: at for at, held in enumerate(cut) for name in (blocks[layer] for layer in held)}
    home.update({name: 0 for name in card.first})
    home.update({name: stages - 1 for name in card.last})

    def place(parameter: str) -> int | None:
        return next((at for name, at in home.items() if parameter == name or parameter.startswith(f"{name}.")), None)

    shared: dict[int, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        at = place(name)
        if at is not None:
            shared.setdefault(id(parameter), []).append((name, at))
    tied = tuple(
        tuple(sorted(names, key=lambda entry: entry[1])) for names in shared.values() if len({at for _, at in names}) > 1
    )
    for name, at in home.items():
        if at != stage:
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            if leaf in owner._parameters:
                owner.register_parameter(leaf, None)
            else:
                owner._modules[leaf] = Dropped()
    return Stage(stage, stages, cut[stage], tied)


def bind(model: nn.Module, family: Family, entering: Sequence[str]) -> None:
    """Make `model(*carry, batch=, finish=)` run one stage; the last one ends with `finish(output, batch)`.

    entering: names of the carry's tensors in wire order, () on the first stage. Like train.step.bind, which this is
    for a stage: before sharding, `finish` chosen per call. Returns a tuple of tensors, or finish's value.
    """

    def forward(*carry: Tensor, batch: Batch, finish: Callable[[Output, Batch], Any]) -> Any:
        out = family.stage(model, dict(zip(entering, carry, strict=True)) if entering else None, batch)
        return finish(out, batch) if isinstance(out, Output) else tuple(out.values())

    model.forward = forward  # type: ignore[method-assign]


def build_schedule(
    parts: Sequence[tuple[nn.Module, Stage]],
    carry: Callable[[int], Mapping[str, Tensor]],
    micro_batches: int,
    group: dist.ProcessGroup,
    device: torch.device,
    name: str = "1F1B",
) -> Any:
    """One of torch's schedules over this rank's stages (one, or several for virtual stages).

    carry(layer) gives the tensors that travel into block `layer`, on meta, in wire order, requires_grad set: shapes
    are then known to torch beforehand, it neither runs a forward pass to find them nor keeps those of an earlier
    step. A schedule is cheap to build: make one per step when the length of the packs changes.
    Gradients are summed over micro-batches (the loss comes already scaled).
    """
    made = []
    for model, stage in parts:
        # torch wants example tensors; the loss of the last stage goes nowhere, any scalar stands for it
        entering = () if stage.first else tuple(carry(stage.layers.start).values())
        leaving = (torch.empty((), device="meta"),) if stage.last else tuple(carry(stage.layers.stop).values())
        made.append(
            PipelineStage(
                model, stage.index, stage.stages, device, input_args=entering, output_args=leaving, group=group
            )
        )
    schedule = get_schedule_class(name)
    stages = made if issubclass(schedule, PipelineScheduleMulti) else made[0]
    return schedule(stages, n_microbatches=micro_batches, loss_fn=_already_the_loss, scale_grads=False)


def _already_the_loss(output: Tensor, _: None) -> Tensor:
    return output


def run(
    schedule: Any, batches: Sequence[Batch], finish: Callable[[Output, Batch], tuple[Tensor, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Forward and backward of a rank's whole step; gradients end in .grad. Returns the logs, on the last stage only.

    Every stage gets the same batches: only what a stage computes travels.
    """
    logs: list[dict[str, Any]] = []

    def keep(output: Output, batch: Batch) -> Tensor:
        loss, entry = finish(output, batch)
        logs.append(entry)
        return loss

    schedule.step(
        arg_mbs=[()] * len(batches),
        kwarg_mbs=[{"batch": batch, "finish": keep} for batch in batches],
        target_mbs=[None] * len(batches),
        return_outputs=False,
    )
    return logs


class TiedGradients:
    """Sums the gradients of weights that several stages hold a copy of, so that the copies stay equal.

    Made once by every rank, in the same order (it creates process groups). The copies are sharded alike on every
    stage, so each rank sums its own shard with those of the ranks at the same place of the other stages.
    """

    def __init__(self, model: nn.Module, stage: Stage, mesh: Mesh):
        parameters = dict(model.named_parameters())
        lines = mesh.world.mesh.reshape(mesh.sizes.pp, -1)
        self.sums: list[tuple[nn.Parameter, dist.ProcessGroup]] = []
        for tie in stage.tied:
            holders = sorted({at for _, at in tie})
            mine = next((parameters[name] for name, at in tie if at == stage.index), None)
            for line in lines.T.tolist():
                ranks = [line[at] for at in holders]
                group = dist.new_group(ranks)
                if mesh.rank in ranks and mine is not None:
                    self.sums.append((mine, group))

    def reduce(self) -> None:
        """Call after the backward pass of the whole step and before the gradient norm."""
        for parameter, group in self.sums:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grad = parameter.grad
                dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=group)
