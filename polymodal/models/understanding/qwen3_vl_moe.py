"""Qwen3-VL with mixture-of-experts layers: facts. Its vision tower is that of qwen3_vl.py."""

from __future__ import annotations

from polymodal.models.card import Size
from polymodal.models.understanding.language import EXPERTS_PLAN, SPREAD_PLAN
from polymodal.models.understanding.qwen3_vl import FACTS, VISION_PLAN, Qwen3VL
from polymodal.models.understanding.qwen_vl import qwen_vl_card
from polymodal.models.understanding.vision_language import KEYWORDS


class Qwen3VLMoe(Qwen3VL):
    rope = "Qwen3VLMoeModel"


CARD = qwen_vl_card(
    {**EXPERTS_PLAN, **VISION_PLAN},
    name="qwen3-vl-moe",
    family=Qwen3VLMoe,
    architectures=("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"),
    **FACTS,
    expert_plan=SPREAD_PLAN,
    sizes={
        "30b-a3b": Size("Qwen/Qwen3-VL-30B-A3B-Instruct", 31.07, 48, 27, active=3.3, devices=16),
        "235b-a22b": Size("Qwen/Qwen3-VL-235B-A22B-Instruct", 235.7, 94, 27, active=22.0, devices=128),
    },
    keywords=(*KEYWORDS, "mixture of experts", "moe"),
    aliases=("qwen3vl-moe", "qwen3_vl_moe", "qwen3vlmoe"),
    seeds=("30b-a3b", "235b-a22b"),
)
