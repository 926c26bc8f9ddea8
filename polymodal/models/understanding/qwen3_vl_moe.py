"""Qwen3-VL with mixture-of-experts layers: facts, and its router's logits. See qwen3_vl.py for the tower it shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polymodal.core.sample import Batch
from polymodal.distributed.router_loss import router_sums
from polymodal.models.card import ModelCard, Size
from polymodal.models.understanding.qwen3_vl import PIPELINE, TOWERS, VISION_PLAN, Qwen3VL
from polymodal.models.understanding.qwen_vl import (
    BLOCKS,
    EXPERTS_PLAN,
    KEYWORDS,
    SPREAD_PLAN,
    TASKS,
    TEXT_PLAN,
)


class Qwen3VLMoe(Qwen3VL):
    rope = "Qwen3VLMoeModel"
    text_arguments = {
        "output_router_logits": True
    }  # the library hooks the routers alone, no hidden states are kept

    def extra(self, out: Any, carry: Mapping[str, Tensor]) -> dict[str, Any]:
        extra: dict[str, Any] = {"router_logits": list(out.router_logits or ())}
        if "router_sums" in carry:
            here = len(extra["router_logits"])
            extra |= {
                "router_sums_before": carry["router_sums"],
                "router_layers_before": self.sparse_layers(self.config.text_config) - here,
            }
        return extra

    def carried(
        self, batch: Batch, hidden: Tensor, extra: Mapping[str, Any], carry: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        before = carry.get("router_sums")
        if routers := extra.get("router_logits"):
            own = router_sums(routers, self.config.text_config.num_experts_per_tok, batch)
            before = own if before is None else own + before
        elif before is None and extra:  # dense layers only, so far
            before = hidden.new_zeros(2, self.config.text_config.num_experts)
        return {} if before is None else {"router_sums": before}

    def carried_spec(self) -> dict[str, tuple[int, ...]]:
        return {"router_sums": (2, self.config.text_config.num_experts)}

    def sparse_layers(self, text: Any) -> int:
        """Language layers that have experts."""
        layers = range(text.num_hidden_layers)
        return sum(i not in text.mlp_only_layers and (i + 1) % text.decoder_sparse_step == 0 for i in layers)

    def routers(self) -> tuple[int, int]:
        return self.sparse_layers(self.config.text_config), self.config.text_config.num_experts

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
    pipeline=PIPELINE,
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
