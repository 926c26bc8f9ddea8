"""A process group of a whole world inside one process, and a layout made on meta under it.

Sees models and parallel. Collectives of the group do nothing; the code that is run under it is the run's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models.family import Family
from polymodal.parallel import stages
from polymodal.parallel.apply import apply
from polymodal.recipe import Recipe
from polymodal.train import optim


@contextlib.contextmanager
def pretended_group(world: int, rank: int = 0) -> Iterator[None]:
    """A process group of `world` ranks that exists in this process, its rank `rank`, only; collectives do
    nothing.

    Raises PolymodalError inside a process that has a real group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # also registers the backend "fake"

    if dist.is_initialized():
        raise PolymodalError(
            "A run cannot be estimated inside a process that is part of one.", "Use `polymodal check`."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    _forget_meshes()
    try:
        yield
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """DTensor remembers layouts by equality of meshes, and hands out a mesh whose groups an earlier world
    took along."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


def meta_model(family: Family, recipe: Recipe) -> nn.Module:
    """The model on meta with adapters attached and towers frozen as the recipe says. Raises
    PolymodalError."""
    model = family.build().trained
    if recipe.model.lora is not None:
        from polymodal.models import lora

        lora.attach(model, recipe.model.lora, family.card)
    optim.freeze(model, recipe.train.freeze, family.card.towers)
    return model


def try_layout(
    model: nn.Module, family: Family, recipe: Recipe, world: int, measure: SampleLengths | None = None
) -> None:
    """Lay a model on meta out (in place) as rank 0 of every pipeline stage would.

    measure: a typical sample, for parallel.pp_layers = auto. Raises PolymodalError for every layout that
    training would refuse.
    """
    sizes = ParallelSizes.of(recipe.parallel, world)
    first = [model]
    with pretended_group(world):
        mesh = Mesh(sizes, "cpu", 0)
        for rank in range(sizes.pp):
            parts = stages.build(
                lambda: first.pop() if first else meta_model(family, recipe),
                family,
                recipe.parallel,
                rank,
                measure,
            )
            for part in parts:
                apply(part.model, family.card, mesh, recipe)
