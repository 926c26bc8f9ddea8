"""Open-Sora 1.0 and 1.2."""

from typing import Any

from torch import Tensor

from polymodal.models.nets.stdit import STDiT
from polymodal.models.nets.stdit3 import STDiT3
from tests.golden.net import SINGLE_GRADIENTS, SINGLE_OUTPUTS, Net, Outcome

# a float32 sinusoid: the last bit of its frequencies, which a processor chooses, is 1e-6 of the outputs
SINGLE = SINGLE_OUTPUTS, SINGLE_GRADIENTS


def _first(model: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    caption, mask = inputs["y"][:, 0], inputs.get("mask")
    return Outcome({"output": model(inputs["x"], inputs["timestep"], caption, mask, return_dict=False)[0]})


def _second(model: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    (made,) = model(
        inputs["x"],
        inputs["timestep"],
        inputs["y"][:, 0],
        inputs.get("mask"),
        fps=inputs["fps"],
        height=float(inputs["height"][0]),
        width=float(inputs["width"][0]),
        frame_mask=inputs.get("x_mask"),
        return_dict=False,
    )
    return Outcome({"output": made})


NETS = [
    Net(("Open-Sora 1.0 STDiT",), lambda d: STDiT(**d["config"]), _first, None, *SINGLE),
    Net(("Open-Sora 1.2 STDiT3",), lambda d: STDiT3(**d["config"]), _second, None, *SINGLE),
]
