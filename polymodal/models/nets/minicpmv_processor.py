"""MiniCPM-V's pictures as slices and its prompts, as transformers' processors; no code of a repository runs.

Sources: https://github.com/OpenBMB/MiniCPM-V (finetune/dataset.py) and the published repositories'
image_processing_minicpmv.py: the whole picture at about scale_resolution squared, and where it has more
pixels than that a grid of slices, each about as large again, whose aspect is nearest to the picture's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData

from polymodal.core.files import read_json

PLACEHOLDER = "<unk>"
TOKENS = (PLACEHOLDER, "<image>", "</image>", "<slice>", "</slice>")
BODY = """{% set seen = namespace(pictures=0) %}{% for message in messages %}{{ BEGIN }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ PICTURE }}{% set seen.pictures = seen.pictures + 1 %}
{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- if not loop.last and 'image' in (part['type'], loop.nextitem['type']) %}{{ '\\n' }}{% endif %}
{%- endfor %}{% endif %}{{ END }}{% endfor %}{% if add_generation_prompt %}{{ ASKED }}{% endif %}"""
LLAMA = {
    "BEGIN": "(bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n'",
    "PICTURE": "'<unk>'",
    "END": "'<|eot_id|>'",
    "ASKED": "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
}
CHATML = {
    "BEGIN": "('<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' if loop.first and "
    "message['role'] != 'system' else '') + '<|im_start|>' + message['role'] + '\\n'",
    "PICTURE": "'<image_id>' + seen.pictures | string + '</image_id><unk>'",
    "END": "'<|im_end|>\\n'",
    "ASKED": "'<|im_start|>assistant\\n'",
}
"""Of the published tokenizers' templates, with pictures as the published `chat` writes them: by themselves on
a line, in 2.6 with their number."""


def template(grids: bool) -> str:
    text = BODY
    for name, written in (CHATML if grids else LLAMA).items():
        text = text.replace(f"{{{{ {name} }}}}", f"{{{{ {written} }}}}")
    return text


class MiniCPMVImageProcessor(BaseImageProcessor):
    """picture(): the sizes of a picture's slices. A call gives `pixel_values`, patches [N, 3, P, P] of all
    slices row by row, and `image_grids` [M, 6] as nets/minicpmv.py takes them."""

    model_input_names = ["pixel_values", "image_grids"]

    def __init__(
        self,
        max_slice_nums: int = 9,
        scale_resolution: int = 448,
        patch_size: int = 14,
        norm_mean: Any = (0.5, 0.5, 0.5),
        norm_std: Any = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.max_slice_nums, self.scale_resolution = max_slice_nums, scale_resolution
        self.patch_size, self.norm_mean, self.norm_std = patch_size, list(norm_mean), list(norm_std)

    def resized(self, height: float, width: float, enlarge: bool) -> tuple[int, int]:
        """(rows, columns) of patches, of about scale_resolution squared where it is larger (or `enlarge`)."""
        if enlarge or height * width > self.scale_resolution**2:
            aspect = width / height
            height = int(self.scale_resolution / math.sqrt(aspect))
            width = int(height * aspect)
        rows, columns = (max(1, round(side / self.patch_size)) for side in (height, width))
        return rows, columns

    def picture(self, height: int, width: int) -> tuple[int, int, int, int, int, int]:
        """Rows and columns of patches of the whole, rows and columns of slices (0, 0: none), rows and columns
        of patches of each slice."""
        count = min(math.ceil(height * width / self.scale_resolution**2), self.max_slice_nums)
        if count <= 1:
            return *self.resized(height, width, True), 0, 0, 0, 0
        counts = [n for n in (count - 1, count, count + 1) if 1 < n <= self.max_slice_nums]
        grids = [(n // columns, columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
        aspect = math.log(width / height)
        rows, columns = min(grids, key=lambda grid: abs(aspect - math.log(grid[1] / grid[0])))
        high, wide = (max(1, round(side / n)) for side, n in ((height, rows), (width, columns)))
        return *self.resized(height, width, False), rows, columns, *self.resized(high, wide, True)

    def patches(self, picture: Image.Image, sizes: tuple[int, ...]) -> Tensor:
        """A picture's slices, the whole first, as patches [N, 3, P, P] float32, each row by row."""
        size, picture = self.patch_size, picture.convert("RGB")
        h, w, rows, columns, high, wide = sizes
        found = [self.pixels(picture, h, w).unflatten(1, (h, size)).unflatten(3, (w, size))]
        if rows:
            large = self.pixels(picture, rows * high, columns * wide)
            cut = large.unflatten(1, (rows, high, size)).unflatten(4, (columns, wide, size))
            found += [cut[:, row, :, :, column] for row in range(rows) for column in range(columns)]
        return torch.cat([each.permute(1, 3, 0, 2, 4).flatten(0, 1) for each in found])

    def pixels(self, picture: Image.Image, rows: int, columns: int) -> Tensor:
        """[3, H, W] of so many patches."""
        size = columns * self.patch_size, rows * self.patch_size
        values = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.norm_mean, self.norm_std))
        return (torch.from_numpy(values.copy()).permute(2, 0, 1).float().div(255) - mean) / std

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """images: those of each conversation, or of one."""
        if not isinstance(images, (list, tuple)):
            images = [images]
        nested = images if images and isinstance(images[0], (list, tuple)) else [images]
        pictures = [picture for conversation in nested for picture in conversation]
        sizes = [self.picture(picture.height, picture.width) for picture in pictures]
        pixels = [self.patches(picture, each) for picture, each in zip(pictures, sizes, strict=True)]
        return BatchFeature({"pixel_values": torch.cat(pixels), "image_grids": torch.tensor(sizes)})


class MiniCPMVProcessor(ProcessorMixin):
    """queries: rows of a slice's features; grids: written as 2.6 does, else as 2.5."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        queries: int = 64,
        grids: bool = True,
        chat_template: Any = None,
    ):
        self.image_token, self.queries, self.grids = PLACEHOLDER, queries, grids
        self.image_token_id = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def text(self, rows: int, columns: int) -> str:
        """What a picture with a grid of slices is in a prompt."""
        features = PLACEHOLDER * self.queries
        whole = f"<image>{features}</image>"
        one = f"<slice>{features}</slice>" if self.grids else whole
        lines = "\n".join([one * columns] * rows)
        return whole + (lines if self.grids or not rows else f"<slice>{lines}</slice>")

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        rows, columns = image_inputs["image_grids"][image_idx].tolist()[2:4]
        return self.text(rows, columns)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        sizes = [self.image_processor.picture(*size) for size in image_sizes or ()]
        written = [self.tokenizer.encode(self.text(*each[2:4]), add_special_tokens=False) for each in sizes]
        return MultiModalData(
            num_image_tokens=list(map(len, written)),
            num_image_patches=[h * w + n * m * high * wide for h, w, n, m, high, wide in sizes],
        )


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of the files, without their code. Raises ValueError where pictures' tokens are
    missing."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    known = tokenizer.get_vocab()
    missing = [token for token in TOKENS if token not in known]
    if missing:
        raise ValueError(f"the tokenizer does not know {', '.join(missing)}")
    return tokenizer


def read_processor(directory: Path) -> MiniCPMVProcessor:
    """The processor of a published directory: config.json, preprocessor_config.json and the tokenizer's
    files."""
    from polymodal.models.nets.minicpmv import MiniCPMVConfig

    config = MiniCPMVConfig.from_dict(read_json(directory / "config.json"))
    path = directory / "preprocessor_config.json"
    written = {**(config.slice_config or {}), **(read_json(path) if path.is_file() else {})}
    names = ("max_slice_nums", "scale_resolution", "norm_mean", "norm_std")
    images = MiniCPMVImageProcessor(
        **{name: written[name] for name in names if name in written},
        patch_size=config.vision_config.patch_size,
    )
    tokenizer = read_tokenizer(directory)
    tokenizer.chat_template = template(config.grids)
    return MiniCPMVProcessor(
        images, tokenizer, config.query_num, config.grids, chat_template=tokenizer.chat_template
    )
