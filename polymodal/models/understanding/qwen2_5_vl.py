"""Qwen2.5-VL: facts, and its window attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymodal.core.tensors import to_device
from polymodal.distributed import attention as packed_attention
from polymodal.models.card import Size
from polymodal.models.understanding.language import DENSE_PLAN
from polymodal.models.understanding.qwen_vl import PIXELS, QwenVL, qwen_vl_card, vision_plan


class Qwen25VL(QwenVL):
    rope = "Qwen2_5_VLModel"

    def geometry(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        from transformers.vision_utils import get_vision_window_index

        vision = self.config.vision_config
        order, ends = get_vision_window_index(
            grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        windows = ends.diff().tolist()
        return {
            **super().geometry(grid, device),
            "window_index": to_device(order, device),
            "cu_window_seqlens": packed_attention.cumulative(windows, device),
            "max_window_seqlen": max(windows),
        }

    def vision_weights(self, vision: Any) -> tuple[float, float]:
        merged = vision.hidden_size * vision.spatial_merge_size**2
        return 3 * vision.hidden_size * vision.intermediate_size, merged * (merged + vision.out_hidden_size)

    def vision_attention(self, vision: Any) -> tuple[int, int]:
        return len(vision.fullatt_block_indexes), (vision.window_size // vision.patch_size) ** 2


CARD = qwen_vl_card(
    {**DENSE_PLAN, **vision_plan(("gate_proj", "up_proj"), "down_proj", ("mlp.0", "mlp.2"))},
    name="qwen2.5-vl",
    family=Qwen25VL,
    architectures=("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
    boxes=PIXELS,
    sizes={
        "3b": Size("Qwen/Qwen2.5-VL-3B-Instruct", 3.75, 36, 32),
        "7b": Size("Qwen/Qwen2.5-VL-7B-Instruct", 8.29, 28, 32),
        "32b": Size(
            "Qwen/Qwen2.5-VL-32B-Instruct", 33.45, 64, 32, devices=16, layout={"dp_shard": -1, "tp": 4}
        ),
        "72b": Size(
            "Qwen/Qwen2.5-VL-72B-Instruct", 73.41, 80, 32, devices=32, layout={"dp_shard": -1, "tp": 8}
        ),
    },
    aliases=("qwen2.5vl", "qwen2_5_vl", "qwen25vl"),
    seeds=("3b", "7b", "32b", "72b"),
)
