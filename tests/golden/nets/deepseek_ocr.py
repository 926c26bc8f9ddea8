"""DeepSeek-OCR: one picture a row, its whole view and its tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymodal.models.nets import deepseek_ocr as net
from tests.golden import recipe
from tests.golden.net import Net, Outcome


def build(document: dict[str, Any]) -> Any:
    given = document["config"]
    sam, clip = given["sam"], given["clip"]
    vision = {
        "sam_config": {
            "image_size": sam["img_size"],
            "patch_size": sam["patch_size"],
            "hidden_size": sam["embed_dim"],
            "num_hidden_layers": sam["depth"],
            "num_attention_heads": sam["num_heads"],
            "output_channels": sam["out_chans"],
            "window_size": sam["window_size"],
            "global_attn_indexes": sam["global_attn_indexes"],
            "downsample_channels": sam["net_channels"],
            "mlp_dim": int(sam.get("mlp_ratio", 4) * sam["embed_dim"]),
        },
        "encoder_config": {
            "hidden_size": clip["hidden_size"],
            "num_hidden_layers": clip["num_layers"],
            "num_attention_heads": clip["num_attention_heads"],
            "intermediate_size": clip["ffn_hidden_size"],
            "image_size": clip["image_size"],
            "patch_size": clip["patch_size"],
        },
    }
    config = net.DeepseekOcrConfig(language_config=given["language_config"], vision_config=vision)
    config._attn_implementation = {"": "eager", "language_config": "eager", "vision_config": "sdpa"}
    config._experts_implementation = "eager"
    return net.DeepseekOcrForConditionalGeneration(config)


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    rows = range(len(inputs["input_ids"]))
    tiles = [inputs[f"tiles_{row}"] for row in rows if f"tiles_{row}" in inputs]
    module.train(case != "eval")
    out = module(
        inputs["input_ids"],
        pixel_values=torch.cat([inputs[f"global_view_{row}"] for row in rows]),
        pixel_values_local=torch.cat(tiles) if tiles else None,
        images_spatial_crop=inputs["images_spatial_crop"],
        images_seq_mask=inputs["images_seq_mask"].bool(),
        attention_mask=inputs["attention_mask"],
        labels=inputs.get("labels"),
        use_cache=False,
    )
    if "loss" in document["cases"][case]["outputs"]:
        loss = out.loss
        if "with_balance" in case:  # its gradient has weight 1, whatever the loss is multiplied by
            loss = loss + (out.aux_loss - out.aux_loss.detach()) / float(recipe.probe("output", ()))
        return Outcome({"loss": loss})
    outputs = {"logits": out.logits.float()}
    for name in document["cases"][case]["outputs"]:
        tower, _, view = name.partition("_of_")
        if view:
            picture = inputs[view] if view in inputs else inputs["tiles_0"][int(view[-1])][None]
            towers = module.model.vision_tower
            seen = towers.sam_encoder(picture).last_hidden_state
            outputs[name] = seen if tower == "sam" else towers.vision_encoder(seen).last_hidden_state
    return Outcome(outputs)


NETS = [
    Net(
        models=("DeepSeek-OCR",),
        build=build,
        run=run,
        outputs_bound=2e-6,  # norms, softmax and routers are float32 in the published code
        gradients_bound=1e-5,
    )
]
