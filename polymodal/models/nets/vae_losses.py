"""What WF-VAE is trained by: LPIPS by a VGG16, a 3-D patch discriminator, and the losses of both sides.

Formulas and names of parameters: WF-VAE (github.com/PKU-YuanGroup/WF-VAE, Apache-2.0); LPIPS: arXiv
1801.03924.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
VGG = {1: {0: 64, 2: 64}, 2: {5: 128, 7: 128}, 3: {10: 256, 12: 256, 14: 256}, 4: {17: 512, 19: 512, 21: 512}}
VGG[5] = {24: 512, 26: 512, 28: 512}
"""Of torchvision's VGG16: the convolutions of each slice and their channels. Slices but the first begin
with a max pool."""


class _Named(nn.Module):
    """Submodules by name, as the published files have them."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class LPIPS(nn.Module):
    """The distance of pictures [N, 3, H, W] in -1..1, [N]. Frozen: heads of LPIPS (`lin*`), VGG16
    (`net.*`)."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = nn.Module()
        self.scaling_layer.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.scaling_layer.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        slices, channels = {}, 3
        for number, convolutions in VGG.items():
            layers = {}
            for index, out in convolutions.items():
                layers[str(index)], channels = nn.Conv2d(channels, out, 3, padding=1), out
            slices[f"slice{number}"] = _Named(**layers)
            head = nn.Conv2d(channels, 1, 1, bias=False)
            self.add_module(f"lin{number - 1}", _Named(model=_Named(**{"1": head})))
        self.net = _Named(**slices)
        self.requires_grad_(False)

    def forward(self, made: Tensor, clip: Tensor) -> Tensor:
        distance: Any = 0.0
        seen = zip(self._features(made), self._features(clip), strict=True)
        for number, (one, other) in enumerate(seen):
            head = self.get_submodule(f"lin{number}.model.1")
            apart = (_unit(one) - _unit(other)) ** 2
            distance = distance + conv2d(apart, head.weight).mean(dim=(1, 2, 3))
        return distance

    def _features(self, pictures: Tensor) -> list[Tensor]:
        hidden = (pictures - self.scaling_layer.shift) / self.scaling_layer.scale
        found = []
        for number, layers in enumerate(self.net.children()):
            hidden = max_pool2d(hidden, 2) if number else hidden
            for layer in layers.children():
                hidden = relu(layer(hidden))
            found.append(hidden)
        return found


def _unit(features: Tensor) -> Tensor:
    return features / (features.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)


class PatchDiscriminator3D(nn.Module):
    """Logits of patches [B, 1, T', H', W'] of clips [B, 3, T, H, W]."""

    def __init__(self, channels: int = 64, layers: int = 4, dropout: float = 0.3):
        super().__init__()
        stages: list[nn.Module] = [nn.Conv3d(3, channels, 3, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for number in range(1, layers + 1):
            out = channels * min(2**number, 8)
            stride = 1 if number == layers else (2 if number == 1 else 1, 2, 2)
            stages += [nn.Conv3d(width, out, 3, stride, 1, bias=False), nn.BatchNorm3d(out)]
            stages += [nn.LeakyReLU(0.2), nn.Dropout(dropout)]
            width = out
        self.main = nn.Sequential(*stages, nn.Conv3d(width, 1, 3, 1, 1))
        self.apply(_initial)

    def forward(self, clip: Tensor) -> Tensor:
        return self.main(clip)


def _initial(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def generator_loss(
    vae: Any,
    lpips: LPIPS,
    discriminator: nn.Module,
    clip: Tensor,
    *,
    perceptual: float = 1.0,
    kl: float = 1e-6,
    wavelet: float = 0.1,
    adversarial: float = 0.5,
    factor: float = 1.0,
    largest: float = 1e6,
    sample: bool = True,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, the clip that was decoded, terms) of clips [B, 3, T, H, W] in -1..1.

    Sums over pixels a frame, sums of KL and coefficients a clip. The adversarial term is weighted so that
    its gradient at the decoder's last layer is `adversarial` times the reconstruction's (the ratio at most
    `largest`), times `factor` (0 before the discriminator starts). sample: latents are drawn, else their
    mean is decoded.
    """
    batch, frames = len(clip), clip.shape[2]
    moments, (first, second) = vae.encoder(clip)
    posterior = DiagonalGaussianDistribution(moments)
    made, (made_first, made_second) = vae.decoder(posterior.sample() if sample else posterior.mode())
    pictures, shown = (t.transpose(1, 2).flatten(0, 1) for t in (made, clip))
    apart = (shown - pictures).abs() + perceptual * lpips(pictures, shown).view(-1, 1, 1, 1)
    nll = apart.sum() / (batch * frames)
    divergence = posterior.kl().sum() / batch
    fooled = -discriminator(made).mean()
    last = vae.decoder.conv_out.weight
    of_nll, of_fooled = (torch.autograd.grad(term, last, retain_graph=True)[0] for term in (nll, fooled))
    weight = adversarial * (of_nll.norm() / (of_fooled.norm() + 1e-6)).clamp(0, largest).detach()
    coefficients = ((first - made_first).abs().sum() + (second - made_second).abs().sum()) / batch
    loss = nll + kl * divergence + weight * factor * fooled + wavelet * coefficients
    terms = {"nll": nll, "kl": divergence, "wavelet": coefficients, "adversarial": fooled, "weight": weight}
    return loss, made, {name: term.detach() for name, term in terms.items()}


def discriminator_loss(
    discriminator: nn.Module, clip: Tensor, made: Tensor, factor: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hinge loss: (loss, mean logits of real and made clips)."""
    real, fake = discriminator(clip.detach()), discriminator(made.detach())
    loss = factor * 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())
    return loss, {"real": real.mean().detach(), "fake": fake.mean().detach()}
