"""The two-stage VAE of Open-Sora 1.2: a VAE of pictures on every frame, then one over time on its latents.

Formulas and keys: Open-Sora 1.2 (hpcaitech/Open-Sora, branch opensora/v1.2, Apache-2.0); its temporal part
follows MAGVIT-v2 (arXiv 2310.05737). Clips are coded in chunks of 17 frames, which become 5 latent frames and
know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import silu

from polymodal.models.nets.blocks import CausalConv3d


class ResBlock(nn.Module):
    def __init__(self, inside: int, outside: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside)
        self.conv1 = CausalConv3d(inside, outside, bias=False)
        self.norm2 = nn.GroupNorm(groups, outside)
        self.conv2 = CausalConv3d(outside, outside, bias=False)
        if inside != outside:
            self.conv3 = CausalConv3d(inside, outside, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return made + (self.conv3(x) if hasattr(self, "conv3") else x)


def _res_blocks(inside: int, outside: int, count: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(outside if n else inside, outside, groups) for n in range(count)))


class Encoder(nn.Module):
    def __init__(
        self,
        inside: int,
        outside: int,
        widths: Sequence[int],
        blocks: int,
        halves: Sequence[bool],
        groups: int,
    ):
        super().__init__()
        self.conv_in = CausalConv3d(inside, widths[0], bias=False)
        before = [widths[0], *widths[:-1]]
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(a, b, blocks, groups) for a, b in zip(before, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, stride=(2, 1, 1)) if half else nn.Identity()
            for width, half in zip(widths[:-1], halves, strict=True)
        )
        self.res_blocks = _res_blocks(widths[-1], widths[-1], blocks, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], outside, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = blocks(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        return self.conv2(silu(self.norm1(self.res_blocks(x))))


class Decoder(nn.Module):
    def __init__(
        self,
        inside: int,
        outside: int,
        widths: Sequence[int],
        blocks: int,
        halves: Sequence[bool],
        groups: int,
    ):
        super().__init__()
        self.conv1 = CausalConv3d(inside, widths[-1])
        self.res_blocks = _res_blocks(widths[-1], widths[-1], blocks, groups)
        before = [*widths[1:], widths[-1]]
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(a, b, blocks, groups) for a, b in zip(before, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width) if half else nn.Identity()
            for width, half in zip(widths[1:], halves, strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], outside)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                # of the doubled channels, neighbours are two frames
                frames = self.conv_blocks[level - 1](x).unflatten(1, (-1, 2))
                x = frames.permute(0, 1, 3, 2, 4, 5).flatten(2, 3)
        return self.conv_out(silu(self.norm1(x)))


class TemporalAutoencoder(ModelMixin, ConfigMixin):
    """Latents of frames [B, C, T, H, W] <-> [B, C', T', H, W], T' = ceil(T / 4); padded in front."""

    @register_to_config
    def __init__(
        self,
        in_out_channels: int = 4,
        latent_embed_dim: int = 4,
        embed_dim: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        temporal_downsample: Sequence[bool] = (False, True, True),
        num_groups: int = 32,
    ):
        """temporal_downsample: whether time is halved behind each level but the last."""
        super().__init__()
        widths = [filters * factor for factor in channel_multipliers]
        rest = (widths, num_res_blocks, temporal_downsample, num_groups)
        self.time = 2 ** sum(temporal_downsample)
        self.encoder = Encoder(in_out_channels, 2 * latent_embed_dim, *rest)
        self.quant_conv = CausalConv3d(2 * latent_embed_dim, 2 * embed_dim, kernel=1)
        self.post_quant_conv = CausalConv3d(embed_dim, latent_embed_dim, kernel=1)
        self.decoder = Decoder(latent_embed_dim, in_out_channels, *rest)

    def encode(self, frames: Tensor, return_dict: bool = True) -> Any:
        front = -frames.shape[2] % self.time
        padded = nn.functional.pad(frames, (0, 0, 0, 0, front, 0))
        found = DiagonalGaussianDistribution(self.quant_conv(self.encoder(padded)))
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, latents: Tensor, num_frames: int, return_dict: bool = True) -> Any:
        made = self.decoder(self.post_quant_conv(latents))[:, :, -num_frames % self.time :]
        return DecoderOutput(sample=made) if return_dict else (made,)


SPATIAL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The published VAE's first stage: the architecture of Stable Diffusion's."""


class _Frames(nn.Module):
    """The VAE of pictures, on each frame; its own name `module` is that of the published files."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


class AutoencoderOpenSora(ModelMixin, ConfigMixin):
    """Both stages: pixels [B, 3, F, H, W] in -1..1 <-> normalised latents [B, 4, T, H / 8, W / 8].

    Latents are (z - shift) / scale, by channel; `spatial` is the config of diffusers' AutoencoderKL, whose
    latents the second stage sees times `spatial_scale`.
    """

    @register_to_config
    def __init__(
        self,
        spatial: dict[str, Any] | None = None,
        temporal: dict[str, Any] | None = None,
        micro_frame_size: int = 17,
        spatial_scale: float = 0.18215,
        latent_shift: Sequence[float] = (-0.10, 0.34, 0.27, 0.98),
        latent_scale: Sequence[float] = (3.85, 2.32, 2.33, 3.06),
    ):
        super().__init__()
        self.spatial_vae = _Frames(AutoencoderKL(**(spatial or SPATIAL)))
        self.temporal_vae = TemporalAutoencoder(**(temporal or {}))
        # read from _buffers: the published config has these names, too, and diffusers finds those first
        for name, values in (("shift", latent_shift), ("scale", latent_scale)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1, 1))

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.temporal_vae.config.embed_dim)

    @property
    def space(self) -> int:
        """Pixels along a side of a latent cell."""
        return 2 ** (len(self.spatial_vae.module.config.block_out_channels) - 1)

    def pixel_frames(self, latent_frames: int) -> int:
        """Frames of so many latent frames: of whole chunks, or the most that a chunk begun can have."""
        size, time = self.config.micro_frame_size, self.temporal_vae.time
        whole, rest = divmod(latent_frames, self.latent_frames(size))
        return whole * size + (1 if rest == 1 else rest * time)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of so many: each chunk of 17 has 5, a rest one for each 4 begun."""
        whole, rest = divmod(frames, self.config.micro_frame_size)
        time = self.temporal_vae.time
        return whole * -(-self.config.micro_frame_size // time) + -(-rest // time)

    def encode(self, pixels: Tensor, return_dict: bool = True) -> Any:
        """-> normalised latents, sampled neither in space nor in time: `latents`."""
        batch, frames = pixels.shape[0], pixels.transpose(1, 2).flatten(0, 1)
        coded = self.spatial_vae.module.encode(frames).latent_dist.mode() * self.config.spatial_scale
        coded = coded.unflatten(0, (batch, -1)).transpose(1, 2)
        chunks = coded.split(self.config.micro_frame_size, dim=2)
        latents = torch.cat([self.temporal_vae.encode(chunk).latent_dist.mode() for chunk in chunks], dim=2)
        latents = (latents - self._buffers["shift"]) / self._buffers["scale"]
        return {"latents": latents} if return_dict else (latents,)

    def decode(self, latents: Tensor, num_frames: int, return_dict: bool = True) -> Any:
        """num_frames: of the clip, which the latents alone do not tell."""
        latents = latents * self._buffers["scale"] + self._buffers["shift"]
        size = self.config.micro_frame_size
        chunks, made = latents.split(self.latent_frames(size), dim=2), []
        for number, chunk in enumerate(chunks):
            frames = min(size, num_frames - number * size)
            made.append(self.temporal_vae.decode(chunk, frames).sample)
        coded = torch.cat(made, dim=2).transpose(1, 2).flatten(0, 1) / self.config.spatial_scale
        frames = self.spatial_vae.module.decode(coded).sample
        pixels = frames.unflatten(0, (len(latents), -1)).transpose(1, 2)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
