"""LLaVA 1.5: facts, and the call of its CLIP tower. A picture is one square of 336 x 336, 576 tokens.

The features are the states before the tower's last block (vision_feature_layer: -2), which is therefore not
run and frozen; in the library it gets no gradient either. It stays in the model and in an export.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaPart, MediaShape, MediaStream, Span
from polymodal.models.card import Chain, Size
from polymodal.models.understanding.language import DENSE_PLAN, TEXT_PLAN
from polymodal.models.understanding.media import TokenMedia, readable
from polymodal.models.understanding.tiles import BLOCKS, TILES, TileVision, encoder_plan
from polymodal.models.understanding.vision_language import language_chain, vision_language_card
from polymodal.recipe import Data


class LlavaMedia(TokenMedia):
    """MediaProcessor of pictures that become one square each. processor: the library's LlavaProcessor;
    tokens, patches: of a square."""

    streams = (TILES,)

    def __init__(self, directory: str, processor: Any, tokens: int, patches: int, data: Data):
        self.directory, self.tokenizer = directory, processor.tokenizer
        self.image_processor, self.tokens, self.patches = processor.image_processor, tokens, patches
        self.reads = {"image": processor.image_token}
        self.pad = processor.image_token_id
        limits = (data.image.min_pixels, data.image.max_pixels)
        if limits != (None, None):
            raise PolymodalError(
                "data.image.min_pixels and max_pixels: a picture is one square of fixed size for this model.",
                "Leave them out.",
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides spans and pixels, for cache keys. JSON-able."""
        image = self.image_processor.to_dict()
        return {"class": type(self).__name__, "image": image, "tokens": (self.tokens, self.pad)}

    def span(self, shape: MediaShape) -> Span:
        """The placeholder as often as a square has features, with nothing around it."""
        return Span([self.pad] * self.tokens, (MediaPart(TILES.name, (1,), (self.patches,)),), shape)

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """PIL image -> its square [1, 3, S, S], the number of squares [1, 1]."""
        rows = self.image_processor(images=[decoded], return_tensors="pt")["pixel_values"]
        return {TILES.name: (rows, torch.tensor([[len(rows)]]))}


class Llava(TileVision):
    line = "llava"

    def check(self) -> None:
        """Raise PolymodalError for a config that cannot be run."""
        layers = self.config.vision_config.num_hidden_layers
        self.require_known(
            ("vision_config.model_type", self.config.vision_config.model_type, ("clip_vision_model",)),
            ("vision_feature_layer", self.config.vision_feature_layer, tuple(range(-layers, 0))),
            ("vision_feature_select_strategy", self.config.vision_feature_select_strategy, ("default",)),
        )

    @property
    def used(self) -> int:
        """Blocks of the tower that features come from."""
        return int(self.config.vision_config.num_hidden_layers + self.config.vision_feature_layer + 1)

    @property
    def tile_tokens(self) -> int:
        return self.patches

    def build(self) -> nn.Module:
        """The library's model, whose modules that no feature comes from are frozen."""
        model: Any = super().build()
        vision = model.model.vision_tower
        vision.post_layernorm.requires_grad_(False)
        for block in vision.encoder.layers[self.used :]:
            block.requires_grad_(False)
            block.forward = lambda hidden, *args, **kwargs: hidden
        return model

    @classmethod
    def read_processor(cls, directory: Path, trust: bool = False) -> Any:
        """The library's processor, with what old processor_config.json files do not have."""
        processor, config = super().read_processor(directory, trust), cls.read_config(directory)
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token
        return processor

    def media_processor(self, data: Data) -> LlavaMedia:
        read = functools.partial(self.read_processor, Path(self.source))
        processor = readable(self.source, "processor", read)
        return LlavaMedia(self.source, processor, self.tile_tokens, self.patches, data)

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        vision, projector = model.model.vision_tower, model.model.multi_modal_projector
        embedded = vision.pre_layrnorm(vision.embeddings(rows))
        hidden = vision.encoder(inputs_embeds=embedded).last_hidden_state
        return projector(hidden)[:, 1:].flatten(0, 1)  # without the class token

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        vision, text, tiles = self.config.vision_config, self.text, sum(lengths) / self.patches
        weights = vision.hidden_size * text.hidden_size + text.hidden_size**2
        return {
            "model.vision_tower.embeddings": tiles * self.embedding_cost(),
            BLOCKS: tiles * self.used * self.block_cost(),
            "model.multi_modal_projector": tiles * 2.0 * (1 + self.patches) * weights,
        }


CARD = vision_language_card(
    name="llava-1.5",
    family=Llava,
    architectures=("LlavaForConditionalGeneration", "llava"),
    tasks=("image-text-to-text",),
    blocks=(BLOCKS, "model.language_model.layers.*"),
    towers={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    },
    pipeline={
        "vision": Chain(
            BLOCKS,
            first=("model.vision_tower.embeddings", "model.vision_tower.pre_layrnorm"),
            last=(
                "model.multi_modal_projector",
                "model.vision_tower.post_layernorm",
                "model.language_model.embed_tokens",
            ),
        ),
        "language": language_chain(),
    },
    tensor_plan={**TEXT_PLAN, **DENSE_PLAN, **encoder_plan("encoder")},
    sizes={
        "7b": Size("llava-hf/llava-1.5-7b-hf", 7.06, 32, 24),
        "13b": Size("llava-hf/llava-1.5-13b-hf", 13.35, 40, 24),
    },
    aliases=("llava", "llava1.5"),
    title="LLaVA 1.5",
    verified="tiny models of the class: logits and gradients equal the library's; packed equals separate",
    seeds=("7b",),
)
