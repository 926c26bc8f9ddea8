"""FLUX.2: text to image with a vision-language model as its text encoder.

Facts, and the arguments of diffusers' Flux2Transformer2DModel and Flux2Pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.core.tensors import to_device
from polymodal.models.card import Size
from polymodal.models.diffusion import Generation, LatentGrid
from polymodal.models.generation.denoiser_card import denoiser_card


class Flux2(Generation):
    """Two by two cells of the VAE are one latent, scaled by the running statistics that the VAE holds."""

    zero = ("proj_out.*",)
    noise = {"scale": 1.0}

    @property
    def distilled(self) -> bool:  # type: ignore[override]
        return bool(self.config.get("guidance_embeds", True))

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space = 2 ** (len(vae.get("block_out_channels", (1, 1, 1, 1))) - 1)
        return LatentGrid(4 * int(vae.get("latent_channels", 32)), 1, 2 * space, still=True)

    def prompt_options(self) -> dict[str, Any]:
        return {}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        cells = pipeline.vae.encode(pixels[:, :, 0].to(pipeline.vae.dtype)).latent_dist.mode()
        mean, std = self._statistics(pipeline.vae, cells)
        return {"latents": (pipeline._patchify_latents(cells) - mean) / std}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        mean, std = self._statistics(pipeline.vae, latents)
        cells = pipeline._unpatchify_latents(latents * std + mean)
        return pipeline.vae.decode(cells.to(pipeline.vae.dtype), return_dict=False)[0][:, :, None]

    @staticmethod
    def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return vae.bn.running_mean.view(1, -1, 1, 1).to(like), std.view(1, -1, 1, 1).to(like)

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        from diffusers import Flux2Pipeline

        given = super().inputs(model, latents, batch)
        if self.distilled:
            given["guidance"] = self.guidance(batch, latents)
        words = given["encoder_hidden_states"]
        given["txt_ids"] = to_device(Flux2Pipeline._prepare_text_ids(words), latents.device)
        given["img_ids"] = to_device(Flux2Pipeline._prepare_latent_ids(latents), latents.device)
        return given

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.inputs(model, latents, batch)
        tokens = latents.flatten(2).transpose(1, 2)
        (prediction,) = self.forward(model)(tokens, timestep=timestep, return_dict=False, **given)
        return prediction.transpose(1, 2).reshape(latents.shape)


CARD = denoiser_card(
    name="flux2",
    title="FLUX.2",
    family=Flux2,
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    embedders=(
        "x_embedder",
        "context_embedder",
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    ),
    output=("norm_out", "proj_out"),
    pipelines={"text-to-image": "Flux2Pipeline"},
    sizes={"dev": Size("black-forest-labs/FLUX.2-dev", 32.22, 56, devices=16)},
    keywords=("text to image", "image generation"),
    aliases=("flux.2", "flux-2"),
    seeds=("dev",),
)
