"""Key lists and shapes of published checkpoints whose classes the libraries lack, and of original codes' files."""

from __future__ import annotations

from typing import Any


def _both(name: str, rows: int, columns: int | None = None) -> dict[str, tuple[int, ...]]:
    """weight and bias of a linear layer; without columns, of a norm."""
    return {f"{name}.weight": (rows,) if columns is None else (rows, columns), f"{name}.bias": (rows,)}


def _one(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {name: shape}


def internvl_chat(
    internlm2: bool = False, heads: int = 5, layers: int = 3, experts: int = 0
) -> dict[str, tuple[int, ...]]:
    """OpenGVLab's InternVLChatModel."""
    keys: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, 40), "vision_model.embeddings.position_embedding": (1, 17, 40),
        **_both("mlp1.0", 160), **_both("mlp1.1", 32, 160), **_both("mlp1.3", 32, 32),
    }  # fmt: skip
    keys |= {
        "vision_model.embeddings.patch_embedding.weight": (40, 3, 4, 4),
        "vision_model.embeddings.patch_embedding.bias": (40,),
    }
    for n in range(4):
        block = f"vision_model.encoder.layers.{n}"
        keys |= {
            f"{block}.ls1": (40,),
            f"{block}.ls2": (40,),
            f"{block}.attn.q_norm.weight": (40,),
            f"{block}.attn.k_norm.weight": (40,),
        }
        for name, rows, columns in (
            ("attn.qkv", 120, 40),
            ("attn.proj", 40, 40),
            ("mlp.fc1", 48, 40),
            ("mlp.fc2", 40, 48),
        ):
            keys |= _both(f"{block}.{name}", rows, columns)
        keys |= {**_both(f"{block}.norm1", 40), **_both(f"{block}.norm2", 40)}
    model = "language_model.model"
    for n in range(layers):
        block = f"{model}.layers.{n}"
        if internlm2:
            keys |= _one(f"{block}.attention.wqkv.weight", 64, 32) | _one(
                f"{block}.attention.wo.weight", 32, 32
            )
            keys |= _one(f"{block}.feed_forward.w1.weight", 48, 32) | _one(
                f"{block}.feed_forward.w3.weight", 48, 32
            )
            keys |= (
                _one(f"{block}.feed_forward.w2.weight", 32, 48)
                | _one(f"{block}.attention_norm.weight", 32)
                | _one(f"{block}.ffn_norm.weight", 32)
            )
            continue
        keys |= _one(f"{block}.input_layernorm.weight", 32) | _one(
            f"{block}.post_attention_layernorm.weight", 32
        )
        keys |= _one(f"{block}.self_attn.q_proj.weight", 32, 32) | _one(
            f"{block}.self_attn.o_proj.weight", 32, 32
        )
        keys |= _one(f"{block}.self_attn.k_proj.weight", 16, 32) | _one(
            f"{block}.self_attn.v_proj.weight", 16, 32
        )
        for e in range(experts):
            keys |= expert(f"{block}.mlp.experts.{e}", 32, 12)
        keys |= (
            expert(f"{block}.mlp", 32, 48) if not experts else _one(f"{block}.mlp.gate.weight", experts, 32)
        )
    names = ("tok_embeddings", "output") if internlm2 else ("embed_tokens", "lm_head")
    return (
        keys
        | _one(f"{model}.{names[0]}.weight", 67, 32)
        | _one(f"{model}.norm.weight", 32)
        | _one(f"language_model.{names[1]}.weight", 67, 32)
    )


def expert(name: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    up = {f"{name}.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
    return up | {f"{name}.down_proj.weight": (hidden, inner)}


def chat_config(internlm2: bool = False, experts: int = 0) -> dict[str, Any]:
    name = "InternLM2ForCausalLM" if internlm2 else "Qwen2ForCausalLM"
    text = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "architectures": [name],
        "tie_word_embeddings": False,
        "num_experts": experts,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "llm_config": text,
        "vision_config": {"num_attention_heads": 5, "num_hidden_layers": 4},
    }


def deepseek(latent: bool) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {
        **_one("image_newline", 32), **_one("view_seperator", 32), **_one("vision.pos_embed", 1, 17, 24),
        **_both("projector.layers.0", 32, 96), **_both("projector.layers.2", 32, 32), **_both("vision.norm", 24),
        **_one("vision.attn_pool.latent", 1, 1, 24), **_both("vision.attn_pool.kv", 48, 24),
        "vision.patch_embed.proj.weight": (24, 3, 4, 4), "vision.patch_embed.proj.bias": (24,),
        **_one("language.model.embed_tokens.weight", 64, 32), **_one("language.model.norm.weight", 32), **_one("language.lm_head.weight", 64, 32),
    }  # fmt: skip
    for n in range(4):
        for name, rows, columns in (
            ("attn.qkv", 72, 24),
            ("attn.proj", 24, 24),
            ("mlp.fc1", 48, 24),
            ("mlp.fc2", 24, 48),
        ):
            keys |= _both(f"vision.blocks.{n}.{name}", rows, columns)
        keys |= {**_both(f"vision.blocks.{n}.norm1", 24), **_both(f"vision.blocks.{n}.norm2", 24)}
    for n in range(4):
        block = f"language.model.layers.{n}"
        keys |= _one(f"{block}.input_layernorm.weight", 32) | _one(
            f"{block}.post_attention_layernorm.weight", 32
        )
        if latent:
            keys |= _one(f"{block}.self_attn.q_a_proj.weight", 12, 32) | _one(
                f"{block}.self_attn.q_a_layernorm.weight", 12
            )
            keys |= _one(f"{block}.self_attn.q_b_proj.weight", 48, 12)
        else:
            keys |= _one(f"{block}.self_attn.q_proj.weight", 48, 32)
        keys |= _one(f"{block}.self_attn.kv_a_proj_with_mqa.weight", 20, 32) | _one(
            f"{block}.self_attn.kv_a_layernorm.weight", 16
        )
        keys |= _one(f"{block}.self_attn.kv_b_proj.weight", 64, 16) | _one(
            f"{block}.self_attn.o_proj.weight", 32, 32
        )
        if n == 0:
            keys |= expert(f"{block}.mlp", 32, 48)
            continue
        keys |= expert(f"{block}.mlp.shared_experts", 32, 16) | _one(f"{block}.mlp.gate.weight", 4, 32)
        keys |= _one(f"{block}.mlp.gate.e_score_correction_bias", 4) if latent else {}
        for e in range(4):
            keys |= expert(f"{block}.mlp.experts.{e}", 32, 8)
    return keys


def deepseek_config(latent: bool) -> dict[str, Any]:
    text = {
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4, "n_routed_experts": 4, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "kv_lora_rank": 16, "q_lora_rank": 12 if latent else None, "tie_word_embeddings": False,
    }  # fmt: skip
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "language_config": text,
        "vision_config": {"layers": 4},
    }


def open_sora_plan_15() -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {
        **_both("norm_out.linear", 64, 32),
        **_both("proj_out", 8, 32),
        **_both("patch_embed.proj", 32, 16),
    }
    for n, count in enumerate((1, 2, 1)):
        for m in range(count):
            block = f"transformer_blocks.{n}.{m}"
            for x in (
                "to_q",
                "to_k",
                "to_v",
                "add_q_proj",
                "add_k_proj",
                "add_v_proj",
                "to_out.0",
                "to_add_out",
            ):
                keys |= _both(f"{block}.attn1.{x}", 32, 32)
            for x in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                keys |= _one(f"{block}.attn1.{x}.weight", 8)
            for x in ("ff", "ff_enc"):
                keys |= _one(f"{block}.{x}.net.0.proj.weight", 64, 32) | _one(
                    f"{block}.{x}.net.2.weight", 32, 64
                )
            keys |= {**_both(f"{block}.norm1.linear", 96, 32), **_both(f"{block}.norm2.linear", 96, 32)}
    return keys


def _refiner(block: str, hidden: int) -> dict[str, tuple[int, ...]]:
    """A block of HunyuanVideo's text refiner."""
    keys = {**_both(f"{block}.norm1", hidden), **_both(f"{block}.norm2", hidden)}
    for name, rows, columns in (
        ("self_attn_qkv", 3 * hidden, hidden), ("self_attn_proj", hidden, hidden), ("mlp.fc1", 64, hidden),
        ("mlp.fc2", hidden, 64), ("adaLN_modulation.1", 2 * hidden, hidden),
    ):  # fmt: skip
        keys |= _both(f"{block}.{name}", rows, columns)
    return keys


def hunyuan(hidden: int = 32, inner: int = 48, singles: int = 3) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {
        **_both("vector_in.in_layer", hidden, 16), **_both("vector_in.out_layer", hidden, hidden), **_both("final_layer.linear", 8, hidden),
        **_both("final_layer.adaLN_modulation.1", 2 * hidden, hidden), **_both("img_in.proj", hidden, 16), **_both("txt_in.input_embedder", hidden, 16),
        **_both("txt_in.c_embedder.linear_1", hidden, 16), **_both("txt_in.c_embedder.linear_2", hidden, hidden),
        **_refiner("txt_in.individual_token_refiner.blocks.0", hidden),
    }  # fmt: skip
    for name in ("time_in", "guidance_in", "txt_in.t_embedder"):
        keys |= {**_both(f"{name}.mlp.0", hidden, 16), **_both(f"{name}.mlp.2", hidden, hidden)}
    for n in range(2):
        for s in ("img", "txt"):
            block = f"double_blocks.{n}.{s}"
            keys |= {
                **_both(f"{block}_mod.linear", 6 * hidden, hidden),
                **_both(f"{block}_attn_qkv", 3 * hidden, hidden),
                **_both(f"{block}_attn_proj", hidden, hidden),
            }
            keys |= {**_both(f"{block}_mlp.fc1", inner, hidden), **_both(f"{block}_mlp.fc2", hidden, inner)}
            keys |= _one(f"{block}_attn_q_norm.weight", 8) | _one(f"{block}_attn_k_norm.weight", 8)
    for n in range(singles):
        block = f"single_blocks.{n}"
        keys |= {
            **_both(f"{block}.linear1", 3 * hidden + inner, hidden),
            **_both(f"{block}.linear2", hidden, hidden + inner),
        }
        keys |= {
            **_both(f"{block}.modulation.linear", 3 * hidden, hidden),
            **_one(f"{block}.q_norm.weight", 8),
            **_one(f"{block}.k_norm.weight", 8),
        }
    return keys


def hunyuan_15(layers: int, refiners: int) -> set[str]:
    """Names of HunyuanVideo 1.5 as its original code saves it."""
    linear = [
        "img_in.proj", "txt_in.input_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1", "byt5_in.layernorm",
        *(f"byt5_in.fc{k}" for k in (1, 2, 3)), *(f"vision_in.proj.{k}" for k in (0, 1, 3, 4)),
        *(f"{name}.mlp.{k}" for name in ("time_in", "txt_in.t_embedder") for k in (0, 2)),
        *(f"txt_in.c_embedder.linear_{k}" for k in (1, 2)),
    ]  # fmt: skip
    for n in range(layers):
        for s in ("img", "txt"):
            parts = (*(f"attn_{x}" for x in "qkv"), "attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear")
            linear += [f"double_blocks.{n}.{s}_{part}" for part in parts]
    norms = [
        f"double_blocks.{n}.{s}_attn_{x}_norm" for n in range(layers) for s in ("img", "txt") for x in "qk"
    ]
    names = {f"{name}.{leaf}" for name in linear for leaf in ("weight", "bias")}
    for n in range(refiners):
        names |= _refiner(f"txt_in.individual_token_refiner.blocks.{n}", 1).keys()
    return names | {f"{name}.weight" for name in norms} | {"cond_type_embedding.weight"}


def sat() -> dict[str, tuple[int, ...]]:
    """CogVideoX as its original code saves it."""
    root = "model.diffusion_model"
    mixins = f"{root}.mixins"
    keys: dict[str, tuple[int, ...]] = {
        **_both(f"{root}.time_embed.0", 16, 32), **_both(f"{root}.time_embed.2", 16, 16), **_both(f"{mixins}.patch_embed.text_proj", 32, 16),
        f"{mixins}.patch_embed.proj.weight": (32, 4, 2, 2), f"{mixins}.patch_embed.proj.bias": (32,), **_one(f"{mixins}.pos_embed.freqs_cos", 9, 8),
        **_both(f"{root}.transformer.final_layernorm", 32), **_both(f"{mixins}.final_layer.norm_final", 32), **_both(f"{mixins}.final_layer.linear", 16, 32),
        **_both(f"{mixins}.final_layer.adaLN_modulation.1", 64, 16),
    }  # fmt: skip
    for n in range(5):
        layer, ada = f"{root}.transformer.layers.{n}", f"{mixins}.adaln_layer"
        for name, rows, columns in (
            ("attention.query_key_value", 96, 32),
            ("attention.dense", 32, 32),
            ("mlp.dense_h_to_4h", 64, 32),
            ("mlp.dense_4h_to_h", 32, 64),
        ):
            keys |= _both(f"{layer}.{name}", rows, columns)
        keys |= {
            **_both(f"{layer}.input_layernorm", 32),
            **_both(f"{layer}.post_attention_layernorm", 32),
            **_both(f"{ada}.adaLN_modulations.{n}.1", 384, 16),
        }
        keys |= {**_both(f"{ada}.query_layernorm_list.{n}", 8), **_both(f"{ada}.key_layernorm_list.{n}", 8)}
    return keys


def bagel() -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {
        **_both("connector.fc1", 16, 24), **_both("connector.fc2", 16, 16), **_both("llm2vae", 8, 16), **_both("vae2llm", 16, 8),
        **_both("time_embedder.mlp.0", 16, 8), **_both("time_embedder.mlp.2", 16, 16), **_one("latent_pos_embed.pos_embed", 9, 16),
        **_one("vit_pos_embed.pos_embed", 9, 16), **_one("language_model.lm_head.weight", 40, 16), **_one("language_model.model.embed_tokens.weight", 40, 16),
        **_one("language_model.model.norm.weight", 16), **_one("language_model.model.norm_moe_gen.weight", 16),
        **_both("vit_model.vision_model.embeddings.patch_embedding", 24, 48), **_one("vit_model.vision_model.embeddings.position_embedding.weight", 9, 24),
        **_both("vit_model.vision_model.post_layernorm", 24),
    }  # fmt: skip
    for n in range(2):
        for x in ("", "_moe_gen"):
            keys |= _both(f"language_model.model.layers.{n}.self_attn.q_proj{x}", 16, 16) | expert(
                f"language_model.model.layers.{n}.mlp{x}", 16, 24
            )
        block = f"vit_model.vision_model.encoder.layers.{n}"
        keys |= {
            **_both(f"{block}.layer_norm1", 24),
            **_both(f"{block}.self_attn.out_proj", 24, 24),
            **_both(f"{block}.mlp.fc1", 32, 24),
        }
    return keys


def vace_original() -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {
        **_both("text_embedding.0", 24, 16), **_both("text_embedding.2", 24, 24), **_both("time_embedding.0", 24, 16), **_both("time_projection.1", 144, 24),
        **_both("head.head", 16, 24), **_one("head.modulation", 1, 2, 24), "patch_embedding.weight": (24, 4, 1, 2, 2), "patch_embedding.bias": (24,),
        "vace_patch_embedding.weight": (24, 8, 1, 2, 2), "vace_patch_embedding.bias": (24,),
    }  # fmt: skip
    for blocks in ("blocks", "vace_blocks"):
        for n in range(2):
            block = f"{blocks}.{n}"
            for a in ("self_attn", "cross_attn"):
                for x in "qkvo":
                    keys |= _both(f"{block}.{a}.{x}", 24, 24)
                keys |= _one(f"{block}.{a}.norm_q.weight", 24) | _one(f"{block}.{a}.norm_k.weight", 24)
            keys |= {
                **_both(f"{block}.ffn.0", 32, 24),
                **_both(f"{block}.ffn.2", 24, 32),
                **_both(f"{block}.norm3", 24),
                **_one(f"{block}.modulation", 1, 6, 24),
            }
            if blocks == "vace_blocks":
                keys |= _both(f"{block}.after_proj", 24, 24) | (
                    _both(f"{block}.before_proj", 24, 24) if n == 0 else {}
                )
    return keys
