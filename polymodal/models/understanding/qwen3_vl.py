"""Qwen3-VL (dense): facts; features of several vision layers enter the early language layers (deepstack),
frames of a video have their time as text before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.tensors import to_device
from polymodal.models.card import Size
from polymodal.models.understanding.language import DENSE_PLAN
from polymodal.models.understanding.qwen_vl import RELATIVE, QwenVL, qwen_vl_card, vision_plan
from polymodal.models.understanding.qwen_vl_media import Qwen3VLMedia

VISION_PLAN = vision_plan(
    ("linear_fc1",), "linear_fc2", ("linear_fc1", "linear_fc2"), "merger", "deepstack_merger_list.*"
)


class Qwen3VL(QwenVL):
    media = Qwen3VLMedia
    rope = "Qwen3VLModel"

    def build(self) -> nn.Module:
        """The language model skips levels that an earlier pipeline stage has added (None), and adds others by
        row numbers where they are known: masks are counted on the host, which waits for the device."""
        model: Any = super().build()
        text = model.model.language_model
        add = text._deepstack_process

        def add_unless_done(hidden: Tensor, mask: Tensor, level: Tensor | None) -> Tensor:
            if level is None:
                return hidden
            rows = self.rows_of.get(mask)
            if rows is None:
                return add(hidden, mask, level)
            return hidden.index_add(1, rows, level.to(hidden.dtype)[None])

        text._deepstack_process = add_unless_done
        return model

    def geometry(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        vision = self.config.vision_config
        side, merge = int(vision.num_position_embeddings**0.5), vision.spatial_merge_size
        # as Qwen3VLVisionModel.forward calls it
        taps = get_vision_interpolation_indices_and_weights(grid, side, "bilinear", True, merge)
        indices, weights = (to_device(tensor, device) for tensor in taps)
        return {
            **super().geometry(grid, device),
            "interp_indices": indices,
            "interp_weights": weights,
        }

    def vision_weights(self, vision: Any) -> tuple[float, float]:
        merged = vision.hidden_size * vision.spatial_merge_size**2
        mergers = 1 + len(vision.deepstack_visual_indexes)
        mlp = 2 * vision.hidden_size * vision.intermediate_size
        return mlp, mergers * merged * (merged + vision.out_hidden_size)


FACTS: dict[str, Any] = {
    "boxes": RELATIVE,
    "embedders": ("patch_embed", "pos_embed"),
    "mergers": ("merger", "deepstack_merger_list"),
    "masked_rows": {"visual_pos_masks": "deepstack_visual_embeds"},
}
CARD = qwen_vl_card(
    {**DENSE_PLAN, **VISION_PLAN},
    name="qwen3-vl",
    family=Qwen3VL,
    architectures=("Qwen3VLForConditionalGeneration", "qwen3_vl"),
    **FACTS,
    sizes={
        "2b": Size("Qwen/Qwen3-VL-2B-Instruct", 2.13, 28, 24),
        "4b": Size("Qwen/Qwen3-VL-4B-Instruct", 4.44, 36, 24),
        "8b": Size("Qwen/Qwen3-VL-8B-Instruct", 8.77, 36, 27),
        "32b": Size(
            "Qwen/Qwen3-VL-32B-Instruct", 33.36, 64, 27, devices=16, layout={"dp_shard": -1, "tp": 4}
        ),
    },
    aliases=("qwen3vl", "qwen3_vl"),
    seeds=("8b", "32b"),
)
