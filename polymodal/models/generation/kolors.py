"""Kolors: SDXL's UNet with ChatGLM as its text encoder. Facts, and what differs from SDXL.

Its noise has 1,100 levels and a steeper end; captions may be Chinese or English.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from polymodal.models.card import Size
from polymodal.models.generation.sdxl import CARD as SDXL
from polymodal.models.generation.sdxl import StableDiffusionXL


class Kolors(StableDiffusionXL):
    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}


CARD = replace(
    SDXL,
    name="kolors",
    title="Kolors",
    family=Kolors,
    architectures=("KolorsPipeline",),
    pipelines={"text-to-image": "KolorsPipeline", "image-to-image": "KolorsImg2ImgPipeline"},
    towers={**SDXL.towers, "embedders": (*SDXL.towers["embedders"], "encoder_hid_proj")},
    sizes={"2.6b": Size("Kwai-Kolors/Kolors-diffusers", 2.58, 7, devices=8, layout={"dp_shard": -1})},
    keywords=("text to image", "chinese captions"),
    aliases=(),
    methods=(),
    seeds=("2.6b",),
)
