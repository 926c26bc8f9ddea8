"""CogVideoX and CogVideoX 1.5: facts, and the arguments of diffusers' CogVideoXTransformer3DModel.

Velocity at discrete timesteps that end in pure noise. The denoiser has frames before channels.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Process, Size
from polymodal.models.diffusion import FirstFrameChannels, LatentGrid, discrete_process
from polymodal.models.generation.denoiser_card import attention_plan, denoiser_card, feed_forward_plan

OFFSET = 2.0  # of the image condition, as CogVideoX 1.5 samples

NEWER = {"frames": [85], "fps": 16, "pixels": 768 * 1360}
"""Clips of CogVideoX 1.5, which joins two latent frames: 22, which the pipeline samples for 81 frames."""


class CogVideoX(FirstFrameChannels):
    documented = {
        "latents": "video",
        "encoder_hidden_states": "prompt_ids",
        "condition": "first_frame_latents",
    }
    zero = ("proj_out.*", "*.norm*.linear.*")

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("condition",) if self.conditioned else ()

    @property
    def max_length(self) -> int:
        """Tokens of a caption."""
        return int(self.config["max_text_seq_length"])

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space, time = 2 ** (len(vae["block_out_channels"]) - 1), int(vae["temporal_compression_ratio"])
        patch, frames = int(self.config["patch_size"]), int(self.config.get("patch_size_t") or 1)
        size = None
        if self.config.get("use_learned_positional_embeddings"):
            size = space * int(self.config["sample_height"]), space * int(self.config["sample_width"])
        least = 1 + time * (frames - 1)
        channels = int(vae["latent_channels"])
        return LatentGrid(channels, time, space, (frames, patch, patch), least=least, size=size)

    def process(self) -> Process:
        return discrete_process(self.component_config("scheduler"))

    def prompt_options(self) -> dict[str, Any]:
        return {**super().prompt_options(), "max_sequence_length": self.max_length}

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

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.inputs(model, latents, batch)
        condition = given.pop("condition", None)
        given["image_rotary_emb"] = self._rotary(model, *latents.shape[2:], latents.device)
        if condition is not None:
            latents = torch.cat([latents, condition], dim=1)
        if self.config.get("ofs_embed_dim"):
            given["ofs"] = latents.new_full((1,), OFFSET)
        frames_first = latents.transpose(1, 2)
        (prediction,) = self.forward(model)(frames_first, timestep=timestep, return_dict=False, **given)
        return prediction.transpose(1, 2)

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "max_sequence_length": self.max_length}

    def _rotary(self, model: nn.Module, frames: int, height: int, width: int, device: torch.device) -> Any:
        """Rotary tables as the pipeline makes them, None for models with learned position embeddings."""
        if not self.config.get("use_rotary_positional_embeddings"):
            return None
        from diffusers import CogVideoXPipeline

        like: Any = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
        return CogVideoXPipeline._prepare_rotary_positional_embeddings(like, height, width, frames, device)


CARD = denoiser_card(
    name="cogvideox",
    title="CogVideoX, 1.5",
    family=CogVideoX,
    blocks=("transformer_blocks.*",),
    embedders=("patch_embed", "time_embedding", "ofs_embedding?"),
    output=("norm_final", "norm_out", "proj_out"),
    carry=("time_embedding", "ofs_embedding?"),
    sequence_plan={
        "": {"image_rotary_emb": 0},
        "transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1},
    },
    block_streams=("hidden_states", "encoder_hidden_states"),
    tensor_plan={
        "": "stream",
        **attention_plan("transformer_blocks.*.attn1", "joint_attention"),
        **feed_forward_plan("transformer_blocks.*.ff"),
        "norm_final": "end",
    },
    pipelines={
        "text-to-video": "CogVideoXPipeline",
        "image-to-video": "CogVideoXImageToVideoPipeline",
        "video-to-video": "CogVideoXVideoToVideoPipeline",
    },
    clip={"frames": [49], "fps": 8, "pixels": 480 * 720},
    sizes={
        "2b": Size("zai-org/CogVideoX-2b", 1.69, 30),
        "5b": Size("zai-org/CogVideoX-5b", 5.57, 42),
        "i2v-5b": Size("zai-org/CogVideoX-5b-I2V", 5.57, 42),
        "1.5-5b": Size("zai-org/CogVideoX1.5-5B", 5.57, 42, clip=NEWER),
        "1.5-i2v-5b": Size("zai-org/CogVideoX1.5-5B-I2V", 5.57, 42, clip=NEWER),
    },
    keywords=("text to video", "image to video", "video generation"),
    aliases=("cogvideo", "cogvideox1.5"),
    seeds=("5b",),
)
