"""DeepSeek-VL2's pictures as tiles and its prompts, as transformers' processors; no code of a repository
runs.

Sources: https://github.com/deepseek-ai/DeepSeek-VL2 (ef9f91e),
deepseek_vl2/models/processing_deepseek_vl_v2.py and conversation.py: the best of some resolutions, padding
instead of stretching, one tile more for the whole picture, and no tiles where a conversation has more than
two pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData

from polymodal.core.files import read_json

TOKENS = (
    "<image>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<|User|>",
    "<|Assistant|>",
)
PAD = "<｜▁pad▁｜>"
TILED = 2
"""Pictures of a conversation up to which they are cut into tiles."""
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}{{ '<|User|>: ' }}{% endif %}
{%- if message['role'] == 'assistant' %}{{ '<|Assistant|>:' }}{% generation %}{{ ' ' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}
{{- eos_token }}{% endgeneration %}
{%- else %}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<image>\\n' }}
{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}{{ '\\n\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"""


class DeepseekVL2ImageProcessor(BaseImageProcessor):
    """candidate_resolutions: [width, height] of pictures made of tiles; the first one's smaller side is a
    tile's. grid(): a picture's tiles. A call gives `pixel_values` [N, 3, S, S] and `images_spatial_crop` [M,
    2]."""

    model_input_names = ["pixel_values", "images_spatial_crop"]

    def __init__(
        self,
        candidate_resolutions: Any = ((384, 384),),
        image_mean: Any = (0.5, 0.5, 0.5),
        image_std: Any = (0.5, 0.5, 0.5),
        image_size: int = 384,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.candidate_resolutions = [list(each) for each in candidate_resolutions]
        self.image_mean, self.image_std, self.image_size = list(image_mean), list(image_std), image_size

    def grid(self, height: int, width: int, pictures: int = 1) -> tuple[int, int]:
        """(columns, rows) of tiles of a picture among so many of a conversation."""
        if pictures > TILED:
            return 1, 1

        def quality(resolution: list[int]) -> tuple[int, int]:
            scale = min(resolution[0] / width, resolution[1] / height)
            seen = min(int(width * scale) * int(height * scale), width * height)
            return seen, seen - resolution[0] * resolution[1]

        best = max(self.candidate_resolutions, key=quality)
        return best[0] // self.image_size, best[1] // self.image_size

    def tiles(self, picture: Image.Image, grid: tuple[int, int]) -> Tensor:
        """The whole picture and its (columns, rows) of tiles, [1 + n, 3, S, S] float32."""
        side, (columns, rows) = self.image_size, grid
        fill = tuple(int(each * 255) for each in self.image_mean)
        picture = picture.convert("RGB")
        whole = ImageOps.pad(picture, (side, side), color=fill)
        large = ImageOps.pad(picture, (columns * side, rows * side), color=fill)
        cells = [
            (x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)
        ]
        found = np.stack([np.asarray(each) for each in (whole, *map(large.crop, cells))])
        values = torch.from_numpy(found).permute(0, 3, 1, 2).float().div(255)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.image_mean, self.image_std))
        return (values - mean) / std

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """images: those of each conversation, or of one."""
        if not isinstance(images, (list, tuple)):
            images = [images]
        conversations = images if images and isinstance(images[0], (list, tuple)) else [images]
        tiles, crops = [], []
        for pictures in conversations:
            for picture in pictures:
                crops.append(self.grid(picture.height, picture.width, len(pictures)))
                tiles.append(self.tiles(picture, crops[-1]))
        return BatchFeature({"pixel_values": torch.cat(tiles), "images_spatial_crop": torch.tensor(crops)})


class DeepseekVL2Processor(ProcessorMixin):
    """tile_side: lines of a tile's features."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tile_side: int = 14,
        chat_template: Any = None,
    ):
        self.image_token, self.tile_side = TOKENS[0], tile_side
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def rows(self, grid: tuple[int, int]) -> int:
        """Rows of a picture's features: the whole view, the separator, its tiles, a newline behind each
        line."""
        side, (columns, rows) = self.tile_side, grid
        return side * (side + 1) + 1 + rows * side * (columns * side + 1)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        columns, rows = image_inputs["images_spatial_crop"][image_idx].tolist()
        return self.image_token * self.rows((columns, rows))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        grids = [self.image_processor.grid(*size, len(image_sizes)) for size in image_sizes or ()]
        return MultiModalData(
            num_image_tokens=[self.rows(grid) for grid in grids],
            num_image_patches=[1 + columns * rows for columns, rows in grids],
        )


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of the files; tokens that the published processor adds to it are added."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in TOKENS if token not in known], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def read_processor(directory: Path) -> DeepseekVL2Processor:
    """The processor of a published directory: config.json, processor_config.json and the tokenizer's
    files."""
    from polymodal.models.nets.deepseek_vl2 import DeepseekVL2Config

    raw = read_json(directory / "config.json")
    config = DeepseekVL2Config.from_dict(raw)
    path = directory / "processor_config.json"
    written = read_json(path) if path.is_file() else {}
    tokenizer = read_tokenizer(directory)
    images = DeepseekVL2ImageProcessor(
        written.get("candidate_resolutions") or config.candidate_resolutions,
        written.get("image_mean", (0.5,) * 3),
        written.get("image_std", (0.5,) * 3),
        config.vision_config.image_size,
    )
    return DeepseekVL2Processor(images, tokenizer, config.tile_side, chat_template=tokenizer.chat_template)
