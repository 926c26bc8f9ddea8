"""Step-Video's VAE; the published code has frames before channels."""

from typing import Any

from torch import Tensor

from polymodal.models.nets.autoencoder_step_video import AutoencoderStepVideo
from tests.golden.net import Net, Outcome

VERSION = 2
LAST = "decoder.conv_out"  # published class: `.conv.weight`; published file and ours: `.weight`


def _build(document: dict[str, Any]) -> AutoencoderStepVideo:
    parts = {}
    for part, config in document["config"].items():
        if isinstance(config, dict):
            config = dict(config)
            if config.pop("version", VERSION) != VERSION:
                raise ValueError("only version 2 of this VAE is published")
        parts[f"{part}_config" if isinstance(config, dict) else part] = config
    return AutoencoderStepVideo(**parts)


def _run(model: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    (given,) = (value.transpose(1, 2) for value in inputs.values())
    if case.startswith("encode"):
        made = model.encode(given).latent_dist.parameters
    elif given.shape[1] == model.decoder.conv_out.out_channels:  # frames, to be blended
        made = model.blend(given)
    else:
        made = model.decode(given).sample
    return Outcome({"output": made.transpose(1, 2)})


NETS = [
    Net(
        ("Step-Video VAE",),
        _build,
        _run,
        lambda model, document: {f"{LAST}.conv.{end}": f"{LAST}.{end}" for end in ("weight", "bias")},
    )
]
