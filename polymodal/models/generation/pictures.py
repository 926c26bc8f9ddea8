"""What picture models share: latents of an AutoencoderKL, and the noise process that a scheduler's config tells.

Sees the ground floor and models/. Each model's own file holds its facts and overrides what differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.models.card import Process
from polymodal.models.diffusion import Generation, LatentGrid

LENGTHS = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")


def flow_process(scheduler: dict[str, Any], **facts: Any) -> Process:
    """Flow matching with the shift of a FlowMatchEulerDiscreteScheduler's config."""
    if scheduler.get("use_dynamic_shifting"):
        given = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        return Process(
            shift="dynamic", dynamic={k: float(scheduler.get(k, given[k])) for k in LENGTHS}, **facts
        )
    return Process(shift=float(scheduler.get("shift", 1.0)), **facts)


def discrete_process(scheduler: dict[str, Any], **facts: Any) -> Process:
    """The discrete process of a scheduler's config: its own class computes the products."""
    import diffusers

    name = str(scheduler["_class_name"])
    made = getattr(diffusers, name).from_config(scheduler)
    if not hasattr(made, "alphas_cumprod"):
        raise PolymodalError(
            f"The pipeline's scheduler, {name}, has no discrete timesteps, which this model is trained and sampled by.",
            "Take the directory `scheduler` of the published checkpoint.",
        )
    alphas = tuple(made.alphas_cumprod.double().tolist())
    return Process(
        "discrete",
        density="uniform",
        alphas=alphas,
        prediction=str(scheduler.get("prediction_type", "epsilon")),
        **facts,
    )


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
    """Rows (0, y, x) of a grid of tokens, float32 [height * width, 3]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float().to(device)


class Pictures(Generation):
    """A denoiser of pictures in the latents of an AutoencoderKL."""

    line = "pictures"
    patch = 2

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        space = 2 ** (len(vae["block_out_channels"]) - 1)
        return LatentGrid(int(vae["latent_channels"]), 1, space, (1, self.patch, self.patch), still=True)

    def process(self) -> Process:
        return flow_process(self.component_config("scheduler"))

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


def unbuilt(**others: str) -> dict[str, str]:
    """limits of a card whose denoiser is laid out by FSDP2 only; others: reasons of its own."""
    return {
        "tp": "its tensor plan is not built",
        "ep": "it has no experts",
        "cp": "the cut of its sequence over ranks is not built",
        "pp": "its stages are not built",
        **others,
    }
