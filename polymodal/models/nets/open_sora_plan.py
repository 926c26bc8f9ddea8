"""Open-Sora Plan 1.2 and 1.3: a transformer over all tokens of a clip, with skip attention in 1.3.

Formulas and names of parameters: Open-Sora Plan (github.com/PKU-YuanGroup/Open-Sora-Plan, v1.2.0 and main,
MIT). 1.2 is 1.3 without `sparse1d`. Timestep, caption and feed-forward layers are diffusers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

MASKED, PADDED = (
    -10000.0,
    -9980.0,
)  # added to scores: finite, so that a sequence of masked keys alone stays so
DENSE_ENDS = 2, 30  # blocks before and from these attend to all tokens, whatever the depth


class PatchEmbed(nn.Module):
    """[B, C, T, H, W] -> [B, T*H/p*W/p, h]: a convolution over the patches of each frame."""

    def __init__(self, channels: int, hidden: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch, stride=patch)

    def forward(self, clip: Tensor) -> Tensor:
        frames = clip.transpose(1, 2)
        tokens = self.proj(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        return tokens.reshape(len(clip), -1, tokens.shape[-1])


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: int) -> Tensor:
    """[B, T*H*W, p*p*C] -> [B, C, T, H*p, W*p]."""
    frames, height, width = grid
    cells = tokens.reshape(len(tokens), frames, height, width, patch, patch, -1)
    return cells.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(tokens), -1, frames, height * patch, width * patch)


class Rope3D(nn.Module):
    """Rotary tables of positions (t, y, x): angles pos / scale * 10000^(-2i/part), computed in float32.

    parts: channels of a head for each axis; in each, channel i turns with i + part/2.
    """

    def __init__(self, parts: Sequence[int], scales: Sequence[float] = (1.0, 1.0, 1.0)):
        super().__init__()
        self.parts, self.scales = tuple(parts), tuple(scales)

    def forward(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin) [1, T*H*W, 1, sum of parts], float32."""
        angles = []
        for axis, (length, part, scale) in enumerate(zip(grid, self.parts, self.scales, strict=True)):
            speeds = 1.0 / 10000 ** (torch.arange(0, part, 2, dtype=torch.float32, device=device) / part)
            positions = torch.arange(length, dtype=torch.float32, device=device) / scale
            of_axis = torch.outer(positions, speeds).repeat(1, 2)
            places = [1, 1, 1, part]
            places[axis] = length
            angles.append(of_axis.view(places).expand(*grid, part))
        joined = torch.cat(angles, dim=-1).flatten(0, 2)[None, :, None]
        return joined.cos(), joined.sin()


def rotate(heads: Tensor, rotary: tuple[Tensor, Tensor], parts: Sequence[int]) -> Tensor:
    """[B, n, H, d] turned by tables of Rope3D, in the dtype of `heads`."""
    cos, sin = (table.to(heads.dtype) for table in rotary)
    turned = []
    for part in heads.split(tuple(parts), dim=-1):
        low, high = part.chunk(2, dim=-1)
        turned += [-high, low]
    return heads * cos + torch.cat(turned, dim=-1) * sin


def fold(tokens: Tensor, skip: int, grouped: bool, value: float = 0.0) -> Tensor:
    """[B, l, ...] -> [B*skip, l/skip, ...]: every skip-th token, or every skip-th group of `skip` neighbours.

    l is padded with `value` at its end to a multiple of skip^2.
    """
    rest = -tokens.shape[1] % skip**2
    tokens = pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, rest), value=value)
    if grouped:
        return tokens.unflatten(1, (-1, skip, skip)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return tokens.unflatten(1, (-1, skip)).transpose(1, 2).flatten(0, 1)


def unfold(tokens: Tensor, skip: int, grouped: bool, length: int) -> Tensor:
    """The way back from `fold`, without its padding."""
    tokens = tokens.unflatten(0, (-1, skip))
    if grouped:
        tokens = tokens.unflatten(2, (-1, skip)).transpose(1, 2).flatten(1, 3)
    else:
        tokens = tokens.transpose(1, 2).flatten(1, 2)
    return tokens[:, :length]


def skip_bias(bias: Tensor | None, length: int, skip: int, grouped: bool, like: Tensor) -> Tensor | None:
    """A bias of keys [B, l] (None: zeros) folded as the tokens are; None where nothing is masked or
    padded."""
    if skip > 1 and (bias is not None or length % skip**2):
        whole = like.new_zeros(len(like), length) if bias is None else bias
        bias = fold(whole, skip, grouped, PADDED)
    return bias


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """[B, n, H, d] each, bias of keys [B, n] -> [B, n, H, d]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask = None if bias is None else bias[:, None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def key_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask (1 = seen) as a bias of scores, of the same shape."""
    return None if mask is None else (1 - mask.to(dtype)) * MASKED


def video_bias(mask: Tensor | None, patch: int, dtype: torch.dtype) -> Tensor | None:
    """Mask of latent cells [B, T, H, W] (1 = seen) -> bias of tokens [B, n]; a patch with a seen cell is
    seen."""
    if mask is None:
        return None
    return key_bias(nn.functional.max_pool2d(mask.to(dtype), patch).flatten(1), dtype)


class WholeSequences:
    """Where the sequence is cut over ranks: `_parallel_config` computes attention over all of it."""

    _parallel_config: Any = None
    _attention_backend: Any = None


class Attention(nn.Module):
    """Self-attention with rotary positions, over all tokens or over `skip` sequences of them;
    cross-attention."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        width: int,
        bias: bool,
        parts: Sequence[int],
        skip: int = 1,
        grouped: bool = False,
    ):
        super().__init__()
        self.heads, self.head_dim, self.parts = heads, width, tuple(parts)
        self.skip, self.grouped, self.processor = skip, grouped, WholeSequences()
        self.to_q, self.to_k, self.to_v = (nn.Linear(hidden, heads * width, bias=bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(heads * width, hidden)])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, n, h] -> [B, n, h]. bias: of keys [B, m]; rotary: (cos, sin) of Rope3D, of queries and keys."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(given).unflatten(-1, (self.heads, -1))
            for layer, given in ((self.to_q, hidden_states), (self.to_k, context), (self.to_v, context))
        )
        if rotary is not None:
            query, key = (rotate(heads, rotary, self.parts) for heads in (query, key))
        local = partial(self._attend, bias=bias)
        cut = self.processor._parallel_config if encoder_hidden_states is None else None
        out = local(query, key, value) if cut is None else cut.whole(query, key, value, local)
        return self.to_out[0](out.flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """[B, n, H, d] each, of whole sequences."""
        if self.skip == 1:
            return attend(query, key, value, bias)
        length = query.shape[1]
        bias = skip_bias(bias, length, self.skip, self.grouped, query[..., 0, 0])
        query, key, value = (fold(t, self.skip, self.grouped) for t in (query, key, value))
        return unfold(attend(query, key, value, bias), self.skip, self.grouped, length)


class Block(nn.Module):
    """Self-attention and feed-forward with adaLN-single, cross-attention between them without norm or
    gate."""

    def __init__(self, config: Any, skip: int, grouped: bool):
        super().__init__()
        hidden = config.num_attention_heads * config.attention_head_dim
        heads = (hidden, config.num_attention_heads, config.attention_head_dim, config.attention_bias)
        parts = (config.attention_head_dim // 3,) * 3
        norm = {"elementwise_affine": config.norm_elementwise_affine, "eps": config.norm_eps}
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden) / hidden**0.5)
        self.norm1 = nn.LayerNorm(hidden, **norm)
        self.attn1 = Attention(*heads, parts, skip, grouped)
        self.attn2 = Attention(*heads, parts)
        self.norm2 = nn.LayerNorm(hidden, **norm)
        self.ff = FeedForward(hidden, activation_fn=config.activation_fn)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        encoder_bias: Tensor | None = None,
    ) -> Tensor:
        """[B, n, h] -> [B, n, h]. temb: [B, 6h] of adaLN-single."""
        mods = self.scale_shift_table[None] + temb.unflatten(-1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = mods.chunk(6, dim=1)
        seen = self.norm1(hidden_states) * (1 + scale1) + shift1
        hidden_states = hidden_states + gate1 * self.attn1(seen, bias=bias, rotary=rotary)
        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, bias=encoder_bias)
        seen = self.norm2(hidden_states) * (1 + scale2) + shift2
        return hidden_states + gate2 * self.ff(seen)


class OpenSoraPlanTransformer(ModelMixin, ConfigMixin):
    """The denoiser of Open-Sora Plan 1.2 and 1.3 T2V; with `vae_scale_factor_t` that of 1.3 I2V.

    Skip attention (`sparse1d`): of blocks 2 to 29 even ones take every sparse_n-th token, odd ones groups.
    Of I2V the input's channels are [noisy, the masked clip's latents, mask of vae_scale_factor_t frames].
    """

    _no_split_modules = ["Block"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 24,
        attention_head_dim: int = 96,
        in_channels: int = 8,
        out_channels: int | None = 8,
        num_layers: int = 32,
        cross_attention_dim: int | None = None,
        attention_bias: bool = True,
        patch_size: int = 2,
        patch_size_t: int = 1,
        activation_fn: str = "gelu-approximate",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        interpolation_scale_h: float = 1.0,
        interpolation_scale_w: float = 1.0,
        interpolation_scale_t: float = 1.0,
        sparse1d: bool = False,
        sparse_n: int = 2,
        vae_scale_factor_t: int | None = None,
    ):
        super().__init__()
        config: Any = self.config
        hidden = num_attention_heads * attention_head_dim
        if attention_head_dim % 6:
            raise ValueError(
                f"attention_head_dim {attention_head_dim} is not divisible by 6, the parts of three axes"
            )
        if patch_size_t != 1:
            raise ValueError(
                f"patch_size_t is {patch_size_t}: every latent frame has tokens of its own, it is 1"
            )
        if cross_attention_dim not in (None, hidden):
            raise ValueError(f"cross_attention_dim {cross_attention_dim} is not the hidden size, {hidden}")
        self.pos_embed = PatchEmbed(in_channels, hidden, patch_size)
        if vae_scale_factor_t is not None:
            for name, channels in (
                ("pos_embed_masked_hidden_states", in_channels),
                ("pos_embed_mask", vae_scale_factor_t),
            ):
                last = nn.Linear(hidden, hidden, bias=False)
                nn.init.zeros_(last.weight)
                setattr(self, name, nn.Sequential(PatchEmbed(channels, hidden, patch_size), last))
        scales = (interpolation_scale_t, interpolation_scale_h, interpolation_scale_w)
        self.rope = Rope3D((attention_head_dim // 3,) * 3, scales)
        self.adaln_single = AdaLayerNormSingle(hidden)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, hidden)
        first, end = DENSE_ENDS
        skips = [sparse_n if sparse1d and first <= i < end else 1 for i in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(
            Block(config, skip, grouped=bool(i % 2)) for i, skip in enumerate(skips)
        )
        self.norm_out = nn.LayerNorm(hidden, elementwise_affine=False, eps=norm_eps)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden) / hidden**0.5)
        self.proj_out = nn.Linear(hidden, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The prediction [B, C, T, H, W] of clips [B, C', T, H, W].

        encoder_hidden_states: [B, L, D] (or [B, 1, L, D]); timestep: [B], 0..999; attention_mask [B, T, H,
        W] and encoder_attention_mask [B, L] (or [B, 1, L]): 1 = seen.
        """
        patch, dtype = self.config.patch_size, hidden_states.dtype
        frames, height, width = hidden_states.shape[2:]
        grid = frames, height // patch, width // patch
        captions = encoder_hidden_states.flatten(1, -2)
        seen = None if encoder_attention_mask is None else encoder_attention_mask.flatten(1)
        tokens = self._embed(hidden_states)
        times, embedded = self.adaln_single(timestep, batch_size=len(hidden_states), hidden_dtype=dtype)
        given = {
            "encoder_hidden_states": self.caption_projection(captions),
            "temb": times,
            "rotary": self.rope(grid, hidden_states.device),
            "bias": video_bias(attention_mask, patch, dtype),
            "encoder_bias": key_bias(seen, dtype),
        }
        for block in self.transformer_blocks:
            tokens = block(tokens, **given)
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        tokens = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        made = unpatchify(tokens, grid, patch)
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)

    def _embed(self, hidden_states: Tensor) -> Tensor:
        if self.config.vae_scale_factor_t is None:
            return self.pos_embed(hidden_states)
        channels = self.config.in_channels
        noisy, masked, mask = hidden_states.split((channels, channels, self.config.vae_scale_factor_t), dim=1)
        return self.pos_embed(noisy) + self.pos_embed_masked_hidden_states(masked) + self.pos_embed_mask(mask)
