"""BAGEL and Lumina-mGPT 2: renamings only, and none at all."""

from __future__ import annotations

from polymodal.convert.family import Family
from polymodal.convert.table import Table, row

VIT = "vit_model.vision_model"
LAYER = f"{VIT}.encoder.layers.{{n}}"
OURS = "image_encoder.encoder.blocks.{n}"

BAGEL = Family(
    "bagel",
    "BAGEL",
    {
        "": Table(
            (
                row("connector.fc1.{p}", "image_encoder.projector.linear_fc1.{p}"),
                row("connector.fc2.{p}", "image_encoder.projector.linear_fc2.{p}"),
                row("language_model.lm_head.weight", "mllm.lm_head.weight"),
                row("language_model.model.{x}", "mllm.decoder.{x}"),
                row("latent_pos_embed.pos_embed", "latent_pos_embed.pos_embed"),
                *(row(f"{name}.{{p}}", f"mllm.{name}.{{p}}") for name in ("llm2vae", "vae2llm")),
                *(
                    row(f"time_embedder.mlp.{x}.{{p}}", f"mllm.time_embedder.time_embed.{x}.{{p}}")
                    for x in (0, 2)
                ),
                row("vit_pos_embed.pos_embed", "mllm.vit_pos_embed.pos_embed"),
                *(
                    row(f"{VIT}.embeddings.{name}", f"image_encoder.encoder.patch_embed.{name}")
                    for name in ("patch_embedding.{p}", "position_embedding.weight")
                ),
                row(f"{VIT}.post_layernorm.{{p}}", "image_encoder.encoder.norm.{p}"),
                *(row(f"{LAYER}.layer_norm{x}.{{p}}", f"{OURS}.norm{x}.{{p}}") for x in (1, 2)),
                row(f"{LAYER}.self_attn.{{x}}", f"{OURS}.attn.{{x}}"),
                row(f"{LAYER}.mlp.{{x}}", f"{OURS}.mlp.{{x}}"),
            ),
            tensor_parallel=False,
            pipeline=False,
        )
    },
    stem="ema",
    kind="generative",
)
LUMINA = Family(
    "lumina",
    "Lumina-mGPT 2",
    {"": Table((row("{x}", "{x}"),), tensor_parallel=False, pipeline=False)},
    kind="generative",
)
