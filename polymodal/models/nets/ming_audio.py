"""Ming-Lite-Omni's audio encoder and the two projectors into its text model.

Formulas and names of tensors: https://github.com/inclusionAI/Ming (d97e2f3). The encoder is Whisper's, whose
layers are transformers', without its 30 s: positions end with the longest clip of a batch, which shorter
ones see padded with zeros, since nothing is masked. Rows of both projectors have length 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer, sinusoids

RENAMED = {  # published -> transformers', within a block
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp_ln": "final_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
}


class MingAudio(nn.Module):
    """Mel frames of clips -> rows of the text model's width.

    mels: bins; context: most positions (frames / 2); width, heads, layers: of the encoder; out: of the text
    model."""

    def __init__(
        self,
        mels: int,
        context: int,
        width: int,
        heads: int,
        layers: int,
        out: int,
        kernel: int = 3,
        stride: int = 2,
    ):
        super().__init__()
        config = WhisperConfig(
            d_model=width,
            encoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            encoder_layers=layers,
            attn_implementation="eager",
        )
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", sinusoids(context, width))
        self.blocks = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.project = AudioProjector(width, out, kernel, stride)

    def forward(self, clips: list[Tensor]) -> list[Tensor]:
        """clips: each [L, mels] -> rows [((L - 1) // 2) // 2 + 1, out] of each."""
        frames = nn.utils.rnn.pad_sequence(clips, batch_first=True).transpose(1, 2)
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(frames)))).transpose(1, 2)
        hidden = hidden + self.positional_embedding[: hidden.shape[1]].to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, None)
        rows = self.project(self.ln_post(hidden))
        return [row[: audio_rows(len(clip))] for row, clip in zip(rows, clips, strict=True)]


def audio_rows(frames: int) -> int:
    """Rows of the text model that a clip of so many mel frames becomes; 0 of none."""
    return ((frames - 1) // 2) // 2 + 1 if frames > 0 else 0


class AudioProjector(nn.Module):
    """Rows [B, T, width] of the encoder -> [B, T / stride, out] of length 1."""

    def __init__(self, width: int, out: int, kernel: int = 3, stride: int = 2):
        super().__init__()
        self.conv = nn.Conv1d(width, out, kernel, stride=stride, padding=kernel // 2)
        self.linear = nn.Linear(out, out)

    def forward(self, rows: Tensor) -> Tensor:
        reduced = self.conv(rows.transpose(1, 2)).transpose(1, 2)
        return F.normalize(self.linear(F.gelu(reduced)), dim=-1)


class VisionProjector(nn.Module):
    """Rows of the vision tower -> rows of the text model, of length 1."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(self.second(F.gelu(self.first(rows))), dim=-1)


def published(name: str) -> str:
    """The published name of a tensor of `MingAudio` (audio.) or `VisionProjector` (vision.)."""
    whole = {
        "audio.project.conv.": "linear_proj_audio.0.",
        "audio.project.linear.": "linear_proj_audio.3.",
        "vision.first.": "linear_proj.0.",
        "vision.second.": "linear_proj.2.",
    }
    for ours, theirs in whole.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for theirs, ours in RENAMED.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def clips_of(features: Tensor, lengths: Tensor) -> list[Tensor]:
    """features [B, T, mels]: a sample's clips one after the other; lengths [B, n]: frames of each, 0 of
    none."""
    out = []
    for sample, counts in zip(features, lengths.tolist(), strict=True):
        out += [clip for clip in torch.split(sample[: sum(counts)], counts) if len(clip)]
    return out
