"""CogVideoX and CogVideoX 1.5: text and image to video; facts, and the arguments of diffusers' CogVideoXTransformer3DModel.

Velocity at discrete timesteps that end in pure noise. The denoiser has frames before channels; here they come after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Chain, ModelCard, Process, Size
from polymodal.models.diffusion import Generation, LatentGrid
from polymodal.models.generation.pictures import discrete_process

OFFSET = 2.0  # of the image condition, as CogVideoX 1.5 samples

NEWER = {"frames": [85], "fps": 16, "pixels": 768 * 1360}
"""Clips of CogVideoX 1.5, which joins two latent frames: the 22 that the pipeline samples for its 81 frames."""


class CogVideoX(Generation):
    documented = {
        "latents": "video",
        "encoder_hidden_states": "prompt_ids",
        "condition": "first_frame_latents",
    }
    zero = ("proj_out.*", "*.norm*.linear.*")

    @property
    def conditioned(self) -> bool:
        """Whether the denoiser sees a first frame beside the noise."""
        return int(self.config["in_channels"]) > int(self.config["out_channels"])

    @property
    def routes(self) -> Mapping[str, str]:
        """A first frame is seen by those whose denoiser has channels for it, and by no others."""
        image = "image-to-video"
        return {t: p for t, p in self.card.pipelines.items() if (t == image) == self.conditioned}

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("condition",) if self.conditioned else ()

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space = 2 ** (len(vae["block_out_channels"]) - 1)
        patch, frames = int(self.config["patch_size"]), int(self.config.get("patch_size_t") or 1)
        time = int(vae["temporal_compression_ratio"])
        learned = self.config.get("use_learned_positional_embeddings")
        cells = (int(self.config[f"sample_{side}"]) for side in ("height", "width")) if learned else ()
        return LatentGrid(
            int(vae["latent_channels"]), time, space, (frames, patch, patch), least=1 + time * (frames - 1),
            size=tuple(space * n for n in cells) or None,  # type: ignore[arg-type]
        )  # fmt: skip

    def process(self) -> Process:
        return discrete_process(self.component_config("scheduler"))

    # ------------------------------------------------------------------ encoding

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        hidden, _ = pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=int(self.config["max_text_seq_length"]),
        )
        return {"encoder_hidden_states": hidden}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        scale = float(vae.config.scaling_factor)
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode() * scale
        if not self.conditioned:
            return {"latents": latents}
        first = vae.encode(pixels[:, :, :1].to(vae.dtype)).latent_dist.mode()
        first = first / scale if vae.config.invert_scale_latents else first * scale
        rest = latents.new_zeros(*latents.shape[:2], latents.shape[2] - 1, *latents.shape[3:])
        return {"latents": latents, "condition": torch.cat([first, rest], dim=2)}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        return vae.decode((latents / float(vae.config.scaling_factor)).to(vae.dtype)).sample

    # ------------------------------------------------------------------ the denoiser

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, ("encoder_hidden_states", *self.media))
        condition = given.pop("condition", None)
        frames, height, width = latents.shape[2:]
        if condition is not None:
            latents = torch.cat([latents, condition], dim=1)
        if self.config.get("ofs_embed_dim"):
            given["ofs"] = latents.new_full((1,), OFFSET)
        (prediction,) = self.forward(model)(
            latents.transpose(1, 2), timestep=timestep, image_rotary_emb=self._places(model, frames, height, width, latents.device),
            return_dict=False, **given,
        )  # fmt: skip
        return prediction.transpose(1, 2)

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "max_sequence_length": int(self.config["max_text_seq_length"])}

    def _places(self, model: nn.Module, frames: int, height: int, width: int, device: torch.device) -> Any:
        """Rotary tables as the pipeline makes them, None for the models that add learned places."""
        if not self.config.get("use_rotary_positional_embeddings"):
            return None
        from diffusers import CogVideoXPipeline

        like = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
        return CogVideoXPipeline._prepare_rotary_positional_embeddings(like, height, width, frames, device)  # type: ignore[arg-type]


CARD = ModelCard(
    name="cogvideox",
    title="CogVideoX, 1.5",
    family=CogVideoX,
    architectures=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"),
    kind="generation",
    tasks=("text-to-video", "image-to-video", "video-to-video"),
    blocks=("transformer_blocks.*",),
    towers={
        "blocks": ("transformer_blocks",),
        "embedders": ("patch_embed", "time_embedding", "ofs_embedding"),
        "output": ("norm_final", "norm_out", "proj_out"),
    },
    pipeline={
        "blocks": Chain(
            "transformer_blocks.*",
            first=("patch_embed", "time_embedding", "ofs_embedding?"),
            last=("norm_final", "norm_out", "proj_out"),
            carry=("time_embedding", "ofs_embedding?"),
        )
    },
    sequence_plan={
        "": {"image_rotary_emb": 0},
        "transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1},
    },
    sequence_exit="proj_out",
    block_streams=("hidden_states", "encoder_hidden_states"),
    tensor_plan={
        "": "stream",
        "transformer_blocks.*.attn1": "joint_attention",
        "transformer_blocks.*.attn1.to_q": "colwise",
        "transformer_blocks.*.attn1.to_k": "colwise",
        "transformer_blocks.*.attn1.to_v": "colwise",
        "transformer_blocks.*.attn1.to_out.0": "rowwise",
        "transformer_blocks.*.ff": "feed_forward",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
        "norm_final": "end",
    },
    head="proj_out",
    pipelines={
        "text-to-video": "CogVideoXPipeline",
        "image-to-video": "CogVideoXImageToVideoPipeline",
        "video-to-video": "CogVideoXVideoToVideoPipeline",
    },
    limits={
        "ep": "it has no experts",
    },
    clip={"frames": [49], "fps": 8, "pixels": 480 * 720},
    sizes={
        "2b": Size("zai-org/CogVideoX-2b", 1.69, 30, devices=8, layout={"dp_shard": -1}),
        "5b": Size("zai-org/CogVideoX-5b", 5.57, 42, devices=8, layout={"dp_shard": -1}),
        "i2v-5b": Size("zai-org/CogVideoX-5b-I2V", 5.57, 42, devices=8, layout={"dp_shard": -1}),
        "1.5-5b": Size("zai-org/CogVideoX1.5-5B", 5.57, 42, devices=8, layout={"dp_shard": -1}, clip=NEWER),
        "1.5-i2v-5b": Size(
            "zai-org/CogVideoX1.5-5B-I2V", 5.57, 42, devices=8, layout={"dp_shard": -1}, clip=NEWER
        ),
    },
    keywords=("text to video", "image to video", "video generation"),
    aliases=("cogvideo", "cogvideox1.5"),
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    seeds=("5b",),
)
