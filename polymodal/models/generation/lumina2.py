"""Lumina Image 2.0: text to image; its time runs from noise (0) to data (1).

Facts, and the arguments of diffusers' Lumina2Transformer2DModel and Lumina2Pipeline.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.pictures import Pictures


class Lumina2(Pictures):
    text = ("encoder_hidden_states", "encoder_attention_mask")
    prompt_outputs = text
    noise = {"ascending": True, "reversed": True, "scale": 1.0}

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        mask = batch["encoder_attention_mask"].bool()
        return {**super().inputs(model, latents, batch), "encoder_attention_mask": mask}

    def width(self) -> int:
        return int(self.config["hidden_size"])


CARD = denoiser_card(
    name="lumina2",
    title="Lumina Image 2.0",
    family=Lumina2,
    blocks=("layers.*", "noise_refiner.*", "context_refiner.*"),
    embedders=("x_embedder", "time_caption_embed"),
    output=("norm_out",),
    head="norm_out.linear_2",
    pipelines={"text-to-image": "Lumina2Pipeline"},
    sizes={"2b": Size("Alpha-VLLM/Lumina-Image-2.0", 2.61, 30)},
    keywords=("text to image", "image generation"),
    aliases=("lumina-image-2.0", "lumina-image-2"),
    seeds=("2b",),
)
