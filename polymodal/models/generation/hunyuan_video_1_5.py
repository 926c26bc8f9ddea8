"""HunyuanVideo 1.5: text and image to video in one denoiser, which sees a first frame, a mask and the picture's tokens.

Facts, and the arguments of diffusers' HunyuanVideo15Transformer3DModel and its two pipelines. Which of the two a
checkpoint is says its pipeline; from text alone frame, mask and picture are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import ModelCard, Process, Size
from polymodal.models.diffusion import Generation, LatentGrid
from polymodal.models.generation.pictures import flow_process, unbuilt

PICTURE_TOKENS = 729
"""Tokens of the picture where there is none, as the text-to-video pipeline has them."""


class HunyuanVideo15(Generation):
    line = "hunyuan-video"
    text = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
    )
    documented = {
        "latents": "video",
        "encoder_hidden_states": "prompt_ids",
        "encoder_attention_mask": "prompt_mask",
        "encoder_hidden_states_2": "prompt_ids_2",
        "encoder_attention_mask_2": "prompt_mask_2",
    }
    zero = ("proj_out.*",)

    @property
    def conditioned(self) -> bool:
        """Whether clips begin with a given frame."""
        return self.index["_class_name"] == "HunyuanVideo15ImageToVideoPipeline"

    @property
    def routes(self) -> Mapping[str, str]:
        kept = "image-to-video" if self.conditioned else "text-to-video"
        return {kept: self.card.pipelines[kept]}

    @property
    def alone(self) -> bool:  # type: ignore[override]
        return self.conditioned

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("condition", "image_embeds") if self.conditioned else ()

    def check(self) -> None:
        super().check()
        if self.config.get("use_meanflow"):
            raise PolymodalError(
                f"{self.source} was distilled to a mean flow over two timesteps, whose training is not built.",
                "Use the checkpoint before distillation.",
            )

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        patch, joined = int(self.config["patch_size"]), int(self.config["patch_size_t"])
        return LatentGrid(
            int(vae.get("latent_channels", 32)), int(vae.get("temporal_compression_ratio", 4)),
            int(vae.get("spatial_compression_ratio", 16)), (joined, patch, patch), least=2 if self.conditioned else 1,
        )  # fmt: skip

    def process(self) -> Process:
        return flow_process(self.component_config("scheduler"))

    # ------------------------------------------------------------------ encoding

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        device = next(pipeline.text_encoder.parameters()).device
        made = pipeline.encode_prompt(list(captions), device=device, batch_size=len(captions))
        return dict(zip(self.text, made, strict=True))

    def encode_media(self, pipeline: Any, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        latents = self._latents(pipeline.vae, pixels)
        if not self.conditioned:
            return {"latents": latents}
        first = self._latents(pipeline.vae, pixels[:, :, :1])
        condition = latents.new_zeros(len(latents), latents.shape[1] + 1, *latents.shape[2:])
        condition[:, :, :1] = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
        pictures = self.shown(pixels[:, :, 0])
        seen = pipeline.encode_image(pictures, 1, device=pixels.device, dtype=latents.dtype)
        return {"latents": latents, "condition": condition, "image_embeds": seen}

    @staticmethod
    def _latents(vae: nn.Module, pixels: Tensor) -> Tensor:
        return vae.encode(pixels.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]

    # ------------------------------------------------------------------ the denoiser

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, (*self.text, *self.media))
        condition = given.pop("condition", None)
        if condition is None:
            condition = latents.new_zeros(len(latents), latents.shape[1] + 1, *latents.shape[2:])
            width = int(self.config["image_embed_dim"])
            given["image_embeds"] = latents.new_zeros(len(latents), PICTURE_TOKENS, width)
        (prediction,) = self.forward(model)(
            torch.cat([latents, condition], dim=1), timestep=timestep, return_dict=False, **given
        )
        return prediction

    # ------------------------------------------------------------------ sampling

    def tune(self, pipeline: Any, asked: dict[str, Any]) -> dict[str, Any]:
        """Guidance is a part of the pipeline; from a picture, the pipeline chooses the size itself."""
        out = {**asked}
        guidance = out.pop("guidance_scale", None)
        if guidance is not None:
            pipeline.guider = pipeline.guider.new(guidance_scale=guidance)
        if self.conditioned:
            height, width, picture = out.pop("height", None), out.pop("width", None), out.get("image")
            if (height or width) and picture is not None:
                own = pipeline.video_processor.calculate_default_height_width(
                    height=picture.size[1], width=picture.size[0], target_size=pipeline.target_size
                )
                if (height or own[0], width or own[1]) != tuple(own):
                    raise PolymodalError(
                        f"{self.card.name} chooses the size by the picture: {own[0]} x {own[1]} here, not {height} x {width}.",
                        "Leave out --height and --width, or cut the picture to that shape.",
                    )
        return out


CARD = ModelCard(
    name="hunyuan-video-1.5",
    title="HunyuanVideo 1.5",
    family=HunyuanVideo15,
    architectures=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    kind="generation",
    tasks=("text-to-video", "image-to-video"),
    blocks=("transformer_blocks.*",),
    towers={
        "blocks": ("transformer_blocks",),
        "embedders": (
            "x_embedder", "image_embedder", "context_embedder", "context_embedder_2", "time_embed", "cond_type_embed",
        ),
        "output": ("norm_out", "proj_out"),
    },
    head="proj_out",
    pipelines={
        "text-to-video": "HunyuanVideo15Pipeline",
        "image-to-video": "HunyuanVideo15ImageToVideoPipeline",
    },
    limits=unbuilt(),
    clip={"frames": [121], "fps": 24, "pixels": 480 * 832},
    sizes={
        "t2v": Size(
            "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v", 8.33, 54, devices=8, layout={"dp_shard": -1}
        ),
        "i2v": Size(
            "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v", 8.33, 54, devices=8, layout={"dp_shard": -1}
        ),
    },
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    keywords=("text to video", "image to video", "video generation"),
    aliases=("hunyuanvideo1.5", "hunyuanvideo-1.5"),
    seeds=("t2v", "i2v"),
)  # fmt: skip
