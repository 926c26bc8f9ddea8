"""CosyVoice3's flow: speech tokens of 25 a second to a mel spectrogram of 50 frames a second.

Formulas: the CosyVoice 3 paper, the F5-TTS paper (whose DiT it is) and the public configuration (Apache-2.0).
Keys are those of the published `flow.pt`.

x_t = (1 - (1 - s) t) z + t x1, target x1 - (1 - s) z with s = 1e-6. The rotary embedding turns only the first
`dim_head` channels of queries and keys, before the split into heads and in neighbouring pairs: the published
weights need that.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from polymodal.models.nets.published import tensors


def sinusoid(t: Tensor, width: int) -> Tensor:
    """[B] times to [B, width]: sines, then cosines, of 1000 t. The frequencies are single precision, as
    published."""
    half = width // 2
    powers = torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1))
    angles = 1000 * t[:, None] * powers.double().exp().float().to(t.device)  # alike on any processor
    return torch.cat([angles.sin(), angles.cos()], -1)


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int, width: int = 256) -> None:
        super().__init__()
        self.width = width
        self.time_mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.time_mlp(sinusoid(t, self.width).to(t.dtype))


class ConvPositions(nn.Module):
    """Positions from two causal grouped convolutions over frames, [B, T, D]."""

    def __init__(self, dim: int, kernel: int = 31, groups: int = 16) -> None:
        super().__init__()
        self.pad = kernel - 1
        self.conv1 = nn.Sequential(nn.Conv1d(dim, dim, kernel, groups=groups), nn.Mish())
        self.conv2 = nn.Sequential(nn.Conv1d(dim, dim, kernel, groups=groups), nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for conv in (self.conv1, self.conv2):
            x = conv(F.pad(x, (self.pad, 0)))
        return x.transpose(1, 2)


class InputEmbedding(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, dim)
        self.conv_pos_embed = ConvPositions(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return self.conv_pos_embed(x) + x


class Rotary(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width))

    def forward(self, x: Tensor) -> Tensor:
        """Turns the first channels of [B, T, D], neighbours as pairs."""
        angles = torch.arange(x.shape[1], device=x.device).to(self.inv_freq)[:, None] * self.inv_freq
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        width = 2 * len(self.inv_freq)
        a, b = x[..., :width].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned, x[..., width:]], -1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head)
        self.to_k = nn.Linear(dim, heads * dim_head)
        self.to_v = nn.Linear(dim, heads * dim_head)
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)])

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor) -> Tensor:
        q, k, v = rotary(self.to_q(x)), rotary(self.to_k(x)), self.to_v(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](y))


class Modulation(nn.Module):
    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(t))[:, None].chunk(self.parts, -1)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = Modulation(dim, 6)
        self.attn = Attention(dim, heads, dim_head, dropout)
        inner = nn.Sequential(nn.Linear(dim, ff_mult * dim), nn.GELU(approximate="tanh"))
        ff = nn.Sequential(inner, nn.Dropout(dropout), nn.Linear(ff_mult * dim, dim))
        self.ff = nn.ModuleDict({"ff": ff})

    def forward(self, x: Tensor, t: Tensor, rotary: Rotary, mask: Tensor) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.attn_norm(t)
        x = x + gate * self.attn(_norm(x) * (1 + scale) + shift, rotary, mask)
        return x + ff_gate * self.ff["ff"](_norm(x) * (1 + ff_scale) + ff_shift)


class DiT(nn.Module):
    """Velocity of mel frames; all time axes are last, [B, mel, T]."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        ff_mult: int,
        mel_dim: int,
        mu_dim: int,
        spk_dim: int,
        out_channels: int,
        static_chunk_size: int,
        dropout: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__()
        self.chunk = static_chunk_size
        self.time_embed = TimeEmbedding(dim)
        self.input_embed = InputEmbedding(2 * mel_dim + mu_dim + spk_dim, dim)
        self.rotary_embed = Rotary(dim_head)
        self.transformer_blocks = nn.ModuleList(
            Block(dim, heads, dim_head, ff_mult, dropout) for _ in range(depth)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, out_channels)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor,
        cond: Tensor,
        streaming: bool = False,
    ) -> Tensor:
        """`mask` [B, 1, T], `t` [B], `spks` [B, C]. Streaming: a frame sees all chunks up to its own."""
        speaker = spks[..., None].expand(-1, -1, x.shape[-1])
        h = self.input_embed(torch.cat([x, cond, mu, speaker], 1).transpose(1, 2))
        allowed = mask.bool()[:, None]
        if streaming:
            chunk = torch.arange(x.shape[-1], device=x.device) // self.chunk
            allowed = allowed & (chunk[:, None] >= chunk[None])
        time = self.time_embed(t)
        for block in self.transformer_blocks:
            h = block(h, time, self.rotary_embed, allowed)
        scale, shift = self.norm_out(time)
        return self.proj_out(_norm(h) * (1 + scale) + shift).transpose(1, 2)


class Lookahead(nn.Module):
    """Each token sees a few later ones: x + conv2(leaky(conv1 x)), [B, n, C]."""

    def __init__(self, width: int, channels: int, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.conv1 = nn.Conv1d(width, channels, ahead + 1)
        self.conv2 = nn.Conv1d(channels, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv1(F.pad(x.transpose(1, 2), (0, self.ahead))))
        return x + self.conv2(F.pad(y, (2, 0))).transpose(1, 2)


class CosyVoice3Flow(ModelMixin, ConfigMixin):
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        spk_embed_dim: int = 192,
        vocab_size: int = 6561,
        pre_lookahead_channels: int = 1024,
        pre_lookahead_len: int = 3,
        token_mel_ratio: int = 2,
        dit: dict[str, Any] | None = None,
        cfm: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        dit, cfm = {**DIT, **(dit or {})}, {**CFM, **(cfm or {})}
        self.rate, self.cfm = token_mel_ratio, cfm
        self.input_embedding = nn.Embedding(vocab_size, dit["mu_dim"])
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, dit["spk_dim"])
        self.pre_lookahead_layer = Lookahead(dit["mu_dim"], pre_lookahead_channels, pre_lookahead_len)
        self.decoder = nn.ModuleDict({"estimator": DiT(**dit)})

    @property
    def estimator(self) -> DiT:
        return self.decoder["estimator"]

    def conditions(self, tokens: Tensor, mask: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """mu [B, C, ratio n] of tokens [B, n] with their mask, and the speaker's row [B, C]."""
        rows = self.pre_lookahead_layer(self.input_embedding(tokens.clamp(min=0)) * mask[..., None])
        speaker = self.spk_embed_affine_layer(F.normalize(embedding, dim=1))
        return rows.repeat_interleave(self.rate, 1).transpose(1, 2), speaker

    def forward(
        self,
        speech_token: Tensor,
        speech_token_len: Tensor,
        speech_feat: Tensor,
        speech_feat_len: Tensor,
        embedding: Tensor,
        noise: Tensor,
        t: Tensor,
        keep: Tensor,
        condition_frames: Tensor,
        streaming: bool = False,
    ) -> Tensor:
        """The loss of a batch: mean of squares over valid frames.

        Args:
            speech_token: [B, n] with its lengths [B].
            speech_feat: mel [B, T, C] with its lengths [B].
            embedding: speaker vectors [B, spk_embed_dim].
            noise: [B, C, T].
            t: times [B]; published: uniform.
            keep: [B] bool, False drops the conditions of a sample.
            condition_frames: [B] leading frames of the mel that are given.
        """
        tokens = torch.arange(speech_token.shape[1], device=noise.device)
        frames = torch.arange(speech_feat.shape[1], device=noise.device)
        mask = (frames < speech_feat_len[:, None]).to(noise.dtype)[:, None]
        mu, spks = self.conditions(
            speech_token, (tokens < speech_token_len[:, None]).to(noise.dtype), embedding
        )
        x1 = speech_feat.transpose(1, 2)
        cond = x1 * (frames < condition_frames[:, None])[:, None]
        time, left = t[:, None, None], 1 - self.cfm["sigma_min"]
        y, target = (1 - left * time) * noise + time * x1, x1 - left * noise
        kept = keep.to(noise.dtype)
        mu, cond, spks = mu * kept[:, None, None], cond * kept[:, None, None], spks * kept[:, None]
        velocity = self.estimator(y, mask, mu, time[:, 0, 0], spks, cond, streaming)
        return ((velocity - target) * mask).square().sum() / (mask.sum() * x1.shape[1])

    def schedule(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(t * 0.5 * math.pi) if self.cfm["t_scheduler"] == "cosine" else t

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        prompt_tokens: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        noise: Tensor,
        streaming: bool = False,
        steps: int = 10,
    ) -> Tensor:
        """Mel [1, C, T] of tokens [1, n] after a prompt (tokens [1, m], mel [1, m', C]); `noise` [1, C, >=
        all frames]."""
        every = torch.cat([prompt_tokens, tokens], 1)
        mu, spks = self.conditions(every, torch.ones_like(every, dtype=noise.dtype), embedding)
        given = prompt_feat.shape[1]
        cond = F.pad(prompt_feat.transpose(1, 2), (0, mu.shape[2] - given))
        none = [torch.zeros_like(part) for part in (mu, spks, cond)]
        both = [torch.cat([part, zero]) for part, zero in zip((mu, spks, cond), none, strict=True)]
        x, mask = noise[..., : mu.shape[2]], torch.ones_like(mu[:, :1]).expand(2, -1, -1)
        times = self.schedule(torch.linspace(0, 1, steps + 1, device=x.device, dtype=x.dtype))
        guidance = self.cfm["inference_cfg_rate"]
        for start, end in zip(times[:-1], times[1:], strict=True):
            v, u = self.estimator(
                x.expand(2, -1, -1), mask, both[0], start.expand(2), both[1], both[2], streaming
            ).chunk(2)
            x = x + (end - start) * ((1 + guidance) * v - guidance * u)
        return x[..., given:]


DIT = {
    "dim": 1024,
    "depth": 22,
    "heads": 16,
    "dim_head": 64,
    "ff_mult": 2,
    "mel_dim": 80,
    "mu_dim": 80,
    "spk_dim": 80,
    "out_channels": 80,
    "static_chunk_size": 50,
    "dropout": 0.1,
}
CFM = {"sigma_min": 1e-6, "t_scheduler": "cosine", "training_cfg_rate": 0.2, "inference_cfg_rate": 0.7}


def from_published(path: Path, **values: Any) -> CosyVoice3Flow:
    """The net of a published `flow.pt`."""
    model = CosyVoice3Flow(**values)
    model.load_state_dict(tensors(path))
    return model
