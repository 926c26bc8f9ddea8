"""Qihoo-T2X."""

from typing import Any

from torch import Tensor

from polymodal.models.nets.pt_dit import PTDiT
from tests.golden.net import SINGLE_GRADIENTS, SINGLE_OUTPUTS, Net, Outcome

# what every published config has, and our class is
FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "shift_window": True,
}


def _build(document: dict[str, Any]) -> PTDiT:
    config = dict(document["config"])
    for name, value in FIXED.items():
        if config.pop(name, value) != value:
            raise ValueError(f"{name} must be {value!r}")
    return PTDiT(**config)


def _run(model: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    return Outcome({"output": model(**inputs, return_dict=False)[0]})


NETS = [
    Net(
        ("Qihoo-T2X PT-DiT",),
        _build,
        _run,
        outputs_bound=SINGLE_OUTPUTS,
        gradients_bound=SINGLE_GRADIENTS,
    )
]
