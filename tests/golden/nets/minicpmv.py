"""MiniCPM-V: slices in strips, of which each row has its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymodal.models.nets import minicpmv
from tests.golden.net import Net, Outcome


def build(document: dict[str, Any]) -> Any:
    config = minicpmv.MiniCPMVConfig(**document["config"])
    config._attn_implementation = "eager"
    return minicpmv.MiniCPMVForConditionalGeneration(config)


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    size = module.vpm.config.patch_size
    if "tower" in document["cases"][case]["outputs"]:
        each = inputs["slice_0_0"]
        grid = document["cases"]["loss"]["inputs"]["tgt_sizes_0"]["values"][0]
        assert grid[0] * grid[1] == each.shape[-1] // size
        return Outcome(
            {
                "tower": module.patches([each], [grid]),
                "resampler": module.get_image_features([each], [grid]),
            }
        )
    slices, grids, bounds = [], [], []
    for row in range(sum(name.startswith("tgt_sizes_") for name in inputs)):
        own = inputs[f"tgt_sizes_{row}"].tolist()
        grids += own
        slices += [inputs[f"slice_{row}_{number}"] for number in range(len(own))]
        bounds.append(inputs[f"image_bound_{row}"].tolist())
    if case == "resampler_rows_one_by_one":
        pairs = zip(slices, grids, strict=True)
        return Outcome(
            {"resampler_rows": torch.cat([module.get_image_features([s], [g])[0] for s, g in pairs])}
        )
    if case == "resampler_rows_batched":
        return Outcome({"resampler_rows": module.get_image_features(slices, grids).flatten(0, 1)})
    mask = inputs["attention_mask"]
    out = module(
        inputs["input_ids"],
        slices,
        grids,
        bounds,
        attention_mask=mask,
        position_ids=inputs["position_ids"],
        labels=inputs.get("labels"),
        use_cache=False,
    )
    return Outcome({"logits": out.logits[mask.bool()], "loss": out.loss})


NETS = [Net(models=("MiniCPM-V",), build=build, run=run)]
