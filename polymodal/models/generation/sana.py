"""Sana: text to image with linear attention on latents of a 32-fold deep-compression autoencoder.

Facts, and the arguments of diffusers' SanaTransformer2DModel and SanaPipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import ModelCard, Size
from polymodal.models.diffusion import LatentGrid
from polymodal.models.generation.pictures import Pictures, unbuilt


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
        return {"latents": (latents * vae.config.scaling_factor)}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        made = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return made[:, :, None]

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        # the instruction that the pipeline puts before every prompt by default; training scripts have it too
        before = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        embeddings, mask, _, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, complex_human_instruction=before
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, self.text)
        scale = float(self.config.get("timestep_scale") or 1.0)
        (prediction,) = self.forward(model)(latents, timestep=timestep * scale, return_dict=False, **given)
        return prediction


CARD = ModelCard(
    name="sana",
    title="Sana",
    family=Sana,
    architectures=("SanaPipeline",),
    kind="generation",
    tasks=("text-to-image",),
    blocks=("transformer_blocks.*",),
    towers={
        "blocks": ("transformer_blocks",),
        "embedders": ("patch_embed", "time_embed", "caption_projection", "caption_norm"),
        "output": ("norm_out", "proj_out", "scale_shift_table"),
    },
    head="proj_out",
    pipelines={"text-to-image": "SanaPipeline"},
    limits=unbuilt(),
    sizes={
        "0.6b": Size(
            "Efficient-Large-Model/Sana_600M_1024px_diffusers", 0.59, 28, devices=8, layout={"dp_shard": -1}
        ),
        "1.6b": Size(
            "Efficient-Large-Model/Sana_1600M_1024px_diffusers", 1.6, 20, devices=8, layout={"dp_shard": -1}
        ),
    },
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    keywords=("text to image", "image generation", "linear attention"),
    seeds=("1.6b",),
)
