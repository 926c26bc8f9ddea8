"""FLUX.1 Kontext: a picture made from another and an instruction, in FLUX.1's denoiser.

The source's tokens follow those of the noise, with 1 as the first of their positions; the prediction of them
is not used. Records are edit pairs: `path` is the result, `src_image` the source, `cap` the instruction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.generation.flux import CARD as FLUX
from polymodal.models.generation.flux import Flux
from polymodal.models.generation.pictures import packed, positions


class FluxKontext(Flux):
    media = ("source_latents",)
    given = ("source",)
    needed = ("source",)
    documented = {**Flux.documented, "source_latents": "source"}

    def encode_media(self, pipeline: Any, pixels: Tensor, source: Tensor | None = None) -> dict[str, Tensor]:
        made = super().encode_media(pipeline, pixels)
        assert source is not None  # needed
        return {**made, "source_latents": super().encode_media(pipeline, source)["latents"]}

    def tokens(self, model: nn.Module, latents: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens, token_positions = super().tokens(model, latents, batch)
        source = self.conditions(model, batch, self.media)["source_latents"]
        source_positions = positions(source.shape[2] // 2, source.shape[3] // 2, source.device)
        source_positions[:, 0] = 1
        return torch.cat([tokens, packed(source)], dim=1), torch.cat([token_positions, source_positions])

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """With a size, the source is taken in that size and not in one of the pipeline's own."""
        out = super().arguments(asked)
        height, width = out.get("height"), out.get("width")
        if height and width:
            out |= {"max_area": height * width, "_auto_resize": False}
        return out


CARD = replace(
    FLUX,
    name="flux.1-kontext",
    title="FLUX.1 Kontext",
    family=FluxKontext,
    architectures=("FluxKontextPipeline",),
    tasks=("image-to-image",),
    pipelines={"image-to-image": "FluxKontextPipeline"},
    sizes={"dev": Size("black-forest-labs/FLUX.1-Kontext-dev", 11.9, 57)},
    keywords=("image editing", "edit pictures", "edit images", "image to image"),
    aliases=("flux-kontext", "kontext"),
    methods=(),
    seeds=("dev",),
)
