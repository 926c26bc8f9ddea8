"""CausalVAE 4x8x8 of Open-Sora Plan 1.2 (also Qihoo-T2X's), and the layers that WF-VAE shares with it.

Formulas and names of parameters: Open-Sora Plan v1.2.0 (github.com/PKU-YuanGroup/Open-Sora-Plan, MIT) and
WF-VAE (github.com/PKU-YuanGroup/WF-VAE, Apache-2.0). Clips are [B, C, T, H, W]; frame 0 is coded alone,
then groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

MULTIPLIERS = (1, 2, 4, 4)


class FrameConv(nn.Conv2d):
    """A convolution of each frame."""

    def forward(self, clip: Tensor) -> Tensor:
        return of_frames(super().forward, clip)


def of_frames(layer: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    frames = layer(clip.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(clip), -1)).transpose(1, 2)


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame: frame 0 is repeated in front of the clip."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: int = 1,
        padded: bool = True,
    ):
        super().__init__()
        space = (kernel[1] // 2, kernel[2] // 2) if padded else (0, 0)
        self.conv = nn.Conv3d(channels, out, kernel, stride, (0, *space))

    def forward(self, clip: Tensor) -> Tensor:
        first = clip[:, :, :1].expand(-1, -1, self.conv.kernel_size[0] - 1, -1, -1)
        return self.conv(torch.cat([first, clip], dim=2))


class ChannelNorm(nn.Module):
    """Layer norm over channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, clip: Tensor) -> Tensor:
        return self.norm(clip.movedim(1, -1)).movedim(-1, 1)


def norm_of(kind: str, channels: int) -> nn.Module:
    if kind == "groupnorm":
        return nn.GroupNorm(32, channels, eps=1e-6)
    if kind == "layernorm":
        return ChannelNorm(channels)
    raise ValueError(f"norm_type {kind!r} is none of groupnorm, layernorm")


class ResnetBlock3D(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))), over space and time."""

    def __init__(self, channels: int, out: int, norm: str = "groupnorm", dropout: float = 0.0):
        super().__init__()
        self.norm1 = norm_of(norm, channels)
        self.conv1 = self.conv(channels, out, 3)
        self.norm2 = norm_of(norm, out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = self.conv(out, out, 3)
        self.nin_shortcut = self.conv(channels, out, 1) if channels != out else None

    @staticmethod
    def conv(channels: int, out: int, kernel: int) -> nn.Module:
        return CausalConv3d(channels, out, (kernel, kernel, kernel))

    def forward(self, clip: Tensor) -> Tensor:
        hidden = self.conv1(silu(self.norm1(clip)))
        hidden = self.conv2(self.dropout(silu(self.norm2(hidden))))
        return (clip if self.nin_shortcut is None else self.nin_shortcut(clip)) + hidden


class ResnetBlock2D(ResnetBlock3D):
    """The same of each frame, its statistics too."""

    @staticmethod
    def conv(channels: int, out: int, kernel: int) -> nn.Module:
        return nn.Conv2d(channels, out, kernel, padding=kernel // 2)

    def forward(self, clip: Tensor) -> Tensor:
        return of_frames(super().forward, clip)


class AttnBlock3DFix(nn.Module):
    """Attention of one head within each frame."""

    def __init__(self, channels: int, norm: str = "groupnorm"):
        super().__init__()
        self.norm = norm_of(norm, channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, CausalConv3d(channels, channels, (1, 1, 1)))

    def forward(self, clip: Tensor) -> Tensor:
        hidden = self.norm(clip)
        q, k, v = (self.rows(layer(hidden)).unsqueeze(1) for layer in (self.q, self.k, self.v))
        out = scaled_dot_product_attention(q, k, v).squeeze(1)
        return clip + self.proj_out(self.clip(out, clip.shape))

    @staticmethod
    def rows(clip: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B*T, H*W, C]."""
        return clip.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)

    @staticmethod
    def clip(rows: Tensor, shape: torch.Size) -> Tensor:
        batch, channels, frames, height, width = shape
        return rows.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


class AttnBlock3D(AttnBlock3DFix):
    """The older form: memory of [B, C, T, H, W] read as [B*T, C, H*W], so that rows mix channels and
    frames."""

    @staticmethod
    def rows(clip: Tensor) -> Tensor:
        batch, channels, frames, height, width = clip.shape
        return clip.reshape(batch * frames, channels, height * width).transpose(1, 2)

    @staticmethod
    def clip(rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.transpose(1, 2).reshape(shape)


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = FrameConv(channels, channels, 3, stride=2)

    def forward(self, clip: Tensor) -> Tensor:
        return self.conv(pad(clip, (0, 1, 0, 1)))


class Spatial2xTime2x3DDownsample(nn.Module):
    """Half the height and width, 1 + 2k frames to 1 + k."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=2, padded=False)

    def forward(self, clip: Tensor) -> Tensor:
        return self.conv(pad(clip, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = self.layer(channels)

    @staticmethod
    def layer(channels: int) -> nn.Module:
        return FrameConv(channels, channels, 3, padding=1)

    def forward(self, clip: Tensor) -> Tensor:
        return self.conv(interpolate(clip, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


class SpatialUpsample2x(Upsample):
    @staticmethod
    def layer(channels: int) -> nn.Module:
        return CausalConv3d(channels, channels, (1, 3, 3))


class Spatial2xTime2x3DUpsample(nn.Module):
    """Twice the height and width, 1 + k frames to 1 + 2k: frame 0 in space alone, the others in time too."""

    def __init__(self, channels: int, t_interpolation: str = "trilinear"):
        super().__init__()
        self.t_interpolation = t_interpolation
        self.conv = CausalConv3d(channels, channels)

    def forward(self, clip: Tensor) -> Tensor:
        first, rest = clip[:, :, :1], clip[:, :, 1:]
        if rest.shape[2]:
            rest = interpolate(rest, scale_factor=(2.0, 1.0, 1.0), mode=self.t_interpolation)
            rest = interpolate(rest, scale_factor=(1.0, 2.0, 2.0), mode="trilinear")
        first = interpolate(first, scale_factor=(1.0, 2.0, 2.0), mode="trilinear")
        return self.conv(torch.cat([first, rest], dim=2) if rest.shape[2] else first)


LAYERS: dict[str, Any] = {
    layer.__name__: layer
    for layer in (
        ResnetBlock2D,
        ResnetBlock3D,
        AttnBlock3D,
        AttnBlock3DFix,
        Downsample,
        Spatial2xTime2x3DDownsample,
        Upsample,
        SpatialUpsample2x,
        Spatial2xTime2x3DUpsample,
    )
}


def layer_named(name: str) -> Any:
    """A class by the name that configs have. Raises ValueError."""
    if name not in LAYERS:
        raise ValueError(f"{name!r} is no layer of this VAE; known: {', '.join(LAYERS)}")
    return LAYERS[name]


def conv_named(name: str, channels: int, out: int) -> nn.Module:
    """A 3x3 (x3) convolution by the name that configs have. Raises ValueError."""
    if name == "Conv2d":
        return FrameConv(channels, out, 3, padding=1)
    if name == "CausalConv3d":
        return CausalConv3d(channels, out)
    raise ValueError(f"{name!r} is none of Conv2d, CausalConv3d")


class Mid(nn.Module):
    def __init__(self, channels: int, attention: str, resnet: str, dropout: float):
        super().__init__()
        self.block_1 = layer_named(resnet)(channels, channels, dropout=dropout)
        self.attn_1 = layer_named(attention)(channels)
        self.block_2 = layer_named(resnet)(channels, channels, dropout=dropout)

    def forward(self, clip: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(clip)))


class Level(nn.Module):
    """Residual blocks, and what changes the sides after them."""

    def __init__(self, blocks: list[nn.Module], **change: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, module in change.items():
            self.add_module(name, module)

    def forward(self, clip: Tensor) -> Tensor:
        for module in (*self.block, *(m for n, m in self.named_children() if n != "block")):
            clip = module(clip)
        return clip


class Encoder(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        widths = [config.hidden_size * m for m in config.hidden_size_mult]
        self.conv_in = conv_named(config.encoder_conv_in, 3, config.hidden_size)
        width, levels = config.hidden_size, []
        for out, resnet, sampler in zip(
            widths, config.encoder_resnet_blocks, config.encoder_spatial_downsample, strict=True
        ):
            blocks = []
            for _ in range(config.num_res_blocks):
                blocks.append(layer_named(resnet)(width, out, dropout=config.dropout))
                width = out
            levels.append(Level(blocks, **({"downsample": layer_named(sampler)(out)} if sampler else {})))
        self.down = nn.ModuleList(levels)
        self.mid = Mid(width, config.encoder_attention, config.encoder_mid_resnet, config.dropout)
        self.norm_out = norm_of("groupnorm", width)
        self.conv_out = conv_named(config.encoder_conv_out, width, 2 * config.z_channels)

    def forward(self, clip: Tensor) -> Tensor:
        hidden = self.conv_in(clip)
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        widths = [config.hidden_size * m for m in config.hidden_size_mult]
        width = widths[-1]
        self.conv_in = conv_named(config.decoder_conv_in, config.z_channels, width)
        self.mid = Mid(width, config.decoder_attention, config.decoder_mid_resnet, config.dropout)
        levels = []
        rows = zip(widths, config.decoder_resnet_blocks, config.decoder_spatial_upsample, strict=True)
        for out, resnet, sampler in reversed(list(rows)):
            blocks = []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(layer_named(resnet)(width, out, dropout=config.dropout))
                width = out
            levels.append(Level(blocks, **({"upsample": layer_named(sampler)(out)} if sampler else {})))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm_of("groupnorm", width)
        self.conv_out = conv_named(config.decoder_conv_out, width, 3)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(silu(self.norm_out(hidden)))


class KLAutoencoder:
    """What the two VAEs have in common: diffusers' way of calling them. Latents as the encoder gives them."""

    def moments(self, clip: Tensor) -> Tensor:
        """Mean and log variance [B, 2z, T', H/8, W/8] of clips [B, 3, T, H, W] in -1..1."""
        raise NotImplementedError

    def picture(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, clip: Tensor, return_dict: bool = True) -> Any:
        posterior = DiagonalGaussianDistribution(self.moments(clip))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, latents: Tensor, return_dict: bool = True) -> Any:
        """Latents [B, z, T', h, w] -> clips in -1..1."""
        sample = self.picture(latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    time = 4  # video frames that one latent frame holds, but the first

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents as a denoiser sees them."""
        return latents * self.config.scaling_factor

    def denormalised(self, latents: Tensor) -> Tensor:
        return latents / self.config.scaling_factor

    def forward(self, clip: Tensor) -> Tensor:
        """The clip decoded from the mean of its latents."""
        return self.decode(self.encode(clip).latent_dist.mode()).sample


class CausalVAE(KLAutoencoder, ModelMixin, ConfigMixin):
    """The VAE of Open-Sora Plan 1.2: 1 + 4k frames to 1 + k, sides by 8; latents are times 0.18215
    outside."""

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 128,
        z_channels: int = 4,
        hidden_size_mult: tuple[int, ...] = MULTIPLIERS,
        attn_resolutions: tuple[int, ...] = (),
        dropout: float = 0.0,
        embed_dim: int = 4,
        num_res_blocks: int = 2,
        encoder_conv_in: str = "Conv2d",
        encoder_conv_out: str = "CausalConv3d",
        encoder_attention: str = "AttnBlock3DFix",
        encoder_resnet_blocks: tuple[str, ...] = (
            "ResnetBlock2D",
            "ResnetBlock2D",
            "ResnetBlock3D",
            "ResnetBlock3D",
        ),
        encoder_spatial_downsample: tuple[str, ...] = (
            "Downsample",
            "Spatial2xTime2x3DDownsample",
            "Spatial2xTime2x3DDownsample",
            "",
        ),
        encoder_temporal_downsample: tuple[str, ...] = ("", "", "", ""),
        encoder_mid_resnet: str = "ResnetBlock3D",
        decoder_conv_in: str = "CausalConv3d",
        decoder_conv_out: str = "CausalConv3d",
        decoder_attention: str = "AttnBlock3DFix",
        decoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock3D",) * 4,
        decoder_spatial_upsample: tuple[str, ...] = (
            "",
            "SpatialUpsample2x",
            "Spatial2xTime2x3DUpsample",
            "Spatial2xTime2x3DUpsample",
        ),
        decoder_temporal_upsample: tuple[str, ...] = ("", "", "", ""),
        decoder_mid_resnet: str = "ResnetBlock3D",
        scaling_factor: float = 0.18215,
    ):
        super().__init__()
        of_time = [*encoder_temporal_downsample, *decoder_temporal_upsample]
        if any(of_time) or list(attn_resolutions):
            raise ValueError(
                "layers of their own for time, and attention beside the middle's, are the VAE's of "
                "Open-Sora Plan 1.1"
            )
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = CausalConv3d(2 * z_channels, 2 * embed_dim, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(embed_dim, z_channels, (1, 1, 1))

    def moments(self, clip: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(clip))

    def picture(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))
