"""A process group of a whole world inside one process, whose collectives do nothing, and a layout tried in it
on meta."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models.family import Family
from polymodal.recipe import Recipe
from polymodal.train.parallel_model import ParallelModel, meta_model


@contextlib.contextmanager
def pretended_group(world: int, rank: int = 0) -> Iterator[None]:
    """This process as rank `rank` of a process group of `world`. Raises PolymodalError where there is a real
    group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # also registers the backend "fake"

    if dist.is_initialized():
        raise PolymodalError(
            "A run cannot be estimated inside a process that is part of one.", "Use `polymodal check`."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    _clear_mesh_caches()
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_mesh_caches()


def _clear_mesh_caches() -> None:
    """DTensor caches layouts by equality of meshes, and would hand out a mesh of a group that was
    destroyed."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


def try_layout(family: Family, recipe: Recipe, world: int, measure: SampleLengths | None = None) -> None:
    """Build the model on meta as the first rank of every pipeline stage would.

    measure: a typical sample, for parallel.pp_layers = auto. Raises PolymodalError for every layout that
    training would refuse.
    """
    sizes = ParallelSizes.of(recipe.parallel, world)
    make = partial(meta_model, family, recipe)
    for rank in range(0, world, world // sizes.pp):
        with pretended_group(world, rank):
            ParallelModel(make, family, Mesh(sizes, "cpu", rank), recipe, torch.device("cpu"), measure)
