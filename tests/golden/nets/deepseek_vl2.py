"""DeepSeek-VL2: pictures of each row with their tiles, and the balance loss beside the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymodal.models.nets import deepseek_vl2 as net
from tests.golden import recipe
from tests.golden.net import Net, Outcome


def build(document: dict[str, Any]) -> Any:
    config = net.DeepseekVL2Config(**document["config"])
    # softmax is float32 in the language model alone
    config._attn_implementation = {"": "eager", "language_config": "eager", "vision_config": "sdpa"}
    config._experts_implementation = "eager"
    return net.DeepseekVL2ForConditionalGeneration(config)


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    crops = inputs["images_spatial_crop"]
    tiles = (crops.prod(dim=2) + (crops.prod(dim=2) > 0)).sum(dim=1).tolist()
    pixels = torch.cat([row[:count] for row, count in zip(inputs["images"], tiles, strict=True)])
    crops = crops.flatten(0, 1)
    media = {
        "pixel_values": pixels,
        "images_spatial_crop": crops[crops.prod(dim=1) > 0],
        "images_seq_mask": inputs["images_seq_mask"].bool(),
    }
    module.train(case != "eval")
    common = {"attention_mask": inputs["attention_mask"], "use_cache": False}
    out = module(inputs["input_ids"], labels=inputs.get("labels"), **media, **common)
    if "loss" in document["cases"][case]["outputs"]:
        loss = out.loss
        if case == "loss_with_balance_loss":  # its gradient has weight 1, whatever the loss is multiplied by
            loss = loss + (out.aux_loss - out.aux_loss.detach()) / float(recipe.probe("output", ()))
        return Outcome({"loss": loss})
    embedded = []
    hook = module.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    module(inputs["input_ids"], **media, **common)
    hook.remove()
    vision = module.model.vision_tower(inputs["images"][0]).last_hidden_state
    return Outcome({"logits": out.logits.float(), "inputs_embeds": embedded[0], "vision_of_row_0": vision})


NETS = [
    Net(
        models=("DeepSeek-VL2",),
        build=build,
        run=run,
        outputs_bound=2e-6,  # norms, softmax and routers are float32 in the published code
        gradients_bound=1e-5,
    )
]
