"""Qwen2-VL: facts, and the shape of its vision tower. See qwen_vl.py for what it shares with its line."""

from __future__ import annotations

from typing import Any

from polymodal.models.card import ModelCard, Size
from polymodal.models.understanding.language import DENSE_PLAN, TEXT_PLAN
from polymodal.models.understanding.qwen_vl import BLOCKS, QwenVL, pipeline, towers, vision_plan
from polymodal.models.understanding.vision_language import KEYWORDS, TASKS


class Qwen2VL(QwenVL):
    rope = "Qwen2VLModel"

    def vision_weights(self, vision: Any) -> tuple[float, float]:
        merged = vision.embed_dim * vision.spatial_merge_size**2  # its hidden_size is the language model's
        return 2 * vision.embed_dim * int(vision.embed_dim * vision.mlp_ratio), merged * (
            merged + vision.hidden_size
        )


CARD = ModelCard(
    name="qwen2-vl",
    family=Qwen2VL,
    architectures=("Qwen2VLForConditionalGeneration", "qwen2_vl"),
    tasks=TASKS,
    blocks=BLOCKS,
    towers=towers(),
    pipeline=pipeline(),
    sequence_entry="model.language_model",
    sequence_exit="model.language_model",
    tensor_plan={**TEXT_PLAN, **DENSE_PLAN, **vision_plan(("fc1",), "fc2", ("mlp.0", "mlp.2"))},
    embedding="model.language_model.embed_tokens",
    sizes={
        "2b": Size("Qwen/Qwen2-VL-2B-Instruct", 2.21, 28, 32, devices=8, layout={"dp_shard": -1}),
        "7b": Size("Qwen/Qwen2-VL-7B-Instruct", 8.29, 28, 32, devices=8, layout={"dp_shard": -1}),
        "72b": Size(
            "Qwen/Qwen2-VL-72B-Instruct", 73.41, 80, 32, devices=32, layout={"dp_shard": -1, "tp": 8}
        ),
    },
    keywords=KEYWORDS,
    aliases=("qwen2vl", "qwen2_vl"),
    verified="tiny models of the class: hidden states, logits and every gradient equal the library's; packed equals separate",
    seeds=("2b", "7b", "72b"),
)
