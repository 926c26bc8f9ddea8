"""Wan 2.2: A14B, whose two denoisers share the noise levels, and 5B, whose tokens have a timestep each.

What it shares with Wan 2.1 is in wan.py. Each expert of A14B is trained by a run of its own (model.part); the
other stays as the source has it when the run is sampled or exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Process, Size
from polymodal.models.generation.denoiser_card import VERIFIED
from polymodal.models.generation.wan import CARD as WAN
from polymodal.models.generation.wan import Wan

CLIP_5B = {"frames": [121], "fps": 24, "pixels": 704 * 1280}


class Wan22(Wan):
    denoisers = ("transformer", "transformer_2")

    @classmethod
    def claims(cls, index: Mapping[str, Any]) -> bool:
        return not Wan.claims(index)

    @property
    def per_token(self) -> bool:
        """5B: a timestep a token, 0 where the first frame is given."""
        return bool(self.index.get("expand_timesteps"))

    @property
    def routes(self) -> Mapping[str, str]:
        """5B takes a first frame where it is given one."""
        return self.card.pipelines if self.per_token else super().routes

    def process(self) -> Process:
        process, boundary = super().process(), self.index.get("boundary_ratio")
        if not boundary:
            return replace(process, per_token=self.per_token)
        high = self.part == "transformer"
        return replace(process, range=(float(boundary), 1.0) if high else (0.0, float(boundary)))

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        if not self.per_token:
            return super().denoise(model, latents, timestep, batch)
        frames, height, width = self.config["patch_size"]
        clean = batch.get("clean")
        cells = torch.ones_like(latents[:, :1], dtype=torch.float32) if clean is None else 1 - clean.float()
        tokens = cells[:, 0, ::frames, ::height, ::width].flatten(1)
        return super().denoise(model, latents, timestep[:, None] * tokens, batch)


CARD = replace(
    WAN,
    name="wan2.2",
    title="Wan 2.2",
    family=Wan22,
    tasks=("text-to-video", "image-to-video"),
    pipelines={"text-to-video": "WanPipeline", "image-to-video": "WanImageToVideoPipeline"},
    sizes={
        "5b": Size("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 5.0, 30, clip=CLIP_5B),
        "t2v-a14b": Size("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 14.29, 40),
        "i2v-a14b": Size("Wan-AI/Wan2.2-I2V-A14B-Diffusers", 14.29, 40),
    },
    aliases=("wan22", "wan2_2"),
    verified=VERIFIED,
    seeds=("5b",),
)
