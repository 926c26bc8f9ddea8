"""Qwen-Image: text to image with a vision-language model as its text encoder.

Facts, and the arguments of diffusers' QwenImageTransformer2DModel and QwenImagePipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import ModelCard, Process, Size
from polymodal.models.diffusion import Generation, LatentGrid
from polymodal.models.generation.pictures import flow_process, packed, unbuilt, unpacked


class QwenImage(Generation):
    text = ("encoder_hidden_states", "encoder_hidden_states_mask")
    zero = ("proj_out.*",)

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space = 2 ** len(vae.get("temperal_downsample", (False, True, True)))
        return LatentGrid(int(vae.get("z_dim", 16)), 1, space, (1, 2, 2), still=True)

    def process(self) -> Process:
        return flow_process(
            self.component_config("scheduler"),
            scale=1.0,
            guidance=1.0 if self.config.get("guidance_embeds") else None,
        )

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        embeddings, mask = pipeline.encode_prompt(list(captions))
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": mask}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        mean, std = self._statistics(vae, pixels)
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        return {"latents": ((latents - mean) / std)[:, :, 0]}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        mean, std = self._statistics(vae, latents)
        return vae.decode((latents[:, :, None] * std + mean).to(vae.dtype), return_dict=False)[0]

    @staticmethod
    def _statistics(vae: nn.Module, like: Tensor) -> list[Tensor]:
        return [
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        ]

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Without a distilled guidance the scale is classifier-free guidance, against a blank if no other prompt."""
        scale = None if self.config.get("guidance_embeds") else asked.pop("guidance_scale", None)
        if scale is not None:
            asked["true_cfg_scale"] = scale
            if scale > 1:
                asked["negative_prompt"] = [
                    text or " " for text in asked.get("negative_prompt") or [""] * len(asked["prompt"])
                ]
        return asked

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, self.text)
        height, width = latents.shape[-2:]
        if self.config.get("guidance_embeds"):
            given["guidance"] = self.guidance(batch, latents).to(latents.dtype)
        (prediction,) = self.forward(model)(
            packed(latents), timestep=timestep, img_shapes=[[(1, height // 2, width // 2)]] * len(latents), return_dict=False, **given
        )  # fmt: skip
        return unpacked(prediction, height, width)


CARD = ModelCard(
    name="qwen-image",
    title="Qwen-Image",
    family=QwenImage,
    architectures=("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
    kind="generation",
    tasks=("text-to-image", "image-to-image"),
    blocks=("transformer_blocks.*",),
    towers={
        "blocks": ("transformer_blocks",),
        "embedders": ("img_in", "txt_in", "txt_norm", "time_text_embed"),
        "output": ("norm_out", "proj_out"),
    },
    head="proj_out",
    pipelines={"text-to-image": "QwenImagePipeline", "image-to-image": "QwenImageImg2ImgPipeline"},
    limits=unbuilt(),
    sizes={"20b": Size("Qwen/Qwen-Image", 20.43, 60, devices=16, layout={"dp_shard": -1})},
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    keywords=("text to image", "image generation", "text rendering"),
    aliases=("qwenimage",),
    seeds=("20b",),
)
