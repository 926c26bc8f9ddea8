"""CogVideoX 1.0 and 1.5: hub names of diffusers, or of the original code (SAT); q, k, v and both modulations fused."""

from __future__ import annotations

from polymodal.convert.family import Family
from polymodal.convert.operations import COLUMNS, QKV, ROWS, Concatenate, Reorder
from polymodal.convert.table import Table, Tower, row

OURS = "videodit_blocks.{n}"
HUB = "transformer_blocks.{n}"
TOWER = Tower(
    "dit", "videodit_blocks.",
    ("time_embed.", "patch_embed.", "caption_projection.", "pos_embed.", "ofs_embed."),
    ("norm_final.", "norm_out.", "proj_out_linear.", "adaLN_modulation."),
)  # fmt: skip
MODULATION = Reorder(
    6, tuple((tensor, chunk + 3 * half) for half in (0, 1) for tensor in (0, 1) for chunk in range(3))
)
"""Two modulations of six chunks each: the first three of both, then the last three of both."""

DIFFUSERS = Table(
    (
        row("time_embedding.linear_1.{p}", "time_embed.time_embed.0.{p}"),
        row("time_embedding.linear_2.{p}", "time_embed.time_embed.2.{p}"),
        row("ofs_embedding.linear_1.{p}", "ofs_embed.0.{p}"),
        row("ofs_embedding.linear_2.{p}", "ofs_embed.2.{p}"),
        row("patch_embed.proj.{p}", "patch_embed.proj.{p}"),
        row("patch_embed.text_proj.{p}", "caption_projection.{p}"),
        row("patch_embed.pos_embedding", "pos_embed.pos_embedding"),
        row(
            [f"{HUB}.attn1.to_{x}.{{p}}" for x in "qkv"],
            f"{OURS}.self_atten.proj_qkv.{{p}}",
            Concatenate(3),
            QKV,
        ),
        row(
            [f"{HUB}.norm{x}.linear.{{p}}" for x in (1, 2)],
            f"{OURS}.scale_shift_table.1.{{p}}",
            MODULATION,
            ROWS,
        ),
        *(row(f"{HUB}.attn1.norm_{x}.{{p}}", f"{OURS}.self_atten.{x}_norm.{{p}}") for x in "qk"),
        row(f"{HUB}.attn1.to_out.0.weight", f"{OURS}.self_atten.proj_out.weight", cut=COLUMNS),
        row(f"{HUB}.attn1.to_out.0.bias", f"{OURS}.self_atten.proj_out.bias"),
        *(row(f"{HUB}.norm{x}.norm.{{p}}", f"{OURS}.norm{x}.{{p}}") for x in (1, 2)),
        row(f"{HUB}.ff.net.0.proj.{{p}}", f"{OURS}.ff.net.0.proj.{{p}}", cut=ROWS),
        row(f"{HUB}.ff.net.2.weight", f"{OURS}.ff.net.2.weight", cut=COLUMNS),
        row(f"{HUB}.ff.net.2.bias", f"{OURS}.ff.net.2.bias"),
        row("norm_final.{p}", "norm_final.{p}"),
        row("norm_out.norm.{p}", "norm_out.{p}"),
        row("norm_out.linear.{p}", "adaLN_modulation.1.{p}", cut=ROWS),
        row("proj_out.{p}", "proj_out_linear.{p}"),
    ),
    (TOWER,),
)
SAT = "model.diffusion_model"
MIXINS = f"{SAT}.mixins"
LAYER = f"{SAT}.transformer.layers.{{n}}"
ORIGINAL = Table(
    (
        *(row(f"{SAT}.time_embed.{x}.{{p}}", f"time_embed.time_embed.{x}.{{p}}") for x in (0, 2)),
        *(row(f"{SAT}.ofs_embed.{x}.{{p}}", f"ofs_embed.{x}.{{p}}") for x in (0, 2)),
        row(f"{MIXINS}.patch_embed.proj.{{p}}", "patch_embed.proj.{p}"),
        row(f"{MIXINS}.patch_embed.text_proj.{{p}}", "caption_projection.{p}"),
        *(
            row(f"{MIXINS}.pos_embed.{x}", f"pos_embed.{x}")
            for x in ("freqs_cos", "freqs_sin", "pos_embedding")
        ),
        row(f"{LAYER}.attention.query_key_value.{{p}}", f"{OURS}.self_atten.proj_qkv.{{p}}", cut=QKV),
        row(
            f"{MIXINS}.adaln_layer.adaLN_modulations.{{n}}.1.{{p}}",
            f"{OURS}.scale_shift_table.1.{{p}}",
            cut=ROWS,
        ),
        row(f"{MIXINS}.adaln_layer.query_layernorm_list.{{n}}.{{p}}", f"{OURS}.self_atten.q_norm.{{p}}"),
        row(f"{MIXINS}.adaln_layer.key_layernorm_list.{{n}}.{{p}}", f"{OURS}.self_atten.k_norm.{{p}}"),
        row(f"{LAYER}.attention.dense.weight", f"{OURS}.self_atten.proj_out.weight", cut=COLUMNS),
        row(f"{LAYER}.attention.dense.bias", f"{OURS}.self_atten.proj_out.bias"),
        row(f"{LAYER}.input_layernorm.{{p}}", f"{OURS}.norm1.{{p}}"),
        row(f"{LAYER}.post_attention_layernorm.{{p}}", f"{OURS}.norm2.{{p}}"),
        row(f"{LAYER}.mlp.dense_h_to_4h.{{p}}", f"{OURS}.ff.net.0.proj.{{p}}", cut=ROWS),
        row(f"{LAYER}.mlp.dense_4h_to_h.weight", f"{OURS}.ff.net.2.weight", cut=COLUMNS),
        row(f"{LAYER}.mlp.dense_4h_to_h.bias", f"{OURS}.ff.net.2.bias"),
        row(f"{SAT}.transformer.final_layernorm.{{p}}", "norm_final.{p}"),
        row(f"{MIXINS}.final_layer.norm_final.{{p}}", "norm_out.{p}"),
        row(f"{MIXINS}.final_layer.linear.{{p}}", "proj_out_linear.{p}"),
        row(f"{MIXINS}.final_layer.adaLN_modulation.1.{{p}}", "adaLN_modulation.1.{p}", cut=ROWS),
    ),
    (TOWER,),
    drop=(
        "first_stage_model.{x}",
        "conditioner.{x}",
        f"{SAT}.transformer.position_embeddings.{{x}}",
        f"{SAT}.transformer.word_embeddings.{{x}}",
    ),
)
COGVIDEOX = Family(
    "cogvideox", "CogVideoX", {"": DIFFUSERS, "source": ORIGINAL}, ("CogVideoXTransformer3DModel",),
    lambda config: {"layers": int(config["num_layers"])}, {"layers": r"\b(?:transformer_blocks|transformer\.layers)\.(\d+)\."}, stem="diffusion_pytorch_model",
    kind="generative",
)  # fmt: skip
