"""The language model of a tree, which most understanding models share: Megatron names, q/k/v and gate/up fused.

Families give their hub prefix and what is theirs alone. Sees the tables and operations.
"""

from __future__ import annotations

from collections.abc import Mapping

from polymodal.convert.operations import COLUMNS, GLU, ROWS, Concatenate, QueryGroups, TPShard
from polymodal.convert.table import Row, Tower, row

LLM = "text_decoder.decoder.layers.{n}"
TIE = ("text_decoder.output_layer.weight", "text_decoder.embedding.word_embeddings.weight")
NORMS = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}
"""Norms of a layer: the hub's -> the tree's."""
TOWER = Tower(
    "llm", "text_decoder.decoder.layers.", ("text_decoder.embedding.",),
    ("text_decoder.decoder.final_layernorm.", "text_decoder.output_layer."), "text_decoder.",
)  # fmt: skip


def vit(
    layers: str = "image_encoder.encoder.blocks.layers.",
    first: tuple[str, ...] = ("image_encoder.encoder.patch_embed.",),
    last: tuple[str, ...] = (),
) -> Tower:
    """The vision tower; its projector goes with its last layer."""
    return Tower("vit", layers, first, ("image_encoder.projector.", *last), "image_encoder.", "vision_layers")


def fused_attention(layer: str) -> tuple[Row, ...]:
    """q, k, v as one tensor."""
    hub = [f"{layer}.self_attn.{x}_proj.{{p}}" for x in "qkv"]
    return (row(hub, f"{LLM}.self_attention.linear_qkv.{{p}}", QueryGroups(), ROWS),)


def gated(layer: str, ours: str = f"{LLM}.mlp", mlp: str = "mlp") -> tuple[Row, ...]:
    """An MLP of gate, up and down, the first two as one tensor."""
    hub = f"{layer}.{mlp}"
    return (
        row([f"{hub}.{x}_proj.weight" for x in ("gate", "up")], f"{ours}.linear_fc1.weight", Concatenate(), GLU),
        row(f"{hub}.down_proj.weight", f"{ours}.linear_fc2.weight", cut=COLUMNS),
    )  # fmt: skip


def outer(hub: str, head: str, vocabulary: TPShard = ROWS) -> tuple[Row, ...]:
    """What is around the layers. hub, head: keys up to the embedding and of the head."""
    return (
        row(f"{hub}.embed_tokens.weight", TIE[1], cut=vocabulary),
        row(f"{hub}.norm.weight", "text_decoder.decoder.final_layernorm.weight"),
        row(f"{head}.weight", TIE[0], cut=vocabulary),
    )


def layers(
    layer: str, attention: tuple[Row, ...], mlp: tuple[Row, ...], norms: Mapping[str, str] = NORMS
) -> tuple[Row, ...]:
    """Norms, attention and MLP of the layers whose keys begin with `layer`."""
    return (
        *(row(f"{layer}.{theirs}.weight", f"{LLM}.{ours}.weight") for theirs, ours in norms.items()),
        *attention,
        row(f"{layer}.self_attn.o_proj.weight", f"{LLM}.self_attention.linear_proj.weight", cut=COLUMNS),
        *mlp,
    )  # fmt: skip


def decoder(hub: str, head: str, vocabulary: TPShard = ROWS) -> tuple[Row, ...]:
    """All of a Qwen2 or Llama."""
    layer = f"{hub}.layers.{{n}}"
    return (*outer(hub, head, vocabulary), *layers(layer, fused_attention(layer), gated(layer)))
