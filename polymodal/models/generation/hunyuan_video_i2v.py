"""HunyuanVideo from a first frame, in both its forms; captions are encoded together with that frame.

Facts, and the arguments of diffusers' HunyuanVideoImageToVideoPipeline. latent_concat: the frame and a mask
are channels beside the noise. token_replace: the first latent frame is the picture, at timestep 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from polymodal.models.card import Process, Size
from polymodal.models.diffusion import Generation, LatentGrid, one_prompt
from polymodal.models.generation.hunyuan_video import CARD as TEXT_TO_VIDEO
from polymodal.models.generation.hunyuan_video import HunyuanVideo


class HunyuanVideoI2V(HunyuanVideo):
    conditioned = True
    sees = True
    alone = True

    def check(self) -> None:
        Generation.check(self)

    @property
    def concat(self) -> bool:
        return self.config.get("image_condition_type") == "latent_concat"

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("condition",) if self.concat else ()

    def grid(self) -> LatentGrid:
        return replace(super().grid(), least=2)

    def process(self) -> Process:
        return replace(super().process(), first_frame=not self.concat)

    def encode_text(
        self, pipeline: Any, captions: Sequence[str], pixels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Captions, and the clips whose first frames they are encoded with; without clips, black frames."""
        from PIL import Image

        frames = [Image.new("RGB", (336, 336))] * len(captions)
        if pixels is not None:
            frames = [Image.fromarray(frame) for frame in self.shown(pixels[:, :, 0])]
        interleave = (
            2 if self.concat else 4
        )  # one in so many of the picture's tokens, as the pipeline takes them
        made = [
            pipeline.encode_prompt(frame, [caption], image_embed_interleave=interleave)
            for frame, caption in zip(frames, captions, strict=True)
        ]
        embeddings, pooled, masks = zip(*made, strict=True)
        longest = max(
            mask.shape[1] for mask in masks
        )  # the pipeline cuts more from captions that are too long
        return {
            "encoder_hidden_states": torch.cat([pad(e, (0, 0, 0, longest - e.shape[1])) for e in embeddings]),
            "encoder_attention_mask": torch.cat([pad(m, (0, longest - m.shape[1])) for m in masks]),
            "pooled_projections": torch.cat(pooled),
        }

    def encode_media(self, pipeline: Any, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        made = super().encode_media(pipeline, pixels)
        if self.concat:
            made["condition"] = self.first_frame(pipeline, pixels, made["latents"])
        return made

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Without guidance as an input, guidance leads away from the negative prompt. Captions are encoded
        with their
        own picture: one prompt a call."""
        out = one_prompt(super().arguments(asked))
        if not self.distilled:
            out["true_cfg_scale"] = out.pop("guidance_scale", None)
            if out["true_cfg_scale"] is not None:
                out["negative_prompt"] = out.get("negative_prompt") or ""
        return out


CARD = replace(
    TEXT_TO_VIDEO,
    name="hunyuan-video-i2v",
    title="HunyuanVideo I2V",
    family=HunyuanVideoI2V,
    architectures=("HunyuanVideoImageToVideoPipeline",),
    tasks=("image-to-video",),
    pipelines={"image-to-video": "HunyuanVideoImageToVideoPipeline"},
    sizes={
        "13b": Size("hunyuanvideo-community/HunyuanVideo-I2V", 12.82, 60),
        "13b-33ch": Size("hunyuanvideo-community/HunyuanVideo-I2V-33ch", 12.82, 60),
    },
    keywords=("image to video", "video generation"),
    aliases=("hunyuanvideo-i2v",),
    seeds=("13b",),
)
