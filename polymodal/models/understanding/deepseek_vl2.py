"""DeepSeek-VL2: facts, and the call of its tower of tiles. The config names attention and router.

Published sizes: https://github.com/deepseek-ai/DeepSeek-VL2. A picture is the view of the whole (size -1, -1:
its features end with the separator) and a grid of tiles (rows, columns); a line of tiles is the smallest
part. Longer than other cards: the config chooses between two attentions and two routers, each with its plan
and costs, and no library reads the authors' config, names and processor.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import MediaPart, MediaShape, MediaStream, Span
from polymodal.data.boxes import BoxFormat
from polymodal.models.card import Chain, Size, optional
from polymodal.models.understanding.language import (
    DENSE_PLAN,
    EXPERTS_PLAN,
    LATENT_PLAN,
    SHARED_PLAN,
    SPREAD_PLAN,
    TEXT_PLAN,
)
from polymodal.models.understanding.media import TokenMedia, readable
from polymodal.models.understanding.tiles import BLOCKS, TILES, TileVision, encoder_plan
from polymodal.models.understanding.vision_language import KEYWORDS, language_chain, vision_language_card
from polymodal.recipe import Data

BOXES = BoxFormat(
    scale=999,
    box="<|det|>[[{x1}, {y1}, {x2}, {y2}]]<|/det|>",
    point="<|det|>[[{x1}, {y1}]]<|/det|>",
    label="<|ref|>{label}<|/ref|>",
    labelled="<|ref|>{label}<|/ref|>{box}",
)
"""0 to 999 over the whole picture, whatever its tiles (README of the repository, "Inference" of
grounding)."""
WHOLE = (-1, -1)
"""Size of the view of a whole picture: its product is one tile, as that of a line of one tile."""


class DeepseekVL2Media(TokenMedia):
    """MediaProcessor of pictures as a whole view and tiles. patches: of a tile."""

    streams = (TILES,)
    counts_pictures = True

    def __init__(self, directory: str, processor: Any, patches: int, last: bool, data: Data):
        self.directory, self.tokenizer, self.processor = directory, processor.tokenizer, processor
        self.reads = {"image": processor.image_token}
        self.patches, self.last = patches, last
        limit(processor, data)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides spans and pixels, for cache keys. JSON-able."""
        image = self.processor.image_processor.to_dict()
        return {"class": type(self).__name__, "image": image, "last": self.last}

    def grid(self, shape: MediaShape) -> tuple[int, int]:
        return self.processor.image_processor.grid(shape.height, shape.width, shape.among)

    def sizes(self, shape: MediaShape) -> list[tuple[int, int]]:
        columns, rows = self.grid(shape)
        return [(rows, columns), WHOLE] if self.last else [WHOLE, (rows, columns)]

    def span(self, shape: MediaShape) -> Span:
        """The placeholder as often as the picture has features."""
        if min(shape.height, shape.width) < 1:
            raise PolymodalError(
                f"The picture of {shape.width} x {shape.height} pixels cannot be used.", "Remove it."
            )
        ids = [self.processor.image_token_id] * self.processor.rows(self.grid(shape))
        parts = [
            MediaPart(TILES.name, each, (self.patches,) * (each[0] * each[1])) for each in self.sizes(shape)
        ]
        return Span(ids, tuple(parts), shape)

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """PIL image -> tiles [N, 3, S, S], the sizes of its two views [2, 2]."""
        tiles = self.processor.image_processor.tiles(decoded, self.grid(shape))
        if self.last:
            tiles = torch.cat([tiles[1:], tiles[:1]])
        return {TILES.name: (tiles, torch.tensor(self.sizes(shape)))}


def limit(processor: Any, data: Data) -> None:
    """data.image's pixels as resolutions to choose from. Raises PolymodalError where none is left."""
    image, lowest, largest = processor.image_processor, data.image.min_pixels, data.image.max_pixels
    left = [
        each
        for each in image.candidate_resolutions
        if (lowest or 0) <= each[0] * each[1] <= (largest or float("inf"))
    ]
    if not left:
        side = image.image_size
        raise PolymodalError(
            f"data.image: none of this model's resolutions has {lowest or 0} to {largest or 'any number of'} "
            "pixels.",
            f"A tile has {side * side}; set data.image.min_pixels and max_pixels together.",
        )
    image.candidate_resolutions = left


class DeepseekVL2(TileVision):
    line = "deepseek-vl2"
    class_rows = 0

    # -- files, as published

    @classmethod
    def read_config(cls, directory: Path, trust: bool = False) -> Any:
        from polymodal.models.nets.deepseek_vl2 import DeepseekVL2Config
        from polymodal.models.nets.deepseek_vl2_processor import read_tokenizer

        raw = read_json(directory / "config.json")
        if "DeepseekOCRForCausalLM" in (raw.get("architectures") or ()):
            raise ValueError("this is DeepSeek-OCR, whose config.json has DeepSeek-VL2's model_type")
        config = DeepseekVL2Config.from_dict(raw)
        config.architectures = ["DeepseekVLV2ForCausalLM"]
        if config.image_token_id is None:
            config.image_token_id = read_tokenizer(directory).convert_tokens_to_ids("<image>")
        return config

    @classmethod
    def read_processor(cls, directory: Path, trust: bool = False) -> Any:
        from polymodal.models.nets.deepseek_vl2_processor import read_processor

        return read_processor(directory)

    @classmethod
    def write_processor(cls, processor: Any, directory: Path) -> None:
        """The resolutions in processor_config.json, where the published code reads them."""
        if processor.chat_template != cls.read_processor(directory).chat_template:
            raise PolymodalError(
                "data.chat_template cannot be kept in the authors' layout, who have it in their code.",
                "Leave data.chat_template out.",
            )
        path = directory / "processor_config.json"
        written = read_json(path) if path.is_file() else {}
        written["candidate_resolutions"] = processor.image_processor.candidate_resolutions
        path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def limit_media(self, processor: Any, data: Data) -> bool:
        limit(processor, data)
        return True

    def check(self) -> None:
        """Raise PolymodalError for a config that cannot be run."""
        self.require_known(
            ("language_config.scoring_func", self.text.scoring_func, ("softmax", "sigmoid")),
            (
                "language_config.topk_method",
                self.text.topk_method,
                ("greedy", "group_limited_greedy", "noaux_tc"),
            ),
        )

    # -- media

    def media_processor(self, data: Data) -> DeepseekVL2Media:
        read = functools.partial(self.read_processor, Path(self.source))
        processor = readable(self.source, "processor", read)
        last = self.config.global_view_pos == "tail"
        media = DeepseekVL2Media(self.source, processor, self.patches, last, data)
        media.boxes = self.card.boxes
        return media

    def medium(self, stream: MediaStream, length: int) -> tuple[int, ...]:
        return 1, max(1, round(length / self.patches))

    def media_parts(self, stream: MediaStream, sizes: Tensor) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for rows, columns in sizes.tolist():
            found += [WHOLE] if rows < 0 else [(1, columns)] * rows
        return found

    def media_tokens(self, stream: MediaStream, part: tuple[int, ...]) -> int:
        side = self.config.tile_side
        return side * (side + 1) + 1 if part == WHOLE else side * (part[1] * side + 1)

    def media_lengths(self, stream: MediaStream, part: tuple[int, ...]) -> tuple[int, ...]:
        return (self.patches,) * (part[0] * part[1])

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        inner: Any = model.model
        tiles = inner.multi_modal_projector(inner.vision_tower(rows).last_hidden_state)
        widths = [0 if part == WHOLE else part[1] for part in self.media_parts(stream, sizes)]
        return torch.cat(inner.bands(tiles, widths))

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        tiles, options = sum(lengths) / self.patches, self.config.projector_config
        inner, width = options["n_embed"] * options["mlp_ratio"], options["n_embed"]
        first = self.config.vision_config.width * options["downsample_ratio"] ** 2
        weights = first * inner + (options["depth"] - 2) * inner * inner + inner * width
        return {
            "model.vision_tower.embeddings": tiles * self.embedding_cost(),
            BLOCKS: tiles * self.config.vision_config.layers * self.block_cost(),
            "model.multi_modal_projector": tiles * 2.0 * self.config.tile_side**2 * weights,
        }

    def balance(self, weight: float | None) -> dict[str, Any]:
        """The published loss adds one term a layer, ours is of their mean; a router with a bias is not
        trained with one."""
        own = 0.0 if self.text.topk_method == "noaux_tc" else self.text.aux_loss_alpha * self.routers()[0]
        return {**super().balance(weight), **({"aux_weight": own} if weight is None else {})}


CARD = vision_language_card(
    name="deepseek-vl2",
    family=DeepseekVL2,
    architectures=("DeepseekVLV2ForCausalLM", "deepseek_vl_v2"),
    tasks=("image-text-to-text",),
    blocks=(BLOCKS, "model.language_model.layers.*"),
    towers={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector", "model.image_newline", "model.view_seperator"),
        "language": ("model.language_model", "lm_head"),
    },
    pipeline={
        "vision": Chain(
            BLOCKS,
            first=("model.vision_tower.embeddings",),
            last=(
                "model.vision_tower.post_layernorm",
                "model.vision_tower.attn_pool",
                "model.multi_modal_projector",
                "model.image_newline",
                "model.view_seperator",
                "model.language_model.embed_tokens",
            ),
        ),
        "language": language_chain(),
    },
    tensor_plan={
        **optional({**TEXT_PLAN, **LATENT_PLAN, **DENSE_PLAN, **EXPERTS_PLAN, **SHARED_PLAN}),
        **encoder_plan("post_layernorm"),
    },
    expert_plan=SPREAD_PLAN,
    boxes=BOXES,
    sizes={
        "tiny": Size("deepseek-ai/deepseek-vl2-tiny", 3.37, 12, 27, active=0.74),
        "small": Size("deepseek-ai/deepseek-vl2-small", 16.15, 27, 27, active=2.66),
        "base": Size("deepseek-ai/deepseek-vl2", 27.48, 30, 27, active=4.53, devices=16),
    },
    keywords=(*KEYWORDS, "mixture of experts", "moe", "latent attention"),
    aliases=("deepseekvl", "deepseekvl2", "deepseek-vl"),
    title="DeepSeek-VL2",
    verified="published numbers on small configs; tiny models: packed equals separate, keys load and save",
    seeds=("base",),
)
