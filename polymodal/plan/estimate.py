"""What a run will need, without devices: bytes a rank holds, and bytes its checkpoints take.

Sees models and parallel. The model is built on meta and laid out by the same `parallel.apply` under a pretended group
of all ranks, so sharded bytes are counted, not guessed. Activations are a formula and are called an estimate.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.parallel import pipeline_split
from polymodal.parallel.stages import Part
from polymodal.recipe import Recipe
from polymodal.train import optim
from polymodal.train.layouts import layout_of


@dataclass
class Estimate:
    """Bytes of rank 0. Counted: parameters, gradients, optimizer, average, gathered. Estimated: activations."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    gathered: int = 0  # the largest sharded unit and the root, whole, and its gradient before it is reduced
    activations: int = 0
    assumed: str = ""  # what the activations were estimated for
    total: int = 0  # parameters of the whole model
    trained: int = 0
    towers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (parameters, trained)
    checkpoint: int = 0  # bytes of one checkpoint
    saving: int = 0  # bytes of the host that rank 0 takes while a checkpoint is written in the background
    export: int = 0  # bytes of the model in the hub's format

    @property
    def memory(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.average
            + self.gathered
            + self.activations
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory}


@contextlib.contextmanager
def pretended_group(world: int, rank: int = 0) -> Iterator[None]:
    """A process group of `world` ranks that exists in this process, its rank `rank`, only; collectives do nothing.

    Raises PolymodalError inside a process that has a real group.
    """
    import torch.distributed as dist
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
    """DTensor remembers layouts by equality of meshes, and hands out a mesh whose groups an earlier world took along."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def meta_model(family: Family, recipe: Recipe) -> nn.Module:
    """The model on meta with adapters attached and towers frozen as the recipe says. Raises PolymodalError."""
    model = family.build().trained
    if recipe.model.lora is not None:
        from polymodal.models import lora

        lora.attach(model, recipe.model.lora, family.card)
    optim.freeze(model, recipe.train.freeze, family.card.towers)
    return model


def lay_out(
    model: nn.Module, family: Family, recipe: Recipe, world: int, measure: SampleLengths | None = None
) -> Estimate:
    """Counts the model, lays it out for rank 0 of `world` (in place) and, of a pipeline, of every stage, and counts
    what that rank holds, of a pipeline the one that holds most. measure: a typical sample, for pp_layers = auto.

    Raises PolymodalError for every layout that `parallel.apply` refuses.
    """
    from polymodal.parallel import stages
    from polymodal.parallel.apply import apply

    out = Estimate()
    card = family.card
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        count, train = parameter.numel(), parameter.numel() * parameter.requires_grad
        tower = optim.tower_of(name, card.towers) or "other"
        had = out.towers.get(tower, (0, 0))
        out.towers[tower] = had[0] + count, had[1] + train
        out.total += count
        out.trained += train
    sizes = ParallelSizes.of(recipe.parallel, world)
    first = [model]
    ranks = []
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
            blocks = [_blocks(part.model, card) for part in parts]
            for part in parts:
                apply(part.model, card, mesh, recipe)
            ranks.append(_held(parts, blocks, card, recipe, sizes))
    most = max(ranks, key=lambda held: held.memory)
    return replace(
        out,
        parameters=most.parameters,
        gradients=most.gradients,
        optimizer=most.optimizer,
        average=most.average,
        saving=most.saving,
        gathered=most.gathered,
        checkpoint=sum(held.checkpoint for held in ranks),
        export=out.total * 2,
    )


def _blocks(model: nn.Module, card: ModelCard) -> tuple[list[int], int]:
    """(parameters of each block that is here, of the rest)."""
    from polymodal.parallel.apply import matching

    blocks = [
        sum(p.numel() for p in block.parameters())
        for block in matching(model, card.blocks, card.name).values()
    ]
    return blocks or [0], sum(p.numel() for p in model.parameters()) - sum(blocks)


def _held(
    parts: Sequence[Part],
    whole: Sequence[tuple[list[int], int]],
    card: ModelCard,
    recipe: Recipe,
    sizes: ParallelSizes,
) -> Estimate:
    """What one rank holds of laid-out parts; whole: parameters of their blocks and of the rest before."""
    from polymodal.parallel.apply import COMPUTE_DTYPE

    out = Estimate()
    full, copied = recipe.checkpoint.save == "full", recipe.checkpoint.asynchronous
    for part in parts:
        for name, parameter in part.model.named_parameters():
            held = _bytes(_local(parameter))
            out.parameters += held
            if not parameter.requires_grad:
                continue
            out.gradients += held
            block = any(optim.in_tower(name, (pattern,)) for pattern in card.blocks)
            moments = 1 if recipe.optim.name == "muon" and block and parameter.ndim == 2 else 2
            out.optimizer += moments * held
            if recipe.train.ema:
                out.average += 4 * _local(parameter).numel()
            if name not in part.stage.copies:
                average = 4 * _local(parameter).numel() * bool(recipe.train.ema)
                out.saving += (held + (moments * held + average) * full) * copied
                out.checkpoint += parameter.numel() * parameter.element_size() * (1 + moments * full)
                out.checkpoint += 4 * parameter.numel() * bool(recipe.train.ema and full)
    if sizes.dp_shard * sizes.cp * sizes.dp_replicate > 1:
        compute = COMPUTE_DTYPE[recipe.train.precision]
        width = compute.itemsize if compute is not None else 4
        for blocks, root in whole:
            units = 2 * max(blocks) if recipe.parallel.reshards else sum(blocks)
            out.gathered += (root + units) * width // sizes.tp
            if out.gradients:
                at_the_end = recipe.parallel.zero_stage == 1
                largest = sum(blocks) + root if at_the_end else max(*blocks, root)
                out.gathered += 4 * largest // sizes.tp
    return out


def activations(
    family: Family, recipe: Recipe, patches_per_token: float, world: int | None = None
) -> tuple[int, str]:
    """(bytes, what they are for): tensors kept for backward in one micro-batch, of a pipeline in all that are under way
    on its first rank (1F1B starts as many as there are ranks, GPipe all). world: of a pipeline. An estimate
    (Layout.block_bytes).
    """
    layout = layout_of(recipe, family)
    one, assumed = layout.activations(patches_per_token)
    if world is None or recipe.parallel.pp == 1:
        return one, assumed
    dp = ParallelSizes.of(recipe.parallel, world).dp
    count = pipeline_split.micro_batches(recipe.train, layout.packs, dp)
    under_way = count if recipe.parallel.pp_schedule == "GPipe" else min(count, recipe.parallel.pp)
    return (
        one * under_way // recipe.parallel.pp,
        f"{under_way} x {assumed} on 1 / {recipe.parallel.pp} of the layers",
    )


def disk(recipe: Recipe, estimate: Estimate) -> tuple[int, int]:
    """(bytes that checkpoints and the export take at most, bytes free there). One more is written before one is pruned."""
    from polymodal.runtime import host

    wanted = estimate.checkpoint * (recipe.checkpoint.keep + 1) + (
        estimate.export if recipe.checkpoint.export else 0
    )
    return wanted, host.space(os.fspath(recipe.run_dir)).free
