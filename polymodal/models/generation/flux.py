"""FLUX.1: facts, and the arguments of diffusers' FluxTransformer2DModel.

Its latents go in as tokens of two by two cells with the places of each; the guidance-distilled ones (dev) also take a
guidance scale (train.diffusion.guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Chain, ModelCard, Process, Size
from polymodal.models.diffusion import JOINT_BLOCKS
from polymodal.models.generation.pictures import Pictures, flow_process, packed, positions, unpacked


class Flux(Pictures):
    text = ("encoder_hidden_states", "pooled_projections")
    documented = {"latents": "video", "encoder_hidden_states": "prompt_ids"}
    # a block that starts as the identity, as adaptive layer norms are meant to (Peebles and Xie 2023)
    zero = ("proj_out.*", "*.norm*.linear.*", "norm_out.linear.*")

    def process(self) -> Process:
        return flow_process(
            self.component_config("scheduler"),
            scale=1.0,
            guidance=1.0 if self.config.get("guidance_embeds") else None,
        )

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        longest = self._longest(self.component_config("tokenizer_2"))
        hidden, pooled, _ = pipeline.encode_prompt(list(captions), None, max_sequence_length=longest)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        longest = self._longest(self.component_config("tokenizer_2"))
        return {
            "encoder_hidden_states": (longest, int(self.config["joint_attention_dim"])),
            "pooled_projections": (int(self.config["pooled_projection_dim"]),),
        }

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        height, width = latents.shape[2:]
        given = self.conditions(model, batch, self.text)
        words = given["encoder_hidden_states"].shape[1]
        guidance = self.guidance(batch, latents) if self.config.get("guidance_embeds") else None
        tokens, places = self.tokens(model, latents, batch)
        (made,) = self.forward(model)(
            tokens, timestep=timestep, guidance=guidance, img_ids=places,
            txt_ids=torch.zeros(words, 3, device=latents.device), return_dict=False, **given,
        )  # fmt: skip
        return unpacked(made[:, : height * width // 4], height, width)

    def tokens(self, model: nn.Module, latents: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(tokens [B, L, C], their places [L, 3]): those of the latents first."""
        return packed(latents), positions(latents.shape[2] // 2, latents.shape[3] // 2, latents.device)

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Without a distilled guidance the scale is classifier-free guidance, against the empty prompt if no other."""
        if self.config.get("guidance_embeds") and any(asked.get("negative_prompt") or ()):
            raise PolymodalError(
                f"{self.card.name} was distilled for guidance: it takes no negative prompt.",
                "Leave it out; --guidance is an input of this model.",
            )
        scale = None if self.config.get("guidance_embeds") else asked.pop("guidance_scale", None)
        if scale is not None and scale > 1:
            asked.setdefault("negative_prompt", [""] * len(asked["prompt"]))
            asked["true_cfg_scale"] = scale
        return {**asked, "max_sequence_length": self._longest(self.component_config("tokenizer_2"))}

    @staticmethod
    def _longest(tokenizer: dict[str, Any]) -> int:
        """Tokens of a prompt at most: the pipeline's 512, or fewer where the tokenizer says so."""
        return int(min(512, tokenizer.get("model_max_length", 512)))


CARD = ModelCard(
    name="flux.1",
    title="FLUX.1",
    family=Flux,
    architectures=("FluxPipeline", "FluxImg2ImgPipeline"),
    kind="generation",
    tasks=("text-to-image",),
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    towers={
        "blocks": ("transformer_blocks", "single_transformer_blocks"),
        "embedders": ("x_embedder", "context_embedder", "time_text_embed"),
        "output": ("norm_out", "proj_out"),
    },
    block_streams=("encoder_hidden_states", "hidden_states"),
    pipeline={
        "blocks": Chain(
            ("transformer_blocks.*", "single_transformer_blocks.*"),
            first=("x_embedder", "context_embedder", "time_text_embed"),
            last=("norm_out", "proj_out"),
            carry=("time_text_embed",),
        )
    },
    sequence_plan={"": {"hidden_states": 1, "encoder_hidden_states": 1, "img_ids": 0, "txt_ids": 0}},
    sequence_exit="proj_out",
    tensor_plan={
        "": "stream",
        **JOINT_BLOCKS,
        "single_transformer_blocks.*.attn": "joined_heads",
        "single_transformer_blocks.*.attn.to_q": "colwise",
        "single_transformer_blocks.*.attn.to_k": "colwise",
        "single_transformer_blocks.*.attn.to_v": "colwise",
        "single_transformer_blocks.*.proj_mlp": "joined_colwise",
        "single_transformer_blocks.*.proj_out": "joined_rowwise",
        "norm_out": "end",
    },
    head="proj_out",
    pipelines={"text-to-image": "FluxPipeline", "image-to-image": "FluxImg2ImgPipeline"},
    limits={
        "ep": "it has no experts",
    },
    sizes={
        "dev": Size("black-forest-labs/FLUX.1-dev", 11.9, 57, devices=8, layout={"dp_shard": -1}),
        "schnell": Size("black-forest-labs/FLUX.1-schnell", 11.89, 57, devices=8, layout={"dp_shard": -1}),
    },
    keywords=("text to image", "image generation", "dreambooth"),
    aliases=("flux", "flux1"),
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    seeds=("dev",),
    methods=("dreambooth",),
)
