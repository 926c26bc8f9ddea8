"""Tiny Qwen2-VL and Qwen3-VL of the real cards, and samples for them.

Toy pieces of the spike; used by tests only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import IGNORE, Batch, Sample, SampleLengths
from polymodal.models.card import Output
from polymodal.models.family import Family
from polymodal.models.understanding import qwen2_vl, qwen3_vl
from polymodal.models.understanding.qwen_vl_media import VISION as STREAM

IMAGE, VOCABULARY, MERGE = 5, 64, 4  # token of a picture, vocabulary, patches a picture token stands for
PATCH = 3 * 2 * 4 * 4  # channels x frames x height x width of a patch
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}  # fmt: skip
VISION = {"num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 4}


class Positions(qwen3_vl.Qwen3VL):
    """Takes the mRoPE positions along from stage to stage, to show that integers are sent too; the family itself
    leaves them in the batch, which every stage has."""

    def stage(
        self, model: nn.Module, carry: Mapping[str, Tensor] | None, batch: Batch
    ) -> dict[str, Tensor] | Output:
        if carry is not None:
            others = {name: tensor for name, tensor in batch.tensors.items() if name != "position_ids"}
            batch = replace(batch, tensors={**others, "position_ids": carry["position_ids"]})
        out = super().stage(model, carry, batch)
        return out if isinstance(out, Output) else {**out, "position_ids": batch["position_ids"]}

    def carry_spec(self, batch: Batch, before: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
        positions = torch.empty_like(batch["position_ids"], device="meta")
        return {**super().carry_spec(batch, before, dtype), "position_ids": positions}


def tiny_qwen3_vl() -> Family:
    """Three deepstack levels, untied head, four layers."""
    from transformers import Qwen3VLConfig

    vision = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 8}
    config = Qwen3VLConfig(
        vision_config=VISION | vision, text_config=text, tie_word_embeddings=False, **TOKENS
    )
    return Positions(qwen3_vl.CARD, config, "tiny")


def tiny_qwen2_vl(layers: int) -> Family:
    """The head is tied to the embedding."""
    from transformers import Qwen2VLConfig

    vision: dict[str, Any] = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    text = {**TEXT, "num_hidden_layers": layers, "tie_word_embeddings": True}
    config = Qwen2VLConfig(
        vision_config=VISION | vision, text_config=text, tie_word_embeddings=True, **TOKENS
    )
    return qwen2_vl.CARD.family(qwen2_vl.CARD, config, "tiny")


def example(id: int, answer: int, picture: tuple[int, int] | None = None) -> Sample:
    """A prompt of three words, an optional picture of (height, width) patches inside it, an answer with labels."""
    draw = torch.Generator().manual_seed(1000 + id)
    words = torch.randint(6, VOCABULARY, (3 + answer,), generator=draw)
    tokens = 0 if picture is None else picture[0] * picture[1] // MERGE
    ids = torch.cat([words[:2], torch.full((tokens,), IMAGE), words[2:]])
    length = len(ids)
    labels = torch.full((length,), IGNORE)
    labels[length - answer - 1 : -1] = ids[length - answer :]
    positions = torch.arange(length).repeat(4, 1)
    tensors = {
        "input_ids": ids,
        "labels": labels,
        "weights": (labels != IGNORE).float(),
        "position_ids": positions,
    }
    patches: tuple[int, ...] = ()
    if picture is not None:
        height, width = picture[0] // 2, picture[1] // 2
        positions[1, 2 : 2 + tokens] = 2
        positions[2, 2 : 2 + tokens] = 2 + torch.arange(height).repeat_interleave(width)
        positions[3, 2 : 2 + tokens] = 2 + torch.arange(width).repeat(height)
        positions[1:, 2 + tokens :] += max(height, width) - tokens
        patches = (picture[0] * picture[1],)
        tensors["pixel_values"] = torch.randn(patches[0], PATCH, generator=draw)
        tensors["grid_thw"] = torch.tensor([[1, *picture]])
    lengths = {"vision": patches} if patches else {}
    return Sample(id, tensors, SampleLengths(length, answer, lengths), streams=(STREAM,))
