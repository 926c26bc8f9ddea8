"""A run's model, layout and optimizer step without data and without a loop: what `plan` traces and calibration runs.

Sees every room. The order is the trainer's: family, adapters, freezing, `apply`, memory, optimizer, then micro-batches,
norm, clipping and update. Runs alike with fake tensors under a pretended group and with real ones in a real world.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch, SampleLengths
from polymodal.distributed.mesh import Mesh
from polymodal.models import weights
from polymodal.models.family import Family
from polymodal.plan.pretended import meta_model
from polymodal.recipe import Recipe
from polymodal.train import optim
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import ParallelModel
from polymodal.train.step import StepMetrics, forward_backward


class Job:
    """One rank of a run. The caller sets the process group up, and a tracker around it if there is one."""

    def __init__(self, recipe: Recipe, family: Family, mesh: Mesh, measure: SampleLengths):
        """measure: of a micro-batch, for parallel.pp_layers = auto."""
        self.recipe, self.family, self.mesh = recipe, family, mesh
        self.model = ParallelModel(
            lambda: meta_model(family, recipe), family, mesh, recipe, torch.device("cpu"), measure
        )
        self.layout = layout_of(recipe, family)
        self.objective = self.layout.objective
        self.shard_batches = self.layout.batch_sharding(mesh)
        self.encoders: Tensor | None = None
        self.frozen = self.layout.resident_encoders(mesh.fsdp_size)

    def fill(self, seed: int | None = None) -> None:
        """Give parameters memory (with a seed: values too) and buffers their values, then make the optimizer."""

        def load(model: nn.Module) -> None:
            if seed is None:
                weights.materialise(model, "cpu")
                weights.rebuild_buffers(model, persistent=True)
            else:
                weights.initialise(model, self.family, seed, "cpu")

        self.model.load_all(load)
        self.model.train()
        self.trainable = self.model.trainable
        blocks = {n for n in self.trainable if any(optim.in_tower(n, (b,)) for b in self.family.card.blocks)}
        offload = "optimizer" in self.recipe.parallel.offload
        self.optimizer = optim.Optimizer(
            self.trainable, self.recipe.optim, self.family.card.towers, blocks, offload
        )
        self.optimizer.state(create=True)
        if self.frozen:
            self.encoders = torch.empty(self.frozen, dtype=self.layout.dtype)
        decay = self.recipe.train.ema
        self.average = optim.MovingAverage(self.trainable, decay) if decay else None

    def forward_backward(self, batches: list[Batch]) -> None:
        """Gradients of a step of these micro-batches into .grad."""
        batches = self.objective.prepare(None, batches)
        inverse: dict[str, float] = {}
        for batch in batches:
            inverse |= {term: 1.0 / max(value, 1.0) for term, value in self.objective.weights(batch).items()}
        forward_backward(
            self.model.runner, self.objective, self.shard_batches(batches), inverse, StepMetrics()
        )

    def update(self) -> None:
        """Norm, clipping, optimizer, average; gradients are freed."""
        norm = self.model.gradients()
        if self.recipe.optim.clip_norm:
            self.model.clip(norm, self.recipe.optim.clip_norm)
        self.optimizer.step()
        self.model.after_step()
        if self.average is not None:
            self.average.update()
        self.optimizer.zero_grad()

    def step(self, batches: Callable[[], list[Batch]], between: Callable[[], None] = lambda: None) -> None:
        """One optimizer step; `between` is called when gradients are whole. `batches` makes what the step reads."""
        self.forward_backward(batches())
        between()
        self.update()
