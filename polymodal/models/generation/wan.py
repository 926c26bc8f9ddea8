"""Wan 2.1: text, image, first and last frame to video, and what of Wan 2.2 has the same denoiser.

Facts, and the arguments of diffusers' WanTransformer3DModel and pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Chain, ModelCard, Process, Size
from polymodal.models.diffusion import Generation, LatentGrid


class Wan(Generation):
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
    def conditioned(self) -> bool:
        """Whether the denoiser sees a first frame beside the noise."""
        return int(self.config["in_channels"]) > int(self.config["out_channels"])

    @property
    def last_frame(self) -> bool:
        """FLF2V: the position table spans the tokens of two pictures."""
        return self.config.get("pos_embed_seq_len") is not None

    @property
    def routes(self) -> Mapping[str, str]:
        """A first frame is seen by those whose denoiser has channels for it, and by no others."""
        image = "image-to-video"
        return {t: p for t, p in self.card.pipelines.items() if (t == image) == self.conditioned}

    @property
    def asks(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("last_image",) if self.last_frame else ()

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        sees = ("encoder_hidden_states_image",) if self.config.get("image_dim") else ()
        return ("condition", *sees) if self.conditioned else ()

    @property
    def words(self) -> int:
        """Tokens of a caption: 512 as published, or fewer where the tokenizer says so. Beside image tokens always 512,
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

    # ------------------------------------------------------------------ encoding

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        embeddings, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, max_sequence_length=self.words
        )
        return {"encoder_hidden_states": embeddings}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        latents = self._normalised(vae, vae.encode(pixels.to(vae.dtype)).latent_dist.mode())
        if not self.conditioned:
            return {"latents": latents}
        frames, (height, width) = pixels.shape[2], pixels.shape[3:]
        first, last = pixels[:, :, 0], pixels[:, :, -1] if self.last_frame else None
        conditions = [
            pipeline.prepare_latents(
                first[i : i + 1], 1, latents.shape[1], height, width, frames, latents.dtype, latents.device,
                last_image=None if last is None else last[i : i + 1],
            )[1]
            for i in range(len(pixels))
        ]  # fmt: skip
        made = {"latents": latents, "condition": torch.cat(conditions)}
        if "encoder_hidden_states_image" in self.media:
            shown = [pixels[:, :, 0]] if last is None else [pixels[:, :, 0], last]
            pictures = torch.stack(shown, dim=1).flatten(0, 1)  # a sample's pictures stand together
            seen = pipeline.encode_image(self.shown(pictures))
            made["encoder_hidden_states_image"] = seen.view(len(pixels), -1, seen.shape[-1])
        return made

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        made: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (self.words, int(self.config["text_dim"]))
        }
        if "condition" in self.media:
            channels = int(self.config["in_channels"]) - int(self.config["out_channels"])
            made["condition"] = (channels, *latents[1:])
        if "encoder_hidden_states_image" in self.media:
            pictures = 2 if self.last_frame else 1
            patches = self.component_config("image_encoder")
            side = int(patches.get("image_size", 224)) // int(patches.get("patch_size", 14))
            made["encoder_hidden_states_image"] = (
                pictures * (side * side + 1),
                int(self.config["image_dim"]),
            )
        return made

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        mean, std = self._statistics(vae, latents)
        return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]

    @staticmethod
    def _statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )  # type: ignore[return-value]

    def _normalised(self, vae: nn.Module, latents: Tensor) -> Tensor:
        mean, std = self._statistics(vae, latents)
        return (latents - mean) / std

    # ------------------------------------------------------------------ sampling

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked.get("last_image") is not None and self.config.get("image_dim") and not self.last_frame:
            raise PolymodalError(
                f"This {self.card.name} looks at one picture, the first frame; it has no place for a last one.",
                "Leave the last frame out, or use a checkpoint of first and last frame (FLF2V).",
            )
        return {**asked, "max_sequence_length": self.words}

    # ------------------------------------------------------------------ the denoiser

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, ("encoder_hidden_states", *self.media))
        condition = given.pop("condition", None)
        if condition is not None:
            latents = torch.cat([latents, condition], dim=1)
        image = given.get("encoder_hidden_states_image")
        if image is not None and self.last_frame:  # the library takes a sample's two pictures as two rows
            given["encoder_hidden_states_image"] = image.reshape(2 * len(image), -1, image.shape[-1])
        (prediction,) = self.forward(model)(latents, timestep=timestep, return_dict=False, **given)
        return prediction


CARD = ModelCard(
    name="wan2.1",
    title="Wan 2.1",
    family=Wan,
    architectures=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    kind="generation",
    tasks=("text-to-video", "image-to-video", "video-to-video"),
    blocks=("blocks.*",),
    towers={
        "blocks": ("blocks",),
        "embedders": ("patch_embedding", "condition_embedder"),
        "output": ("norm_out", "proj_out", "scale_shift_table"),
    },
    pipeline={
        "blocks": Chain(
            "blocks.*",
            first=("patch_embedding", "condition_embedder"),
            last=("norm_out", "proj_out", "scale_shift_table"),
            carry=("condition_embedder",),
        )
    },
    # a timestep is cut where it has one a token
    sequence_plan={"": {"timestep": 1}, "rope": {0: 1, 1: 1}, "blocks.0": {"hidden_states": 1}},
    sequence_exit="proj_out",
    tensor_plan={
        "": "stream",
        "blocks.*.attn*": "attention",
        "blocks.*.attn*.to_q": "colwise",
        "blocks.*.attn*.to_k": "colwise",
        "blocks.*.attn*.to_v": "colwise",
        "blocks.*.attn*.add_k_proj?": "colwise",
        "blocks.*.attn*.add_v_proj?": "colwise",
        "blocks.*.attn*.norm_q": "norm_across_heads",
        "blocks.*.attn*.norm_k": "norm_across_heads",
        "blocks.*.attn*.norm_added_k?": "norm_across_heads",
        "blocks.*.attn*.to_out.0": "rowwise",
        "blocks.*.ffn": "feed_forward",
        "blocks.*.ffn.net.0.proj": "colwise",
        "blocks.*.ffn.net.2": "rowwise",
        "norm_out": "end",
    },
    head="proj_out",
    pipelines={
        "text-to-video": "WanPipeline",
        "image-to-video": "WanImageToVideoPipeline",
        "video-to-video": "WanVideoToVideoPipeline",
    },
    limits={"ep": "it has no experts inside a layer"},
    clip={"frames": [81], "fps": 16, "pixels": 480 * 832},
    sizes={
        "1.3b": Size("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.42, 30, devices=8, layout={"dp_shard": -1}),
        "14b": Size("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.29, 40, devices=8, layout={"dp_shard": -1}),
        "i2v-14b-480p": Size(
            "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 16.4, 40, devices=8, layout={"dp_shard": -1}
        ),
        "i2v-14b-720p": Size(
            "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            16.4,
            40,
            devices=16,
            layout={"dp_shard": -1},
            clip={"pixels": 720 * 1280},
        ),
        "flf2v-14b": Size(
            "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
            16.4,
            40,
            devices=16,
            layout={"dp_shard": -1},
            clip={"pixels": 720 * 1280},
        ),
    },
    verified="tiny models of the class: prediction and every gradient equal the library's; keys",
    keywords=("text to video", "image to video", "video generation"),
    aliases=("wan", "wan21", "wan2_1"),
    seeds=("1.3b", "14b"),
)
