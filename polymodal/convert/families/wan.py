"""Wan 2.1 and 2.2: the diffusers transformer under the names of the original code, with projections spelled out."""

from __future__ import annotations

from polymodal.convert.family import Family
from polymodal.convert.table import Row, Table, Tower, row

OUTER = (
    ("patch_embedding.{p}", "patch_embedding.{p}"),
    ("condition_embedder.text_embedder.linear_1.{p}", "text_embedding.linear_1.{p}"),
    ("condition_embedder.text_embedder.linear_2.{p}", "text_embedding.linear_2.{p}"),
    ("condition_embedder.time_embedder.linear_1.{p}", "time_embedding.0.{p}"),
    ("condition_embedder.time_embedder.linear_2.{p}", "time_embedding.2.{p}"),
    ("condition_embedder.time_proj.{p}", "time_projection.1.{p}"),
    ("condition_embedder.image_embedder.norm1.{p}", "img_emb.proj.0.{p}"),
    ("condition_embedder.image_embedder.ff.net.0.proj.{p}", "img_emb.proj.1.{p}"),
    ("condition_embedder.image_embedder.ff.net.2.{p}", "img_emb.proj.3.{p}"),
    ("condition_embedder.image_embedder.norm2.{p}", "img_emb.proj.4.{p}"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("scale_shift_table", "head.modulation"),
    ("proj_out.{p}", "head.head.{p}"),
)
BLOCK = (
    *((f"attn1.to_{x}.{{p}}", f"self_attn.proj_{x}.{{p}}") for x in "qkv"),
    ("attn1.to_out.0.{p}", "self_attn.proj_out.{p}"),
    *((f"attn1.norm_{x}.weight", f"self_attn.{x}_norm.weight") for x in "qk"),
    *((f"attn2.to_{x}.{{p}}", f"cross_attn.proj_{x}.{{p}}") for x in "qkv"),
    ("attn2.to_out.0.{p}", "cross_attn.proj_out.{p}"),
    *((f"attn2.norm_{x}.weight", f"cross_attn.{x}_norm.weight") for x in "qk"),
    *((f"attn2.add_{x}_proj.{{p}}", f"cross_attn.{x}_img.{{p}}") for x in "kv"),
    ("attn2.norm_added_k.weight", "cross_attn.k_norm_img.weight"),
    ("norm2.{p}", "norm3.{p}"),
    ("ffn.net.0.proj.{p}", "ffn.0.{p}"),
    ("ffn.net.2.{p}", "ffn.2.{p}"),
    ("scale_shift_table", "modulation"),
)
FIRST = ("patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.", "img_emb.")


def rows(
    hub_blocks: str = "blocks", blocks: str = "blocks", inner: str = "", prefix: str = ""
) -> tuple[Row, ...]:
    """Rows of one stack of blocks. inner: what comes between the block and its parts; prefix: of every other key."""
    return tuple(
        row(f"{hub_blocks}.{{n}}.{hub}", f"{prefix}{blocks}.{{n}}.{inner}{other}") for hub, other in BLOCK
    )


WAN = Family(
    "wan",
    "Wan",
    {
        "": Table(
            (*(row(hub, other) for hub, other in OUTER), *rows()),
            (Tower("dit", "blocks.", FIRST, ("head.",)),),
            tensor_parallel=False,
        )
    },
    ("WanTransformer3DModel",),
    lambda config: {"layers": int(config["num_layers"])},
    {"layers": r"\Ablocks\.(\d+)\."},
    stem="diffusion_pytorch_model",
    kind="generative",
)
