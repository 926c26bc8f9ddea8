"""InternVL 2, 2.5 and 3: InternViT with its attention as on the hub, and a Qwen2, Llama or InternLM2 language model.

Hub names are those of the published code (InternVLChatModel) or of the library (InternVLForConditionalGeneration).
"""

from __future__ import annotations

from typing import Any

from polymodal.convert.families.decoder import LLM, TIE, TOWER, decoder, vit
from polymodal.convert.family import Family, attention
from polymodal.convert.operations import COLUMNS, GLU, ROWS, Concatenate, Facts, Uneven
from polymodal.convert.table import Row, Table, row

VIT = "image_encoder.encoder.encoder.layers.{n}"
QKV = Uneven(0, 3, "vision_heads")
OUT = Uneven(1, 1, "vision_heads")
VOCABULARY = Uneven(0)
TOWERS = (
    vit("image_encoder.encoder.encoder.layers.", ("image_encoder.encoder.embeddings.",)),
    TOWER,
)


def _vision(layer: str, names: dict[str, str], fused: bool) -> tuple[Row, ...]:
    """names: ours -> the hub's, for what the two spellings call differently."""
    qkv = f"{VIT}.self_attention.linear_qkv.{{p}}"
    return (
        row(f"{layer}.{names['qkv']}.{{p}}", qkv, cut=QKV) if fused
        else row([f"{layer}.attention.{x}_proj.{{p}}" for x in "qkv"], qkv, Concatenate(3), QKV),
        *(row(f"{layer}.{names[f'{x}_norm']}.weight", f"{VIT}.self_attention.{x}_layernorm.weight") for x in "qk"),
        row(f"{layer}.{names['proj']}.weight", f"{VIT}.self_attention.linear_proj.weight", cut=OUT),
        row(f"{layer}.{names['proj']}.bias", f"{VIT}.self_attention.linear_proj.bias"),
        row(f"{layer}.mlp.fc1.{{p}}", f"{VIT}.mlp.linear_fc1.{{p}}", cut=ROWS),
        row(f"{layer}.mlp.fc2.weight", f"{VIT}.mlp.linear_fc2.weight", cut=COLUMNS),
        row(f"{layer}.mlp.fc2.bias", f"{VIT}.mlp.linear_fc2.bias"),
        row(f"{layer}.{names['norm1']}.{{p}}", f"{VIT}.input_layernorm.{{p}}"),
        row(f"{layer}.{names['norm2']}.{{p}}", f"{VIT}.pre_mlp_layernorm.{{p}}"),
        *(row(f"{layer}.{names[f'ls{x}']}", f"{VIT}.ls{x}") for x in (1, 2)),
    )  # fmt: skip


CHAT = {
    "qkv": "attn.qkv", "q_norm": "attn.q_norm", "k_norm": "attn.k_norm", "proj": "attn.proj", "norm1": "norm1",
    "norm2": "norm2", "ls1": "ls1", "ls2": "ls2",
}  # fmt: skip
LIBRARY = {
    "q_norm": "attention.q_norm", "k_norm": "attention.k_norm", "proj": "attention.projection_layer",
    "norm1": "layernorm_before", "norm2": "layernorm_after", "ls1": "lambda_1", "ls2": "lambda_2",
}  # fmt: skip


def _internlm2() -> tuple[Row, ...]:
    """wqkv lies query group by query group already."""
    layer = "language_model.model.layers.{n}"
    return (
        row("language_model.model.tok_embeddings.weight", TIE[1], cut=VOCABULARY),
        row(f"{layer}.attention.wqkv.weight", f"{LLM}.self_attention.linear_qkv.weight", cut=ROWS),
        row(f"{layer}.attention.wo.weight", f"{LLM}.self_attention.linear_proj.weight", cut=COLUMNS),
        row(
            [f"{layer}.feed_forward.{x}.weight" for x in ("w1", "w3")],
            f"{LLM}.mlp.linear_fc1.weight",
            Concatenate(),
            GLU,
        ),
        row(f"{layer}.feed_forward.w2.weight", f"{LLM}.mlp.linear_fc2.weight", cut=COLUMNS),
        row(f"{layer}.attention_norm.weight", f"{LLM}.input_layernorm.weight"),
        row(f"{layer}.ffn_norm.weight", f"{LLM}.pre_mlp_layernorm.weight"),
        row("language_model.model.norm.weight", "text_decoder.decoder.final_layernorm.weight"),
        row("language_model.output.weight", TIE[0], cut=VOCABULARY),
    )


def table(facts: Facts) -> Table:
    """The table of a config: two spellings of the hub's names, three language models."""
    if facts.get("library"):
        rows = (
            *(row(f"vision_tower.embeddings.{hub}", f"image_encoder.encoder.embeddings.{ours}") for hub, ours in (
                ("cls_token", "class_embedding"), ("position_embeddings", "position_embedding"),
                ("patch_embeddings.projection.{p}", "patch_embedding.{p}"),
            )),
            *_vision("vision_tower.encoder.layer.{n}", LIBRARY, False),
            *(row(f"multi_modal_projector.{hub}.{{p}}", f"image_encoder.projector.{ours}.{{p}}") for hub, ours in (
                ("layer_norm", "norm"), ("linear_1", "linear_fc1"), ("linear_2", "linear_fc2"),
            )),
            *decoder("language_model.model", "language_model.lm_head", VOCABULARY),
        )  # fmt: skip
        return Table(rows, TOWERS, TIE, "language_model.lm_head.weight")
    outer = (
        row("vision_model.embeddings.{x}", "image_encoder.encoder.embeddings.{x}"),
        *_vision("vision_model.encoder.layers.{n}", CHAT, True),
        *(
            row(f"mlp1.{at}.{{p}}", f"image_encoder.projector.{name}.{{p}}")
            for at, name in ((0, "norm"), (1, "linear_fc1"), (3, "linear_fc2"))
        ),
    )
    if facts.get("internlm2"):
        return Table((*outer, *_internlm2()), TOWERS, TIE, "language_model.output.weight")
    return Table(
        (*outer, *decoder("language_model.model", "language_model.lm_head", VOCABULARY)),
        TOWERS,
        TIE,
        "language_model.lm_head.weight",
    )


def facts(config: dict[str, Any]) -> Facts:
    library = "text_config" in config
    text, vision = config["text_config" if library else "llm_config"], config["vision_config"]
    return {
        **attention(text),
        "vision_heads": int(vision["num_attention_heads"]),
        "vision_layers": int(vision["num_hidden_layers"]),
        "internlm2": int(
            "InternLM2ForCausalLM" in (text.get("architectures") or ())
            or text.get("model_type") == "internlm2"
        ),
        "library": int(library),
        "tied": int(bool((config if library else text).get("tie_word_embeddings", library))),
    }


INTERNVL = Family(
    "internvl",
    "InternVL",
    {"": table},
    ("InternVLChatModel", "internvl_chat", "InternVLForConditionalGeneration", "internvl"),
    facts,
)
