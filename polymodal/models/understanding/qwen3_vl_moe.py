"""Qwen3-VL with mixture-of-experts layers: facts, and its router's logits. See qwen3_vl.py for the tower it shares."""

from __future__ import annotations

from typing import Any

from polymodal.models.card import ModelCard, Size
from polymodal.models.understanding.qwen3_vl import TOWERS, VISION_PLAN, Qwen3VL
from polymodal.models.understanding.qwen_vl import (
    BLOCKS,
    EXPERTS_PLAN,
    FIRST,
    KEYWORDS,
    LAST,
    SPREAD_PLAN,
    TASKS,
    TEXT_PLAN,
)


class Qwen3VLMoe(Qwen3VL):
    rope = "Qwen3VLMoeModel"
    text_arguments = {
        "output_router_logits": True
    }  # the library hooks the routers alone, no hidden states are kept

    def extra(self, out: Any) -> dict[str, Any]:
        return {"router_logits": list(out.router_logits or ())}

    def sparse_layers(self, text: Any) -> int:
        """Language layers that have experts."""
        layers = range(text.num_hidden_layers)
        return sum(i not in text.mlp_only_layers and (i + 1) % text.decoder_sparse_step == 0 for i in layers)

    def mlp_weights(self, text: Any) -> float:
        sparse = self.sparse_layers(text)
        dense = 3 * text.hidden_size * text.intermediate_size * (text.num_hidden_layers - sparse)
        experts = 3 * text.moe_intermediate_size * text.num_experts_per_tok + text.num_experts
        return dense + text.hidden_size * experts * sparse


CARD = ModelCard(
    name="qwen3-vl-moe",
    family=Qwen3VLMoe,
    architectures=("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"),
    tasks=TASKS,
    blocks=BLOCKS,
    towers=TOWERS,
    first=FIRST,
    last=LAST,
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
