"""Open-Sora 2.0, as published and in FLUX's form."""

import re
from typing import Any

from torch import Tensor

from polymodal.models.nets.blocks import grid_positions
from polymodal.models.nets.open_sora_2 import OpenSora2Transformer
from tests.golden.net import SINGLE_GRADIENTS, SINGLE_OUTPUTS, Net, Outcome


def _run(model: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    grid = re.search(r"grid T,H,W = (\d+),(\d+),(\d+)", document["notes"])
    assert grid
    places = grid_positions(*map(int, grid.groups()), inputs["img"].device)
    given = (inputs["txt"], inputs["y_vec"], inputs.get("img_ids", places), inputs.get("txt_ids"))
    made = model(inputs["img"], inputs["timesteps"], *given, inputs.get("cond"), return_dict=False)
    return Outcome({"output": made[0]})


NETS = [
    Net(
        ("Open-Sora 2.0 MMDiT",),
        lambda document: OpenSora2Transformer(**document["config"]),
        _run,
        outputs_bound=SINGLE_OUTPUTS,
        gradients_bound=SINGLE_GRADIENTS,
    )
]
