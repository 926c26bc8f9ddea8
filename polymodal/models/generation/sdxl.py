"""Stable Diffusion XL: facts, and the arguments of diffusers' UNet2DConditionModel.

Discrete timesteps, epsilon; picture sizes are an input. The empty caption is zeros if the pipeline's is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Process, Size
from polymodal.models.diffusion import discrete_process
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.pictures import Pictures


class StableDiffusionXL(Pictures):
    part = "unet"
    text = ("encoder_hidden_states", "text_embeds")
    prompt_outputs = ("encoder_hidden_states", "", "text_embeds")
    media = ("time_ids",)
    zero = ("conv_out.*",)
    zeros_for_empty = True  # where the pipeline's config has it

    @property
    def patch(self) -> int:
        """Cells of the deepest level along a side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def process(self) -> Process:
        return discrete_process(self.component_config("scheduler"))

    def width(self) -> int:
        return int(self.config["block_out_channels"][-1])

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        made = super().encode_text(pipeline, captions)
        if not (self.zeros_for_empty and pipeline.config.force_zeros_for_empty_prompt):
            return made
        kept = torch.tensor([float(bool(caption)) for caption in captions])
        return {name: t * kept.to(t).view(-1, *[1] * (t.ndim - 1)) for name, t in made.items()}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        height, width = pixels.shape[3:]
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=pixels.device).float()
        return {**super().encode_media(pipeline, pixels), "time_ids": sizes.expand(len(pixels), 6)}

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        given = self.conditions(model, batch, self.text)
        added = {"text_embeds": given["text_embeds"], "time_ids": batch["time_ids"].float()}
        return {"encoder_hidden_states": given["encoder_hidden_states"], "added_cond_kwargs": added}


CARD = denoiser_card(
    name="sdxl",
    title="SDXL",
    family=StableDiffusionXL,
    tasks=("text-to-image",),
    blocks=("down_blocks.*", "mid_block", "up_blocks.*"),
    embedders=("conv_in", "time_embedding", "add_embedding"),
    output=("conv_norm_out", "conv_out"),
    head="conv_out",
    pipelines={
        "text-to-image": "StableDiffusionXLPipeline",
        "image-to-image": "StableDiffusionXLImg2ImgPipeline",
    },
    limits={"cp": "a convolutional model has no sequence to cut"},
    sizes={"3.5b": Size("stabilityai/stable-diffusion-xl-base-1.0", 2.57, 7)},
    keywords=("text to image", "stable diffusion xl", "dreambooth"),
    aliases=("stable-diffusion-xl",),
    seeds=("3.5b",),
    methods=("dreambooth",),
)
