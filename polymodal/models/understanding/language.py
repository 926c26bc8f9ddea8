"""Decoder-only language models with transformers' names: tensor plans, and FLOPs.

Shared by all models whose text part is such a decoder (llama, qwen2, qwen3, qwen3_moe and those named alike).
"""

from __future__ import annotations

from typing import Any

TEXT_PLAN = {  # styles of parallel/tensor.py
    "model.language_model": "stream",
    "model.language_model.embed_tokens": "embedding",
    "model.language_model.layers.*.self_attn": "attention",
    "model.language_model.layers.*.self_attn.q_proj": "colwise",
    "model.language_model.layers.*.self_attn.k_proj": "colwise",
    "model.language_model.layers.*.self_attn.v_proj": "colwise",
    "model.language_model.layers.*.self_attn.o_proj": "rowwise",
    "model.language_model.layers.*.mlp": "mlp",
    "model.language_model.norm": "exit",
    "lm_head": "head",
}
DENSE_PLAN = {
    "model.language_model.layers.*.mlp.gate_proj": "colwise",
    "model.language_model.layers.*.mlp.up_proj": "colwise",
    "model.language_model.layers.*.mlp.down_proj": "rowwise",
}
FUSED_PLAN = {  # where gate and up are one layer
    "model.language_model.layers.*.mlp.gate_up_proj": "gated_colwise",
    "model.language_model.layers.*.mlp.down_proj": "rowwise",
}
EXPERTS_PLAN = {  # of experts cut over the tensor-parallel group, and of layers without any
    "model.language_model.layers.*.mlp.gate": "router",
    "model.language_model.layers.*.mlp.experts": "experts",
    **{f"{name}?": style for name, style in DENSE_PLAN.items()},
}
LATENT_PLAN = {  # of attention with latent keys and values: latents are whole on every rank
    "model.language_model.layers.*.self_attn.q_b_proj": "colwise",
    "model.language_model.layers.*.self_attn.kv_b_proj": "colwise",
}
SPREAD_PLAN = {  # of experts spread over the expert-parallel group: styles of parallel/expert.py
    "model.language_model.layers.*.mlp.gate": "router",
    "model.language_model.layers.*.mlp.experts": "dispatch",
}


SHARED_PLAN = {  # of experts that every token meets
    name.replace(".mlp.", ".mlp.shared_experts."): style for name, style in DENSE_PLAN.items()
}
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


def experts(text: Any) -> int:
    """Experts of each sparse layer; 0 without any."""
    return next((n for n in (getattr(text, key, 0) for key in COUNTS) if n), 0)


def sparse_layers(text: Any) -> int:
    """Layers that have experts."""
    if not experts(text):
        return 0
    dense, step = getattr(text, "mlp_only_layers", ()), getattr(text, "decoder_sparse_step", 1)
    first = getattr(text, "first_k_dense_replace", 0)
    return sum(i not in dense and (i + 1) % step == 0 for i in range(first, text.num_hidden_layers))


def attention(text: Any) -> tuple[int, float]:
    """Of one layer: (weights, twice the width over which queries meet keys and values)."""
    width, heads = text.hidden_size, text.num_attention_heads
    if getattr(text, "kv_lora_rank", None) and getattr(text, "use_mla", True):
        keys, values = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
        latent, rank = text.kv_lora_rank, text.q_lora_rank
        weights = width * (latent + text.qk_rope_head_dim) + width * heads * values
        weights += latent * heads * (text.qk_nope_head_dim + values)
        weights += rank * (width + heads * keys) if rank else width * heads * keys
        return weights, float(heads * (keys + values))
    head_dim = getattr(text, "head_dim", None) or width // heads
    queries, keys = heads * head_dim, text.num_key_value_heads * head_dim
    return width * (2 * queries + 2 * keys), 2.0 * queries


def costs(text: Any, tokens: int, trained: int) -> tuple[float, float]:
    """Forward FLOPs of (all layers, the head): two a weight and token, and causal attention."""
    width, sparse = text.hidden_size, sparse_layers(text)
    each, met = attention(text)
    weights = text.num_hidden_layers * each
    weights += 3 * width * text.intermediate_size * (text.num_hidden_layers - sparse)
    if sparse:
        used = text.num_experts_per_tok + (getattr(text, "n_shared_experts", None) or 0)
        weights += width * (3 * text.moe_intermediate_size * used + experts(text)) * sparse
    causal = text.num_hidden_layers * met * float(tokens) ** 2  # half of what all pairs would take
    return 2.0 * tokens * weights + causal, 2.0 * trained * width * text.vocab_size
