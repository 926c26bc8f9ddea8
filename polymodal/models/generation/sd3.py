"""Stable Diffusion 3 and 3.5: facts, and the arguments of diffusers' SD3Transformer2DModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Chain, ModelCard, Size
from polymodal.models.diffusion import JOINT_BLOCKS
from polymodal.models.generation.pictures import Pictures

GIVEN_UP = ("to_add_out", "ff_context")
"""Parts of a block that the last one lacks: what it makes of the text is not used."""


class StableDiffusion3(Pictures):
    text = ("encoder_hidden_states", "pooled_projections")
    documented = {"latents": "video", "encoder_hidden_states": "prompt_ids"}
    zero = ("proj_out.*", "*.norm*.linear.*", "norm_out.linear.*")

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = pipeline.encode_prompt(
            list(captions), None, None, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, self.text)
        (prediction,) = self.forward(model)(latents, timestep=timestep, return_dict=False, **given)
        return prediction


CARD = ModelCard(
    name="sd3",
    title="SD3, SD3.5",
    family=StableDiffusion3,
    architectures=("StableDiffusion3Pipeline",),
    kind="generation",
    tasks=("text-to-image",),
    blocks=("transformer_blocks.*",),
    towers={
        "blocks": ("transformer_blocks",),
        "embedders": ("pos_embed", "context_embedder", "time_text_embed"),
        "output": ("norm_out", "proj_out"),
    },
    pipeline={
        "blocks": Chain(
            "transformer_blocks.*",
            first=("pos_embed", "context_embedder", "time_text_embed"),
            last=("norm_out", "proj_out"),
            carry=("time_text_embed",),
        )
    },
    sequence_plan={"transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1}},
    sequence_exit="proj_out",
    block_streams=("encoder_hidden_states", "hidden_states"),
    tensor_plan={
        "": "stream",
        **{f"{n}?" if any(part in n for part in GIVEN_UP) else n: style for n, style in JOINT_BLOCKS.items()},
        "transformer_blocks.*.attn2?": "attention",
        "transformer_blocks.*.attn2.to_q?": "colwise",
        "transformer_blocks.*.attn2.to_k?": "colwise",
        "transformer_blocks.*.attn2.to_v?": "colwise",
        "transformer_blocks.*.attn2.to_out.0?": "rowwise",
        "norm_out": "end",
    },
    head="proj_out",
    pipelines={
        "text-to-image": "StableDiffusion3Pipeline",
        "image-to-image": "StableDiffusion3Img2ImgPipeline",
    },
    limits={
        "ep": "it has no experts",
    },
    sizes={
        "2b": Size(
            "stabilityai/stable-diffusion-3-medium-diffusers", 2.03, 24, devices=8, layout={"dp_shard": -1}
        ),
        "3.5-medium": Size(
            "stabilityai/stable-diffusion-3.5-medium", 2.24, 24, devices=8, layout={"dp_shard": -1}
        ),
        "8.1b": Size("stabilityai/stable-diffusion-3.5-large", 8.06, 38, devices=8, layout={"dp_shard": -1}),
    },
    keywords=("text to image", "stable diffusion 3", "dreambooth"),
    aliases=("sd3.5", "stable-diffusion-3", "stable-diffusion-3.5"),
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    seeds=("2b", "8.1b"),
    methods=("dreambooth",),
)
