"""Qwen2-VL and Qwen2.5-VL: Megatron names with fused q/k/v and gate/up, or (canonical) with each by itself."""

from __future__ import annotations

from typing import Any

from polymodal.convert.families.decoder import LLM, TIE, TOWER, decoder, layers, outer, vit
from polymodal.convert.family import Family, attention, section
from polymodal.convert.operations import COLUMNS, GLU, ROWS, Concatenate, Facts, QueryGroups
from polymodal.convert.table import Row, Table, row

VIT = "image_encoder.encoder.blocks.layers.{n}"
VISUAL_QKV = QueryGroups("vision_heads", "vision_heads", fused=True)

TOWERS = (vit(), TOWER)


def language(hub: str, head: str) -> tuple[Row, ...]:
    """Rows of a Qwen2 language model with each of q, k, v, gate and up by itself."""
    layer = f"{hub}.layers.{{n}}"
    attention = tuple(
        row(f"{layer}.self_attn.{x}_proj.{{p}}", f"{LLM}.self_attention.{x}_proj.{{p}}", cut=ROWS)
        for x in "qkv"
    )
    mlp = (
        *(
            row(f"{layer}.mlp.{x}_proj.weight", f"{LLM}.mlp.{x}_proj.weight", cut=ROWS)
            for x in ("gate", "up")
        ),
        row(f"{layer}.mlp.down_proj.weight", f"{LLM}.mlp.linear_fc2.weight", cut=COLUMNS),
    )
    return (*outer(hub, head), *layers(layer, attention, mlp))


def vision(
    hub: str = "visual", fused: bool = True, gated: bool = True, split: bool = False
) -> tuple[Row, ...]:
    """Rows of the vision tower. gated: its MLP is gate/up/down (2.5), not fc1/fc2; split: q, k, v lie apart on the hub."""
    block = hub + ".blocks.{n}"
    down = "down_proj" if gated else "fc2"
    mlp: tuple[Row, ...] = (
        row(f"{block}.mlp.{down}.weight", f"{VIT}.mlp.linear_fc2.weight", cut=COLUMNS),
        row(f"{block}.mlp.{down}.bias", f"{VIT}.mlp.linear_fc2.bias"),
    )
    if not gated:
        mlp = (row(f"{block}.mlp.fc1.{{p}}", f"{VIT}.mlp.linear_fc1.{{p}}", cut=ROWS), *mlp)
    elif fused:
        both = [f"{block}.mlp.{x}_proj.{{p}}" for x in ("gate", "up")]
        mlp = (row(both, f"{VIT}.mlp.linear_fc1.{{p}}", Concatenate(), GLU), *mlp)
    else:
        apart = ((f"{block}.mlp.{x}_proj.{{p}}", f"{VIT}.mlp.{x}_proj.{{p}}") for x in ("gate", "up"))
        mlp = (*(row(hub_name, ours, cut=ROWS) for hub_name, ours in apart), *mlp)
    qkv = f"{VIT}.self_attention.linear_qkv.{{p}}"
    if split:
        attention_row = row(
            [f"{block}.attn.{x}.{{p}}" for x in "qkv"], qkv, QueryGroups("vision_heads", "vision_heads"), ROWS
        )
    elif fused:
        attention_row = row(f"{block}.attn.qkv.{{p}}", qkv, VISUAL_QKV, ROWS)
    else:
        attention_row = row(f"{block}.attn.qkv.{{p}}", qkv, cut=ROWS)
    return (
        row(f"{hub}.patch_embed.proj.{{p}}", "image_encoder.encoder.patch_embed.proj.{p}"),
        row(f"{block}.norm1.{{p}}", f"{VIT}.input_layernorm.{{p}}"),
        attention_row,
        row(f"{block}.attn.proj.weight", f"{VIT}.self_attention.linear_proj.weight", cut=COLUMNS),
        row(f"{block}.attn.proj.bias", f"{VIT}.self_attention.linear_proj.bias"),
        row(f"{block}.norm2.{{p}}", f"{VIT}.pre_mlp_layernorm.{{p}}"),
        *mlp,
        row(f"{hub}.merger.ln_q.{{p}}", "image_encoder.projector.layernorm.{p}"),
        row(f"{hub}.merger.mlp.0.{{p}}", "image_encoder.projector.encoder.linear_fc1.{p}", cut=ROWS),
        row(f"{hub}.merger.mlp.2.weight", "image_encoder.projector.encoder.linear_fc2.weight", cut=COLUMNS),
        row(f"{hub}.merger.mlp.2.bias", "image_encoder.projector.encoder.linear_fc2.bias"),
    )


def facts(config: dict[str, Any]) -> Facts:
    text = section(config, "text_config")
    vision_config = config["vision_config"]
    return {
        **attention(text),
        "vision_heads": int(vision_config["num_heads"]),
        "vision_layers": int(vision_config["depth"]),
        "tied": int(bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))),
    }


def _table(fused: bool, gated: bool) -> Table:
    text = decoder if fused else language
    return Table(
        (*vision(fused=fused, gated=gated), *text("model", "lm_head")), TOWERS, TIE, "lm_head.weight"
    )


QWEN2_VL = Family(
    "qwen2-vl", "Qwen2-VL", {"": _table(True, False), "canonical": _table(False, False)},
    ("Qwen2VLForConditionalGeneration", "qwen2_vl"), facts,
)  # fmt: skip
QWEN2_5_VL = Family(
    "qwen2.5-vl", "Qwen2.5-VL", {"": _table(True, True), "canonical": _table(False, True)},
    ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"), facts,
)  # fmt: skip
