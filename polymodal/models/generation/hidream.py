"""HiDream-I1: text to image with experts in its blocks and four text encoders; predicts minus the velocity.

Facts, and the arguments of diffusers' HiDreamImageTransformer2DModel and HiDreamImagePipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.pictures import Pictures

LLAMA = "encoder_hidden_states_llama3"
"""The library has layers first, here the batch is first."""


class HiDream(Pictures):
    text = ("encoder_hidden_states_t5", LLAMA, "pooled_embeds")
    prompt_outputs = ("encoder_hidden_states_t5", "", LLAMA, "", "pooled_embeds")
    zero = ("final_layer.linear.*",)
    noise = {"reversed": True}

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        made = super().encode_text(pipeline, captions)
        return {**made, LLAMA: made[LLAMA].transpose(0, 1)}

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.inputs(model, latents, batch)
        given[LLAMA] = given[LLAMA].transpose(0, 1)
        (prediction,) = self.forward(model)(latents, timesteps=timestep, return_dict=False, **given)
        if prediction.shape == latents.shape:
            return prediction
        # in training the class leaves tokens [B, C, S, p * p], padded to a square's
        patch = int(self.config["patch_size"])
        height, width = latents.shape[2] // patch, latents.shape[3] // patch
        cells = prediction[:, :, : height * width].unflatten(2, (height, width)).unflatten(4, (patch, patch))
        return cells.permute(0, 1, 2, 4, 3, 5).reshape(latents.shape)


CARD = denoiser_card(
    name="hidream",
    title="HiDream-I1",
    family=HiDream,
    blocks=("double_stream_blocks.*", "single_stream_blocks.*"),
    embedders=("t_embedder", "p_embedder", "x_embedder", "caption_projection"),
    output=("final_layer",),
    head="final_layer.linear",
    pipelines={"text-to-image": "HiDreamImagePipeline"},
    limits={"ep": "its experts are computed whole on every rank"},
    sizes={"full": Size("HiDream-ai/HiDream-I1-Full", 17.11, 48, devices=16)},
    keywords=("text to image", "image generation"),
    aliases=("hidream-i1",),
    seeds=("full",),
)
