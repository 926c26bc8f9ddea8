"""WF-VAE, the VAE of Open-Sora Plan 1.3 (4x8x8) and 1.5 (8x8x8): wavelet coefficients beside the
convolutions.

Formulas and names of parameters: WF-VAE (github.com/PKU-YuanGroup/WF-VAE, Apache-2.0; arXiv 2411.17459).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d, conv_transpose2d, conv_transpose3d, silu

from polymodal.models.nets.causal_vae import (
    CausalConv3d,
    FrameConv,
    KLAutoencoder,
    ResnetBlock2D,
    ResnetBlock3D,
    Spatial2xTime2x3DUpsample,
    layer_named,
    norm_of,
    of_frames,
)

LOW, HIGH = (1.0, 1.0), (1.0, -1.0)
BANDS_3D = {"h": "", "g": "w", "hh": "h", "gh": "hw", "h_v": "t", "g_v": "tw", "hh_v": "th", "gh_v": "thw"}
BANDS_2D = {"aa": "", "ad": "h", "da": "w", "dd": "hw"}
"""Names of the filters in the order of channels; in which axes each takes differences."""


def kernels(bands: dict[str, str], axes: str, factor: float) -> dict[str, Tensor]:
    """Haar filters by name, [1, 1, 2, 2(, 2)] each. factor: as published, not rounded better."""
    made = {}
    for name, differences in bands.items():
        filter = torch.tensor(factor)
        for axis in axes:
            filter = filter[..., None] * torch.tensor(HIGH if axis in differences else LOW)
        made[name] = filter[None, None]
    return made


class _Kernel(nn.Module):
    """A filter under the name that the published files have."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.conv = nn.Module()
        self.conv.register_buffer("weight", weight)


class HaarWaveletTransform3D(nn.Module):
    """[B, C, 1+2k, H, W] -> [B, 8C, 1+k, H/2, W/2], bands outermost; frame 0 is repeated in front."""

    bands = 8

    def __init__(self) -> None:
        super().__init__()
        for name, filter in kernels(BANDS_3D, "thw", 0.3536).items():
            self.add_module(f"{name}_conv", _Kernel(filter))

    def forward(self, clip: Tensor) -> Tensor:
        filters = torch.cat([self.get_submodule(f"{name}_conv.conv").weight for name in BANDS_3D])
        clip = torch.cat([clip[:, :, :1], clip], dim=2)
        coefficients = conv3d(clip.flatten(0, 1).unsqueeze(1), filters.to(clip.dtype), stride=2)
        return coefficients.unflatten(0, (len(clip), -1)).transpose(1, 2).flatten(1, 2)


class InverseHaarWaveletTransform3D(nn.Module):
    """The way back, without the frame repeated in front."""

    bands = 8

    def __init__(self) -> None:
        super().__init__()
        for name, filter in kernels(BANDS_3D, "thw", 0.3536).items():
            self.register_buffer(name, filter)

    def forward(self, coefficients: Tensor) -> Tensor:
        filters = torch.cat([getattr(self, name) for name in BANDS_3D])
        bands = coefficients.unflatten(1, (8, -1)).transpose(1, 2)
        clip = conv_transpose3d(bands.flatten(0, 1), filters.to(bands.dtype), stride=2)
        return clip.squeeze(1).unflatten(0, (len(coefficients), -1))[:, :, 1:]


class HaarWaveletTransform2D(nn.Module):
    """[B, C, T, H, W] -> [B, 4C, T, H/2, W/2] of each frame, bands outermost."""

    bands = 4

    def __init__(self) -> None:
        super().__init__()
        for name, filter in kernels(BANDS_2D, "hw", 0.5).items():
            self.register_buffer(name, filter)

    def filters(self, like: Tensor) -> Tensor:
        return torch.cat([getattr(self, name) for name in BANDS_2D]).to(like.dtype)

    def forward(self, clip: Tensor) -> Tensor:
        def frames(pictures: Tensor) -> Tensor:
            coefficients = conv2d(pictures.flatten(0, 1).unsqueeze(1), self.filters(clip), stride=2)
            return coefficients.unflatten(0, (len(pictures), -1)).transpose(1, 2).flatten(1, 2)

        return of_frames(frames, clip)


class InverseHaarWaveletTransform2D(HaarWaveletTransform2D):
    """The way back."""

    def forward(self, clip: Tensor) -> Tensor:
        def frames(coefficients: Tensor) -> Tensor:
            bands = coefficients.unflatten(1, (4, -1)).transpose(1, 2)
            pictures = conv_transpose2d(bands.flatten(0, 1), self.filters(clip), stride=2)
            return pictures.squeeze(1).unflatten(0, (len(coefficients), -1))

        return of_frames(frames, clip)


WAVELETS: dict[str, Any] = {
    wavelet.__name__: wavelet
    for wavelet in (
        HaarWaveletTransform2D,
        HaarWaveletTransform3D,
        InverseHaarWaveletTransform2D,
        InverseHaarWaveletTransform3D,
    )
}


def _middle(channels: int, out: tuple[int, int], config: Any) -> nn.Sequential:
    blocks: list[nn.Module] = [ResnetBlock3D(channels, out[0], config.norm_type, config.dropout)]
    if config.use_attention:
        blocks.append(layer_named(config.attention_type)(out[0], config.norm_type))
    return nn.Sequential(*blocks, ResnetBlock3D(*out, config.norm_type, config.dropout))


def _upsample(name: str, channels: int, config: Any) -> nn.Module:
    cls = layer_named(name)
    return cls(channels, config.t_interpolation) if cls is Spatial2xTime2x3DUpsample else cls(channels)


class Encoder(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        base, flow = config.base_channels, config.encoder_energy_flow_hidden_size
        count, options = config.encoder_num_resblocks, (config.norm_type, config.dropout)
        self.down1 = nn.Sequential(
            FrameConv(3 * 8, base, 3, padding=1),
            *(ResnetBlock2D(base, base, *options) for _ in range(count)),
            layer_named(config.l1_dowmsample_block)(base),
        )
        self.down2 = nn.Sequential(
            FrameConv(base + flow, 2 * base, 3, padding=1),
            *(ResnetBlock3D(2 * base, 2 * base, *options) for _ in range(count)),
            layer_named(config.l2_dowmsample_block)(2 * base),
        )
        self.wavelet_transform_in = HaarWaveletTransform3D()
        self.wavelet_transform_l1 = WAVELETS[config.l1_downsample_wavelet]()
        self.wavelet_transform_l2 = WAVELETS[config.l2_downsample_wavelet]()
        self.connect_l1 = FrameConv(3 * self.wavelet_transform_l1.bands, flow, 3, padding=1)
        self.connect_l2 = FrameConv(3 * self.wavelet_transform_l2.bands, flow, 3, padding=1)
        self.mid = _middle(2 * base + flow, (4 * base, 4 * base), config)
        self.norm_out = norm_of(config.norm_type, 4 * base)
        self.conv_out = CausalConv3d(4 * base, 2 * config.latent_dim)

    def forward(self, clip: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(mean and log variance, wavelet coefficients of both levels)."""
        coefficients = self.wavelet_transform_in(clip)
        first = self.wavelet_transform_l1(coefficients[:, :3])
        second = self.wavelet_transform_l2(first[:, :3])
        hidden = torch.cat([self.down1(coefficients), self.connect_l1(first)], dim=1)
        hidden = torch.cat([self.down2(hidden), self.connect_l2(second)], dim=1)
        return self.conv_out(silu(self.norm_out(self.mid(hidden)))), (first, second)


class Decoder(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        base, flow = config.base_channels, config.decoder_energy_flow_hidden_size
        count, options = config.decoder_num_resblocks, (config.norm_type, config.dropout)
        self.flow = flow

        def blocks(*widths: int) -> list[nn.Module]:
            return [ResnetBlock3D(*pair, *options) for pair in zip(widths, widths[1:], strict=False)]

        def connect(wavelet: Any) -> nn.Sequential:
            out = FrameConv(flow, 3 * wavelet.bands, 3, padding=1)
            return nn.Sequential(*blocks(*[flow] * (config.connect_res_layer_num + 1)), out)

        top, middle = 4 * base, 2 * base
        self.inverse_wavelet_transform_out = InverseHaarWaveletTransform3D()
        self.inverse_wavelet_transform_l1 = WAVELETS[config.l1_upsample_wavelet]()
        self.inverse_wavelet_transform_l2 = WAVELETS[config.l2_upsample_wavelet]()
        self.conv_in = CausalConv3d(config.latent_dim, top)
        self.mid = _middle(top, (top, top + flow), config)
        self.up2 = nn.Sequential(
            *blocks(*[top] * (count + 1)),
            _upsample(config.l2_upsample_block, top, config),
            *blocks(top, top + flow),
        )
        self.up1 = nn.Sequential(
            *blocks(top, *[middle] * count),
            _upsample(config.l1_upsample_block, middle, config),
            *blocks(middle, middle),
        )
        self.layer = nn.Sequential(*blocks(middle, base, base))
        self.connect_l1 = connect(self.inverse_wavelet_transform_l1)
        self.connect_l2 = connect(self.inverse_wavelet_transform_l2)
        self.norm_out = norm_of(config.norm_type, base)
        self.conv_out = FrameConv(base, 3 * 8, 3, padding=1)

    def forward(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(clip, wavelet coefficients of both levels)."""
        hidden = self.mid(self.conv_in(latents))
        second = self.connect_l2(hidden[:, -self.flow :])
        hidden = self.up2(hidden[:, : -self.flow])
        first = self.connect_l1(hidden[:, -self.flow :])
        first = _onto(first, self.inverse_wavelet_transform_l2(second))
        hidden = silu(self.norm_out(self.layer(self.up1(hidden[:, : -self.flow]))))
        last = _onto(self.conv_out(hidden), self.inverse_wavelet_transform_l1(first))
        return self.inverse_wavelet_transform_out(last), (first, second)


def _onto(coefficients: Tensor, low: Tensor) -> Tensor:
    """The low band, which is the first three channels, plus what the level below gives."""
    return torch.cat([coefficients[:, :3] + low, coefficients[:, 3:]], dim=1)


class WFVAE(KLAutoencoder, ModelMixin, ConfigMixin):
    """1 + 4k (or 8k) frames to 1 + k, sides by 8. Latents that a denoiser sees are (z - shift) * scale, by
    channel."""

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 8,
        base_channels: int = 128,
        encoder_num_resblocks: int = 2,
        encoder_energy_flow_hidden_size: int = 64,
        decoder_num_resblocks: int = 2,
        decoder_energy_flow_hidden_size: int = 128,
        attention_type: str = "AttnBlock3DFix",
        use_attention: bool = True,
        dropout: float = 0.0,
        norm_type: str = "layernorm",
        t_interpolation: str = "trilinear",
        connect_res_layer_num: int = 2,
        scale: tuple[float, ...] = (0.18215,) * 8,
        shift: tuple[float, ...] = (0.0,) * 8,
        l1_dowmsample_block: str = "Downsample",
        l1_downsample_wavelet: str = "HaarWaveletTransform2D",
        l2_dowmsample_block: str = "Spatial2xTime2x3DDownsample",
        l2_downsample_wavelet: str = "HaarWaveletTransform3D",
        l1_upsample_block: str = "Upsample",
        l1_upsample_wavelet: str = "InverseHaarWaveletTransform2D",
        l2_upsample_block: str = "Spatial2xTime2x3DUpsample",
        l2_upsample_wavelet: str = "InverseHaarWaveletTransform3D",
    ):
        super().__init__()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    @property
    def time(self) -> int:  # type: ignore[override]
        return 8 if self.config.l1_downsample_wavelet == "HaarWaveletTransform3D" else 4

    def moments(self, clip: Tensor) -> Tensor:
        return self.encoder(clip)[0]

    def picture(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)[0]

    def normalised(self, latents: Tensor) -> Tensor:
        scale, shift = self._of_channels(latents)
        return (latents - shift) * scale

    def denormalised(self, latents: Tensor) -> Tensor:
        scale, shift = self._of_channels(latents)
        return latents / scale + shift

    def _of_channels(self, like: Tensor) -> list[Tensor]:
        values = (self.config.scale, self.config.shift)
        return [torch.tensor(v, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1) for v in values]
