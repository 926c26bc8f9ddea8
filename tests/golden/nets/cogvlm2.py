"""CogVLM2, of pictures and of video."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polymodal.models.nets import cogvlm2
from tests.golden.net import Net, Outcome


def build(document: dict[str, Any]) -> Any:
    video = "video" in document["model"]
    kind = cogvlm2.CogVLM2VideoForCausalLM if video else cogvlm2.CogVLM2ForCausalLM
    return kind(cogvlm2.CogVLM2Config(**document["config"]))


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    types, mask, images = inputs["token_type_ids"], inputs["attention_mask"], inputs["images"]
    if case == "vision":
        rows = module.model.vision(images[: int(inputs["images_per_row"][0])])
        scalars = {
            "position_ids": cogvlm2.positions(types, mask).tolist(),
            "vision_expert_mask": cogvlm2.expert_mask(types).long().tolist(),
        }
        return Outcome({"vision_rows_of_row_0": rows}, scalars)
    out = module(
        inputs["input_ids"],
        images=images,
        token_type_ids=types,
        attention_mask=mask,
        labels=inputs.get("labels"),
    )
    return Outcome({"logits": out.logits[mask.bool()], "loss": out.loss})


# norms, softmax under padding and the loss are float32 in the published code
NETS = [Net(models=("CogVLM2",), build=build, run=run, outputs_bound=2e-6, gradients_bound=1e-5)]
