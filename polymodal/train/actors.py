"""Who takes part in a step besides the model that is trained: the frozen encoders of a generating model.

Sees models and data/sample.py. An actor is asked by an objective's `prepare`, before the forward pass and without
gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymodal.data.sample import Batch
from polymodal.models import pipelines


class Encoders:
    """A pipeline's VAE, text and image encoders, frozen, on a device: pixels and captions in, the denoiser's tensors out.

    family: a Generation; dtype: of the encoders and of what they give.
    """

    def __init__(self, family: Any, dtype: torch.dtype, device: torch.device | str):
        self.family, self.dtype, self.device = family, dtype, torch.device(device)
        without = set(pipelines.models_of(family.source)) - set(family.encoders())
        self.pipeline = pipelines.open_pipeline(family.source, without=without, dtype=dtype, device=device)

    @torch.no_grad()
    def media(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, F, H, W, 3] -> latents and image conditions, batch-first, on the device."""
        moved = pixels.to(self.device).permute(0, 4, 1, 2, 3).to(self.dtype) / 127.5 - 1
        return {n: t.to(self.dtype) for n, t in self.family.encode_media(self.pipeline, moved).items()}

    @torch.no_grad()
    def text(self, captions: list[str]) -> dict[str, Tensor]:
        """Captions -> text tensors, batch-first, on the device."""
        return {
            n: t.to(self.dtype) if t.is_floating_point() else t
            for n, t in self.family.encode_text(self.pipeline, captions).items()
        }

    def encode(self, batch: Batch) -> Batch:
        """A batch with `pixels` and captions -> the same with the denoiser's tensors; others pass."""
        if "pixels" not in batch.tensors:
            return batch
        tensors = {n: t for n, t in batch.tensors.items() if n != "pixels"}
        tensors |= self.media(batch["pixels"]) | self.text(list(batch.groups["captions"]))
        axes: dict[str, Any] = {
            n: batch.axes.get(n, ("batch", *["none"] * (t.ndim - 1))) for n, t in tensors.items()
        }
        return Batch(tensors, axes, batch.samples, batch.segments, batch.groups)
