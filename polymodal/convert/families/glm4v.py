"""GLM-4.1V: vision attention and merger as on the hub, Megatron names for the rest."""

from __future__ import annotations

from typing import Any

from polymodal.convert.families.qwen2_vl import LLM, TIE
from polymodal.convert.family import Family, attention, section
from polymodal.convert.operations import COLUMNS, GLU, ROWS, Concatenate, Facts, QueryGroups
from polymodal.convert.table import Table, Tower, row

BLOCK = "model.visual.blocks.{n}"
VIT = "image_encoder.encoder.blocks.layers.{n}"
TEXT = "model.language_model.layers.{n}"
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
    row("model.language_model.embed_tokens.weight", TIE[1], cut=ROWS),
    row(
        [f"{TEXT}.self_attn.{x}_proj.{{p}}" for x in "qkv"],
        f"{LLM}.self_attention.linear_qkv.{{p}}",
        QueryGroups(),
        ROWS,
    ),
    row(f"{TEXT}.self_attn.o_proj.weight", f"{LLM}.self_attention.linear_proj.weight", cut=COLUMNS),
    row(f"{TEXT}.mlp.gate_up_proj.weight", f"{LLM}.mlp.linear_fc1.weight", cut=GLU),
    row(f"{TEXT}.mlp.down_proj.weight", f"{LLM}.mlp.linear_fc2.weight", cut=COLUMNS),
    *(row(f"{TEXT}.{hub}.weight", f"{LLM}.{other}.weight") for hub, other in NORMS.items()),
    row("model.language_model.norm.weight", "text_decoder.decoder.final_layernorm.weight"),
    row("lm_head.weight", TIE[0], cut=ROWS),
)
TOWERS = (
    Tower(
        "vit", "image_encoder.encoder.blocks.layers.",
        ("image_encoder.encoder.patch_embed.", "image_encoder.encoder.post_conv_layernorm.", "image_encoder.encoder.embeddings."),
        ("image_encoder.projector.", "image_encoder.encoder.blocks.final_layernorm.", "image_encoder.encoder.downsample."),
        "image_encoder.", "vision_layers",
    ),
    Tower(
        "llm", "text_decoder.decoder.layers.", ("text_decoder.embedding.",),
        ("text_decoder.decoder.final_layernorm.", "text_decoder.output_layer."), "text_decoder.",
    ),
)  # fmt: skip


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
