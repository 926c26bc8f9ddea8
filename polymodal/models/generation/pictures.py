"""What picture models share: latents of an AutoencoderKL, and latents packed into tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.models.diffusion import Generation, LatentGrid


def packed(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens of two by two cells [B, H/2 * W/2, C * 4]."""
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    cells = latents.unflatten(2, (height, 2)).unflatten(4, (width, 2))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The way back: [B, H/2 * W/2, C * 4] -> [B, C, height, width]."""
    cells = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """Positions (0, y, x) of a grid of tokens, float32 [height * width, 3]."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in (height, width)), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()


def latent_statistics(vae: nn.Module, like: Tensor) -> list[Tensor]:
    """Mean and standard deviation of each latent channel [1, C, 1, 1, 1], from the VAE's config."""
    return [
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    ]


class Pictures(Generation):
    """A denoiser of pictures in the latents of an AutoencoderKL."""

    line = "pictures"

    @property
    def patch(self) -> int:
        """Latent cells along a side of a token."""
        return 2

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space = 2 ** (len(vae["block_out_channels"]) - 1)
        return LatentGrid(int(vae["latent_channels"]), 1, space, (1, self.patch, self.patch), still=True)

    @staticmethod
    def _scale(vae: nn.Module) -> tuple[float, float]:
        return float(vae.config.scaling_factor), float(vae.config.get("shift_factor") or 0.0)

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        scale, shift = self._scale(vae)
        return {"latents": (vae.encode(pixels[:, :, 0].to(vae.dtype)).latent_dist.mode() - shift) * scale}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        scale, shift = self._scale(vae)
        return vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0][:, :, None]
