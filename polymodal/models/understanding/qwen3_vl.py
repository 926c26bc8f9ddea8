"""Qwen3-VL (dense): facts; features of several vision layers enter the early language layers (deepstack), frames of a
video carry their time as text. See qwen_vl.py for what it shares with its line.
"""

from __future__ import annotations

from typing import Any

from polymodal.models.card import Components, ModelCard, Size
from polymodal.models.understanding.language import DENSE_PLAN, TEXT_PLAN
from polymodal.models.understanding.qwen_vl import BLOCKS, QwenVL, pipeline, towers, vision_plan
from polymodal.models.understanding.qwen_vl_media import Qwen3VLMedia
from polymodal.models.understanding.vision_language import KEYWORDS, TASKS

VISION_PLAN = vision_plan(
    ("linear_fc1",), "linear_fc2", ("linear_fc1", "linear_fc2"), "merger", "deepstack_merger_list.*"
)
PIPELINE = pipeline("pos_embed")
TOWERS = towers("pos_embed", projector=("merger", "deepstack_merger_list"))


class Qwen3VL(QwenVL):
    media = Qwen3VLMedia
    rope = "Qwen3VLModel"

    def build(self) -> Components:
        """As the line's; the language model passes over levels that a pipeline stage before has added (None)."""
        made = super().build()
        text = made.trained.model.language_model
        add = text._deepstack_process
        text._deepstack_process = lambda hidden, mask, level: (
            hidden if level is None else add(hidden, mask, level)
        )
        return made

    def vision_weights(self, vision: Any) -> tuple[float, float]:
        merged = vision.hidden_size * vision.spatial_merge_size**2
        mergers = 1 + len(vision.deepstack_visual_indexes)
        return 2 * vision.hidden_size * vision.intermediate_size, mergers * merged * (
            merged + vision.out_hidden_size
        )


CARD = ModelCard(
    name="qwen3-vl",
    family=Qwen3VL,
    architectures=("Qwen3VLForConditionalGeneration", "qwen3_vl"),
    tasks=TASKS,
    blocks=BLOCKS,
    towers=TOWERS,
    pipeline=PIPELINE,
    masked_rows={"visual_pos_masks": "deepstack_visual_embeds"},
    sequence_entry="model.language_model",
    sequence_exit="model.language_model",
    tensor_plan={**TEXT_PLAN, **DENSE_PLAN, **VISION_PLAN},
    embedding="model.language_model.embed_tokens",
    sizes={
        "2b": Size("Qwen/Qwen3-VL-2B-Instruct", 2.13, 28, 24, devices=8, layout={"dp_shard": -1}),
        "4b": Size("Qwen/Qwen3-VL-4B-Instruct", 4.44, 36, 24, devices=8, layout={"dp_shard": -1}),
        "8b": Size("Qwen/Qwen3-VL-8B-Instruct", 8.77, 36, 27, devices=8, layout={"dp_shard": -1}),
        "32b": Size(
            "Qwen/Qwen3-VL-32B-Instruct", 33.36, 64, 27, devices=16, layout={"dp_shard": -1, "tp": 4}
        ),
    },
    keywords=KEYWORDS,
    aliases=("qwen3vl", "qwen3_vl"),
    verified="tiny models of the class: hidden states, logits and every gradient equal the library's; packed equals separate",
    seeds=("8b", "32b"),
)
