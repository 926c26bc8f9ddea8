"""What the Qwen VL models make of pictures and videos: token spans, patches, positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaPart, MediaShape, MediaStream, Span
from polymodal.models.understanding.media import TokenMedia, encoded
from polymodal.recipe import Data

START, END = "<|vision_start|>", "<|vision_end|>"
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
VISION = MediaStream("vision", "pixel_values", "grid_thw")
"""Patches [P, D] float32, and (t, h, w) in patches of each medium."""


def smart_resize(processor: Any, height: int, width: int, low: int, high: int) -> tuple[int, int]:
    """(height, width) by the library's function, within limits in pixels."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    return smart_resize(height, width, processor.patch_size * processor.merge_size, low, high)


class QwenVLMedia(TokenMedia):
    """MediaProcessor of Qwen2-VL and Qwen2.5-VL.

    directory: a checkpoint with its tokenizer and processor files; config: its transformers config; rope:
    name of the transformers class whose `get_rope_index` gives positions. data.image and data.video override
    the checkpoint's pixel limits. Raises PolymodalError.
    """

    streams: tuple[MediaStream, ...] = (VISION,)
    rows = 4
    start, end, pads = START, END, PADS  # around a picture's features, and their placeholders by kind
    reads = {kind: START + pad + END for kind, pad in PADS.items()}
    counts_frames = False  # pixel limits of a video are of all its frames
    picture_frames = 1  # as which they count a picture

    def __init__(self, directory: str, config: Any, rope: str, data: Data):
        self.config = config
        self.rope = rope
        super().__init__(directory)
        self.processors = {
            "image": self.load("AutoImageProcessor", "image processor"),
            "video": self.load("AutoVideoProcessor", "video processor"),
        }
        self.ids = {text: self.token_id(text) for text in (self.start, self.end, *self.pads.values())}
        asked = {"image": data.image, "video": data.video}
        self.limits = {kind: (one.min_pixels, one.max_pixels) for kind, one in asked.items()}
        for kind, limits in self.limits.items():
            low, high = self.pixel_limits(kind)
            if limits != (None, None) and low > high:
                names = [
                    f"data.{kind}.{name}" if value else "the checkpoint's"
                    for name, value in zip(("min_pixels", "max_pixels"), limits, strict=True)
                ]
                raise PolymodalError(
                    f"{names[0]} smallest size of {low} pixels is more than {names[1]} largest of {high}.",
                    f"Set data.{kind}.min_pixels and data.{kind}.max_pixels together.",
                )
        self.frame_multiple: int = self.processors["video"].temporal_patch_size
        self.fps = data.video.fps

    def pixel_limits(self, kind: str, frames: int = 1) -> tuple[int, int]:
        """(min, max) pixels given to the library for one medium: the recipe's, else the checkpoint's."""
        volume = self.picture_frames if kind == "image" else frames if self.counts_frames else 1
        (low, high), size = self.limits[kind], self.processors[kind].size
        return (
            size["shortest_edge"] if low is None else low * volume,
            size["longest_edge"] if high is None else high * volume,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides spans and pixels, for cache keys. JSON-able."""
        image, video = ({**p.to_dict(), "limits": self.limits[kind]} for kind, p in self.processors.items())
        ids = {"class": type(self).__name__, "ids": self.ids}
        return {**ids, "image": image, "video": {**video, "fps": self.fps}}

    def resized(self, kind: str, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """(height, width) in pixels after the library's resizing. Raises PolymodalError."""
        try:
            return self.smart_resize(kind, height, width, frames)
        except (ValueError, ZeroDivisionError) as error:
            message = f"The {kind} of {width} x {height} pixels cannot be used: {error}."
            raise PolymodalError(message) from None

    def picture_size(self, height: int, width: int) -> tuple[int, int]:
        return self.resized("image", height, width)

    def smart_resize(self, kind: str, height: int, width: int, frames: int) -> tuple[int, int]:
        return smart_resize(self.processors[kind], height, width, *self.pixel_limits(kind))

    def grid(self, kind: str, height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
        """(t, h, w) in patches; a video is filled up with its last frame."""
        processor = self.processors[kind]
        temporal = processor.temporal_patch_size
        frames = max(frames, temporal) if kind == "video" else 1
        height, width = self.resized(kind, height, width, frames)
        t = -(-frames // temporal) if kind == "video" else 1
        return t, height // processor.patch_size, width // processor.patch_size

    def span(self, shape: MediaShape) -> Span:
        """Tokens and patches of a medium from its size alone."""
        kind = shape.kind
        grid = self.grid(kind, shape.height, shape.width, shape.frames)
        tokens = grid[0] * grid[1] * grid[2] // self.processors[kind].merge_size ** 2
        return Span(self.around(kind, tokens), (vision_part(grid),), shape)

    def around(self, kind: str, tokens: int) -> list[int]:
        """A picture's, or a frame's, placeholders between its marks."""
        return [self.ids[self.start], *[self.ids[self.pads[kind]]] * tokens, self.ids[self.end]]

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """PIL image, or video frames uint8 [F, H, W, 3] -> patches [P, D] float32, grid [1, 3] int64."""
        processor = self.processors[shape.kind]
        if shape.kind == "image":
            out = processor(images=[decoded], size=self._size(shape.kind, 1), return_tensors="pt")
            return {VISION.name: (out["pixel_values"], out["image_grid_thw"])}
        video = torch.as_tensor(decoded)
        missing = processor.temporal_patch_size - video.shape[0]
        if missing > 0:
            video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
        options = {"cap_pixels_per_frame": False} if hasattr(processor, "cap_pixels_per_frame") else {}
        out = processor(
            videos=[video.permute(0, 3, 1, 2)],
            size=self._size(shape.kind, video.shape[0]),
            do_sample_frames=False,
            return_tensors="pt",
            **options,
        )
        return {VISION.name: (out["pixel_values_videos"], out["video_grid_thw"])}

    def _size(self, kind: str, frames: int) -> dict[str, int]:
        return dict(zip(("shortest_edge", "longest_edge"), self.pixel_limits(kind, frames), strict=True))

    def position_ids(self, input_ids: Tensor, spans: Sequence[Span]) -> Tensor:
        """Positions [4, T] int64 of one sample: tokens from 0, time, height, width."""
        own = torch.arange(input_ids.shape[0])
        if not spans:
            return own.expand(4, -1).clone()
        import transformers

        library = getattr(transformers, self.rope)
        holder = SimpleNamespace(config=self.config)
        holder.get_vision_position_ids = partial(library.get_vision_position_ids, holder)
        merged = self.config.vision_config.spatial_merge_size**2
        kinds = torch.tensor([1 + (span.shape.kind == "video") for span in spans])
        tokens = torch.tensor([math.prod(span.parts[0].size) // merged for span in spans])
        pads = torch.tensor([self.ids[pad] for pad in self.pads.values()])
        types = torch.zeros_like(input_ids, dtype=torch.int32)
        types[torch.isin(input_ids, pads)] = kinds.repeat_interleave(tokens).int()
        media = {kind: [span for span in spans if span.shape.kind == kind] for kind in PADS}
        grids = {
            f"{kind}_grid_thw": torch.tensor([span.parts[0].size for span in found]) if found else None
            for kind, found in media.items()
        }
        steps = [span.shape.step for span in media["video"]]
        positions, _ = library.get_rope_index(
            holder,
            input_ids[None],
            mm_token_type_ids=types[None],
            second_per_grid_ts=torch.tensor(steps) if steps else None,
            **grids,
        )
        return torch.cat([own[None], positions[:, 0]])


class Qwen3VLMedia(QwenVLMedia):
    """Qwen3-VL: a video is its frames, each after its time in text; limits count all its pixels."""

    counts_frames = True

    def smart_resize(self, kind: str, height: int, width: int, frames: int) -> tuple[int, int]:
        if kind == "image":
            return super().smart_resize(kind, height, width, frames)
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        processor, limits = self.processors["video"], self.pixel_limits("video", frames)
        factor = processor.patch_size * processor.merge_size
        return smart_resize(frames, height, width, processor.temporal_patch_size, factor, *limits)

    def span(self, shape: MediaShape) -> Span:
        """As the library writes a video: each temporal patch after the mean time of its first and last frame,
        and the template's own start and end around the whole, as transformers 5 leaves them."""
        if shape.kind == "image":
            return super().span(shape)
        grid = self.grid(shape.kind, shape.height, shape.width, shape.frames)
        frame = self.around("video", grid[1] * grid[2] // self.processors["video"].merge_size ** 2)
        ids = [self.ids[START]]
        for first, last in self.times(shape.frames, shape.seconds):
            ids += [*encoded(self.tokenizer, f"<{(first + last) / 2:.1f} seconds>"), *frame]
        return Span([*ids, self.ids[END]], (vision_part(grid),), shape)

    def times(self, frames: int, seconds: Sequence[float] = ()) -> list[tuple[float, float]]:
        """Times of each temporal patch's first and last frame in seconds; without `seconds` the frames are
        data.video.fps apart."""
        known = list(seconds) or [index / self.fps for index in range(frames)]
        if len(known) != frames:
            raise ValueError(f"{frames} frames have {len(known)} times")
        temporal = self.processors["video"].temporal_patch_size
        known += [known[-1]] * (-len(known) % temporal)
        return [(known[i], known[i + temporal - 1]) for i in range(0, len(known), temporal)]


def vision_part(grid: tuple[int, int, int]) -> MediaPart:
    return MediaPart(VISION.name, grid, (grid[1] * grid[2],) * grid[0])
