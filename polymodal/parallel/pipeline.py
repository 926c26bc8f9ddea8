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

Finish = Callable[[Output, Batch], Any]


@dataclass(frozen=True)
class Stage:
    """One stage of a cut model.

    layers: the blocks that it holds, by their number in the whole model.
    cuts:   the block that each stage after the first begins with.
    tied:   one entry for each weight that several stages hold a copy of: ((parameter name, stage), ...), owner first.
    """

    index: int
    stages: int
    layers: range
    cuts: tuple[int, ...] = ()
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
        return frozenset(
            name for tie in self.tied for name, at in tie[1:] if at == self.index and at != tie[0][1]
        )


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
        raise PolymodalError(
            f"{card.name} cannot be cut into pipeline stages: {card.limits['pp']}", "Set parallel.pp to 1."
        )
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
    for name in (*card.first, *card.last):
        if name not in known:
            raise PolymodalError(f"The card {card.name} places `{name}`, which this model does not have.")
    blocks = pipeline_blocks(model, card)
    cut = split(len(blocks), stages, layers_per_stage)
    home = {name: at for at, held in enumerate(cut) for name in (blocks[layer] for layer in held)}
    home.update(dict.fromkeys(card.first, 0))
    home.update(dict.fromkeys(card.last, stages - 1))

    def place(parameter: str) -> int | None:
        return next(
            (at for name, at in home.items() if parameter == name or parameter.startswith(f"{name}.")), None
        )

    shared: dict[int, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        at = place(name)
        if at is not None:
            shared.setdefault(id(parameter), []).append((name, at))
    tied = tuple(
        tuple(sorted(names, key=lambda entry: entry[1]))
        for names in shared.values()
        if len({at for _, at in names}) > 1
    )
    for name, at in home.items():
        if at != stage:
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            if leaf in owner._parameters:
                owner.register_parameter(leaf, None)
            else:
                owner._modules[leaf] = Dropped()
    return Stage(stage, stages, cut[stage], tuple(held.start for held in cut[1:]), tied)


Carry = Mapping[str, Tensor]
"""Meta tensors of what travels between two stages, in wire order, requires_grad set."""


def widest(family: Family, batches: Sequence[Batch], layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What travels into block `layer` in a step: for each tensor the largest size over the step's micro-batches.

    Every stage holds the same micro-batches, so both ends of a wire know it without asking.
    """
    specs = [family.carry_spec(batch, layer, dtype) for batch in batches]
    out = {}
    for name, first in specs[0].items():
        shape = [max(sizes) for sizes in zip(*(spec[name].shape for spec in specs), strict=True)]
        out[name] = torch.empty(shape, dtype=first.dtype, device="meta", requires_grad=first.requires_grad)
    return out


def bind(model: nn.Module, family: Family, stage: Stage, dtype: torch.dtype) -> None:
    """Make `model(*carry, batch=, finish=, wire=)` run one stage; the last one ends with `finish(output, batch)`.

    Like train.step.bind, for a stage: before sharding, `finish` chosen per call. torch's schedules send one shape a
    step, micro-batches differ in length: `wire(layer)` is that shape, what leaves is filled up to it with zeros and
    what enters is cut to the batch's own size. dtype: of the activations.
    """

    def forward(*carry: Tensor, batch: Batch, finish: Finish, wire: Callable[[int], Carry]) -> Any:
        entering = None
        if not stage.first:
            own = family.carry_spec(batch, stage.layers.start, dtype)
            entering = {name: _cut(tensor, own[name].shape) for name, tensor in zip(own, carry, strict=True)}
        out = family.stage(model, entering, batch)
        if isinstance(out, Output):
            return finish(out, batch)
        return tuple(_fill(out[name], spec.shape) for name, spec in wire(stage.layers.stop).items())

    model.forward = forward  # type: ignore[method-assign]


def _cut(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def _fill(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [(0, size - have) for size, have in zip(shape, tensor.shape, strict=True)]
    if any(after for _, after in missing):
        return nn.functional.pad(tensor, [size for pair in reversed(missing) for size in pair])
    # a view may be strided, which cannot be sent, and would lose FSDP2's hook when written to
    return tensor.clone(memory_format=torch.contiguous_format) if tensor._is_view() else tensor


def build_schedule(
    parts: Sequence[tuple[nn.Module, Stage]],
    wire: Callable[[int], Carry],
    micro_batches: int,
    group: dist.ProcessGroup,
    device: torch.device,
    name: str = "1F1B",
) -> Any:
    """One of torch's schedules over this rank's stages (one, or several for virtual stages).

    wire(layer) gives what travels into block `layer`: shapes are then known to torch beforehand, it neither runs a
    forward pass to find them nor keeps those of an earlier step. Gradients are summed over micro-batches (the loss
    comes already scaled).
    """
    made = []
    for model, stage in parts:
        # torch wants example tensors; the loss of the last stage goes nowhere, any scalar stands for it
        entering = () if stage.first else tuple(wire(stage.layers.start).values())
        leaving = (torch.empty((), device="meta"),) if stage.last else tuple(wire(stage.layers.stop).values())
        made.append(
            PipelineStage(
                model,
                stage.index,
                stage.stages,
                device,
                input_args=entering,
                output_args=leaving,
                group=group,
            )
        )
    schedule = get_schedule_class(name)
    stages = made if issubclass(schedule, PipelineScheduleMulti) else made[0]
    return schedule(stages, n_microbatches=micro_batches, loss_fn=_already_the_loss, scale_grads=False)


def _already_the_loss(output: Tensor, _: None) -> Tensor:
    return output


class Pipeline:
    """Runs steps over this rank's stages. Packs may have any length: the schedule is renewed when the longest of a
    step changes, which costs two small messages a stage."""

    def __init__(
        self,
        parts: Sequence[tuple[nn.Module, Stage]],
        family: Family,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        name: str = "1F1B",
    ):
        self.parts, self.family, self.group, self.device = parts, family, group, device
        self.dtype, self.name = dtype, name
        self._made: tuple[Any, Any] = (None, None)

    def step(
        self, batches: Sequence[Batch], finish: Callable[[Output, Batch], tuple[Tensor, dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Forward and backward of a rank's whole step; gradients end in .grad. `finish` gives the scaled loss and
        logs; returns the logs, on the last stage only. Every stage gets the same batches: only what a stage
        computes travels."""
        wires: dict[int, Carry] = {}

        def wire(layer: int) -> Carry:
            if layer not in wires:
                wires[layer] = widest(self.family, batches, layer, self.dtype)
            return wires[layer]

        logs: list[dict[str, Any]] = []

        def keep(output: Output, batch: Batch) -> Tensor:
            loss, entry = finish(output, batch)
            logs.append(entry)
            return loss

        self._schedule(batches, wire).step(
            arg_mbs=[()] * len(batches),
            kwarg_mbs=[{"batch": batch, "finish": keep, "wire": wire} for batch in batches],
            target_mbs=[None] * len(batches),
            return_outputs=False,
        )
        return logs

    def _schedule(self, batches: Sequence[Batch], wire: Callable[[int], Carry]) -> Any:
        # all cuts of the line, not only this rank's: every stage must renew in the same step
        cuts = self.parts[0][1].cuts
        shapes = [[tuple(tensor.shape) for tensor in wire(layer).values()] for layer in cuts]
        key = (len(batches), shapes)
        if key != self._made[0]:
            made = build_schedule(self.parts, wire, len(batches), self.group, self.device, self.name)
            self._made = (key, made)
        return self._made[1]


class TiedGradients:
    """Sums the gradients of weights that several stages hold a copy of, so that the copies stay equal.

    Made once by every rank, in the same order (it creates process groups). The copies are sharded alike on every
    stage, so each rank sums its own shard with those of the ranks at the same place of the other stages.
    parts: this rank's stages, as for build_schedule; home: pipeline rank of a stage, in turn unless given.
    """

    def __init__(
        self, parts: Sequence[tuple[nn.Module, Stage]], mesh: Mesh, home: Callable[[int], int] | None = None
    ):
        if home is None:
            home = lambda stage: stage % mesh.sizes.pp  # noqa: E731
        parameters = {stage.index: dict(model.named_parameters()) for model, stage in parts}
        lines = mesh.world.mesh.reshape(mesh.sizes.pp, -1).T.tolist()
        self.sums: list[tuple[list[nn.Parameter], dist.ProcessGroup | None]] = []
        for tie in parts[0][1].tied:
            mine = [parameters[at][name] for name, at in tie if at in parameters]
            holders = sorted({home(at) for _, at in tie})
            group: dist.ProcessGroup | None = None
            for line in lines if len(holders) > 1 else ():
                ranks = [line[holder] for holder in holders]
                made = dist.new_group(ranks)
                if mesh.rank in ranks:
                    assert isinstance(made, dist.ProcessGroup)
                    group = made
            if mine:
                self.sums.append((mine, group))

    def reduce(self) -> None:
        """Call after the backward pass of the whole step and before the gradient norm."""
        for copies, group in self.sums:
            if not copies[0].requires_grad:
                continue
            total, *others = [_local_gradient(copy) for copy in copies]
            for other in others:
                total += other
            if group is not None:
                dist.all_reduce(total, group=group)
            for other in others:
                other.copy_(total)


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
