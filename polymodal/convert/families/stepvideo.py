"""Step-Video: attention whose hub rows lie head by head is put part by part; one tower."""

from __future__ import annotations

from typing import Any

from polymodal.convert.family import Family
from polymodal.convert.operations import COLUMNS, KV, QKV, ROWS, Facts, HeadsApart
from polymodal.convert.table import Table, Tower, row

BLOCK = "transformer_blocks.{n}"
OUTER = ("adaln_single", "caption_projection", "clip_projection", "pos_embed")

TABLE = Table(
    (
        row(f"{BLOCK}.attn1.wqkv.weight", f"{BLOCK}.attn1.proj_qkv.weight", HeadsApart("heads", 3), QKV),
        row(f"{BLOCK}.attn1.wo.weight", f"{BLOCK}.attn1.proj_out.weight", cut=COLUMNS),
        row(f"{BLOCK}.attn2.wkv.weight", f"{BLOCK}.attn2.proj_kv.weight", HeadsApart("heads", 2), KV),
        row(f"{BLOCK}.attn2.wq.weight", f"{BLOCK}.attn2.proj_q.weight", cut=ROWS),
        row(f"{BLOCK}.attn2.wo.weight", f"{BLOCK}.attn2.proj_out.weight", cut=COLUMNS),
        row(f"{BLOCK}.ff.net.0.proj.weight", f"{BLOCK}.ff.net.0.proj.weight", cut=ROWS),
        row(f"{BLOCK}.ff.net.2.weight", f"{BLOCK}.ff.net.2.weight", cut=COLUMNS),
        row(f"{BLOCK}.{{x}}", f"{BLOCK}.{{x}}"),
        row("adaln_single.linear.{p}", "adaln_single.linear.{p}", cut=ROWS),
        *(row(f"{name}.{{x}}", f"{name}.{{x}}") for name in OUTER),
        row("scale_shift_table", "scale_shift_table"),
        row("proj_out.{p}", "proj_out.{p}"),
    ),
    (
        Tower(
            "dit",
            "transformer_blocks.",
            tuple(f"{name}." for name in OUTER),
            ("scale_shift_table", "proj_out."),
        ),
    ),
)


def facts(config: dict[str, Any]) -> Facts:
    return {"heads": int(config["num_attention_heads"]), "layers": int(config["num_layers"])}


STEPVIDEO = Family(
    "stepvideo", "Step-Video", {"": TABLE}, ("StepVideoModel", "StepVideoTransformer3DModel"), facts,
    {"layers": r"\Atransformer_blocks\.(\d+)\."}, stem="diffusion_pytorch_model",
    kind="generative",
)  # fmt: skip
