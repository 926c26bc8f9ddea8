"""Ming-Lite-Omni: the text model, with plain and spatial positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymodal.models.nets import ming
from tests.golden import recipe
from tests.golden.net import Net, Outcome


def build(document: dict[str, Any]) -> Any:
    config = ming.BailingMoeConfig(**document["config"])
    config._experts_implementation = "eager"
    return ming.BailingMoeForCausalLM(config)


def run(module: Any, case: str, inputs: dict[str, Any], document: dict[str, Any]) -> Outcome:
    if case == "positions":
        return Outcome({}, {"position_ids": _positions(inputs).tolist()})
    if case == "from_ids" and module.config.spatial:  # of the same tokens as the other cases
        given = document["cases"]["loss"]["inputs"]["position_ids"]
        inputs["position_ids"] = recipe.given("position_ids", given)
    out = module(**inputs)
    mask = inputs["attention_mask"].bool()
    return Outcome({"logits": out.logits[mask], "logits_of_row_0": out.logits[0, :8], "loss": out.loss})


def _positions(inputs: dict[str, Any]) -> Tensor:
    ids, mask = inputs["input_ids"], torch.as_tensor(inputs["attention_mask"]).bool()
    images, videos = iter(inputs["image_grid_thw"]), iter(inputs["video_grid_thw"])
    seconds = iter(inputs["second_per_grid_ts"])
    found = torch.ones(3, *ids.shape, dtype=torch.int64)
    for row, kept in enumerate(mask):
        options = (inputs["ids"], inputs["spatial_merge_size"], inputs["tokens_per_second"])
        found[:, row, kept] = ming.positions(ids[row][kept].tolist(), images, videos, *options, seconds)
    return found


NETS = [
    Net(
        models=("Ming-Lite-Omni text",),
        build=build,
        run=run,
        outputs_bound=2e-6,  # norms, softmax and routers are float32 in the published code
        gradients_bound=1e-5,
    )
]
