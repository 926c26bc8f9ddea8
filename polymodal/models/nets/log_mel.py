"""Log-mel spectrograms as HiFi-GAN's code makes them: reflected borders, magnitudes, slaney's filters,
natural log.

Qwen3-TTS's speaker encoder takes them at 24 kHz (`SPEAKER`), CosyVoice3's flow and vocoder too
(`COSYVOICE3`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.audio_utils import mel_filter_bank


class MelForm(NamedTuple):
    rate: int
    window: int  # samples, also of the transform
    hop: int
    bins: int
    highest: float  # Hz


SPEAKER = MelForm(24000, 1024, 256, 128, 12000.0)
COSYVOICE3 = MelForm(24000, 1920, 480, 80, 12000.0)


def log_mel(wave: Tensor, form: MelForm) -> Tensor:
    """[..., N] samples in -1..1 to [..., frames, bins], float32; N at least half a window."""
    border = (form.window - form.hop) // 2
    padded = F.pad(wave.float().reshape(-1, wave.shape[-1]), (border, border), mode="reflect")
    window = torch.hann_window(form.window, device=wave.device)
    spectrum = torch.stft(padded, form.window, form.hop, window=window, center=False, return_complex=True)
    size = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    filters = mel_filter_bank(
        form.window // 2 + 1, form.bins, 0.0, form.highest, form.rate, norm="slaney", mel_scale="slaney"
    )
    mel = torch.from_numpy(filters).float().to(wave.device).T @ size
    return mel.clamp(min=1e-5).log().transpose(1, 2).reshape(*wave.shape[:-1], -1, form.bins)
