"""Kolors: SDXL's UNet with ChatGLM as its text encoder. Facts, and what differs from SDXL.

Its noise has 1,100 levels and a steeper end; captions may be Chinese or English.
"""

from __future__ import annotations

from dataclasses import replace

from polymodal.models.card import Size
from polymodal.models.generation.sdxl import CARD as SDXL
from polymodal.models.generation.sdxl import StableDiffusionXL


class Kolors(StableDiffusionXL):
    zeros_for_empty = False


CARD = replace(
    SDXL,
    name="kolors",
    title="Kolors",
    family=Kolors,
    architectures=("KolorsPipeline",),
    pipelines={"text-to-image": "KolorsPipeline", "image-to-image": "KolorsImg2ImgPipeline"},
    towers={**SDXL.towers, "embedders": (*SDXL.towers["embedders"], "encoder_hid_proj")},
    sizes={"2.6b": Size("Kwai-Kolors/Kolors-diffusers", 2.58, 7)},
    keywords=("text to image", "chinese captions"),
    aliases=(),
    methods=(),
    seeds=("2.6b",),
)
