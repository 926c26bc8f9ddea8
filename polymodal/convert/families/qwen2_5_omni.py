"""Qwen2.5-Omni: the thinker as Qwen2.5-VL with an audio tower; talker and codec are not part of the tree."""

from __future__ import annotations

from typing import Any

from polymodal.convert.families.decoder import TIE, decoder
from polymodal.convert.families.qwen2_vl import TOWERS, vision
from polymodal.convert.family import Family, attention
from polymodal.convert.operations import COLUMNS, ROWS, Facts, QueryGroups
from polymodal.convert.table import Table, Tower, row

HUB = "thinker.audio_tower"
LAYER = HUB + ".layers.{n}"
AUDIO = "audio_encoder.encoder.blocks.layers.{n}"
OUTER = ("conv1.{p}", "conv2.{p}", "audio_bos_eos_token.weight", "ln_post.{p}", "proj.{p}")

AUDIO_ROWS = (
    *(row(f"{HUB}.{name}", f"audio_encoder.encoder.{name}") for name in OUTER),
    row(
        [f"{LAYER}.self_attn.{x}_proj.weight" for x in "qkv"], f"{AUDIO}.self_attention.linear_qkv.weight",
        QueryGroups("audio_heads", "audio_heads"), ROWS,
    ),
    row(
        [f"{LAYER}.self_attn.{x}_proj.bias" for x in "qv"], f"{AUDIO}.self_attention.linear_qkv.bias",
        QueryGroups("audio_heads", "audio_heads", without_key=True), ROWS,
    ),
    row(f"{LAYER}.self_attn.out_proj.weight", f"{AUDIO}.self_attention.linear_proj.weight", cut=COLUMNS),
    row(f"{LAYER}.self_attn.out_proj.bias", f"{AUDIO}.self_attention.linear_proj.bias"),
    row(f"{LAYER}.self_attn_layer_norm.{{p}}", f"{AUDIO}.input_layernorm.{{p}}"),
    row(f"{LAYER}.final_layer_norm.{{p}}", f"{AUDIO}.pre_mlp_layernorm.{{p}}"),
    row(f"{LAYER}.fc1.{{p}}", f"{AUDIO}.mlp.linear_fc1.{{p}}", cut=ROWS),
    row(f"{LAYER}.fc2.weight", f"{AUDIO}.mlp.linear_fc2.weight", cut=COLUMNS),
    row(f"{LAYER}.fc2.bias", f"{AUDIO}.mlp.linear_fc2.bias"),
)  # fmt: skip
TOWER = Tower(
    "audio", "audio_encoder.encoder.blocks.layers.",
    ("audio_encoder.encoder.conv", "audio_encoder.encoder.audio_bos_eos_token."),
    ("audio_encoder.encoder.proj.", "audio_encoder.encoder.ln_post."), "audio_encoder.", "audio_layers",
)  # fmt: skip


def facts(config: dict[str, Any]) -> Facts:
    thinker = config.get("thinker_config", config)
    text, vision_config, audio = (thinker[f"{name}_config"] for name in ("text", "vision", "audio"))
    return {
        **attention(text),
        "vision_heads": int(vision_config["num_heads"]),
        "vision_layers": int(vision_config["depth"]),
        "audio_heads": int(audio["encoder_attention_heads"]),
        "audio_layers": int(audio["encoder_layers"]),
        "tied": int(bool(text.get("tie_word_embeddings", False))),
    }


QWEN2_5_OMNI = Family(
    "qwen2.5-omni",
    "Qwen2.5-Omni",
    {
        "": Table(
            (
                *vision("thinker.visual", split=True),
                *decoder("thinker.model", "thinker.lm_head"),
                *AUDIO_ROWS,
            ),
            (*TOWERS, TOWER),
            TIE,
            "thinker.lm_head.weight",
            keep=("talker.{x}", "token2wav.{x}"),
        )
    },
    (
        "Qwen2_5OmniModel",
        "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "qwen2_5_omni",
        "qwen2_5_omni_thinker",
    ),
    facts,
)
