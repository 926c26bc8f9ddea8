"""WF-VAE and CausalVAE."""

from typing import Any

from torch import Tensor

from tests.golden.net import Net, Outcome


def build_wf(document: dict[str, Any]) -> Any:
    from polymodal.models.nets.wf_vae import WFVAE

    return WFVAE(**document["config"])


def run_wf(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    (given,) = inputs.values()
    wanted = document["cases"][case]["outputs"]
    if "sample" in wanted:
        sample, (first, second) = module.decoder(given)
        return Outcome({"sample": sample, "wavelet_l1": first, "wavelet_l2": second})
    moments, (first, second) = module.encoder(given)
    posterior = DiagonalGaussianDistribution(moments)
    outputs = {"mean": posterior.mean, "logvar": posterior.logvar}
    return Outcome({**outputs, "wavelet_l1": first, "wavelet_l2": second})


def build_causal(document: dict[str, Any]) -> Any:
    from polymodal.models.nets.causal_vae import CausalVAE

    return CausalVAE(**document["config"])


def run_causal(module: Any, case: str, inputs: dict[str, Tensor], document: dict[str, Any]) -> Outcome:
    (given,) = inputs.values()
    if "output" in document["cases"][case]["outputs"]:
        return Outcome({"output": module.decode(given).sample})
    posterior = module.encode(given).latent_dist
    return Outcome({"mean": posterior.mean, "logvar": posterior.logvar})


NETS = [
    Net(models=("WF-VAE",), build=build_wf, run=run_wf),
    Net(models=("Open-Sora Plan 1.2 CausalVAE",), build=build_causal, run=run_causal),
]
