"""One process against many: the same values by name into any layout, gradients by name out of it.

Toy pieces of the spike; they may import every folder but are used by tests only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from polymodal.core.sample import Batch
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models.card import ModelCard, Output
from polymodal.models.family import Family
from polymodal.parallel.apply import _shard, matching
from polymodal.recipe import Parallel
from polymodal.train.step import bind, inverse_weights


def mesh_of(rank: int, **sizes: int) -> Mesh:
    full = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, **sizes}
    return Mesh(ParallelSizes(**full), "cpu", rank)


def shard(model: nn.Module, card: ModelCard, mesh: Mesh, precision: str = "fp32") -> None:
    """FSDP2 as parallel.apply does it, which as a whole still refuses pipelines and context parallelism."""
    _shard(model, list(matching(model, card.blocks, card.name).values()), [], {}, mesh, precision, Parallel())


@torch.no_grad()
def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Parameters that `state` has, from the full tensor of their name; each rank keeps its own shard."""
    for name, parameter in model.named_parameters():
        if name not in state:
            continue
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(
                state[name], parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(whole.to_local())
        else:
            parameter.copy_(state[name])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, of all trainable parameters that are on this rank's stage."""
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            out[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return out


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest relative L2 error of a parameter's gradient, with its name.

    Gradients that are zero in theory (the bias of a key projection) are noise: no norm below 1e-4 of the largest is
    divided by.
    """
    floor = 1e-4 * max(float(grad.norm()) for grad in expected.values())

    def error(name: str) -> float:
        return float((found[name] - expected[name]).norm()) / max(float(expected[name].norm()), floor)

    name = max(found, key=error)
    return error(name), name


def finisher(objective: Any, inverse: dict[str, float]) -> Callable[[Output, Batch], tuple[Tensor, dict]]:
    return lambda output, batch: objective.loss(output, batch, inverse)


def forward_backward(
    model: nn.Module, objective: Any, batches: Sequence[Batch], group: dist.ProcessGroup | None
) -> float:
    """The step of one rank: denominators over the group first; returns the sum of the group's losses."""
    inverse = inverse_weights(objective, batches, group)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss, _ = model(batch=batch, finish=finisher(objective, inverse))
        loss.backward()
        total += loss.detach()
    if group is not None:
        dist.all_reduce(total, group=group)
    return float(total)


def one_process(
    model: nn.Module, family: Family, objective: Any, batches: Sequence[Batch]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the global batch without any parallelism. The model is left as it was."""
    bind(model, family)
    total = forward_backward(model, objective, batches, None)
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    del model.forward
    return total, found
