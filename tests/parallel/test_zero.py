"""What FSDP2 keeps whole between the micro-batches of a step, by ZeRO stage, and what it gathers ahead."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.parallel import memory
from polymodal.parallel.apply import apply
from polymodal.recipe import Model, Parallel, Recipe, Train
from tests.parallel.harness import run

CARD = ModelCard("toy", Family, (), (), ("layers.*",), {})


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _model(rank: int, parallel: Parallel) -> nn.Module:
    torch.manual_seed(0)
    recipe = Recipe(model=Model(source="toy"), parallel=parallel, train=Train(precision="fp32"))
    return apply(Toy(), CARD, Mesh(ParallelSizes(1, 1, 2, 1, 1), "cpu", rank), recipe)


def _whole(rank: int, stage: int) -> list[tuple[bool, bool, bool]]:
    """After each of two micro-batches: are parameters whole, gradients whole, gradients reduced? Then after two more."""
    model = _model(rank, Parallel(zero=stage))  # type: ignore[arg-type]
    layer = model.layers[1]
    assert isinstance(layer, FSDPModule)
    (group,) = layer._get_fsdp_state()._fsdp_param_groups
    seen = []
    for last in (False, True, False, True):
        memory.before_backward(model, last)
        model(torch.full((2, 8), rank + 1.0)).square().sum().backward()
        parameter = group.fsdp_params[0]
        gathered = getattr(parameter, "_unsharded_param", None)
        whole = (
            parameter.unsharded_accumulated_grad is not None or getattr(gathered, "grad", None) is not None
        )
        seen.append((group.is_unsharded, whole, parameter.sharded_param.grad is not None))
        if last:
            model.zero_grad()
    return seen


@pytest.mark.parametrize(
    "stage, between",
    [(1, (True, True, False)), (2, (True, False, True)), (3, (False, False, True))],
)
def test_what_is_whole_between_micro_batches(stage: int, between: tuple[bool, bool, bool]):
    at_the_end = (False, False, True)
    assert run(2, _whole, stage)[0] == [between, at_the_end, between, at_the_end]


def _ahead(rank: int, ahead: int) -> list[list[int]]:
    """Which layers are gathered when each layer begins to compute in the forward pass."""
    model = _model(rank, Parallel(prefetch=ahead))
    groups = [layer._get_fsdp_state()._fsdp_param_groups[0] for layer in model.layers]
    seen: list[list[int]] = []

    def note(*_: object) -> None:
        seen.append([i for i, g in enumerate(groups) if g.is_unsharded or g._all_gather_result is not None])

    for layer in model.layers:
        layer.register_forward_pre_hook(note)
    model(torch.ones(2, 8)).sum().backward()
    return seen


@pytest.mark.parametrize(
    "ahead, gathered",
    [(0, [[0], [1], [2], [3]]), (1, [[0, 1], [1, 2], [2, 3], [3]]), (2, [[0, 1, 2], [1, 2, 3], [2, 3], [3]])],
)
def test_blocks_gathered_ahead(ahead: int, gathered: list[list[int]]):
    assert run(2, _ahead, ahead)[0] == gathered
