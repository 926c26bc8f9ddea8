"""The denoiser of Open-Sora 2.0: an MMDiT of FLUX's form over clips, with an input for given frames.

Formulas and keys: Open-Sora 2.0 (hpcaitech/Open-Sora, main, Apache-2.0) and its report (arXiv 2503.09642);
blocks as FLUX.1's. Two forms are published: projections apart with rotary positions by halves, and FLUX's,
fused with neighbouring pairs. They are the same net up to the order of rows: row j of a head's q, k and their
norms by halves is row 2j of FLUX's for j < d / 2, else row 2 (j - d / 2) + 1.
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

from polymodal.models.nets.blocks import (
    AttentionCore,
    RMSNorm,
    angles,
    grid_positions,
    rotated_halves,
    rotated_pairs,
)
from polymodal.models.nets.stdit import FREQUENCIES, modulated

TIME_SCALE = 1000.0  # timesteps are given in 0..1


class _Embedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, inside: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(inside, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


class _Modulation(nn.Module):
    """[B, h] -> `parts` of [B, 1, h] each: shift, scale, gate, once or twice."""

    def __init__(self, hidden_size: int, parts: int):
        super().__init__()
        self.parts, self.lin = parts, nn.Linear(hidden_size, parts * hidden_size)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(nn.functional.silu(vector))[:, None].chunk(self.parts, dim=-1)


class _QKNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(size, name="scale"), RMSNorm(size, name="scale")


class _Projections(AttentionCore):
    """q, k, v of one stream; its output projection is its own as well."""

    def __init__(self, hidden_size: int, heads: int, bias: bool, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        else:
            for name in ("q_proj", "k_proj", "v_proj"):
                self.add_module(name, nn.Linear(hidden_size, hidden_size, bias=bias))
        self.norm = _QKNorm(hidden_size // heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, h] -> query, key, value [B, N, heads, d], the first two normed."""
        made = self.qkv(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in made)
        return self.norm.query_norm(query), self.norm.key_norm(key), value


class _Rotary:
    """Turns the heads of q and k by the positions of [text, picture]; see `angles`."""

    def __init__(self, turns: Tensor, halves: bool):
        self.turns, self.halves = turns, halves

    def __call__(self, x: Tensor) -> Tensor:
        return (rotated_halves if self.halves else rotated_pairs)(x, self.turns)


def _mlp(hidden_size: int, mlp_ratio: float) -> nn.Sequential:
    width = int(hidden_size * mlp_ratio)
    return nn.Sequential(
        nn.Linear(hidden_size, width), nn.GELU(approximate="tanh"), nn.Linear(width, hidden_size)
    )


class DoubleBlock(nn.Module):
    """Streams of the clip and of text, which attend to each other."""

    def __init__(self, hidden_size: int, heads: int, mlp_ratio: float, bias: bool, fused: bool):
        super().__init__()
        self.img_mod, self.txt_mod = _Modulation(hidden_size, 6), _Modulation(hidden_size, 6)
        self.img_attn, self.txt_attn = (_Projections(hidden_size, heads, bias, fused) for _ in range(2))
        self.img_mlp, self.txt_mlp = _mlp(hidden_size, mlp_ratio), _mlp(hidden_size, mlp_ratio)

    def forward(
        self,
        encoder_hidden_states: Tensor,
        hidden_states: Tensor,
        vector: Tensor,
        turns: Tensor,
        halves: bool,
    ) -> tuple[Tensor, Tensor]:
        """Text [B, M, h], clip [B, N, h], vector [B, h], turns [M + N, d / 2] -> text, clip."""
        text, image, rotary = encoder_hidden_states, hidden_states, _Rotary(turns, halves)
        text_mods, image_mods = self.txt_mod(vector), self.img_mod(vector)
        parts = (
            self.txt_attn(modulated(text, *text_mods[:2])),
            self.img_attn(modulated(image, *image_mods[:2])),
        )
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        joined = self.img_attn.attend(rotary(query), rotary(key), value)
        of_text, of_image = joined.split([text.shape[1], image.shape[1]], dim=1)
        text = text + text_mods[2] * self.txt_attn.proj(of_text)
        text = text + text_mods[5] * self.txt_mlp(modulated(text, *text_mods[3:5]))
        image = image + image_mods[2] * self.img_attn.proj(of_image)
        image = image + image_mods[5] * self.img_mlp(modulated(image, *image_mods[3:5]))
        return text, image


class SingleBlock(AttentionCore):
    """Attention and MLP side by side over [text, clip]; all its projections have a bias, as FLUX's do."""

    def __init__(self, hidden_size: int, heads: int, mlp_ratio: float, fused: bool):
        super().__init__()
        self.heads, self.fused, self.width = heads, fused, int(hidden_size * mlp_ratio)
        if fused:
            self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + self.width)
        else:
            self.q_proj = nn.Linear(hidden_size, hidden_size)
            self.k_proj = nn.Linear(hidden_size, hidden_size)
            self.v_mlp = nn.Linear(hidden_size, hidden_size + self.width)
        self.linear2 = nn.Linear(hidden_size + self.width, hidden_size)
        self.norm = _QKNorm(hidden_size // heads)
        self.modulation = _Modulation(hidden_size, 3)

    def forward(
        self,
        encoder_hidden_states: Tensor,
        hidden_states: Tensor,
        vector: Tensor,
        turns: Tensor,
        halves: bool,
    ) -> tuple[Tensor, Tensor]:
        """As DoubleBlock's."""
        joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        rotary = _Rotary(turns, halves)
        shift, scale, gate = self.modulation(vector)
        x = modulated(joined, shift, scale)
        size = x.shape[-1]
        if self.fused:
            made = self.linear1(x).split([size, size, size, self.width], dim=-1)
        else:
            made = (self.q_proj(x), self.k_proj(x), *self.v_mlp(x).split([size, self.width], dim=-1))
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in made[:3])
        query, key = rotary(self.norm.query_norm(query)), rotary(self.norm.key_norm(key))
        inner = nn.functional.gelu(made[3], approximate="tanh")
        joined = joined + gate * self.linear2(torch.cat([self.attend(query, key, value), inner], -1))
        text, image = joined.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return text, image


class _FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)))


class OpenSora2Transformer(ModelMixin, ConfigMixin):
    """The denoiser of Open-Sora 2.0 (11B: 19 + 38 blocks of 24 heads and 3072 dimensions)."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DoubleBlock", "SingleBlock")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 64,
        vec_in_dim: int = 768,
        context_in_dim: int = 4096,
        hidden_size: int = 3072,
        mlp_ratio: float = 4.0,
        num_heads: int = 24,
        depth: int = 19,
        depth_single_blocks: int = 38,
        axes_dim: Sequence[int] = (16, 56, 56),
        theta: int = 10000,
        qkv_bias: bool = True,
        guidance_embed: bool = False,
        patch_size: int = 2,
        cond_embed: bool = True,
        fused_qkv: bool = False,
        use_liger_rope: bool = True,
    ):
        """in_channels: of a token: latent channels x patch_size^2. cond_embed: tokens of given frames are an
        input, with in_channels + patch_size^2 channels. use_liger_rope: positions turn halves, not pairs."""
        super().__init__()
        if guidance_embed:
            raise ValueError("guidance_embed: no published Open-Sora 2.0 takes a guidance scale")
        if sum(axes_dim) * num_heads != hidden_size:
            raise ValueError(f"axes_dim {tuple(axes_dim)} must add up to hidden_size / num_heads")
        self.img_in = nn.Linear(in_channels, hidden_size)
        self.time_in = _Embedder(FREQUENCIES, hidden_size)
        self.vector_in = _Embedder(vec_in_dim, hidden_size)
        self.txt_in = nn.Linear(context_in_dim, hidden_size)
        if cond_embed:
            self.cond_in = nn.Linear(in_channels + patch_size**2, hidden_size)
            nn.init.zeros_(self.cond_in.weight)
            nn.init.zeros_(self.cond_in.bias)
        sizes = (hidden_size, num_heads, mlp_ratio)
        self.double_blocks = nn.ModuleList(DoubleBlock(*sizes, qkv_bias, fused_qkv) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleBlock(*sizes, fused_qkv) for _ in range(depth_single_blocks))
        self.final_layer = _FinalLayer(hidden_size, in_channels)
        self.gradient_checkpointing = False

    @staticmethod
    def places(frames: int, height: int, width: int, device: torch.device) -> Tensor:
        """(t, y, x) of the tokens of latents with so many frames, and cells along their sides."""
        return grid_positions(frames, height // 2, width // 2, device)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor | None = None,
        condition: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Tokens of a clip [B, N, in_channels] with places img_ids [N, 3] (t, y, x), timestep [B] in 0..1,
        text [B, M, context_in_dim] with places txt_ids [M, 3] (zeros), pooled text [B, vec_in_dim], condition
        [B, N, in_channels + patch_size^2] -> the velocity of the tokens [B, N, in_channels]."""
        if (condition is not None) != hasattr(self, "cond_in"):
            raise ValueError("condition is given exactly where the net has cond_embed")
        image = self.img_in(hidden_states)
        if condition is not None:
            image = image + self.cond_in(condition)
        waves = get_timestep_embedding(
            timestep * TIME_SCALE, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0.0
        )
        vector = self.time_in(waves.to(image.dtype)) + self.vector_in(pooled_projections)
        text = self.txt_in(encoder_hidden_states)
        if txt_ids is None:
            txt_ids = img_ids.new_zeros(text.shape[1], 3)
        places = torch.cat([txt_ids, img_ids])
        turns = torch.cat(angles(places, self.config.axes_dim, hidden_states, self.config.theta), dim=-1)

        def run(block: nn.Module, *given: Any) -> Any:
            given = (*given, vector, turns, self.config.use_liger_rope)
            checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
            return self._gradient_checkpointing_func(block, *given) if checkpointed else block(*given)

        for block in (*self.double_blocks, *self.single_blocks):
            text, image = run(block, text, image)
        made = self.final_layer(image, vector)
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)
