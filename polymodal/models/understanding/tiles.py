"""Vision-language models whose tower reads squares of one size, each a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaStream
from polymodal.models.understanding.vision_language import VisionLanguage

TILES = MediaStream("vision", "pixel_values", "tiles", ("tile", "none", "none", "none"))
"""Tiles [N, 3, S, S] float32, and the number of tiles of each medium [M, 1]."""

BLOCKS = "model.vision_tower.encoder.layers.*"
"""Of the library's CLIP and SigLIP towers."""


def encoder_plan(exit: str) -> dict[str, str]:
    """Tensor-parallel styles of such a tower. exit: the module behind its blocks, whose rows are whole."""
    attention = f"{BLOCKS}.self_attn"
    return {
        "model.vision_tower": "stream",
        attention: "attention",
        **{f"{attention}.{name}_proj": "colwise" for name in "qkv"},
        f"{attention}.out_proj": "rowwise",
        f"{BLOCKS}.mlp": "mlp",
        f"{BLOCKS}.mlp.fc1": "colwise",
        f"{BLOCKS}.mlp.fc2": "rowwise",
        f"model.vision_tower.{exit}": "exit",
    }


class TileVision(VisionLanguage):
    """A tower of squares, whose states are [tiles, class_rows + patches, D] with a class token in front."""

    streams = (TILES,)
    class_rows = 1

    def require_known(self, *facts: tuple[str, Any, Sequence[Any]]) -> None:
        """Raise PolymodalError for a value of the config that is none of those known; facts: (key, value,
        known)."""
        for key, value, known in facts:
            if value not in known:
                raise PolymodalError(
                    f"model.config: {key} = {value} is not supported for {self.card.name}.",
                    f"Known: {', '.join(map(str, known))}.",
                )

    @property
    def tile_size(self) -> tuple[int, int]:
        """(height, width) of a tile in pixels."""
        size = self.config.vision_config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        size = self.config.vision_config.patch_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def patches(self) -> int:
        """Patches of a tile, without the class token."""
        (height, width), (rows, columns) = self.tile_size, self.patch_size
        return (height // rows) * (width // columns)

    @property
    def tile_tokens(self) -> int:
        """Features of a tile."""
        raise NotImplementedError

    def tower_state(self, stream: MediaStream, sizes: Tensor) -> tuple[int, ...]:
        rows = int(sizes.prod(dim=1).sum())
        return rows, self.class_rows + self.patches, self.config.vision_config.hidden_size

    def row_shape(self, stream: MediaStream) -> tuple[int, ...]:
        return (self.config.vision_config.num_channels, *self.tile_size)

    def medium(self, stream: MediaStream, length: int) -> tuple[int, ...]:
        return (max(1, round(length / self.patches)),)

    def media_parts(self, stream: MediaStream, sizes: Tensor) -> list[tuple[int, ...]]:
        return [(1,)] * int(sizes.sum())

    def media_tokens(self, stream: MediaStream, part: tuple[int, ...]) -> int:
        return part[0] * self.tile_tokens

    def media_lengths(self, stream: MediaStream, part: tuple[int, ...]) -> tuple[int, ...]:
        return (self.patches,) * part[0]

    def media_ids(self, stream: MediaStream) -> tuple[int, ...]:
        return (self.config.image_token_id,)

    def block_cost(self) -> float:
        """Forward FLOPs of one block of a plain transformer for one tile."""
        vision, rows = self.config.vision_config, self.class_rows + self.patches
        side = vision.hidden_size
        return 2.0 * rows * (4 * side * side + 2 * side * vision.intermediate_size) + 4.0 * side * rows**2

    def embedding_cost(self) -> float:
        """Forward FLOPs of the patch embedding of one tile."""
        vision = self.config.vision_config
        pixels = self.patches * self.patch_size[0] * self.patch_size[1]
        return 2.0 * vision.num_channels * pixels * vision.hidden_size
