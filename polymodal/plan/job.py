"""A run's model, layout and optimizer step without data and without a loop: what `plan` traces and calibration runs.

Sees every room. The order is the trainer's: family, adapters, freezing, `apply`, memory, optimizer, then micro-batches,
norm, clipping and update. Runs alike with fake tensors under a pretended group and with real ones in a real world.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, SampleLengths
from polymodal.data.clips import Clips
from polymodal.distributed.mesh import Mesh
from polymodal.models import pipelines, weights
from polymodal.models.family import Family
from polymodal.parallel.batches import BatchLayout
from polymodal.plan import estimate
from polymodal.recipe import Recipe
from polymodal.train import optim
from polymodal.train.parallel_model import ParallelModel
from polymodal.train.step import StepMetrics, forward_backward
from polymodal.train.tasks import dtype_of, task_of


@dataclass(frozen=True)
class Load:
    """What one micro-batch holds: tokens in all, share of them that stands for pictures, patches of one picture. Of what
    is to be generated: samples of one shape (frames, height, width), and the tokens of each."""

    tokens: int
    media: float = 0.25
    patches: int = 1024
    shape: tuple[int, ...] = ()
    samples: int = 1

    @classmethod
    def of(cls, recipe: Recipe, family: Family, media: float, patches: int) -> Load:
        """A full pack, or micro_batch_size samples of the greatest length or the largest shape of data.clip.

        Raises PolymodalError for impossible shares, and for sizes that training would refuse.
        """
        if family.layout == "uniform":
            clip, grid = recipe.data.clip, family.grid()  # type: ignore[attr-defined]
            Clips(clip, grid)
            frames = 1 if grid.still else max(clip.frames)
            side = int(clip.pixels**0.5) // grid.side * grid.side
            height, width = max(clip.sizes, key=lambda s: s[0] * s[1], default=(side, side))
            tokens = grid.tokens(frames, height, width)
            return cls(tokens, shape=(frames, height, width), samples=recipe.train.micro_batch_size)
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

    def measure(self, family: Family) -> SampleLengths:
        """Sizes for `family.example`: as many whole pictures as fit into the share, every token of text trained."""
        if self.shape:
            return SampleLengths(self.tokens, self.tokens, shape=self.shape)
        if not family.streams:
            return SampleLengths(self.tokens, self.tokens)
        stream = family.streams[0]
        size = family.medium(stream, self.patches)  # type: ignore[attr-defined]
        each, lengths = family.media_tokens(stream, size), family.media_lengths(stream, size)  # type: ignore[attr-defined]
        count = int(self.tokens * self.media // each)
        return SampleLengths(self.tokens, self.tokens - count * each, {stream.name: lengths * count})

    def batch(self, family: Family) -> Batch:
        """The micro-batch itself. Raises PolymodalError for families that cannot tell what one looks like without data."""
        try:
            one = family.example(self.measure(family))
        except NotImplementedError:
            raise PolymodalError(
                f"{family.card.name} cannot be planned: its family does not say what a batch without data looks like.",
                "`polymodal check` estimates the memory of every model.",
            ) from None
        if self.samples == 1:
            return one
        tensors = {n: t.repeat(self.samples, *[1] * (t.ndim - 1)) for n, t in one.tensors.items()}
        groups = {
            n: v * self.samples if isinstance(v, tuple) and n in PER_SAMPLE else v
            for n, v in one.groups.items()
        }
        return replace(one, tensors=tensors, samples=tuple(range(self.samples)), groups=groups)


PER_SAMPLE = ("seeds", "tokens")
"""Groups of a batch that have an entry a sample."""


def resident_encoders(family: Any, placement: str, ranks: int) -> int:
    """Parameters of frozen encoders that lie on a device during a step's passes; placement: data.encoders."""
    if placement == "offload":
        return 0
    found = pipelines.sizes(family.source, family.encoders())
    libraries = pipelines.models_of(family.source)
    cut = {n for n in found if placement == "shard" and libraries.get(n, ("", ""))[0] == "transformers"}
    return sum(-(-count // ranks) if name in cut else count for name, count in found.items())


class Job:
    """One rank of a run. The caller sets the process group up, and a tracker around it if there is one."""

    def __init__(self, recipe: Recipe, family: Family, mesh: Mesh, measure: SampleLengths):
        """measure: of a micro-batch, for parallel.pp_layers = auto."""
        self.recipe, self.family, self.mesh = recipe, family, mesh
        self.model = ParallelModel(
            lambda: estimate.meta_model(family, recipe), family, mesh, recipe, torch.device("cpu"), measure
        )
        self.objective = task_of(recipe, family).objective
        self.lay_out = BatchLayout(family, mesh, recipe.parallel)
        self.encoders: Tensor | None = None
        self.frozen = 0  # parameters of encoders on the device
        if family.layout == "uniform" and recipe.data.encode == "online":
            self.frozen = resident_encoders(family, recipe.data.encoders, mesh.fsdp_size)

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
            self.encoders = torch.empty(self.frozen, dtype=dtype_of(self.recipe))
        decay = self.recipe.train.ema
        self.average = optim.MovingAverage(self.trainable, decay) if decay else None

    def forward_backward(self, batches: list[Batch]) -> None:
        """Gradients of a step of these micro-batches into .grad."""
        batches = self.objective.prepare(None, batches)
        inverse: dict[str, float] = {}
        for batch in batches:
            inverse |= {term: 1.0 / max(value, 1.0) for term, value in self.objective.weights(batch).items()}
        forward_backward(self.model.runner, self.objective, self.lay_out(batches), inverse, StepMetrics())

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
