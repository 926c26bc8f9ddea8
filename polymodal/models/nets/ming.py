"""Ming-Lite-Omni's text model (BailingMoe): one set of experts, chosen by a gate of texts, of pictures or of
sounds.

Formulas and names of tensors: https://github.com/inclusionAI/Ming (d97e2f3), modeling_bailing_moe.py. Norms,
MLPs, stacked experts and rotations are transformers'; published files have one tensor an expert.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from polymodal.models.nets.deepseek_vl2 import EXPERT_RULES

SECTIONS = [16, 24, 24]
"""Pairs of a head of 128 that turn by time, line and column (fixed in the published code)."""


class BailingMoeConfig(PreTrainedConfig):
    model_type = "bailing_moe"
    attribute_map = {"num_local_experts": "num_experts"}
    vocab_size: int = 126464
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = 128
    hidden_act: str = "silu"
    use_qkv_bias: bool = False
    use_bias: bool = False
    rms_norm_eps: float = 1e-5
    norm_head: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    rope_theta: float = 600000.0
    rope_scaling: dict | None = None
    pad_token_id: int | None = 126081
    num_experts: int = 64
    num_shared_experts: int = 2
    num_experts_per_tok: int = 6
    norm_topk_prob: bool = True
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 0
    multi_gate: bool = True
    initializer_range: float = 0.02

    @property
    def spatial(self) -> bool:
        """Whether positions have three rows. Raises ValueError for a rotation that is not known."""
        kind = (self.rope_scaling or {}).get("type")
        if kind not in (None, "3D"):
            raise ValueError(f"rope_scaling.type = {kind} is not known for BailingMoe (known: 3D)")
        return kind == "3D"

    def llama(self, inner: int) -> LlamaConfig:
        names = ("hidden_size", "hidden_act", "num_attention_heads", "max_position_embeddings", "rope_theta")
        options = {name: getattr(self, name) for name in names}
        size = self.head_dim or self.hidden_size // self.num_attention_heads
        return LlamaConfig(intermediate_size=inner, head_dim=size, mlp_bias=self.use_bias, **options)


class Attention(nn.Module):
    """query_key_value: all heads of queries, then of keys, then of values."""

    def __init__(self, config: BailingMoeConfig):
        super().__init__()
        self.heads, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.size = config.head_dim or config.hidden_size // self.heads
        rows = (self.heads + 2 * self.keys) * self.size
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.heads * self.size, config.hidden_size, bias=config.use_bias)

    def forward(self, hidden: Tensor, rotation: Any, seen: Tensor) -> Tensor:
        """seen: bool [B, 1, T, T]."""
        heads = self.query_key_value(hidden).unflatten(-1, (-1, self.size)).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.keys, self.keys], dim=1)
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        key, value = (repeat_kv(each, self.heads // self.keys) for each in (key, value))
        scores = (query @ key.transpose(2, 3)) / self.size**0.5
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        out = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
        return self.dense(out.transpose(1, 2).flatten(2))


class Gate(nn.Module):
    def __init__(self, config: BailingMoeConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))


class SparseMLP(nn.Module):
    def __init__(self, config: BailingMoeConfig):
        super().__init__()
        self.gate, self.experts = Gate(config), DeepseekV3Experts(config)
        self.image_gate = Gate(config) if config.multi_gate else None
        self.audio_gate = Gate(config) if config.multi_gate else None
        inner = config.moe_intermediate_size * (config.num_shared_experts or 0)
        self.shared_experts = LlamaMLP(config.llama(inner)) if inner else None
        self.chosen, self.normed = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, hidden: Tensor, image_mask: Tensor | None, audio_mask: Tensor | None) -> Tensor:
        """image_mask, audio_mask: bool [B, T], exclusive."""
        flat = hidden.flatten(0, 1)
        logits = F.linear(flat, self.gate.weight)
        for gate, mask in ((self.image_gate, image_mask), (self.audio_gate, audio_mask)):
            if gate is not None and mask is not None:
                logits = torch.where(mask.flatten()[:, None], F.linear(flat, gate.weight), logits)
        weights, index = F.softmax(logits, dim=-1, dtype=torch.float32).topk(self.chosen, dim=-1)
        if self.normed and self.chosen > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = self.experts(flat, index, weights.to(flat.dtype)).view_as(hidden)
        return out if self.shared_experts is None else out + self.shared_experts(hidden)


class DecoderLayer(nn.Module):
    def __init__(self, config: BailingMoeConfig, number: int):
        super().__init__()
        dense = number < config.first_k_dense_replace
        self.attention = Attention(config)
        self.mlp = LlamaMLP(config.llama(config.intermediate_size)) if dense else SparseMLP(config)
        norms = (LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2))
        self.input_layernorm, self.post_attention_layernorm = norms

    def forward(self, hidden: Tensor, rotation: Any, seen: Tensor, *masks: Tensor | None) -> Tensor:
        hidden = hidden + self.attention(self.input_layernorm(hidden), rotation, seen)
        inner = self.post_attention_layernorm(hidden)
        return hidden + (self.mlp(inner, *masks) if isinstance(self.mlp, SparseMLP) else self.mlp(inner))


def sectioned(tables: Sequence[Tensor]) -> Tensor:
    """Cosines or sines [B, T, 128] by time, line and column -> those of each channel's own position."""
    split = [table.split(SECTIONS * 2, dim=-1) for table in tables]
    return torch.cat([split[at % 3][at] for at in range(6)], dim=-1)


class BailingMoePreTrainedModel(PreTrainedModel):
    config: BailingMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, DeepseekV3Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)


class BailingMoeModel(BailingMoePreTrainedModel):
    def __init__(self, config: BailingMoeConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config.llama(config.intermediate_size))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
    ) -> Tensor:
        """position_ids: [B, T], or [3, B, T] with spatial positions; masks [B, T]: which rows are of pictures
        and of sounds -> states [B, T, D]."""
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = hidden.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(tokens, device=hidden.device).expand(batch, -1)
        if self.config.spatial:
            rows = position_ids if position_ids.ndim == 3 else position_ids.expand(3, -1, -1)
            each = zip(*(self.rotary_emb(hidden, row) for row in rows), strict=True)
            rotation: Any = tuple(sectioned(part) for part in each)
        else:
            rotation = self.rotary_emb(hidden, position_ids)
        seen = (
            torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril().expand(batch, 1, -1, -1)
        )
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None]
        masks = [None if mask is None else mask.bool() for mask in (image_mask, audio_mask)]
        for layer in self.layers:
            hidden = layer(hidden, rotation, seen, *masks)
        return self.norm(hidden)


class BailingMoeForCausalLM(BailingMoePreTrainedModel):
    def __init__(self, config: BailingMoeConfig):
        super().__init__(config)
        self.model = BailingMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        """The inputs of BailingMoeModel.forward, and labels [B, T] with -100 where nothing is learned."""
        weight = F.normalize(self.lm_head.weight, dim=1) if self.config.norm_head else self.lm_head.weight
        logits = F.linear(self.model(**kwargs), weight).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def positions(
    ids: Sequence[int],
    images: Sequence[Sequence[int]],
    videos: Sequence[Sequence[int]],
    tokens: Mapping[str, int],
    merge: int,
    rate: float,
    seconds: Sequence[float],
) -> Tensor:
    """Time, line and column [3, T] of one row's tokens without padding (as in Qwen2.5-VL): text counts in all
    three; a picture or video of patches (t, h, w), merged by `merge`, spans its grid, time by seconds * rate;
    what follows begins behind the largest. images, videos, seconds: consumed in reading order; tokens: ids by
    name."""
    found: list[Tensor] = []
    at, start = 0, 0
    pictures, clips, steps = iter(images), iter(videos), iter(seconds)
    patch = tokens["image_patch_token"]
    begins = [before for before, after in zip(ids, ids[1:], strict=False) if after == patch]
    left = [True] * begins.count(tokens["video_start_token"]) + [False] * begins.count(
        tokens["image_start_token"]
    )
    while at < len(ids):
        if ids[at] != patch or not left:
            found.append(torch.full((3, 1), start))
            at, start = at + 1, start + 1
            continue
        video = left.pop(0)
        t, h, w = next(clips if video else pictures)
        grid = torch.cartesian_prod(
            torch.arange(t), torch.arange(h // merge), torch.arange(w // merge)
        ).T.clone()
        grid[0] = (grid[0] * (next(steps, 1.0) if video else 0.0) * rate).long()
        found.append(grid + start)
        at, start = at + grid.shape[1], int(grid.max()) + start + 1
    return torch.cat(found, dim=1)


register_checkpoint_conversion_mapping(BailingMoeConfig.model_type, EXPERT_RULES, overwrite=True)
