"""What the Qwen VL models share beyond vision_language.py. Each model's file has what differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, MediaStream
from polymodal.core.tensors import to_device
from polymodal.data.boxes import BoxFormat
from polymodal.distributed import attention as packed_attention
from polymodal.models.card import Chain, ModelCard, PrunedModule
from polymodal.models.understanding.language import TEXT_PLAN
from polymodal.models.understanding.qwen_vl_media import VISION, QwenVLMedia, smart_resize
from polymodal.models.understanding.vision_language import (
    VisionLanguage,
    language_chain,
    vision_language_card,
)
from polymodal.recipe import Data

PIXELS = BoxFormat(
    scale=None,
    box="[{x1}, {y1}, {x2}, {y2}]",
    point="[{x1}, {y1}]",
    labelled='{{"{key}": {box}, "label": "{label}"}}',
    bare='{{"{key}": {box}}}',
    json=True,
    listing=("```json\n[\n\t", ",\n\t", "\n]\n```"),
)
"""Qwen2.5-VL: pixels of the resized picture, from 0 to its last one; objects as JSON with bbox_2d or point_2d
and label (QwenLM/Qwen3-VL: qwen-vl-finetune/tools/process_bbox.ipynb and README.md; the technical report,
arXiv:2502.13923, section 2.2.1)."""
RELATIVE = replace(PIXELS, scale=1000)
"""Qwen3-VL: the same JSON in thousandths of the picture (QwenLM/Qwen3-VL: cookbooks/omni_recognition.ipynb,
spatial_understanding.ipynb, 2d_grounding.ipynb)."""
MARKED = BoxFormat(
    scale=1000,
    box="<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
    point="<|box_start|>({x1},{y1})<|box_end|>",
    label="<|object_ref_start|>{label}<|object_ref_end|>",
    labelled="<|object_ref_start|>{label}<|object_ref_end|>{box}",
)
"""Qwen2-VL: thousandths between tokens of their own (arXiv:2409.12191, section 2.2; the same notebook
process_bbox.ipynb rounds them and ends at 1000)."""
VERIFIED = (
    "tiny models of the class: hidden states, logits and every gradient equal the library's; "
    "packed equals separate"
)


def qwen_vl_card(
    tensor_plan: Mapping[str, str],
    *,
    embedders: Sequence[str] = ("patch_embed",),
    enders: Sequence[str] = (),
    mergers: Sequence[str] = ("merger",),
    **facts: Any,
) -> ModelCard:
    """A card of the line; embedders, enders, mergers: modules of the vision tower before its blocks, and
    behind them.

    The projector (the merger, with Qwen3-VL's deepstack mergers) is frozen separately from the tower
    `vision`.
    """
    first, last = (tuple(f"model.visual.{name}" for name in names) for names in (embedders, enders))
    blocks, embedding = "model.visual.blocks.*", "model.language_model.embed_tokens"
    return vision_language_card(
        blocks=(blocks, "model.language_model.layers.*"),
        towers={
            "vision": (*first, "model.visual.blocks", *last),
            "projector": tuple(f"model.visual.{name}" for name in mergers),
            "language": ("model.language_model", "lm_head"),
        },
        pipeline={
            "vision": Chain(blocks, first=first, last=(*last, "model.visual.merger", embedding)),
            "language": language_chain(),
        },
        tensor_plan={**TEXT_PLAN, **tensor_plan},
        verified=VERIFIED,
        **facts,
    )


def vision_plan(up: Sequence[str], down: str, merger: Sequence[str] = (), *mergers: str) -> dict[str, str]:
    """Tensor plan of a vision tower: its MLP's layers, a merger's two layers, and names of the mergers; none
    if they are computed whole."""
    plan = {
        "model.visual": "stream",
        "model.visual.blocks.*.attn": "attention",
        "model.visual.blocks.*.attn.qkv": "fused_colwise",
        "model.visual.blocks.*.attn.proj": "rowwise",
        "model.visual.blocks.*.mlp": "mlp",
        **{f"model.visual.blocks.*.mlp.{name}": "colwise" for name in up},
        f"model.visual.blocks.*.mlp.{down}": "rowwise",
    }
    for name in (mergers or ("merger",)) if merger else ():
        plan |= {
            f"model.visual.{name}": "merger",
            f"model.visual.{name}.{merger[0]}": "colwise",
            f"model.visual.{name}.{merger[1]}": "rowwise",
        }
    return plan


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel is its stride and its whole input: a matrix product, and computed as one;
    GLM's of two dimensions too.

    torch's Conv3d takes 8 times (float32) to 100 times (bfloat16) as long on a CPU for 1024 patches, forward
    and backward, and is slow elsewhere too (pytorch issue 174051). It becomes a library's convolution by
    changing that one's class: parameters and names stay.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """[P, C, T, H, W] (or [P, C, H, W]) -> [P, D, 1, 1, 1]."""
        out = nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return out[..., None, None, None]


class QwenVL(VisionLanguage):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL dense and MoE.

    Qwen3-VL's deepstack: features of some vision blocks are added to the stream after the first language
    layers. They are carried as "deepstack" [levels, media tokens, D]: of the vision blocks before a stage,
    then those for the language layers of later stages.
    """

    line = "qwen-vl"
    media: type[QwenVLMedia] = QwenVLMedia
    rope = ""  # transformers' class that holds get_rope_index
    streams = (VISION,)
    rows_of = WeakTensorKeyDictionary()
    """Row numbers of the masks that are given to the language model with deepstack's features."""
    deep_mergers = "deepstack_merger_list"
    position_rows = 4  # its own count, then time, height, width

    def build(self) -> nn.Module:
        model: Any = super().build()
        model.model.visual.patch_embed.proj.__class__ = PatchEmbedding
        return model

    def media_processor(self, data: Data) -> QwenVLMedia:
        media = self.media(self.source, self.config, self.rope, data)
        media.boxes = self.card.boxes
        return media

    @classmethod
    def picture_size(cls, processor: Any, height: int, width: int) -> tuple[int, int]:
        pictures = processor.image_processor
        limits = pictures.size["shortest_edge"], pictures.size["longest_edge"]
        return smart_resize(pictures, height, width, *limits)

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        return model.model.visual(rows, grid_thw=sizes, **self.geometry(sizes, device)).pooler_output

    def run_tower(
        self, model: nn.Module, stream: MediaStream, batch: Batch, carry: dict[str, Tensor]
    ) -> Tensor | None:
        made: list[Tensor] = []
        mergers = getattr(model.model.visual, self.deep_mergers, ())
        here = [merger for merger in mergers if not isinstance(merger, PrunedModule)]
        hooks = [merger.register_forward_hook(lambda _, __, out: made.append(out)) for merger in here]
        try:
            state = super().run_tower(model, stream, batch, carry)
        finally:
            for hook in hooks:
                hook.remove()
        if made:
            own = torch.stack(made)
            before = carry.get("deepstack")
            carry["deepstack"] = own if before is None else torch.cat([before, own.to(before.dtype)])
        return state

    def add_features(
        self, stream: MediaStream, batch: Batch, hidden: Tensor, carried: dict[str, Tensor]
    ) -> Tensor:
        if stream.name != VISION.name or "deepstack" not in carried:
            return super().add_features(stream, batch, hidden, carried)
        features = carried.pop("vision.features").to(hidden.dtype)
        levels = carried["deepstack"].to(hidden.dtype)
        if "vision" in batch.media:
            joined = batch.media["vision"].features(torch.cat([features, *levels], dim=-1))
            features, *deeper = joined.split(hidden.shape[-1], dim=-1)
            # tensors between pipeline stages are never empty
            levels = nn.functional.pad(torch.stack(deeper), (0, 0, 0, not len(features)))
        features = self.repeated(VISION, batch, features)
        levels = torch.stack([self.repeated(VISION, batch, level) for level in levels])
        carried["deepstack"] = levels
        if not self.received(VISION, batch):
            hidden = hidden + levels.sum() * 0.0
        return self.insert_features(VISION, batch, hidden, features)

    def positions(self, batch: Batch, packed: bool) -> Tensor:
        # the library finds packed samples by a fourth row of positions; packed attention gets their lengths
        return batch["position_ids"][1:] if packed else batch["position_ids"]

    def language_arguments(
        self, batch: Batch, carried: dict[str, Tensor], start: int, done: int
    ) -> dict[str, Any]:
        levels = carried.pop("deepstack", None)
        if levels is None:
            return {}
        if levels.shape[0] > done - start:
            carried["deepstack"] = levels[done - start :]
        if not self.received(VISION, batch):
            return {}
        mask = self.media_mask(VISION, batch)
        self.rows_of[mask] = self.media_rows(VISION, batch)
        # the library adds a level after the block of its number: none for blocks of earlier stages
        return {
            "visual_pos_masks": mask,
            "deepstack_visual_embeds": [*[None] * start, *levels[: done - start]],
        }

    def carry_shapes(self, batch: Batch, before: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        shapes, vision = super().carry_shapes(batch, before), self.config.vision_config
        indexes = getattr(vision, "deepstack_visual_indexes", ())
        if before["vision"] < vision.depth:
            levels = sum(index < before["vision"] for index in indexes)
            rows = shapes["vision.state"][0] // vision.spatial_merge_size**2
        elif "vision.features" in shapes:  # another tower goes on
            levels, rows = len(indexes), shapes["vision.features"][0]
        else:
            levels, rows = len(indexes) - before["language"], max(1, self.received(VISION, batch))
        return {**shapes, "deepstack": (levels, rows, self.text.hidden_size)} if levels > 0 else shapes

    def stage_neighbours(self) -> dict[str, str]:
        indexes = getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ()
        return {
            f"model.visual.{self.deep_mergers}.{at}": f"model.visual.blocks.{index}"
            for at, index in enumerate(indexes)
        }

    # -- sizes of media

    def media_ids(self, stream: MediaStream) -> tuple[int, ...]:
        return self.config.image_token_id, self.config.video_token_id

    def media_parts(self, stream: MediaStream, sizes: Tensor) -> list[tuple[int, ...]]:
        """Frames: a patch attends within its own."""
        return [(1, h, w) for t, h, w in sizes.tolist() for _ in range(t)]

    def media_tokens(self, stream: MediaStream, part: tuple[int, ...]) -> int:
        return math.prod(part) // self.config.vision_config.spatial_merge_size**2

    def media_lengths(self, stream: MediaStream, part: tuple[int, ...]) -> tuple[int, ...]:
        t, h, w = part
        return (h * w,) * t

    def medium(self, stream: MediaStream, length: int) -> tuple[int, ...]:
        """A nearly square picture."""
        merge = self.config.vision_config.spatial_merge_size
        tokens = max(1, length // merge**2)
        height = max(1, math.isqrt(tokens))
        return 1, merge * height, merge * (tokens // height)

    def row_shape(self, stream: MediaStream) -> tuple[int, ...]:
        vision = self.config.vision_config
        return (vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,)

    def tower_state(self, stream: MediaStream, sizes: Tensor) -> tuple[int, ...]:
        vision = self.config.vision_config
        return int(sizes.prod(dim=1).sum()), getattr(vision, "embed_dim", None) or vision.hidden_size

    def check(self) -> None:
        """Raise PolymodalError for a config that cannot be run."""
        text, vision = self.config.text_config, self.config.vision_config
        merged = getattr(vision, "out_hidden_size", None) or vision.hidden_size
        if merged != text.hidden_size:
            raise PolymodalError(
                f"model.config: the vision tower gives features of {merged}, "
                f"the language model takes {text.hidden_size}.",
                "Set text_config.hidden_size and the vision tower's output size alike.",
            )
        for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            beyond = [index for index in getattr(vision, name, None) or () if index >= vision.depth]
            if beyond:
                raise PolymodalError(
                    f"model.config: vision_config.{name} names layer {beyond[0]}, "
                    f"but the vision tower has {vision.depth}.",
                    f"Set vision_config.{name} to layers below {vision.depth} as well.",
                )
        if len(getattr(vision, "deepstack_visual_indexes", None) or ()) > text.num_hidden_layers:
            raise PolymodalError(
                f"model.config: {len(vision.deepstack_visual_indexes)} deepstack features enter only "
                f"{text.num_hidden_layers} language layers.",
                "Shorten vision_config.deepstack_visual_indexes.",
            )

    def geometry(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """Arguments of the tower that follow from the grids [M, 3], computed on the host."""
        from transformers.vision_utils import get_vision_position_ids

        merge = self.config.vision_config.spatial_merge_size
        frames = [h * w for t, h, w in grid.tolist() for _ in range(t)]
        return {
            "position_ids": to_device(get_vision_position_ids(grid, merge), device),
            "cu_seqlens": packed_attention.cumulative(frames, device),
            "max_seqlen": max(frames),
        }

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        vision = self.config.vision_config
        block, merger = self.vision_weights(vision)
        side = getattr(vision, "embed_dim", None) or vision.hidden_size
        (row,) = self.row_shape(stream)
        full, window = self.vision_attention(vision)
        patches = sum(lengths)
        attended = sum(p * (full * p + (vision.depth - full) * min(window, p)) for p in lengths)
        blocks = 2.0 * patches * vision.depth * (4 * side * side + block) + 4.0 * side * attended
        return {
            "model.visual.patch_embed": 2.0 * patches * row * side,
            "model.visual.blocks.*": blocks,
            "model.visual.merger": 2.0 * patches / vision.spatial_merge_size**2 * merger,
        }

    def vision_weights(self, vision: Any) -> tuple[float, float]:
        """Weights of one block's MLP (for each patch), and of the mergers (for each merged token)."""
        raise NotImplementedError

    def vision_attention(self, vision: Any) -> tuple[int, int]:
        """Layers with attention over a whole picture, and the patches of a window in the other layers."""
        return vision.depth, 0
