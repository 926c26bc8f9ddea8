"""HunyuanDiT: text to image by v-prediction; long skips join its first blocks to its last.

Facts, and the arguments of diffusers' HunyuanDiT2DModel and HunyuanDiTPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import ModelCard, Process, Size
from polymodal.models.generation.pictures import Pictures, discrete_process, unbuilt


class HunyuanDiT(Pictures):
    text = (
        "encoder_hidden_states",
        "text_embedding_mask",
        "encoder_hidden_states_t5",
        "text_embedding_mask_t5",
    )
    zero = ("proj_out.*",)

    def process(self) -> Process:
        return discrete_process(self.component_config("scheduler"))

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for index, length in ((0, int(self.config["text_len"])), (1, int(self.config["text_len_t5"]))):
            embeddings, _, mask, _ = pipeline.encode_prompt(
                list(captions), do_classifier_free_guidance=False, max_sequence_length=length, text_encoder_index=index
            )  # fmt: skip
            made |= dict(zip(self.text[2 * index : 2 * index + 2], (embeddings, mask), strict=True))
        return made

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        given = self.conditions(model, batch, self.text)
        patch, space = int(self.config["patch_size"]), self.grid().space
        height, width = latents.shape[-2:]
        size = (height // patch, width // patch)
        rotary = get_2d_rotary_pos_embed(
            int(self.config["attention_head_dim"]), get_resize_crop_region_for_grid(size, 512 // 8 // patch), size,
            device=latents.device, output_type="pt",
        )  # fmt: skip
        # original size, size, corner of the crop: the pipeline's own defaults
        meta = torch.tensor([[1024, 1024, height * space, width * space, 0, 0]], device=latents.device)
        (prediction,) = self.forward(model)(
            latents, timestep, image_meta_size=meta.expand(len(latents), -1).to(latents),
            style=torch.zeros(len(latents), dtype=torch.long, device=latents.device), image_rotary_emb=rotary, return_dict=False, **given,
        )  # fmt: skip
        channels = latents.shape[1]  # a learned variance is the other half, which no loss sees
        return prediction[:, :channels]


CARD = ModelCard(
    name="hunyuan-dit",
    title="HunyuanDiT",
    family=HunyuanDiT,
    architectures=("HunyuanDiTPipeline",),
    kind="generation",
    tasks=("text-to-image",),
    blocks=("blocks.*",),
    towers={
        "blocks": ("blocks",),
        "embedders": ("pos_embed", "text_embedder", "text_embedding_padding", "time_extra_emb"),
        "output": ("norm_out", "proj_out"),
    },
    head="proj_out",
    pipelines={"text-to-image": "HunyuanDiTPipeline"},
    limits=unbuilt(pp="its early blocks feed its late ones"),
    sizes={
        "1.2": Size("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", 1.51, 40, devices=8, layout={"dp_shard": -1})
    },
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    keywords=("text to image", "image generation", "chinese"),
    aliases=("hunyuandit",),
    seeds=("1.2",),
)
