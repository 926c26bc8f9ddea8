"""Running a cut model: torch's schedules over the stages, what is sent between them, tied weights."""

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
"""Meta tensors of what is sent between two stages, in order, requires_grad set."""


def widest(
    family: Family, batches: Sequence[Batch], before: Mapping[str, int], dtype: torch.dtype, gradients: bool
) -> dict[str, Tensor]:
    """What is sent over a cut in a step: for each tensor the largest size over the step's micro-batches.

    before: blocks before the cut; gradients: whether they go back over it. Every stage has the same
    micro-batches, so sender and receiver both know it.
    """
    specs = [family.carry_spec(batch, before, dtype) for batch in batches]
    out = {}
    for name, first in specs[0].items():
        shape = [max(sizes) for sizes in zip(*(spec[name].shape for spec in specs), strict=True)]
        backward = gradients and first.is_floating_point()
        out[name] = torch.empty(shape, dtype=first.dtype, device="meta", requires_grad=backward)
    return out


def bind(model: nn.Module, family: Family, stage: Stage, dtype: torch.dtype) -> None:
    """Make `model(*carry, batch=, finish=, wire=)` run one stage; the last ends with finish(output, batch).

    Like train.step.bind, for a stage: before sharding, `finish` chosen per call. torch's schedules send one
    shape a step, micro-batches differ in length: `wire(cut)` has that shape, outputs are padded to it with
    zeros and inputs cut to the batch's own size. dtype: of the activations.
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
        return tuple(_pad(out[name], spec) for name, spec in wire(stage.index).items())

    model.forward = forward  # type: ignore[method-assign]


def _cut(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def _pad(tensor: Tensor, spec: Tensor) -> Tensor:
    tensor = tensor.to(spec.dtype)
    missing = [(0, size - have) for size, have in zip(spec.shape, tensor.shape, strict=True)]
    if any(after for _, after in missing):
        return nn.functional.pad(tensor, [size for pair in reversed(missing) for size in pair])
    # a view may be strided, which cannot be sent, and would lose FSDP2's hook when written to; an input that
    # a stage only passes on would be two stages' leaf
    alone = tensor.is_contiguous() and not tensor._is_view() and not (tensor.is_leaf and tensor.requires_grad)
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


class _Stage(PipelineStage):
    """torch's stage keeps parameters and gradients whole to the last micro-batch (ZeRO-1), and reduces then.

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
        # FSDP2 gathers the root's weights when its output gets a gradient. That output is a tensor of its own
        # if it was padded, else its last block's, whose own hook is first: ranks would gather in different
        # orders.
        module.unshard()
        self.submod = nn.Identity()  # torch would set FSDP2's options itself
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

    wire(cut) gives what is sent over each cut: torch then neither runs a forward pass to find the shapes nor
    keeps those of an earlier step. Gradients are summed over micro-batches (the loss is already scaled).
    backward: False for forward passes only.
    """
    made = []
    for part in parts:
        stage = part.stage
        # torch wants example tensors; the loss of the last stage is not sent, any scalar stands for it
        entering = () if stage.first else tuple(wire(stage.index - 1).values())
        leaving = (torch.empty((), device="meta"),) if stage.last else tuple(wire(stage.index).values())
        shapes: dict[str, Any] = {"input_args": entering, "output_args": leaving}
        made.append(_Stage(part.model, stage.index, stage.stages, device, group=group, **shapes))
    schedule = get_schedule_class(name)
    stages = made if issubclass(schedule, PipelineScheduleMulti) else made[0]
    loss = _already_the_loss if backward else None
    built = schedule(stages, n_microbatches=micro_batches, loss_fn=loss, scale_grads=False)
    if not backward and isinstance(stages, list):
        # torch skips a backward's arithmetic then, but in a V still sends gradients from stage to stage
        built.pipeline_order_with_comms = {
            rank: [action for action in actions if action.computation_type.name in FORWARD_ACTIONS]
            for rank, actions in built.pipeline_order_with_comms.items()
        }
    return built


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise a stage's error as it was: torch wraps it in a text with every tensor of the batch."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _already_the_loss(output: Tensor, _: None) -> Tensor:
    return output


class Pipeline:
    """Runs steps over this rank's stages. Packs may have any length: the schedule is built anew when the
    longest of a step changes, which costs two small messages a stage."""

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
        """Forward and backward of a rank's whole step; gradients go to .grad. `finish` gives the scaled loss
        and logs; returns the logs, on the last stage only. Every stage gets the same batches: only what a
        stage computes is sent.
        backward: False for a forward pass without gradients."""
        wires: dict[int, Carry] = {}
        stage = self.parts[0].stage

        def wire(cut: int) -> Carry:
            if cut not in wires:
                # torch splits a backward by what depends on the inputs: these then need gradients in any case
                gradients = backward and (stage.trained_before[cut] or SCHEDULES[self.name].split_backward)
                wires[cut] = widest(self.family, batches, stage.cuts[cut], self.dtype, gradients)
            return wires[cut]

        logs: list[dict[str, Any]] = []

        def keep(output: Output, batch: Batch) -> Tensor:
            loss, entry = finish(output, batch)
            logs.append(entry)
            return loss

        options = {"finish": keep, "wire": wire, "device": self.device}
        with contextlib.nullcontext() if backward else torch.no_grad(), _own_errors():
            self._schedule(batches, wire, backward).step(
                arg_mbs=[()] * len(batches),
                kwarg_mbs=[{"batch": batch, **options} for batch in batches],
                target_mbs=[None] * len(batches),
                return_outputs=False,
            )
        return logs

    def _schedule(self, batches: Sequence[Batch], wire: Callable[[int], Carry], backward: bool) -> Any:
        # all cuts of the pipeline, not only this rank's: every stage must build anew in the same step
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

    Made once by every rank, in the same order (it creates process groups). The copies are sharded alike on
    every stage, so each rank sums its shard with those of the same coordinates in other stages.
    parts: this rank's; stage_to_rank: pipeline rank of a stage.
    """

    def __init__(self, parts: Sequence[Part], mesh: Mesh, stage_to_rank: Callable[[int], int]):
        models = {part.stage.index: part.model for part in parts}
        pipelines = mesh.world.mesh.reshape(mesh.sizes.pp, -1).T.tolist()
        self.sums: list[tuple[list[tuple[nn.Module, str]], dist.ProcessGroup | None]] = []
        for tie in parts[0].stage.tied:
            own = [(models[at], name) for name, at in tie if at in models]
            holders = sorted({stage_to_rank(at) for _, at in tie})
            group: Any = None
            if len(holders) > 1:
                ranks = [[pipeline[holder] for holder in holders] for pipeline in pipelines]
                group, _ = dist.new_subgroups_by_enumeration(ranks)
            if own:
                self.sums.append((own, group))

    def reduce(self) -> None:
        """Call after the backward pass of the whole step and before the gradient norm."""
        for tied, group in self.sums:
            # looked up each time: loading weights makes new tensors of them
            copies = [model.get_parameter(name) for model, name in tied]
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
