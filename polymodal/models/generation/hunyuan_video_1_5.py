"""HunyuanVideo 1.5: text and image to video in one denoiser, which takes a first frame.

Facts, and the arguments of diffusers' HunyuanVideo15Transformer3DModel and its two pipelines. The class of a
checkpoint's pipeline decides between the two; from text alone frame, mask and picture are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.diffusion import Generation, LatentGrid
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.hunyuan_video import HunyuanVideo

PICTURE_TOKENS = 729
"""Tokens of the picture where there is none, as the text-to-video pipeline has them."""


class HunyuanVideo15(HunyuanVideo):
    text = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
    )
    documented = {
        "latents": "video",
        "encoder_hidden_states": "prompt_ids",
        "encoder_attention_mask": "prompt_mask",
        "encoder_hidden_states_2": "prompt_ids_2",
        "encoder_attention_mask_2": "prompt_mask_2",
    }
    latent_channels, compression = 32, 16

    @property
    def conditioned(self) -> bool:
        """Whether clips begin with a given frame."""
        return self.index["_class_name"] == "HunyuanVideo15ImageToVideoPipeline"

    @property
    def routes(self) -> Mapping[str, str]:
        kept = "image-to-video" if self.conditioned else "text-to-video"
        return {kept: self.card.pipelines[kept]}

    @property
    def alone(self) -> bool:  # type: ignore[override]
        return self.conditioned

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("condition", "image_embeds") if self.conditioned else ()

    def check(self) -> None:
        Generation.check(self)
        if self.config.get("use_meanflow"):
            raise PolymodalError(
                f"{self.source} was distilled to a mean flow over two timesteps, "
                "whose training is not built.",
                "Use the checkpoint before distillation.",
            )

    def grid(self) -> LatentGrid:
        return replace(super().grid(), least=2 if self.conditioned else 1)

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        device = next(pipeline.text_encoder.parameters()).device
        made = pipeline.encode_prompt(list(captions), device=device, batch_size=len(captions))
        return dict(zip(self.text, made, strict=True))

    def encode_media(self, pipeline: Any, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        made = super().encode_media(pipeline, pixels)
        if self.conditioned:
            latents, pictures = made["latents"], self.shown(pixels[:, :, 0])
            made["condition"] = self.first_frame(pipeline, pixels, latents)
            made["image_embeds"] = pipeline.encode_image(
                pictures, 1, device=pixels.device, dtype=latents.dtype
            )
        return made

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        given = super().inputs(model, latents, batch)
        if "condition" not in given:
            count, width = len(latents), int(self.config["image_embed_dim"])
            given["condition"] = latents.new_zeros(count, latents.shape[1] + 1, *latents.shape[2:])
            given["image_embeds"] = latents.new_zeros(count, PICTURE_TOKENS, width)
        return given

    def tune(self, pipeline: Any, asked: dict[str, Any]) -> dict[str, Any]:
        """Guidance is a part of the pipeline; from a picture, the pipeline chooses the size itself."""
        out = {**asked}
        guidance = out.pop("guidance_scale", None)
        if guidance is not None:
            pipeline.guider = pipeline.guider.new(guidance_scale=guidance)
        if self.conditioned:
            height, width, picture = out.pop("height", None), out.pop("width", None), out.get("image")
            if (height or width) and picture is not None:
                own = pipeline.video_processor.calculate_default_height_width(
                    height=picture.size[1], width=picture.size[0], target_size=pipeline.target_size
                )
                if (height or own[0], width or own[1]) != tuple(own):
                    raise PolymodalError(
                        f"{self.card.name} chooses the size by the picture: {own[0]} x {own[1]} here, "
                        f"not {height} x {width}.",
                        "Leave out --height and --width, or cut the picture to that shape.",
                    )
        return out


CARD = denoiser_card(
    name="hunyuan-video-1.5",
    title="HunyuanVideo 1.5",
    family=HunyuanVideo15,
    blocks=("transformer_blocks.*",),
    embedders=(
        "x_embedder",
        "image_embedder",
        "context_embedder",
        "context_embedder_2",
        "time_embed",
        "cond_type_embed",
    ),
    output=("norm_out", "proj_out"),
    pipelines={
        "text-to-video": "HunyuanVideo15Pipeline",
        "image-to-video": "HunyuanVideo15ImageToVideoPipeline",
    },
    clip={"frames": [121], "fps": 24, "pixels": 480 * 832},
    sizes={
        "t2v": Size("hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v", 8.33, 54),
        "i2v": Size("hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v", 8.33, 54),
    },
    keywords=("text to video", "image to video", "video generation"),
    aliases=("hunyuanvideo1.5", "hunyuanvideo-1.5"),
    seeds=("t2v", "i2v"),
)
