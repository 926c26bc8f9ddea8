"""STDiT, the denoiser of Open-Sora 1.0, and the pieces that STDiT3 (`stdit3.py`) shares with it.

Formulas and keys: Open-Sora 1.0 (hpcaitech/Open-Sora, branch opensora/v1.0, Apache-2.0), its report, and the
PixArt-alpha paper (arXiv 2310.00426) for adaLN-single. A clip is tokens [B, T, S, h] of T frames with S
places each. A block has attention over places and attention over frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from polymodal.models.nets.blocks import AttentionCore, RMSNorm, rotated_pairs, sincos

NORM_EPS = 1e-6
FREQUENCIES = 256  # of the sinusoid of a timestep


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift, which broadcast over x [..., h]."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class PatchEmbed3D(nn.Module):
    """Latents [B, C, T, H, W] -> tokens [B, T', H', W', h] of one patch each; sides are multiples of it."""

    def __init__(self, patch_size: Sequence[int], channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv3d(channels, hidden_size, tuple(patch_size), stride=tuple(patch_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 4, 1)


class TimestepEmbedder(nn.Module):
    """A number [B] -> [B, h]: sinusoid (cosines first), Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep: Tensor) -> Tensor:
        waves = get_timestep_embedding(timestep, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0.0)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    """Linear `fc1`, tanh-GELU, Linear `fc2`."""

    def __init__(self, inside: int, hidden: int, outside: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inside, hidden), nn.Linear(hidden, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Caption features -> h. `y_embedding` [tokens, C] is what stands for a dropped caption: a buffer, the
    same noise in every model that is built."""

    def __init__(self, channels: int, hidden_size: int, tokens: int):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("y_embedding", torch.randn(tokens, channels, generator=draw) / channels**0.5)
        self.y_proj = Mlp(channels, hidden_size, hidden_size)

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)


class SelfAttention(AttentionCore):
    """Attention with one projection `qkv` [3h, h]; over the second last dimension of x [..., N, h]."""

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        size = hidden_size // heads
        self.q_norm, self.k_norm = (RMSNorm(size) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        """turns: angles [N, d / 2] of rotary positions, of neighbouring pairs."""
        query, key, value = self.qkv(x).flatten(0, -3).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = self.q_norm(query), self.k_norm(key)
        if turns is not None:
            query, key = rotated_pairs(query, turns), rotated_pairs(key, turns)
        return self.proj(self.attend(query, key, value)).view_as(x)


class CrossAttention(AttentionCore):
    """Attention of all tokens of a sample to those of its caption that the mask [B, L] chooses."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor | None) -> Tensor:
        query = self.q_linear(x).flatten(1, -2).unflatten(-1, (self.heads, -1))
        key, value = self.kv_linear(caption).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.proj(self.attend(query, key, value, mask)).view_as(x)


class FinalLayer(nn.Module):
    """Tokens [B, T, S, h] -> patches [B, T, S, prod(patch) * C]; table [2, h] + t are shift and scale."""

    def __init__(self, hidden_size: int, patch: int, channels: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.linear = nn.Linear(hidden_size, patch * channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(self.modulated(x, time))

    def modulated(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[:, None, None] + time[:, None, None, None]).unbind(1)
        return modulated(x, shift, scale)


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: Sequence[int]) -> Tensor:
    """[B, T, S, prod(patch) * C] (a patch is t, y, x, then channels) -> [B, C, T', H', W']."""
    cells = x.flatten(1, 2).unflatten(1, grid).unflatten(-1, (*patch, -1))
    return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def no_drop_path(drop_path: float) -> None:
    if drop_path:
        raise ValueError(f"drop_path {drop_path}: residual branches are not dropped here, it must be 0")


class STDiTBlock(nn.Module):
    def __init__(self, hidden_size: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.attn = SelfAttention(hidden_size, heads)
        self.cross_attn = CrossAttention(hidden_size, heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.attn_temp = SelfAttention(hidden_size, heads)

    def forward(
        self,
        hidden_states: Tensor,
        caption: Tensor,
        mask: Tensor | None,
        time: Tensor,
        temporal: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, T, S, h]; time [B, 6, h]; temporal [T, h]: positions of frames."""
        x = hidden_states
        mods = (self.scale_shift_table + time)[:, :, None, None].unbind(1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mods
        x = x + gate * self.attn(modulated(x, shift, scale))
        over_frames = x.transpose(1, 2)
        if temporal is not None:
            over_frames = over_frames + temporal
        x = x + gate * self.attn_temp(over_frames.contiguous()).transpose(1, 2)
        x = x + self.cross_attn(x, caption, mask)
        return x + gate_mlp * self.mlp(modulated(x, shift_mlp, scale_mlp))


class STDiT(ModelMixin, ConfigMixin):
    """The denoiser of Open-Sora 1.0; `STDiT-XL/2` has 28 layers of 16 heads and 1152 dimensions."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("STDiTBlock",)

    @register_to_config
    def __init__(
        self,
        input_size: Sequence[int] = (16, 32, 32),
        in_channels: int = 4,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        pred_sigma: bool = True,
        drop_path: float = 0.0,
        caption_channels: int = 4096,
        model_max_length: int = 120,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
    ):
        """input_size: latent frames, height, width that the tables of positions in the file are for.
        class_dropout_prob: share of captions that training replaces by `y_embedding`; the trainer does it.
        """
        super().__init__()
        no_drop_path(drop_path)
        self.out_channels = in_channels * 2 if pred_sigma else in_channels
        self.grid = tuple(n // p for n, p in zip(input_size, patch_size, strict=True))
        space, time = self.tables(self.grid)
        self.register_buffer("pos_embed", space)
        self.register_buffer("pos_embed_temporal", time)
        self.x_embedder = PatchEmbed3D(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.blocks = nn.ModuleList(STDiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        patch = patch_size[0] * patch_size[1] * patch_size[2]
        self.final_layer = FinalLayer(hidden_size, patch, self.out_channels)
        self.gradient_checkpointing = False

    def tables(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Positions: [1, S, h], half of h by x and half by y, and [1, T, h]; float32."""
        frames, height, width = grid
        size = int(self.config.hidden_size)
        y, x = torch.meshgrid(*(torch.arange(n).double() for n in (height, width)), indexing="ij")
        space = [sincos(axis.flatten() / self.config.space_scale, size // 2) for axis in (x, y)]
        time = sincos(torch.arange(frames).double() / self.config.time_scale, size)
        return torch.cat(space, dim=-1)[None].float(), time[None].float()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """hidden_states [B, C, T, H, W], timestep [B] in 0..999, caption [B, L, C] with its mask [B, L]
        -> [B, 2 C or C, T, H, W]: epsilon, and the fraction of the variance."""
        tokens = self.x_embedder(hidden_states)
        grid = tuple(tokens.shape[1:4])
        tokens = tokens.flatten(2, 3)
        tables = (self.pos_embed, self.pos_embed_temporal) if grid == self.grid else self.tables(grid)
        space, temporal = (table.to(tokens) for table in tables)
        tokens = tokens + space
        time = self.t_embedder(timestep)
        mods = self.t_block(time).unflatten(-1, (6, -1))
        caption = self.y_embedder(encoder_hidden_states)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        for number, block in enumerate(self.blocks):
            given = (tokens, caption, mask, mods, temporal[0] if number == 0 else None)
            checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
            tokens = self._gradient_checkpointing_func(block, *given) if checkpointed else block(*given)
        made = unpatchify(self.final_layer(tokens, time), grid, self.config.patch_size)
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)
