"""Sana: text to image with linear attention on latents of a 32-fold deep-compression autoencoder.

Facts, and the arguments of diffusers' SanaTransformer2DModel and SanaPipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.diffusion import LatentGrid
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.pictures import Pictures


class Sana(Pictures):
    text = ("encoder_hidden_states", "encoder_attention_mask")
    zero = ("proj_out.*",)

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space = 2 ** (len(vae.get("encoder_block_out_channels", (1,) * 6)) - 1)
        patch = int(self.config.get("patch_size") or 1)
        return LatentGrid(int(vae.get("latent_channels", 32)), 1, space, (1, patch, patch), still=True)

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        latents = vae.encode(pixels[:, :, 0].to(vae.dtype), return_dict=False)[0]
        return {"latents": latents * vae.config.scaling_factor}

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        # the instruction that the pipeline puts before every prompt by default; training scripts have it too
        before = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        embeddings, mask, _, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, complex_human_instruction=before
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        scale = float(self.config.get("timestep_scale") or 1.0)
        return super().denoise(model, latents, timestep * scale, batch)


CARD = denoiser_card(
    name="sana",
    title="Sana",
    family=Sana,
    blocks=("transformer_blocks.*",),
    embedders=("patch_embed", "time_embed", "caption_projection", "caption_norm"),
    output=("norm_out", "proj_out", "scale_shift_table"),
    pipelines={"text-to-image": "SanaPipeline"},
    sizes={
        "0.6b": Size("Efficient-Large-Model/Sana_600M_1024px_diffusers", 0.59, 28),
        "1.6b": Size("Efficient-Large-Model/Sana_1600M_1024px_diffusers", 1.6, 20),
    },
    keywords=("text to image", "image generation", "linear attention"),
    seeds=("1.6b",),
)
