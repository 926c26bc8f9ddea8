"""Who takes part in a step besides the model that is trained: the frozen encoders of a generating model.

Sees models, the mesh and core/sample.py. An actor is asked by an objective's `prepare`, before the forward pass and without
gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from polymodal.core.sample import Batch
from polymodal.distributed.mesh import Mesh
from polymodal.models import library, pipelines


def shard(model: PreTrainedModel, mesh: Mesh) -> None:
    """A frozen model of transformers cut over the mesh's fsdp ranks, layer by layer: each holds its share, and gathers a
    layer while it is computed."""
    names = tuple(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names and m is not model]
    for unit in (*layers, model):
        fully_shard(unit, mesh=mesh.fsdp, reshard_after_forward=True)
    library.keep_recording(model)


class Encoders:
    """A pipeline's VAE, text and image encoders, frozen, on a device: pixels and captions in, the denoiser's tensors out.

    family: a Generation; dtype: of the encoders and of what they give; placement: data.encoders of the recipe (for `shard`
    with the mesh, then every rank of its fsdp group makes the same calls).
    """

    def __init__(
        self, family: Any, dtype: torch.dtype, device: torch.device | str, placement: str = "replicate", mesh: Mesh | None = None
    ):  # fmt: skip
        self.family, self.dtype, self.device = family, dtype, torch.device(device)
        self.placement = placement
        without = set(pipelines.models_of(family.source)) - set(family.encoders())
        at = "cpu" if placement != "replicate" else device  # the whole need not fit the device
        self.pipeline = pipelines.open_pipeline(family.source, without=without, dtype=dtype, device=at)
        if placement == "shard":
            for part in self.pipeline.components.values():
                if not isinstance(part, nn.Module):
                    continue
                if mesh is not None and mesh.fsdp_size > 1 and isinstance(part, PreTrainedModel):
                    shard(part, mesh)
                else:
                    part.to(self.device)

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """On the device while inside."""
        if self.placement == "offload":
            self.pipeline.to(self.device)
        try:
            yield
        finally:
            if self.placement == "offload":
                self.pipeline.to("cpu")

    @torch.no_grad()
    def media(
        self, pixels: Sequence[Tensor] | Tensor, given: Sequence[Mapping[str, Tensor]] = ()
    ) -> dict[str, Tensor]:
        """uint8 [B, F, H, W, 3] -> latents and image conditions, batch-first, on the device.

        given: for each sample what comes with it, by role: uint8 [F, H, W, 3], or numbers as they are; then pixels may
        differ in length and samples are encoded one by one.
        """
        if self.family.given:
            made = [
                self.family.encode_media(
                    self.pipeline,
                    self._moved(p[None]),
                    **{
                        r: t[None].to(self.device) if t.is_floating_point() else self._moved(t[None])
                        for r, t in g.items()
                    },
                )  # fmt: skip
                for p, g in zip(pixels, given, strict=True)
            ]
            joined = {n: torch.cat([one[n] for one in made]) for n in made[0]}
            return {n: t if t.ndim == 1 else t.to(self.dtype) for n, t in joined.items()}
        moved = self._moved(pixels if isinstance(pixels, Tensor) else torch.stack(list(pixels)))
        return {n: t.to(self.dtype) for n, t in self.family.encode_media(self.pipeline, moved).items()}

    def _moved(self, pixels: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] -> [B, 3, F, H, W] in -1..1 on the device."""
        return pixels.to(self.device).permute(0, 4, 1, 2, 3).to(self.dtype) / 127.5 - 1

    @torch.no_grad()
    def text(self, captions: list[str], pixels: Tensor | None = None) -> dict[str, Tensor]:
        """Captions -> text tensors, batch-first, on the device. pixels: of the clips, for families that look at them."""
        shown = {"pixels": self._moved(pixels)} if self.family.sees and pixels is not None else {}
        return {
            n: t.to(self.dtype) if t.is_floating_point() else t
            for n, t in self.family.encode_text(self.pipeline, captions, **shown).items()
        }

    def encode(self, batch: Batch) -> Batch:
        """A batch with `pixels` and captions -> the same with the denoiser's tensors; others pass."""
        if "pixels" not in batch.tensors:
            return batch
        tensors = {n: t for n, t in batch.tensors.items() if n != "pixels"}
        pixels: Any = batch["pixels"]
        given = batch.groups.get("given", ())
        if self.family.given:
            grid = self.family.grid()
            ahead = [grid.time * len(g.get("references", ())) if grid.references else 0 for g in given]
            pixels = [p[n:] for p, n in zip(pixels, ahead, strict=True)]
        tensors |= self.media(pixels, given) | self.text(list(batch.groups["captions"]), batch["pixels"])
        axes: dict[str, Any] = {
            n: batch.axes.get(n, ("batch", *["none"] * (t.ndim - 1))) for n, t in tensors.items()
        }
        return Batch(tensors, axes, batch.samples, batch.segments, batch.groups)
