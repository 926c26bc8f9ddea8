"""Open-Sora Plan 1.5: a U of stages of joint blocks over a clip and its caption, with skip attention.

Formulas and names of parameters: Open-Sora Plan 1.5 (github.com/PKU-YuanGroup/Open-Sora-Plan, branch t2i,
MIT). Layer norms, rotary positions, gates and residuals are computed in float32 at least, as published.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from polymodal.models.nets.blocks import RMSNorm, angle_dtype
from polymodal.models.nets.open_sora_plan import (
    PatchEmbed,
    Rope3D,
    WholeSequences,
    attend,
    fold,
    key_bias,
    rotate,
    skip_bias,
    unfold,
    unpatchify,
    video_bias,
)

Heads = tuple[Tensor, ...]
AXES = 4, 6, 6  # sixteenths of a head's channels that turn with (t, y, x)


class WideLayerNorm(nn.LayerNorm):
    """Computed in float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        wide = _at_least_float32(x)
        own = (None if p is None else p.to(wide.dtype) for p in (self.weight, self.bias))
        return layer_norm(wide, self.normalized_shape, *own, self.eps).to(x.dtype)


class TimeText(nn.Module):
    """c = MLP(sinusoid of the timestep) + MLP(pooled caption): [B], [B, P] -> [B, E]."""

    def __init__(self, width: int, pooled: int):
        super().__init__()
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(width, width)
        self.text_embedder = PixArtAlphaTextProjection(pooled, width, act_fn="silu")

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(self.time_proj(timestep).to(pooled.dtype)) + self.text_embedder(pooled)


class ModulatedNorms(nn.Module):
    """Norms of both streams, shifted and scaled by c; with the gates of what follows."""

    def __init__(self, time: int, hidden: int, eps: float, affine: bool):
        super().__init__()
        self.linear = nn.Linear(time, 6 * hidden)
        self.norm = WideLayerNorm(hidden, eps, affine)
        self.norm_enc = WideLayerNorm(hidden, eps, affine)

    def forward(self, clip: Tensor, caption: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(clip, caption, gate of the clip, gate of the caption)."""
        mods = self.linear(silu(c))[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_caption, scale_caption, gate_caption = mods
        clip = self.norm(clip) * (1 + scale) + shift
        caption = self.norm_enc(caption) * (1 + scale_caption) + shift_caption
        return clip, caption, gate, gate_caption


class JointAttention(nn.Module):
    """Attention over [clip, caption]; with `skip` over as many sequences of the clip's tokens, the caption
    in each."""

    def __init__(self, config: Any, skip: int, grouped: bool, last: bool):
        super().__init__()
        heads, width, bias = config.num_attention_heads, config.attention_head_dim, config.attention_bias
        hidden = heads * width
        self.heads, self.skip, self.grouped = heads, skip, grouped
        self.parts = tuple(width * part // 16 for part in AXES)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=bias))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, RMSNorm(width, config.norm_eps))
        self.processor = WholeSequences()
        self.to_out = nn.ModuleList([nn.Linear(hidden, hidden)])
        self.to_add_out = None if last else nn.Linear(hidden, hidden)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        encoder_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """[B, n, h], [B, L, h] -> the same; of the last block the clip's alone. Biases of keys: [B, n], [B,
        L]."""

        def heads(layer: nn.Linear, given: Tensor) -> Tensor:
            return layer(given).unflatten(-1, (self.heads, -1))

        query = self._turn(self.norm_q(heads(self.to_q, hidden_states)), rotary)
        key = self._turn(self.norm_k(heads(self.to_k, hidden_states)), rotary)
        clip = (query, key, heads(self.to_v, hidden_states))
        caption = (
            self.norm_added_q(heads(self.add_q_proj, encoder_hidden_states)),
            self.norm_added_k(heads(self.add_k_proj, encoder_hidden_states)),
            heads(self.add_v_proj, encoder_hidden_states),
        )
        local, cut = partial(self._attend, biases=(bias, encoder_bias)), self.processor._parallel_config
        out, out_caption = local(clip, caption) if cut is None else cut.whole_streams((clip, caption), local)
        made = self.to_out[0](out.flatten(2))
        return made if self.to_add_out is None else (made, self.to_add_out(out_caption.flatten(2)))

    def _attend(self, clip: Heads, caption: Heads, biases: Any) -> tuple[Tensor, Tensor]:
        """Query, key, value [B, n, H, d] of the whole clip, [B, L, H, d] of the caption -> outputs."""
        (bias, encoder_bias), length, copies = biases, clip[0].shape[1], self.skip
        if copies > 1:
            bias = skip_bias(bias, length, copies, self.grouped, clip[0][..., 0, 0])
            clip = tuple(fold(tensor, copies, self.grouped) for tensor in clip)
            caption = tuple(tensor.repeat_interleave(copies, dim=0) for tensor in caption)
            if encoder_bias is not None:
                encoder_bias = encoder_bias.repeat_interleave(copies, dim=0)
        own = clip[0].shape[1]
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(clip, caption, strict=True))
        out = attend(query, key, value, self._joined(clip[0], caption[0], bias, encoder_bias))
        out, out_caption = out[:, :own], out[:, own:]
        if copies > 1:
            out = unfold(out, copies, self.grouped, length)
            out_caption = out_caption.unflatten(0, (-1, copies)).mean(dim=1)
        return out, out_caption

    def _turn(self, heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(_at_least_float32(heads), rotary, self.parts).to(heads.dtype)

    @staticmethod
    def _joined(clip: Tensor, caption: Tensor, bias: Tensor | None, encoder_bias: Tensor | None) -> Any:
        if bias is None and encoder_bias is None:
            return None
        streams = ((clip, bias), (caption, encoder_bias))
        biases = [t.new_zeros(t.shape[:2]) if given is None else given for t, given in streams]
        return torch.cat(biases, dim=1)


class Block(nn.Module):
    def __init__(self, config: Any, skip: int, grouped: bool, last: bool):
        super().__init__()
        hidden = config.num_attention_heads * config.attention_head_dim
        norm = config.timestep_embed_dim, hidden, config.norm_eps, config.norm_elementwise_affine
        self.norm1 = ModulatedNorms(*norm)
        self.attn1 = JointAttention(config, skip, grouped, last)
        self.norm2 = ModulatedNorms(*norm)
        feed_forward = {"activation_fn": config.activation_fn, "bias": False}
        self.ff = FeedForward(hidden, **feed_forward)
        self.ff_enc = FeedForward(hidden, **feed_forward) if config.double_ff else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        encoder_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(clip [B, n, h], caption [B, L, h]) -> the same. temb: c, [B, E]. The last block leaves the
        caption."""
        clip, caption = hidden_states, encoder_hidden_states
        seen, seen_caption, gate, gate_caption = self.norm1(clip, caption, temb)
        out = self.attn1(seen, seen_caption, rotary, bias, encoder_bias)
        if isinstance(out, Tensor):
            clip = _add(clip, gate, out)
            seen, _, gate, _ = self.norm2(clip, caption, temb)
            return _add(clip, gate, self.ff(seen)), caption
        out, out_caption = out
        clip = _add(clip, gate, out)
        caption = _add(caption, gate_caption, out_caption)
        seen, seen_caption, gate, gate_caption = self.norm2(clip, caption, temb)
        of_caption = self.ff if self.ff_enc is None else self.ff_enc
        return _add(clip, gate, self.ff(seen)), _add(caption, gate_caption, of_caption(seen_caption))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(angle_dtype(tensor.dtype))


def _add(stream: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    made = _at_least_float32(stream) + _at_least_float32(gate) * _at_least_float32(change)
    return made.to(stream.dtype)


class LastNorm(nn.Module):
    def __init__(self, time: int, hidden: int, eps: float, affine: bool):
        super().__init__()
        self.linear = nn.Linear(time, 2 * hidden)
        self.norm = WideLayerNorm(hidden, eps, affine)

    def forward(self, clip: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.linear(silu(c))[:, None].chunk(2, dim=-1)
        return self.norm(clip) * (1 + scale) + shift


class OpenSoraPlanUTransformer(ModelMixin, ConfigMixin):
    """The denoiser of Open-Sora Plan 1.5. num_layers, sparse_n: blocks and skips of each stage, an odd
    number of stages.

    A stage of the second half begins with the streams that its mirror image left, joined by a linear layer
    each.
    """

    _no_split_modules = ["Block"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_layers: tuple[int, ...] = (2, 4, 6, 8, 6, 4, 2),
        sparse_n: tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1),
        double_ff: bool = True,
        sparse1d: bool = True,
        attention_bias: bool = True,
        patch_size: int = 2,
        patch_size_t: int = 1,
        activation_fn: str = "gelu-approximate",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        caption_channels: int = 2048,
        pooled_projection_dim: int = 1280,
        timestep_embed_dim: int = 1024,
        norm_cls: str = "fp32_layer_norm",
        skip_connection: bool = True,
        skip_connection_zero_init: bool = True,
    ):
        super().__init__()
        hidden = num_attention_heads * attention_head_dim
        half = len(num_layers) // 2
        if len(num_layers) % 2 == 0 or len(num_layers) != len(sparse_n):
            raise ValueError(f"{num_layers} and {sparse_n} must be as many, an odd number of stages")
        if attention_head_dim % 16:
            raise ValueError(f"attention_head_dim {attention_head_dim} is not divisible by 16")
        if patch_size_t != 1 or norm_cls != "fp32_layer_norm":
            raise ValueError("patch_size_t is 1 and norm_cls fp32_layer_norm in the published network")
        if skip_connection and not skip_connection_zero_init:
            raise ValueError(
                "skip_connection_zero_init: the published network has no norm before its joining layers"
            )
        last_norm = timestep_embed_dim, hidden, norm_eps, norm_elementwise_affine
        self.patch_embed = PatchEmbed(in_channels, hidden, patch_size)
        self.time_text_embed = TimeText(timestep_embed_dim, pooled_projection_dim)
        self.caption_projection = nn.Linear(caption_channels, hidden)
        self.rope = Rope3D(tuple(attention_head_dim * part // 16 for part in AXES))
        self.transformer_blocks = nn.ModuleList(
            nn.ModuleList(
                Block(
                    self.config,
                    sparse_n[stage] if sparse1d else 1,
                    grouped=bool(i % 2),
                    last=(stage, i) == (len(num_layers) - 1, depth - 1),
                )
                for i in range(depth)
            )
            for stage, depth in enumerate(num_layers)
        )
        joins = half if skip_connection else 0
        self.skip_norm_linear = nn.ModuleList(_join(hidden) for _ in range(joins))
        self.skip_norm_linear_enc = nn.ModuleList(_join(hidden) for _ in range(joins))
        self.norm_final = WideLayerNorm(hidden, norm_eps, norm_elementwise_affine)
        self.norm_out = LastNorm(*last_norm)
        self.proj_out = nn.Linear(hidden, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The prediction [B, C, T, H, W] of clips of this shape.

        encoder_hidden_states: [B, L, D] (or [B, 1, L, D]); pooled_projections: [B, P] (or [B, 1, P]);
        timestep: [B], in 0..1000; attention_mask [B, T, H, W] and encoder_attention_mask [B, L] (or [B, 1,
        L]): 1 = seen.
        """
        patch, dtype = self.config.patch_size, hidden_states.dtype
        frames, height, width = hidden_states.shape[2:]
        grid = frames, height // patch, width // patch
        seen = None if encoder_attention_mask is None else encoder_attention_mask.flatten(1)
        c = self.time_text_embed(timestep, pooled_projections.flatten(1))
        given = {
            "temb": c,
            "rotary": self.rope(grid, hidden_states.device),
            "bias": video_bias(attention_mask, patch, dtype),
            "encoder_bias": key_bias(seen, dtype),
        }
        clip = self.patch_embed(hidden_states)
        caption = self.caption_projection(encoder_hidden_states.flatten(1, -2))
        kept: list[tuple[Tensor, Tensor]] = []
        half, joins = len(self.transformer_blocks) // 2, len(self.skip_norm_linear)
        for stage, blocks in enumerate(self.transformer_blocks):
            if stage > half and joins:
                of_clip, of_caption = kept.pop()
                join = stage - half - 1
                clip = self.skip_norm_linear[join](torch.cat([clip, of_clip], dim=-1))
                caption = self.skip_norm_linear_enc[join](torch.cat([caption, of_caption], dim=-1))
            for block in blocks:
                clip, caption = block(clip, caption, **given)
            if stage < half:
                kept.append((clip, caption))
        clip = self.proj_out(self.norm_out(self.norm_final(clip), c))
        made = unpatchify(clip, grid, patch)
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)


def _join(hidden: int) -> nn.Sequential:
    """[x | kept] -> x at the start of training."""
    linear = nn.Linear(2 * hidden, hidden)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(hidden, 2 * hidden))
        linear.bias.zero_()
    return nn.Sequential(nn.Identity(), linear)
