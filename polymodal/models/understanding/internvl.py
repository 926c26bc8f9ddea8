"""InternVL 2 to 3.5: facts, and the call of its tower of tiles. The config names the language model.

Checkpoints of transformers' InternVLForConditionalGeneration, and those of the authors (internvl_chat.py).
The tower is InternViT-300M or InternViT-6B, whose 25 heads leave its attention whole on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import MediaStream
from polymodal.data.boxes import BoxFormat
from polymodal.models.card import Chain, ModelCard, Size, optional
from polymodal.models.understanding.internvl_chat import MODEL_TYPE, InternVLFiles
from polymodal.models.understanding.internvl_media import InternVLMedia, limit_tiles
from polymodal.models.understanding.language import EXPERTS_PLAN, SPREAD_PLAN, TEXT_PLAN
from polymodal.models.understanding.media import readable
from polymodal.models.understanding.tiles import TileVision
from polymodal.models.understanding.vision_language import (
    KEYWORDS,
    language_chain,
    vision_language_card,
)
from polymodal.recipe import Data

BOXES = BoxFormat(
    scale=1000,
    box="<box>[[{x1}, {y1}, {x2}, {y2}]]</box>",
    point="<box>[[{x1}, {y1}]]</box>",
    label="<ref>{label}</ref>",
    labelled="<ref>{label}</ref>{box}",
)
"""Thousandths of the whole picture, whatever its tiles ("Grounding / Detection Data" of
internvl.readthedocs.io/en/latest/get_started/chat_data_format.html)."""
EMBEDDING = "model.language_model.embed_tokens"
TEXT_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama")
ATTENTION = "model.vision_tower.encoder.layer.*.attention"
VISION_PLAN = {
    "model.vision_tower": "stream",
    ATTENTION: "attention",
    **{f"{ATTENTION}.{name}_proj": "colwise" for name in "qkv"},
    f"{ATTENTION}.projection_layer": "rowwise",
    "model.vision_tower.encoder.layer.*.mlp": "mlp",
    "model.vision_tower.encoder.layer.*.mlp.fc1": "colwise",
    "model.vision_tower.encoder.layer.*.mlp.fc2": "rowwise",
    "model.vision_tower.layernorm": "exit",
}


class InternVL(InternVLFiles, TileVision):
    line = "internvl"

    def __init__(self, card: ModelCard, config: Any, source: str):
        if getattr(config.vision_config, "use_qk_norm", False):
            plan = {name: style for name, style in card.tensor_plan.items() if not name.startswith(ATTENTION)}
            card = replace(card, tensor_plan={**plan, ATTENTION: "whole_attention"})
        super().__init__(card, config, source)

    def limit_media(self, processor: Any, data: Data) -> bool:
        limit_tiles(processor.image_processor, data)
        return True

    def check(self) -> None:
        """Raise PolymodalError for a config that cannot be run."""
        vision = self.config.vision_config
        sides = [size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)]
        self.require_known(
            ("text_config.model_type", self.text.model_type, TEXT_TYPES),
            ("vision_feature_layer", self.config.vision_feature_layer, (-1,)),
            ("vision_feature_select_strategy", self.config.vision_feature_select_strategy, ("default",)),
            ("image_seq_length", self.config.image_seq_length, (self.tile_tokens,)),
            ("vision_config.image_size, in patches,", sides, ([sides[0], sides[0]],)),
        )

    # -- media

    @property
    def tile_tokens(self) -> int:
        return int(self.patches * self.config.downsample_ratio**2)

    def media_processor(self, data: Data) -> InternVLMedia:
        read = functools.partial(self.read_processor, Path(self.source))
        media = InternVLMedia(self.source, readable(self.source, "processor", read), self.patches, data)
        media.boxes = self.card.boxes
        return media

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        inner: Any = model.model
        hidden = inner.vision_tower(pixel_values=rows).last_hidden_state[:, 1:]  # without the class token
        side = self.config.vision_config.image_size[0] // self.config.vision_config.patch_size[0]
        square = hidden.unflatten(1, (side, side)).contiguous()
        shuffled = inner.pixel_shuffle(square, self.config.downsample_ratio)
        return inner.multi_modal_projector(shuffled.flatten(1, 2)).flatten(0, 1)

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        vision, tiles = self.config.vision_config, sum(lengths) / self.patches
        merged, width = vision.hidden_size * self.patches // self.tile_tokens, self.text.hidden_size
        return {
            "model.vision_tower.embeddings": tiles * self.embedding_cost(),
            "model.vision_tower.encoder.layer.*": tiles * vision.num_hidden_layers * self.block_cost(),
            "model.multi_modal_projector": tiles * 2.0 * self.tile_tokens * (merged * width + width * width),
        }


TP4, TP8 = {"dp_shard": -1, "tp": 4}, {"dp_shard": -1, "tp": 8}
SIZES = {
    "2-8b": Size("OpenGVLab/InternVL2-8B", 8.08, 32, 24),
    "2.5-1b": Size("OpenGVLab/InternVL2_5-1B", 0.94, 24, 24),
    "2.5-4b": Size("OpenGVLab/InternVL2_5-4B", 3.71, 36, 24),
    "2.5-8b": Size("OpenGVLab/InternVL2_5-8B", 8.08, 32, 24),
    "2.5-26b": Size("OpenGVLab/InternVL2_5-26B", 25.51, 48, 45, devices=16),
    "2.5-38b": Size("OpenGVLab/InternVL2_5-38B", 38.39, 64, 45, devices=16, layout=TP4),
    "2.5-78b": Size("OpenGVLab/InternVL2_5-78B", 78.41, 80, 45, devices=32, layout=TP8),
    "3-1b": Size("OpenGVLab/InternVL3-1B", 0.94, 24, 24),
    "3-2b": Size("OpenGVLab/InternVL3-2B", 2.09, 28, 24),
    "3-8b": Size("OpenGVLab/InternVL3-8B", 7.94, 28, 24),
    "3-14b": Size("OpenGVLab/InternVL3-14B", 15.12, 48, 24),
    "3-38b": Size("OpenGVLab/InternVL3-38B", 38.39, 64, 45, devices=16, layout=TP4),
    "3-78b": Size("OpenGVLab/InternVL3-78B", 78.41, 80, 45, devices=32, layout=TP8),
    "3.5-4b": Size("OpenGVLab/InternVL3_5-4B", 4.73, 36, 24),
    "3.5-8b": Size("OpenGVLab/InternVL3_5-8B", 8.53, 36, 24),
    "3.5-30b-a3b": Size("OpenGVLab/InternVL3_5-30B-A3B", 30.85, 48, 24, active=3.3, devices=16),
}
CARD = vision_language_card(
    name="internvl",
    family=InternVL,
    architectures=("InternVLForConditionalGeneration", "internvl", "InternVLChatModel", MODEL_TYPE),
    blocks=("model.vision_tower.encoder.layer.*", "model.language_model.layers.*"),
    towers={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    },
    pipeline={
        "vision": Chain(
            "model.vision_tower.encoder.layer.*",
            first=("model.vision_tower.embeddings",),
            last=("model.vision_tower.layernorm", "model.multi_modal_projector", EMBEDDING),
        ),
        "language": language_chain(),
    },
    tensor_plan={**TEXT_PLAN, **optional(EXPERTS_PLAN), **VISION_PLAN},
    expert_plan=SPREAD_PLAN,
    boxes=BOXES,
    sizes=SIZES,
    keywords=(*KEYWORDS, "mixture of experts", "moe"),
    aliases=("internvl2", "internvl2.5", "internvl3", "internvl3.5", "internvl2_5", "internvl3_5"),
    title="InternVL",
    verified="tiny models of the class: logits and gradients equal the library's; packed equals separate",
    seeds=("2.5-4b", "2.5-78b", "3-8b", "3-78b", "3.5-30b-a3b"),
)
