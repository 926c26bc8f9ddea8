"""Lumina Image 2.0: text to image; its time runs from noise (0) to data (1).

Facts, and the arguments of diffusers' Lumina2Transformer2DModel and Lumina2Pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import ModelCard, Process, Size
from polymodal.models.generation.pictures import Pictures, flow_process, unbuilt


class Lumina2(Pictures):
    text = ("encoder_hidden_states", "encoder_attention_mask")

    def process(self) -> Process:
        return flow_process(self.component_config("scheduler"), ascending=True, reversed=True, scale=1.0)

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        embeddings, mask, _, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        given = self.conditions(model, batch, self.text)
        given["encoder_attention_mask"] = batch["encoder_attention_mask"].bool()
        (prediction,) = self.forward(model)(latents, timestep=timestep, return_dict=False, **given)
        return prediction

    def width(self) -> int:
        return int(self.config["hidden_size"])


CARD = ModelCard(
    name="lumina2",
    title="Lumina Image 2.0",
    family=Lumina2,
    architectures=("Lumina2Pipeline",),
    kind="generation",
    tasks=("text-to-image",),
    blocks=("layers.*", "noise_refiner.*", "context_refiner.*"),
    towers={
        "blocks": ("layers", "noise_refiner", "context_refiner"),
        "embedders": ("x_embedder", "time_caption_embed"),
        "output": ("norm_out",),
    },
    head="norm_out.linear_2",
    pipelines={"text-to-image": "Lumina2Pipeline"},
    limits=unbuilt(),
    sizes={"2b": Size("Alpha-VLLM/Lumina-Image-2.0", 2.61, 30, devices=8, layout={"dp_shard": -1})},
    verified="tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline",
    keywords=("text to image", "image generation"),
    aliases=("lumina-image-2.0", "lumina-image-2"),
    seeds=("2b",),
)
