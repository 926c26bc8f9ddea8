"""Qwen2-VL and Qwen2.5-VL: Megatron names with fused q/k/v and gate/up, or (canonical) with each by itself."""

from __future__ import annotations

from typing import Any

from polymodal.convert.family import Family, attention, section
from polymodal.convert.operations import COLUMNS, GLU, ROWS, Concatenate, Facts, QueryGroups
from polymodal.convert.table import Row, Table, Tower, row

VIT = "image_encoder.encoder.blocks.layers.{n}"
LLM = "text_decoder.decoder.layers.{n}"
VISUAL_QKV = QueryGroups("vision_heads", "vision_heads", fused=True)

TOWERS = (
    Tower(
        "vit", "image_encoder.encoder.blocks.layers.", ("image_encoder.encoder.patch_embed.",), ("image_encoder.projector.",),
        "image_encoder.", "vision_layers",
    ),
    Tower(
        "llm", "text_decoder.decoder.layers.", ("text_decoder.embedding.",),
        ("text_decoder.decoder.final_layernorm.", "text_decoder.output_layer."), "text_decoder.",
    ),
)  # fmt: skip
TIE = ("text_decoder.output_layer.weight", "text_decoder.embedding.word_embeddings.weight")


def language(hub: str = "model", head: str = "lm_head", fused: bool = True) -> tuple[Row, ...]:
    """Rows of a Qwen2 language model whose keys begin with `hub`."""
    layer = hub + ".layers.{n}"
    attention_rows: tuple[Row, ...]
    if fused:
        attention_rows = (
            row(
                [f"{layer}.self_attn.{x}_proj.{{p}}" for x in "qkv"],
                f"{LLM}.self_attention.linear_qkv.{{p}}",
                QueryGroups(),
                ROWS,
            ),
            row(
                [f"{layer}.mlp.{x}_proj.weight" for x in ("gate", "up")],
                f"{LLM}.mlp.linear_fc1.weight",
                Concatenate(),
                GLU,
            ),
        )
    else:
        attention_rows = (
            *(
                row(f"{layer}.self_attn.{x}_proj.{{p}}", f"{LLM}.self_attention.{x}_proj.{{p}}", cut=ROWS)
                for x in "qkv"
            ),
            *(
                row(f"{layer}.mlp.{x}_proj.weight", f"{LLM}.mlp.{x}_proj.weight", cut=ROWS)
                for x in ("gate", "up")
            ),
        )
    return (
        row(f"{hub}.embed_tokens.weight", "text_decoder.embedding.word_embeddings.weight", cut=ROWS),
        row(f"{layer}.input_layernorm.weight", f"{LLM}.input_layernorm.weight"),
        *attention_rows,
        row(f"{layer}.self_attn.o_proj.weight", f"{LLM}.self_attention.linear_proj.weight", cut=COLUMNS),
        row(f"{layer}.post_attention_layernorm.weight", f"{LLM}.pre_mlp_layernorm.weight"),
        row(f"{layer}.mlp.down_proj.weight", f"{LLM}.mlp.linear_fc2.weight", cut=COLUMNS),
        row(f"{hub}.norm.weight", "text_decoder.decoder.final_layernorm.weight"),
        row(f"{head}.weight", "text_decoder.output_layer.weight", cut=ROWS),
    )


def vision(
    hub: str = "visual", fused: bool = True, gated: bool = True, split: bool = False
) -> tuple[Row, ...]:
    """Rows of the vision tower. gated: its MLP is gate/up/down (2.5), not fc1/fc2; split: q, k, v lie apart on the hub."""
    block = hub + ".blocks.{n}"
    mlp: tuple[Row, ...]
    if not gated:
        mlp = (
            row(f"{block}.mlp.fc1.{{p}}", f"{VIT}.mlp.linear_fc1.{{p}}", cut=ROWS),
            row(f"{block}.mlp.fc2.weight", f"{VIT}.mlp.linear_fc2.weight", cut=COLUMNS),
            row(f"{block}.mlp.fc2.bias", f"{VIT}.mlp.linear_fc2.bias"),
        )
    else:
        down = (
            row(f"{block}.mlp.down_proj.weight", f"{VIT}.mlp.linear_fc2.weight", cut=COLUMNS),
            row(f"{block}.mlp.down_proj.bias", f"{VIT}.mlp.linear_fc2.bias"),
        )
        if fused:
            mlp = (
                row(
                    [f"{block}.mlp.{x}_proj.{{p}}" for x in ("gate", "up")],
                    f"{VIT}.mlp.linear_fc1.{{p}}",
                    Concatenate(),
                    GLU,
                ),
                *down,
            )
        else:
            mlp = (
                *(
                    row(f"{block}.mlp.{x}_proj.{{p}}", f"{VIT}.mlp.{x}_proj.{{p}}", cut=ROWS)
                    for x in ("gate", "up")
                ),
                *down,
            )
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
    return Table((*vision(fused=fused, gated=gated), *language(fused=fused)), TOWERS, TIE, "lm_head.weight")


QWEN2_VL = Family(
    "qwen2-vl", "Qwen2-VL", {"": _table(True, False), "canonical": _table(False, False)},
    ("Qwen2VLForConditionalGeneration", "qwen2_vl"), facts,
)  # fmt: skip
QWEN2_5_VL = Family(
    "qwen2.5-vl", "Qwen2.5-VL", {"": _table(True, True), "canonical": _table(False, True)},
    ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"), facts,
)  # fmt: skip
