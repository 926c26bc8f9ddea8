"""PLLaVA: one image token of a row stands for all pooled rows of its clip."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polymodal.models.nets import pllava
from tests.golden.net import Net, Outcome

PROJECTED = {
    "projector_video": ("features_video", "video"),
    "projector_image": ("features_image", "image"),
    "projector_short_video": ("features_short", "video"),
    "projector_two_images": ("features_two_images", "image"),
}


def build(document: dict[str, Any]) -> Any:
    given = document["config"]
    config = pllava.PllavaConfig(
        vision_config={"model_type": "clip_vision_model", **given["vision"]},
        text_config={"model_type": "llama", **given["text"]},
        **{key: value for key, value in given.items() if key not in ("vision", "text")},
    )
    # softmax is float32 in the language model alone
    config._attn_implementation = {"": "eager", "text_config": "eager", "vision_config": "sdpa"}
    return pllava.PllavaForConditionalGeneration(config)


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    config = module.config
    if case in PROJECTED:
        name, kind = PROJECTED[case]
        return Outcome({"rows": module.model.multi_modal_projector(inputs[name], kind)})
    rows = int(torch.tensor(config.pooling_shape).prod())

    def expanded(tensor: Tensor, fill: int) -> Tensor:
        found = []
        for ids, row in zip(inputs["input_ids"], tensor, strict=True):
            at = int((ids == config.image_token_index).nonzero())
            found.append(torch.cat([row[:at], row.new_full((rows,), fill), row[at + 1 :]]))
        return torch.stack(found)

    mask = expanded(inputs["attention_mask"], 1)
    labels = inputs.get("labels")
    if labels is not None:
        labels = expanded(labels, -100).masked_fill(mask == 0, -100)
    out = module(
        expanded(inputs["input_ids"], config.image_token_index),
        pixel_values=inputs["pixel_values"],
        attention_mask=mask,
        use_cache=False,
    )
    if labels is None:
        return Outcome({"logits": out.logits[mask.bool()]})
    # the library's loss is of float32 logits, the published one is not
    return Outcome({"loss": F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())})


NETS = [Net(models=("PLLaVA",), build=build, run=run)]
