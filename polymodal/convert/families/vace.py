"""VACE on Wan: a Wan transformer and its control blocks side by side; hub names of the original code, or of diffusers."""

from __future__ import annotations

from polymodal.convert.families.wan import BLOCK, OUTER
from polymodal.convert.family import Family
from polymodal.convert.table import Row, Table, row

ORIGINAL = {
    "self_attn.proj_q": "self_attn.q", "self_attn.proj_k": "self_attn.k", "self_attn.proj_v": "self_attn.v",
    "self_attn.proj_out": "self_attn.o", "self_attn.q_norm": "self_attn.norm_q", "self_attn.k_norm": "self_attn.norm_k",
    "cross_attn.proj_q": "cross_attn.q", "cross_attn.proj_k": "cross_attn.k", "cross_attn.proj_v": "cross_attn.v",
    "cross_attn.proj_out": "cross_attn.o", "cross_attn.q_norm": "cross_attn.norm_q", "cross_attn.k_norm": "cross_attn.norm_k",
    "cross_attn.k_norm_img": "cross_attn.norm_k_img",
    "text_embedding.linear_1": "text_embedding.0", "text_embedding.linear_2": "text_embedding.2",
}  # fmt: skip
"""Our name -> the original code's, where they differ."""


def original(name: str) -> str:
    """The original code's name of a tensor."""
    stem, dot, leaf = name.rpartition(".")
    return ORIGINAL.get(stem, stem) + dot + leaf


def _table(diffusers: bool) -> Table:
    rows: list[Row] = []
    for hub, ours in BLOCK:
        theirs = hub if diffusers else original(ours)
        rows.append(row(f"blocks.{{n}}.{theirs}", f"wan_dit.blocks.{{n}}.{ours}"))
        rows.append(row(f"vace_blocks.{{n}}.{theirs}", f"vace_dit.vace_blocks.{{n}}.wan_dit_block.{ours}"))
    before, after = ("proj_in", "proj_out") if diffusers else ("before_proj", "after_proj")
    rows += [
        row(f"vace_blocks.{{n}}.{before}.{{p}}", "vace_dit.vace_blocks.{n}.before_proj.{p}"),
        row(f"vace_blocks.{{n}}.{after}.{{p}}", "vace_dit.vace_blocks.{n}.after_proj.{p}"),
        row("vace_patch_embedding.{p}", "vace_dit.vace_patch_embedding.{p}"),
    ]
    rows += [row(hub if diffusers else original(ours), f"wan_dit.{ours}") for hub, ours in OUTER]
    return Table(tuple(rows), tensor_parallel=False, pipeline=False)


VACE = Family(
    "vace", "Wan-VACE", {"": _table(False), "diffusers": _table(True)},
    ("WanVACETransformer3DModel", "VaceWanModel", "VaceWanTransformer3DModel", "vace"),
    stem="diffusion_pytorch_model", kind="generative",
)  # fmt: skip
