"""CosyVoice3's vocoder (HiFT): mel frames of 20 ms to a 24 kHz wave.

Formulas: the HiFTNet paper (neural source filter, harmonics, inverse STFT), the CosyVoice papers and the
public configuration (Apache-2.0). All convolutions are causal, but for the first of the F0 predictor and of
the generator, which look right. Keys are those of the published `hift.pt` (weight-normed convolutions as
parametrizations).
"""

import itertools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from polymodal.models.nets.published import tensors


class Conv(nn.Conv1d):
    """Causal, with zeros on the left; with `stride` (and twice that as kernel), `upsample`; or `ahead`: looks
    right."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        upsample: int = 1,
        ahead: bool = False,
    ) -> None:
        super().__init__(channels, out, kernel, stride=stride, dilation=dilation)
        self.upsample, self.ahead = upsample, ahead
        self.pad = stride - 1 if stride > 1 else (kernel - 1) * dilation

    def forward(self, x: Tensor, right: Tensor | None = None) -> Tensor:
        """`right`: the frames after `x` for a convolution that looks right, in place of zeros."""
        if self.upsample > 1:
            x = F.interpolate(x, scale_factor=self.upsample, mode="nearest")
        if right is not None:
            x = torch.cat([x, right], -1)
        else:
            x = F.pad(x, (0, self.pad) if self.ahead else (self.pad, 0))
        return super().forward(x)


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        return x + (x * alpha).sin().square() / (alpha + 1e-9)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: list[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            weight_norm(Conv(channels, channels, kernel, dilation=dilation)) for dilation in dilations
        )
        self.convs2 = nn.ModuleList(weight_norm(Conv(channels, channels, kernel)) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for first, conv1, second, conv2 in layers:
            x = x + conv2(second(conv1(first(x))))
        return x


class PitchPredictor(nn.Module):
    """Mel [B, C, T] to F0 in Hz, [B, T]."""

    def __init__(self, mel: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [weight_norm(Conv(mel, channels, 4, ahead=True)), nn.ELU()]
        for _ in range(4):
            layers += [weight_norm(Conv(channels, channels, 3)), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel: Tensor, right: Tensor | None = None) -> Tensor:
        x = self.condnet[0](mel, right)
        for layer in self.condnet[1:]:
            x = layer(x)
        return self.classifier(x.transpose(1, 2))[..., 0].abs()


class CosyVoice3Vocoder(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        in_channels: int = 80,
        base_channels: int = 512,
        nb_harmonics: int = 8,
        sampling_rate: int = 24000,
        nsf_alpha: float = 0.1,
        nsf_sigma: float = 0.003,
        nsf_voiced_threshold: float = 10,
        upsample_rates: tuple[int, ...] = (8, 5, 3),
        upsample_kernel_sizes: tuple[int, ...] = (16, 11, 7),
        istft_params: dict[str, int] | None = None,
        resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11),
        resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        source_resblock_kernel_sizes: tuple[int, ...] = (7, 7, 11),
        source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        lrelu_slope: float = 0.1,
        audio_limit: float = 0.99,
        conv_pre_look_right: int = 4,
        f0_channels: int = 512,
    ) -> None:
        super().__init__()
        params = istft_params or {"n_fft": 16, "hop_len": 4}
        self.n_fft, self.hop = params["n_fft"], params["hop_len"]
        self.rates, self.limit, self.slope = list(upsample_rates), audio_limit, lrelu_slope
        self.samples_per_frame = math.prod(self.rates) * self.hop
        self.look = conv_pre_look_right
        self.m_source = nn.ModuleDict({"l_linear": nn.Linear(nb_harmonics + 1, 1)})
        self.conv_pre = weight_norm(Conv(in_channels, base_channels, conv_pre_look_right + 1, ahead=True))
        widths = [base_channels // 2**i for i in range(len(self.rates) + 1)]
        self.ups = nn.ModuleList(
            weight_norm(Conv(a, b, kernel, upsample=rate))
            for (a, b), kernel, rate in zip(
                itertools.pairwise(widths), upsample_kernel_sizes, self.rates, strict=True
            )
        )
        self.source_downs = nn.ModuleList()
        for i, width in enumerate(widths[1:]):
            down = math.prod(self.rates[i + 1 :])
            self.source_downs.append(Conv(self.n_fft + 2, width, 2 * down if down > 1 else 1, stride=down))
        self.source_resblocks = nn.ModuleList(
            ResidualBlock(width, kernel, list(dilations))
            for width, kernel, dilations in zip(
                widths[1:], source_resblock_kernel_sizes, source_resblock_dilation_sizes, strict=True
            )
        )
        self.kernels = len(resblock_kernel_sizes)
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, kernel, list(dilations))
            for width in widths[1:]
            for kernel, dilations in zip(resblock_kernel_sizes, resblock_dilation_sizes, strict=True)
        )
        self.conv_post = weight_norm(Conv(widths[-1], self.n_fft + 2, 7))
        self.f0_predictor = PitchPredictor(in_channels, f0_channels)

    def source(self, f0: Tensor, rand_ini: Tensor, noise_waves: Tensor) -> Tensor:
        """Excitation [B, N, 1] of F0 [B, T] in Hz: harmonics where voiced, and noise; N = T *
        samples_per_frame.

        `rand_ini` [B, H + 1]: initial phases in turns (the fundamental's is 0); `noise_waves` [B, N, H + 1].
        """
        config, up = self.config, self.samples_per_frame
        samples = f0.repeat_interleave(up, 1)[..., None]
        harmonics = torch.arange(1, config.nb_harmonics + 2, device=f0.device).to(f0.dtype)
        turns = samples * harmonics / config.sampling_rate % 1
        start = torch.cat([torch.zeros_like(rand_ini[:, :1]), rand_ini[:, 1:]], 1)
        turns = torch.cat([turns[:, :1] + start[:, None], turns[:, 1:]], 1)
        frames = F.interpolate(turns.transpose(1, 2), scale_factor=1 / up, mode="linear")
        phase = (frames.cumsum(-1) * 2 * math.pi * up).repeat_interleave(up, -1).transpose(1, 2)
        voiced = (samples > config.nsf_voiced_threshold).float()
        loud = voiced * config.nsf_sigma + (1 - voiced) * config.nsf_alpha / 3
        waves = (config.nsf_alpha * phase.sin() * voiced + loud * noise_waves).to(f0.dtype)
        return self.m_source["l_linear"](waves).tanh()

    def decode(self, mel: Tensor, source: Tensor, final: bool = True) -> Tensor:
        """Wave [B, N], not clamped, of mel [B, C, T] and source [B, 1, N]; not final: without what may still
        change."""
        window = torch.hann_window(self.n_fft, dtype=torch.float64).float().to(mel)
        spectrum = torch.stft(source[:, 0], self.n_fft, self.hop, self.n_fft, window, return_complex=True)
        parts = torch.cat([spectrum.real, spectrum.imag], 1)
        if final:
            x = self.conv_pre(mel)
        else:
            x = self.conv_pre(mel[..., : -self.look], mel[..., -self.look :])
            parts = parts[..., : -math.prod(self.rates) * self.look]
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.slope))
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")
            x = x + self.source_resblocks[i](self.source_downs[i](parts))
            blocks = self.resblocks[i * self.kernels : (i + 1) * self.kernels]
            x = torch.stack([block(x) for block in blocks]).sum(0) / self.kernels
        logs, phases = self.conv_post(F.leaky_relu(x)).split(self.n_fft // 2 + 1, 1)
        magnitude, phase = logs.exp().clamp(max=100), phases.sin()
        values = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        wave = torch.istft(values, self.n_fft, self.hop, self.n_fft, window)
        return wave if final else wave[:, : -self.samples_per_frame]

    @torch.no_grad()
    def forward(
        self,
        mel: Tensor,
        final: bool = True,
        rand_ini: Tensor | None = None,
        noise_waves: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Wave [B, N] and source [B, 1, N] of mel [B, C, T]; the noises are uniform draws where not given.

        Not final: more mel follows, and the frames that it may change are left out.
        """
        ahead = self.f0_predictor.condnet[0].pad
        shown, right = (mel, None) if final else (mel[..., :-ahead], mel[..., -ahead:])
        f0 = self._pitch(shown, right)
        width, count = self.config.nb_harmonics + 1, f0.shape[1] * self.samples_per_frame
        if rand_ini is None:
            rand_ini = torch.rand(len(mel), width).to(mel)
        if noise_waves is None:
            noise_waves = torch.rand(len(mel), count, width).to(mel)
        source = self.source(f0, rand_ini, noise_waves[:, :count]).transpose(1, 2)
        return self.decode(shown, source, final).clamp(-self.limit, self.limit), source

    def _pitch(self, mel: Tensor, right: Tensor | None) -> Tensor:
        """In double precision on the CPU, as published: a rounding error of F0 adds up over a clip's
        phase."""
        dtype, device = mel.dtype, mel.device
        predictor = self.f0_predictor
        if dtype == torch.float64:
            return predictor(mel, right)
        wide = PitchPredictor(self.config.in_channels, self.config.f0_channels).double()
        wide.load_state_dict(predictor.state_dict())
        return wide(mel.cpu().double(), None if right is None else right.cpu().double()).to(device, dtype)


def from_published(path: Path, **values: Any) -> CosyVoice3Vocoder:
    """The net of a published `hift.pt`, alone or as the generator of a training checkpoint."""
    model = CosyVoice3Vocoder(**values)
    state = {name.removeprefix("generator."): value for name, value in tensors(path).items()}
    own = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in state.items() if name in own})
    return model
