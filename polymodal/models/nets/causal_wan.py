"""The causal Wan of Self-Forcing: Wan's weights, a timestep a frame, attention no further than the own
block of frames.

Facts: Self-Forcing (github.com/guandeh17/Self-Forcing, Apache-2.0; arXiv 2506.08009). Layers and keys are
diffusers' Wan's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Places(NamedTuple):
    """What self-attention needs beside its rows; a block passes it on as its rotary tables."""

    cos: Tensor  # [1, n, 1, d]
    sin: Tensor
    mask: Tensor | None  # bool [n, m], what each row sees
    past: tuple[Tensor, Tensor] | None  # keys (turned) and values [B, m - n, H, d] of earlier blocks
    written: list[tuple[Tensor, Tensor]] | None  # takes those of all m rows


class CausalAttention:
    """Processor of diffusers' WanAttention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Places | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(-1, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(-1, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        query, key = _turn(query, rotary_emb), _turn(key, rotary_emb)
        if rotary_emb.past is not None:
            key = torch.cat([rotary_emb.past[0], key], dim=1)
            value = torch.cat([rotary_emb.past[1], value], dim=1)
        if rotary_emb.written is not None:
            rotary_emb.written.append((key, value))
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=rotary_emb.mask)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _turn(heads: Tensor, places: Places) -> Tensor:
    """Neighbouring channels are pairs."""
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = places.cos[..., 0::2], places.sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(heads)


class Sinusoid(nn.Module):
    """[n] -> [n, channels], cosines first, float64: float32 frequencies differ between processors."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float64, device=timestep.device)
        angles = torch.outer(timestep.double(), 10000.0 ** (-steps / half))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class CausalWanTransformer(WanTransformer3DModel):
    """num_frame_per_block: latent frames that attend to each other and to all before them."""

    @register_to_config
    def __init__(
        self,
        num_frame_per_block: int = 3,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
    ):
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )
        self.condition_embedder.timesteps_proj = Sinusoid(self.config.freq_dim)
        for block in self.blocks:
            block.attn1.processor = CausalAttention()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        clean: Tensor | None = None,
        past: list[tuple[Tensor, Tensor]] | None = None,
        written: list[tuple[Tensor, Tensor]] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The prediction [B, C, F, H, W]. timestep: [B, F], 0..1000.

        clean: the same clips without noise, of which noisy blocks see those before them (teacher forcing).
        past: keys and values of earlier blocks by layer, as a call with the list `written` left them there.
        """
        batch, _, frames, height, width = hidden_states.shape
        patch = self.config.patch_size
        grid = frames // patch[0], height // patch[1], width // patch[2]
        per_frame = grid[1] * grid[2]
        before = 0 if past is None else past[0][0].shape[1] // per_frame
        whole = hidden_states.new_empty(1, 1, (before + grid[0]) * patch[0], height, width)
        cos, sin = (table[:, before * per_frame :] for table in self.rope(whole))
        blocks = (
            before + torch.arange(grid[0], device=hidden_states.device)
        ) // self.config.num_frame_per_block
        mask: Tensor | None = None
        if clean is not None:
            hidden_states = torch.cat([clean, hidden_states], dim=2)
            timestep = torch.cat([torch.zeros_like(timestep), timestep], dim=1)
            cos, sin = torch.cat([cos, cos], dim=1), torch.cat([sin, sin], dim=1)
            mask = _teacher_forcing(blocks)
        elif past is None:
            mask = blocks[:, None] >= blocks
        if mask is not None:
            mask = mask.repeat_interleave(per_frame, dim=0).repeat_interleave(per_frame, dim=1)
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, times, captions, _ = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, timestep_seq_len=timestep.shape[1]
        )
        times = times.repeat_interleave(per_frame, dim=1).unflatten(2, (6, -1))
        for layer, block in enumerate(self.blocks):
            places = Places(cos, sin, mask, None if past is None else past[layer], written)
            tokens = block(tokens, captions, times, places)
        tokens = tokens[:, -grid[0] * per_frame :]
        temb = temb[:, -frames:].repeat_interleave(per_frame, dim=1)
        shift, scale = (self.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)).unbind(2)
        tokens = (self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        cells = self.proj_out(tokens).reshape(batch, *grid, *patch, -1)
        made = cells.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, frames, height, width)
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)


def _teacher_forcing(blocks: Tensor) -> Tensor:
    """What frames of [clean, noisy] see: clean ones clean ones to the end of their block; noisy ones their
    own block and clean ones of earlier blocks."""
    before, same = blocks[:, None] > blocks, blocks[:, None] == blocks
    of_clean = torch.cat([before | same, torch.zeros_like(same)], dim=1)
    return torch.cat([of_clean, torch.cat([before, same], dim=1)])
