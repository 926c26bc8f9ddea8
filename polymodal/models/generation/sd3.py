"""Stable Diffusion 3 and 3.5: facts, and the arguments of diffusers' SD3Transformer2DModel."""

from __future__ import annotations

from typing import Any

from polymodal.models.card import Size, optional
from polymodal.models.generation.denoiser_card import attention_plan, denoiser_card, joint_blocks_plan
from polymodal.models.generation.pictures import Pictures

LAST_LACKS = ("to_add_out", "ff_context")
"""Parts of a block that the last one lacks: its text stream is not used."""
JOINT_PLAN = joint_blocks_plan()


class StableDiffusion3(Pictures):
    text = ("encoder_hidden_states", "pooled_projections")
    prompt_outputs = ("encoder_hidden_states", "", "pooled_projections")
    documented = {"latents": "video", "encoder_hidden_states": "prompt_ids"}
    zero = ("proj_out.*", "*.norm*.linear.*", "norm_out.linear.*")

    def prompt_options(self) -> dict[str, Any]:
        return {**super().prompt_options(), "prompt_2": None, "prompt_3": None}


CARD = denoiser_card(
    name="sd3",
    title="SD3, SD3.5",
    family=StableDiffusion3,
    tasks=("text-to-image",),
    blocks=("transformer_blocks.*",),
    embedders=("pos_embed", "context_embedder", "time_text_embed"),
    output=("norm_out", "proj_out"),
    carry=("time_text_embed",),
    sequence_plan={"transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1}},
    block_streams=("encoder_hidden_states", "hidden_states"),
    tensor_plan={
        "": "stream",
        **{f"{n}?" if any(part in n for part in LAST_LACKS) else n: s for n, s in JOINT_PLAN.items()},
        **optional(attention_plan("transformer_blocks.*.attn2", "attention")),
        "norm_out": "end",
    },
    pipelines={
        "text-to-image": "StableDiffusion3Pipeline",
        "image-to-image": "StableDiffusion3Img2ImgPipeline",
    },
    sizes={
        "2b": Size("stabilityai/stable-diffusion-3-medium-diffusers", 2.03, 24),
        "3.5-medium": Size("stabilityai/stable-diffusion-3.5-medium", 2.24, 24),
        "8.1b": Size("stabilityai/stable-diffusion-3.5-large", 8.06, 38),
    },
    keywords=("text to image", "stable diffusion 3", "dreambooth"),
    aliases=("sd3.5", "stable-diffusion-3", "stable-diffusion-3.5"),
    seeds=("2b", "8.1b"),
    methods=("dreambooth",),
)
