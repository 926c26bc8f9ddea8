"""Qwen3-VL, dense and with experts: Megatron names with fused q/k/v and gate/up, one tensor an expert; and DCP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.convert.families.decoder import LLM, TIE, TOWER, decoder, vit
from polymodal.convert.family import Family, attention
from polymodal.convert.operations import (
    COLUMNS,
    GLU,
    ROWS,
    Facts,
    QueryGroups,
    Shape,
    Unstack,
)
from polymodal.convert.table import Row, Table, row

TEXT = "model.language_model.layers.{n}"
BLOCK = "model.visual.blocks.{n}"
VIT = "image_encoder.encoder.blocks.layers.{n}"
TOWERS = (
    vit(first=("image_encoder.encoder.patch_embed.", "image_encoder.encoder.pos_embed.")),
    TOWER,
)


def _merger(hub: str, layernorm: str, linear: str) -> tuple[Row, ...]:
    return (
        row(f"{hub}.norm.{{p}}", f"{layernorm}.{{p}}"),
        row(f"{hub}.linear_fc1.{{p}}", f"{linear}.linear_fc1.{{p}}", cut=ROWS),
        row(f"{hub}.linear_fc2.weight", f"{linear}.linear_fc2.weight", cut=COLUMNS),
        row(f"{hub}.linear_fc2.bias", f"{linear}.linear_fc2.bias"),
    )


VISION = (
    row("model.visual.patch_embed.proj.{p}", "image_encoder.encoder.patch_embed.proj.{p}"),
    row("model.visual.pos_embed.weight", "image_encoder.encoder.pos_embed.weight"),
    row(f"{BLOCK}.norm1.{{p}}", f"{VIT}.input_layernorm.{{p}}"),
    row(f"{BLOCK}.norm2.{{p}}", f"{VIT}.pre_mlp_layernorm.{{p}}"),
    row(
        f"{BLOCK}.attn.qkv.{{p}}",
        f"{VIT}.self_attention.linear_qkv.{{p}}",
        QueryGroups("vision_heads", "vision_heads", fused=True),
        ROWS,
    ),
    row(f"{BLOCK}.attn.proj.weight", f"{VIT}.self_attention.linear_proj.weight", cut=COLUMNS),
    row(f"{BLOCK}.attn.proj.bias", f"{VIT}.self_attention.linear_proj.bias"),
    row(f"{BLOCK}.mlp.linear_fc1.{{p}}", f"{VIT}.mlp.linear_fc1.{{p}}", cut=ROWS),
    row(f"{BLOCK}.mlp.linear_fc2.weight", f"{VIT}.mlp.linear_fc2.weight", cut=COLUMNS),
    row(f"{BLOCK}.mlp.linear_fc2.bias", f"{VIT}.mlp.linear_fc2.bias"),
    *_merger("model.visual.merger", "image_encoder.projector.layernorm", "image_encoder.projector.encoder"),
)
EXPERT = f"{LLM}.mlp.experts.local_experts.{{e}}"
LANGUAGE = (
    *decoder("model.language_model", "lm_head"),
    *(row(f"{TEXT}.self_attn.{x}_norm.weight", f"{LLM}.self_attention.{x}_layernorm.weight") for x in "qk"),
    row(f"{TEXT}.mlp.gate.weight", f"{LLM}.mlp.router.weight"),
    row(f"{TEXT}.mlp.experts.gate_up_proj", f"{EXPERT}.linear_fc1.weight", Unstack(), GLU),
    row(f"{TEXT}.mlp.experts.down_proj", f"{EXPERT}.linear_fc2.weight", Unstack(), COLUMNS),
)


def seen(facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Published experts are [experts, in, out]; recent versions of the library save [experts, out, in]."""
    found = next((shape for key, shape in shapes.items() if key.endswith("experts.down_proj")), None)
    if found is None:
        return facts
    return {**facts, "as_linear": int(found[2] != facts["hidden"] and found[1] == facts["hidden"])}


def table(facts: Facts) -> Table:
    """The table of a config: which vision layers feed the language model is a number of the config."""
    deepstack: list[Row] = []
    for at in range(facts.get("deepstack", 0)):
        inside = f"image_encoder.encoder.blocks.layers.{facts[f'deepstack.{at}']}.deepstack_layer"
        deepstack += _merger(
            f"model.visual.deepstack_merger_list.{at}", f"{inside}.layernorm", f"{inside}.encoder"
        )
    return Table((*deepstack, *VISION, *LANGUAGE), TOWERS, TIE, "lm_head.weight", seen=seen)


def facts(config: dict[str, Any]) -> Facts:
    text, vision = config["text_config"], config["vision_config"]
    indexes = vision.get("deepstack_visual_indexes") or []
    return {
        **attention(text),
        "hidden": int(text["hidden_size"]),
        "experts": int(text.get("num_experts") or text.get("num_local_experts") or 0),
        "vision_heads": int(vision["num_heads"]),
        "vision_layers": int(vision["depth"]),
        "deepstack": len(indexes),
        **{f"deepstack.{at}": int(layer) for at, layer in enumerate(indexes)},
        "tied": int(bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))),
    }


ARCHITECTURES = (
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "qwen3_vl",
    "qwen3_vl_moe",
)
QWEN3_VL = Family("qwen3-vl", "Qwen3-VL", {"": table}, ARCHITECTURES, facts)
