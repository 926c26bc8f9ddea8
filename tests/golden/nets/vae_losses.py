"""The losses that WF-VAE is trained by: a step of each side, with their gradients."""

from typing import Any

import torch
from torch import nn

from tests.golden import recipe
from tests.golden.net import Net


def fill(module: nn.Module, document: dict[str, Any], kept: tuple[str, ...], of: str = "") -> Any:
    """of: what names begin with in the published module of losses, which was filled as a whole."""
    module = module.double()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not any(part in name for part in kept):
                tensor.copy_(recipe.weight(of + name, tensor.shape, document))
    return module


def keys(module: nn.Module, published: dict[str, Any]) -> float:
    return float({name: list(t.shape) for name, t in module.state_dict().items()} != published)


def gradients(module: nn.Module, wanted: dict[str, Any]) -> float:
    largest = max(digest[1] for digest in wanted.values() if digest)
    of = dict(module.named_parameters())
    return max(
        recipe.gradient_error(name, getattr(of.get(name), "grad", None), digest, largest)
        for name, digest in wanted.items()
    )


def compare(document: dict[str, Any]) -> list[tuple[str, str, float]]:
    from polymodal.models.nets.vae_losses import (
        LPIPS,
        PatchDiscriminator3D,
        discriminator_loss,
        generator_loss,
    )
    from polymodal.models.nets.wf_vae import WFVAE

    vae = fill(WFVAE(**document["vae_config"]), document, ("wavelet_transform",))
    lpips = fill(LPIPS(), document, ("scaling_layer",), "perceptual_loss.")
    kept = ("running_", "num_batches_tracked")
    discriminator = fill(PatchDiscriminator3D(dropout=0.0), document, kept, "discriminator.").train()
    (clip,) = (recipe.given(name, entry) for name, entry in document["inputs"].items())
    loss, made, terms = generator_loss(vae, lpips, discriminator, clip, sample=False)
    loss.backward()
    told = document["generator"]
    of_terms = {
        "nll": "nll_loss", "kl": "kl_loss", "wavelet": "wl_loss", "adversarial": "g_loss", "weight": "d_weight",
    }  # fmt: skip
    found = [
        ("discriminator", "keys", keys(discriminator, document["state_dict_discriminator"])),
        ("lpips", "keys", keys(lpips, document["state_dict_lpips"])),
        ("generator", "loss", recipe.scalar_error(float(loss.detach()), document["generator_loss"])),
        ("generator", "gradients", gradients(vae, document["generator_grads"])),
    ]
    found += [
        ("generator", name, recipe.scalar_error(float(terms[name]), told[f"train/{theirs}"]))
        for name, theirs in of_terms.items()
    ]
    discriminator.zero_grad()
    loss, logits = discriminator_loss(discriminator, clip, made)
    loss.backward()
    told = document["discriminator"]
    found += [
        ("discriminator", "loss", recipe.scalar_error(float(loss.detach()), document["discriminator_loss"])),
        ("discriminator", "gradients", gradients(discriminator, document["discriminator_grads"])),
    ]
    found += [
        ("discriminator", name, recipe.scalar_error(float(logits[name]), told[f"train/logits_{name}"]))
        for name in logits
    ]
    return found


NETS = [Net(models=("WF-VAE training losses", "wfvae_training_losses"), compare=compare)]
