"""Wan 2.1: text, image, first and last frame to video, and what of Wan 2.2 has the same denoiser.

Facts, and the arguments of diffusers' WanTransformer3DModel and pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Process, Size
from polymodal.models.diffusion import FirstFrameChannels, LatentGrid
from polymodal.models.generation.denoiser_card import attention_plan, denoiser_card, feed_forward_plan
from polymodal.models.generation.pictures import latent_statistics

LARGE = {"pixels": 720 * 1280}


class Wan(FirstFrameChannels):
    line = "wan"
    documented = {
        "latents": "video",
        "encoder_hidden_states": "prompt_ids",
        "condition": "i2v_vae_feature",
        "encoder_hidden_states_image": "i2v_clip_feature",
    }
    zero = ("proj_out.*",)

    @classmethod
    def claims(cls, index: Mapping[str, Any]) -> bool:
        return not index.get("boundary_ratio") and not index.get("expand_timesteps")

    @property
    def last_frame(self) -> bool:
        """FLF2V: the position table spans the tokens of two pictures."""
        return self.config.get("pos_embed_seq_len") is not None

    @property
    def asks(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("last_image",) if self.last_frame else ()

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        sees = ("encoder_hidden_states_image",) if self.config.get("image_dim") else ()
        return ("condition", *sees) if self.conditioned else ()

    @property
    def max_length(self) -> int:
        """Tokens of a caption: 512 as published, or the tokenizer's if fewer. Beside image tokens always 512,
        which the denoiser's attention counts back from."""
        longest = int(min(512, self.component_config("tokenizer").get("model_max_length") or 512))
        return 512 if self.config.get("added_kv_proj_dim") else longest

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        z = int(vae.get("z_dim", 16))
        stages = list(vae.get("temperal_downsample", (False, True, True)))
        time = int(vae.get("scale_factor_temporal") or 2 ** sum(stages))
        space = int(vae.get("scale_factor_spatial") or 2 ** len(stages))
        return LatentGrid(z, time, space, tuple(self.config["patch_size"]), least=2 if self.last_frame else 1)

    def process(self) -> Process:
        scheduler = self.component_config("scheduler")
        shift = scheduler.get("flow_shift") or scheduler.get("shift") or 5.0
        return Process(density="uniform", shift=float(shift))

    def prompt_options(self) -> dict[str, Any]:
        return {**super().prompt_options(), "max_sequence_length": self.max_length}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        latents = self._normalised(vae, vae.encode(pixels.to(vae.dtype)).latent_dist.mode())
        if not self.conditioned:
            return {"latents": latents}
        frames, height, width = pixels.shape[2:]
        made, conditions = {"latents": latents}, []
        options = (1, latents.shape[1], height, width, frames, latents.dtype, latents.device)
        for clip in pixels.split(1):
            last = clip[:, :, -1] if self.last_frame else None
            _, condition = pipeline.prepare_latents(clip[:, :, 0], *options, last_image=last)
            conditions.append(condition)
        made["condition"] = torch.cat(conditions)
        if "encoder_hidden_states_image" in self.media:
            shown = pixels[:, :, [0, -1] if self.last_frame else [0]]
            pictures = shown.transpose(1, 2).flatten(0, 1)  # a sample's pictures stand together
            embeddings = pipeline.encode_image(self.shown(pictures))
            made["encoder_hidden_states_image"] = embeddings.view(len(pixels), -1, embeddings.shape[-1])
        return made

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        made: dict[str, tuple[int, ...]] = {}
        made["encoder_hidden_states"] = (self.max_length, int(self.config["text_dim"]))
        if "condition" in self.media:
            channels = int(self.config["in_channels"]) - int(self.config["out_channels"])
            made["condition"] = (channels, *latents[1:])
        if "encoder_hidden_states_image" in self.media:
            encoder = self.component_config("image_encoder")
            side = int(encoder.get("image_size", 224)) // int(encoder.get("patch_size", 14))
            tokens = (2 if self.last_frame else 1) * (side * side + 1)
            made["encoder_hidden_states_image"] = (tokens, int(self.config["image_dim"]))
        return made

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        mean, std = latent_statistics(vae, latents)
        return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]

    @staticmethod
    def _normalised(vae: nn.Module, latents: Tensor) -> Tensor:
        mean, std = latent_statistics(vae, latents)
        return (latents - mean) / std

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked.get("last_image") is not None and self.config.get("image_dim") and not self.last_frame:
            raise PolymodalError(
                f"This {self.card.name} looks at one picture, the first frame; "
                "it has no place for a last one.",
                "Leave the last frame out, or use a checkpoint of first and last frame (FLF2V).",
            )
        return {**asked, "max_sequence_length": self.max_length}

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        given = super().inputs(model, latents, batch)
        image = given.get("encoder_hidden_states_image")
        if image is not None and self.last_frame:  # the library takes a sample's two pictures as two rows
            given["encoder_hidden_states_image"] = image.reshape(2 * len(image), -1, image.shape[-1])
        return given


CARD = denoiser_card(
    name="wan2.1",
    title="Wan 2.1",
    family=Wan,
    blocks=("blocks.*",),
    embedders=("patch_embedding", "condition_embedder"),
    output=("norm_out", "proj_out", "scale_shift_table"),
    carry=("condition_embedder",),
    # a timestep is cut where it has one a token
    sequence_plan={"": {"timestep": 1}, "rope": {0: 1, 1: 1}, "blocks.0": {"hidden_states": 1}},
    tensor_plan={
        "": "stream",
        **attention_plan("blocks.*.attn*", "attention"),
        "blocks.*.attn*.add_k_proj?": "colwise",
        "blocks.*.attn*.add_v_proj?": "colwise",
        "blocks.*.attn*.norm_q": "norm_across_heads",
        "blocks.*.attn*.norm_k": "norm_across_heads",
        "blocks.*.attn*.norm_added_k?": "norm_across_heads",
        **feed_forward_plan("blocks.*.ffn"),
        "norm_out": "end",
    },
    pipelines={
        "text-to-video": "WanPipeline",
        "image-to-video": "WanImageToVideoPipeline",
        "video-to-video": "WanVideoToVideoPipeline",
    },
    limits={"ep": "it has no experts inside a layer"},
    clip={"frames": [81], "fps": 16, "pixels": 480 * 832},
    sizes={
        "1.3b": Size("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.42, 30),
        "14b": Size("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.29, 40),
        "i2v-14b-480p": Size("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 16.4, 40),
        "i2v-14b-720p": Size("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", 16.4, 40, devices=16, clip=LARGE),
        "flf2v-14b": Size("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", 16.4, 40, devices=16, clip=LARGE),
    },
    verified="tiny models of the class: prediction and every gradient equal the library's; keys",
    keywords=("text to video", "image to video", "video generation"),
    aliases=("wan", "wan21", "wan2_1"),
    seeds=("1.3b", "14b"),
)
