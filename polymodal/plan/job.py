"""One rank of a run without data and without a loop: what `plan` traces and what its calibration runs for
real.

Model, optimizer and layout are built by the trainer's own calls. It runs alike with fake tensors under a
pretended process group and with real tensors in a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch, SampleLengths
from polymodal.distributed.mesh import Mesh
from polymodal.models import weights
from polymodal.models.family import Family
from polymodal.recipe import Recipe
from polymodal.train import optim
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import ParallelModel, meta_model
from polymodal.train.step import StepMetrics, forward_backward, inverse_weights

CPU = torch.device("cpu")


class Job:
    """The caller sets up the process group. measure: of a micro-batch, for parallel.pp_layers = auto."""

    def __init__(
        self, recipe: Recipe, family: Family, mesh: Mesh, measure: SampleLengths, device: torch.device = CPU
    ):
        self.device = device
        self.recipe, self.family = recipe, family
        self.layout = layout_of(recipe, family)
        self.objective = self.layout.objective
        make = partial(meta_model, family, recipe)
        self.model = ParallelModel(make, family, mesh, recipe, device, measure)
        self.shard_batches = self.layout.batch_sharding(mesh)
        self.encoder_parameters = self.layout.resident_encoders(mesh.fsdp_size)
        self.encoders: Tensor | None = None

    def load_all(self, seed: int | None = None) -> None:
        """Allocate parameters (with a seed: initialise them), buffers with their values, optimizer and
        average."""

        def load(model: nn.Module) -> None:
            if seed is not None:
                weights.initialise(model, self.family, seed, self.device)
                return
            weights.materialise(model, self.device)
            weights.rebuild_buffers(model, persistent=True)

        self.model.load_all(load)
        self.model.train()
        self.trainable = self.model.trainable
        self.optimizer = optim.build(self.trainable, self.recipe, self.family.card)
        self.optimizer.state(create=True)
        if self.encoder_parameters:
            self.encoders = torch.empty(self.encoder_parameters, dtype=self.layout.dtype, device=self.device)
        decay = self.recipe.train.ema
        self.average = optim.MovingAverage(self.trainable, decay) if decay else None

    def checkpoint_bytes(self) -> int:
        """Bytes of this rank's tensors in a checkpoint."""
        owned = self.model.owned
        saved: list[Tensor] = list(owned.values())
        if self.recipe.checkpoint.save == "full":
            saved += [t for key, t in self.optimizer.state().items() if key.partition(".")[2] in owned]
            shadow = self.average.shadow if self.average is not None else {}
            saved += [t for name, t in shadow.items() if name in owned]
        return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in saved)

    def step(
        self, batches: Callable[[], list[Batch]], before_update: Callable[[], None] = lambda: None
    ) -> None:
        """One optimizer step on the micro-batches that `batches` makes; before_update is called when
        gradients are complete."""
        prepared = self.objective.prepare(None, batches())
        inverse = inverse_weights(self.objective, prepared, None)
        sharded = self.shard_batches(prepared)
        forward_backward(self.model.runner, self.objective, sharded, inverse, StepMetrics())
        before_update()
        norm = self.model.gradients()
        if self.recipe.optim.clip_norm:
            self.model.clip(norm, self.recipe.optim.clip_norm)
        self.optimizer.step()
        self.model.after_step()
        if self.average is not None:
            self.average.update()
        self.optimizer.zero_grad()
