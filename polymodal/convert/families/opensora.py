"""Open-Sora 2.0 and Open-Sora Plan 1.2, 1.3, 1.5: renamings, and how the Plan's trees are cut."""

from __future__ import annotations

from polymodal.convert.family import Family
from polymodal.convert.operations import COLUMNS, ROWS, WHOLE
from polymodal.convert.table import Row, Table, Tower, row

STREAM = (
    ("{s}_mod.lin.{p}", "{s}_mod.linear.{p}"),
    *((f"{{s}}_attn.{x}_proj.{{p}}", f"{{s}}_attn.proj_{x}.{{p}}") for x in "qkv"),
    ("{s}_attn.proj.{p}", "{s}_attn.proj_out.{p}"),
    ("{s}_attn.norm.query_norm.scale", "{s}_attn.q_norm.weight"),
    ("{s}_attn.norm.key_norm.scale", "{s}_attn.k_norm.weight"),
    ("{s}_mlp.0.{p}", "{s}_mlp.fc1.{p}"),
    ("{s}_mlp.2.{p}", "{s}_mlp.fc2.{p}"),
)
OPEN_SORA_TABLE = Table(
    (
        *(
            row(
                f"double_blocks.{{n}}.{hub.replace('{s}', s)}",
                f"double_blocks.{{n}}.{other.replace('{s}', s)}",
            )
            for s in ("img", "txt")
            for hub, other in STREAM
        ),
        row("single_blocks.{n}.norm.query_norm.scale", "single_blocks.{n}.q_norm.weight"),
        row("single_blocks.{n}.norm.key_norm.scale", "single_blocks.{n}.k_norm.weight"),
        row("single_blocks.{n}.modulation.lin.{p}", "single_blocks.{n}.modulation.linear.{p}"),
        row("time_in.in_layer.{p}", "time_in.mlp.0.{p}"),
        row("time_in.out_layer.{p}", "time_in.mlp.2.{p}"),
        row("vector_in.in_layer.{p}", "vector_in.fc1.{p}"),
        row("vector_in.out_layer.{p}", "vector_in.fc2.{p}"),
        row("{x}", "{x}"),
    ),
    tensor_parallel=False,
    pipeline=False,
)
OPEN_SORA = Family("open-sora", "Open-Sora 2.0", {"": OPEN_SORA_TABLE}, kind="generative")

ATTENTION = {"to_q": "proj_q", "to_k": "proj_k", "to_v": "proj_v", "to_out.0": "proj_out"}


def _plan(blocks: str) -> tuple[Row, ...]:
    """Rows of 1.2 and 1.3."""
    hub, ours = "transformer_blocks.{n}", f"{blocks}.{{n}}"
    rows: list[Row] = []
    for theirs, mine in (("attn1", "self_atten"), ("attn2", "cross_atten")):
        rows += [
            row(f"{hub}.{theirs}.to_{x}.{{p}}", f"{ours}.{mine}.proj_{x}.{{p}}", cut=ROWS) for x in "qkv"
        ]
        rows += [
            row(f"{hub}.{theirs}.to_out.0.weight", f"{ours}.{mine}.proj_out.weight", cut=COLUMNS),
            row(f"{hub}.{theirs}.to_out.0.bias", f"{ours}.{mine}.proj_out.bias"),
            row(f"{hub}.{theirs}.{{x}}", f"{ours}.{mine}.{{x}}"),
        ]
    rows += [
        row(f"{hub}.ff.net.0.proj.{{p}}", f"{ours}.ff.net.0.proj.{{p}}", cut=ROWS),
        row(f"{hub}.ff.net.2.weight", f"{ours}.ff.net.2.weight", cut=COLUMNS),
        row(f"{hub}.{{x}}", f"{ours}.{{x}}"),
        *(
            row(f"{name}{{x}}", f"{name}{{x}}")
            for name in ("pos_embed", "adaln_single", "caption_projection", "proj_out", "scale_shift_tabl")
        ),
    ]
    return tuple(rows)


SPARSE = Tower(
    "dit",
    "videodit_sparse_blocks.",
    ("adaln_single.", "caption_projection.", "pos_embed"),
    ("scale_shift_table", "proj_out."),
)
RENAMED = {
    "norm_q": "norm_proj_q", "norm_k": "norm_proj_k", "to_q": "proj_q", "to_k": "proj_k", "to_v": "proj_v",
    "add_q_proj": "added_proj_q", "add_k_proj": "added_proj_k", "add_v_proj": "added_proj_v", "to_out.0": "proj_out",
    "to_add_out": "added_proj_out", "norm_added_q": "norm_added_proj_q", "norm_added_k": "norm_added_proj_k",
}  # fmt: skip


def _plan_15() -> tuple[Row, ...]:
    block = "transformer_blocks.{n}.{m}"
    rows: list[Row] = []
    for theirs, mine in RENAMED.items():
        hub, ours = f"{block}.attn1.{theirs}", f"{block}.attn1.{mine}"
        if mine in ("proj_out", "added_proj_out"):
            rows += [row(f"{hub}.weight", f"{ours}.weight", cut=COLUMNS), row(f"{hub}.bias", f"{ours}.bias")]
        else:
            rows.append(row(f"{hub}.{{p}}", f"{ours}.{{p}}", cut=WHOLE if "norm" in mine else ROWS))
    for name in ("ff", "ff_enc"):
        rows += [
            row(f"{block}.{name}.net.0.proj.weight", f"{block}.{name}.net.0.proj.weight", cut=ROWS),
            row(f"{block}.{name}.net.2.weight", f"{block}.{name}.net.2.weight", cut=COLUMNS),
        ]
    rows += [row(f"{block}.norm{x}.linear.{{p}}", f"{block}.norm{x}.linear.{{p}}", cut=ROWS) for x in (1, 2)]
    return (*rows, row("norm_out.linear.{p}", "norm_out.linear.{p}", cut=ROWS), row("{x}", "{x}"))


OPEN_SORA_PLAN = Family(
    "open-sora-plan",
    "Open-Sora Plan",
    {
        "v1.2": Table(_plan("videodit_blocks"), pipeline=False),
        "v1.3": Table(_plan("videodit_sparse_blocks"), (SPARSE,)),
        "v1.5": Table(_plan_15(), pipeline=False),
    },
    counted={"layers": r"\Atransformer_blocks\.(\d+)\."},
    stem="diffusion_pytorch_model",
    kind="generative",
)
