"""FLUX.1: facts, and the arguments of diffusers' FluxTransformer2DModel.

Its latents go in as tokens of two by two cells with the position of each; the guidance-distilled ones (dev)
also take a guidance scale (train.diffusion.guidance).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.diffusion import GuidanceDistilled
from polymodal.models.generation.denoiser_card import denoiser_card, joint_blocks_plan, single_blocks_plan
from polymodal.models.generation.pictures import Pictures, packed, positions, unpacked


class Flux(GuidanceDistilled, Pictures):
    text = ("encoder_hidden_states", "pooled_projections")
    prompt_outputs = text
    documented = {"latents": "video", "encoder_hidden_states": "prompt_ids"}
    # a block that starts as the identity, as adaptive layer norms are meant to (Peebles and Xie 2023)
    zero = ("proj_out.*", "*.norm*.linear.*", "norm_out.linear.*")
    noise = {"scale": 1.0}

    @property
    def max_length(self) -> int:
        """Tokens of a prompt at most: the pipeline's 512, or the tokenizer's if fewer."""
        return int(min(512, self.component_config("tokenizer_2").get("model_max_length", 512)))

    def prompt_options(self) -> dict[str, Any]:
        return {"prompt_2": None, "max_sequence_length": self.max_length}

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (self.max_length, int(self.config["joint_attention_dim"])),
            "pooled_projections": (int(self.config["pooled_projection_dim"]),),
        }

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        given: dict[str, Any] = self.conditions(model, batch, self.text)
        given["guidance"] = self.guidance(batch, latents) if self.distilled else None
        given["txt_ids"] = torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=latents.device)
        return given

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        height, width = latents.shape[2:]
        tokens, image_positions = self.tokens(model, latents, batch)
        given = {**self.inputs(model, latents, batch), "img_ids": image_positions}
        (made,) = self.forward(model)(tokens, timestep=timestep, return_dict=False, **given)
        return unpacked(made[:, : height * width // 4], height, width)

    def tokens(self, model: nn.Module, latents: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(tokens [B, L, C], their positions [L, 3]): those of the latents first."""
        return packed(latents), positions(latents.shape[2] // 2, latents.shape[3] // 2, latents.device)

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Without a distilled guidance the scale is classifier-free guidance, by default against ""."""
        asked = super().arguments(asked)
        scale = None if self.distilled else asked.pop("guidance_scale", None)
        if scale is not None and scale > 1:
            asked.setdefault("negative_prompt", [""] * len(asked["prompt"]))
            asked["true_cfg_scale"] = scale
        return {**asked, "max_sequence_length": self.max_length}


CARD = denoiser_card(
    name="flux.1",
    title="FLUX.1",
    family=Flux,
    tasks=("text-to-image",),
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    embedders=("x_embedder", "context_embedder", "time_text_embed"),
    output=("norm_out", "proj_out"),
    carry=("time_text_embed",),
    block_streams=("encoder_hidden_states", "hidden_states"),
    sequence_plan={"": {"hidden_states": 1, "encoder_hidden_states": 1, "img_ids": 0, "txt_ids": 0}},
    tensor_plan={
        "": "stream",
        **joint_blocks_plan(),
        **single_blocks_plan("joined_heads"),
        "norm_out": "end",
    },
    pipelines={"text-to-image": "FluxPipeline", "image-to-image": "FluxImg2ImgPipeline"},
    sizes={
        "dev": Size("black-forest-labs/FLUX.1-dev", 11.9, 57),
        "schnell": Size("black-forest-labs/FLUX.1-schnell", 11.89, 57),
    },
    keywords=("text to image", "image generation", "dreambooth"),
    aliases=("flux", "flux1"),
    seeds=("dev",),
    methods=("dreambooth",),
)
