"""HunyuanVideo: text to video with a distilled guidance scale as an input.

Facts, and the arguments of diffusers' HunyuanVideoTransformer3DModel and HunyuanVideoPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Chain, ModelCard, Process, Size
from polymodal.models.diffusion import JOINT_BLOCKS, Generation, LatentGrid
from polymodal.models.generation.pictures import flow_process

GUIDANCE = 1000.0
"""What the pipeline multiplies a guidance scale by before it hands it over."""


class HunyuanVideo(Generation):
    text = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
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
                f"{self.source} has a denoiser that sees a first frame ({kind}) in a pipeline that makes clips from text alone.",
                "Use HunyuanVideoImageToVideoPipeline, or the text-to-video denoiser.",
            )

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        patch, joined = int(self.config["patch_size"]), int(self.config["patch_size_t"])
        return LatentGrid(
            int(vae.get("latent_channels", 16)), int(vae.get("temporal_compression_ratio", 4)),
            int(vae.get("spatial_compression_ratio", 8)), (joined, patch, patch),
        )  # fmt: skip

    def process(self) -> Process:
        guidance = 1.0 if self.config.get("guidance_embeds") else None
        return flow_process(self.component_config("scheduler"), guidance=guidance)

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        embeddings, pooled, mask = pipeline.encode_prompt(list(captions))
        return {
            "encoder_hidden_states": embeddings,
            "encoder_attention_mask": mask,
            "pooled_projections": pooled,
        }

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        return {"latents": vae.encode(pixels.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, self.text)
        if self.config.get("guidance_embeds"):
            given["guidance"] = GUIDANCE * self.guidance(batch, latents)
        (prediction,) = self.forward(model)(latents, timestep=timestep, return_dict=False, **given)
        return prediction

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The guidance of a denoiser that has it as an input is a number, and leads away from no prompt."""
        if self.config.get("guidance_embeds") and asked.get("negative_prompt"):
            raise PolymodalError(
                f"{self.card.name} was distilled for guidance: it takes no negative prompt.",
                "Leave the negative prompt out.",
            )
        return asked


CARD = ModelCard(
    name="hunyuan-video",
    title="HunyuanVideo",
    family=HunyuanVideo,
    architectures=("HunyuanVideoPipeline",),
    kind="generation",
    tasks=("text-to-video",),
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    towers={
        "blocks": ("transformer_blocks", "single_transformer_blocks"),
        "embedders": ("x_embedder", "context_embedder", "time_text_embed"),
        "output": ("norm_out", "proj_out"),
    },
    pipeline={
        "blocks": Chain(
            ("transformer_blocks.*", "single_transformer_blocks.*"),
            first=("x_embedder", "context_embedder", "time_text_embed"),
            last=("norm_out", "proj_out"),
            carry=("time_text_embed",),
        )
    },
    sequence_plan={
        "rope": {0: 0, 1: 0},
        "transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1},
    },
    sequence_exit="proj_out",
    block_streams=("hidden_states", "encoder_hidden_states"),
    num_leading_rows="num_tokens",
    tensor_plan={
        "": "stream",
        **JOINT_BLOCKS,
        "single_transformer_blocks.*.attn": "joint_heads",
        "single_transformer_blocks.*.attn.to_q": "colwise",
        "single_transformer_blocks.*.attn.to_k": "colwise",
        "single_transformer_blocks.*.attn.to_v": "colwise",
        "single_transformer_blocks.*.proj_mlp": "joined_colwise",
        "single_transformer_blocks.*.proj_out": "joined_rowwise",
        "norm_out": "end",
    },
    head="proj_out",
    pipelines={"text-to-video": "HunyuanVideoPipeline"},
    limits={
        "ep": "it has no experts",
    },
    clip={"frames": [129], "fps": 24, "pixels": 720 * 1280},
    sizes={"13b": Size("hunyuanvideo-community/HunyuanVideo", 12.82, 60, devices=8, layout={"dp_shard": -1})},
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    keywords=("text to video", "video generation"),
    aliases=("hunyuanvideo",),
    seeds=("13b",),
)
