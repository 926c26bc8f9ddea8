"""HunyuanVideo: text to video with a distilled guidance scale as an input.

Facts, and the arguments of diffusers' HunyuanVideoTransformer3DModel and HunyuanVideoPipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.diffusion import Generation, GuidanceDistilled, LatentGrid
from polymodal.models.generation.denoiser_card import denoiser_card, joint_blocks_plan, single_blocks_plan

GUIDANCE = 1000.0
"""What the pipeline multiplies a guidance scale by before it hands it over."""


class HunyuanVideoLatents(Generation):
    """A denoiser in the latents of an AutoencoderKLHunyuanVideo."""

    latent_channels, compression = 16, 8  # the VAE's, unless its config has others

    @property
    def patch(self) -> tuple[int, int, int]:
        sides = int(self.config["patch_size"])
        return int(self.config["patch_size_t"]), sides, sides

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        channels = int(vae.get("latent_channels", self.latent_channels))
        time = int(vae.get("temporal_compression_ratio", 4))
        space = int(vae.get("spatial_compression_ratio", self.compression))
        return LatentGrid(channels, time, space, self.patch)

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        return {"latents": vae.encode(pixels.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]


class HunyuanVideo(GuidanceDistilled, HunyuanVideoLatents):
    line = "hunyuan-video"
    text = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    prompt_outputs = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
    documented = {
        "latents": "video",
        "encoder_hidden_states": "prompt_ids",
        "encoder_attention_mask": "prompt_mask",
        "pooled_projections": "prompt_ids_2",
    }
    zero = ("proj_out.*",)

    def check(self) -> None:
        super().check()
        kind = self.config.get("image_condition_type")
        if kind:
            raise PolymodalError(
                f"{self.source} has a denoiser that sees a first frame ({kind}) "
                "in a pipeline that makes clips from text alone.",
                "Use HunyuanVideoImageToVideoPipeline, or the text-to-video denoiser.",
            )

    def prompt_options(self) -> dict[str, Any]:
        return {}

    def first_frame(self, pipeline: Any, pixels: Tensor, latents: Tensor) -> Tensor:
        """The condition [B, C + 1, F, H, W] of a first frame: its latents and a mask, zeros behind it."""
        first = HunyuanVideo.encode_media(self, pipeline, pixels[:, :, :1])["latents"]
        condition = latents.new_zeros(len(latents), latents.shape[1] + 1, *latents.shape[2:])
        condition[:, :, :1] = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
        return condition

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        given = super().inputs(model, latents, batch)
        if self.distilled:
            given["guidance"] = GUIDANCE * self.guidance(batch, latents)
        return given


CARD = denoiser_card(
    name="hunyuan-video",
    title="HunyuanVideo",
    family=HunyuanVideo,
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    embedders=("x_embedder", "context_embedder", "time_text_embed"),
    output=("norm_out", "proj_out"),
    carry=("time_text_embed",),
    sequence_plan={
        "rope": {0: 0, 1: 0},
        "transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1},
    },
    block_streams=("hidden_states", "encoder_hidden_states"),
    num_leading_rows="num_tokens",
    tensor_plan={"": "stream", **joint_blocks_plan(), **single_blocks_plan("joint_heads"), "norm_out": "end"},
    pipelines={"text-to-video": "HunyuanVideoPipeline"},
    clip={"frames": [129], "fps": 24, "pixels": 720 * 1280},
    sizes={"13b": Size("hunyuanvideo-community/HunyuanVideo", 12.82, 60)},
    keywords=("text to video", "video generation"),
    aliases=("hunyuanvideo",),
    seeds=("13b",),
)
