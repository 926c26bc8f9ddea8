"""Qwen3-VL with mixture-of-experts layers: facts, and its router's logits. See qwen3_vl.py for the tower it shares."""

from __future__ import annotations

from polymodal.models.card import ModelCard, Size
from polymodal.models.understanding.language import EXPERTS_PLAN, SPREAD_PLAN, TEXT_PLAN
from polymodal.models.understanding.qwen3_vl import PIPELINE, TOWERS, VISION_PLAN, Qwen3VL
from polymodal.models.understanding.qwen_vl import BLOCKS
from polymodal.models.understanding.vision_language import KEYWORDS, TASKS


class Qwen3VLMoe(Qwen3VL):
    rope = "Qwen3VLMoeModel"


CARD = ModelCard(
    name="qwen3-vl-moe",
    family=Qwen3VLMoe,
    architectures=("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"),
    tasks=TASKS,
    blocks=BLOCKS,
    towers=TOWERS,
    pipeline=PIPELINE,
    masked_rows={"visual_pos_masks": "deepstack_visual_embeds"},
    sequence_entry="model.language_model",
    sequence_exit="model.language_model",
    tensor_plan={**TEXT_PLAN, **EXPERTS_PLAN, **VISION_PLAN},
    expert_plan=SPREAD_PLAN,
    embedding="model.language_model.embed_tokens",
    sizes={
        "30b-a3b": Size(
            "Qwen/Qwen3-VL-30B-A3B-Instruct", 31.07, 48, 27, active=3.3, devices=16, layout={"dp_shard": -1}
        ),
        "235b-a22b": Size(
            "Qwen/Qwen3-VL-235B-A22B-Instruct",
            235.7,
            94,
            27,
            active=22.0,
            devices=128,
            layout={"dp_shard": -1},
        ),
    },
    keywords=(*KEYWORDS, "mixture of experts", "moe"),
    aliases=("qwen3vl-moe", "qwen3_vl_moe", "qwen3vlmoe"),
    verified="tiny models of the class: hidden states, logits and every gradient equal the library's; packed equals separate",
    seeds=("30b-a3b", "235b-a22b"),
)
