"""MiniCPM-V 2.5 and 2.6: facts, and the call of its tower over slices of their own sizes.

Published sizes: https://github.com/OpenBMB/MiniCPM-V. Each slice is a medium of its tower: (rows, columns) of
patches become a fixed number of features. Longer than other cards: no library reads the authors' config and
processor, and the configs of the published sizes are here. Videos, which 2.6 reads as pictures, are not read.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import MediaPart, MediaShape, MediaStream, Span
from polymodal.models.card import Chain, Size
from polymodal.models.understanding.language import DENSE_PLAN, TEXT_PLAN
from polymodal.models.understanding.media import TokenMedia, encoded, readable
from polymodal.models.understanding.tiles import BLOCKS, encoder_plan
from polymodal.models.understanding.vision_language import (
    VisionLanguage,
    language_chain,
    vision_language_card,
)
from polymodal.recipe import Data

SLICES = MediaStream("vision", "pixel_values", "slice_grids", ("patch", "none", "none", "none"))
"""Patches [N, 3, P, P] float32, and (rows, columns) of patches of each slice [M, 2]."""
OURS = ("image_token_id", "batch_vision_input", "dtype", "architectures", "transformers_version")
"""Keys of our config that its authors' does not have, or that are none of the model's."""


class MiniCPMVMedia(TokenMedia):
    """MediaProcessor of pictures as slices. processor: nets/minicpmv_processor.py's."""

    streams = (SLICES,)

    def __init__(self, directory: str, processor: Any, data: Data):
        self.directory, self.tokenizer, self.processor = directory, processor.tokenizer, processor
        self.reads = {"image": processor.image_token}
        limit(processor, data)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides spans and pixels, for cache keys. JSON-able."""
        image = self.processor.image_processor.to_dict()
        return {"class": type(self).__name__, "image": image, "queries": self.processor.queries}

    def slices(self, shape: MediaShape) -> tuple[int, ...]:
        return self.processor.image_processor.picture(shape.height, shape.width)

    def span(self, shape: MediaShape) -> Span:
        """The rows of the whole picture between marks, then those of each slice."""
        from polymodal.models.nets.minicpmv import slices

        if min(shape.height, shape.width) < 1:
            raise PolymodalError(
                f"The picture of {shape.width} x {shape.height} pixels cannot be used.", "Remove it."
            )
        sizes = self.slices(shape)
        ids = encoded(self.tokenizer, self.processor.text(*sizes[2:4]))
        parts = [MediaPart(SLICES.name, each, (each[0] * each[1],)) for each in slices([sizes])]
        return Span(list(ids), tuple(parts), shape)

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """PIL image -> patches [N, 3, P, P], the grids of its slices [n, 2]."""
        from polymodal.models.nets.minicpmv import slices

        sizes = self.slices(shape)
        rows = self.processor.image_processor.patches(decoded, sizes)
        return {SLICES.name: (rows, torch.tensor(slices([sizes])))}


def limit(processor: Any, data: Data) -> None:
    """data.image.max_pixels as a number of slices. Raises PolymodalError for limits that cannot be kept."""
    image, area = processor.image_processor, processor.image_processor.scale_resolution**2
    if data.image.min_pixels is not None:
        raise PolymodalError(
            f"data.image.min_pixels: this model enlarges every picture to about {area} pixels.",
            "Leave it out; data.image.max_pixels limits the number of slices.",
        )
    if data.image.max_pixels is not None:
        image.max_slice_nums = max(1, data.image.max_pixels // area)


class MiniCPMV(VisionLanguage):
    line = "minicpm-v"
    streams = (SLICES,)

    # -- files, as published

    @classmethod
    def read_config(cls, directory: Path, trust: bool = False) -> Any:
        from polymodal.models.nets.minicpmv import MiniCPMVConfig
        from polymodal.models.nets.minicpmv_processor import PLACEHOLDER, read_tokenizer

        raw = read_json(directory / "config.json")
        if str(raw.get("version", "2.6")) not in ("2.5", "2.6") or not raw.get("vision_config"):
            raise ValueError(f"MiniCPM-V {raw.get('version', '2.0')} is not known here (known: 2.5, 2.6)")
        config = MiniCPMVConfig.from_dict(raw)
        config.architectures = ["MiniCPMV"]
        config.batch_vision_input = False  # a slice does not see the padding of shorter ones
        if config.image_token_id is None:
            config.image_token_id = read_tokenizer(directory).convert_tokens_to_ids(PLACEHOLDER)
        return config

    @classmethod
    def published_config(cls, facts: Mapping[str, Any]) -> Any:
        from polymodal.models.nets.minicpmv import MiniCPMVConfig

        return MiniCPMVConfig.from_dict(dict(facts))

    @classmethod
    def write_config(cls, config: Any, origin: Path, directory: Path) -> None:
        """config.json as the source has it, with the values that differ from the source's."""
        raw = read_json(origin / "config.json")
        before, after = cls.read_config(origin).to_dict(), config.to_dict()
        for old, new, into in (
            (before, after, raw),
            (before["vision_config"], after["vision_config"], raw["vision_config"]),
        ):
            into |= {
                key: value
                for key, value in new.items()
                if key not in (*OURS, "vision_config") and old.get(key) != value
            }
        if config.dtype is not None:
            raw["torch_dtype"] = str(config.dtype).removeprefix("torch.")
        text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def read_processor(cls, directory: Path, trust: bool = False) -> Any:
        from polymodal.models.nets.minicpmv_processor import read_processor

        return read_processor(directory)

    @classmethod
    def write_processor(cls, processor: Any, directory: Path) -> None:
        """The number of slices in preprocessor_config.json, where the published code reads it."""
        if processor.chat_template != cls.read_processor(directory).chat_template:
            raise PolymodalError(
                "data.chat_template cannot be kept in the authors' layout, whose pictures its code writes.",
                "Leave data.chat_template out.",
            )
        path = directory / "preprocessor_config.json"
        written = read_json(path) if path.is_file() else {}
        written["max_slice_nums"] = processor.image_processor.max_slice_nums
        path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def limit_media(self, processor: Any, data: Data) -> bool:
        limit(processor, data)
        return True

    # -- media

    @functools.cached_property
    def text(self) -> Any:  # type: ignore[override]
        return self.config.get_text_config()

    def media_processor(self, data: Data) -> MiniCPMVMedia:
        read = functools.partial(self.read_processor, Path(self.source))
        return MiniCPMVMedia(self.source, readable(self.source, "processor", read), data)

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        inner: Any = model.model
        return inner.slice_features(rows, [(h, w) for h, w in sizes.tolist()]).flatten(0, 1)

    def tower_state(self, stream: MediaStream, sizes: Tensor) -> tuple[int, ...]:
        return 1, int(sizes.prod(dim=1).sum()), self.config.vision_config.hidden_size

    def row_shape(self, stream: MediaStream) -> tuple[int, ...]:
        size = self.config.vision_config.patch_size
        return 3, size, size

    def medium(self, stream: MediaStream, length: int) -> tuple[int, ...]:
        rows = max(1, math.isqrt(length))
        return rows, max(1, round(length / rows))

    def media_tokens(self, stream: MediaStream, part: tuple[int, ...]) -> int:
        return int(self.config.query_num)

    def media_lengths(self, stream: MediaStream, part: tuple[int, ...]) -> tuple[int, ...]:
        return (part[0] * part[1],)

    def media_ids(self, stream: MediaStream) -> tuple[int, ...]:
        return (self.config.image_token_id,)

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        vision, width, queries = self.config.vision_config, self.text.hidden_size, self.config.query_num
        side, patches = vision.hidden_size, float(sum(lengths))
        block = 2.0 * patches * (4 * side * side + 2 * side * vision.intermediate_size)
        block += 4.0 * side * sum(length**2 for length in lengths)
        keys = 2.0 * patches * (side * width + 2 * width * width) + 4.0 * queries * width * patches
        rows = 2.0 * queries * width * width * (2 * len(lengths) + bool(lengths))
        return {
            "model.vision_tower.embeddings": 2.0 * patches * 3 * vision.patch_size**2 * side,
            BLOCKS: self.config.vision_layers * block,
            "model.resampler": keys + rows,
        }


def vision(kind: str) -> dict[str, Any]:
    sizes = {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_attention_heads": 16}
    return {"model_type": kind, **sizes, "num_hidden_layers": 27, "patch_size": 14}


LLAMA = {
    "model_type": "minicpmv",
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    **{"max_position_embeddings": 8192, "query_num": 96, "drop_vision_last_layer": False},
    **{"vision_config": vision("idefics2"), "image_token_id": 128002},
}
QWEN = {
    "model_type": "minicpmv",
    **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 151666},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
    **{"max_position_embeddings": 32768, "query_num": 64, "drop_vision_last_layer": False},
    **{"vision_config": vision("siglip_vision_model"), "image_token_id": 128244},
}
CARD = vision_language_card(
    name="minicpm-v",
    family=MiniCPMV,
    architectures=("MiniCPMV", "minicpmv"),
    tasks=("image-text-to-text",),
    blocks=(BLOCKS, "model.language_model.layers.*"),
    towers={
        "vision": ("model.vision_tower",),
        "projector": ("model.resampler",),
        "language": ("model.language_model", "lm_head"),
    },
    pipeline={
        "vision": Chain(
            BLOCKS,
            first=("model.vision_tower.embeddings",),
            last=(
                "model.vision_tower.post_layernorm",
                "model.resampler",
                "model.language_model.embed_tokens",
            ),
        ),
        "language": language_chain(),
    },
    tensor_plan={**TEXT_PLAN, **DENSE_PLAN, **encoder_plan("post_layernorm")},
    sizes={
        "2.5-8b": Size("openbmb/MiniCPM-Llama3-V-2_5", 8.54, 32, 27, config=LLAMA),
        "2.6-8b": Size("openbmb/MiniCPM-V-2_6", 8.10, 28, 27, config=QWEN),
    },
    aliases=("minicpmv", "minicpm-v-2", "minicpm"),
    title="MiniCPM-V 2.5, 2.6",
    verified="published numbers on small configs; tiny models: packed equals separate, keys load and save",
    seeds=("2.6-8b",),
)
