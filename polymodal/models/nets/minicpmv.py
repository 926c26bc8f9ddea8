"""MiniCPM-V 2.5 and 2.6: Idefics2's tower over slices, a resampler to a fixed number of rows, Llama or Qwen2.

Formulas and names of tensors: https://github.com/OpenBMB/MiniCPM-V and the published checkpoints'
modeling_minicpmv.py and resampler.py. Tower and language models are transformers'. 2.5 gives its tower no
grid: a slice is one line of patches there, and in a batch every line is as long as the longest; only its
resampler knows what is padding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config
from transformers import initialization as init
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

OWN = ("query_num", "drop_vision_last_layer", "vision_config", "model_type", "architectures")


class MiniCPMVConfig(PreTrainedConfig):
    """config.json as published: the language model's keys at the top, vision_config, query_num. `grids`:
    2.6."""

    model_type = "minicpmv"
    query_num: int = 64
    drop_vision_last_layer: bool = True
    vision_config: dict | None = None

    @property
    def grids(self) -> bool:
        """Whether the tower is given the grid of each slice (2.6, whose tower is called siglip)."""
        return "siglip" in self.vision_config["model_type"]

    def tower(self) -> Idefics2VisionConfig:
        options = {key: value for key, value in self.vision_config.items() if key != "model_type"}
        if self.drop_vision_last_layer:
            options["num_hidden_layers"] -= 1
        return Idefics2VisionConfig(**options)

    def llm(self) -> PreTrainedConfig:
        options = {key: value for key, value in self.to_dict().items() if key not in OWN}
        return (Qwen2Config if self.grids else LlamaConfig)(**options)


def sine_table(side: int, width: int) -> Tensor:
    """Positions of patches [side, side, width] float32: sine and cosine of the column, then of the row."""
    omega = np.arange(width // 4, dtype=np.float32) / np.float32(width / 4)
    angles = np.arange(side, dtype=np.float32)[:, None] * (np.float32(1.0) / np.float32(10000) ** omega)
    each = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32))
    columns, rows = each[None].expand(side, -1, -1), each[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1)


class Resampler(nn.Module):
    """A fixed number of learned queries over a slice's patches, whose keys carry their positions."""

    def __init__(self, queries: int, width: int, vision: int, side: int = 70):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(vision, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // 128, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(width, width))
        self.positions = nn.Buffer(sine_table(side, width), persistent=False)

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Patches [B, L, V], of each slice the first h w of its grid (h, w) -> [B, queries, D]."""
        table = self.positions
        if max(max(grid) for grid in grids) > len(table):
            table = sine_table(max(max(grid) for grid in grids), table.shape[-1]).to(table.device)
        positions = [table[:h, :w].flatten(0, 1).to(patches) for h, w in grids]
        kept = torch.tensor([h * w for h, w in grids], device=patches.device)
        longest = int(kept.max())
        values = self.ln_kv(self.kv_proj(patches[:, :longest]))
        keys = values + pad_sequence(positions, batch_first=True)
        padding = torch.arange(longest, device=patches.device) >= kept[:, None]
        queries = self.ln_q(self.query).expand(len(patches), -1, -1)
        out, _ = self.attn(queries, keys, values, key_padding_mask=padding, need_weights=False)
        return self.ln_post(out) @ self.proj


class MiniCPMVForConditionalGeneration(PreTrainedModel):
    config: MiniCPMVConfig
    base_model_prefix = "model"
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer", "Idefics2EncoderLayer"]

    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        text, vision = config.llm(), config.tower()
        for part in (text, vision):
            part._attn_implementation = config._attn_implementation
        self.llm = AutoModelForCausalLM.from_config(text)
        self.vpm = Idefics2VisionTransformer(vision)
        self.resampler = Resampler(config.query_num, text.hidden_size, vision.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            init.normal_(module.query, std=0.02)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
            init.copy_(module.positions, sine_table(*module.positions.shape[1:]))

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def patches(self, slices: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
        """Slices [3, P, h w P], their patches in one line, row by row -> the tower's states [B, L, V], each
        slice's own first."""
        size = self.vpm.config.patch_size
        if not self.config.grids:
            longest = max(each.shape[-1] for each in slices)
            lines = torch.stack([nn.functional.pad(each, (0, longest - each.shape[-1])) for each in slices])
            mask = torch.ones(len(slices), 1, longest // size, dtype=torch.bool, device=lines.device)
            return self.vpm(lines, patch_attention_mask=mask).last_hidden_state
        high, wide = (max(grid[side] for grid in grids) for side in (0, 1))
        canvas = slices[0].new_zeros(len(slices), 3, high * size, wide * size)
        mask = torch.zeros(len(slices), high, wide, dtype=torch.bool, device=canvas.device)
        for number, (each, (h, w)) in enumerate(zip(slices, grids, strict=True)):
            square = each.unflatten(2, (h, w, size)).permute(0, 2, 1, 3, 4).flatten(3, 4).flatten(1, 2)
            canvas[number, :, : h * size, : w * size] = square
            mask[number, :h, :w] = True
        states = self.vpm(canvas, patch_attention_mask=mask).last_hidden_state
        own = zip(states, mask.flatten(1), strict=True)
        return pad_sequence([state[each] for state, each in own], batch_first=True)

    def get_image_features(self, slices: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
        """-> [slices, query_num, D]."""
        return self.resampler(self.patches(slices, grids), grids)

    def forward(
        self,
        input_ids: Tensor,
        slices: Sequence[Tensor] = (),
        grids: Sequence[tuple[int, int]] = (),
        image_bound: Sequence[Sequence[tuple[int, int]]] = (),
        **kwargs: Any,
    ) -> Any:
        """slices: of all rows, in reading order; image_bound: of each row, (start, stop) of each slice's
        rows."""
        embedded = self.get_input_embeddings()(input_ids)
        if len(slices):
            rows = self.get_image_features(slices, grids).flatten(0, 1).to(embedded)
            mask = torch.zeros_like(input_ids, dtype=torch.bool)
            for row, bounds in enumerate(image_bound):
                for start, stop in bounds:
                    mask[row, start:stop] = True
            embedded = embedded.masked_scatter(mask[..., None], rows)
        return self.llm(inputs_embeds=embedded, **kwargs)
