"""The model as it is on this rank, in pipeline stages and shards; parameters have checkpoint names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import SampleLengths
from polymodal.distributed.collectives import clip_, grad_norm
from polymodal.distributed.mesh import Mesh
from polymodal.models import lora, partial, quantised
from polymodal.models.family import Family
from polymodal.parallel import dit_context_parallel, pipeline_split, stages
from polymodal.parallel.apply import COMPUTE_DTYPE, apply
from polymodal.parallel.batches import context_of
from polymodal.parallel.pipeline import Pipeline, TiedGradients
from polymodal.parallel.pipeline import bind as bind_stage
from polymodal.recipe import Recipe
from polymodal.train import optim
from polymodal.train.step import Runner, bind


def meta_model(family: Family, recipe: Recipe) -> nn.Module:
    """The whole model on meta, adapters attached, frozen parameters marked, a base of few bits quantised.

    Raises PolymodalError.
    """
    model = family.build()
    if recipe.model.lora is not None:
        lora.attach(model, recipe.model.lora, family.card)
    optim.freeze(model, recipe.train.freeze, family.card.towers, family.frozen)
    if recipe.model.base != "bf16":
        quantised.quantise(model, recipe.model.base, family.card)
    return model


class ParallelModel:
    """Cut into stages, bound and sharded over the mesh; without values until weights are loaded.

    make:    gives the whole model on meta, adapters attached and frozen parameters marked, once a stage.
    measure: a typical sample, for parallel.pp_layers = auto.
    trainable: parameters by name, a tied weight's copy under its owner's; owned: without such copies.
    total, trained: number of parameters of the whole model; names: of all of them; passes: FLOPs of training
    over those of the forward pass (pipeline_split.training_passes).
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        family: Family,
        mesh: Mesh,
        recipe: Recipe,
        device: torch.device,
        measure: SampleLengths | None = None,
    ):
        self.mesh, self.family = mesh, family
        self.names: list[str] = []

        def counted() -> nn.Module:
            model = make()
            if not self.names:
                with quantised.unpacked(model):
                    named = dict(model.named_parameters())
                self.names = list(named)
                self.total = sum(p.numel() for p in named.values())
                self.trained = sum(p.numel() for p in named.values() if p.requires_grad)
                self.passes = pipeline_split.training_passes(model, family, measure)
                self.dtype = next(iter(named.values())).dtype
            return model

        parallel = recipe.parallel
        self.parts = stages.build(counted, family, parallel, mesh.at["pp"], measure)
        activations = COMPUTE_DTYPE[recipe.train.precision] or self.dtype
        for part in self.parts:
            if parallel.pp > 1:
                bind_stage(part.model, family, part.stage, activations)
            else:
                bind(part.model, family)
            apply(part.model, family.card, mesh, recipe)
        self.ties: TiedGradients | None = None
        self.runner: Any
        if parallel.pp > 1:
            if family.card.sequence_plan:  # what is sent is cut over ranks as the stages' streams are
                probe, context = partial.probe(family, anew=True), context_of(mesh, family.config, parallel)
                if context is not None:
                    dit_context_parallel.apply(probe, family.card, context)
            group = mesh.world["pp"].get_group()
            self.ties = TiedGradients(
                self.parts, mesh, lambda stage: pipeline_split.stage_to_rank(parallel, stage)
            )
            self.runner = Pipeline(self.parts, family, group, device, activations, parallel.pp_schedule)
        else:
            self.runner = Runner(self.parts[0].model, device)
        self._find_parameters()

    def _find_parameters(self) -> None:
        self.all = dict(stages.named_parameters(self.parts))
        copies = {name for name, _ in stages.named_parameters(self.parts, copies=True)}
        self.trainable = {name: p for name, p in self.all.items() if p.requires_grad}
        self.owned = {name: p for name, p in self.trainable.items() if name not in copies}

    @property
    def models(self) -> list[nn.Module]:
        return [part.model for part in self.parts]

    @property
    def first(self) -> bool:
        """Whether a stage is here that reads media: the pipeline's first, or one where a tower begins."""
        towers = {stream.name for stream in self.family.streams}
        begins = (
            held and not held.start
            for part in self.parts
            for tower, held in part.stage.held.items()
            if tower in towers
        )
        return any(part.stage.first for part in self.parts) or any(begins)

    def load_all(self, load: Callable[[nn.Module], Any]) -> None:
        """`load` every part (weights.load, weights.initialise), then tied copies from their owners."""
        for model in self.models:
            load(model)
        self.after_load()

    def after_load(self) -> None:
        """Parameters may be new tensors after values were loaded; tied copies take their owners' values."""
        stages.sync_tied_copies(self.parts)
        self._find_parameters()

    def train(self, mode: bool = True) -> None:
        for model in self.models:
            model.train(mode)

    @torch.no_grad()
    def gradients(self, scale: float = 1.0) -> Tensor:
        """Complete the gradients of a step and divide them by the loss's scale; returns their norm."""
        if self.ties is not None:
            self.ties.reduce()
        if scale != 1.0:
            for p in self.trainable.values():
                if p.grad is not None:
                    p.grad.mul_(1.0 / scale)
        wide = torch.promote_types(self.dtype, torch.float32)
        return grad_norm(self.owned.values(), self.mesh, wide)

    def clip(self, norm: Tensor, largest: float) -> None:
        clip_(self.trainable.values(), norm, largest)

    def after_step(self) -> None:
        """After the optimizer's step."""
        stages.sync_tied_copies(self.parts)
