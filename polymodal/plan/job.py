"""A run's model, layout and optimizer step without data and without a loop: what `plan` traces and calibration runs.

Sees every room. The order is the trainer's: family, adapters, freezing, `apply`, memory, optimizer, then micro-batches,
norm, clipping and update. Runs alike with fake tensors under a pretended group and with real ones in a real world.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from polymodal.data.sample import Batch, Measure
from polymodal.errors import PolymodalError
from polymodal.models import weights
from polymodal.models.card import Family
from polymodal.objectives.language import LanguageObjective
from polymodal.parallel.batches import BatchLayout
from polymodal.parallel.mesh import Mesh
from polymodal.recipe import Recipe
from polymodal.train import estimate, optim
from polymodal.train.model import LaidOut
from polymodal.train.step import Tally, forward_backward


@dataclass(frozen=True)
class Load:
    """What one micro-batch holds: tokens in all, share of them that stands for pictures, patches of one picture."""

    tokens: int
    media: float = 0.25
    patches: int = 1024

    @classmethod
    def of(cls, recipe: Recipe, media: float, patches: int) -> Load:
        """A full pack, or micro_batch_size samples of the greatest length. Raises PolymodalError for impossible shares."""
        if not 0 <= media < 1:
            raise PolymodalError(
                f"--media {media} is no share of tokens.", "Use a number from 0 to less than 1."
            )
        data = recipe.data
        tokens = (
            (data.pack_length or data.max_length)
            if data.pack
            else data.max_length * recipe.train.micro_batch_size
        )
        return cls(tokens, media, patches)

    def measure(self, family: Family) -> Measure:
        """Sizes for `family.example`: as many whole pictures as fit into the share, every token of text trained."""
        vision = getattr(family.config, "vision_config", None)
        merged = getattr(vision, "spatial_merge_size", 1) ** 2
        each = max(1, self.patches // merged)
        count = int(self.tokens * self.media // each) if vision is not None else 0
        return Measure(self.tokens, self.tokens - count * each, (each * merged,) * count)


class Job:
    """One rank of a run. The caller sets the process group up, and a tracker around it if there is one."""

    def __init__(self, recipe: Recipe, family: Family, mesh: Mesh, measure: Measure):
        """measure: of a micro-batch, for parallel.pp_layers = auto."""
        self.recipe, self.family, self.mesh = recipe, family, mesh
        self.model = LaidOut(
            lambda: estimate.meta_model(family, recipe), family, mesh, recipe, torch.device("cpu"), measure
        )
        self.objective = LanguageObjective(recipe.train.loss, **family.balance(recipe.train.router_aux_loss))
        self.lay_out = BatchLayout(family, mesh, recipe.parallel)

    def fill(self, seed: int | None = None) -> None:
        """Give parameters memory (with a seed: values too) and buffers their values, then make the optimizer."""

        def load(model: nn.Module) -> None:
            if seed is None:
                weights.materialise(model, "cpu")
                weights.rebuild_buffers(model, persistent=True)
            else:
                weights.initialise(model, self.family, seed, "cpu")

        self.model.fill(load)
        self.model.train()
        self.trainable = self.model.trainable
        blocks = {n for n in self.trainable if any(optim.in_tower(n, (b,)) for b in self.family.card.blocks)}
        offload = "optimizer" in self.recipe.parallel.offload
        self.optimizer = optim.Optimizer(
            self.trainable, self.recipe.optim, self.family.card.towers, blocks, offload
        )
        self.optimizer.state(create=True)
        decay = self.recipe.train.ema
        self.average = optim.MovingAverage(self.trainable, decay) if decay else None

    def forward_backward(self, batches: list[Batch]) -> None:
        """Gradients of a step of these micro-batches into .grad."""
        inverse: dict[str, float] = {}
        for batch in batches:
            inverse |= {term: 1.0 / max(value, 1.0) for term, value in self.objective.weights(batch).items()}
        forward_backward(self.model.runner, self.objective, self.lay_out(batches), inverse, Tally())

    def update(self) -> None:
        """Norm, clipping, optimizer, average; gradients are freed."""
        norm = self.model.gradients()
        if self.recipe.optim.clip_norm:
            self.model.clip(norm, self.recipe.optim.clip_norm)
        self.optimizer.step()
        self.model.stepped()
        if self.average is not None:
            self.average.update()
        self.optimizer.zero_grad()

    def step(self, batches: Callable[[], list[Batch]], between: Callable[[], None] = lambda: None) -> None:
        """One optimizer step; `between` is called when gradients are whole. `batches` makes what the step reads."""
        self.forward_backward(batches())
        between()
        self.update()
