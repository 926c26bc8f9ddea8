"""GLM-4.5V: facts. GLM-4.1V's tower; layers with shared experts and with others that a router chooses by
sigmoid scores and a bias of its own, a buffer that the files have and that training leaves as it is.
"""

from __future__ import annotations

from typing import Any

from polymodal.models.card import Size
from polymodal.models.understanding.glm4v import ROPE, Glm4v, glm_card, vision_config
from polymodal.models.understanding.language import EXPERTS_PLAN, SHARED_PLAN, SPREAD_PLAN
from polymodal.models.understanding.vision_language import KEYWORDS


class Glm4vMoe(Glm4v):
    rope = "Glm4vMoeModel"


CONFIG: dict[str, Any] = {
    "model_type": "glm4v_moe",
    "text_config": {
        "model_type": "glm4v_moe_text",
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "vocab_size": 151552,
        "max_position_embeddings": 65536,
        "rope_parameters": ROPE,
    },
    "vision_config": {**vision_config("glm4v_moe_vision"), "intermediate_size": 10944},
}
CARD = glm_card(
    {**EXPERTS_PLAN, **SHARED_PLAN},
    name="glm4.5v",
    title="GLM-4.5V",
    family=Glm4vMoe,
    architectures=("Glm4vMoeForConditionalGeneration", "glm4v_moe"),
    expert_plan=SPREAD_PLAN,
    sizes={"106b-a12b": Size("zai-org/GLM-4.5V", 107.71, 46, 24, active=13.4, devices=64, config=CONFIG)},
    keywords=(*KEYWORDS, "mixture of experts", "moe"),
    aliases=("glm-4.5v", "glm4v-moe", "glm4v_moe"),
    seeds=("106b-a12b",),
)
