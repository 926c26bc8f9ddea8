"""MiniCPM-V: slices in strips, of which each row has its own; a strip is a line of patches."""

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


def patches(module: Any, strips: list[Tensor]) -> Tensor:
    """Strips [3, P, N P] as patches [N, 3, P, P] in one line."""
    size = module.config.vision_config.patch_size
    return torch.cat([each.unflatten(2, (-1, size)).permute(2, 0, 1, 3) for each in strips])


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    inner = module.model
    if "tower" in document["cases"][case]["outputs"]:
        line = patches(module, [inputs["slice_0_0"]])
        grids = [tuple(document["cases"]["loss"]["inputs"]["tgt_sizes_0"]["values"][0])]
        tower = inner.vision_tower(line, inner.tower_grids(grids)).last_hidden_state
        return Outcome({"tower": tower, "resampler": inner.get_image_features(line, grids)})
    slices, grids, bounds = [], [], []
    for row in range(sum(name.startswith("tgt_sizes_") for name in inputs)):
        own = inputs[f"tgt_sizes_{row}"].tolist()
        grids += own
        slices += [inputs[f"slice_{row}_{number}"] for number in range(len(own))]
        bounds.append(inputs[f"image_bound_{row}"].tolist())
    if case.startswith("resampler_rows"):
        module.config.batch_vision_input = case == "resampler_rows_batched"
        rows = inner.get_image_features(patches(module, slices), grids).flatten(0, 1)
        module.config.batch_vision_input = True
        return Outcome({"resampler_rows": rows})
    mask = inputs["attention_mask"]
    places = torch.zeros_like(mask, dtype=torch.bool)
    for row, own in enumerate(bounds):
        for start, stop in own:
            places[row, start:stop] = True
    out = module(
        inputs["input_ids"],
        patches(module, slices),
        torch.tensor([[*grid, 0, 0, 0, 0] for grid in grids]),  # each slice as a picture of its own
        places,
        attention_mask=mask,
        position_ids=inputs["position_ids"],
        labels=inputs.get("labels"),
        use_cache=False,
    )
    return Outcome({"logits": out.logits[mask.bool()], "loss": out.loss})


NETS = [
    Net(
        models=("MiniCPM-V",),
        build=build,
        run=run,
        outputs_bound=1e-6,  # softmax is float32 in the published code, over padded slices; here over packed ones
        gradients_bound=1e-5,
    )
]
