"""The temporal half of Open-Sora 1.2's VAE."""

from typing import Any

from torch import Tensor

from polymodal.models.nets.autoencoder_open_sora_1_2 import TemporalAutoencoder
from tests.golden.net import Net, Outcome


def _run(model: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    if "num_frames" in inputs:
        (latents,) = (value for name, value in inputs.items() if name != "num_frames")
        return Outcome({"output": model.decode(latents, int(inputs["num_frames"])).sample})
    (frames,) = inputs.values()
    found = model.encode(frames).latent_dist
    return Outcome({"mean": found.mean, "logvar": found.logvar})


NETS = [Net(("Open-Sora 1.2, temporal VAE",), lambda d: TemporalAutoencoder(**d["config"]), _run)]
