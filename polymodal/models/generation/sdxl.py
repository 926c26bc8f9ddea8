"""Stable Diffusion XL: facts, and the arguments of diffusers' UNet2DConditionModel.

Discrete timesteps, epsilon; the sizes of a picture go in beside its text. The empty caption is zeros where the pipeline
samples against zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import ModelCard, Process, Size
from polymodal.models.diffusion import LatentGrid
from polymodal.models.generation.pictures import Pictures, discrete_process


class StableDiffusionXL(Pictures):
    part = "unet"
    text = ("encoder_hidden_states", "text_embeds")
    media = ("time_ids",)
    zero = ("conv_out.*",)

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space = 2 ** (len(vae["block_out_channels"]) - 1)
        deepest = 2 ** (len(self.config["block_out_channels"]) - 1)
        return LatentGrid(int(vae["latent_channels"]), 1, space, (1, deepest, deepest), still=True)

    def process(self) -> Process:
        return discrete_process(self.component_config("scheduler"))

    def width(self) -> int:
        return int(self.config["block_out_channels"][-1])

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:
            kept = torch.tensor([bool(c) for c in captions], device=hidden.device, dtype=hidden.dtype)
            hidden, pooled = hidden * kept.view(-1, 1, 1), pooled * kept.view(-1, 1)
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        height, width = pixels.shape[3:]
        sizes = torch.tensor(
            [[height, width, 0, 0, height, width]], device=pixels.device, dtype=torch.float32
        )
        return {**super().encode_media(pipeline, pixels), "time_ids": sizes.expand(len(pixels), 6)}

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, self.text)
        added = {"text_embeds": given["text_embeds"], "time_ids": batch["time_ids"].float()}
        (prediction,) = self.forward(model)(
            latents, timestep, given["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False
        )
        return prediction


CARD = ModelCard(
    name="sdxl",
    title="SDXL",
    family=StableDiffusionXL,
    architectures=("StableDiffusionXLPipeline",),
    kind="generation",
    tasks=("text-to-image",),
    blocks=("down_blocks.*", "mid_block", "up_blocks.*"),
    towers={
        "blocks": ("down_blocks", "mid_block", "up_blocks"),
        "embedders": ("conv_in", "time_embedding", "add_embedding"),
        "output": ("conv_norm_out", "conv_out"),
    },
    head="conv_out",
    pipelines={
        "text-to-image": "StableDiffusionXLPipeline",
        "image-to-image": "StableDiffusionXLImg2ImgPipeline",
    },
    limits={
        "tp": "its tensor plan is not built",
        "ep": "it has no experts",
        "cp": "a convolutional model has no sequence to cut",
        "pp": "its stages are not built",
    },
    sizes={
        "3.5b": Size("stabilityai/stable-diffusion-xl-base-1.0", 2.57, 7, devices=8, layout={"dp_shard": -1})
    },
    keywords=("text to image", "stable diffusion xl", "dreambooth"),
    aliases=("stable-diffusion-xl",),
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    seeds=("3.5b",),
    methods=("dreambooth",),
)
