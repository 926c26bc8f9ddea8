"""The denoisers of Step-Video T2V and TI2V (30B).

Formulas and keys: stepfun-ai/Step-Video-T2V and Step-Video-TI2V (MIT) and the report (arXiv 2502.10248). A
transformer of PixArt's form (adaLN-single) with attention over all tokens of the clip. Time runs from 0
(noise) to 1 (data); the prediction is the velocity along it, data - noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    get_timestep_embedding,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from polymodal.models.nets.blocks import AttentionCore, RMSNorm, angles, grid_positions, rotated_axes
from polymodal.models.nets.stdit import FREQUENCIES

TIME_SCALE = 1000.0
BLOCK_EPS = 1e-5  # of a block's layer norms, which have weights; norm_eps is the last norm's


class PatchProjection(nn.Module):
    """Frames [B, C, H, W] -> tokens [B, H' * W', h] of one patch each."""

    def __init__(self, channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _Times(nn.Module):
    """Time [B] and, where the net has it, a motion score [B] -> [B, h]."""

    def __init__(self, hidden_size: int, motion: bool):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, hidden_size)
        if motion:
            self.motion_score_embedder = TimestepEmbedding(FREQUENCIES, hidden_size)

    def forward(self, time: Tensor, motion: Tensor | None, dtype: torch.dtype) -> Tensor:
        made = self.timestep_embedder(self._waves(time).to(dtype))
        if motion is not None:
            made = made + self.motion_score_embedder(self._waves(motion).to(dtype))
        return made

    @staticmethod
    def _waves(values: Tensor) -> Tensor:
        return get_timestep_embedding(values, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0.0)


class _AdaLayerNormSingle(nn.Module):
    """-> the six modulations of all blocks [B, 6, h], and the embedding itself [B, h]."""

    def __init__(self, hidden_size: int, motion: bool):
        super().__init__()
        self.emb = _Times(hidden_size, motion)
        self.linear = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, time: Tensor, motion: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        made = self.emb(time, motion, dtype)
        return self.linear(nn.functional.silu(made)).unflatten(-1, (6, -1)), made


class _SelfAttention(AttentionCore):
    """`wqkv`: rows of a head are its q, k and v."""

    def __init__(self, hidden_size: int, heads: int, size: int):
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(hidden_size, 3 * heads * size, bias=False)
        self.wo = nn.Linear(heads * size, hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(size), RMSNorm(size)

    def forward(self, x: Tensor, turns: Sequence[Tensor]) -> Tensor:
        query, key, value = self.wqkv(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)
        query, key = rotated_axes(self.q_norm(query), turns), rotated_axes(self.k_norm(key), turns)
        return self.wo(self.attend(query, key, value))


class _CrossAttention(AttentionCore):
    """`wkv`: rows of a head are its k and v."""

    def __init__(self, hidden_size: int, heads: int, size: int):
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(hidden_size, heads * size, bias=False)
        self.wkv = nn.Linear(hidden_size, 2 * heads * size, bias=False)
        self.wo = nn.Linear(heads * size, hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(size), RMSNorm(size)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        query = self.wq(x).unflatten(-1, (self.heads, -1))
        key, value = self.wkv(encoder_hidden_states).unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        return self.wo(self.attend(self.q_norm(query), self.k_norm(key), value, mask, context=True))


class StepVideoBlock(nn.Module):
    def __init__(self, hidden_size: int, heads: int, size: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.norm1 = nn.LayerNorm(hidden_size, eps=BLOCK_EPS)
        self.attn1 = _SelfAttention(hidden_size, heads, size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=BLOCK_EPS)
        self.attn2 = _CrossAttention(hidden_size, heads, size)
        self.ff = FeedForward(hidden_size, activation_fn="gelu-approximate", bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        mask: Tensor | None,
        temb: Tensor,
        turns: Sequence[Tensor],
    ) -> Tensor:
        """hidden_states [B, N, h], text [B, L, h], temb [B, 6, h], angles of the three axes."""
        x = hidden_states
        mods = (self.scale_shift_table + temb)[:, :, None].unbind(1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = mods
        x = x + gate * self.attn1(self.norm1(x) * (1 + scale) + shift, turns)
        x = x + self.attn2(x, encoder_hidden_states, mask)
        return x + gate_ff * self.ff(self.norm2(x) * (1 + scale_ff) + shift_ff)


class Rope(nn.Module):
    """Angles [N, size / 2] of a grid's tokens along its axes (t, y, x), at least in the dtype of `like`."""

    def __init__(self, size: int):
        super().__init__()
        self.sizes = size // 2, size // 4, size // 4

    def forward(self, grid: tuple[int, int, int], like: Tensor) -> tuple[Tensor, ...]:
        return tuple(angles(grid_positions(*grid, like.device), self.sizes, like))


class StepVideoModel(ModelMixin, ConfigMixin):
    """The denoiser of Step-Video; published with 48 blocks of 48 heads of 128 dimensions."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("StepVideoBlock",)

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 48,
        attention_head_dim: int = 128,
        in_channels: int = 64,
        out_channels: int | None = 64,
        num_layers: int = 48,
        patch_size: int = 1,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        use_additional_conditions: bool = False,
        caption_channels: Sequence[int] = (6144, 1024),
    ):
        """use_additional_conditions: a first picture in channels of its own and a motion score (TI2V).
        caption_channels: of the language model and of CLIP. norm_*: of the last norm and the text's."""
        super().__init__()
        heads, size = num_attention_heads, attention_head_dim
        hidden_size = heads * size
        self.out_channels = out_channels or in_channels
        channels = in_channels * 2 if use_additional_conditions else in_channels
        self.pos_embed = PatchProjection(channels, hidden_size, patch_size)
        self.rope = Rope(size)
        self.transformer_blocks = nn.ModuleList(
            StepVideoBlock(hidden_size, heads, size) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, norm_eps, elementwise_affine=norm_elementwise_affine)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self.adaln_single = _AdaLayerNormSingle(hidden_size, use_additional_conditions)
        language, clip = caption_channels
        self.caption_norm = nn.LayerNorm(language, norm_eps, elementwise_affine=norm_elementwise_affine)
        self.caption_projection = PixArtAlphaTextProjection(language, hidden_size)
        self.clip_projection = nn.Linear(clip, hidden_size)
        self.gradient_checkpointing = False

    def text(
        self, language: Tensor, clip: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """CLIP's tokens, then the language model's; only the first sum(mask) of a sample are seen."""
        tokens = self.caption_projection(self.caption_norm(language))
        if clip is not None:
            tokens = torch.cat([self.clip_projection(clip), tokens], dim=1)
        if mask is None:
            return tokens, None
        lengths = mask.sum(dim=1, keepdim=True)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        condition_hidden_states: Tensor | None = None,
        motion_score: Tensor | float | None = None,
        return_dict: bool = True,
    ) -> Any:
        """hidden_states and condition_hidden_states [B, F, C, H, W], timestep [B] in 0..1, the language
        model's text [B, L, C1], CLIP's [B, M, C2], mask [B, M + L] (ones in front), motion_score (a number or
        [B]) -> the velocity [B, F, C, H, W]."""
        if self.config.use_additional_conditions:
            if condition_hidden_states is None or motion_score is None:
                raise ValueError("this Step-Video needs condition_hidden_states and motion_score")
            hidden_states = torch.cat([hidden_states, condition_hidden_states], dim=2)
            score = torch.as_tensor(motion_score, device=hidden_states.device, dtype=torch.float32)
            motion = score.expand(len(hidden_states))
        else:
            motion = None
        batch, frames, _, *sides = hidden_states.shape
        patch = self.config.patch_size
        height, width = (side // patch for side in sides)
        tokens = self.pos_embed(hidden_states.flatten(0, 1)).unflatten(0, (batch, frames)).flatten(1, 2)
        mods, embedded = self.adaln_single(timestep * TIME_SCALE, motion, tokens.dtype)
        text, mask = self.text(encoder_hidden_states, encoder_hidden_states_2, encoder_attention_mask)
        mask = None if mask is None else mask[:, None, None]  # one tensor for all blocks
        turns = self.rope((frames, height, width), hidden_states)
        for block in self.transformer_blocks:
            given = (tokens, text, mask, mods, turns)
            checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
            tokens = self._gradient_checkpointing_func(block, *given) if checkpointed else block(*given)
        shift, scale = (self.scale_shift_table + embedded[:, None])[:, :, None].unbind(1)
        made = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        cells = made.unflatten(1, (frames, height, width)).unflatten(-1, (patch, patch, -1))
        made = cells.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)
