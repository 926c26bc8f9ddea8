"""HiDream-I1: text to image with experts in its blocks and four text encoders; it answers minus the velocity.

Facts, and the arguments of diffusers' HiDreamImageTransformer2DModel and HiDreamImagePipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import ModelCard, Process, Size
from polymodal.models.generation.pictures import Pictures, flow_process, unbuilt


class HiDream(Pictures):
    text = ("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds")
    zero = ("final_layer.linear.*",)

    def process(self) -> Process:
        return flow_process(self.component_config("scheduler"), reversed=True)

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        # layers first in the library, the batch first here
        return {
            "encoder_hidden_states_t5": t5,
            "encoder_hidden_states_llama3": llama.transpose(0, 1),
            "pooled_embeds": pooled,
        }

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, self.text)
        given["encoder_hidden_states_llama3"] = given["encoder_hidden_states_llama3"].transpose(0, 1)
        (prediction,) = self.forward(model)(latents, timesteps=timestep, return_dict=False, **given)
        if (
            prediction.shape != latents.shape
        ):  # in training the class leaves tokens [B, C, S, p * p], padded to a square's
            patch = int(self.config["patch_size"])
            height, width = latents.shape[2] // patch, latents.shape[3] // patch
            cells = (
                prediction[:, :, : height * width].unflatten(2, (height, width)).unflatten(4, (patch, patch))
            )
            prediction = cells.permute(0, 1, 2, 4, 3, 5).reshape(latents.shape)
        return prediction


CARD = ModelCard(
    name="hidream",
    title="HiDream-I1",
    family=HiDream,
    architectures=("HiDreamImagePipeline",),
    kind="generation",
    tasks=("text-to-image",),
    blocks=("double_stream_blocks.*", "single_stream_blocks.*"),
    towers={
        "blocks": ("double_stream_blocks", "single_stream_blocks"),
        "embedders": ("t_embedder", "p_embedder", "x_embedder", "caption_projection"),
        "output": ("final_layer",),
    },
    head="final_layer.linear",
    pipelines={"text-to-image": "HiDreamImagePipeline"},
    limits=unbuilt(ep="its experts are computed whole on every rank"),
    sizes={"full": Size("HiDream-ai/HiDream-I1-Full", 17.11, 48, devices=16, layout={"dp_shard": -1})},
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    keywords=("text to image", "image generation"),
    aliases=("hidream-i1",),
    seeds=("full",),
)
