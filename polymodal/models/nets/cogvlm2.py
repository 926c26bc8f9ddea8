"""CogVLM2 for pictures (two experts a layer, of vision and of language) and for video (one).

Formulas and names of tensors: the published checkpoints' modeling_cogvlm.py, visual.py and util.py
(https://huggingface.co/THUDM/cogvlm2-llama3-chat-19B and cogvlm2-video-llama3-chat). Norms, MLPs and rotation
are transformers' Llama's. A token goes to the vision expert when it and the next one are of a picture.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

PADDING = 128002
"""The token that published embeddings do not train (their code has it as a number)."""
ROTARY_BASE = 500000.0


class CogVLM2Config(PreTrainedConfig):
    model_type = "cogvlm2"
    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_multi_query_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    vision_config: dict | None = None

    def llama(self) -> LlamaConfig:
        """What Llama's norm, MLP and rotation ask for."""
        names = ("hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps", "num_attention_heads")
        options = {name: getattr(self, name) for name in (*names, "max_position_embeddings")}
        return LlamaConfig(rope_theta=ROTARY_BASE, **options)


def expert_mask(types: Tensor) -> Tensor:
    """Token types [B, T] (1: of a picture) -> which tokens go to the vision expert, bool [B, T]."""
    following = F.pad(types[:, 1:], (0, 1))
    return (types == 1) & (following == 1)


def positions(types: Tensor, mask: Tensor | None = None) -> Tensor:
    """Positions int64 [B, T]: the first and the last row of a picture have one each, all between share
    one."""
    picture = types == 1
    first = picture & ~F.pad(picture[:, :-1], (1, 0))
    last = picture & ~F.pad(picture[:, 1:], (0, 1))
    inner = picture & ~first & ~last
    counts = ~inner | ~F.pad(inner[:, :-1], (1, 0))
    counts[:, 0] = False
    return (counts if mask is None else counts & mask.bool()).long().cumsum(dim=1)


def routed(hidden: Tensor, vision: nn.Module | None, language: nn.Module, mask: Tensor | None) -> Tensor:
    """Each token [B, T, D] through its expert; mask [B, T] chooses `vision`."""
    if vision is None or mask is None:
        return language(hidden)
    flat, chosen = hidden.flatten(0, 1), mask.flatten()
    seen, said = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
    parts = torch.cat([vision(flat[seen]), language(flat[said])])
    return (
        torch.empty_like(parts).index_copy(0, torch.cat([seen, said]), parts).unflatten(0, hidden.shape[:2])
    )


class Attention(nn.Module):
    def __init__(self, config: CogVLM2Config, experts: bool):
        super().__init__()
        width = config.hidden_size
        self.heads, self.keys = config.num_attention_heads, config.num_multi_query_heads
        self.size = width // self.heads
        rows = (self.heads + 2 * self.keys) * self.size
        self.vision_expert_query_key_value = nn.Linear(width, rows) if experts else None
        self.vision_expert_dense = nn.Linear(width, width, bias=False) if experts else None
        self.language_expert_query_key_value = nn.Linear(width, rows, bias=False)
        self.language_expert_dense = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, rotation: Any, kept: Tensor | None, experts: Tensor | None) -> Tensor:
        """kept: bool [B, T] without padding; None: there is none."""
        fused = routed(
            hidden, self.vision_expert_query_key_value, self.language_expert_query_key_value, experts
        )
        sizes = [self.heads * self.size, self.keys * self.size, self.keys * self.size]
        query, key, value = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in fused.split(sizes, dim=-1)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        key, value = (repeat_kv(each, self.heads // self.keys) for each in (key, value))
        if kept is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            causal = torch.ones(2 * (hidden.shape[1],), dtype=torch.bool, device=hidden.device).tril()
            seen = causal & kept[:, None, None]
            scores = query @ key.transpose(2, 3) / self.size**0.5
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            out = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
        return routed(
            out.transpose(1, 2).flatten(2), self.vision_expert_dense, self.language_expert_dense, experts
        )


class Experts(nn.Module):
    def __init__(self, config: CogVLM2Config, experts: bool):
        super().__init__()
        self.language_mlp = LlamaMLP(config.llama())
        self.vision_mlp = LlamaMLP(config.llama()) if experts else None

    def forward(self, hidden: Tensor, experts: Tensor | None) -> Tensor:
        return routed(hidden, self.vision_mlp, self.language_mlp, experts)


class DecoderLayer(nn.Module):
    def __init__(self, config: CogVLM2Config, experts: bool):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, experts), Experts(config, experts)
        norms = (LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2))
        self.input_layernorm, self.post_attention_layernorm = norms

    def forward(self, hidden: Tensor, rotation: Any, kept: Tensor | None, experts: Tensor | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, kept, experts)
        return hidden + self.mlp(self.post_attention_layernorm(hidden), experts)


class VisionLayer(nn.Module):
    """x + LN(attention(x)), then x + LN(MLP(x))."""

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        width, inner, eps = options["hidden_size"], options["intermediate_size"], options["layer_norm_eps"]
        self.heads = options["num_heads"]
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.input_layernorm, self.post_attention_layernorm = (nn.LayerNorm(width, eps=eps) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        fused = self.attention["query_key_value"](hidden).unflatten(-1, (3, self.heads, -1))
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + self.input_layernorm(self.attention["dense"](out))
        return hidden + self.post_attention_layernorm(self.mlp["fc2"](F.gelu(self.mlp["fc1"](hidden))))


class PatchEmbedding(nn.Module):
    def __init__(self, options: dict[str, Any]):
        super().__init__()
        width, size = options["hidden_size"], options["patch_size"]
        self.proj = nn.Conv2d(options["in_channels"], width, size, stride=size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, width))
        self.position_embedding = nn.Embedding(options["num_positions"], width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        joined = torch.cat([self.cls_embedding.expand(len(images), 1, -1), patches], dim=1)
        return joined + self.position_embedding.weight


class Projection(nn.Module):
    def __init__(self, vision: int, width: int, inner: int):
        super().__init__()
        self.linear_proj = nn.Linear(vision, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.gate_proj, self.dense_h_to_4h = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = F.gelu(self.norm1(self.linear_proj(hidden)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(hidden)) * self.dense_h_to_4h(hidden))


class VisionModel(nn.Module):
    def __init__(self, config: CogVLM2Config):
        super().__init__()
        options = config.vision_config or {}
        width = options["hidden_size"]
        self.patch_embedding = PatchEmbedding(options)
        layers = nn.ModuleList(VisionLayer(options) for _ in range(options["num_hidden_layers"]))
        self.transformer = nn.ModuleDict({"layers": layers})
        self.conv = nn.Conv2d(width, width, 2, stride=2)
        self.linear_proj = Projection(width, config.hidden_size, config.intermediate_size)
        self.boi, self.eoi = (nn.Parameter(torch.zeros(1, 1, config.hidden_size)) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] -> rows [N, 2 + (S / P / 2)^2, D]: begin of image, patches joined 2 x 2, end of
        image."""
        hidden = self.patch_embedding(images)
        for layer in self.transformer["layers"]:
            hidden = layer(hidden)
        side = int((hidden.shape[1] - 1) ** 0.5)
        square = hidden[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        rows = self.linear_proj(self.conv(square).flatten(2).transpose(1, 2))
        begin, end = (each.expand(len(images), -1, -1) for each in (self.boi, self.eoi))
        return torch.cat([begin, rows, end], dim=1)


class CogVLM2PreTrainedModel(PreTrainedModel):
    config: CogVLM2Config
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer", "VisionLayer"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # stored in every layer, computed here

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionModel):
            init.normal_(module.boi, std=self.config.initializer_range)
            init.normal_(module.eoi, std=self.config.initializer_range)
        elif isinstance(module, PatchEmbedding):
            init.normal_(module.cls_embedding, std=self.config.initializer_range)


class CogVLM2Model(CogVLM2PreTrainedModel):
    def __init__(self, config: CogVLM2Config, experts: bool = True):
        super().__init__(config)
        padding = PADDING if config.vocab_size > PADDING else config.vocab_size - 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.layers = nn.ModuleList(DecoderLayer(config, experts) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.vision = VisionModel(config)
        self.rotary_emb = LlamaRotaryEmbedding(config.llama())
        self.experts = experts
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """images [N, 3, S, S] of all rows in reading order, in the places where token_type_ids [B, T] is 1 ->
        states [B, T, D]. attention_mask [B, T]: padding on the right."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.embed_tokens(input_ids)
        if images is not None and len(images):
            hidden = hidden.masked_scatter(
                (types == 1)[..., None], self.vision(images).flatten(0, 1).to(hidden)
            )
        if position_ids is None:
            position_ids = positions(types, attention_mask)
        kept = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        rotation = self.rotary_emb(hidden, position_ids)
        experts = expert_mask(types) if self.experts else None
        for layer in self.layers:
            hidden = layer(hidden, rotation, kept, experts)
        return self.norm(hidden)


class CogVLM2ForCausalLM(CogVLM2PreTrainedModel):
    experts = True

    def __init__(self, config: CogVLM2Config):
        super().__init__(config)
        self.model = CogVLM2Model(config, self.experts)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        """The inputs of CogVLM2Model.forward, and labels [B, T] with -100 where nothing is learned."""
        logits = self.lm_head(self.model(input_ids, **kwargs)).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class CogVLM2VideoForCausalLM(CogVLM2ForCausalLM):
    """A frame is a picture; every token goes through the language expert."""

    experts = False
