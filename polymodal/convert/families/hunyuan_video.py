"""HunyuanVideo, its LoRA, and HunyuanVideo 1.5: the original code's names or diffusers', fused single blocks apart."""

from __future__ import annotations

from collections.abc import Mapping

from polymodal.convert.family import Family
from polymodal.convert.operations import (
    COLUMNS,
    QKV,
    ROWS,
    Border,
    Concatenate,
    Facts,
    Reorder,
    Repeat,
    Shape,
    Split,
)
from polymodal.convert.table import Row, Table, cut_alike, row

DOUBLE, SINGLE = "double_blocks.{n}", "single_blocks.{n}"
HUB, ALONE = "transformer_blocks.{n}", "single_transformer_blocks.{n}"
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


ENDS = (".linear2.weight", ".proj_out.weight")
"""The output layer of a single block, in the tree, and as diffusers calls it."""


def seen(facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Widths of the fused single blocks, off the attention's output and the fused tensors."""
    hidden, columns = next((shape for key, shape in shapes.items() if key.endswith(ENDS)), (0, 0))
    return {**facts, "hidden": hidden, "hidden_qkv": 3 * hidden, "mlp": columns - hidden}


# ----------------------------------------------------------------------------------------------- diffusers' names
REFINER = ("context_embedder.token_refiner.refiner_blocks.{n}", "txt_in.individual_token_refiner.blocks.{n}")
STREAMS = (("img", "norm1", "attn.to_{}", "attn.norm_{}", "attn.to_out.0", "ff"),
           ("txt", "norm1_context", "attn.add_{}_proj", "attn.norm_added_{}", "attn.to_add_out", "ff_context"))  # fmt: skip
SWAPPED = Reorder(2, ((0, 1), (0, 0)))
"""[scale; shift] -> [shift; scale]."""


def _embedder(hub: str, ours: str) -> tuple[Row, ...]:
    return tuple(row(f"{hub}.linear_{k}.{{p}}", f"{ours}.{at}.{{p}}") for k, at in ((1, 0), (2, 2)))


def _diffusers(inner: str) -> tuple[Row, ...]:
    """Rows of what both versions have. inner: the name of the layers of a time embedder."""
    refiner, ours = REFINER
    return (
        *_embedder("context_embedder.time_text_embed.timestep_embedder", f"txt_in.t_embedder.{inner}"),
        row("context_embedder.time_text_embed.text_embedder.{x}", "txt_in.c_embedder.{x}"),
        row("context_embedder.proj_in.{p}", "txt_in.input_embedder.{p}"),
        row("x_embedder.{x}", "img_in.{x}"),
        *(row(f"{refiner}.norm{k}.{{p}}", f"{ours}.norm{k}.{{p}}") for k in (1, 2)),
        row([f"{refiner}.attn.to_{x}.{{p}}" for x in "qkv"], f"{ours}.self_attn_qkv.{{p}}", Concatenate(3)),
        row(f"{refiner}.attn.to_out.0.{{p}}", f"{ours}.self_attn_proj.{{p}}"),
        row(f"{refiner}.ff.net.0.proj.{{p}}", f"{ours}.mlp.fc1.{{p}}"),
        row(f"{refiner}.ff.net.2.{{p}}", f"{ours}.mlp.fc2.{{p}}"),
        row(f"{refiner}.norm_out.linear.{{p}}", f"{ours}.adaLN_modulation.1.{{p}}"),
        *(
            made
            for ours, norm, linear, qk, out, mlp in STREAMS
            for made in (
                row(f"{HUB}.{norm}.linear.{{p}}", f"{DOUBLE}.{ours}_mod.linear.{{p}}"),
                *(row(f"{HUB}.{qk.format(x)}.weight", f"{DOUBLE}.{ours}_attn_{x}_norm.weight") for x in "qk"),
                row(f"{HUB}.{out}.{{p}}", f"{DOUBLE}.{ours}_attn_proj.{{p}}"),
                row(f"{HUB}.{mlp}.net.0.proj.{{p}}", f"{DOUBLE}.{ours}_mlp.fc1.{{p}}"),
                row(f"{HUB}.{mlp}.net.2.{{p}}", f"{DOUBLE}.{ours}_mlp.fc2.{{p}}"),
            )
        ),
    )


def _diffusers_1() -> tuple[Row, ...]:
    embed = "time_text_embed"
    rows = (
        *_diffusers("time_embed"),
        *_embedder(f"{embed}.timestep_embedder", "time_in.time_embed"),
        *_embedder(f"{embed}.guidance_embedder", "guidance_in.time_embed"),
        *(row(f"{embed}.text_embedder.linear_{k}.{{p}}", f"vector_in.fc{k}.{{p}}") for k in (1, 2)),
        *(
            row([f"{HUB}.{linear.format(x)}.{{p}}" for x in "qkv"], f"{DOUBLE}.{ours}_attn_qkv.{{p}}", Concatenate(3))
            for ours, _, linear, *_ in STREAMS
        ),
        row([f"{ALONE}.attn.to_{x}.{{p}}" for x in "qkv"], f"{SINGLE}.linear1_qkv.{{p}}", Concatenate(3)),
        row(f"{ALONE}.proj_mlp.{{p}}", f"{SINGLE}.linear1_mlp.{{p}}"),
        row(f"{ALONE}.proj_out.{{p}}", f"{SINGLE}.linear2.{{p}}"),
        *(row(f"{ALONE}.attn.norm_{x}.weight", f"{SINGLE}.{x}_norm.weight") for x in "qk"),
        row(f"{ALONE}.norm.linear.{{p}}", f"{SINGLE}.modulation.linear.{{p}}"),
        row("norm_out.linear.{p}", "adaLN_modulation.1.{p}", SWAPPED),
        row("proj_out.{p}", "proj_out.{p}"),
    )  # fmt: skip
    return cut_alike(rows, Table(_rows()))


def _diffusers_15() -> tuple[Row, ...]:
    vision = (("norm_in", 0), ("linear_1", 1), ("linear_2", 3), ("norm_out", 4))
    glyphs = (("norm", "layernorm"), *((f"linear_{k}", f"fc{k}") for k in (1, 2, 3)))
    return (
        *_diffusers("mlp"),
        *_embedder("time_embed.timestep_embedder", "time_in.mlp"),
        *(
            row(f"{HUB}.{linear.format(x)}.{{p}}", f"{DOUBLE}.{ours}_attn_{x}.{{p}}")
            for ours, _, linear, *_ in STREAMS
            for x in "qkv"
        ),
        *(row(f"image_embedder.{hub}.{{p}}", f"vision_in.proj.{at}.{{p}}") for hub, at in vision),
        *(row(f"context_embedder_2.{hub}.{{p}}", f"byt5_in.{ours}.{{p}}") for hub, ours in glyphs),
        row("cond_type_embed.weight", "cond_type_embedding.weight"),
        row("norm_out.linear.{p}", "final_layer.adaLN_modulation.1.{p}", SWAPPED),
        row("proj_out.{p}", "final_layer.linear.{p}"),
    )


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
    """Widths of the fused layers of single blocks: what goes in is the hidden size."""
    down = (f"{key}.lora_{side}.weight" for key, side in (("linear1", "down"), ("linear1_qkv", "A.default")))
    hidden = next((shape[1] for end in down for key, shape in shapes.items() if key.endswith(end)), 0)
    whole = next((shape[0] for key, shape in shapes.items() if key.endswith("linear1.lora_up.weight")), 0)
    return {**facts, "adapter_qkv": 3 * hidden, "adapter_mlp": whole - 3 * hidden}


def _tables(tensor_parallel: bool) -> tuple[Table, Table]:
    """The table of the original code's names, and that of diffusers'."""
    original, diffusers = (
        Table(made, tensor_parallel=tensor_parallel, pipeline=False, seen=seen) for made in (_rows(), _diffusers_1())
    )  # fmt: skip
    return original, diffusers


T2V, I2V = _tables(True), _tables(False)
HUNYUAN_VIDEO = Family(
    "hunyuan-video", "HunyuanVideo", {"": T2V[0], "diffusers": T2V[1], "i2v": I2V[0], "i2v diffusers": I2V[1]},
    ("HunyuanVideoTransformer3DModel",), stem="diffusion_pytorch_model", kind="generative",
)  # fmt: skip
HUNYUAN_VIDEO_LORA = Family(
    "hunyuan-video-lora", "a LoRA of HunyuanVideo",
    {"": Table(_adapter(), drop=("{x}.alpha",), tensor_parallel=False, pipeline=False, seen=seen_adapter)},
    kind="generative",
)  # fmt: skip
HUNYUAN_VIDEO_15 = Family(
    "hunyuan-video-1.5", "HunyuanVideo 1.5",
    {
        name: Table(made, tensor_parallel=False, pipeline=False)
        # the original code's names are the tree's, so that its table takes anything: it is tried last
        for name, made in (("diffusers", _diffusers_15()), ("", (row("{x}", "{x}"),)))
    },
    ("HunyuanVideo_1_5_DiffusionTransformer", "HunyuanVideo15Transformer3DModel"), stem="diffusion_pytorch_model", kind="generative",
)  # fmt: skip
