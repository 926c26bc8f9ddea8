"""Qwen2-VL: facts, and the shape of its vision tower."""

from __future__ import annotations

from typing import Any

from polymodal.models.card import Size
from polymodal.models.understanding.language import DENSE_PLAN
from polymodal.models.understanding.qwen_vl import MARKED, QwenVL, qwen_vl_card, vision_plan


class Qwen2VL(QwenVL):
    rope = "Qwen2VLModel"

    def vision_weights(self, vision: Any) -> tuple[float, float]:
        merged = vision.embed_dim * vision.spatial_merge_size**2  # its hidden_size is the language model's
        mlp = 2 * vision.embed_dim * int(vision.embed_dim * vision.mlp_ratio)
        return mlp, merged * (merged + vision.hidden_size)


CARD = qwen_vl_card(
    {**DENSE_PLAN, **vision_plan(("fc1",), "fc2", ("mlp.0", "mlp.2"))},
    name="qwen2-vl",
    family=Qwen2VL,
    architectures=("Qwen2VLForConditionalGeneration", "qwen2_vl"),
    boxes=MARKED,
    sizes={
        "2b": Size("Qwen/Qwen2-VL-2B-Instruct", 2.21, 28, 32),
        "7b": Size("Qwen/Qwen2-VL-7B-Instruct", 8.29, 28, 32),
        "72b": Size(
            "Qwen/Qwen2-VL-72B-Instruct", 73.41, 80, 32, devices=32, layout={"dp_shard": -1, "tp": 8}
        ),
    },
    aliases=("qwen2vl", "qwen2_vl"),
    seeds=("2b", "7b", "72b"),
)
