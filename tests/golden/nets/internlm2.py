"""InternLM2 is transformers' Llama, by the rules of its names; logits are float32 in the published code."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import WeightRenaming

from polymodal.models.understanding.internvl_chat import internlm2_rules
from tests.golden.net import Net, Outcome


def build(document: dict[str, Any]) -> Any:
    options = {key: value for key, value in document["config"].items() if value is not None}
    bias = options.pop("bias", False)
    return LlamaForCausalLM(LlamaConfig(**options, attention_bias=bias))


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    mask = inputs["attention_mask"]
    if "last_hidden_state" in document["cases"][case]["outputs"]:
        out = module.model(inputs_embeds=inputs["inputs_embeds"], attention_mask=mask, use_cache=False)
        return Outcome({"last_hidden_state": out.last_hidden_state})
    out = module(inputs["input_ids"], attention_mask=mask, labels=inputs.get("labels"), use_cache=False)
    return Outcome({"logits": out.logits[mask.bool()].float(), "loss": out.loss})


NETS = [
    Net(
        models=("InternLM2",),
        build=build,
        run=run,
        rules=lambda module, document: [WeightRenaming("^output", "lm_head"), *internlm2_rules()],
    )
]
