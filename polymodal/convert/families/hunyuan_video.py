"""HunyuanVideo, its LoRA, and HunyuanVideo 1.5: the original code's names, fused single blocks taken apart."""

from __future__ import annotations

from collections.abc import Mapping

from polymodal.convert.family import Family
from polymodal.convert.operations import COLUMNS, QKV, ROWS, Border, Facts, Repeat, Shape, Split
from polymodal.convert.table import Row, Table, row

DOUBLE, SINGLE = "double_blocks.{n}", "single_blocks.{n}"
MLP = Split(("hidden_qkv", "mlp"))


def _rows() -> tuple[Row, ...]:
    streams = tuple(
        made
        for x in ("img", "txt")
        for made in (
            row(f"{DOUBLE}.{x}_mod.linear.{{p}}", f"{DOUBLE}.{x}_mod.linear.{{p}}", cut=ROWS),
            row(f"{DOUBLE}.{x}_attn_qkv.{{p}}", f"{DOUBLE}.{x}_attn_qkv.{{p}}", cut=QKV),
            row(f"{DOUBLE}.{x}_attn_proj.weight", f"{DOUBLE}.{x}_attn_proj.weight", cut=COLUMNS),
            row(f"{DOUBLE}.{x}_mlp.fc1.{{p}}", f"{DOUBLE}.{x}_mlp.fc1.{{p}}", cut=ROWS),
            row(f"{DOUBLE}.{x}_mlp.fc2.weight", f"{DOUBLE}.{x}_mlp.fc2.weight", cut=COLUMNS),
        )
    )
    return (
        *streams,
        row(f"{DOUBLE}.{{x}}", f"{DOUBLE}.{{x}}"),
        row(f"{SINGLE}.modulation.linear.{{p}}", f"{SINGLE}.modulation.linear.{{p}}", cut=ROWS),
        row(
            f"{SINGLE}.linear1.{{p}}",
            [f"{SINGLE}.linear1_qkv.{{p}}", f"{SINGLE}.linear1_mlp.{{p}}"],
            MLP,
            cuts=(QKV, ROWS),
        ),
        row(f"{SINGLE}.linear2.weight", f"{SINGLE}.linear2.weight", cut=Border()),
        row(f"{SINGLE}.{{x}}", f"{SINGLE}.{{x}}"),
        *(row(f"txt_in.t_embedder.mlp.{x}.{{p}}", f"txt_in.t_embedder.time_embed.{x}.{{p}}") for x in (0, 2)),
        *(
            row(f"{name}.mlp.{x}.{{p}}", f"{name}.time_embed.{x}.{{p}}")
            for name in ("time_in", "guidance_in")
            for x in (0, 2)
        ),
        row("vector_in.in_layer.{p}", "vector_in.fc1.{p}", cut=ROWS),
        row("vector_in.out_layer.weight", "vector_in.fc2.weight", cut=COLUMNS),
        row("vector_in.out_layer.bias", "vector_in.fc2.bias"),
        row("final_layer.linear.{p}", "proj_out.{p}", cut=ROWS),
        row("final_layer.adaLN_modulation.1.{p}", "adaLN_modulation.1.{p}", cut=ROWS),
        row("txt_in.{x}", "txt_in.{x}"),
        row("img_in.{x}", "img_in.{x}"),
    )


def seen(facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Widths of the fused single blocks, off the attention's output and the fused tensors."""
    hidden = next((shape[0] for key, shape in shapes.items() if key.endswith(".linear2.weight")), 0)
    columns = next((shape[1] for key, shape in shapes.items() if key.endswith(".linear2.weight")), 0)
    return {**facts, "hidden": hidden, "hidden_qkv": 3 * hidden, "mlp": columns - hidden}


# A LoRA of the original code: one name without dots, `lora_down` and `lora_up`; A of a fused layer goes to both halves.
PREFIX = "Hunyuan_video_I2V_lora_"
PARTS = (
    ("double_blocks_{n}_img_attn_proj", "double_blocks.{n}.img_attn_proj"),
    ("double_blocks_{n}_img_attn_qkv", "double_blocks.{n}.img_attn_qkv"),
    ("double_blocks_{n}_txt_attn_proj", "double_blocks.{n}.txt_attn_proj"),
    ("double_blocks_{n}_txt_attn_qkv", "double_blocks.{n}.txt_attn_qkv"),
    *(
        (f"double_blocks_{{n}}_{x}_mlp_fc{k}", f"double_blocks.{{n}}.{x}_mlp.fc{k}")
        for x in ("img", "txt")
        for k in (1, 2)
    ),
    *((f"double_blocks_{{n}}_{x}_mod_linear", f"double_blocks.{{n}}.{x}_mod.linear") for x in ("img", "txt")),
    ("single_blocks_{n}_linear2", "single_blocks.{n}.linear2"),
    ("single_blocks_{n}_modulation_linear", "single_blocks.{n}.modulation.linear"),
)


def _adapter() -> tuple[Row, ...]:
    whole = f"{PREFIX}single_blocks_{{n}}_linear1"
    halves = [f"{SINGLE}.linear1_{x}" for x in ("qkv", "mlp")]
    rows = [
        row(f"{whole}.lora_down.weight", [f"{half}.lora_A.default.weight" for half in halves], Repeat()),
        row(
            f"{whole}.lora_up.weight",
            [f"{half}.lora_B.default.weight" for half in halves],
            Split(("adapter_qkv", "adapter_mlp")),
        ),
    ]
    for hub, ours in PARTS:
        rows += [
            row(f"{PREFIX}{hub}.lora_{theirs}.weight", f"{ours}.lora_{name}.default.weight")
            for theirs, name in (("down", "A"), ("up", "B"))
        ]
    return tuple(rows)


def seen_adapter(facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Widths of the fused layers: the output of linear2 is the hidden size."""
    ends = (
        "linear2.lora_up.weight",
        "linear2.lora_B.default.weight",
        "attn_proj.lora_up.weight",
        "attn_proj.lora_B.default.weight",
    )
    hidden = next((shape[0] for key, shape in shapes.items() if key.endswith(ends)), 0)
    whole = next((shape[0] for key, shape in shapes.items() if key.endswith("linear1.lora_up.weight")), 0)
    return {**facts, "adapter_qkv": 3 * hidden, "adapter_mlp": whole - 3 * hidden}


HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    "HunyuanVideo",
    {
        "": Table(_rows(), pipeline=False, seen=seen),
        "i2v": Table(_rows(), tensor_parallel=False, pipeline=False, seen=seen),
    },
)
HUNYUAN_VIDEO_LORA = Family(
    "hunyuan-video-lora", "a LoRA of HunyuanVideo",
    {"": Table(_adapter(), drop=("{x}.alpha",), tensor_parallel=False, pipeline=False, seen=seen_adapter)},
)  # fmt: skip
HUNYUAN_VIDEO_15 = Family(
    "hunyuan-video-1.5", "HunyuanVideo 1.5", {"": Table((row("{x}", "{x}"),), tensor_parallel=False, pipeline=False)},
    ("HunyuanVideo_1_5_DiffusionTransformer", "HunyuanVideo15Transformer3DModel"), stem="diffusion_pytorch_model",
)  # fmt: skip
