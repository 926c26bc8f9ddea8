"""What InternVL makes of pictures and videos: square tiles of one size, a fixed number of tokens each.

Tiling and pixels are the library's own processors'; here are the numbers of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaPart, MediaShape, Span
from polymodal.models.understanding.media import TokenMedia, encoded
from polymodal.models.understanding.tiles import TILES
from polymodal.recipe import Data


def limit_tiles(image_processor: Any, data: Data) -> None:
    """data.image's pixels as numbers of tiles, before the thumbnail; None keeps the processor's.

    Raises PolymodalError for limits that contradict each other, and for limits of a video's pixels.
    """
    area = image_processor.size["height"] * image_processor.size["width"]
    if data.image.min_pixels is not None:
        image_processor.min_patches = max(1, math.ceil(data.image.min_pixels / area))
    if data.image.max_pixels is not None:
        image_processor.max_patches = max(1, data.image.max_pixels // area)
    if image_processor.min_patches > image_processor.max_patches:
        raise PolymodalError(
            f"data.image: at least {image_processor.min_patches} tiles of {area} pixels and at most "
            f"{image_processor.max_patches} contradict each other.",
            "Set data.image.min_pixels and data.image.max_pixels together.",
        )
    if data.video.min_pixels is not None or data.video.max_pixels is not None:
        raise PolymodalError(
            f"data.video.min_pixels and max_pixels: a frame is one tile of {area} pixels for this model.",
            "Leave them out; data.video.fps and max_frames limit a video.",
        )


class InternVLMedia(TokenMedia):
    """MediaProcessor of tiles.

    processor: the library's InternVLProcessor; patches: of a tile, before merging.
    """

    streams = (TILES,)

    def __init__(self, directory: str, processor: Any, patches: int, data: Data):
        self.directory, self.tokenizer = directory, processor.tokenizer
        self.image_processor, self.video_processor = processor.image_processor, processor.video_processor
        limit_tiles(self.image_processor, data)
        # the library's processor cuts pictures into tiles whatever preprocessor_config.json has
        self.options = {"crop_to_patches": True, "max_patches": self.image_processor.max_patches}
        self.reads = {"image": processor.image_token, "video": processor.video_token}
        self.patches, self.tokens = patches, processor.image_seq_length
        self.start, self.end = processor.start_image_token_id, processor.end_image_token_id
        self.pad = processor.image_token_id

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides spans and pixels, for cache keys. JSON-able."""
        return {
            "class": type(self).__name__,
            "image": self.image_processor.to_dict(),
            "video": self.video_processor.to_dict(),
            "tokens": (self.tokens, self.start, self.end, self.pad),
        }

    def span(self, shape: MediaShape) -> Span:
        """<img>, the tokens of all tiles, </img>; of a video each frame by itself, after its number."""
        if min(shape.height, shape.width) < 1:
            raise PolymodalError(
                f"The {shape.kind} of {shape.width} x {shape.height} pixels cannot be used.",
                "Remove it, or change its size.",
            )
        tiles = shape.frames
        if shape.kind == "image":
            tiles = self.image_processor.get_number_of_image_patches(shape.height, shape.width, self.options)
            ids = [self.start, *[self.pad] * (self.tokens * tiles), self.end]
        else:
            ids = []
            for frame in range(tiles):
                ids += encoded(self.tokenizer, f"{'' if frame == 0 else chr(10)}Frame{frame + 1}: ")
                ids += [self.start, *[self.pad] * self.tokens, self.end]
        return Span(ids, (MediaPart(TILES.name, (tiles,), (self.patches,) * tiles),), shape)

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """PIL image, or video frames uint8 [F, H, W, 3] -> tiles [N, 3, S, S], their number [1, 1]."""
        if shape.kind == "image":
            rows = self.image_processor(images=[decoded], return_tensors="pt", **self.options)["pixel_values"]
        else:
            video = torch.as_tensor(decoded).permute(0, 3, 1, 2)
            out = self.video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
            rows = out["pixel_values_videos"][0]
        return {TILES.name: (rows, torch.tensor([[len(rows)]]))}
