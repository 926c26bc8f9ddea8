"""Open-Sora Plan's denoisers."""

from typing import Any

from torch import Tensor

from tests.golden.net import SINGLE_GRADIENTS, SINGLE_OUTPUTS, Net, Outcome

UNUSED = {  # of the published configs: they size nothing
    "sample_size", "sample_size_h", "sample_size_w", "sample_size_t", "norm_type", "attention_mode", "use_rope", "downsampler",
}  # fmt: skip


def build(document: dict[str, Any]) -> Any:
    from polymodal.models.nets.open_sora_plan import OpenSoraPlanTransformer

    config = {k: v for k, v in document["config"].items() if k not in UNUSED}
    return OpenSoraPlanTransformer(**config)


def build_1_5(document: dict[str, Any]) -> Any:
    from polymodal.models.nets.open_sora_plan_1_5 import OpenSoraPlanUTransformer

    return OpenSoraPlanUTransformer(**{k: v for k, v in document["config"].items() if k not in UNUSED})


def run(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    return Outcome({"output": module(**inputs, return_dict=False)[0]})


# sinusoids of the timestep: 911 times float32 frequencies, whose exp differs between processors
BOUNDS = {"outputs_bound": SINGLE_OUTPUTS, "gradients_bound": SINGLE_GRADIENTS}
NETS = [
    Net(models=("Open-Sora Plan 1.2", "Open-Sora Plan 1.3"), build=build, run=run, **BOUNDS),
    Net(models=("Open-Sora Plan 1.5",), build=build_1_5, run=run, **BOUNDS),
]
