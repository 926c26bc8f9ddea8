"""Step-Video's language model."""

from typing import Any

from torch import Tensor

from polymodal.models.nets.step_llm import Step1Config, Step1Model
from tests.golden.net import Net, Outcome


def _run(model: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    return Outcome({"last_hidden_state": model(inputs["input_ids"]).last_hidden_state})


NETS = [
    Net(
        ("Step LLM",),
        lambda document: Step1Model(Step1Config(**document["config"])),
        _run,
        outputs_bound=1e-6,
        gradients_bound=1e-6,
    )
]
