"""DeepSeek-VL2: SigLIP as on the hub, a DeepSeek language model with latent attention and one tensor an expert."""

from __future__ import annotations

from typing import Any

from polymodal.convert.families.decoder import LLM, TIE, TOWER, gated, outer, vit
from polymodal.convert.family import Family
from polymodal.convert.operations import COLUMNS, ROWS, Concatenate, Facts
from polymodal.convert.table import Table, row

TEXT = "language.model.layers.{n}"
EXPERT = "mlp.experts.{e}"
LOCAL = f"{LLM}.mlp.experts.local_experts.{{e}}"

ENCODER = "image_encoder.encoder"
TOWERS = (
    vit(
        f"{ENCODER}.blocks.",
        (f"{ENCODER}.patch_embed.", f"{ENCODER}.pos_embed"),
        (f"{ENCODER}.norm.", f"{ENCODER}.attn_pool."),
    ),
    TOWER,
)


def table(facts: Facts) -> Table:
    """The table of a config: queries may come through a latent of their own."""
    shares = (facts.get("query_rows", 1), facts.get("latent_rows", 1))
    query = "q_a_proj" if facts.get("query_latent") else "q_proj"
    rows = (
        row("vision.blocks.{n}.{x}", "image_encoder.encoder.blocks.{n}.{x}"),
        row("vision.{x}", "image_encoder.encoder.{x}"),
        row("projector.{x}", "image_encoder.projector.{x}"),
        *(row(name, name) for name in ("image_newline", "view_seperator", "tile_indicators")),
        *outer("language.model", "language.lm_head"),
        row(f"{TEXT}.input_layernorm.weight", f"{LLM}.input_layernorm.weight"),
        row(f"{TEXT}.post_attention_layernorm.weight", f"{LLM}.pre_mlp_layernorm.weight"),
        row(
            [f"{TEXT}.self_attn.{query}.weight", f"{TEXT}.self_attn.kv_a_proj_with_mqa.weight"],
            f"{LLM}.self_attention.linear_qkv.weight", Concatenate(2, 0, shares),
        ),
        row(f"{TEXT}.self_attn.q_a_layernorm.weight", f"{LLM}.self_attention.q_layernorm.weight"),
        row(f"{TEXT}.self_attn.q_b_proj.weight", f"{LLM}.self_attention.linear_qb.weight", cut=ROWS),
        row(f"{TEXT}.self_attn.kv_a_layernorm.weight", f"{LLM}.self_attention.k_layernorm.weight"),
        row(f"{TEXT}.self_attn.kv_b_proj.{{p}}", f"{LLM}.self_attention.linear_kvb.{{p}}", cut=ROWS),
        row(f"{TEXT}.self_attn.o_proj.weight", f"{LLM}.self_attention.linear_proj.weight", cut=COLUMNS),
        row(f"{TEXT}.mlp.gate.weight", f"{LLM}.mlp.router.weight"),
        row(f"{TEXT}.mlp.gate.e_score_correction_bias", f"{LLM}.mlp.router.expert_bias"),
        *gated(TEXT, LOCAL, EXPERT),
        *(made for mlp in ("mlp.shared_experts", "mlp") for made in gated(TEXT, f"{LLM}.{mlp}", mlp)),
    )  # fmt: skip
    everywhere = ("image_newline", "view_seperator", "tile_indicators")
    return Table(rows, TOWERS, TIE, "language.lm_head.weight", everywhere=everywhere)


def facts(config: dict[str, Any]) -> Facts:
    text, vision = config["language_config"], config["vision_config"]
    heads = int(text["num_attention_heads"])
    nope, rope = int(text.get("qk_nope_head_dim") or 0), int(text.get("qk_rope_head_dim") or 0)
    latent = int(text.get("q_lora_rank") or 0)
    return {
        "layers": int(text["num_hidden_layers"]),
        "kv_heads": int(text.get("num_key_value_heads") or heads),
        "experts": int(text.get("n_routed_experts") or 0),
        "query_latent": latent,
        "query_rows": latent or heads * (nope + rope) or 1,
        "latent_rows": int(text.get("kv_lora_rank") or 0) + rope or 1,
        "vision_layers": int(vision["layers"]),
        "tied": int(bool(text.get("tie_word_embeddings", False))),
    }


DEEPSEEK_VL2 = Family(
    "deepseek-vl2", "DeepSeek-VL2", {"": table}, ("DeepseekVLV2ForCausalLM", "deepseek_vl_v2"), facts
)
