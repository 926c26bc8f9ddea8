"""Tiny Qwen2-VL and Qwen3-VL of the real classes that can be cut into stages, and packs for them.

Toy pieces of the spike; used by tests only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.data.sample import IGNORE, Batch, Measure, Sample, hole, pack
from polymodal.models.card import Dropped, Family, ModelCard, Output
from polymodal.parallel import attention

IMAGE, VOCABULARY, MERGE = 5, 64, 4  # token of a picture, vocabulary, patches a picture token stands for
PATCH = 3 * 2 * 4 * 4  # channels x frames x height x width of a patch


class QwenStages(Family):
    """Any Qwen-VL by stages. Carry: hidden_states [1, T, D], position_ids [4, 1, T] and, while blocks ahead still
    want them, deepstack [levels, rows, D] with one row for each merged patch of the budget."""

    def stage(self, model: nn.Module, carry: dict[str, Tensor] | None, batch: Batch) -> dict[str, Tensor] | Output:
        text = model.model.language_model
        held = [layer for layer, block in enumerate(text.layers) if not isinstance(block, Dropped)]
        visual = (batch["input_ids"] == IMAGE)[0]
        count = int(visual.sum())
        if carry is None:
            hidden, levels = self._enter(model, batch, visual, count)
            carry = {"position_ids": batch["position_ids"]}
            first = 0
        else:
            hidden, levels = carry["hidden_states"], carry.get("deepstack")
            first = held[0]
        extra: dict[str, Any] = {}
        if levels is not None:
            # the library adds a level after the block of its number: none for blocks of earlier stages
            used = levels[: max(0, held[-1] + 1 - first), :count]
            extra["deepstack_visual_embeds"] = [hidden.new_zeros(count, hidden.shape[-1])] * first + list(used)
            extra["visual_pos_masks"] = visual[None]
        hidden = text(
            inputs_embeds=hidden,
            position_ids=carry["position_ids"],
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=batch.segments["text"],
            **extra,
        ).last_hidden_state
        if not isinstance(model.lm_head, Dropped):
            return Output(hidden, model.lm_head)
        out = {"hidden_states": hidden, "position_ids": carry["position_ids"]}
        if levels is not None and levels.shape[0] > held[-1] + 1 - first:
            out["deepstack"] = levels[held[-1] + 1 - first :]
        return out

    def _enter(self, model: nn.Module, batch: Batch, visual: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        hidden = model.model.language_model.embed_tokens(batch["input_ids"])
        pixels, grid = batch.get("pixel_values"), batch.get("grid_thw")
        if pixels is None:
            pixels, grid = torch.zeros(MERGE, PATCH), torch.tensor([[1, 2, 2]])
        seen = model.model.visual(pixels.to(hidden.dtype), grid_thw=grid)
        rows = seen.pooler_output
        hidden = hidden.masked_scatter(visual[None, :, None], rows[:count]) + rows[count:].sum() * 0
        features = getattr(seen, "deepstack_features", None)
        return hidden, torch.stack(features) if features else None

    def carry_spec(self, batch: Batch, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
        width, tokens = self.config.text_config.hidden_size, batch["input_ids"].shape[1]
        spec = {
            "hidden_states": torch.empty(1, tokens, width, dtype=dtype, device="meta", requires_grad=True),
            "position_ids": torch.empty_like(batch["position_ids"], device="meta"),
        }
        levels = len(getattr(self.config.vision_config, "deepstack_visual_indexes", ())) - layer
        if levels > 0:
            rows = batch["pixel_values"].shape[0] // MERGE
            spec["deepstack"] = torch.empty(levels, rows, width, dtype=dtype, device="meta", requires_grad=True)
        return spec


def _card(name: str) -> ModelCard:
    return ModelCard(
        name=name,
        family=QwenStages,
        architectures=(),
        tasks=(),
        blocks=("model.visual.blocks.*", "model.language_model.layers.*"),
        towers={"vision": ("model.visual",), "language": ("model.language_model", "lm_head")},
        first=("model.visual", "model.language_model.embed_tokens"),
        last=("model.language_model.norm", "lm_head"),
    )


def qwen3_vl(layers: int = 4) -> tuple[nn.Module, QwenStages]:
    """Three deepstack levels, untied head."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        vision_config={
            "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2],
        },
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        image_token_id=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip
    return _made(Qwen3VLForConditionalGeneration(config), config, "qwen3-vl")


def qwen2_vl(layers: int = 3) -> tuple[nn.Module, QwenStages]:
    """The head is tied to the embedding."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "temporal_patch_size": 2, "spatial_merge_size": 2,
        },
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        image_token_id=IMAGE, tie_word_embeddings=True,
    )  # fmt: skip
    return _made(Qwen2VLForConditionalGeneration(config), config, "qwen2-vl")


def _made(model: nn.Module, config: Any, name: str) -> tuple[nn.Module, QwenStages]:
    attention.use(model)
    return model, QwenStages(_card(name), config, name)


def example(id: int, seed: int, answer: int, picture: tuple[int, int] | None = None, prompt: int = 3) -> Sample:
    """A prompt, an optional picture of (height, width) patches in the middle of it, an answer with labels."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(6, VOCABULARY, (prompt + answer,), generator=draw)
    tokens = 0 if picture is None else picture[0] * picture[1] // MERGE
    ids = torch.cat([words[:2], torch.full((tokens,), IMAGE), words[2:]])
    length = len(ids)
    labels = torch.full((length,), IGNORE)
    labels[length - answer - 1 : -1] = ids[length - answer :]
    positions = torch.arange(length).repeat(4, 1)
    if picture is not None:
        height, width = picture[0] // 2, picture[1] // 2
        positions[1, 2 : 2 + tokens] = 2
        positions[2, 2 : 2 + tokens] = 2 + torch.arange(height).repeat_interleave(width)
        positions[3, 2 : 2 + tokens] = 2 + torch.arange(width).repeat(height)
        positions[1:, 2 + tokens :] += max(height, width) - tokens
    tensors = {"input_ids": ids, "labels": labels, "weights": (labels != IGNORE).float(), "position_ids": positions}
    patches = () if picture is None else (picture[0] * picture[1],)
    if picture is not None:
        tensors["pixel_values"] = torch.randn(patches[0], PATCH, generator=draw)
        tensors["grid_thw"] = torch.tensor([[1, *picture]])
    return Sample(id, tensors, Measure(length, answer, patches))


def padded(samples: Sequence[Sample], tokens: int, patches: int) -> Batch:
    """A pack of exactly so many tokens and patches: a weightless sample and a picture that no token stands for."""
    missing = tokens - sum(sample.measure.tokens for sample in samples)
    batch = pack([*samples, hole(missing, rows=4, token=6)] if missing else samples)
    pixels = batch.tensors.get("pixel_values", torch.zeros(0, PATCH))
    rest = patches - len(pixels)
    if rest:
        grid = batch.tensors.get("grid_thw", torch.zeros(0, 3, dtype=torch.int64))
        batch.tensors["pixel_values"] = torch.cat([pixels, torch.zeros(rest, PATCH)])
        batch.tensors["grid_thw"] = torch.cat([grid, torch.tensor([[1, 2, rest // 2]])])
    return batch
