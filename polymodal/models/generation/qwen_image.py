"""Qwen-Image: text to image with a vision-language model as its text encoder.

Facts, and the arguments of diffusers' QwenImageTransformer2DModel and QwenImagePipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.diffusion import GuidanceDistilled, LatentGrid
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.pictures import latent_statistics, packed, unpacked


class QwenImage(GuidanceDistilled):
    text = ("encoder_hidden_states", "encoder_hidden_states_mask")
    zero = ("proj_out.*",)
    noise = {"scale": 1.0}

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space = 2 ** len(vae.get("temperal_downsample", (False, True, True)))
        return LatentGrid(int(vae.get("z_dim", 16)), 1, space, (1, 2, 2), still=True)

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        embeddings, mask = pipeline.encode_prompt(list(captions))
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": mask}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        mean, std = latent_statistics(vae, pixels)
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        return {"latents": ((latents - mean) / std)[:, :, 0]}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        mean, std = latent_statistics(vae, latents)
        return vae.decode((latents[:, :, None] * std + mean).to(vae.dtype), return_dict=False)[0]

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Without a distilled guidance the scale is classifier-free guidance, by default against a blank."""
        scale = None if self.distilled else asked.pop("guidance_scale", None)
        if scale is not None:
            asked["true_cfg_scale"] = scale
            if scale > 1:
                prompts = asked.get("negative_prompt") or [""] * len(asked["prompt"])
                asked["negative_prompt"] = [text or " " for text in prompts]
        return asked

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        given = super().inputs(model, latents, batch)
        height, width = latents.shape[-2:]
        mask = batch.on_host("encoder_hidden_states_mask")
        if mask is not None and bool(mask.all()):  # the library then builds none for its attention
            given["encoder_hidden_states_mask"] = None
        given["img_shapes"] = [[(1, height // 2, width // 2)]] * len(latents)
        if self.distilled:
            given["guidance"] = self.guidance(batch, latents).to(latents.dtype)
        return given

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.inputs(model, latents, batch)
        (made,) = self.forward(model)(packed(latents), timestep=timestep, return_dict=False, **given)
        return unpacked(made, *latents.shape[-2:])


CARD = denoiser_card(
    name="qwen-image",
    title="Qwen-Image",
    family=QwenImage,
    blocks=("transformer_blocks.*",),
    embedders=("img_in", "txt_in", "txt_norm", "time_text_embed"),
    output=("norm_out", "proj_out"),
    pipelines={"text-to-image": "QwenImagePipeline", "image-to-image": "QwenImageImg2ImgPipeline"},
    sizes={"20b": Size("Qwen/Qwen-Image", 20.43, 60, devices=16)},
    keywords=("text to image", "image generation", "text rendering"),
    aliases=("qwenimage",),
    seeds=("20b",),
)
