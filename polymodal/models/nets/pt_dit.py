"""PT-DiT, the denoiser of Qihoo-T2X: attention to proxies of windows, inside and across windows.

Formulas and keys: the PT-DiT paper (arXiv 2409.04005) and its port in Ascend/MindSpeed-MM (Apache-2.0);
windows shift as Swin's (arXiv 2103.14030), modulation is PixArt's. Tokens are [B, W, n, h]: W windows of n
tokens each, both in the order of t, y, x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from polymodal.models.nets.blocks import AttentionCore, sincos

Sizes = tuple[int, int, int]  # frames, height, width


def windows(x: Tensor, size: Sizes) -> Tensor:
    """[B, F, H, W, ...] -> [B, windows, tokens of a window, ...]."""
    batch, *sides = x.shape[:4]
    cells = x
    for axis, length in zip((3, 2, 1), reversed(size), strict=True):
        cells = cells.unflatten(axis, (-1, length))
    return cells.movedim((1, 3, 5), (1, 2, 3)).reshape(batch, -1, size[0] * size[1] * size[2], *x.shape[4:])


def unwindowed(x: Tensor, size: Sizes, grid: Sizes) -> Tensor:
    """The way back: [B, windows, tokens, h] -> [B, F, H, W, h]."""
    counts = [whole // part for whole, part in zip(grid, size, strict=True)]
    cells = x.unflatten(2, size).unflatten(1, counts)
    return cells.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(x), *grid, x.shape[-1])


def shift_mask(size: Sizes, grid: Sizes, device: torch.device) -> Tensor:
    """Which tokens of a shifted window see each other: bool [windows, n, n].

    The last window of an axis holds, behind the shift by half a window, the two ends of it.
    """
    regions = []
    for length, window in zip(grid, size, strict=True):
        place = torch.arange(length, device=device)
        cuts = (length - window, length - window // 2) if window > 1 else ()
        regions.append(sum(((place >= cut).long() for cut in cuts), torch.zeros_like(place)))
    t, y, x = torch.meshgrid(*regions, indexing="ij")
    number = windows(((t * 3 + y) * 3 + x)[None], size)[0]
    return number[:, :, None] == number[:, None, :]


class Attention(AttentionCore):
    """Attention with the names of diffusers' layer; without `context`, to itself."""

    def __init__(self, hidden_size: int, heads: int, context: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_k = nn.Linear(context, hidden_size, bias=bias)
        self.to_v = nn.Linear(context, hidden_size, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in projected)
        return self.to_out[0](self.attend(query, key, value, mask))


class PTDiTBlock(nn.Module):
    def __init__(
        self, hidden_size: int, heads: int, text: int, bias: bool, eps: float, size: Sizes, proxies: Sizes
    ):
        """size: of a window. proxies: parts of it, each of which has its own offsets averaged."""
        super().__init__()
        self.eps, self.size = eps, size
        self.offsets = size[1] // proxies[1], size[2] // proxies[2]
        scale = hidden_size**-0.5
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) * scale)
        self.proxy_scale_shift_table = nn.Parameter(torch.randn(3, hidden_size) * scale)
        self.proxy_attn1 = Attention(hidden_size, heads, hidden_size, bias)
        self.attn1 = Attention(hidden_size, heads, hidden_size, bias)
        self.pvisual_attn2 = Attention(hidden_size, heads, hidden_size, bias)
        self.attn2 = Attention(hidden_size, heads, text, bias)
        self.attn3 = Attention(hidden_size, heads, hidden_size, bias)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.ff = FeedForward(hidden_size, activation_fn="gelu-approximate")
        self.linear_1_visual = nn.Linear(hidden_size, hidden_size)
        for linear in (self.linear_2, self.linear_1_visual):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def norm(self, x: Tensor, shift: Tensor | float = 0.0, scale: Tensor | float = 0.0) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift

    def proxies(self, x: Tensor) -> Tensor:
        """[B, W, n, h] -> [B, W * r_y * r_x, h]: means of the tokens of a window with one offset (y, x)."""
        y, x_offset = self.offsets
        cells = x.unflatten(2, (self.size[0], -1, y, self.size[2] // x_offset, x_offset))
        return cells.mean(dim=(2, 3, 5)).flatten(1, 3)

    def shifted(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, grid: Sizes) -> Tensor:
        half = [length // 2 for length in self.size]
        normed = unwindowed(self.norm(x, shift, scale), self.size, grid)
        rolled = windows(normed.roll([-n for n in half], dims=(1, 2, 3)), self.size)
        mask = shift_mask(self.size, grid, x.device).repeat(len(x), 1, 1)[:, None]
        made = self.attn3(rolled.flatten(0, 1), mask=mask).view_as(x) * gate
        back = unwindowed(made, self.size, grid).roll(half, dims=(1, 2, 3))
        return self.linear_2(windows(back, self.size))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        mask: Tensor | None,
        time: Tensor,
        grid: Sizes,
    ) -> Tensor:
        """hidden_states [B, W, n, h], text [B, L, h], mask bool [B, L], time [B, 6, h]."""
        x = hidden_states
        proxies = self.proxies(x)
        proxies = proxies + self.proxy_attn1(self.norm(proxies))
        seen = self.pvisual_attn2(self.norm(x.flatten(1, 2)), self.norm(proxies))
        x = x + self.linear_1_visual(seen).view_as(x)

        mods = (self.scale_shift_table + time)[:, :, None, None].unbind(1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = mods
        x = x + gate * self.attn1(self.norm(x, shift, scale).flatten(0, 1)).view_as(x)
        of_shifted = (self.proxy_scale_shift_table + time[:, :3])[:, :, None, None].unbind(1)
        x = x + self.shifted(x, *of_shifted, grid)
        x = x + self.attn2(x.flatten(1, 2), encoder_hidden_states, mask).view_as(x)
        return x + gate_ff * self.ff(self.norm(x, shift_ff, scale_ff))


class _PatchEmbed(nn.Module):
    """Latents [B, C, F, H, W] -> tokens [B, F, H', W', h] with their positions."""

    def __init__(
        self, channels: int, hidden_size: int, patch_size: int, frames: int, side: int, scale: float
    ):
        super().__init__()
        self.hidden_size, self.scale = hidden_size, scale
        self.grid = (frames, side, side)
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)
        self.register_buffer("pos_embed", self.table(self.grid))

    def table(self, grid: Sizes) -> Tensor:
        """[1, F, S, h], float32: a quarter of h by the frame, the rest half by x, half by y.

        As published, a grid that is no square has its height and width exchanged: the i-th token of a frame
        of H rows is at y = i // H, x = i % H.
        """
        frames, height, width = grid
        times = sincos(torch.arange(frames).double(), self.hidden_size // 4)
        place = torch.arange(height * width).double()
        axes = (place % height, place.div(height, rounding_mode="floor"))
        space = torch.cat([sincos(axis / self.scale, self.hidden_size * 3 // 8) for axis in axes], dim=-1)
        both = (times[:, None].expand(-1, len(space), -1), space[None].expand(frames, -1, -1))
        return torch.cat(both, dim=-1)[None].float()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x.transpose(1, 2).flatten(0, 1)).permute(0, 2, 3, 1).unflatten(0, (len(x), -1))
        grid = tuple(tokens.shape[1:4])
        table = self.pos_embed if grid == self.grid else self.table(grid)
        return tokens + table.to(tokens).view(1, *grid, -1)


class PTDiT(ModelMixin, ConfigMixin):
    """The denoiser of Qihoo-T2X; 1.1B has 28 blocks of 16 heads of 72 dimensions and windows of 1 x 8 x 8."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("PTDiTBlock",)

    @register_to_config
    def __init__(
        self,
        num_heads: int = 16,
        head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        cross_attention_dim: int = 1152,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        compress_ratios: Sequence[int] = (1, 8, 8),
        proxy_compress_ratios: Sequence[int] = (1, 8, 8),
        frame: int = 1,
    ):
        """sample_size, frame: latent sides and frames that the table of positions in the file is for.
        compress_ratios: tokens of a window. proxy_compress_ratios: tokens that a proxy is the mean of."""
        super().__init__()
        hidden_size = num_heads * head_dim
        self.out_channels = out_channels or in_channels
        frames, height, width = compress_ratios
        self.window: Sizes = (frames, height, width)
        scale = float(max(sample_size // 64, 1))
        side = sample_size // patch_size
        self.pos_embed = _PatchEmbed(in_channels, hidden_size, patch_size, frame, side, scale)
        rest = (attention_bias, norm_eps, self.window, tuple(proxy_compress_ratios))
        self.transformer_blocks = nn.ModuleList(
            PTDiTBlock(hidden_size, num_heads, cross_attention_dim, *rest) for _ in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self.adaln_single = AdaLayerNormSingle(hidden_size)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, hidden_size)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """hidden_states [B, C, F, H, W], timestep [B] in 0..1000, caption [B, L, C] with its mask [B, L]
        -> [B, out_channels, F, H, W], whose first C channels are the velocity."""
        tokens = self.pos_embed(hidden_states)
        frames, height, width = tokens.shape[1:4]
        grid: Sizes = (frames, height, width)
        if any(whole % part for whole, part in zip(grid, self.window, strict=True)):
            raise ValueError(f"a grid of {grid} tokens does not divide into windows of {self.window}")
        tokens = windows(tokens, self.window)
        mods, embedded = self.adaln_single(timestep, hidden_dtype=tokens.dtype)
        text = self.caption_projection(encoder_hidden_states)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        for block in self.transformer_blocks:
            given = (tokens, text, mask, mods.unflatten(-1, (6, -1)), grid)
            checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
            tokens = self._gradient_checkpointing_func(block, *given) if checkpointed else block(*given)
        shift, scale = (self.scale_shift_table + embedded[:, None])[:, :, None, None].unbind(1)
        eps = self.config.norm_eps
        normed = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + scale) + shift
        cells = unwindowed(self.proj_out(normed), self.window, grid)
        patch = self.config.patch_size
        cells = cells.unflatten(-1, (patch, patch, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        made = cells.flatten(5, 6).flatten(3, 4)
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)
