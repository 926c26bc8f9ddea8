"""Running a cut model: torch's schedules over the stages, what travels between them, tied weights of several stages.

Sees stages.py, models/card.py and the ground floor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.distributed.tensor import DTensor

from polymodal.core.sample import Batch
from polymodal.distributed.mesh import Mesh
from polymodal.models.card import Output
from polymodal.models.family import Family
from polymodal.parallel.pipeline_split import SCHEDULES, micro_batches_fit
from polymodal.parallel.stages import Part, Stage

FORWARD_ACTIONS = ("FORWARD", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
"""Of a schedule's actions, those of a forward pass alone."""

Finish = Callable[[Output, Batch], Any]

Carry = Mapping[str, Tensor]
"""Meta tensors of what travels between two stages, in wire order, requires_grad set."""


def widest(
    family: Family, batches: Sequence[Batch], before: Mapping[str, int], dtype: torch.dtype, wanted: bool
) -> dict[str, Tensor]:
    """What travels over a cut in a step: for each tensor the largest size over the step's micro-batches.

    before: blocks before the cut; wanted: whether gradients go back over it. Every stage holds the same micro-batches,
    so both ends of a wire know it without asking.
    """
    specs = [family.carry_spec(batch, before, dtype) for batch in batches]
    out = {}
    for name, first in specs[0].items():
        shape = [max(sizes) for sizes in zip(*(spec[name].shape for spec in specs), strict=True)]
        back = wanted and first.is_floating_point()
        out[name] = torch.empty(shape, dtype=first.dtype, device="meta", requires_grad=back)
    return out


def bind(model: nn.Module, family: Family, stage: Stage, dtype: torch.dtype) -> None:
    """Make `model(*carry, batch=, finish=, wire=)` run one stage; the last one ends with `finish(output, batch)`.

    Like train.step.bind, for a stage: before sharding, `finish` chosen per call. torch's schedules send one shape a
    step, micro-batches differ in length: `wire(cut)` is that shape, what leaves is filled up to it with zeros and
    what enters is cut to the batch's own size. dtype: of the activations.
    """

    def forward(
        *carry: Tensor, batch: Batch, finish: Finish, wire: Callable[[int], Carry], device: torch.device
    ) -> Any:
        batch, entering = batch.to(device), None
        if not stage.first:
            own = family.carry_spec(batch, stage.cuts[stage.index - 1], dtype)
            entering = {name: _cut(tensor, own[name].shape) for name, tensor in zip(own, carry, strict=True)}
        out = family.stage(model, entering, batch)
        if isinstance(out, Output):
            return finish(out, batch)
        return tuple(_fill(out[name], spec) for name, spec in wire(stage.index).items())

    model.forward = forward  # type: ignore[method-assign]


def _cut(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def _fill(tensor: Tensor, spec: Tensor) -> Tensor:
    tensor = tensor.to(spec.dtype)
    missing = [(0, size - have) for size, have in zip(spec.shape, tensor.shape, strict=True)]
    if any(after for _, after in missing):
        return nn.functional.pad(tensor, [size for pair in reversed(missing) for size in pair])
    # a view may be strided, which cannot be sent, and would lose FSDP2's hook when written to; what only passes through
    # would be two stages' leaf at once
    alone = tensor.is_contiguous() and not tensor._is_view() and not (tensor.is_leaf and tensor.requires_grad)
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


class _Stage(PipelineStage):
    """torch's stage keeps gathered parameters and whole gradients to the last micro-batch (ZeRO-1) and reduces then.

    Under ZeRO-2 and 3 gradients are reduced in every backward, and under 3 parameters freed after it.
    """

    def backward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        module = self.submod
        stage = getattr(module, "zero_stage", 1)
        if not isinstance(module, FSDPModule) or stage == 1:
            return super().backward_maybe_with_nosync(*args, **kwargs)
        module.set_is_last_backward(False)
        module.set_reshard_after_backward(stage == 3)
        module.set_requires_all_reduce(False)  # over replicas, once a step
        # FSDP2 gathers the root's weights when a gradient meets its output. That is a tensor of its own if it was
        # filled up, else its last block's, whose own hook is first: ranks would gather in different orders.
        module.unshard()
        self.submod = nn.Identity()  # torch would set FSDP2 to its own way
        try:
            return super().backward_maybe_with_nosync(*args, **kwargs)
        finally:
            self.submod = module


def build_schedule(
    parts: Sequence[Part],
    wire: Callable[[int], Carry],
    micro_batches: int,
    group: dist.ProcessGroup,
    device: torch.device,
    name: str = "1F1B",
    backward: bool = True,
) -> Any:
    """One of torch's schedules over this rank's stages (one, or several for virtual stages).

    wire(cut) gives what travels over each cut: shapes are then known to torch beforehand, it neither runs a forward
    pass to find them nor keeps those of an earlier step. Gradients are summed over micro-batches (the loss comes
    already scaled). backward: False for forward passes only.
    """
    made = []
    for part in parts:
        stage = part.stage
        # torch wants example tensors; the loss of the last stage goes nowhere, any scalar stands for it
        entering = () if stage.first else tuple(wire(stage.index - 1).values())
        leaving = (torch.empty((), device="meta"),) if stage.last else tuple(wire(stage.index).values())
        made.append(
            _Stage(
                part.model,
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
    loss = _already_the_loss if backward else None
    built = schedule(stages, n_microbatches=micro_batches, loss_fn=loss, scale_grads=False)
    if not backward and isinstance(stages, list):
        # torch passes over a backward's arithmetic then, but in a V still hands gradients from stage to stage
        built.pipeline_order_with_comms = {
            rank: [action for action in actions if action.computation_type.name in FORWARD_ACTIONS]
            for rank, actions in built.pipeline_order_with_comms.items()
        }
    return built


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """What a stage raised, as it was: torch wraps it in a text with every tensor of the batch."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _already_the_loss(output: Tensor, _: None) -> Tensor:
    return output


class Pipeline:
    """Runs steps over this rank's stages. Packs may have any length: the schedule is renewed when the longest of a
    step changes, which costs two small messages a stage."""

    def __init__(
        self,
        parts: Sequence[Part],
        family: Family,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        name: str = "1F1B",
    ):
        self.parts, self.family, self.group, self.device = parts, family, group, device
        self.dtype, self.name = dtype, name
        self._made: dict[bool, tuple[Any, Any]] = {}

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank holds the last stage, which alone knows losses and logs."""
        return any(part.stage.last for part in self.parts)

    def step(
        self,
        batches: Sequence[Batch],
        finish: Callable[[Output, Batch], tuple[Tensor, dict[str, Any]]],
        backward: bool = True,
    ) -> list[dict[str, Any]]:
        """Forward and backward of a rank's whole step; gradients end in .grad. `finish` gives the scaled loss and
        logs; returns the logs, on the last stage only. Every stage gets the same batches: only what a stage
        computes travels. backward: False for a forward pass without gradients."""
        wires: dict[int, Carry] = {}
        stage = self.parts[0].stage

        def wire(cut: int) -> Carry:
            if cut not in wires:
                # torch parts a backward by what depends on the inputs: these need gradients then, wanted or not
                wanted = backward and (stage.wanted[cut] or SCHEDULES[self.name].split_backward)
                wires[cut] = widest(self.family, batches, stage.cuts[cut], self.dtype, wanted)
            return wires[cut]

        logs: list[dict[str, Any]] = []

        def keep(output: Output, batch: Batch) -> Tensor:
            loss, entry = finish(output, batch)
            logs.append(entry)
            return loss

        with contextlib.nullcontext() if backward else torch.no_grad(), _own_errors():
            self._schedule(batches, wire, backward).step(
                arg_mbs=[()] * len(batches),
                kwarg_mbs=[
                    {"batch": batch, "finish": keep, "wire": wire, "device": self.device} for batch in batches
                ],
                target_mbs=[None] * len(batches),
                return_outputs=False,
            )
        return logs

    def _schedule(self, batches: Sequence[Batch], wire: Callable[[int], Carry], backward: bool) -> Any:
        # all cuts of the line, not only this rank's: every stage must renew in the same step
        cuts = range(len(self.parts[0].stage.cuts))
        key = (len(batches), [[tuple(tensor.shape) for tensor in wire(cut).values()] for cut in cuts])
        if self._made.get(backward, (None, None))[0] != key:
            name, count = self.name, len(batches)
            if not backward or not micro_batches_fit(name, self.group.size(), count):
                name = SCHEDULES[name].otherwise
            made = build_schedule(self.parts, wire, count, self.group, self.device, name, backward)
            self._made[backward] = (key, made)
        return self._made[backward][1]


class TiedGradients:
    """Sums the gradients of weights that several stages hold a copy of, so that the copies stay equal.

    Made once by every rank, in the same order (it creates process groups). The copies are sharded alike on every
    stage, so each rank sums its own shard with those of the ranks at the same place of the other stages.
    parts: this rank's; home: pipeline rank of a stage.
    """

    def __init__(self, parts: Sequence[Part], mesh: Mesh, home: Callable[[int], int]):
        models = {part.stage.index: part.model for part in parts}
        lines = mesh.world.mesh.reshape(mesh.sizes.pp, -1).T.tolist()
        self.sums: list[tuple[list[tuple[nn.Module, str]], dist.ProcessGroup | None]] = []
        for tie in parts[0].stage.tied:
            mine = [(models[at], name) for name, at in tie if at in models]
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
        for places, group in self.sums:
            # looked up each time: loading weights makes new tensors of them
            copies = [model.get_parameter(name) for model, name in places]
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
