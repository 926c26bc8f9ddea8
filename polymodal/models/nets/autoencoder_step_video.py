"""The VAE of Step-Video (version 2): 8 x 16 x 16 pixels a latent cell, chunks of 17 frames.

Formulas and keys: stepfun-ai/Step-Video-T2V (MIT) and the report (arXiv 2502.10248); the shortcuts over
(un)shuffled pixels are those of DC-AE (arXiv 2410.10733). Chunks are coded apart; the last frame of a chunk
and the first of the next are blended. Every group norm is of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu

from polymodal.models.nets.blocks import AttentionCore, CausalConv3d

KEPT = 0.6  # share of a frame at the border of two chunks; the rest is its neighbour's


class FrameNorm(nn.GroupNorm):
    """A group norm of 32 groups over each frame of [B, C, T, H, W]."""

    def __init__(self, channels: int):
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class BareCausalConv3d(nn.Conv3d):
    """A causal convolution whose parameters have no `conv` in their names."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, (1, 1, 1, 1, 2, 0)))


class ResBlock(nn.Module):
    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(inside), CausalConv3d(inside, outside)
        self.norm2, self.conv2 = FrameNorm(outside), CausalConv3d(outside, outside)
        if inside != outside:
            self.nin_shortcut = CausalConv3d(inside, outside, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return made + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class CausalAttention(AttentionCore):
    """One head over all tokens of a chunk; a token sees those before it in the order of t, y, x."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = FrameNorm(channels)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(channels, channels, kernel=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            conv(normed).flatten(2).transpose(1, 2)[:, :, None] for conv in (self.q, self.k, self.v)
        )
        seen = self.attend(query, key, value, causal=True)
        return x + self.proj_out(seen.transpose(1, 2).view_as(x))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(channels, channels), CausalAttention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def unshuffled(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, C * 8, (T + 1) / 2, H / 2, W / 2]; one frame of zeros in front."""
    cells = pad(x, (0, 0, 0, 0, 1, 0)).unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def shuffled(x: Tensor) -> Tensor:
    """The way back: [B, C * 8, T, H, W] -> [B, C, 2T - 1, 2H, 2W]."""
    cells = x.unflatten(1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return cells.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, 1:]


def channel_means(x: Tensor, channels: int) -> Tensor:
    return x.unflatten(1, (channels, -1)).mean(dim=2)


class PlaneDownsample(nn.Module):
    """Half the sides of every frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1)))
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class Conv(nn.Module):
    """A causal convolution with the published names `conv.conv`."""

    def __init__(self, inside: int, outside: int, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.conv = CausalConv3d(inside, outside, stride=stride, front=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PlaneUpsample(nn.Module):
    """Twice the sides of every frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0))
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class _UpsampleConvs(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = CausalConv3d(channels, channels), FrameNorm(channels)
        self.conv2, self.norm2 = CausalConv3d(channels, channels), FrameNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        made = self.norm2(self.conv2(silu(self.norm1(self.conv1(x)))))
        return silu(made + x) + x


class Upsample(nn.Module):
    """Twice the sides and the frames."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv3d = _UpsampleConvs(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.last = resample[0] if resample else ""
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.last)(x) if self.last else x


def _blocks(inside: int, outside: int, count: int) -> list[nn.Module]:
    return [ResBlock(outside if n else inside, outside) for n in range(count)]


class Encoder(nn.Module):
    def __init__(
        self,
        ch: int = 32,
        ch_mult: Sequence[int] = (4, 8, 16, 16),
        num_res_blocks: int = 2,
        in_channels: int = 3,
        z_channels: int = 64,
        double_z: bool = True,
        down_sampling_layer: Sequence[int] = (1, 2),
    ):
        """down_sampling_layer: levels behind which time is halved as well."""
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, ch)
        widths = [ch * factor for factor in ch_mult]
        levels: list[nn.Module] = []
        for level, (inside, width) in enumerate(zip([ch, *widths], widths, strict=False)):
            down: nn.Module = PlaneDownsample(width)
            if level in down_sampling_layer:
                down = Conv(width, width, (2, 2, 2))
            resample = None if level == len(widths) - 1 else ("downsample", down)
            levels.append(Level(_blocks(inside, width, num_res_blocks), resample))
        self.down = nn.ModuleList(levels)
        self.mid, self.norm_out = Middle(widths[-1]), FrameNorm(widths[-1])
        self.patched = 4 * z_channels * 8
        self.outside = 2 * z_channels if double_z else z_channels
        self.conv_patchify = Conv(widths[-1], self.patched // 8)
        self.conv_out = CausalConv3d(self.patched, self.outside)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = silu(self.norm_out(self.mid(x)))
        x = unshuffled(self.conv_patchify(x)) + channel_means(unshuffled(x), self.patched)
        return self.conv_out(x) + channel_means(x, self.outside)


class Decoder(nn.Module):
    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        z_channels: int = 64,
        out_channels: int = 3,
        temporal_up_layers: Sequence[int] = (2, 3),
        temporal_downsample: int = 4,
    ):
        """temporal_up_layers: levels behind which the number of frames is doubled as well."""
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        patched = 4 * z_channels * 8
        self.dropped = temporal_downsample - 1
        self.conv_in = CausalConv3d(z_channels, patched)
        self.conv_unpatchify = Conv(patched, widths[-1] * 8)
        self.mid = Middle(widths[-1])
        levels: list[nn.Module] = []
        for level, (width, inside) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            up = Upsample(width) if level in temporal_up_layers else PlaneUpsample(width)
            resample = None if level == 0 else ("upsample", up)
            levels.append(Level(_blocks(inside, width, num_res_blocks + 1), resample))
        self.up = nn.ModuleList(levels)
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = BareCausalConv3d(widths[0], out_channels, 3)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        x = x + latents.repeat_interleave(x.shape[1] // latents.shape[1], dim=1)
        made = self.conv_unpatchify(x)
        x = shuffled(made) + shuffled(x.repeat_interleave(made.shape[1] // x.shape[1], dim=1))
        x = self.mid(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))[:, :, self.dropped :]


class AutoencoderStepVideo(ModelMixin, ConfigMixin):
    """Pixels [B, 3, F, 16 H, 16 W] in -1..1 <-> latents [B, 64, T, H, W]: 17 frames are 3 latent, 1 is 1.

    encoder_config, decoder_config: arguments of `Encoder` and `Decoder`.
    """

    @register_to_config
    def __init__(
        self,
        encoder_config: dict[str, Any] | None = None,
        decoder_config: dict[str, Any] | None = None,
        frame_len: int = 17,
        latent_len: int = 3,
    ):
        super().__init__()
        self.encoder, self.decoder = Encoder(**(encoder_config or {})), Decoder(**(decoder_config or {}))

    @property
    def space(self) -> int:
        """Pixels along a side of a latent cell."""
        return 2 ** len(self.encoder.down)

    def latent_frames(self, frames: int) -> int:
        """Of a clip: latent_len a whole chunk; of the rest, or of a shorter clip, in proportion."""
        whole, rest = divmod(frames, self.config.frame_len)
        time = -(-(self.config.frame_len - 1) // (self.config.latent_len - 1))
        return whole * self.config.latent_len + -(-rest // time)

    def encode(self, pixels: Tensor, return_dict: bool = True) -> Any:
        chunks = pixels.split(self.config.frame_len, dim=2)
        moments = torch.cat([self.encoder(chunk) for chunk in chunks], dim=2)
        found = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, latents: Tensor, return_dict: bool = True) -> Any:
        chunks = latents.split(self.config.latent_len, dim=2)
        pixels = self.blend(torch.cat([self.decoder(chunk) for chunk in chunks], dim=2))
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def blend(self, pixels: Tensor) -> Tensor:
        """Frames on both sides of a border of chunks, mixed: first the later one, then the earlier."""
        chunks = list(pixels.split(self.config.frame_len, dim=2))
        for number in range(1, len(chunks)):
            before, after = chunks[number - 1], chunks[number]
            first = KEPT * after[:, :, :1] + (1 - KEPT) * before[:, :, -1:]
            last = KEPT * before[:, :, -1:] + (1 - KEPT) * first
            chunks[number - 1] = torch.cat([before[:, :, :-1], last], dim=2)
            chunks[number] = torch.cat([first, after[:, :, 1:]], dim=2)
        return torch.cat(chunks, dim=2)
