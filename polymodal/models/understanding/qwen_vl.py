"""The family of the Qwen VL line: what its models share in building, running and costing.

Sees the ground floor and the card's types. Each model's own file holds its facts and overrides what differs.
The architecture is transformers'; nothing of it is copied: a stage calls its tower and its language model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import AXES, IGNORE, Batch, SampleLengths
from polymodal.distributed import attention as packed_attention
from polymodal.models import partial
from polymodal.models.card import Chain, Components, Output, PrunedModule
from polymodal.models.understanding.qwen_vl_media import QwenVLMedia
from polymodal.models.understanding.qwen_vl_sampling import Sampling
from polymodal.recipe import Data

BLOCKS = ("model.visual.blocks.*", "model.language_model.layers.*")
TASKS = ("image-text-to-text", "video-text-to-text")
KEYWORDS = (
    "vision-language", "image understanding", "video understanding", "visual question answering", "vqa", "ocr", "document",
    "chart", "caption", "grounding", "multimodal chat", "image", "picture", "photo", "video question",
)  # fmt: skip


def pipeline(*vision: str) -> dict[str, Chain]:
    """Chains of a pipeline: the vision tower, at whose end features are put among the token embeddings, and the
    language model. vision: further modules of the tower that lie with its first block."""
    return {
        "vision": Chain(
            "model.visual.blocks.*",
            first=tuple(f"model.visual.{name}" for name in ("patch_embed", *vision)),
            last=("model.visual.merger", "model.language_model.embed_tokens"),
        ),
        "language": Chain("model.language_model.layers.*", last=("model.language_model.norm", "lm_head")),
    }


TEXT_PLAN = {  # styles of parallel/tensor.py
    "model.language_model": "stream",
    "model.language_model.embed_tokens": "embedding",
    "model.language_model.layers.*.self_attn": "attention",
    "model.language_model.layers.*.self_attn.q_proj": "colwise",
    "model.language_model.layers.*.self_attn.k_proj": "colwise",
    "model.language_model.layers.*.self_attn.v_proj": "colwise",
    "model.language_model.layers.*.self_attn.o_proj": "rowwise",
    "model.language_model.layers.*.mlp": "mlp",
    "model.language_model.norm": "exit",
    "lm_head": "head",
}
DENSE_PLAN = {
    "model.language_model.layers.*.mlp.gate_proj": "colwise",
    "model.language_model.layers.*.mlp.up_proj": "colwise",
    "model.language_model.layers.*.mlp.down_proj": "rowwise",
}
EXPERTS_PLAN = {  # of experts cut over the tensor-parallel group, and of layers without any
    "model.language_model.layers.*.mlp.gate": "router",
    "model.language_model.layers.*.mlp.experts": "experts",
    **{f"{name}?": style for name, style in DENSE_PLAN.items()},
}
SPREAD_PLAN = {  # of experts spread over the expert-parallel group: styles of parallel/expert.py
    "model.language_model.layers.*.mlp.gate": "router",
    "model.language_model.layers.*.mlp.experts": "dispatch",
}


def vision_plan(up: Sequence[str], down: str, merger: tuple[str, str], *mergers: str) -> dict[str, str]:
    """Tensor plan of a vision tower: its MLP's layers, a merger's two layers, and what mergers there are."""
    plan = {
        "model.visual": "stream",
        "model.visual.blocks.*.attn": "attention",
        "model.visual.blocks.*.attn.qkv": "fused_colwise",
        "model.visual.blocks.*.attn.proj": "rowwise",
        "model.visual.blocks.*.mlp": "mlp",
        **{f"model.visual.blocks.*.mlp.{name}": "colwise" for name in up},
        f"model.visual.blocks.*.mlp.{down}": "rowwise",
    }
    for name in mergers or ("merger",):
        plan |= {
            f"model.visual.{name}": "merger",
            f"model.visual.{name}.{merger[0]}": "colwise",
            f"model.visual.{name}.{merger[1]}": "rowwise",
        }
    return plan


def towers(*vision: str, projector: Sequence[str] = ("merger",)) -> dict[str, tuple[str, ...]]:
    """The three parts users freeze apart, as the described system names them: encoder, projector, language model.

    The projector (the merger, with Qwen3-VL's deepstack mergers) lies inside `model.visual`, but is not `vision`.
    """
    return {
        "vision": tuple(f"model.visual.{name}" for name in ("patch_embed", "blocks", *vision)),
        "projector": tuple(f"model.visual.{name}" for name in projector),
        "language": ("model.language_model", "lm_head"),
    }


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel is its stride and its whole input: a matrix product, and computed as one.

    torch's Conv3d takes 8 times (float32) to 100 times (bfloat16) as long on a CPU for 1024 patches, forward and
    backward, and is slow elsewhere too (pytorch issue 174051). It becomes a library's convolution by changing that
    one's class: parameters and names stay.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """[P, C, T, H, W] -> [P, D, 1, 1, 1]."""
        out = nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return out[..., None, None, None]


class QwenVL(Sampling):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL dense and MoE. `attention` and `experts` are the recipe's model.* choices."""

    line = "qwen-vl"
    layout = "packed"
    media: type[QwenVLMedia] = QwenVLMedia
    rope = ""  # transformers' class that holds get_rope_index
    attention = "auto"
    experts = "auto"

    def build(self) -> Components:
        """The library's model on meta in float32, with the house's attention in text and vision."""
        from transformers import AutoModelForImageTextToText

        chosen = {} if self.experts == "auto" else {"experts_implementation": self.experts}
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                copy.deepcopy(self.config), dtype=torch.float32, attn_implementation="sdpa", **chosen
            )
        packed_attention.use(model, self.attention)
        model.model.visual.patch_embed.proj.__class__ = PatchEmbedding
        return Components(model.train())

    def media_processor(self, data: Data) -> QwenVLMedia:
        return self.media(self.source, self.config, self.rope, data)

    def stage(
        self, model: nn.Module, carry: Mapping[str, Tensor] | None, batch: Batch
    ) -> dict[str, Tensor] | Output:
        """The whole model, or one pipeline stage of it whose other modules are PrunedModule.

        carry: None on the first stage; {"patches": [P, D of the tower]} while the vision tower goes on; then
        {"hidden_states": [1, T, D]}. With Qwen3-VL also {"deepstack": [levels, media tokens, D]}: what vision blocks
        before have made and language blocks ahead still want. Returns the same for the next stage, or Output.
        """
        text, carry = model.model.language_model, carry or {}
        held = [number for number, block in enumerate(text.layers) if not isinstance(block, PrunedModule)]
        places = self.places(batch)
        hidden, levels = carry.get("hidden_states"), carry.get("deepstack")
        if hidden is None:
            patches, features, levels = self.see(model, batch, carry.get("patches"), levels)
            if patches is not None:
                return {"patches": patches, **({} if levels is None else {"deepstack": levels})}
            hidden, levels = self.enter(model.model, batch, places, features, levels)
        start = held[0] if held else 0
        done = held[-1] + 1 if held else start
        extra: dict[str, Any] = {}
        if held or not isinstance(model.lm_head, PrunedModule):
            packed = text.config._attn_implementation == packed_attention.NAME
            arguments: dict[str, Any] = {"cu_seq_lens_q": batch.segments["text"]} if packed else {}
            if batch.cut is not None:
                arguments["cut"] = batch.cut
            if levels is not None and self.received(batch):
                # the library adds a level after the block of its number: none for blocks of earlier stages
                arguments |= {
                    "visual_pos_masks": places,
                    "deepstack_visual_embeds": [*[None] * start, *levels[: done - start]],
                }
            out = text(
                inputs_embeds=hidden,
                # the library finds packed samples in a fourth row of positions; the house's attention is told
                position_ids=batch["position_ids"][1:] if packed else batch["position_ids"],
                attention_mask=None,
                use_cache=False,
                **arguments,
                **self.text_arguments,
            )
            hidden, extra = out.last_hidden_state, self.extra(out, carry)
        if not isinstance(model.lm_head, PrunedModule):
            return Output(hidden, model.lm_head, extra)
        ahead = (
            {} if levels is None or levels.shape[0] <= done - start else {"deepstack": levels[done - start :]}
        )
        return {"hidden_states": hidden, **ahead, **self.carried(batch, hidden, extra, carry)}

    text_arguments: Mapping[str, Any] = {}

    def extra(self, out: Any, carry: Mapping[str, Tensor]) -> dict[str, Any]:
        """Output.extra from the language model's output and what earlier stages say of their layers."""
        return {}

    def carried(
        self, batch: Batch, hidden: Tensor, extra: Mapping[str, Any], carry: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What a stage says of its layers to the stages ahead."""
        return {}

    def carried_spec(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what `carried` gives; it travels in float32 at least."""
        return {}

    def carry_spec(self, batch: Batch, before: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
        text, vision = self.config.text_config, self.config.vision_config
        merge, seen = vision.spatial_merge_size**2, self.patches(batch)
        if batch.media is not None:
            seen = int(batch.media.grid.prod(dim=1).sum())
        patches, rows = seen or merge, max(1, self.received(batch))
        indexes = getattr(vision, "deepstack_visual_indexes", ())
        shapes: dict[str, tuple[int, ...]] = {}
        if before["vision"] < vision.depth:
            shapes["patches"] = (patches, getattr(vision, "embed_dim", None) or vision.hidden_size)
            levels, rows = sum(index < before["vision"] for index in indexes), patches // merge
        else:
            shapes["hidden_states"] = (1, batch["input_ids"].shape[1], text.hidden_size)
            levels = len(indexes) - before["language"]
        if levels > 0:
            shapes["deepstack"] = (levels, rows, text.hidden_size)
        spec = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        if before["language"]:
            wide = torch.promote_types(dtype, torch.float32)
            spec |= {n: torch.empty(s, dtype=wide, device="meta") for n, s in self.carried_spec().items()}
        return spec

    def stage_neighbours(self) -> dict[str, str]:
        indexes = getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ()
        return {
            f"model.visual.deepstack_merger_list.{at}": f"model.visual.blocks.{index}"
            for at, index in enumerate(indexes)
        }

    def places(self, batch: Batch) -> Tensor:
        """Where media features stand among the tokens: bool [1, T]."""
        ids = batch["input_ids"]
        return (ids == self.config.image_token_id) | (ids == self.config.video_token_id)

    def received(self, batch: Batch) -> int:
        """Media features that stand at tokens of this batch, on this rank."""
        if batch.media is not None:
            return batch.media.received
        return self.patches(batch) // self.config.vision_config.spatial_merge_size**2

    def patches(self, batch: Batch) -> int:
        """Patches of a batch's media; later stages of a pipeline know their grids only."""
        pixels, grid = batch.get("pixel_values"), batch.get("grid_thw")
        if pixels is not None:
            return pixels.shape[0]
        return 0 if grid is None else int(getattr(grid, "host", grid).prod(dim=1).sum())

    def media_parts(self, grid: Tensor) -> list[tuple[int, int, int]]:
        """Frames: a patch attends within its own."""
        return [(1, h, w) for t, h, w in grid.tolist() for _ in range(t)]

    def media_tokens(self, part: tuple[int, int, int]) -> int:
        t, h, w = part
        return t * h * w // self.config.vision_config.spatial_merge_size**2

    def enter(
        self, inner: nn.Module, batch: Batch, places: Tensor, features: Tensor, levels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Token embeddings with media features in their places, and the features for the early layers (Qwen3-VL).

        Where pictures are dealt out to ranks, the features of this rank's tokens come from others.
        """
        hidden = inner.language_model.embed_tokens(batch["input_ids"])
        features, levels = features.to(hidden.dtype), levels if levels is None else levels.to(hidden.dtype)
        if batch.media is not None:
            every = features if levels is None else torch.cat([features, *levels], dim=-1)
            features, *deeper = batch.media.features(every).split(hidden.shape[-1], dim=-1)
            # what travels between pipeline stages is never empty
            levels = nn.functional.pad(torch.stack(deeper), (0, 0, 0, not len(features))) if deeper else None
        if not self.received(batch):
            nothing = features.sum() if levels is None else features.sum() + levels.sum()
            return hidden + nothing * 0.0, levels
        torch._assert_async(
            places.sum() == features.shape[0], "media tokens and media features differ in number"
        )
        return hidden.masked_scatter(places[..., None], features), levels

    def see(
        self, model: nn.Module, batch: Batch, patches: Tensor | None, levels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One call of the tower, or of the part of it that is here: the stream of patches [P, D] if the tower goes on
        elsewhere, else features [media tokens, D]; and those for early language layers [levels, media tokens, D].

        It runs on all media of the batch in reading order; on a dummy picture, times zero later on, when there are
        none: every rank of a sharded model must run the same modules.
        """
        visual = model.model.visual
        grid, pixels = batch.get("grid_thw"), batch.get("pixel_values")
        device = batch["input_ids"].device
        vision = self.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        if batch.media is not None:
            grid = batch.media.grid
            if patches is None:
                pixels = batch.media.patches(pixels, width, device)
        if patches is not None:  # the tower began in another stage: only their number counts
            seen = grid is not None and len(grid)
            pixels = torch.zeros((), device=device).expand(len(patches), width) if seen else None
        if pixels is None:
            side = vision.spatial_merge_size
            grid = torch.tensor([[1, side, side]])
            pixels = torch.zeros(side * side, width, device=device)
        grid = getattr(grid, "host", grid).cpu()
        made: list[Tensor] = []
        mergers = [m for m in getattr(visual, "deepstack_merger_list", ()) if not isinstance(m, PrunedModule)]
        hooks = [m.register_forward_hook(lambda _, __, out: made.append(out)) for m in mergers]
        try:
            left, out = partial.run(
                model,
                self.card.pipeline["vision"],
                patches,
                lambda: visual(pixels, grid_thw=grid, **self.geometry(grid, device)),
            )
        finally:
            for hook in hooks:
                hook.remove()
        if made:
            own = torch.stack(made)
            levels = own if levels is None else torch.cat([levels, own.to(levels.dtype)])
        return left, None if out is None else out.pooler_output, levels

    def check(self) -> None:
        """Raise PolymodalError for a config that cannot be run. Called once the recipe's overrides are in it."""
        text, vision = self.config.text_config, self.config.vision_config
        merged = getattr(vision, "out_hidden_size", None) or vision.hidden_size
        if merged != text.hidden_size:
            raise PolymodalError(
                f"model.config: the vision tower gives features of {merged}, the language model takes {text.hidden_size}.",
                "Set text_config.hidden_size and the vision tower's output size alike.",
            )
        for name, count in (
            ("fullatt_block_indexes", vision.depth),
            ("deepstack_visual_indexes", vision.depth),
        ):
            beyond = [index for index in getattr(vision, name, None) or () if index >= count]
            if beyond:
                raise PolymodalError(
                    f"model.config: vision_config.{name} names layer {beyond[0]}, but the vision tower has {count}.",
                    f"Set vision_config.{name} to layers below {count} as well.",
                )
        if len(getattr(vision, "deepstack_visual_indexes", None) or ()) > text.num_hidden_layers:
            raise PolymodalError(
                f"model.config: {len(vision.deepstack_visual_indexes)} deepstack features enter only {text.num_hidden_layers} language layers.",
                "Shorten vision_config.deepstack_visual_indexes.",
            )

    def geometry(self, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """What the tower derives from the grids [M, 3], computed on the host so that no layer waits for the device."""
        from transformers.vision_utils import get_vision_position_ids

        merge = self.config.vision_config.spatial_merge_size
        frames = [h * w for t, h, w in grid.tolist() for _ in range(t)]
        return {
            "position_ids": get_vision_position_ids(grid, merge).to(device, non_blocking=True),
            "cu_seqlens": packed_attention.cumulative(frames, device),
            "max_seqlen": max(frames),
        }

    def example(self, measure: SampleLengths) -> Batch:
        """Pictures of nearly square grids first, then text; the last `trained` tokens have labels.

        Raises PolymodalError when the pictures' tokens do not fit into measure.tokens.
        """
        vision, merge = self.config.vision_config, self.config.vision_config.spatial_merge_size
        grids = [nearly_square(max(1, patches // merge**2)) for patches in measure.patches]
        media = sum(height * width for height, width in grids)
        if media > measure.tokens:
            raise PolymodalError(f"Pictures of {media} tokens do not fit into {measure.tokens} tokens.")
        ids = torch.ones(1, measure.tokens, dtype=torch.int64)
        ids[0, :media] = self.config.image_token_id
        trained = torch.arange(measure.tokens)[None] >= measure.tokens - measure.trained
        tensors = {
            "input_ids": ids,
            "labels": torch.where(trained, ids, IGNORE),
            "weights": trained.float(),
            "position_ids": torch.arange(measure.tokens).expand(4, 1, -1).clone(),
        }
        if grids:
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            tensors["pixel_values"] = torch.zeros(media * merge**2, width)
            tensors["grid_thw"] = torch.tensor([[1, merge * h, merge * w] for h, w in grids])
        segments = {"text": packed_attention.cumulative([measure.tokens])}
        names = {"modality": ("image" if grids else "text",)}
        return Batch(tensors, {name: AXES[name] for name in tensors}, (0,), segments, names)

    def costs(self, measure: SampleLengths) -> dict[str, float]:
        """Forward FLOPs: two a weight and token, plus attention. Each entry of `patches` attends to itself."""
        text, vision = self.config.text_config, self.config.vision_config
        width = text.hidden_size
        head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
        queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
        projections = width * (2 * queries + 2 * keys)
        layers = text.num_hidden_layers
        language = 2.0 * measure.tokens * (layers * projections + self.mlp_weights(text))
        language += 2.0 * layers * queries * float(measure.tokens) ** 2  # causal: half of 4 T^2
        block, merger = self.vision_weights(vision)
        side = getattr(vision, "embed_dim", None) or vision.hidden_size
        embed = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * side
        full, window = self.vision_attention(vision)
        patches = sum(measure.patches)
        attended = sum(p * (full * p + (vision.depth - full) * min(window, p)) for p in measure.patches)
        return {
            "model.visual.patch_embed": 2.0 * patches * embed,
            "model.visual.blocks.*": 2.0 * patches * vision.depth * (4 * side * side + block)
            + 4.0 * side * attended,
            "model.visual.merger": 2.0 * patches / vision.spatial_merge_size**2 * merger,
            "model.language_model.layers.*": language,
            "lm_head": 2.0 * measure.trained * width * text.vocab_size,
        }

    def mlp_weights(self, text: Any) -> float:
        """Weights a token meets in the feed-forward parts of all layers."""
        return 3 * text.hidden_size * text.intermediate_size * text.num_hidden_layers

    def vision_weights(self, vision: Any) -> tuple[float, float]:
        """Weights a patch meets in one block's feed-forward part, and those a merged token meets in the mergers."""
        raise NotImplementedError

    def vision_attention(self, vision: Any) -> tuple[int, int]:
        """Layers that attend to a whole picture, and the patches of a window in the others."""
        return vision.depth, 0


def nearly_square(count: int) -> tuple[int, int]:
    """Height and width whose product is `count` or a little less, at most two apart in ratio."""
    height = max(1, int(count**0.5))
    return height, max(1, count // height)
