"""GLM-4.1V: vision attention and merger as on the hub, Megatron names for the rest."""

from __future__ import annotations

from typing import Any

from polymodal.convert.families.decoder import LLM, TIE, TOWER, fused_attention, layers, outer, vit
from polymodal.convert.family import Family, attention, section
from polymodal.convert.operations import COLUMNS, GLU, Concatenate, Facts
from polymodal.convert.table import Table, row

BLOCK = "model.visual.blocks.{n}"
VIT = "image_encoder.encoder.blocks.layers.{n}"
TEXT = "model.language_model.layers.{n}"
MLP = (
    row(f"{TEXT}.mlp.gate_up_proj.weight", f"{LLM}.mlp.linear_fc1.weight", cut=GLU),
    row(f"{TEXT}.mlp.down_proj.weight", f"{LLM}.mlp.linear_fc2.weight", cut=COLUMNS),
)
NORMS = {
    "input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm",
    "post_self_attn_layernorm": "post_self_attn_layernorm", "post_mlp_layernorm": "post_mlp_layernorm",
}  # fmt: skip

ROWS_OF = (
    row("model.visual.patch_embed.proj.{p}", "image_encoder.encoder.patch_embed.proj.{p}"),
    row("model.visual.post_conv_layernorm.{p}", "image_encoder.encoder.post_conv_layernorm.{p}"),
    row(
        "model.visual.embeddings.position_embedding.weight",
        "image_encoder.encoder.embeddings.position_embedding.weight",
    ),
    row(f"{BLOCK}.attn.qkv.{{p}}", f"{VIT}.self_attention.qkv.{{p}}"),
    row(f"{BLOCK}.attn.proj.{{p}}", f"{VIT}.self_attention.proj.{{p}}"),
    row(
        [f"{BLOCK}.mlp.{x}_proj.{{p}}" for x in ("gate", "up")],
        f"{VIT}.mlp.linear_fc1.{{p}}",
        Concatenate(),
        GLU,
    ),
    row(f"{BLOCK}.mlp.down_proj.weight", f"{VIT}.mlp.linear_fc2.weight", cut=COLUMNS),
    row(f"{BLOCK}.mlp.down_proj.bias", f"{VIT}.mlp.linear_fc2.bias"),
    row(f"{BLOCK}.norm1.{{p}}", f"{VIT}.input_layernorm.{{p}}"),
    row(f"{BLOCK}.norm2.{{p}}", f"{VIT}.pre_mlp_layernorm.{{p}}"),
    row("model.visual.post_layernorm.{p}", "image_encoder.encoder.blocks.final_layernorm.{p}"),
    row("model.visual.downsample.{p}", "image_encoder.encoder.downsample.{p}"),
    row("model.visual.merger.{x}", "image_encoder.projector.{x}"),
    *outer("model.language_model", "lm_head"),
    *layers(TEXT, fused_attention(TEXT), MLP, NORMS),
)
ENCODER = "image_encoder.encoder"
TOWERS = (
    vit(
        first=tuple(f"{ENCODER}.{name}." for name in ("patch_embed", "post_conv_layernorm", "embeddings")),
        last=(f"{ENCODER}.blocks.final_layernorm.", f"{ENCODER}.downsample."),
    ),
    TOWER,
)


def facts(config: dict[str, Any]) -> Facts:
    text = section(config, "text_config")
    return {
        **attention(text),
        "vision_layers": int(config["vision_config"]["depth"]),
        "tied": int(bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))),
    }


GLM4V = Family(
    "glm-4.1v",
    "GLM-4.1V",
    {"": Table(ROWS_OF, TOWERS, TIE, "lm_head.weight")},
    ("Glm4vForConditionalGeneration", "glm4v"),
    facts,
)
