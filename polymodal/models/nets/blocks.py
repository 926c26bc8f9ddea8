"""What several of the nets share: attention, rotary and sinusoidal positions, causal convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional

ROTARY_BASE = 10000.0


class AttentionCore(nn.Module):
    """Softmax attention by diffusers' dispatcher, so that its backends and cut sequences work."""

    _attention_backend = None
    _parallel_config = None

    @property
    def processor(self) -> AttentionCore:
        """What diffusers' attention layers have beside them: where the two settings above are."""
        return self

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        context: bool = False,
    ) -> Tensor:
        """query [B, N, heads, D], key and value [B, M, heads, D] -> [B, N, heads * D].

        mask: bool [B, M], true = seen; or additive, of a shape that broadcasts to [B, heads, N, M].
        context: keys are another sequence's (of text), which every rank has whole where queries are cut.
        """
        if mask is not None and mask.dtype == torch.bool and mask.ndim == 2:
            mask = mask[:, None, None]
        made = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            backend=self._attention_backend,
            parallel_config=None if context else self._parallel_config,
        )
        return made.flatten(2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; mean and root in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-6, name: str = "weight"):
        """name: of the parameter, where a published file has another than `weight`."""
        super().__init__()
        self.eps, self.parameter = eps, name
        self.register_parameter(name, nn.Parameter(torch.ones(size)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(angle_dtype(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * getattr(self, self.parameter)


def angle_dtype(dtype: torch.dtype) -> torch.dtype:
    """Angles of rotary positions are float32; float64 in a net of float64."""
    return torch.promote_types(dtype, torch.float32)


def frequencies(size: int, like: Tensor, base: float = ROTARY_BASE) -> Tensor:
    """base^(-2i / size) for i < size / 2."""
    steps = torch.arange(0, size, 2, device=like.device, dtype=angle_dtype(like.dtype))
    return base ** (-steps / size)


def angles(positions: Tensor, sizes: Sequence[int], like: Tensor, base: float = ROTARY_BASE) -> list[Tensor]:
    """Positions [N, axes] -> for each axis its angles [N, size / 2], of the dimensions that it turns."""
    return [
        positions[:, axis, None].to(angle_dtype(like.dtype)) * frequencies(size, like, base)
        for axis, size in enumerate(sizes)
    ]


def rotated_halves(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., N, heads, D] turned by angles [N, D / 2]: dimension i together with i + D / 2."""
    cos, sin = (made.to(x.dtype)[:, None] for made in (turns.cos(), turns.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotated_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., N, heads, D] turned by angles [N, D / 2]: dimension 2i together with 2i + 1."""
    cos, sin = (made.to(x.dtype)[:, None] for made in (turns.cos(), turns.sin()))
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


def rotated_axes(x: Tensor, turns: Sequence[Tensor]) -> Tensor:
    """x [..., N, heads, D] of which each axis turns a part of D of its own, by halves."""
    parts = x.split([2 * angle.shape[-1] for angle in turns], dim=-1)
    return torch.cat([rotated_halves(part, t) for part, t in zip(parts, turns, strict=True)], dim=-1)


def grid_positions(frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """(t, y, x) of every token of a grid, in its order: int64 [frames * height * width, 3]."""
    axes = (torch.arange(n, device=device) for n in (frames, height, width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def sincos(positions: Tensor, size: int) -> Tensor:
    """Positions [...] -> [..., size]: sines, then cosines, of position * 10000^(-2i / size)."""
    turns = positions[..., None] * frequencies(size, positions)
    return torch.cat([turns.sin(), turns.cos()], dim=-1)


class CausalConv3d(nn.Module):
    """A Conv3d (key `conv`) over [B, C, T, H, W] that sees no later frame: zeros are put in front in time.

    The front has k - stride frames, so that a stride of 2 halves an even number of frames.
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        bias: bool = True,
        front: int | None = None,
    ):
        """front: frames of zeros in front, where they are not k - stride."""
        super().__init__()
        self.front = kernel - stride[0] if front is None else front
        padding = (0, kernel // 2, kernel // 2)
        self.conv = nn.Conv3d(inside, outside, kernel, stride, padding=padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 0, 0, 0, self.front, 0)))
