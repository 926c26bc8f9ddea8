"""Step-Video: both denoisers."""

from typing import Any

from torch import Tensor

from polymodal.models.nets.step_video import StepVideoModel
from tests.golden.net import SINGLE_GRADIENTS, SINGLE_OUTPUTS, Net, Outcome

KERNELS = ("attention_type", "norm_type")  # how the published code computes; no part of the net


def _build(document: dict[str, Any]) -> StepVideoModel:
    config = {name: value for name, value in document["config"].items() if name not in KERNELS}
    return StepVideoModel(**config)


def _run(model: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    return Outcome({"output": model(**inputs, return_dict=False)[0]})


NETS = [
    Net(
        ("Step-Video t2v", "Step-Video i2v"),
        _build,
        _run,
        outputs_bound=SINGLE_OUTPUTS,
        gradients_bound=SINGLE_GRADIENTS,
    )
]
