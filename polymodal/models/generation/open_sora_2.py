"""Open-Sora 2.0: clips and pictures from text, or from a first frame, by one denoiser.

Facts, and the arguments of our own net and pipeline (models/nets). A directory of it is `transformer`
(Open_Sora_v2.safetensors), `vae` (HunyuanVideo's, in diffusers' class), T5 v1.1 XXL and CLIP-L.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models import pipelines
from polymodal.models.card import Process, Size
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.hunyuan_video import HunyuanVideoLatents
from polymodal.models.nets.pipeline_open_sora_2 import condition_of, packed, shift_of, unpacked

VAE = {"latent_channels": 16, "temporal_compression_ratio": 4, "spatial_compression_ratio": 8}


class OpenSora2(HunyuanVideoLatents):
    line = "open-sora-2"
    text = ("encoder_hidden_states", "pooled_projections")
    prompt_outputs = text
    media = ("first_frame",)
    patch = (1, 2, 2)
    # blocks that start as the identity, as FLUX's
    zero = ("cond_in.*", "*.*_mod.lin.*", "*.modulation.lin.*", "final_layer.*")

    def build(self) -> nn.Module:
        # the published config is that of its training script
        return pipelines.empty({**self.config, "_class_name": "OpenSora2Transformer"}).train()

    def process(self) -> Process:
        return Process(scale=1.0, shift="dynamic", by_size=self._shift, frame_input=True)

    def _shift(self, frames: int, height: int, width: int) -> float:
        return shift_of(*self.grid().shape(frames, height, width)[1:])

    @property
    def max_length(self) -> int:
        """Tokens of a caption: 512 as published, or the tokenizer's if fewer."""
        return int(min(512, self.component_config("tokenizer").get("model_max_length") or 512))

    def prompt_options(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_length}

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "max_sequence_length": self.max_length}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        """Of a clip also its first frame alone, which one sample or another is shown in training."""
        first = super().encode_media(pipeline, pixels[:, :, :1])["latents"]
        return {**super().encode_media(pipeline, pixels), "first_frame": first}

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (self.max_length, int(self.config["context_in_dim"])),
            "pooled_projections": (int(self.config["vec_in_dim"]),),
            "first_frame": (latents[0], 1, *latents[2:]),
        }

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        made: dict[str, Any] = self.conditions(model, batch, self.text)
        made["img_ids"] = model.places(*latents.shape[2:], latents.device)  # type: ignore[operator]
        made["txt_ids"] = made["img_ids"].new_zeros(made["encoder_hidden_states"].shape[1], 3)
        if self.config.get("cond_embed", True):
            given = batch.get("given")
            given = latents.new_zeros(len(latents)) if given is None else given
            made["condition"] = packed(condition_of(batch["first_frame"].to(latents.dtype), given, latents))
        return made

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        asked = self.inputs(model, latents, batch)
        (made,) = self.forward(model)(packed(latents), timestep=timestep, return_dict=False, **asked)
        frames, height, width = latents.shape[2:]
        return unpacked(made[:, : frames * height * width // 4], frames, height, width)

    def width(self) -> int:
        return int(self.config["hidden_size"])


CARD = denoiser_card(
    name="open-sora-2",
    title="Open-Sora 2.0",
    family=OpenSora2,
    blocks=("double_blocks.*", "single_blocks.*"),
    embedders=("img_in", "txt_in", "cond_in?", "time_in", "vector_in"),
    output=("final_layer",),
    head="final_layer.linear",
    carry=("time_in", "vector_in"),
    block_streams=("encoder_hidden_states", "hidden_states"),
    sequence_plan={
        "": {"hidden_states": 1, "encoder_hidden_states": 1, "img_ids": 0, "txt_ids": 0, "condition": 1}
    },
    sequence_exit="final_layer.linear",
    pipelines={"text-to-video": "OpenSora2Pipeline", "image-to-video": "OpenSora2Pipeline"},
    limits={"tp": "projections of its single blocks, of which one is fused with the MLP, are in no module"},
    clip={"frames": [129], "fps": 24, "pixels": 768 * 768},
    sizes={
        "11b": Size("hpcai-tech/Open-Sora-v2", 11.89, 57, devices=8, config={"transformer": {}, "vae": VAE})
    },
    verified="the net equals published numbers in float64; trained, exported, opened and sampled",
    keywords=("text to video", "image to video", "video generation"),
    aliases=("open-sora-2.0", "opensora2", "opensora2.0", "open-sora-v2"),
    seeds=("11b",),
)
