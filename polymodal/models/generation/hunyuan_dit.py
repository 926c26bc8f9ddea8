"""HunyuanDiT: text to image by v-prediction; long skips join its first blocks to its last.

Facts, and the arguments of diffusers' HunyuanDiT2DModel and HunyuanDiTPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.core.tensors import to_device
from polymodal.models.card import Process, Size
from polymodal.models.diffusion import discrete_process
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.pictures import Pictures


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
        for index, suffix in enumerate(("", "_t5")):
            embeddings, _, mask, _ = pipeline.encode_prompt(
                list(captions),
                do_classifier_free_guidance=False,
                max_sequence_length=int(self.config[f"text_len{suffix}"]),
                text_encoder_index=index,
            )
            made |= {f"encoder_hidden_states{suffix}": embeddings, f"text_embedding_mask{suffix}": mask}
        return made

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        patch, space, count = int(self.config["patch_size"]), self.grid().space, len(latents)
        height, width = latents.shape[-2:]
        size = (height // patch, width // patch)
        crop = get_resize_crop_region_for_grid(size, 512 // 8 // patch)
        head = int(self.config["attention_head_dim"])
        rotary = get_2d_rotary_pos_embed(head, crop, size, device=latents.device, output_type="pt")
        # original size, size, corner of the crop: the pipeline's own defaults
        sizes = torch.tensor([[1024, 1024, height * space, width * space, 0, 0]])
        return {
            **super().inputs(model, latents, batch),
            "image_meta_size": to_device(sizes.expand(count, -1).to(latents.dtype), latents.device),
            "style": torch.zeros(count, dtype=torch.long, device=latents.device),
            "image_rotary_emb": rotary,
        }

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        prediction = super().denoise(model, latents, timestep, batch)
        return prediction[:, : latents.shape[1]]  # the other half is a learned variance, which no loss sees


CARD = denoiser_card(
    name="hunyuan-dit",
    title="HunyuanDiT",
    family=HunyuanDiT,
    blocks=("blocks.*",),
    embedders=("pos_embed", "text_embedder", "text_embedding_padding", "time_extra_emb"),
    output=("norm_out", "proj_out"),
    pipelines={"text-to-image": "HunyuanDiTPipeline"},
    limits={"pp": "its early blocks feed its late ones"},
    sizes={"1.2": Size("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", 1.51, 40)},
    keywords=("text to image", "image generation", "chinese"),
    aliases=("hunyuandit",),
    seeds=("1.2",),
)
