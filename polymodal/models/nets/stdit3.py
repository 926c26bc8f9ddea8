"""STDiT3, the denoiser of Open-Sora 1.2.

Formulas and keys: Open-Sora 1.2 (hpcaitech/Open-Sora, branch opensora/v1.2, Apache-2.0) and its report.
Blocks over places and blocks over frames take turns; frames may be given (without noise) at timestep 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from polymodal.models.nets import stdit
from polymodal.models.nets.blocks import ROTARY_BASE, sincos
from polymodal.models.nets.stdit import modulated


class STDiT3Block(nn.Module):
    """A block over places, or over frames (`temporal`), of tokens [B, T, S, h]."""

    def __init__(self, hidden_size: int, heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.attn = stdit.SelfAttention(hidden_size, heads, qk_norm)
        self.cross_attn = stdit.CrossAttention(hidden_size, heads)
        self.mlp = stdit.Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        if temporal:  # starts as the identity, so that training may begin from a model of pictures
            for linear in (self.attn.proj, self.cross_attn.proj, self.mlp.fc2):
                nn.init.zeros_(linear.weight)

    def forward(
        self,
        hidden_states: Tensor,
        caption: Tensor,
        mask: Tensor | None,
        time: Tensor,
        turns: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, T, S, h]; time [B, T or 1, 6, h]; turns [T, d / 2]."""
        x = hidden_states
        mods = (self.scale_shift_table + time)[:, :, :, None].unbind(2)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mods
        normed = modulated(x, shift, scale)
        if self.temporal:
            made = self.attn(normed.transpose(1, 2).contiguous(), turns).transpose(1, 2)
        else:
            made = self.attn(normed)
        x = x + gate * made
        x = x + self.cross_attn(x, caption, mask)
        return x + gate_mlp * self.mlp(modulated(x, shift_mlp, scale_mlp))


class FrameRotary(nn.Module):
    """Frequencies of frame positions, which the published files hold."""

    def __init__(self, size: int):
        super().__init__()
        steps = torch.arange(0, size, 2).float() / size
        self.register_buffer("freqs", 1.0 / ROTARY_BASE**steps)

    def forward(self, frames: int) -> Tensor:
        return torch.arange(frames, device=self.freqs.device)[:, None] * self.freqs


class STDiT3(ModelMixin, ConfigMixin):
    """The denoiser of Open-Sora 1.2; `STDiT3-XL/2` has 28 + 28 blocks of 16 heads and 1152 dimensions."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("STDiT3Block",)

    @register_to_config
    def __init__(
        self,
        input_sq_size: int = 512,
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
        model_max_length: int = 300,
        qk_norm: bool = True,
        skip_y_embedder: bool = False,
    ):
        """input_sq_size: pixels along a side of the square that positions in a frame are measured by.
        class_dropout_prob: share of captions that training replaces by `y_embedding`; the trainer does it.
        """
        super().__init__()
        stdit.no_drop_path(drop_path)
        if skip_y_embedder:
            raise ValueError("skip_y_embedder: captions that were projected before are not taken")
        self.out_channels = in_channels * 2 if pred_sigma else in_channels
        self.rope = FrameRotary(hidden_size // num_heads)
        self.x_embedder = stdit.PatchEmbed3D(patch_size, in_channels, hidden_size)
        self.t_embedder = stdit.TimestepEmbedder(hidden_size)
        self.fps_embedder = stdit.TimestepEmbedder(hidden_size)
        nn.init.zeros_(self.fps_embedder.mlp[2].weight)
        nn.init.zeros_(self.fps_embedder.mlp[2].bias)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = stdit.CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(
                STDiT3Block(hidden_size, num_heads, mlp_ratio, qk_norm, temporal) for _ in range(depth)
            )
            for temporal in (False, True)
        )
        patch = patch_size[0] * patch_size[1] * patch_size[2]
        self.final_layer = stdit.FinalLayer(hidden_size, patch, self.out_channels)
        self.gradient_checkpointing = False

    def positions(self, height: int, width: int, pixels: float, like: Tensor) -> Tensor:
        """[S, h] of a grid of tokens: half of h by x, half by y. pixels: sqrt(height * width) of the frames.

        An index counts in units of the grid of round(sqrt(S)) tokens a side that stands for input_sq_size.
        """
        scale = pixels / self.config.input_sq_size
        unit = round((height * width) ** 0.5) / scale
        axes = (torch.arange(n, device=like.device, dtype=torch.float32) / n * unit for n in (height, width))
        y, x = torch.meshgrid(*axes, indexing="ij")
        size = int(self.config.hidden_size) // 2
        return torch.cat([sincos(axis.flatten(), size) for axis in (x, y)], dim=-1).to(like.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: float = 512.0,
        width: float = 512.0,
        frame_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """hidden_states [B, C, T, H, W], timestep [B] in 0..1000, caption [B, L, C] with its mask [B, L],
        fps [B] (120 = a picture), height and width of the frames in pixels, frame_mask [B, T] bool (false =
        given, without noise) -> [B, 2 C or C, T, H, W], whose first C channels are the velocity."""
        sides = hidden_states.shape[2:]
        patch = self.config.patch_size
        missing = [-n % p for n, p in zip(sides, patch, strict=True)]
        padding = [part for axis in reversed(missing) for part in (0, axis)]
        tokens = self.x_embedder(nn.functional.pad(hidden_states, padding))
        grid = tuple(tokens.shape[1:4])
        tokens = tokens.flatten(2, 3)
        tokens = tokens + self.positions(grid[1], grid[2], (height * width) ** 0.5, tokens)

        rate = 0 if fps is None else self.fps_embedder(fps)
        time = self.t_embedder(timestep) + rate
        mods = self.t_block(time).unflatten(-1, (6, -1))[:, None]
        still = None
        if frame_mask is not None:
            still = self.t_embedder(torch.zeros_like(timestep)) + rate
            still_mods = self.t_block(still).unflatten(-1, (6, -1))[:, None]
            mods = torch.where(frame_mask[:, :, None, None], mods, still_mods)
        caption = self.y_embedder(encoder_hidden_states)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None]
        turns = self.rope(grid[0])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block, angles in ((spatial, None), (temporal, turns)):
                given = (tokens, caption, mask, mods, angles)
                checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
                tokens = self._gradient_checkpointing_func(block, *given) if checkpointed else block(*given)
        made = self.final_layer.modulated(tokens, time)
        if frame_mask is not None and still is not None:
            # as the weights were trained: given frames are modulated twice
            again = self.final_layer.modulated(made, still)
            made = torch.where(frame_mask[:, :, None, None], made, again)
        made = stdit.unpatchify(self.final_layer.linear(made), grid, patch)
        made = made[:, :, : sides[0], : sides[1], : sides[2]]
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)
